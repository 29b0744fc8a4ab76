"""Rows of LanceDB tables -> rows of a store: fetched some at a time, and each value verified where it was just copied to."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from lopd.backends.id_index import decode_id, hash_ids
from lopd.backends.lance.encode import ID, LINE_CHECKSUM, ROLLOUT_DATA, SCORE_DATA, TOP_K_DATA, line_checksums, tokens_of
from lopd.backends.lance.table import HAS_SAMPLER, RANGE
from lopd.errors import CorruptStoreError, LopdError
from lopd.records.rows import Rows, ends
from lopd.records.support import TopK
from lopd.records.waiting import overlapped

# Larger answers of Lance come in fresh memory each time; smaller ones cost more than they bring.
_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 2048, 1 << 21
# While one answer is decoded, two are fetched.
_AT_ONCE = 3
_REASON, _TOKENS, _MASK, _BEHAVIOR, _SAMPLER = ROLLOUT_DATA
(_LOGPROBS,) = SCORE_DATA


@frozen(eq=False)
class Wanted:
    """Rows of one table.

    Args:
        owner: its name in messages.
        fetch: gives an Arrow table with these columns of distinct and ascending rows, and at which place of it each row is.
        rows: (B,), their numbers in the store, in the order of the call.
        lines: (B,), theirs in this table, verified.
    """

    owner: str
    fetch: Callable[[NDArray[np.int64], Sequence[str]], tuple[Any, NDArray[np.int64]]]
    rows: NDArray[np.int64]
    lines: NDArray[np.void]


def read(rollouts: Wanted, scores: Mapping[str, Wanted], top_k: Mapping[str, int]) -> Rows:
    """Read rows end to end, with their scores, which are in other tables, and the supports (column -> K) of some.

    Raises:
        CorruptStoreError: a value is not what was written; it names the row.
        StoreReadError: the storage does not answer.
    """
    lines = rollouts.lines
    prompts, responses = (lines[name].astype(np.int64) for name in ("prompt_length", "response_length"))
    names, reasons = _Cells(len(lines)), _Cells(len(lines))
    tokens, mask, behavior = _Lists(prompts + responses), _Lists(responses, filler=1), _Lists(responses, filler=np.nan)
    sampler = _Lists(responses, filler=np.nan, absent_counts=False)
    data: dict[str, _Cells | _Lists] = {_REASON: reasons, _TOKENS: tokens, _MASK: mask, _BEHAVIOR: behavior, _SAMPLER: sampler}
    absent = [name for name, bit in ((_BEHAVIOR, 1), (_SAMPLER, 2)) if not (lines["has_behavior"] & bit).any()]
    readers = [_Reader(rollouts, {None: {ID: names}, "data_checksum": data}, absent)]
    columns: dict[str, list[_Lists]] = {}
    for name, wanted in scores.items():
        ranked = [_Lists(responses * n) for n in (top_k[name], top_k[name], 1)] if name in top_k else []
        columns[name] = [_Lists(responses), *ranked]
        targets = {"data_checksum": {_LOGPROBS: columns[name][0]}, "top_k_checksum": dict(zip(TOP_K_DATA, ranked, strict=bool(ranked)))}
        readers.append(_Reader(wanted, {key: group for key, group in targets.items() if group}))
    calls = [(reader, call) for reader in readers for call in reader.calls()]
    for (reader, _), chunk in overlapped(lambda item: item[1](), calls, min(len(calls), _AT_ONCE)):
        reader.put(chunk)
    for i in np.flatnonzero(hash_ids(names.values) != lines["id_hash"])[:1]:
        raise damaged(rollouts.owner, f"rollout {_shown(names.values[i])}", f"id is not the one of row {lines['row'][i]}")
    return Rows(
        rollout_ids=[decode_id(name) for name in names.values],
        prompt_lengths=prompts,
        response_lengths=responses,
        token_ids=tokens.array(np.int32),
        loss_mask=None if mask.values is None else mask.values.view(np.bool_),
        behavior_logprobs=behavior.floats(),
        sampler_logprobs=sampler.floats(),
        finish_reasons=reasons.values,
        generations=lines["generation"].astype(np.int64),
        content_hashes=lines["content_hash"].tolist(),
        scores={name: found[0].array(np.float32).astype(np.float32, copy=False) for name, found in columns.items()},
        top_k={
            name: TopK.from_store(ids.array(np.int32).reshape(-1, k), ranked.array(np.float32).reshape(-1, k), tail.array(np.float32))
            for name, k in top_k.items()
            for _, ids, ranked, tail in [columns[name]]
        },
    )


@frozen(eq=False)
class _Chunk:
    """Some of the rows.

    Args:
        table: their columns.
        at: which row of the table is meant,
        places: at each of these places in the call.
    """

    table: Any
    at: NDArray[np.int64]
    places: NDArray[np.int64]


@final
class _Cells:
    """One text a row of the call."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count

    def take(self, column: Any, chunk: _Chunk, sums: Sequence[int]) -> list[int]:
        """Put the texts of a chunk in their places; gives the checksum of each, which goes on from these."""
        cells = column.to_pylist()
        for at, place in zip(chunk.at.tolist(), chunk.places.tolist(), strict=True):
            self.values[place] = cells[at]
        found = [cells[at] if isinstance(cells[at], bytes) else cells[at].encode() for at in chunk.at.tolist()]
        return list(map(xxh3_64_intdigest, found, sums))


