"""Rows of a store -> one packed `Batch`.  The only place that shifts, and the only place that makes weights.

A rollout of P prompt and T response tokens gives P + T - 1 predictions: input n is token n, target n is token n + 1.  The first response
token is the target of the last prompt token, so response entries begin at position P - 1.

Shape suffixes: B rollouts, M response tokens of all of them, N predictions of all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.records.arrays import BoolArray, Float32Array
from lopd.records.rollouts import Rollout, ScoredRollout
from lopd.records.rows import Rows, ends
from lopd.records.steps import Batch
from lopd.records.support import TopK

Weighting = Callable[[BoolArray], Float32Array]


def by_rollout(loss_mask_T: BoolArray) -> Float32Array:
    r"""Return (T,) weights: every rollout counts 1, shared by its counted tokens.  What the paper's release does, and our default.

    A weight of 1/T depends on later tokens, so it acts on lengths: advantages of mean -k, as at the reference policy with k the KL, push towards
    longer responses, along \(-k \nabla E[1/T]\).  With `by_token` a constant advantage has no gradient in expectation.
    """
    weight_T: Float32Array = np.divide(loss_mask_T, np.count_nonzero(loss_mask_T) or 1, dtype=np.float32)
    return weight_T


def by_token(loss_mask_T: BoolArray) -> Float32Array:
    """Return (T,) weights: every counted token counts 1."""
    return loss_mask_T.astype(np.float32)


def collate(
    rows: Rows | Sequence[ScoredRollout],
    weighting: Weighting = by_rollout,
    *,
    teacher: str | None = None,
    ref: str | None = None,
    top_k: str | None = None,
    label: str | None = None,
    label_mean: str | None = None,
) -> Batch:
    """Pack rollouts into one row of N = sum(P + T - 1) tokens, in their order.

    Args:
        rows: what a store read, or records.
        weighting: `by_rollout`, `by_token`, or your own function of the loss mask.
        teacher: which score column becomes `teacher_logprobs`.
        ref: which score column becomes `ref_logprobs`.  Where rollouts have `sampler_logprobs`, these come along; a rollout without them
            has its `ref_logprobs` there.
        top_k: score column whose support comes along.  Of tokens that were drawn, the log-probs of the policy that drew them come from the
            support of `ref`, if that was read.
        label: which column becomes `label_values`.
        label_mean: which column becomes `label_means`.

    Raises:
        InvalidRecordError: there are no rollouts, their K differ, `ref` keeps other drawn tokens than `top_k`, or the weighting gave something
            that is not a weight.
        MissingScoresError: a column was not read; it names the rollout.
    """
    named = {"teacher_logprobs": teacher, "ref_logprobs": ref, "label_values": label, "label_means": label_mean}
    if not isinstance(rows, Rows):
        supports = [name for name in (top_k, ref) if name is not None and (name == top_k or (rows and name in rows[0].top_k))]
        rows = Rows.of(rows, [name for name in named.values() if name is not None], supports)
    if not len(rows):
        raise InvalidRecordError("Batch: it has 0 rollouts, expected at least 1; check the store is not empty.")
    lengths_B = rows.prompt_lengths + rows.response_lengths - 1
    starts_B, stops_B = rows.token_ends[:-1].tolist(), rows.token_ends[1:].tolist()
    place = _Places(rows, lengths_B)
    ids, positions = rows.token_ids, np.arange(lengths_B.max())
    return Batch(
        inputs=_joined([ids[start : stop - 1] for start, stop in zip(starts_B, stops_B, strict=True)]),
        targets=_joined([ids[start + 1 : stop] for start, stop in zip(starts_B, stops_B, strict=True)]),
        position_ids=_joined([positions[:n] for n in lengths_B.tolist()]),
        segment_ids=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths_B)),
        weight=place.at_targets(_weights(rows, weighting)),
        **{f: place.at_targets(_column(rows, rows.scores, column, "columns")) for f, column in named.items() if column is not None},
        sampler_logprobs=None if ref is None or rows.sampler_logprobs is None else place.at_targets(_sampler(rows, ref)),
        **({} if top_k is None else _support(place, _column(rows, rows.top_k, top_k, "top_k"), rows.top_k.get(ref or ""))),
    )


def target_slice(rollout: Rollout) -> slice:
    """Return where the response tokens are among the P + T - 1 predictions of a rollout."""
    return slice(rollout.prompt_ids.size - 1, len(rollout) - 1)


def _joined(parts: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64, casting="safe"))


class _Places:
    """Where response tokens are among the predictions of all rollouts."""

    def __init__(self, rows: Rows, lengths_B: NDArray[np.int64]) -> None:
        self.total = int(lengths_B.sum())
        first_B = ends(lengths_B)[:-1] + rows.prompt_lengths - 1
        self._spans = list(zip(first_B.tolist(), (first_B + rows.response_lengths).tolist(), *_spans(rows), strict=True))

    def at_targets(self, values_M: NDArray[Any], dtype: Any = np.float32) -> Tensor:
        """Return one value (or row) per target from one per response token, 0 where the target is a prompt token."""
        values_N = np.zeros((self.total, *values_M.shape[1:]), dtype)
        for start, stop, first, last in self._spans:
            values_N[start:stop] = values_M[first:last]
        return torch.from_numpy(values_N)


def _spans(rows: Rows) -> tuple[list[int], list[int]]:
    return rows.response_ends[:-1].tolist(), rows.response_ends[1:].tolist()


def _weights(rows: Rows, weighting: Weighting) -> Float32Array:
    """Return (M,): the weighting's answers, if they are weights: it may be the caller's own function."""
    mask_M = np.ones(int(rows.response_ends[-1]), np.bool_) if rows.loss_mask is None else rows.loss_mask
    parts = [np.asarray(weighting(mask_M[first:last]), np.float32) for first, last in zip(*_spans(rows), strict=True)]
    lengths_B = rows.response_lengths.tolist()
    wrong = [i for i, part in enumerate(parts) if part.shape != (lengths_B[i],)]
    if not wrong:
        weight_M = np.concatenate(parts)
        if weight_M.min() >= 0 and weight_M.max() < np.inf:
            return weight_M
        wrong = [i for i, part in enumerate(parts) if not (part.min() >= 0 and part.max() < np.inf)]
    i, weight_T = wrong[0], parts[wrong[0]]
    raise InvalidRecordError(
        f"Rollout {rows.rollout_ids[i]!r}: its weights have shape {weight_T.shape} and range [{weight_T.min(initial=0)}, "
        f"{weight_T.max(initial=0)}], expected shape {(lengths_B[i],)}, finite and at least 0; fix the weighting function."
    )


def _column(rows: Rows, values: Any, name: str, argument: str) -> Any:
    if name not in values:
        what = "top-k of column" if argument == "top_k" else "column"
        raise MissingScoresError(f"Rollout {rows.rollout_ids[0]!r}: {what} {name!r} was not read; name it in `read({argument}=...)`.")
    return values[name]


def _sampler(rows: Rows, ref: str) -> NDArray[Any]:
    """Return (M,): the log-probs in the distribution that drew the tokens; those of the ref column where a rollout has none."""
    drawn_M: Any = rows.sampler_logprobs
    return np.where(np.isnan(drawn_M), rows.scores[ref], drawn_M)


def _support(place: _Places, support: TopK, ref: TopK | None) -> dict[str, Tensor]:
    """Return the distinct tokens of a support, and those that were drawn, with the log-probs of the policy that drew them."""
    k = support.distinct
    found = {
        "top_k_ids": place.at_targets(support.ids[:, :k], np.int64),
        "top_k_logprobs": place.at_targets(support.logprobs[:, :k]),
        "top_k_tail": place.at_targets(support.tail),
    }
    if not support.drawn:
        return found
    found |= {"drawn_ids": place.at_targets(support.ids[:, k:], np.int64), "drawn_logprobs": place.at_targets(support.logprobs[:, k:])}
    if ref is None or not ref.drawn:
        return found
    # the teacher may have been asked for fewer, the last ones
    last = slice(ref.ids.shape[1] - min(support.drawn, ref.drawn), None)
    if not np.array_equal(ref.ids[:, last], support.ids[:, k:]):
        raise InvalidRecordError(
            "Batch: the reference column keeps other drawn tokens than the teacher's; score the teacher on the candidates of that column."
        )
    return found | {"drawn_ref_logprobs": place.at_targets(ref.logprobs[:, last])}
