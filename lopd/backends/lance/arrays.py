"""Many rows of a store on LanceDB end to end: fetched some at a time, and each value verified where it was just copied to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from lopd.backends import ragged
from lopd.backends.lance.decode import damaged, decoding
from lopd.backends.lance.encode import ROLLOUT_DATA, SCORE_DATA, checksum
from lopd.backends.lance.part import Part
from lopd.backends.lance.table import RANGE, in_advance
from lopd.records.rollouts import BEHAVIOR_COLUMN, RolloutArrays

# Larger answers of Lance come in fresh memory each time; smaller ones cost more than they bring.
_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 2048, 1 << 21
_REASON, _TOKENS, _MASK, _BEHAVIOR = ROLLOUT_DATA
(_LOGPROBS,) = SCORE_DATA


@frozen(eq=False)
class Wanted:
    """Rows of one table.

    Args:
        owner: how messages name it.   part: the table.
        rows: of the store, in the order of the call.
        lines: theirs in this table.
    """

    owner: str
    part: Part
    rows: NDArray[np.int64]
    lines: NDArray[np.void]


def read_arrays(rollouts: Wanted, scores: Mapping[str, Wanted]) -> RolloutArrays:
    """Rows end to end, with their scores in other tables, and in column `behavior` what the engine reported, if it did.

    Raises:
        CorruptStoreError: a value is not what was written; it names the row.
    """
    prompts, responses = (rollouts.lines[name].astype(np.int64) for name in ("prompt_length", "response_length"))
    tokens = {_TOKENS: _Target(prompts + responses), _MASK: _Target(responses, filler=1), _BEHAVIOR: _Target(responses)}
    columns = {name: _Target(responses) for name in scores}
    readers = [_Reader(rollouts, tokens), *(_Reader(wanted, {_LOGPROBS: columns[name]}) for name, wanted in scores.items())]
    calls = [(reader, call) for reader in readers for call in reader.calls()]
    for (reader, _), chunk in zip(calls, in_advance([call for _, call in calls]), strict=True):
        reader.put(chunk)
    masks = tokens[_MASK].values
    return RolloutArrays(
        prompt_lengths=prompts,
        response_lengths=responses,
        token_ids=tokens[_TOKENS].array(),
        loss_mask=None if masks is None else masks.view(np.bool_),
        scores={name: target.array() for name, target in {**columns, BEHAVIOR_COLUMN: tokens[_BEHAVIOR]}.items()},
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
class _Target:
    """One array of the answer, which begins to be when the first values come.

    Args:
        lengths: values of each row of the call.
        filler: for rows that have none; None where that cannot be, or does not matter.
    """

    def __init__(self, lengths: NDArray[np.int64], filler: int | None = None) -> None:
        self.lengths = lengths
        self.values: NDArray[Any] | None = None
        self._ends = ragged.offsets(lengths)
        self._filler = filler

    def array(self) -> NDArray[Any]:
        """The values."""
        return np.zeros(0, np.float32) if self.values is None else self.values

    def take(self, column: Any, chunk: _Chunk, seeds: Sequence[int]) -> list[int]:
        """Copy the values of a chunk to their places; gives `checksum` of the copies, which goes on from these seeds.

        Raises:
            ValueError: there are not as many as there should be.
        """
        if column.null_count == len(column):
            return [xxh3_64_intdigest(b"", seed) for seed in seeds]
        values, ends = column.values.to_numpy(), column.offsets.to_numpy().astype(np.int64)
        if self.values is None:
            shape = int(self._ends[-1])
            self.values = np.empty(shape, values.dtype) if self._filler is None else np.full(shape, self._filler, values.dtype)
        there = column.is_valid().to_numpy(zero_copy_only=False)[chunk.at]
        starts, places = ends[chunk.at], self._ends[chunk.places]
        lengths = np.where(there, ends[chunk.at + 1] - starts, 0)
        if (lengths != np.where(there, self._ends[chunk.places + 1] - places, 0)).any():
            raise ValueError("a list is shorter or longer than its line says")
        return _copy_and_hash(values, starts, lengths, self.values, places=places, seeds=seeds)


@final
class _Reader:
    """Fills arrays from one table.

    Args:
        wanted: its rows.
        targets: column -> array, in the order in which the checksum of a row goes over them.
    """

    def __init__(self, wanted: Wanted, targets: Mapping[str, _Target]) -> None:
        self._wanted = wanted
        self._targets = targets
        self._columns = ROLLOUT_DATA if _TOKENS in targets else SCORE_DATA
        self._distinct, first, self._inverse, counts = np.unique(wanted.rows, return_index=True, return_inverse=True, return_counts=True)
        self._order, self._ends = np.argsort(self._inverse, kind="stable"), ragged.offsets(counts)
        self._tokens = ragged.offsets(next(iter(targets.values())).lengths[first])

    def calls(self) -> list[Callable[[], _Chunk]]:
        """Each fetches some of the rows, in the order in which they are stored; a row that is asked for twice is fetched once."""
        return [partial(self._fetch, start, stop) for start, stop in _cut(self._distinct, self._tokens)]

    def _fetch(self, start: int, stop: int) -> _Chunk:
        table, lines = self._wanted.part.fetch(self._distinct[start:stop], self._columns)
        places, found = self._order[self._ends[start] : self._ends[stop]], np.argsort(lines["row"])
        return _Chunk(table, found[self._inverse[places] - start], places)

    def put(self, chunk: _Chunk) -> None:
        """Copy what was fetched, and compare it with the checksums that the lines have."""
        owner, lines = self._wanted.owner, self._wanted.lines
        with decoding(owner):
            sums = _begun(chunk)
            for name, target in self._targets.items():
                sums = target.take(chunk.table.column(name).chunk(0), chunk, sums)
        for i in np.flatnonzero(np.array(sums, np.uint64) != lines["data_checksum"][chunk.places])[:1]:
            row = lines["row"][chunk.places[i]]
            raise damaged(owner, f"row {row}", "checksum of its values is another than the one that was written")


def _begun(chunk: _Chunk) -> list[int]:
    """The checksum of each row before its lists: of its finish reason, if it has one."""
    if _REASON not in chunk.table.column_names:
        return [0] * len(chunk.at)
    reasons = chunk.table.column(_REASON).to_pylist()
    known = {reason: checksum(reason.encode()) for reason in set(reasons)}
    return [known[reasons[i]] for i in chunk.at.tolist()]


def _cut(rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, last + 1) of pieces of ascending rows, which begin after so many tokens; long runs of neighbours are pieces of their own."""
    pieces, start = [], 0
    run_ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, rows.size)
    while start < rows.size:
        fitting = int(np.searchsorted(tokens, tokens[start] + _TOKENS_AT_ONCE, side="right")) - 1
        run_end = int(run_ends[np.searchsorted(run_ends, start, side="right")])
        stop = min(max(fitting, start + 1), start + _ROWS_AT_ONCE, run_end if run_end - start >= RANGE else rows.size)
        pieces.append((start, stop))
        start = stop
    return pieces


def _copy_and_hash(
    source: NDArray[Any], starts: NDArray[Any], lengths: NDArray[Any], target: NDArray[Any], *, places: NDArray[Any], seeds: Iterable[int]
) -> list[int]:
    """Copy pieces of one vector to places in another of its type; gives XXH3 of each copy, which goes on from its seed.

    A copy is hashed while it is in the cache, so it costs little more than one that nobody verifies.
    Starts, lengths and places are (n,), in values.

    Raises:
        ValueError: the source ends before a piece does.
    """
    size, found = source.itemsize, []
    data, whole = source.view(np.uint8).data, target.view(np.uint8).data
    spans = zip((starts * size).tolist(), (lengths * size).tolist(), (places * size).tolist(), seeds, strict=True)
    # Views that live only for a moment: lists of them would keep the garbage collector busy.
    for start, length, place, seed in spans:
        whole[place : place + length] = data[start : start + length]
        found.append(xxh3_64_intdigest(whole[place : place + length], seed))
    return found
