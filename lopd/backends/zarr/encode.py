"""Rollouts and scores -> the lines and arrays of a segment; `decode` is the way back.

Two arrays let rows be found without reading lines.  `id_hashes` of rollouts, (n, 2): the hashed id of each line.  `scored_rows` of scores, (n,): the
row of each line, where some between the first and the last have none.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.backends.id_index import encode_ids, hash_ids
from lopd.backends.zarr.columns import ID_HALVES, REASONS, REPORTED, ROLLOUT_FIELDS, SCORE_FIELDS, TOP_K_ARRAYS, S
from lopd.backends.zarr.segment import SegmentData, checksums
from lopd.records.rollouts import Rollout, Scores
from lopd.records.rows import ends

#: What other readers find beside the lines: the names of their columns, and what the codes in them mean.
ROLLOUT_ATTRIBUTES = {"fields": ROLLOUT_FIELDS, "finish_reasons": REASONS, "has_behavior_bits": REPORTED}
SCORE_ATTRIBUTES = {"fields": SCORE_FIELDS}
ID_HASHES, SCORED_ROWS = "id_hashes", "scored_rows"


def found_by(lines: NDArray[np.int64], first_row: int, last_row: int) -> dict[str, NDArray[np.int64]]:
    """Return the arrays by which rows of a segment with these lines are found."""
    if lines.shape[1] == len(ROLLOUT_FIELDS):
        return {ID_HASHES: lines[:, ID_HALVES].copy()}
    return {} if last_row - first_row + 1 == len(lines) else {SCORED_ROWS: lines[:, S["row"]].copy()}


def _two(hashes: Sequence[bytes]) -> NDArray[np.int64]:
    return np.frombuffer(b"".join(hashes), "<i8").reshape(-1, 2)


def _table(fields: Sequence[str], rows: int, columns: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return (rows, fields) from columns by name; what is not given is 0."""
    lines = np.zeros((rows, len(fields)), np.int64)
    for name, values in columns.items():
        lines[:, fields.index(name)] = values
    return lines


def encode_rollouts(rollouts: Sequence[Rollout], first_row: int, vocab_size: int, logprob_dtype: str) -> SegmentData:
    """Return a segment of rollouts.  Ids are in the smallest type that holds the vocabulary; there is no mask where nothing is masked."""
    id_type = np.min_scalar_type(vocab_size - 1)
    # a count takes a fifth of the time of `all`, which is a reduction
    masks = [None if np.count_nonzero(r.loss_mask) == r.loss_mask.size else r.loss_mask.astype(np.uint8) for r in rollouts]
    owners = [r.rollout_id for r in rollouts]
    stored = {name: ragged.to_stored([getattr(r, name) for r in rollouts], owners, logprob_dtype) for name in REPORTED}
    reported = [values for values, _ in stored.values()]
    ids = encode_ids(owners)
    id_lengths = [len(name) for name in ids]
    lengths = np.array([[r.prompt_ids.size for r in rollouts], [r.response_ids.size for r in rollouts]], np.int64).T
    # records hold ids from 0 up, which admission has compared with the vocabulary
    token_ids = np.concatenate([ids for r in rollouts for ids in (r.prompt_ids, r.response_ids)], dtype=id_type, casting="unsafe")
    whole, token_ends = token_ids.view(np.uint8).data, ends(lengths.sum(axis=1))
    id_hashes, content_hashes = hash_ids(ids).view("<i8").reshape(-1, 2), _two([r.content_hash for r in rollouts])
    columns: dict[str, Any] = {
        "prompt_length": lengths[:, 0],
        "response_length": lengths[:, 1],
        "token_start": token_ends[:-1],
        "response_start": ends(lengths[:, 1])[:-1],
        "id_start": ends(np.array(id_lengths))[:-1],
        "id_length": id_lengths,
        "finish_reason": [REASONS.index(r.finish_reason) for r in rollouts],
        "generation": [r.generation for r in rollouts],
        "has_behavior": sum(np.array([part is not None for part in values], np.int64) << bit for bit, values in enumerate(reported)),
        "masked": [mask is not None for mask in masks],
        "id_hash_0": id_hashes[:, 0],
        "id_hash_1": id_hashes[:, 1],
        "content_hash_0": content_hashes[:, 0],
        "content_hash_1": content_hashes[:, 1],
        "token_checksum": checksums([whole[start:end] for start, end in pairwise((token_ends * id_type.itemsize).tolist())]),
        "mask_checksum": checksums(masks),
        "behavior_checksum": checksums(*reported),
    }
    arrays: dict[str, NDArray[Any]] = {"token_ids": token_ids, "rollout_ids": np.frombuffer(b"".join(ids), np.uint8)}
    if any(columns["masked"]):
        arrays["loss_mask"] = _filled(masks, lengths[:, 1], 1, "uint8")
    for name, (values, _) in stored.items():
        if any(part is not None for part in values):
            # NaN, not 0, where there is no value: other readers of these files must not take a gap for a certainty.
            arrays[name] = _filled(values, lengths[:, 1], np.nan, logprob_dtype)
    lines, rounding = _table(ROLLOUT_FIELDS, len(rollouts), columns), max(error for _, error in stored.values())
    last_row = first_row + len(rollouts) - 1
    arrays |= found_by(lines, first_row, last_row)
    return SegmentData(ROLLOUT_ATTRIBUTES, lines, arrays, int(lengths.sum()), first_row, last_row, rounding)


def _filled(values: Sequence[NDArray[Any] | None], lengths: NDArray[np.int64], filler: float, dtype: str) -> NDArray[Any]:
    parts = [np.full(n, filler, dtype) if value is None else value for value, n in zip(values, lengths.tolist(), strict=True)]
    return np.concatenate(parts)


def encode_scores(scores: Sequence[Scores], rows: Sequence[int], vocab_size: int, logprob_dtype: str) -> SegmentData:
    """Return a segment of scores, in the order of rows; rows stay right because rollouts are only ever added behind them."""
    owners = [score.rollout_id for score in scores]
    stored, rounding = ragged.to_stored([score.logprobs for score in scores], owners, logprob_dtype)
    lengths = np.array([score.logprobs.size for score in scores], np.int64)
    hashes = _two([score.content_hash for score in scores])
    columns: dict[str, Any] = {
        "row": rows,
        "length": lengths,
        "start": ends(lengths)[:-1],
        "floored": [score.floored for score in scores],
        "content_hash_0": hashes[:, 0],
        "content_hash_1": hashes[:, 1],
        "logprobs_checksum": checksums(stored),
    }
    arrays: dict[str, NDArray[Any]] = {"logprobs": _filled(stored, lengths, np.nan, logprob_dtype)}
    supports = [score.top_k for score in scores if score.top_k is not None]
    if supports:
        ids = [support.ids.astype(np.min_scalar_type(vocab_size - 1)) for support in supports]
        ranked, error = ragged.to_stored([support.logprobs for support in supports], owners, logprob_dtype)
        tails = [support.tail for support in supports]
        columns["top_k_checksum"] = checksums(ids, ranked, tails)
        parts: dict[str, Sequence[Any]] = dict(zip(TOP_K_ARRAYS, (ids, ranked, tails), strict=True))
        arrays |= {name: np.concatenate(values) for name, values in parts.items()}
        rounding = max(rounding, error)
    lines = _table(SCORE_FIELDS, len(scores), columns)
    arrays |= found_by(lines, rows[0], rows[-1])
    return SegmentData(SCORE_ATTRIBUTES, lines, arrays, int(lengths.sum()), rows[0], rows[-1], rounding)