@final
class _Lists:
    """One list a row of the call, end to end; the array begins to be when the first values come.

    Args:
        lengths: values of each row of the call.
        filler: for rows that have none; None where that cannot be.
        absent_counts: whether a list that is not there changes the checksum.
    """

    def __init__(self, lengths: NDArray[np.int64], filler: float | None = None, *, absent_counts: bool = True) -> None:
        self.values: NDArray[Any] | None = None
        self._ends = ends(lengths)
        self._filler = filler
        self._absent_counts = absent_counts

    def array(self, dtype: Any) -> NDArray[Any]:
        """Return the values; an empty array of this type if no row has any."""
        return np.zeros(0, dtype) if self.values is None else self.values

    def floats(self) -> NDArray[np.float32] | None:
        """Return the values as float32; None if no row has any."""
        return None if self.values is None else self.values.astype(np.float32, copy=False)

    def take(self, column: Any, chunk: _Chunk, sums: Sequence[int]) -> list[int]:
        """Copy the values of a chunk to their places; gives the checksum of the copies, which goes on from these.

        Raises:
            ValueError: there are not as many as there should be.
        """
        if column is None or column.null_count == len(column):
            return [xxh3_64_intdigest(b"", seed) for seed in sums] if self._absent_counts else list(sums)
        values, bounds = column.values.to_numpy(), column.offsets.to_numpy().astype(np.int64)
        there = column.is_valid().to_numpy(zero_copy_only=False)[chunk.at]
        starts, places = bounds[chunk.at], self._ends[chunk.places]
        lengths = np.where(there, bounds[chunk.at + 1] - starts, 0)
        if (lengths != np.where(there, self._ends[chunk.places + 1] - places, 0)).any():
            raise ValueError("a list is shorter or longer than its line states")
        if self.values is None:
            total = int(self._ends[-1])
            self.values = np.empty(total, values.dtype) if self._filler is None else np.full(total, self._filler, values.dtype)
        size, found = values.itemsize, []
        source, target = values.view(np.uint8).data, self.values.view(np.uint8).data
        # A copy is hashed while it is in the cache.  Views live for a moment: lists of them would keep the garbage collector busy.
        for start, length, place, seed in zip(
            (starts * size).tolist(), (lengths * size).tolist(), (places * size).tolist(), sums, strict=True
        ):
            target[place : place + length] = source[start : start + length]
            found.append(xxh3_64_intdigest(target[place : place + length], seed) if length or self._absent_counts else seed)
        return found


