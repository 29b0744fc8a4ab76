"""The numbered log that says which segments exist, and checkpoints of what it adds up to.

    commits/0000000000.json        one record a commit, put in place only if the number is free
    checkpoints/0000000064.json    the state after 64 commits, so that opening reads one file and the records behind it

A record is put last, after everything it names is durable.  So two writers never overwrite one another, a reader never sees half a
commit, and the number gives all readers one order of rows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from lopd.backends.files import Files, reading
from lopd.backends.sealing import damaged, seal, unseal
from lopd.errors import CorruptStoreError

COMMITS, CHECKPOINTS = "commits", "checkpoints"
COMMITS_PER_CHECKPOINT = 64


@final
class CommitLog:
    """The commit records of one store.

    Args:
        files: of the store.   owner: how messages name it.

    Raises:
        CorruptStoreError: by any read: a record is damaged, or one is missing before others.
        StoreReadError: by any read: the storage does not answer.
    """

    def __init__(self, files: Files, owner: str) -> None:
        """Nothing is read yet."""
        self._files = files
        self._owner = owner

    def commit(self, number: int, record: Mapping[str, Any]) -> bool:
        """Whether this record took this number; False if somebody else did."""
        return self._files.put_if_absent(_path(COMMITS, number), seal(record))

    def settle(self) -> None:
        """Make records durable that other processes may have put and not flushed yet."""
        self._files.settle(COMMITS)

    def next(self, number: int) -> dict[str, Any] | None:
        """The record with this number, or None if it is not there yet."""
        with reading(self._owner, "reading its commit log"):
            try:
                data = self._files.read(_path(COMMITS, number))
            except FileNotFoundError:
                return None
        return self._unsealed(_path(COMMITS, number), data)

    def records(self, start: int, stop: int | None = None) -> list[dict[str, Any]]:
        """All records from this number on, without a gap."""
        with reading(self._owner, "reading its commit log"):
            last = max(_numbers(self._files.names(COMMITS)), default=-1)
            paths = [_path(COMMITS, number) for number in range(start, last + 1 if stop is None else stop)]
            try:
                found = self._files.run([partial(self._files.read, path) for path in paths])
            except FileNotFoundError as error:
                raise CorruptStoreError(
                    f"{self._owner}: a commit record is missing, expected {len(paths)} from {paths[0]} on ({error}); restore it from a backup."
                ) from error
        return [self._unsealed(path, data) for path, data in zip(paths, found, strict=True)]

    def checkpoint(self, until: int | None) -> dict[str, Any] | None:
        """The latest checkpoint that is not after commit `until`; None if there is none."""
        with reading(self._owner, "reading its commit log"):
            numbers = [number for number in _numbers(self._files.names(CHECKPOINTS)) if until is None or number <= until]
            if not numbers:
                return None
            path = _path(CHECKPOINTS, max(numbers))
            data = self._files.read(path)
        return self._unsealed(path, data)

    def put_checkpoint(self, number: int, state: Mapping[str, Any]) -> None:
        """Keep the state after `number` commits; another process may have done it already."""
        self._files.put_if_absent(_path(CHECKPOINTS, number), seal(state))

    def _unsealed(self, path: str, data: bytes) -> dict[str, Any]:
        record = unseal(data)
        if record is None:
            raise damaged(self._owner, path)
        return record


def _path(folder: str, number: int) -> str:
    return f"{folder}/{number:010d}.json"


def _numbers(names: Sequence[str]) -> list[int]:
    return [int(stem) for name in names if (stem := name.removesuffix(".json")) != name and stem.isdigit()]
