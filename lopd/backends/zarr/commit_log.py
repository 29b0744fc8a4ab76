"""The numbered log that lists which segments exist, and checkpoints of what it adds up to.

    commits/0000000000.json        one record a commit, put in place only if the number is free
    checkpoints/0000000016.json    the state after 16 commits, so that opening reads one file and the records behind it
    head/0000000000                an empty file with the number of the last commit, so that a log that lost its end is noticed

A record is put last, after everything it names is durable.  So two writers never overwrite one another, a reader never sees half a
commit, and the number gives all readers one order of rows.  Each record has its number, its store, and the checksum of the one before it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, final

from attrs import frozen

from lopd.backends.files import Files, problem, reading
from lopd.backends.root import Root, read_root
from lopd.backends.sealing import checksum, seal, unsealed
from lopd.backends.zarr.format import ROOT
from lopd.backends.zarr.record import Checkpoint, read_record
from lopd.errors import CorruptStoreError, InvalidRecordError, LopdError, StoreNotFoundError
from lopd.records.stored import read_as

COMMITS, CHECKPOINTS, _HEAD = "commits", "checkpoints", "head"
COMMITS_PER_CHECKPOINT = 16
# A reader that was pickled some time ago finds one of these; without one it reads the log from its beginning.
_CHECKPOINTS_KEPT = 32
_NUMBERED = re.compile(r"(\d{10})\.json")


@frozen
class Entry:
    """One record of the log.

    Args:
        body: its content, typed (`lopd.backends.zarr.record`).
        checksum: hash of its bytes, by which the next record names it.
    """

    body: Mapping[str, Any]
    checksum: str


@final
class CommitLog:
    """The commit records of one store.

    Args:
        files, root: the store's.   owner: the store's name in messages.

    Raises:
        CorruptStoreError: by any read: a record is damaged, of another store or number, or one is missing.
        StoreReadError: by any read: the storage does not answer.
    """

    def __init__(self, files: Files, root: Root, owner: str) -> None:
        self._files = files
        self._root = root
        self._owner = owner

    def commit(self, number: int, record: Mapping[str, Any], previous: str) -> Entry | None:
        """Return the record, if it took this number; None if another writer did.  `previous` is the checksum of the one before it.

        Raises:
            InvalidRecordError: it could not be read again.
            CorruptStoreError: the record before it, or the root, is not there any more: the store was removed, or put back to an older state, under
                its writer.
        """
        body = {**record, "number": number, "store": self._root.creation, "previous": previous}
        data = seal(body)
        try:
            entry = self._typed(number, body, data)
        except CorruptStoreError as error:
            raise InvalidRecordError(f"{str(error).rpartition(';')[0]}; pass what can be read again.") from error
        self.check(number, previous)
        if not self._files.put_if_absent(_path(COMMITS, number), data):
            return None
        with suppress(OSError):  # the commit is made, and the next one marks it too
            self._files.mark(_HEAD, number)
        return entry

    def check(self, number: int, previous: str) -> None:
        """Refuse a store that was removed, or put back to an older state, before a record of this number; see `commit`."""
        # each time it would be one more request in a bucket; the first record has none before it
        if number % COMMITS_PER_CHECKPOINT == 0:
            self._check_root()
        if number and self.checksum(number - 1) != previous:
            raise self.put_back(number)

    def put_back(self, number: int) -> CorruptStoreError:
        """Return the error for a store whose record before this number is another one by now, or gone."""
        return self._missing(f"{_path(COMMITS, number - 1)} as it was when it was read")

    def _check_root(self) -> None:
        """Refuse a store that was removed, and maybe made again, since it was opened."""
        with suppress(StoreNotFoundError):
            if read_root(self._files, ROOT).creation == self._root.creation:
                return
        raise self.another()

    def another(self) -> CorruptStoreError:
        """Return the error for a store whose root is gone or another store's."""
        return CorruptStoreError(
            f"{self._owner}: its {ROOT.name} is gone or another store's; restore it from a backup, or open the store that is there."
        )

    def checksum(self, number: int) -> str:
        """Return the hash by which the next record names this one; "" where it is not there."""
        data = self._read(number)
        return "" if data is None else checksum(data)

    def next(self, number: int, previous: str) -> Entry | None:
        """Return the record with this number, or None if it is not there yet."""
        data = self._read(number)
        return None if data is None else self._entry(number, data, previous)

    def _read(self, number: int) -> bytes | None:
        with reading(self._owner, "reading its commit log"):
            try:
                return self._files.read(_path(COMMITS, number))
            except FileNotFoundError:
                return None

    def records(self, start: int, previous: str, stop: int | None = None) -> Iterator[Entry]:
        """Yield all records from this number on, without a gap.  `previous` is the checksum of the one before them."""
        with reading(self._owner, "reading its commit log"):
            paths = [_path(COMMITS, number) for number in range(start, self._end(start) if stop is None else stop)]
            try:
                found = self._files.run([partial(self._files.read, path) for path in paths])
            except FileNotFoundError as error:
                raise self._missing(f"{len(paths)} from {paths[0]} on ({error})") from error
        for number, data in enumerate(found, start):
            entry = self._entry(number, data, previous)
            previous = entry.checksum
            yield entry
        number = start + len(found)
        while stop is None and (later := self.next(number, previous)) is not None:
            number, previous = number + 1, later.checksum
            yield later

    def before(self, number: int, last: str) -> Iterator[Entry]:
        """Yield all records before this number, the last of which has this checksum."""
        found = ""
        for entry in self.records(0, found, number):
            found = entry.checksum
            yield entry
        if found != last:
            raise self.put_back(number)

    def _end(self, start: int) -> int:
        """Return one more than the last number: as the head has it, if that is near, else as a listing does."""
        head = self._head()
        return head + 1 if head is not None and head - start < 8 * COMMITS_PER_CHECKPOINT else self._listed_end(start, head)

    def _listed_end(self, start: int, head: int | None) -> int:
        numbers = {number for number in _numbers(self._files.names(COMMITS)) if number >= start}
        last = max([*numbers, start - 1 if head is None else head])
        # a listing may lack what was put while it was made, and have what was put after that
        if not all(number in numbers or self._read(number) is not None for number in range(start, last + 1)):
            raise self._missing(f"all from {_path(COMMITS, start)} to {_path(COMMITS, last)}")
        return last + 1

    def _head(self) -> int | None:
        return max((int(name) for name in self._files.names(_HEAD) if re.fullmatch(r"\d{10}", name)), default=None)

    def _missing(self, expected: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self._owner}: a commit record is missing, expected {expected}; restore it from a backup, or copy the store again, if it was copied "
            "while somebody wrote."
        )

    def checkpoint(self, until: int | None) -> Checkpoint | None:
        """Return the latest checkpoint that is not after commit `until`, or None."""
        with reading(self._owner, "reading its commit log"):
            return next(filter(None, map(self._checkpoint, self._checkpoints(until))), None)

    def _checkpoints(self, until: int | None) -> list[int]:
        """Return numbers of checkpoints that are not after this commit, the latest first."""
        return [number for number in reversed(_numbers(self._files.names(CHECKPOINTS))) if until is None or number <= until]

    def _checkpoint(self, number: int) -> Checkpoint | None:
        path = _path(CHECKPOINTS, number)
        try:
            state = unsealed(self._owner, path, self._files.read(path))
        except FileNotFoundError:  # another process has removed it since
            return None
        self._check(path, state, {"commits": number, "store": self._root.creation})
        return read_as(Checkpoint, state, f"{self._owner}: {path}")

    def put_checkpoint(self, number: int, state: Mapping[str, Any]) -> None:
        """Keep the state after `number` commits, which another process may have done already, and remove those long before it."""
        self._files.put_if_absent(_path(CHECKPOINTS, number), seal({**state, "store": self._root.creation}))
        self._files.remove([_path(CHECKPOINTS, old) for old in _numbers(self._files.names(CHECKPOINTS))[:-_CHECKPOINTS_KEPT]])

    def verify(self, commits: int, last: str) -> Iterator[str]:
        """Yield one sentence for each problem found in the first `commits` records, the checkpoints of them, the head, and the root."""
        try:
            with reading(self._owner, "reading its commit log"):
                head = self._head()
                for _ in self.before(commits, last):
                    pass
                for number in self._checkpoints(commits):
                    try:
                        self._checkpoint(number)
                    except CorruptStoreError as error:
                        yield str(error)
                # the writer of the very first may have been killed before it could write it
                if head is None and commits > 1 and self._root.chained:
                    yield f"{self._owner}: {_HEAD}/ names no last commit, expected {commits - 1}; restore it from a backup."
                self._listed_end(0, head)
            self._check_root()
        except LopdError as error:
            yield problem(self._files, error)

    def _entry(self, number: int, data: bytes, previous: str) -> Entry:
        path = _path(COMMITS, number)
        body = unsealed(self._owner, path, data)
        self._check(path, body, {"number": number, "store": self._root.creation, "previous": previous})
        return self._typed(number, body, data)

    def _typed(self, number: int, body: Mapping[str, Any], data: bytes) -> Entry:
        return Entry(read_record(body, f"{self._owner}: commit {number}"), checksum(data))

    def _check(self, path: str, body: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Refuse what was written for another place, if it states its own."""
        if "store" not in body and not self._root.chained:
            return
        for name, value in wanted.items():
            if body.get(name) != value:
                raise CorruptStoreError(
                    f"{self._owner}: {path} has {name} {body.get(name)!r}, expected {value!r}: it is of another place or store; "
                    "restore it from a backup."
                )


def _path(folder: str, number: int) -> str:
    return f"{folder}/{number:010d}.json"


def _numbers(names: Sequence[str]) -> list[int]:
    return sorted(int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name)))
