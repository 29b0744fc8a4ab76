"""Autoregressive sampling from a transformers model: the decoding loop, and drawing one token a row.

Nothing is random but the uniform numbers that are passed in, so a seed decides a rollout.

Shape suffixes: B rows, S positions, T response tokens, V vocabulary, J blocks of the vocabulary, W ids of a block, D draws of a row, K candidates.
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
from lopd.records.devices import running_sums
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
        draws: gives the uniform numbers of drawn candidates, so that keeping any changes no token.
        ids: sampled so far.
        logprobs: log-probs of the sampled tokens, nats, at temperature 1.
        drawn: their log-probs, nats, under the distribution that drew them.
        kept: (K,) ids of the candidates of each of them, and their log-probs, nats, at temperature 1.
    """

    rollout_id: str
    prompt_ids: NDArray[np.int32]
    uniforms: NDArray[np.float64]
    draws: np.random.Generator
    ids: list[int] = field(factory=list)
    logprobs: list[float] = field(factory=list)
    drawn: list[float] = field(factory=list)
    kept: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = field(factory=list)


# not in inference mode: some models keep what they compute in buffers, which training could then not use
@torch.no_grad()
def decode(model: Any, rows: Sequence[Row], sampling: SamplingParams, *, vocab_size: int, stop_ids: AbstractSet[int], way: Way) -> None:
    """Fill `ids`, `logprobs`, `drawn` and `kept` of all rows: one batch, which rows leave as they finish.

    Raises:
        InvalidRecordError: the model gives logits that are not finite; it names the rollout.
    """
    head, device, context = lm_head(model, vocab_size).float(), next(model.parameters()).device, context_length(model)
    live = [(row, min(sampling.max_new_tokens, context - row.prompt_ids.size)) for row in rows]
    texts = way.begin(model, [row.prompt_ids for row in rows])
    while live:
        logits_BV = head.logits(texts.last_hidden())
        _check_finite([row for row, _ in live], logits_BV)
        uniforms_B = torch.tensor([row.uniforms[len(row.ids)] for row, _ in live], dtype=torch.float64, device=device)
        ids_B, logprobs_BV, drawn_B = draw(logits_BV, uniforms_B, sampling)
        if sampling.candidates or sampling.drawn:
            _keep([row for row, _ in live], logprobs_BV, sampling)
        for (row, _), token, logprob, drawn in zip(live, ids_B.tolist(), _at(logprobs_BV, ids_B).tolist(), drawn_B.tolist(), strict=True):
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


def _keep(rows: Sequence[Row], logprobs_BV: Tensor, sampling: SamplingParams) -> None:
    """Add the candidates of one token to each row: the most likely ones, whatever was sampled, then those drawn from the same log-probs."""
    ids_BK = logprobs_BV.topk(sampling.candidates, -1).indices
    if sampling.drawn:
        uniforms_BD = torch.from_numpy(np.stack([row.draws.random(sampling.drawn) for row in rows])).to(logprobs_BV.device)
        ids_BK = torch.cat([ids_BK, _invert(logprobs_BV.exp(), uniforms_BD)], dim=-1)
    parts = zip(rows, ids_BK.int().cpu().numpy(), logprobs_BV.gather(-1, ids_BK).cpu().numpy(), strict=True)
    for row, ids_K, logprobs_K in parts:
        row.kept.append((ids_K, logprobs_K))


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at a uniform number.

    Returns:
        (B,) ids; (B, V) log-probs, nats, of all tokens at temperature 1, uncut; and (B,) log-probs of the ids in the distribution that they
        were drawn from, 0 where the temperature is 0.

    Args:
        logits_BV: (B, V) float32.
        uniforms_B: (B,) float64 in [0, 1).
        sampling: temperature (0 takes the most likely token) and top_p.
    """
    logprobs_BV = logits_BV.log_softmax(-1)
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, logprobs_BV, torch.zeros_like(logits_BV[:, 0])
    drawn_BV = logprobs_BV if sampling.temperature == 1 else (logits_BV / max(sampling.temperature, _SMALLEST)).log_softmax(-1)
    if sampling.top_p < 1:
        drawn_BV = drawn_BV.masked_fill(~_nucleus(drawn_BV.exp(), max(sampling.top_p, _SMALLEST)), -torch.inf).log_softmax(-1)
    ids_B = _invert(drawn_BV.exp(), uniforms_B[:, None]).squeeze(-1)
    return ids_B, logprobs_BV, _at(drawn_BV, ids_B)


def _at(logprobs_BV: Tensor, ids_B: Tensor) -> Tensor:
    return logprobs_BV.gather(-1, ids_B[:, None]).squeeze(-1)


def _invert(probs_BV: Tensor, uniforms_BD: Tensor) -> Tensor:
    """Return (B, D) ids at which the cumulative distribution of each row passes its uniform numbers.

    In two levels, blocks and then ids inside one block: a float64 running sum over the whole vocabulary took a third of a decoding step.
    """
    blocks_BJW = torch.nn.functional.pad(probs_BV, (0, -probs_BV.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    block_BD, rest_BD = _pass_points(blocks_BJW.sum(-1, dtype=torch.float64), uniforms_BD)
    own_BDW = blocks_BJW[torch.arange(len(block_BD), device=block_BD.device)[:, None], block_BD].double()
    within_BD1, _ = _pass_points(own_BDW, rest_BD[..., None])
    return block_BD * _BLOCK + within_BD1.squeeze(-1)


def _pass_points(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return (..., D) first places with mass whose running sum passes the uniform shares of the total, and how far into their mass, in [0, 1).

    Args:
        masses: (..., J), at least 0.
        uniforms: (..., D) in [0, 1).
    """
    cumulative = running_sums(masses)
    targets = uniforms * cumulative[..., -1:]
    places = torch.searchsorted(cumulative, targets, right=True)
    mass = masses.gather(-1, places)
    into = (targets - (cumulative.gather(-1, places) - mass)) / mass
    return places, into.clamp(0, _BELOW_ONE)


def _nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Return (B, V) whether a token is in the smallest set of most likely tokens that holds `top_p`."""
    ordered_BV, order_BV = probs_BV.sort(-1, descending=True)
    return torch.zeros_like(probs_BV, dtype=torch.bool).scatter(-1, order_BV, running_sums(ordered_BV) - ordered_BV < top_p)
