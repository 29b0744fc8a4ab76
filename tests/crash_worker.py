"""Writers that are there to be killed, in processes of their own, and a reader that checks what a kill must not do.

    python tests/crash_worker.py zarr runs/x.zarr     appends, scores and compacts until it is killed, and prints each call after it returned

Everything it writes can be made again from its number, so it need not be remembered.  Each call writes one batch, whose size follows
from its number: a store that holds something between two batches holds part of a call.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, final

import numpy as np
from attrs import evolve, field, frozen
from forked import FORKS

from lopd.errors import StoreNotFoundError
from lopd.protocols import DurableStore
from lopd.records import Provenance, Rollout, Scores
from lopd.testing import assert_same_rollout, assert_same_top_k, tiny_manifest, tiny_provenance, tiny_rollout, tiny_top_k

TOP_K = 2
#: "rollouts" is a call of `append`, the others are columns.
KINDS = ("rollouts", "teacher", "ref")
_BACKENDS = {"zarr": ("lopd.backends.zarr.store", "ZarrStore"), "lance": ("lopd.backends.lance.store", "LanceStore")}
_COMPACT_EVERY = 5
_PATIENCE = 120.0

Call = tuple[str, int]
Acknowledge = Callable[[Call], object]


@final
@frozen
class Place:
    """Where a store is, for any process.

    Args:
        backend: "zarr" or "lance".
        url: path or URL.
        storage_options: options of the storage.
    """

    backend: str
    url: str
    storage_options: Mapping[str, Any] = field(factory=dict)

    def _class(self) -> Any:
        module, name = _BACKENDS[self.backend]
        return getattr(import_module(module), name)

    def open(self) -> Any:
        """Open the store."""
        return self._class().open(self.url, storage_options=dict(self.storage_options) or None)

    def open_or_create(self) -> Any:
        """Open the store, or make an empty one."""
        return self._class().open_or_create(self.url, tiny_manifest(), storage_options=dict(self.storage_options) or None)

    def through(self, storage_options: Mapping[str, Any]) -> "Place":
        """Return the same store, reached with other options."""
        return evolve(self, storage_options=storage_options)


def provenance_of(column: str) -> Provenance:
    """Return the provenance of a column."""
    return tiny_provenance(column, top_k=TOP_K if column == "teacher" else 0)


@lru_cache(maxsize=4096)
def rollout(i: int) -> Rollout:
    """Make the i-th row: of any length, some with a mask, some with behavior log-probs."""
    length = 1 + i * 37 % 300
    fields: dict[str, Any] = {"prompt_ids": (np.arange(1 + i % 5) + i) % 300}
    if i % 3 == 0:
        fields["behavior_logprobs"] = -np.arange(length, dtype=np.float32) / 8
    if i % 4 == 0:
        fields["loss_mask"] = np.arange(length) % 2 == 0
    return tiny_rollout(f"r{i}", (np.arange(length) * 7 + i) % 300, **fields)


@lru_cache(maxsize=4096)
def scores(column: str, i: int) -> Scores:
    """Return the scores of the i-th row in a column."""
    length = rollout(i).response_ids.size
    top_k = tiny_top_k(length, TOP_K, i % 90) if column == "teacher" else None
    return Scores.of(rollout(i), -(np.arange(length, dtype=np.float32) + i % 11) / 16 - len(column), i % 3, top_k)


def begin(batch: int) -> int:
    """Return the first row of a batch; batches have 1 to 7 rows."""
    return sum(1 + k * 5 % 7 for k in range(batch))


def batch_that_begins_at(row: int) -> int:
    """Return the number of this batch; an AssertionError if no batch begins there, so that part of a call is in the store."""
    batch = next(k for k in range(row + 1) if begin(k) >= row)
    assert begin(batch) == row, f"the store ends at row {row}, inside a batch"
    return batch


def _rows(batch: int) -> range:
    return range(begin(batch), begin(batch + 1))


def _write(store: DurableStore, call: Call) -> Call:
    kind, batch = call
    if kind == "rollouts":
        store.append([rollout(i) for i in _rows(batch)])
    elif kind == "compact":
        # LanceDB keeps versions for a week unless it is told otherwise; whoever removes them may be killed as well.
        store.compact(**({"older_than": 0.0} if type(store).__name__ == "LanceStore" else {}))
    else:
        store.append_scores(kind, provenance_of(kind), [scores(kind, i) for i in _rows(batch)])
    return call


def calls(store: DurableStore) -> Iterator[Call]:
    """Yield what is left to do in this store, without an end."""
    done = batch_that_begins_at(len(store))
    if done:
        # The last call may have been cut off before it was acknowledged; to repeat it must change nothing.
        yield "rollouts", done - 1
    for column in KINDS[1:]:
        scored = store.scored(column)
        yield from ((column, k) for k in range(done) if not scored[begin(k)])
    batch = done
    while True:
        yield from ((kind, batch) for kind in KINDS)
        batch += 1
        if batch % _COMPACT_EVERY == 0:
            yield "compact", batch


def write(place: Place, acknowledge: Acknowledge, stop_at: int | None = None) -> None:
    """Resume, and write until killed, or until the store holds `stop_at` batches with all their scores."""
    store = place.open_or_create()
    acknowledge(("open", 0))
    for call in calls(store):
        if stop_at is not None and call == ("rollouts", stop_at):
            return
        acknowledge(_write(store, call))


def write_to(place: Place, pipe: Connection, stop_at: int | None = None) -> None:
    """Call `write` in a process of its own."""
    write(place, pipe.send, stop_at)


def die_at(place: Place, pipe: Connection, operation: int, stop_at: int) -> None:
    """Call `write` on a local folder, and be killed right before the n-th thing it does to a file of the store."""
    left = operation

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _FILE_EVENTS and any(isinstance(arg, (str, bytes, os.PathLike)) and place.url in os.fsdecode(arg) for arg in args):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    write(place, pipe.send, stop_at)


_FILE_EVENTS = {"open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def take_part(place: Place, pipe: Connection, writer: int, rounds: int) -> None:
    """Write as one of several writers: rows and scores of its own, a row that all of them write, and now and then a compaction."""
    store = place.open()
    for i in range(rounds):
        mine = [rollout(1000 * (writer + 1) + 2 * i + j) for j in range(2)]
        shared = rollout(i)
        store.append([mine[0], shared, mine[1]])
        store.append_scores("ref", provenance_of("ref"), [scores("ref", number(item)) for item in (*mine, shared)])
        if writer == 0 and i % 2:
            store.compact()
    pipe.send(len(store))


def number(item: Rollout) -> int:
    """Return the number of a rollout, the inverse of `rollout`."""
    return int(item.rollout_id.removeprefix("r"))


def check_rows(store: Any, numbers: Sequence[int] | None = None) -> None:
    """Check that every visible row has the content of its number, in all columns that report it as scored.

    Args:
        store: any.
        numbers: the rows that must be there, in this order; whatever is there if None.
    """
    covered = {column: store.scored(column) for column in KINDS[1:]}
    for name, mask in covered.items():
        assert mask.shape == (len(store),), name
        assert not mask.any() or store.columns[name] == provenance_of(name)
    for columns in ((), ("teacher",), ("ref",), ("teacher", "ref")):
        # Each row once, with all columns that it has.
        rows = [i for i in range(len(store)) if all(covered[name][i] == (name in columns) for name in covered)]
        read = store.read(rows, columns, top_k=[name for name in columns if name == "teacher"]) if rows else []
        for i, row in zip(rows, read, strict=True):
            found = number(row.rollout)
            assert numbers is None or found == numbers[i]
            assert_same_rollout(row.rollout, rollout(found))
            for name in columns:
                np.testing.assert_array_equal(row.scores[name], scores(name, found).logprobs)
            if "teacher" in columns:
                assert_same_top_k(row.top_k["teacher"], scores("teacher", found).top_k)
    if numbers is not None:
        assert len(store) == len(numbers)
        assert store.find([f"r{n}" for n in numbers]).tolist() == list(range(len(numbers)))


def check(place: Place, acknowledged: Sequence[Call]) -> int:
    """Open the store as a reader: all that was acknowledged is there, calls are there whole or not at all, every row verifies.

    Returns:
        The number of batches in the store.
    """
    try:
        store = place.open()
    except StoreNotFoundError:
        assert not acknowledged
        return 0
    batches = batch_that_begins_at(len(store))
    assert batches > max((batch for kind, batch in acknowledged if kind == "rollouts"), default=-1)
    for column in KINDS[1:]:
        per_batch = [set(store.scored(column)[begin(k) : begin(k + 1)].tolist()) for k in range(batches)]
        assert all(len(states) == 1 for states in per_batch), f"part of a call is in column {column}"
        missing = [batch for kind, batch in acknowledged if kind == column and per_batch[batch] != {True}]
        assert not missing, f"column {column} lost batches {missing}"
    check_rows(store, range(len(store)))
    assert list(store.verify()) == []
    return batches


@final
class Worker:
    """A process that runs one of the functions above on a place and a pipe."""

    def __init__(self, work: Callable[..., None], place: Place, *args: Any) -> None:
        """Start the process, from a server that has everything loaded and has never touched a store."""
        self._pipe, theirs = FORKS.Pipe(duplex=False)
        self.process: BaseProcess = FORKS.Process(target=work, args=(place, theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.acknowledged: list[Call] = []

    def wait_for(self, n: int) -> None:
        """Wait until it has acknowledged so many calls, or has ended."""
        while len(self.acknowledged) < n and self._take():
            pass

    def _take(self) -> bool:
        if not self._pipe.poll(_PATIENCE):
            self.process.kill()
            raise TimeoutError(f"Worker {self.process.name}: no call returned for {_PATIENCE:.0f} s")
        # A process that dies while it sends leaves half a message.
        with suppress(EOFError, OSError):
            self.acknowledged.append(self._pipe.recv())
            return True
        return False

    def join(self) -> list[Call]:
        """Wait for its end; return what it acknowledged in all its life."""
        while self._take():
            pass
        self.process.join()
        self._pipe.close()
        return self.acknowledged

    def kill(self) -> list[Call]:
        """Send SIGKILL; return what it acknowledged.  A worker that failed by itself is an error."""
        self.process.kill()
        acknowledged = self.join()
        assert self.process.exitcode == -signal.SIGKILL, f"the worker ended by itself with exit code {self.process.exitcode}"
        return acknowledged


def main() -> None:
    """Write until killed, and print each call when it has returned."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("backend", choices=sorted(_BACKENDS))
    parser.add_argument("url")
    parser.add_argument("--storage-options", type=json.loads, default={})
    options = parser.parse_args()
    write(Place(options.backend, options.url, options.storage_options), lambda call: print(*call, flush=True))


if __name__ == "__main__":
    main()
