"""A transformers causal LM cut below its head: the one place that knows where head, bias, scale and soft-cap are.

Sampling, scoring and training all compute log-probs through here, so they cannot disagree about what a logit is.
Duck-typed on purpose: importing this module imports no engine.

Shape suffixes: N tokens, M selected tokens, R of a chunk, K candidates, D hidden size, V vocabulary, B rows, S positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lopd.errors import ArgumentError, ModelError
from lopd.records.steps import LMHead


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper (its layers keep their adapters), or the model itself.

    Raises:
        ArgumentError: it is something else, such as the name of a model.
    """
    if not hasattr(model, "config") and not hasattr(model, "get_output_embeddings"):
        raise ArgumentError(f"Model: it is a {type(model).__name__}, expected a causal LM; load it: `lopd.engines.hf.load_model(folder)`.")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head(model: Any, vocab_size: int) -> LMHead:
    """The head of a causal LM, cut to the tokenizer's vocabulary; made anew at each step, because wrappers swap weights.

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
            f"Model {name}: its head has {rows} rows, expected at least the tokenizer's {vocab_size} ids; resize the token embeddings."
        )
    bias = getattr(layer, "bias", None)
    config = base.config.get_text_config()
    return LMHead(
        weight=layer.weight if rows == vocab_size else layer.weight[:vocab_size],
        bias=bias if bias is None or rows == vocab_size else bias[:vocab_size],
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0),
    )


def hidden_states(
    model: Any, input_ids_BS: Tensor, position_ids_BS: Tensor | None = None, *, mask_BS: Tensor | None = None, cache: Any = None
) -> Tensor:
    """(B, S, D) hidden states below the head.

    Args:
        model: a causal LM, or a peft model around one.
        input_ids_BS: new tokens.
        position_ids_BS: without a mask, positions that restart within a row mark packed rollouts, which do not see each other.
        mask_BS: 1 for real tokens, cached ones included; for padding on the left.
        cache: keys and values of earlier tokens; extended in place.
    """
    decoder = unwrap(model).get_decoder()
    output: Tensor = decoder(
        input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=mask_BS, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return output


def packed_hidden_states(model: Any, input_ids_N: Tensor, position_ids_N: Tensor) -> Tensor:
    """(N, D) hidden states of a packed batch, whose positions restart with each rollout; rollouts do not see each other.

    Attention that knows lengths (FlashAttention, FlexAttention) reads the pack as it is.  Any other would compute all N * N pairs and mask
    most of them, so there each rollout is a row of its own, padded on the right, where a causal model cannot look.
    """
    attention = str(getattr(unwrap(model).config, "_attn_implementation", None))
    if "flash" in attention or attention == "flex_attention":
        return hidden_states(model, input_ids_N[None], position_ids_N[None])[0]
    row_N = (position_ids_N == 0).cumsum(0) - 1
    input_ids_BS = input_ids_N.new_zeros(int(row_N[-1]) + 1, int(position_ids_N.max()) + 1)
    input_ids_BS[row_N, position_ids_N] = input_ids_N
    return hidden_states(model, input_ids_BS)[row_N, position_ids_N]


@torch.no_grad()
def candidate_logprobs(hidden_MD: Tensor, head: LMHead, targets_M: Tensor, top_k: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(M,) float32 log-probs, nats, of `targets` under `head`, and (M, K) ids and log-probs of the `top_k` most likely tokens, most likely first.

    `rows` rows at a time: memory is rows * V, never M * V.  Takes no gradient; the losses have their own.
    """
    logprobs, ids, values = [], [], []
    for hidden_RD, targets_R in zip(hidden_MD.split(rows), targets_M.split(rows), strict=True):
        logprobs_RV = head.logits(hidden_RD).log_softmax(-1)
        logprobs.append(logprobs_RV.gather(-1, targets_R[:, None]).squeeze(-1))
        values_RK, ids_RK = logprobs_RV.topk(top_k, -1)
        ids.append(ids_RK)
        values.append(values_RK)
    return torch.cat(logprobs), torch.cat(ids), torch.cat(values)


def context_length(model: Any) -> int:
    """Positions the model was made for."""
    return int(getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", 1 << 30))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout, as it was afterwards: source and student may share one model."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
