"""Autoregressive sampling from a transformers model: the decoding loop, and drawing one token a row.

Nothing is random but the uniform numbers that are passed in, so a seed decides a rollout.

Shape suffixes: B rows, S positions, T response tokens, V vocabulary, J blocks of the vocabulary, W ids of a block.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from numpy.typing import NDArray
from torch import Tensor

from lopd.engines.causal_lm import context_length, lm_head
from lopd.engines.hf.texts import Way
from lopd.errors import InvalidRecordError
from lopd.records.manifest import SamplingParams

_BLOCK = 256
_BELOW_ONE = 1 - 2.0**-53
_SMALLEST = 1e-30  # less is 0 in float32, or its inverse is not finite; the draw is the same


@frozen(eq=False)
class Row:
    """One response being sampled.

    Args:
        rollout_id: how an error names it.
        prompt_ids: what is answered.
        uniforms: (max_new_tokens,) float64 in [0, 1), one for each token.
        ids: sampled so far.
        logprobs: of them, nats, at temperature 1.
        drawn: of them, nats, in the distribution that they were drawn from.
    """

    rollout_id: str
    prompt_ids: NDArray[np.int32]
    uniforms: NDArray[np.float64]
    ids: list[int] = field(factory=list)
    logprobs: list[float] = field(factory=list)
    drawn: list[float] = field(factory=list)


# not in inference mode: some models keep what they compute in buffers, which training could then not use
@torch.no_grad()
def decode(model: Any, rows: Sequence[Row], sampling: SamplingParams, *, vocab_size: int, stop_ids: AbstractSet[int], way: Way) -> None:
    """Fill `ids`, `logprobs` and `drawn` of all rows: one batch, which rows leave as they finish.

    Raises:
        InvalidRecordError: the model gives logits that are not finite; it names the rollout.
    """
    head, device = lm_head(model, vocab_size).float(), next(model.parameters()).device
    live = [(row, min(sampling.max_new_tokens, context_length(model) - row.prompt_ids.size)) for row in rows]
    texts = way.begin(model, [row.prompt_ids for row in rows])
    while live:
        logits_BV = head.logits(texts.last_hidden())
        _check_finite([row for row, _ in live], logits_BV)
        uniforms_B = torch.tensor([row.uniforms[len(row.ids)] for row, _ in live], dtype=torch.float64, device=device)
        ids_B, logprobs_B, drawn_B = draw(logits_BV, uniforms_B, sampling)
        for (row, _), token, logprob, drawn in zip(live, ids_B.tolist(), logprobs_B.tolist(), drawn_B.tolist(), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.drawn.append(drawn)
        going = [i for i, (row, room) in enumerate(live) if row.ids[-1] not in stop_ids and len(row.ids) < room]
        texts.extend(ids_B, going)
        live = [live[i] for i in going]


def _check_finite(rows: Sequence[Row], logits_BV: Tensor) -> None:
    # the largest logit is NaN if any is, so one pass finds what would otherwise end as an index outside the vocabulary
    for row, fine in zip(rows, logits_BV.amax(-1).isfinite().tolist(), strict=True):
        if not fine:
            raise InvalidRecordError(
                f"Rollout {row.rollout_id!r}: the logits of token {len(row.ids)} are not finite, expected numbers; "
                "check the weights, or compute in another dtype."
            )


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at a uniform number.

    Its log-prob (nats) at temperature 1, uncut, comes along, and that in the distribution that it was drawn from, which is 0 where the
    temperature is 0.

    Args:
        logits_BV: (B, V) float32.
        uniforms_B: (B,) float64 in [0, 1).
        sampling: temperature (0 takes the most likely token) and top_p.
    """
    logprobs_BV = logits_BV.log_softmax(-1)
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, _at(logprobs_BV, ids_B), torch.zeros_like(logits_BV[:, 0])
    drawn_BV = logprobs_BV if sampling.temperature == 1 else (logits_BV / max(sampling.temperature, _SMALLEST)).log_softmax(-1)
    if sampling.top_p < 1:
        drawn_BV = drawn_BV.masked_fill(~_nucleus(drawn_BV.exp(), max(sampling.top_p, _SMALLEST)), -torch.inf).log_softmax(-1)
    ids_B = _invert(drawn_BV.exp(), uniforms_B)
    return ids_B, _at(logprobs_BV, ids_B), _at(drawn_BV, ids_B)


def _at(logprobs_BV: Tensor, ids_B: Tensor) -> Tensor:
    return logprobs_BV.gather(-1, ids_B[:, None]).squeeze(-1)


def _invert(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """(B,) ids at which the cumulative distribution passes the uniform numbers.

    In two levels, blocks and then ids inside one block: a float64 running sum over the whole vocabulary took a third of a decoding step.
    """
    blocks_BJW = torch.nn.functional.pad(probs_BV, (0, -probs_BV.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    block_B, rest_B = _pass_point(blocks_BJW.sum(-1, dtype=torch.float64), uniforms_B)
    within_B, _ = _pass_point(blocks_BJW[torch.arange(len(block_B), device=block_B.device), block_B].double(), rest_B)
    return block_B * _BLOCK + within_B


def _pass_point(masses_BJ: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) first place with mass whose running sum passes the uniform share of the total, and how far into its mass, in [0, 1)."""
    cumulative_BJ = masses_BJ.cumsum(-1)
    targets_B1 = (uniforms_B * cumulative_BJ[:, -1])[:, None]
    places_B1 = torch.searchsorted(cumulative_BJ, targets_B1, right=True)
    mass_B1 = masses_BJ.gather(-1, places_B1)
    into_B1 = (targets_B1 - (cumulative_BJ.gather(-1, places_B1) - mass_B1)) / mass_B1
    return places_B1.squeeze(-1), into_B1.squeeze(-1).clamp(0, _BELOW_ONE)


def _nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """(B, V) whether a token is in the smallest set of most likely tokens that holds `top_p`."""
    ordered_BV, order_BV = probs_BV.sort(-1, descending=True)
    return torch.zeros_like(probs_BV, dtype=torch.bool).scatter(-1, order_BV, ordered_BV.cumsum(-1) - ordered_BV < top_p)