@final
class _Reader:
    """Fills arrays and texts from one table.

    Args:
        wanted: its rows.
        targets: for each checksum of a line, column -> where it goes, in the order in which the checksum goes over them; None for those of none.
        absent: columns that no row has, which are not read.
    """

    def __init__(self, wanted: Wanted, targets: Mapping[str | None, Mapping[str, _Cells | _Lists]], absent: Collection[str] = ()) -> None:
        self._wanted = wanted
        self._targets = targets
        self._columns = [name for group in targets.values() for name in group if name not in absent]
        self._distinct, first, self._inverse, counts = np.unique(wanted.rows, return_index=True, return_inverse=True, return_counts=True)
        self._order, self._ends = np.argsort(self._inverse, kind="stable"), ends(counts)
        self._tokens = ends(tokens_of(wanted.lines)[first])

    def calls(self) -> list[Callable[[], _Chunk]]:
        """Return functions that each fetch some of the rows, in stored order; a row that is asked for twice is fetched once."""
        return [partial(self._fetch, start, stop) for start, stop in _cut(self._distinct, self._tokens)]

    def _fetch(self, start: int, stop: int) -> _Chunk:
        table, found = self._wanted.fetch(self._distinct[start:stop], self._columns)
        places = self._order[self._ends[start] : self._ends[stop]]
        return _Chunk(table, found[self._inverse[places] - start], places)

    def put(self, chunk: _Chunk) -> None:
        """Copy what was fetched, and compare it with the checksums that the lines have."""
        owner, lines = self._wanted.owner, self._wanted.lines[chunk.places]
        for name, targets in self._targets.items():
            with decoding(owner):
                sums = [0] * len(chunk.at)
                for column, target in targets.items():
                    there = column in chunk.table.column_names
                    sums = target.take(chunk.table.column(column).chunk(0) if there else None, chunk, sums)
            for i in np.flatnonzero(np.array(sums, np.uint64) != lines[name])[:1] if name else ():
                row = _called(chunk.table, int(chunk.at[i]), int(self._wanted.rows[chunk.places[i]]))
                raise damaged(owner, row, "checksum of its values is another than the one that was written")


def _cut(rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, last + 1) of pieces of ascending rows, which begin after so many tokens; long runs of neighbours are pieces of their own."""
    pieces, start = [], 0
    run_ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, rows.size)
    while start < rows.size:
        fitting = int(np.searchsorted(tokens, tokens[start] + _TOKENS_AT_ONCE, side="right")) - 1
        run_end = int(run_ends[np.searchsorted(run_ends, start, side="right")])
        stop = min(max(fitting, start + 1), start + _ROWS_AT_ONCE, run_end if run_end - start >= RANGE else rows.size)
        pieces.append((start, stop))
        start = stop
    return pieces


@contextmanager
def decoding(owner: str) -> Iterator[None]:
    """Raise an error of ours where damage that Lance did not notice left values that do not fit an array."""
    try:
        yield
    except LopdError:
        raise
    except (ValueError, AttributeError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise damaged(owner, "a row", f"values cannot be decoded ({error})") from error


def read_lines(owner: str, table: Any, line: np.dtype[Any], seed: int) -> NDArray[np.void]:
    """Return the lines of an Arrow table that has `line_columns`; `seed` is that of its table.

    Raises:
        CorruptStoreError: one is not what was written; it names the rollout, or its row.
    """
    lines = np.zeros(len(table), line)
    with decoding(owner):
        for name in line.names or ():
            lines[name] = hash_ids(table.column(ID).to_pylist()) if name == "id_hash" else _numbers(owner, table, name, line[name])
        if HAS_SAMPLER in table.column_names:
            lines["has_behavior"] |= table.column(HAS_SAMPLER).fill_null(False).to_numpy().astype(np.uint8) << 1
        found, wanted = line_checksums(lines, seed), _numbers(owner, table, LINE_CHECKSUM, np.dtype("<u8"))
    for i in np.flatnonzero(found != wanted)[:1]:
        row = _called(table, int(i), int(lines["row"][i]))
        raise damaged(owner, row, f"checksum of its line is {found[i]:016x}, expected {wanted[i]:016x}")
    for name in {"prompt_length", "response_length", "length", "generation", "row"} & {*(line.names or ())}:
        for i in np.flatnonzero(lines[name] < 0)[:1]:
            raise damaged(
                owner, _called(table, int(i), int(lines["row"][i])), f"{name} of its line is {lines[name][i]}, expected 0 or more"
            )
    return lines


def _called(table: Any, at: int, row: int) -> str:
    """Return how messages name a row, which is at this place in a table."""
    return f"rollout {_shown(table.column(ID)[at].as_py())}" if ID in table.column_names else f"scores of row {row}"


def _shown(rollout_id: bytes) -> str:
    return repr(rollout_id.decode(errors="backslashreplace"))


def damaged(owner: str, name: str, what: str) -> CorruptStoreError:
    """Return the error for stored values that are not those that were written."""
    return CorruptStoreError(f"{owner}: {name}: the {what}; restore the store from a backup.")


def _numbers(owner: str, table: Any, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    column = table.column(name).chunk(0)
    if column.null_count:
        raise damaged(owner, f"column {name!r}", f"number of empty cells is {column.null_count}, expected 0")
    if dtype.kind == "V":
        return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]
    return np.asarray(column.to_numpy(zero_copy_only=False))
