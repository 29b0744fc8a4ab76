"""Rollouts and scores <-> the lines and arrays of a segment; the only place that knows what each column of a line means."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from lopd.arrays import Float32Array, read_only
from lopd.backends import ragged
from lopd.backends.zarr_segment import Segment, SegmentData, checksum_of
from lopd.errors import CorruptStoreError
from lopd.types import FinishReason, Rollout, Scores, TopK

_REASONS: tuple[FinishReason, ...] = ("stop", "length")
ROLLOUT_FIELDS = (
    "prompt_length",
    "response_length",
    "token_start",
    "response_start",
    "id_start",
    "id_length",
    "finish_reason",
    "generation",
    "has_behavior",
    "masked",
    "id_hash_0",
    "id_hash_1",
    "content_hash_0",
    "content_hash_1",
    "token_checksum",
    "response_checksum",
    "line_checksum",
)
SCORE_FIELDS = (
    "row",
    "length",
    "start",
    "floored",
    "content_hash_0",
    "content_hash_1",
    "logprobs_checksum",
    "top_k_checksum",
    "line_checksum",
)
_R = {name: i for i, name in enumerate(ROLLOUT_FIELDS)}
_S = {name: i for i, name in enumerate(SCORE_FIELDS)}
#: Columns of a rollout's line that compaction moves, and of a score's.
ROLLOUT_STARTS = {_R["token_start"]: "token_ids", _R["response_start"]: "response", _R["id_start"]: "rollout_ids"}
SCORE_START, SCORE_LENGTH = _S["start"], _S["length"]
LENGTHS = slice(_R["prompt_length"], _R["response_length"] + 1)
GENERATION, HAS_BEHAVIOR, MASKED = _R["generation"], _R["has_behavior"], _R["masked"]
CONTENT_HASH = slice(_R["content_hash_0"], _R["content_hash_1"] + 1)
ID_HASH = slice(_R["id_hash_0"], _R["id_hash_1"] + 1)
ROW = _S["row"]


def hash_ids(texts: Sequence[str]) -> NDArray[np.uint64]:
    """(n, 2): 128 bits of each rollout id; two ids never share them in practice."""
    data = b"".join(xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def _two(hashes: Sequence[bytes]) -> NDArray[np.int64]:
    return np.frombuffer(b"".join(hashes), "<i8").reshape(-1, 2)


def _table(fields: Sequence[str], rows: int, columns: Mapping[str, Any]) -> NDArray[np.int64]:
    """(rows, fields) from columns by name; what is not given is 0."""
    lines = np.zeros((rows, len(fields)), np.int64)
    for name, values in columns.items():
        lines[:, fields.index(name)] = values
    return lines


def encode_rollouts(rollouts: Sequence[Rollout], first_row: int, vocab_size: int, logprob_dtype: str) -> SegmentData:
    """A segment of rollouts.  Ids are in the smallest type that holds the vocabulary; there is no mask where nothing is masked."""
    id_type = np.min_scalar_type(vocab_size - 1)
    tokens = [np.concatenate([r.prompt_ids, r.response_ids]).astype(id_type) for r in rollouts]
    masks = [None if r.loss_mask.all() else r.loss_mask.astype(np.uint8) for r in rollouts]
    behaviors, rounding = _to_stored([r.behavior_logprobs for r in rollouts], [r.rollout_id for r in rollouts], logprob_dtype)
    id_bytes, id_lengths = ragged.concat_texts([r.rollout_id for r in rollouts])
    lengths = np.array([(r.prompt_ids.size, r.response_ids.size) for r in rollouts], np.int64).reshape(-1, 2)
    id_hashes, content_hashes = hash_ids([r.rollout_id for r in rollouts]).view(np.int64), _two([r.content_hash for r in rollouts])
    columns: dict[str, Any] = {
        "prompt_length": lengths[:, 0],
        "response_length": lengths[:, 1],
        "token_start": ragged.offsets(lengths.sum(axis=1))[:-1],
        "response_start": ragged.offsets(lengths[:, 1])[:-1],
        "id_start": ragged.offsets(id_lengths)[:-1],
        "id_length": id_lengths,
        "finish_reason": [_REASONS.index(r.finish_reason) for r in rollouts],
        "generation": [r.generation for r in rollouts],
        "has_behavior": [values is not None for values in behaviors],
        "masked": [mask is not None for mask in masks],
        "id_hash_0": id_hashes[:, 0],
        "id_hash_1": id_hashes[:, 1],
        "content_hash_0": content_hashes[:, 0],
        "content_hash_1": content_hashes[:, 1],
        "token_checksum": [checksum_of(ids) for ids in tokens],
        "response_checksum": [checksum_of(*two) for two in zip(masks, behaviors, strict=True)],
    }
    arrays: dict[str, NDArray[Any]] = {"token_ids": ragged.concat(tokens, id_type.name), "rollout_ids": id_bytes}
    if any(columns["masked"]):
        arrays["loss_mask"] = _filled(masks, lengths[:, 1], 1, "uint8")
    if any(columns["has_behavior"]):
        # NaN, not 0, where there is no value: other readers of these files must not take a gap for a certainty.
        arrays["behavior_logprobs"] = _filled(behaviors, lengths[:, 1], np.nan, logprob_dtype)
    lines = _table(ROLLOUT_FIELDS, len(rollouts), columns)
    return SegmentData(ROLLOUT_FIELDS, lines, arrays, int(lengths.sum()), first_row, first_row + len(rollouts) - 1, rounding)


def _filled(values: Sequence[NDArray[Any] | None], lengths: NDArray[np.int64], filler: float, dtype: str) -> NDArray[Any]:
    parts = [np.full(n, filler, dtype) if value is None else value for value, n in zip(values, lengths.tolist(), strict=True)]
    return ragged.concat(parts, dtype)


def _to_stored(values: Sequence[Float32Array | None], owners: Sequence[str], dtype: str) -> tuple[list[NDArray[Any] | None], float]:
    """Log-probs in the type of the store, and the largest error by which one was rounded."""
    if dtype == "float32":
        return list(values), 0.0
    stored: list[NDArray[Any] | None] = []
    largest = 0.0
    for owner, full in zip(owners, values, strict=True):
        half = None if full is None else ragged.to_float16(owner, full)
        stored.append(half)
        if full is not None and half is not None:
            largest = max(largest, float(np.abs(half.astype(np.float32) - full).max(initial=0.0)))
    return stored, largest


def encode_scores(scores: Sequence[Scores], rows: Sequence[int], vocab_size: int, logprob_dtype: str) -> SegmentData:
    """A segment of scores, in the order of rows; rows stay right because rollouts are only ever added behind them."""
    owners = [score.rollout_id for score in scores]
    stored, rounding = _to_stored([score.logprobs for score in scores], owners, logprob_dtype)
    lengths = np.array([score.logprobs.size for score in scores], np.int64)
    hashes = _two([score.content_hash for score in scores])
    columns: dict[str, Any] = {
        "row": rows,
        "length": lengths,
        "start": ragged.offsets(lengths)[:-1],
        "floored": [score.floored for score in scores],
        "content_hash_0": hashes[:, 0],
        "content_hash_1": hashes[:, 1],
        "logprobs_checksum": [checksum_of(logprobs) for logprobs in stored],
    }
    arrays: dict[str, NDArray[Any]] = {"logprobs": _filled(stored, lengths, np.nan, logprob_dtype)}
    supports = [score.top_k for score in scores if score.top_k is not None]
    if supports:
        ids = [support.ids.astype(np.min_scalar_type(vocab_size - 1)) for support in supports]
        ranked, error = _to_stored([support.logprobs for support in supports], owners, logprob_dtype)
        tails = [support.tail for support in supports]
        columns["top_k_checksum"] = [checksum_of(*three) for three in zip(ids, ranked, tails, strict=True)]
        parts: dict[str, Sequence[Any]] = {"top_k_ids": ids, "top_k_logprobs": ranked, "top_k_tail": tails}
        arrays |= {name: np.concatenate(values) for name, values in parts.items()}
        rounding = max(rounding, error)
    lines = _table(SCORE_FIELDS, len(scores), columns)
    return SegmentData(SCORE_FIELDS, lines, arrays, int(lengths.sum()), rows[0], rows[-1], rounding)


def decode_rollouts(segment: Segment, indices: Sequence[int]) -> list[Rollout]:
    """These rollouts of a segment, each verified."""
    lines = segment.lines(indices)
    rows = lines.tolist()
    names = segment.ranges("rollout_ids", *_spans(rows, "id_start", "id_length"))
    tokens = segment.ranges("token_ids", [r[2] for r in rows], [r[2] + r[0] + r[1] for r in rows])
    spans = _spans(rows, "response_start", "response_length")
    masks = _optional(segment, "loss_mask", spans, [bool(r[MASKED]) for r in rows])
    behaviors = _optional(segment, "behavior_logprobs", spans, [bool(r[HAS_BEHAVIOR]) for r in rows])
    hashes = np.ascontiguousarray(lines[:, CONTENT_HASH]).tobytes()
    decoded = []
    for i, row in enumerate(rows):
        rollout_id = _decode_id(segment, names[i], row)
        if checksum_of(tokens[i]) != row[_R["token_checksum"]]:
            raise _corrupt(segment, "token_ids", rollout_id)
        if checksum_of(masks[i], behaviors[i]) != row[_R["response_checksum"]]:
            raise _corrupt(segment, "loss_mask or behavior_logprobs", rollout_id)
        ids = read_only(tokens[i].astype(np.int32))
        mask = np.ones(row[1], np.bool_) if masks[i] is None else masks[i].astype(np.bool_)
        decoded.append(
            Rollout.from_store(
                rollout_id=rollout_id,
                prompt_ids=ids[: row[0]],
                response_ids=ids[row[0] :],
                loss_mask=read_only(mask),
                finish_reason=_REASONS[row[_R["finish_reason"]]],
                behavior_logprobs=None if behaviors[i] is None else read_only(behaviors[i].astype(np.float32)),
                generation=row[GENERATION],
                content_hash=hashes[16 * i : 16 * i + 16],
            )
        )
    return decoded


def contents(segment: Segment, indices: Sequence[int]) -> list[tuple[bytes, int]]:
    """Content hash and number of response tokens of these rollouts."""
    lines = segment.lines(indices)
    hashes = np.ascontiguousarray(lines[:, CONTENT_HASH]).tobytes()
    return [(hashes[16 * i : 16 * i + 16], length) for i, length in enumerate(lines[:, _R["response_length"]].tolist())]


def _decode_id(segment: Segment, data: NDArray[np.uint8], row: Sequence[int]) -> str:
    raw = data.tobytes()
    if np.frombuffer(xxh3_128_digest(raw), "<i8").tolist() != list(row[ID_HASH]):
        raise segment.damaged("rollout_ids", "an id is not the one its line names")
    return raw.decode("utf-8", "surrogatepass")


def _spans(rows: Sequence[Sequence[int]], start: str, length: str) -> tuple[list[int], list[int]]:
    a, b = _R[start], _R[length]
    return [r[a] for r in rows], [r[a] + r[b] for r in rows]


def _optional(segment: Segment, name: str, spans: tuple[list[int], list[int]], wanted: Sequence[bool]) -> list[Any]:
    """Parts of an array for the rows that have it, None for the others."""
    chosen = [i for i, yes in enumerate(wanted) if yes]
    found: list[Any] = [None] * len(wanted)
    if chosen:
        parts = segment.ranges(name, [spans[0][i] for i in chosen], [spans[1][i] for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            found[i] = part
    return found


def _corrupt(segment: Segment, array: str, rollout_id: str) -> CorruptStoreError:
    return segment.damaged(array, f"the values of rollout {rollout_id!r} do not match their checksum")


def decode_scores(
    segment: Segment, indices: Sequence[int], rollouts: Sequence[Rollout], *, top_k: bool
) -> list[tuple[Float32Array, TopK | None]]:
    """Log-probs (and top-k supports) of these lines, each verified, and bound to the rollout that it is read with."""
    lines = segment.lines(indices)
    rows = lines.tolist()
    hashes = np.ascontiguousarray(lines[:, _S["content_hash_0"] : _S["content_hash_1"] + 1]).tobytes()
    starts, ends = [r[SCORE_START] for r in rows], [r[SCORE_START] + r[_S["length"]] for r in rows]
    values = segment.ranges("logprobs", starts, ends)
    supports = _decode_top_k(segment, rows, starts, ends, rollouts) if top_k else [None] * len(rows)
    decoded = []
    for i, rollout in enumerate(rollouts):
        if hashes[16 * i : 16 * i + 16] != rollout.content_hash or values[i].size != rollout.response_ids.size:
            raise segment.damaged("logprobs", f"the scores of rollout {rollout.rollout_id!r} were computed on other tokens")
        if checksum_of(values[i]) != rows[i][_S["logprobs_checksum"]]:
            raise _corrupt(segment, "logprobs", rollout.rollout_id)
        decoded.append((read_only(values[i].astype(np.float32)), supports[i]))
    return decoded


def _decode_top_k(
    segment: Segment, rows: Sequence[Sequence[int]], starts: Sequence[int], ends: Sequence[int], rollouts: Sequence[Rollout]
) -> list[TopK]:
    parts = [segment.ranges(name, starts, ends) for name in ("top_k_ids", "top_k_logprobs", "top_k_tail")]
    supports = []
    for row, rollout, *three in zip(rows, rollouts, *parts, strict=True):
        if checksum_of(*three) != row[_S["top_k_checksum"]]:
            raise _corrupt(segment, "top_k", rollout.rollout_id)
        supports.append(TopK.from_store(*three))
    return supports
