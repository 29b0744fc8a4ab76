"""What a training step must cost on a card: floating-point operations over the card's rate, bytes over its bandwidth, and which part is the head.

    python benchmarks/roofline.py       # writes benchmarks/results/roofline.json and the table of docs/gpu.md; a second; nothing is measured

Each matrix product takes the longer of its operations and its bytes; layers are taken at the full rate of the tensor cores.  So a step takes
longer than this, and the shares are those of a step in which everything runs equally near to the limits of the card.
"""

from collections.abc import Mapping
from typing import Any

from attrs import frozen
from record import describe_machine, result_file

_TERA = 1e12
#: Responses of this length, in micro-batches of as many tokens as two of them.
LENGTH, TOKENS = 4096, 8192


@frozen
class Card:
    """Rates of a card: dense operations a second in bfloat16 and in float32 without TF32, and bytes a second."""

    bfloat16: float
    float32: float
    bytes: float
    gb: float


#: SXM modules.  Source: NVIDIA's data sheets of A100 80GB (2021), H100 (2023) and H200 (2024); those of H100 and H200 have twice as much for
#: bfloat16, "with sparsity".
CARDS: Mapping[str, Card] = {
    "A100": Card(312 * _TERA, 19.5 * _TERA, 2.039 * _TERA, 80),
    "H100": Card(989 * _TERA, 67 * _TERA, 3.35 * _TERA, 80),
    "H200": Card(989 * _TERA, 67 * _TERA, 4.8 * _TERA, 141),
}
_QWEN3: Mapping[str, Any] = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
#: Configurations.  Source: config.json of Qwen/Qwen3-0.6B, Qwen/Qwen3-1.7B and Qwen/Qwen3-8B.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-0.6B": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen3-1.7B": _QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen3-8B": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False},
}


@frozen
class Head:
    """How the head's products are done.

    Args:
        operands: bytes of an operand, and of a gradient by a logit; 4 runs at the float32 rate of the card.
        rows: tokens of a chunk.
        weights: bytes of a weight as it is stored; where an operand has others, it is converted for each of two products.
    """

    operands: int
    rows: int
    weights: int = 2


#: Before: float32 products of bfloat16 weights, a buffer of 144 MiB.  After: operands in bfloat16, logits and sums in float32.
HEADS = {
    "float32 products, 240 rows": Head(4, 240),
    "bfloat16 operands, 240 rows": Head(2, 240),
    "float32 weights, bfloat16 operands, 2,048 rows": Head(2, 2048, weights=4),
    "bfloat16 operands, 2,048 rows": Head(2, 2048),
}
BEFORE, AFTER = "float32 products, 240 rows", "bfloat16 operands, 2,048 rows"


def layer_parameters(config: Mapping[str, Any]) -> int:
    """Count the weights of all layers that a token is multiplied with; those of norms are left out."""
    width, inner = config["hidden_size"], config["head_dim"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    attention = width * inner * (2 * heads + 2 * shared)
    return int(config["num_hidden_layers"] * (attention + 3 * width * config["intermediate_size"]))


def layer_flops(config: Mapping[str, Any], tokens: int, length: int, *, checkpointing: bool = False) -> float:
    """Count the operations of the layers.

    They are 6 for each weight and token, 8 where activations are computed again, and those of causal attention.
    """
    inner = config["num_attention_heads"] * config["head_dim"]
    # two products of (length, length) scores a head in the forward pass, of which half are masked
    attention = 2 * length * inner * config["num_hidden_layers"]
    return (4 if checkpointing else 3) * (2 * layer_parameters(config) + attention) * tokens


def head_seconds(tokens: int, width: int, vocabulary: int, card: Card, head: Head) -> float:
    """Return the seconds of three products a chunk, of the work on its rows, and of converting a weight that is stored in another dtype."""
    flops = 2 * head.rows * width * vocabulary / (card.bfloat16 if head.operands == 2 else card.float32)
    weight, logits = head.operands * width * vocabulary, 4 * head.rows * vocabulary
    gradient = head.operands * head.rows * vocabulary
    sums = 8 * width * vocabulary  # float32, read and written
    products = [weight + logits, gradient + weight, gradient + sums]
    # one read for the statistics, one read and one write for the gradient
    passes = 2 * logits + gradient
    if head.weights != head.operands:
        passes += 2 * (head.weights * width * vocabulary + weight)
    return tokens / head.rows * (sum(max(flops, bytes_ / card.bytes) for bytes_ in products) + passes / card.bytes)


def loss_floor(tokens: int, width: int, vocabulary: int, card: Card) -> float:
    """Return the seconds of the three products alone, in bfloat16, that no exact loss can do without."""
    return 6 * tokens * width * vocabulary / card.bfloat16


def rows() -> list[dict[str, Any]]:
    """Return a row for each model, card and way, with activations computed again."""
    found = []
    for model, config in MODELS.items():
        for name, card in CARDS.items():
            layers = layer_flops(config, TOKENS, LENGTH, checkpointing=True) / card.bfloat16
            heads = {way: head_seconds(TOKENS, config["hidden_size"], config["vocab_size"], card, head) for way, head in HEADS.items()}
            shares = {way: seconds / (layers + seconds) for way, seconds in heads.items()}
            speed = {way: TOKENS / (layers + seconds) for way, seconds in heads.items()}
            found.append({"model": model, "card": name, "layers_s": layers, "head_s": heads, "head_share": shares, "tokens_per_s": speed})
    return found


def goals(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the goal of the head."""
    (row,) = (row for row in found if (row["model"], row["card"]) == ("Qwen3-8B", "H100"))
    share = row["head_share"][AFTER]
    name = f"head, share of a step of Qwen3-8B on an H100, by the roofline (float32: {row['head_share'][BEFORE]:.2f})"
    return [{"name": name, "goal": "<= 0.15", "measured": share, "met": share <= 0.15}]


def main() -> None:
    """Compute, write."""
    found = rows()
    judged = goals(found)
    for row in (*found, *judged):
        print(row)
    result_file("roofline", describe_machine(), found, judged)


if __name__ == "__main__":
    main()
