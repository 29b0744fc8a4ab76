"""A transformers causal LM cut below its head: the one place that knows where head, bias, scale and soft-cap are.

Sampling, scoring and training all compute log-probs through here, so they cannot disagree about what a logit is.
Duck-typed on purpose: importing this module imports no engine.

Shape suffixes: N tokens, M selected tokens, R of a chunk, A ids asked for, K candidates, D hidden size, V vocabulary, B rows, S positions.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lopd.engines.masks import known_rows
from lopd.errors import ModelError
from lopd.records.identity import TokenizerId, TokenizerLike, fingerprint_tokenizer
from lopd.records.ranks import peeled
from lopd.records.steps import LMHead

#: Fields of a configuration that multiply the logits (1) or divide them (-1), and that cap them; the probes find a model that does otherwise.
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1, "logits_mup_width_multiplier": -1}
_MULTIPLIED_BY_ALL = ("hyperclovax",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "context_length",
)


def unwrap(model: Any) -> Any:
    """Return the transformers model inside torch.compile, data parallelism and peft (its layers keep their adapters), or the model itself."""
    model = without_runners(model)
    return unwrap(model.get_base_model()) if hasattr(model, "get_base_model") else model


def without_runners(model: Any) -> Any:
    """Return what is inside torch.compile and data parallelism: a transformers model, or a model of peft around one."""
    *_, own = peeled(model, (DataParallel, DistributedDataParallel))
    return own


def recompute_layers(model: Any) -> None:
    """Make the model recompute activations in the backward pass: less memory, more time.  transformers 5.24 renamed the switch."""
    switch = "activation_checkpointing" if hasattr(unwrap(model), "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(unwrap(model), f"{switch}_enable")(**{f"{switch}_kwargs": {"use_reentrant": False}})


def lm_head(model: Any, vocab_size: int) -> LMHead:
    """Return the head of a causal LM, cut to the tokenizer's vocabulary; made again at each step, because wrappers swap weights.

    Raises:
        ModelError: no linear head, a head with fewer rows than the tokenizer has ids, or an adapter on the head.
    """
    base = unwrap(model)
    layer = base.get_output_embeddings()
    name = type(base).__name__
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise ModelError(f"Model {name}: its output embedding is {type(layer).__name__}, expected a linear layer; use a causal LM.")
    if hasattr(layer, "base_layer"):
        raise ModelError(f"Model {name}: lm_head carries an adapter, expected a plain linear layer; leave lm_head out of target_modules.")
    rows = layer.weight.shape[0]
    if rows < vocab_size:
        raise ModelError(
            f"Model {getattr(base.config, '_name_or_path', '') or name}: its head has {rows} rows, expected at least the tokenizer's {vocab_size} "
            "ids; load the tokenizer that belongs to it (itself and not its fingerprint, which does not state what was added), or resize the token "
            "embeddings."
        )
    bias = getattr(layer, "bias", None)
    return LMHead(
        weight=layer.weight if rows == vocab_size else layer.weight[:vocab_size],
        bias=bias if bias is None or rows == vocab_size else bias[:vocab_size],
        softcap=_first_number(text_config(model), _CAPS),
        scale=_scale(text_config(model)),
    )


def stated_ends(model: Any) -> int | list[int] | None:
    """Return the ids that end a response, as the generation configuration of a model states them."""
    ends: int | list[int] | None = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    return ends


def cut_to_head(model: Any, tokenizer: TokenizerId | TokenizerLike) -> TokenizerId:
    """Return the fingerprint of a tokenizer, cut to the ids that the head of this model has rows for; see `cut_to_rows`."""
    return cut_to_rows(tokenizer, head_rows(model))


def head_rows(model: Any) -> int | None:
    """Return how many ids the head of this model has rows for."""
    try:
        return int(unwrap(model).get_output_embeddings().weight.shape[0])
    except Exception:  # what has no head is refused by name where that is used
        return None


def cut_to_rows(tokenizer: TokenizerId | TokenizerLike, rows: int | None) -> TokenizerId:
    """Return the fingerprint of a tokenizer, cut to the ids that a head of so many rows has, if only added tokens are beyond them.

    A family may share a tokenizer whose last tokens stand for what some of its models do not read, such as pictures: those models give them no
    probability.  Uncut where a token of the base vocabulary, or the end of a response, would be cut off; and where it is a fingerprint already.
    """
    whole = fingerprint_tokenizer(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", None)
    # an end that is never drawn would not be noticed
    if isinstance(tokenizer, TokenizerId) or not added or rows is None or not (whole.eos_id or 0) < rows < whole.vocab_size:
        return whole
    beyond = (token for token in tokenizer.get_vocab().values() if token >= rows)
    return evolve(whole, vocab_size=rows) if all(token in added for token in beyond) else whole


def decoder_of(base: Any) -> Any:
    """Return the layers below the head.  transformers finds them by name, and may take the head, the model itself or a causal LM for them."""
    found = base.get_decoder()
    if found is base or isinstance(found, torch.nn.Linear):
        return getattr(base, "model", found)
    inner = getattr(found, "get_output_embeddings", lambda: None)()
    return found if inner is None else decoder_of(found)


def text_config(model: Any) -> Any:
    """Return the part of a model's configuration that is about text."""
    return unwrap(model).config.get_text_config()


