"""Rows of a store -> one packed `Batch`.  The only place that shifts, and the only place that makes weights.

A rollout of P prompt and T response tokens gives P + T - 1 predictions: input n is token n, target n is token n + 1.  The first response
token is the target of the last prompt token, so response entries begin at position P - 1.

Shape suffixes: B rollouts, M response tokens of all of them, N predictions of all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError
from lopd.records.arrays import BoolArray, Float32Array
from lopd.records.rollouts import Rollout, ScoredRollout
from lopd.records.rows import Rows, column_of
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
        weighting: `by_rollout`, `by_token`, or your own function of the loss mask, 0 where that is False.
        teacher: which score column becomes `teacher_logprobs`.
        ref: which score column becomes `ref_logprobs`.  Where rollouts have `sampler_logprobs`, these come along; a rollout without them
            has its `ref_logprobs` there.
        top_k: score column whose support comes along.  Of tokens that were drawn, the log-probs of the policy that drew them come from the
            support of `ref`, if that was read.
        label: which column becomes `label_values`.
        label_mean: which column becomes `label_means`.

    Raises:
        InvalidRecordError: there are no rollouts, their K differ, `ref` keeps other drawn tokens than `top_k`, or the weighting gave something
            that is not a weight, or weighs a token whose loss mask is False.
        MissingScoresError: a column was not read; it names the rollout.
    """
    named = {"teacher_logprobs": teacher, "ref_logprobs": ref, "label_values": label, "label_means": label_mean}
    if not len(rows):
        raise InvalidRecordError("Batch: it has 0 rollouts, expected at least 1; check the store is not empty.")
    if not isinstance(rows, Rows):
        supports = [name for name in (top_k, ref) if name is not None and (name == top_k or name in rows[0].top_k)]
        rows = Rows.of(rows, [name for name in named.values() if name is not None], supports)
    values = {f: column_of(rows.rollout_ids[0], rows.scores, column, "columns") for f, column in named.items() if column is not None}
    if ref is not None and rows.sampler_logprobs is not None:
        # those of the ref column where a rollout has none
        values["sampler_logprobs"] = np.where(np.isnan(rows.sampler_logprobs), rows.scores[ref], rows.sampler_logprobs)
    if top_k is not None:
        values |= _support(column_of(rows.rollout_ids[0], rows.top_k, top_k, "top_k"), rows.top_k.get(ref or ""))
    arrays = _packed(rows, weighting, values)
    # what is made in a validation may be trained on later
    with torch.inference_mode(False):
        return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def target_slice(rollout: Rollout) -> slice:
    """Return where the response tokens are among the P + T - 1 predictions of a rollout."""
    return slice(rollout.prompt_ids.size - 1, len(rollout) - 1)


def _packed(rows: Rows, weighting: Weighting, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a batch: one value (or row) per target from one per response token, 0 where the target is a prompt token."""
    total, prompts, responses = int(rows.token_ends[-1]) - len(rows), rows.prompt_lengths.tolist(), rows.response_lengths.tolist()
    inputs, targets, positions, segments = (np.empty(total, np.int64) for _ in range(4))
    weight, spread = np.zeros(total, np.float32), list[tuple[NDArray[Any], NDArray[Any]]]()
    for array in values.values():
        dtype = np.int64 if array.dtype.kind in "iu" else np.float32
        spread.append((np.zeros((total, *array.shape[1:]), dtype), array))
    uniform = _uniform(rows, weighting)
    mask_M = np.ones(0 if uniform else int(rows.response_ends[-1]), np.bool_) if rows.loss_mask is None else rows.loss_mask
    counting, start, read, first = np.arange(max(map(sum, zip(prompts, responses, strict=True)))), 0, 0, 0
    # one rollout after the other, for then what is read twice is in the cache
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length, target, last = prompt + response - 1, start + prompt - 1, first + response
        stop = start + length
        inputs[start:stop], targets[start:stop] = rows.token_ids[read : read + length], rows.token_ids[read + 1 : read + length + 1]
        positions[start:stop], segments[start:stop] = counting[:length], i
        weight[target:stop] = uniform[i] if uniform else _weights(rows, i, weighting, mask_M[first:last])
        for packed, array in spread:
            packed[target:stop] = array[first:last]
        start, read, first = stop, read + length + 1, last
    if not (weight.min() >= 0 and weight.max() < np.inf):
        raise _wrong_weights(
            rows, i := int(segments[np.argmin((weight >= 0) & (weight < np.inf))]), weight[segments == i][prompts[i] - 1 :]
        )
    fixed: dict[str, NDArray[Any]] = {
        "inputs": inputs,
        "targets": targets,
        "position_ids": positions,
        "segment_ids": segments,
        "weight": weight,
    }
    return fixed | {name: packed for name, (packed, _) in zip(values, spread, strict=True)}


def _uniform(rows: Rows, weighting: Weighting) -> list[float] | None:
    """Return the weight that all tokens of a rollout have, of each, bit for bit what the weighting gives; None where it must be asked of each."""
    if rows.loss_mask is not None or weighting not in (by_rollout, by_token):
        return None
    lengths_B = np.maximum(rows.response_lengths, 1) if weighting is by_rollout else np.ones(len(rows), np.int64)
    weights: list[float] = np.divide(1, lengths_B, dtype=np.float32).tolist()
    return weights


def _weights(rows: Rows, i: int, weighting: Weighting, mask_T: BoolArray) -> Float32Array:
    """Return what the weighting gives of one rollout: it may be the caller's own function, and give anything."""
    given = weighting(mask_T)
    try:
        weight_T = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidRecordError(
            f"Rollout {rows.rollout_ids[i]!r}: its weights are {given!r:.40}, expected an array of numbers; fix the weighting function."
        ) from error
    if weight_T.shape != mask_T.shape or weight_T[~mask_T].any():
        raise _wrong_weights(rows, i, weight_T)
    return weight_T


def _wrong_weights(rows: Rows, i: int, weight_T: NDArray[Any]) -> InvalidRecordError:
    return InvalidRecordError(
        f"Rollout {rows.rollout_ids[i]!r}: its weights have shape {weight_T.shape} and range [{weight_T.min(initial=0)}, "
        f"{weight_T.max(initial=0)}], expected shape {(int(rows.response_lengths[i]),)}, finite and at least 0, and 0 where the loss mask is "
        "False; fix the weighting function."
    )


def _support(support: TopK, ref: TopK | None) -> dict[str, NDArray[Any]]:
    """Return the distinct tokens of a support, and those that were drawn, with the log-probs of the policy that drew them."""
    k = support.distinct
    found = {"top_k_ids": support.ids[:, :k], "top_k_logprobs": support.logprobs[:, :k], "top_k_tail": support.tail}
    if not support.drawn:
        return found
    found |= {"drawn_ids": support.ids[:, k:], "drawn_logprobs": support.logprobs[:, k:]}
    if ref is None or not ref.drawn:
        return found
    # the teacher may have been asked for fewer, the last ones
    last = slice(ref.ids.shape[1] - min(support.drawn, ref.drawn), None)
    if not np.array_equal(ref.ids[:, last], support.ids[:, k:]):
        raise InvalidRecordError(
            "Batch: the reference column keeps other drawn tokens than the teacher's; score the teacher on the candidates of that column."
        )
    return found | {"drawn_ref_logprobs": ref.logprobs[:, last]}
