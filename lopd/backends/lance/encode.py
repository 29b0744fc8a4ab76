"""Rollouts and scores -> rows of LanceDB tables; `decode` is the way back.

Two checksums a row: `line_checksum` covers its short columns (the line), `data_checksum` its tokens or log-probs, and is part of the line.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from lopd.backends import ragged
from lopd.backends.id_index import encode_ids, hash_ids
from lopd.backends.lance.table import COMMIT, HAS_SAMPLER, KEY_METADATA
from lopd.errors import InvalidRecordError
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores
from lopd.records.rows import ends
from lopd.records.support import TopK

#: What a line is made of, and checked by; `id_hash` is of the rollout id, which is a column of its own.
ROLLOUT_LINE = np.dtype(
    [
        (COMMIT, "<i8"),
        ("row", "<i8"),
        ("id_hash", "V16"),
        ("content_hash", "V16"),
        ("prompt_length", "<i4"),
        ("response_length", "<i4"),
        ("generation", "<i8"),
        # two bits: behavior_logprobs, and sampler_logprobs
        ("has_behavior", "u1"),
        ("committed_at", "<f8"),
        ("rounding", "<f8"),
        ("data_checksum", "<u8"),
    ]
)
SCORE_LINE = np.dtype(
    [
        (COMMIT, "<i8"),
        ("row", "<i8"),
        ("content_hash", "V16"),
        ("length", "<i4"),
        ("floored", "<i4"),
        ("committed_at", "<f8"),
        ("rounding", "<f8"),
        ("data_checksum", "<u8"),
        ("top_k_checksum", "<u8"),
    ]
)
ROLLOUT_DATA = ("finish_reason", "token_ids", "loss_mask", "behavior_logprobs", "sampler_logprobs")
SCORE_DATA = ("logprobs",)
TOP_K_DATA = ("top_k_ids", "top_k_logprobs", "top_k_tail")
ID, LINE_CHECKSUM = "rollout_id", "line_checksum"
# of one column in one append: the offsets of its lists are int32
_MOST_VALUES = (1 << 31) - 1


def line_columns(line: np.dtype[Any]) -> list[str]:
    """Return the columns that a line is read from, if they are there."""
    names = [ID if name == "id_hash" else name for name in line.names or ()]
    return [*names, *([HAS_SAMPLER] if "has_behavior" in names else []), LINE_CHECKSUM]


def tokens_of(lines: NDArray[np.void]) -> NDArray[np.int64]:
    """Return (n,): prompt and response tokens of rollouts, or scored response tokens."""
    lengths = (lines[name] for name in ("prompt_length", "response_length", "length") if name in (lines.dtype.names or ()))
    return sum(lengths, np.zeros(len(lines), np.int64))


def checksum(*parts: Any) -> int:
    """Return the checksum of arrays in this order; an absent one differs from any that is there."""
    found = 0
    for part in parts:
        found = xxh3_64_intdigest(b"" if part is None else np.ascontiguousarray(part).data, seed=found)
    return found


def line_checksums(lines: NDArray[np.void], seed: int) -> NDArray[np.uint64]:
    """Return the (n,) checksums of the lines; lines of one table have the same seed."""
    data, size = lines.tobytes(), lines.dtype.itemsize
    return np.array([xxh3_64_intdigest(data[at : at + size], seed) for at in range(0, len(data), size)], np.uint64)


def encode_rollouts(
    rollouts: Sequence[Rollout], first_row: int, vocab_size: int, logprob_dtype: str, *, commit: int, when: float, seed: int
) -> Any:
    """Return an Arrow table of one commit, for the table that has this seed.

    Ids are in the smallest type that holds the vocabulary; there is no mask where nothing is masked.

    Raises:
        InvalidRecordError: a log-prob is below what the type can hold; it names the rollout.
    """
    owners = [rollout.rollout_id for rollout in rollouts]
    tokens = [np.concatenate([r.prompt_ids, r.response_ids]).astype(np.min_scalar_type(vocab_size - 1)) for r in rollouts]
    masks = [None if r.loss_mask.all() else r.loss_mask.astype(np.uint8) for r in rollouts]
    behaviors, rounding = ragged.to_stored([r.behavior_logprobs for r in rollouts], owners, logprob_dtype)
    drawn, error = ragged.to_stored([r.sampler_logprobs for r in rollouts], owners, logprob_dtype)
    # absent log-probs of the sampler do not count in a checksum, which is then what it was before there were any
    parts = [(t, m, b, *([] if s is None else [s])) for t, m, b, s in zip(tokens, masks, behaviors, drawn, strict=True)]
    ids = encode_ids(owners)
    columns: dict[str, Any] = {
        COMMIT: commit,
        "row": np.arange(first_row, first_row + len(rollouts)),
        "id_hash": hash_ids(ids),
        "content_hash": np.frombuffer(b"".join(r.content_hash for r in rollouts), "V16"),
        "prompt_length": [r.prompt_ids.size for r in rollouts],
        "response_length": [r.response_ids.size for r in rollouts],
        "generation": [r.generation for r in rollouts],
        "has_behavior": [(b is not None) + 2 * (s is not None) for b, s in zip(behaviors, drawn, strict=True)],
        "committed_at": when,
        "rounding": max(rounding, error),
        "data_checksum": [checksum(r.finish_reason.encode(), *some) for r, some in zip(rollouts, parts, strict=True)],
    }
    texts: dict[str, Sequence[bytes | str]] = {ID: ids, "finish_reason": [r.finish_reason for r in rollouts]}
    lists: dict[str, Sequence[Any]] = {"token_ids": tokens, "loss_mask": masks, "behavior_logprobs": behaviors}
    if any(values is not None for values in drawn):
        lists["sampler_logprobs"] = drawn
    return _table(ROLLOUT_LINE, columns, texts, lists, logprob_dtype=logprob_dtype, seed=seed)


def encode_scores(
    scores: Sequence[Scores], rows: Sequence[int], vocab_size: int, logprob_dtype: str, *, commit: int, when: float, seed: int
) -> Any:
    """Return the same for scores; a row is that of the rollout.  All of them have a top-k support or none has."""
    owners = [score.rollout_id for score in scores]
    logprobs, rounding = ragged.to_stored([score.logprobs for score in scores], owners, logprob_dtype)
    lists: dict[str, Sequence[Any]] = {"logprobs": logprobs}
    supports = [score.top_k for score in scores if score.top_k is not None]
    if supports:
        ranked, error = ragged.to_stored([support.logprobs.ravel() for support in supports], owners, logprob_dtype)
        ids = [support.ids.ravel().astype(np.min_scalar_type(vocab_size - 1)) for support in supports]
        lists |= dict(zip(TOP_K_DATA, (ids, ranked, [support.tail for support in supports]), strict=True))
        rounding = max(rounding, error)
    columns: dict[str, Any] = {
        COMMIT: commit,
        "row": rows,
        "content_hash": np.frombuffer(b"".join(score.content_hash for score in scores), "V16"),
        "length": [score.logprobs.size for score in scores],
        "floored": [score.floored for score in scores],
        "committed_at": when,
        "rounding": rounding,
        "data_checksum": [checksum(values) for values in logprobs],
        "top_k_checksum": [checksum(*three) for three in zip(*(lists[name] for name in TOP_K_DATA), strict=True)] if supports else 0,
    }
    return _table(SCORE_LINE, columns, {}, lists, logprob_dtype=logprob_dtype, seed=seed)


def no_scores(provenance: Provenance, vocab_size: int, logprob_dtype: str, *, commit: int, when: float, seed: int) -> Any:
    """Return an Arrow table of a column without a row."""
    k, drawn = provenance.top_k, provenance.drawn
    support = TopK([range(k)], [[-np.log(max(k - drawn, 1))] * k], [float(k == drawn)], drawn) if k else None
    one = Scores("", b"\0" * 16, [0.0], top_k=support)
    return encode_scores([one], [0], vocab_size, logprob_dtype, commit=commit, when=when, seed=seed).slice(0, 0)


def _table(
    line: np.dtype[Any],
    cells: Mapping[str, Any],
    texts: dict[str, Sequence[bytes | str]],
    lists: dict[str, Sequence[Any]],
    *,
    logprob_dtype: str,
    seed: int,
) -> Any:
    import pyarrow as pa

    lines = np.zeros(len(cells["row"]), line)
    for name, values in cells.items():
        lines[name] = values
    optional = {"loss_mask": "uint8", "behavior_logprobs": logprob_dtype, "sampler_logprobs": logprob_dtype}
    columns: list[tuple[Any, Any]] = []
    for name in line.names or ():
        if name == "id_hash":
            continue
        values = (lines[name] & 1).astype(np.bool_) if name == "has_behavior" else lines[name]
        array = pa.array(values.tolist(), pa.binary(values.dtype.itemsize)) if values.dtype.kind == "V" else pa.array(values)
        columns.append((pa.field(name, array.type, nullable=False, metadata=KEY_METADATA if name == COMMIT else None), array))
    columns.append((pa.field(LINE_CHECKSUM, pa.uint64(), nullable=False), pa.array(line_checksums(lines, seed))))
    for name, texts_of in texts.items():
        array = pa.array(texts_of, pa.binary() if name == ID else pa.string())
        columns.append((pa.field(name, array.type, nullable=False), array))
    for name, some in lists.items():
        array = _list_column(some, np.dtype(optional[name]) if name in optional else some[0].dtype)
        columns.append((pa.field(name, array.type, nullable=name in optional), array))
    if "sampler_logprobs" in lists:
        columns.append((pa.field(HAS_SAMPLER, pa.bool_()), pa.array(lines["has_behavior"] > 1)))
    return pa.Table.from_arrays([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))


def _list_column(values: Sequence[NDArray[Any] | None], dtype: np.dtype[Any]) -> Any:
    import pyarrow as pa

    bounds = ends(np.array([0 if part is None else part.size for part in values]))
    if bounds[-1] > _MOST_VALUES:
        raise InvalidRecordError(f"Append: one column has {bounds[-1]} values, expected fewer than 2**31; append fewer rollouts at once.")
    flat = np.concatenate([np.zeros(0, dtype), *(part for part in values if part is not None)])
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    absent = pa.array([part is None for part in values])
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(flat), type=pa.list_(item), mask=absent)