def attention_of(model: Any) -> str:
    """Return what transformers calls the way in which this model computes attention."""
    return str(getattr(unwrap(model).config, "_attn_implementation", None))


def _first_number(config: Any, names: Iterable[str]) -> float | None:
    """Return the first of these fields that is a number above 0: transformers writes None, 0, -1 or a word where a field does not apply."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int | float) and value > 0), None)


def _scale(config: Any) -> float:
    scale = 1.0
    for name, power in _SCALES.items():
        value = float(_first_number(config, [name]) or 1.0)
        scale *= value if power > 0 or getattr(config, "model_type", None) in _MULTIPLIED_BY_ALL else 1 / value
    return scale


def hidden_states(model: Any, input_ids_BS: Tensor, position_ids_BS: Tensor | None = None, **lengths: Any) -> Tensor:
    """Return (B, S, D) hidden states below the head.

    Args:
        model: a causal LM, or a peft model around one.
        input_ids_BS: token ids.
        position_ids_BS: positions that restart within a row mark packed rollouts, which do not see each other.
        lengths: the same for FlashAttention, which would ask the positions, and wait for the answer, at each layer.
    """
    # not every decoder takes positions
    given = lengths if position_ids_BS is None else {"position_ids": position_ids_BS, **lengths}
    output: Tensor = decoder_of(unwrap(model))(input_ids=input_ids_BS, use_cache=False, **given).last_hidden_state
    return output


def knows_lengths(model: Any) -> bool:
    """Return whether the attention reads packed rollouts as they come (FlashAttention, FlexAttention).

    Any other would compute all N * N pairs and mask most of them, so there each rollout is a row of its own.
    """
    attention = attention_of(model)
    return "flash" in attention or attention == "flex_attention"


def packed_hidden_states(model: Any, input_ids_N: Tensor, position_ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return (N, D) hidden states of a packed batch, whose positions restart with each rollout; rollouts do not see each other.

    They stay one row where the attention `knows_lengths`.  Neither form asks a GPU for anything: `lengths` are those of the rollouts.
    """
    return _by_side(model, _as_they_come if knows_lengths(model) else _in_rows, input_ids_N, position_ids_N, lengths)


