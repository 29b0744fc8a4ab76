"""The catalog of a store on LanceDB, outside its tables: a log of small JSON files, each made by exactly one of those who try.

    lopd.json               the manifest; the store exists from here on
    log/<number>.json       what was done, one after the other; see `Kind`
    log.head/<number>       empty: the log has at least so many records
    <table>.head/<number>   empty: the table has at least so many rows

Each record has a checksum of itself and that of the record before it, the first one that of lopd.json: a record that is missing, or is
another store's, is noticed.  They are files and not rows because creating a LanceDB table is not atomic: two concurrent creators can both
be told that they succeeded.

An older store has folders of files without numbers instead.  They are read, and the first record that is added to it lists them.  Before that
a file is put beside them that an older lopd must read and cannot: it would not see the log, and remove tables that only the log names.
What an older lopd adds until then, an open store sees when the log begins, or at its own next record: looking each time would be six listings.
"""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, final
from uuid import uuid4

from lopd.backends.files import Files, reading, writing
from lopd.backends.lance.state import CatalogState, Kind, Record
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root, RootFile
from lopd.backends.sealing import checksum, seal, unseal, unsealed
from lopd.errors import CorruptStoreError, StoreWriteError
from lopd.records.manifest import STORE_VERSION, Manifest
from lopd.records.stored import parse, read_as

LOG, HEAD = "log", ".head"
# Seconds by which two clocks may differ.
_CLOCKS = 3600.0
_OLD_FOLDERS: dict[str, Kind] = {"columns": "table", "generations": "generation", "quarantine": "quarantine", "compactions": "compaction"}
_OLD_ROLLOUTS = "rollouts.json"
_OLD_NAME = re.compile(r"[^.].*\.json")  # and none that a Mac puts beside it
# An older lopd names it as damaged; no round has this name.
_UPDATE = "generations/update-lopd.json"
_UPDATE_TEXT = b"A newer lopd went on with this store, which an older one would damage: update lopd.\n"
_RECORD_NAME = re.compile(r"[0-9]{10}\.json")
_MARKED = re.compile(r"(rollouts|(scores|unscored)\..+)-[0-9a-f]{32}\.head")


def _encode_root(root: Root) -> bytes:
    manifest = {**root.manifest.to_json(), "schema_version": STORE_VERSION}
    return seal({"manifest": manifest, "log": {"logprob_dtype": root.logprob_dtype}, "by": uuid4().hex})


def _decode_root(url: str, data: bytes) -> Root | None:
    document, owner = parse(data), f"Store {url}: lopd.json"
    # Stores that an older lopd made have no log, or one that was begun later.
    dtype = document["log"]["logprob_dtype"] if "log" in document else document["logprob_dtype"]
    root = Root(Manifest.from_json(document["manifest"], owner), read_as(LogprobDtype, dtype, owner), chained="log" in document)
    return root if unseal(data) is not None else None


#: Sealed JSON.
ROOT = RootFile("lopd.json", _encode_root, _decode_root)


