"""Ragged records -> one packed `Batch`.  The only place that shifts, and the only place that makes weights.

A rollout of P prompt and T response tokens gives P + T - 1 predictions: input n is token n, target n is token n + 1.  The first response
token is the target of the last prompt token, so response entries begin at position P - 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.records.arrays import BoolArray, Float32Array
from lopd.records.rollouts import Rollout, ScoredRollout
from lopd.records.steps import Batch

Weighting = Callable[[BoolArray], Float32Array]


def by_rollout(loss_mask_T: BoolArray) -> Float32Array:
    """(T,) weights: every rollout counts 1, shared by its counted tokens.  What the paper's release does, and our default."""
    return loss_mask_T.astype(np.float32) / np.float32(max(int(loss_mask_T.sum()), 1))


def by_token(loss_mask_T: BoolArray) -> Float32Array:
    """(T,) weights: every counted token counts 1."""
    return loss_mask_T.astype(np.float32)


def collate(
    records: Sequence[ScoredRollout],
    weighting: Weighting = by_rollout,
    *,
    teacher: str | None = None,
    ref: str | None = None,
    top_k: str | None = None,
) -> Batch:
    """Pack records into one row of N = sum(P + T - 1) tokens, in their order.

    Args:
        records: what a store read.
        weighting: `by_rollout`, `by_token`, or your own function of the loss mask.
        teacher: which score column becomes `teacher_logprobs`.
        ref: which score column becomes `ref_logprobs`.
        top_k: of which score column the most likely tokens come along.

    Raises:
        InvalidRecordError: there are no records, their K differ, or the weighting gave something that is no weight.
        MissingScoresError: a record lacks a column; it names the rollout.
    """
    if not records:
        raise InvalidRecordError("Batch: it has 0 rollouts, expected at least 1; check the store is not empty.")
    tokens = [np.concatenate([r.rollout.prompt_ids, r.rollout.response_ids]).astype(np.int64) for r in records]
    return Batch(
        inputs=_pack([ids[:-1] for ids in tokens]),
        targets=_pack([ids[1:] for ids in tokens]),
        position_ids=_pack([np.arange(ids.size - 1) for ids in tokens]),
        segment_ids=_pack([np.full(ids.size - 1, i) for i, ids in enumerate(tokens)]),
        weight=_pack([_at_targets(r, _weights(r, weighting)) for r in records]),
        teacher_logprobs=_column(records, teacher),
        ref_logprobs=_column(records, ref),
        **_top_k(records, top_k),
    )


def target_slice(rollout: Rollout) -> slice:
    """Where the response tokens are among the P + T - 1 predictions of a rollout."""
    return slice(rollout.prompt_ids.size - 1, len(rollout) - 1)


def _pack(parts: Sequence[NDArray[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _weights(record: ScoredRollout, weighting: Weighting) -> Float32Array:
    """The weighting's answer, if it is one: it may be the caller's own function."""
    weight_T = np.asarray(weighting(record.rollout.loss_mask), np.float32)
    if weight_T.shape != record.rollout.loss_mask.shape or not (np.isfinite(weight_T) & (weight_T >= 0)).all():
        raise InvalidRecordError(
            f"Rollout {record.rollout.rollout_id!r}: its weights have shape {weight_T.shape} and range [{weight_T.min(initial=0)}, "
            f"{weight_T.max(initial=0)}], expected shape {record.rollout.loss_mask.shape}, finite and at least 0; fix the weighting function."
        )
    return weight_T


def _at_targets(record: ScoredRollout, values_T: NDArray[Any]) -> NDArray[Any]:
    """One value (or row) per response token -> one per target, 0 where the target is a prompt token."""
    values = np.zeros((len(record.rollout) - 1, *values_T.shape[1:]), values_T.dtype)
    values[target_slice(record.rollout)] = values_T
    return values


def _column(records: Sequence[ScoredRollout], name: str | None) -> torch.Tensor | None:
    if name is None:
        return None
    for record in records:
        if name not in record.scores:
            raise MissingScoresError(
                f"Rollout {record.rollout.rollout_id!r}: column {name!r} was not read; name it in `read(columns=...)`."
            )
    return _pack([_at_targets(record, record.scores[name]) for record in records])


def _top_k(records: Sequence[ScoredRollout], name: str | None) -> dict[str, torch.Tensor]:
    if name is None:
        return {}
    for record in records:
        if name not in record.top_k:
            raise MissingScoresError(
                f"Rollout {record.rollout.rollout_id!r}: top-k of column {name!r} was not read; name it in `read(top_k=...)`."
            )
        k, expected = record.top_k[name].ids.shape[1], records[0].top_k[name].ids.shape[1]
        if k != expected:
            raise InvalidRecordError(
                f"Rollout {record.rollout.rollout_id!r}: its top-k has {k} tokens, expected {expected} as the first of the batch; "
                "score all rollouts with one K."
            )
    supports = [(record, record.top_k[name]) for record in records]
    return {
        "top_k_ids": _pack([_at_targets(record, support.ids.astype(np.int64)) for record, support in supports]),
        "top_k_logprobs": _pack([_at_targets(record, support.logprobs) for record, support in supports]),
        "top_k_tail": _pack([_at_targets(record, support.tail) for record, support in supports]),
    }