def row_hidden_states(model: Any, input_ids_N: Tensor, position_ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return (N, D) hidden states of the same batch, each rollout in a row of its own, padded on the right, where a causal model cannot look."""
    return _by_side(model, _in_rows, input_ids_N, position_ids_N, lengths)


def _as_they_come(model: Any, input_ids_N: Tensor, position_ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    rollout_N = _rollouts(position_ids_N)
    if "flash" not in attention_of(model):
        with known_rows(rollout_N[None]):
            return hidden_states(model, input_ids_N[None], position_ids_N[None])[0]
    rollouts_B1 = torch.arange(len(lengths) + 1, device=position_ids_N.device)
    borders_B1 = torch.searchsorted(rollout_N, rollouts_B1, out_int32=True)
    borders = {"cu_seq_lens_q": borders_B1, "cu_seq_lens_k": borders_B1, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    with known_rows():
        return hidden_states(model, input_ids_N[None], position_ids_N[None], **borders)[0]


def _in_rows(model: Any, input_ids_N: Tensor, position_ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    row_N = _rollouts(position_ids_N)
    input_ids_BS = input_ids_N.new_zeros(len(lengths), max(lengths))
    input_ids_BS[row_N, position_ids_N] = input_ids_N
    with known_rows():
        return hidden_states(model, input_ids_BS)[row_N, position_ids_N]


def _rollouts(position_ids_N: Tensor) -> Tensor:
    """Return (N,) the number of the rollout that each position belongs to."""
    return (position_ids_N == 0).cumsum(0) - 1


def _by_side(model: Any, compute: Callable[..., Tensor], input_ids_N: Tensor, position_ids_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return what `compute` gives for rollouts on one side of each rope border, then on the next, in the order given."""
    borders = rope_borders(text_config(model))
    sides = [bisect_left(borders, length) for length in lengths]
    found: dict[int, Tensor] = {}
    for side in sorted(set(sides)):
        places = [place for place, own in enumerate(sides) if own == side]
        if len(places) == len(lengths):
            return compute(model, input_ids_N, position_ids_N, lengths)
        of_side = [lengths[place] for place in places]
        ids, positions = (torch.cat([column_N.split([*lengths])[place] for place in places]) for column_N in (input_ids_N, position_ids_N))
        found |= zip(places, compute(model, ids, positions, of_side).split(of_side), strict=True)
    return torch.cat([found[place] for place in range(len(lengths))])


def rope_borders(config: Any) -> list[int]:
    """Return lengths beyond which a model of this text configuration turns all positions by other angles (LongRoPE), in ascending order.

    The longest row of a batch decides for every row, so rollouts on different sides of a border never share a forward.  What counts is the
    tokens that are read: all of a rollout in scoring, all but the last in training.
    """
    stated = [getattr(config, field, None) or {} for field in ("rope_parameters", "rope_scaling")]
    # one table for all layers, or one for each type of them
    tables = [*stated, *(table for tables in stated for table in tables.values() if isinstance(table, dict))]
    name = "original_max_position_embeddings"
    long = [table for table in tables if table.get("rope_type", table.get("type")) in ("longrope", "su")]
    return sorted({int(table.get(name) or getattr(config, name)) for table in long})


@torch.no_grad()
def candidate_logprobs(hidden_MD: Tensor, head: LMHead, asked_MA: Tensor, top_k: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (M, A) float32 log-probs, nats, of ids under `head`, and (M, K) ids and log-probs of the `top_k` most likely ones, most likely first.

    `rows` rows at a time: memory is rows * V, never M * V.  Takes no gradient; the losses have their own.
    """
    logprobs, ids, values = [], [], []
    for hidden_RD, asked_RA in zip(hidden_MD.split(rows), asked_MA.split(rows), strict=True):
        logprobs_RV = head.logits(hidden_RD).log_softmax(-1)
        logprobs.append(logprobs_RV.gather(-1, asked_RA))
        values_RK, ids_RK = logprobs_RV.topk(top_k, -1)
        ids.append(ids_RK)
        values.append(values_RK)
        del logprobs_RV  # or they would be there beside the next ones
    return torch.cat(logprobs), torch.cat(ids), torch.cat(values)


def context_length(model: Any) -> int:
    """Return positions the model was made for; a very large number where its configuration has no limit."""
    embeddings = getattr(getattr(decoder_of(unwrap(model)), "embeddings", None), "position_embeddings", None)
    # RoBERTa and its kin count positions from behind the padding id
    before = getattr(embeddings, "padding_idx", None)
    return stated_context(text_config(model)) - (0 if before is None else before + 1)


def stated_context(config: Any) -> int:
    """Return the positions of a configuration about text, whose model need not be loaded."""
    return int(_first_number(config, _CONTEXTS) or 1 << 30)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Give the model without dropout and without the caller's autocast; afterwards each module is in the mode it was in.

    Source and student may share one model, and a caller may keep some modules in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