@final
class Catalog:
    """The catalog of one store, as it was at the last `refresh`.

    Args:
        files: the store's files.   state: what was seen so far.   chained: whether it was made with a log.
    """

    def __init__(self, files: Files, state: CatalogState, chained: bool) -> None:
        self._files = files
        self._chained = chained
        # whether an older lopd refuses the store, as far as this object knows
        self._refused = chained
        self._owner = f"Store {files.url}"
        self.state = state

    def refresh(self) -> None:
        """Take in what was added since; files never change.

        Raises:
            CorruptStoreError: one is damaged, missing, or another store's.
            StoreReadError: the storage refused.
        """
        state, expected = self.state, 0
        names, ahead = list[str](), dict[str, bytes | None]()
        if not state.last:
            # the head first: one that is read later may count a record for which the listing was too early
            names, least = self._names(""), self.least(LOG)
            records = [name for name in self._names(LOG) if _RECORD_NAME.fullmatch(name)]
            expected = max(least, 0, *(int(name[:10]) + 1 for name in records))
            paths = [f"{LOG}/{name}" for name in records]
            ahead = dict(zip(paths, self._files.run([partial(self._read, path) for path in paths]), strict=True))
            if not (self._chained or paths):
                self._read_old(names)
            state.last = checksum(self._read(ROOT.name) or b"")
        while (data := ahead.get(path := _path(state.number)) or self._read(path)) is not None:
            document = unsealed(self._owner, path, data)
            if (document.get("number"), document.get("previous")) != (state.number, state.last):
                raise self._broken(path, "does not follow the record before it", "one that does")
            if not (self._chained or state.number):
                # Until the log began, an older lopd may have added to it.
                self._read_old(self._names(""))
            state.add(document, f"{self._owner}: {path}")
            state.number, state.last = state.number + 1, checksum(data)
        if state.number < expected:
            raise self._broken(path, "is missing", f"{expected} records")
        # A table is marked after the record that names it.
        marked = {name.removesuffix(HEAD) for name in names if _MARKED.fullmatch(name)}
        for name in marked.difference(state.begun, (entry.table for entry in state.tables.values())):
            raise self._broken(path, "is missing", f"a record of table {name!r}, which has rows")

    def _read_old(self, names: Sequence[str]) -> None:
        paths = [_OLD_ROLLOUTS] if _OLD_ROLLOUTS in names else []
        paths += [
            f"{folder}/{name}" for folder in _OLD_FOLDERS if folder in names for name in self._names(folder) if _OLD_NAME.fullmatch(name)
        ]
        found = {path: self._read(path) or b"" for path in paths if path != _UPDATE and path not in self.state.old}
        documents = {path: unsealed(self._owner, path, data) for path, data in found.items()}
        for path, document in documents.items():
            folder, _, name = path.removesuffix(".json").rpartition("/")
            document["kind"] = _OLD_FOLDERS.get(folder, "table")
            if document["kind"] == "table":
                document["column"] = name if folder else None
            read_as(Record, document, f"{self._owner}: {path}")
        for path, document in sorted(documents.items(), key=lambda item: item[1]["when"]):
            self.state.add(document, f"{self._owner}: {path}", old=True)
        self.state.old |= {path: checksum(data) for path, data in found.items()}

    def _broken(self, path: str, what: str, wanted: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self._owner}: {path} {what}, expected {wanted}; restore the store from a backup.")

    def _names(self, folder: str) -> list[str]:
        with reading(self._owner, "reading its catalog"):
            return self._files.names(folder)

    def _read(self, path: str) -> bytes | None:
        with reading(self._owner, "reading its catalog"):
            try:
                return self._files.read(path)
            except FileNotFoundError:
                return None

    def top_k(self, column: str) -> int:
        """Return K of a column; 0 where it keeps none, or does not exist."""
        entry = self.state.tables.get(column)
        return 0 if entry is None or entry.provenance is None else entry.provenance.top_k

    def put(self, kind: Kind, document: Mapping[str, Any]) -> bool:
        """Return whether this call made the next record; `refresh` takes it in.

        Raises:
            CorruptStoreError: the record before it is not there any more: the store was removed, or put back to an older state, under its writer.
            StoreWriteError: the storage refused.
        """
        if not self._refused:
            with writing(self._owner, f"writing {_UPDATE}"):
                self._files.put_if_absent(_UPDATE, _UPDATE_TEXT)
            self._refused = True
        if not (self._chained or self.state.number):
            # What others have put until then is to be seen first.
            self._read_old(self._names(""))
            self._put("old", {"files": self.state.old})
            return False
        return self._put(kind, document)

    def _put(self, kind: Kind, document: Mapping[str, Any]) -> bool:
        path = _path(self.state.number)
        self.check()
        sealed = {"number": self.state.number, "previous": self.state.last, "kind": kind, "when": time.time(), **document}
        with writing(self._owner, f"writing {path}"):
            # The key makes the bytes of each call its own, which is how a repeated request knows its own file.
            made = self._files.put_if_absent(path, seal({**sealed, "by": uuid4().hex}))
        if made:
            self.mark(LOG, self.state.number + 1)
        return made

    def check(self) -> None:
        """Refuse a store whose last record is another one by now, or gone: it was removed, or put back to an older state, since it was read."""
        before = _path(self.state.number - 1) if self.state.number else ROOT.name
        if checksum(self._read(before) or b"") != self.state.last:
            raise self._broken(before, "is not what it was when it was read", "the file that the next record follows")

    def say(self, kind: Kind, document: Mapping[str, Any]) -> None:
        """Make a record, after those of others, and take in all of them."""
        while not self.put(kind, document):
            self.refresh()
        self.refresh()

    def mark(self, name: str, number: int) -> None:
        """Keep how many rows a table has, or how many records the log.

        Raises:
            StoreWriteError: the storage refused.
        """
        folder = f"{name}{HEAD}"
        with writing(self._owner, f"writing {folder}"):
            self._files.mark(folder, number)
        # A writer may be allowed to create and not to remove; the highest counts.
        with suppress(OSError):
            self._files.remove([f"{folder}/{old}" for old in self._files.names(folder) if old.isdecimal() and int(old) < number])

    def least(self, name: str) -> int:
        """Return how many rows a table has at least, or how many records the log.

        Raises:
            StoreReadError: the storage refused.
        """
        return max((int(number) for number in self._names(f"{name}{HEAD}") if number.isdecimal()), default=0)

    def check_clock(self) -> None:
        """Refuse a clock that is ahead: Lance removes files outside of versions that seem a week old, and a writer may be about to commit them.

        Raises:
            StoreWriteError: it and that of the storage differ.
        """
        self.mark(LOG, self.state.number)
        with reading(self._owner, "comparing clocks"):
            age = self._files.age(f"{LOG}{HEAD}")
        if abs(age) > _CLOCKS:
            raise StoreWriteError(
                f"{self._owner}: the clock of this machine and that of the storage differ by {age:.0f} s, expected less than {_CLOCKS:.0f} s, "
                "for files of writers at work would look old; so set the clock."
            )


def _path(number: int) -> str:
    return f"{LOG}/{number:010d}.json"
