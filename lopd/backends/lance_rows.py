"""Rollouts and scores as rows of LanceDB tables, and back.

Two checksums a row: `line_checksum` covers its short columns (the line), `data_checksum` its tokens or log-probs, and is part of the line.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from lopd.arrays import Float32Array, read_only
from lopd.backends import ragged
from lopd.backends.lance_table import COMMIT, KEY_METADATA
from lopd.errors import CorruptStoreError
from lopd.types import Rollout, Scores, TopK

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
        ("has_behavior", "?"),
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
ROLLOUT_DATA = ("finish_reason", "token_ids", "loss_mask", "behavior_logprobs")
SCORE_DATA = ("logprobs",)
TOP_K_DATA = ("top_k_ids", "top_k_logprobs", "top_k_tail")
_ID, _CHECKSUM = "rollout_id", "line_checksum"


def line_columns(line: np.dtype[Any]) -> list[str]:
    """The columns that a line is read from."""
    return [*(_ID if name == "id_hash" else name for name in line.names or ()), _CHECKSUM]


def tokens_of(lines: NDArray[np.void]) -> int:
    """Prompt and response tokens of rollouts, or scored response tokens."""
    return sum(int(lines[name].sum()) for name in ("prompt_length", "response_length", "length") if name in (lines.dtype.names or ()))


def hash_ids(ids: Sequence[bytes]) -> NDArray[np.void]:
    """(n,): 128 bits of each rollout id; two ids never share them in practice."""
    return np.frombuffer(b"".join(map(xxh3_128_digest, ids)), "V16")


def encode_id(rollout_id: str) -> bytes:
    """UTF-8; lone surrogates, which JSON can carry, survive."""
    return rollout_id.encode("utf-8", "surrogatepass")


def decode_id(data: bytes) -> str:
    """The inverse of `encode_id`."""
    return data.decode("utf-8", "surrogatepass")


def checksum(*parts: Any) -> int:
    """Of arrays in this order; an absent one differs from any that is there."""
    found = 0
    for part in parts:
        found = xxh3_64_intdigest(b"" if part is None else np.ascontiguousarray(part), seed=found)
    return found


def _line_checksums(lines: NDArray[np.void]) -> NDArray[np.uint64]:
    data, size = lines.tobytes(), lines.dtype.itemsize
    return np.array([xxh3_64_intdigest(data[at : at + size]) for at in range(0, len(data), size)], np.uint64)


def encode_rollouts(
    rollouts: Sequence[Rollout], first_row: int, vocab_size: int, logprob_dtype: str, *, commit: int, when: float
) -> Any:
    """An Arrow table of one commit.  Ids are in the smallest type that holds the vocabulary; there is no mask where nothing is masked.

    Raises:
        InvalidRecordError: a log-prob is below what the type can hold; it names the rollout.
    """
    owners = [rollout.rollout_id for rollout in rollouts]
    tokens = [np.concatenate([r.prompt_ids, r.response_ids]).astype(np.min_scalar_type(vocab_size - 1)) for r in rollouts]
    masks = [None if r.loss_mask.all() else r.loss_mask.astype(np.uint8) for r in rollouts]
    behaviors, rounding = _to_stored([r.behavior_logprobs for r in rollouts], owners, logprob_dtype)
    ids = [encode_id(owner) for owner in owners]
    lines = np.zeros(len(rollouts), ROLLOUT_LINE)
    columns: dict[str, Any] = {
        COMMIT: commit,
        "row": np.arange(first_row, first_row + len(rollouts)),
        "id_hash": hash_ids(ids),
        "content_hash": np.frombuffer(b"".join(r.content_hash for r in rollouts), "V16"),
        "prompt_length": [r.prompt_ids.size for r in rollouts],
        "response_length": [r.response_ids.size for r in rollouts],
        "generation": [r.generation for r in rollouts],
        "has_behavior": [values is not None for values in behaviors],
        "committed_at": when,
        "rounding": rounding,
        "data_checksum": [checksum(r.finish_reason.encode(), *parts) for r, *parts in zip(rollouts, tokens, masks, behaviors, strict=True)],
    }
    for name, values in columns.items():
        lines[name] = values
    texts = {_ID: ids, "finish_reason": [r.finish_reason for r in rollouts]}
    return _table(lines, texts, {"token_ids": tokens}, {"loss_mask": masks, "behavior_logprobs": behaviors}, logprob_dtype)


def encode_scores(
    scores: Sequence[Scores], rows: Sequence[int], vocab_size: int, logprob_dtype: str, *, commit: int, when: float
) -> Any:
    """The same for scores; a row is that of the rollout.  All of them have a top-k support or none has."""
    owners = [score.rollout_id for score in scores]
    logprobs, rounding = _to_stored([score.logprobs for score in scores], owners, logprob_dtype)
    lists: dict[str, Sequence[Any]] = {"logprobs": logprobs}
    supports = [score.top_k for score in scores if score.top_k is not None]
    if supports:
        ranked, error = _to_stored([support.logprobs.ravel() for support in supports], owners, logprob_dtype)
        ids = [support.ids.ravel().astype(np.min_scalar_type(vocab_size - 1)) for support in supports]
        lists |= dict(zip(TOP_K_DATA, (ids, ranked, [support.tail for support in supports]), strict=True))
        rounding = max(rounding, error)
    lines = np.zeros(len(scores), SCORE_LINE)
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
    for name, values in columns.items():
        lines[name] = values
    return _table(lines, {}, lists, {}, logprob_dtype)


def _to_stored(values: Sequence[Float32Array | None], owners: Sequence[str], dtype: str) -> tuple[list[NDArray[Any] | None], float]:
    """Log-probs in the type of the store, and the largest error by which one was rounded."""
    if dtype == "float32":
        return list(values), 0.0
    stored = [None if full is None else ragged.to_float16(owner, full) for owner, full in zip(owners, values, strict=True)]
    errors = [
        np.abs(half.astype(np.float32) - full).max()
        for half, full in zip(stored, values, strict=True)
        if half is not None and full is not None
    ]
    return stored, float(max(errors, default=0.0))


def _table(
    lines: NDArray[np.void],
    texts: dict[str, Sequence[bytes | str]],
    lists: dict[str, Sequence[Any]],
    optional_lists: dict[str, Sequence[Any]],
    logprob_dtype: str,
) -> Any:
    import pyarrow as pa

    empty = {"loss_mask": "uint8", "behavior_logprobs": logprob_dtype}
    columns: list[tuple[Any, Any]] = []
    for name in lines.dtype.names or ():
        if name == "id_hash":
            continue
        array = _bytes_column(lines[name]) if lines.dtype[name].kind == "V" else pa.array(lines[name])
        columns.append((pa.field(name, array.type, nullable=False, metadata=KEY_METADATA if name == COMMIT else None), array))
    columns.append((pa.field(_CHECKSUM, pa.uint64(), nullable=False), pa.array(_line_checksums(lines))))
    for name, texts_of in texts.items():
        array = pa.array(texts_of, pa.binary() if name == _ID else pa.string())
        columns.append((pa.field(name, array.type, nullable=False), array))
    for name, values in lists.items():
        array = _list_column(values, values[0].dtype)
        columns.append((pa.field(name, array.type, nullable=False), array))
    for name, values in optional_lists.items():
        array = _list_column(values, np.dtype(empty[name]))
        columns.append((pa.field(name, array.type), array))
    return pa.Table.from_arrays([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))


def _bytes_column(values: NDArray[np.void]) -> Any:
    import pyarrow as pa

    data = np.ascontiguousarray(values)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(data.dtype.itemsize), len(data), [None, pa.py_buffer(data.tobytes())])


def _list_column(values: Sequence[NDArray[Any] | None], dtype: np.dtype[Any]) -> Any:
    import pyarrow as pa

    flat = ragged.concat([part for part in values if part is not None], dtype.name)
    ends = ragged.offsets(np.array([0 if part is None else part.size for part in values])).astype(np.int32)
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    absent = pa.array([part is None for part in values])
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), type=pa.list_(item), mask=absent)


def read_lines(owner: str, table: Any, line: np.dtype[Any]) -> NDArray[np.void]:
    """The lines of an Arrow table that has `line_columns`.

    Raises:
        CorruptStoreError: one is not what was written; it names the rollout, or its row.
    """
    lines = np.zeros(len(table), line)
    if not len(table):
        return lines
    for name in line.names or ():
        lines[name] = hash_ids(_cells(table, _ID)) if name == "id_hash" else _numbers(owner, table, name, line[name])
    found, wanted = _line_checksums(lines), _numbers(owner, table, _CHECKSUM, np.dtype("<u8"))
    for i in np.flatnonzero(found != wanted)[:1]:
        raise damaged(owner, _name_of(table, int(i), lines), f"checksum of its line is {found[i]:016x}, expected {wanted[i]:016x}")
    return lines


def _name_of(table: Any, i: int, lines: NDArray[np.void]) -> str:
    return f"rollout {_cells(table, _ID)[i].decode(errors='backslashreplace')!r}" if _ID in table.column_names else f"scores of row {lines['row'][i]}"


def damaged(owner: str, name: str, what: str) -> CorruptStoreError:
    """The error for stored values that are not those that were written."""
    return CorruptStoreError(f"{owner}: {name}: the {what}; restore the store from a backup.")


def _numbers(owner: str, table: Any, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    column = table.column(name).chunk(0)
    if column.null_count:
        raise damaged(owner, f"column {name!r}", f"number of empty cells is {column.null_count}, expected 0")
    if dtype.kind == "V":
        return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _cells(table: Any, name: str) -> list[Any]:
    return list(table.column(name).to_pylist())


def _lists(table: Any, name: str) -> tuple[NDArray[Any], list[slice | None]]:
    """All values end to end, and where those of each row are; None where there are none."""
    column = table.column(name).chunk(0)
    ends = column.offsets.to_numpy().tolist()
    valid = column.is_valid().to_pylist()
    return column.values.to_numpy(), [slice(ends[i], ends[i + 1]) if there else None for i, there in enumerate(valid)]


def decode_rollouts(owner: str, table: Any) -> list[Rollout]:
    """The rollouts of an Arrow table that has all columns, in its order.

    Raises:
        CorruptStoreError: one is not what was written; it names the rollout.
    """
    lines = read_lines(owner, table, ROLLOUT_LINE)
    ids, reasons = [decode_id(data) for data in _cells(table, _ID)], _cells(table, "finish_reason")
    (raw, spans), (masks, mask_spans), (behaviors, behavior_spans) = (_lists(table, name) for name in ROLLOUT_DATA[1:])
    tokens, logprobs = read_only(raw.astype(np.int32)), read_only(behaviors.astype(np.float32))
    prompts, responses = lines["prompt_length"].tolist(), lines["response_length"].tolist()
    everything = read_only(np.ones(max(responses), np.bool_))
    hashes, generations, sums = (lines[name].tolist() for name in ("content_hash", "generation", "data_checksum"))
    found = []
    for i, (span, mask, behavior) in enumerate(zip(spans, mask_spans, behavior_spans, strict=True)):
        stored = [raw[span], None if mask is None else masks[mask], None if behavior is None else behaviors[behavior]]
        if checksum(reasons[i].encode(), *stored) != sums[i]:
            raise damaged(owner, f"rollout {ids[i]!r}", "checksum of its tokens is another than the one that was written")
        start = span.start + prompts[i]
        found.append(
            Rollout.from_store(
                rollout_id=ids[i],
                prompt_ids=tokens[span.start : start],
                response_ids=tokens[start : span.stop],
                loss_mask=everything[: responses[i]] if mask is None else read_only(masks[mask].view(np.bool_)),
                finish_reason=reasons[i],
                behavior_logprobs=None if behavior is None else logprobs[behavior],
                generation=generations[i],
                content_hash=hashes[i],
            )
        )
    return found


def decode_scores(owner: str, table: Any) -> tuple[NDArray[np.void], list[Float32Array]]:
    """The lines and log-probs of an Arrow table that has both, in its order.

    Raises:
        CorruptStoreError: one is not what was written; it names the row.
    """
    lines = read_lines(owner, table, SCORE_LINE)
    values, spans = _lists(table, SCORE_DATA[0])
    logprobs = read_only(values.astype(np.float32))
    _check_data(owner, lines, "data_checksum", [(values[span],) for span in spans])
    return lines, [logprobs[span] for span in spans]


def decode_top_k(owner: str, table: Any, lines: NDArray[np.void], k: int) -> list[TopK]:
    """The top-k supports of the same table."""
    columns = [_lists(table, name) for name in TOP_K_DATA]
    stored = [[values[spans[i]] for values, spans in columns] for i in range(len(lines))]
    _check_data(owner, lines, "top_k_checksum", stored)
    return [TopK.from_store(ids.reshape(-1, k), logprobs.reshape(-1, k), tail) for ids, logprobs, tail in stored]


def _check_data(owner: str, lines: NDArray[np.void], name: str, stored: Sequence[Sequence[Any]]) -> None:
    for row, wanted, parts in zip(lines["row"].tolist(), lines[name].tolist(), stored, strict=True):
        if checksum(*parts) != wanted:
            raise damaged(owner, f"scores of row {row}", f"{name} of its log-probs is another than the one that was written")
