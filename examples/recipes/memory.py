"""What one card must hold in each phase, before anything starts.

Weights, gradients and moments are counted; what a layer keeps for its backward pass is measured on one layer of the model's own width, here on
the CPU.  What a card holds besides (contexts, kernels' workspace, fragments) has the share of it that is left free.
"""

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

#: Share of a card that a phase may take; it is what vLLM takes, too.
ROOM = 0.85
_FLOAT32 = 4
# of logits in a loss; with more free memory a loss takes more of it (`Chunking`)
_CHUNK_BYTES = 144 << 20
# buffers of (rows, vocabulary) float32 that exist at once: logits, log-probs, probabilities, and what they are drawn or chosen with
_LOGITS_SAMPLED, _LOGITS_SCORED = 6, 3
_ROWS_SCORED = 512  # of `HFScorer`
# long enough for one kernel of attention, short enough for a laptop
_TOKENS = 16


@frozen
class Footprint:
    """Sizes of a model.

    Args:
        parameters: their number in the whole model, adapters included.
        trained: those that require a gradient.
        bytes_each: bytes of a parameter that is not trained.
        cached: bytes of the keys and values of one token, in all layers.
        layer: bytes that one layer keeps for its backward pass, a token.
        between: bytes that stay between layers whose activations are computed again, a token, in all layers.
        head: parameters of the head.
        width: hidden size.
        vocabulary: rows of the head.
    """

    parameters: int
    trained: int
    bytes_each: int
    cached: int
    layer: float
    between: float
    head: int
    width: int
    vocabulary: int


def add_adapters(model: Any, rank: int, seed: int = 0) -> Any:
    """The model with new adapters on all linear layers but the head, which the loss reads as it is."""
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def footprint(config: Any, dtype: torch.dtype, autocast: torch.dtype | None = None, lora_rank: int = 0) -> Footprint:
    """Sizes of a model of this configuration with weights of this dtype, as a student that is trained holds it."""
    whole = _make(config, dtype, lora_rank)
    layer, between = _kept_a_token(config, dtype, autocast, lora_rank)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Footprint(
        parameters=sum(p.numel() for p in whole.parameters()),
        trained=sum(p.numel() for p in whole.parameters() if p.requires_grad),
        bytes_each=dtype.itemsize,
        cached=2 * config.num_hidden_layers * config.num_key_value_heads * width * dtype.itemsize,
        layer=layer,
        between=between * config.num_hidden_layers,
        head=config.vocab_size * config.hidden_size,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def _make(config: Any, dtype: torch.dtype, lora_rank: int) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return add_adapters(model, lora_rank) if lora_rank else model


def _kept_a_token(config: Any, dtype: torch.dtype, autocast: torch.dtype | None, lora_rank: int) -> tuple[float, float]:
    """Bytes that one layer keeps for its backward pass, for each token: without recomputing activations, and with it."""
    small = {
        "num_hidden_layers": 1,
        "layer_types": None,
        "vocab_size": 2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    model = _make(type(config).from_dict({**config.to_dict(), **small}), dtype, lora_rank)
    model = model.to_empty(device="cpu").train()
    base, found = model.get_base_model() if lora_rank else model, list[float]()
    for recomputed in (False, True):
        if recomputed:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        short, long = (_kept(base.get_decoder(), autocast, tokens) for tokens in (_TOKENS, 2 * _TOKENS))
        found.append((long - short) / _TOKENS)
    return found[0], found[1]


def _kept(decoder: Any, autocast: torch.dtype | None, tokens: int) -> int:
    """Bytes of the tensors that autograd keeps of one forward pass."""
    kept = dict[int, torch.UntypedStorage]()  # which must live until they are counted, for a place in memory is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        output = decoder(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    del output
    return sum(storage.nbytes() for storage in kept.values())


def trained_gb(size: Footprint, tokens: int) -> dict[str, float]:
    """10^9 bytes of training on micro-batches of so many tokens."""
    loss = _CHUNK_BYTES + _FLOAT32 * (size.head + 2 * tokens * size.width)
    # weights that autocast rounded stay for the forward pass, the gradients of a layer stand beside what it keeps
    step = 2 * size.trained + tokens * (size.between + 2 * size.layer) + loss
    return _gb(
        {
            "weights": (size.parameters - size.trained) * size.bytes_each + size.trained * _FLOAT32,
            "gradients": size.trained * _FLOAT32,
            "moments": 2 * size.trained * _FLOAT32,
            # AdamW makes a copy as large as the trained weights, after the backward pass has ended
            "a step": max(step, size.trained * _FLOAT32),
        }
    )


def sampling_gb(size: Footprint, rows: int, prompt: int, response: int) -> dict[str, float]:
    """10^9 bytes of sampling so many responses at once, all of full length."""
    # a layer's keys and values are copied when they grow; the prompts of all rows are read at once
    layers = size.cached * (prompt + response) * rows
    working = _FLOAT32 * (size.head + _LOGITS_SAMPLED * rows * size.vocabulary) + rows * prompt * size.layer
    return _gb({"weights": size.parameters * size.bytes_each, "keys and values": layers, "a step": working})


def scoring_gb(size: Footprint, tokens: int) -> dict[str, float]:
    """10^9 bytes of scoring so many positions at once."""
    working = _FLOAT32 * (size.head + _LOGITS_SCORED * _ROWS_SCORED * size.vocabulary) + tokens * size.layer
    return _gb({"weights": size.parameters * size.bytes_each, "a step": working})


def together_gb(training: Mapping[str, float], *others: Mapping[str, float]) -> dict[str, float]:
    """10^9 bytes of training and of what takes turns with it, all weights staying where they are.

    Args:
        training: what training the student takes (`trained_gb`).
        others: sampling from the student, which has no weights of its own then; and scoring.
    """
    steps = [sum(part for name, part in each.items() if name != "weights") for each in others]
    return {**training, "a step": max(training["a step"], *steps)}


def _gb(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size / 1e9 for name, size in parts.items()}
