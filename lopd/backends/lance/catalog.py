"""What a store on LanceDB says outside its tables: a log of small JSON files, each made by exactly one of those who try.

    lopd.json               the manifest; the store exists from here on
    log/<number>.json       what was done, one after the other; see `Kind`
    log.head/<number>       empty: the log has at least so many records
    <table>.head/<number>   empty: the table has at least so many rows

Each record has a checksum of itself and that of the record before it, the first one that of lopd.json: a record that is missing, or is
another store's, is noticed.  They are files and not rows because creating a LanceDB table is not atomic: two concurrent creators can both
be told that they succeeded.

An older store has folders of files without numbers instead.  They are read, and the first record that is added to it lists them.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, final
from uuid import uuid4

from attrs import field, frozen, mutable
from xxhash import xxh3_64_intdigest

from lopd.backends.admission import ColumnName
from lopd.backends.files import Files, reading, writing
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root, RootFile
from lopd.backends.sealing import checksum, damaged, seal, unseal
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.stored import Count, Seconds, parse, read_as

LOG, HEAD = "log", ".head"
#: A table that will be made; the table of a column, or of the rollouts; what was sampled, not scored, merged; files of an older lopd.
Kind = Literal["begun", "table", "generation", "quarantine", "compaction", "old"]
_OLD_FOLDERS: dict[str, Kind] = {"columns": "table", "generations": "generation", "quarantine": "quarantine", "compactions": "compaction"}
_OLD_ROLLOUTS = "rollouts.json"
_RECORD_NAME = re.compile(r"[0-9]{10}\.json")
_MARKED = re.compile(r"(rollouts|(scores|unscored)\..+)-[0-9a-f]{32}\.head")
# A table is a folder of the database.
_TableName = Annotated[str, re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")]


def _encode_root(root: Root) -> bytes:
    return seal({"manifest": root.manifest.to_json(), "log": {"logprob_dtype": root.logprob_dtype}, "by": uuid4().hex})


def _decode_root(url: str, data: bytes) -> Root | None:
    document, owner = parse(data), f"Store {url}: lopd.json"
    # An older lopd, which would not see the log, finds no `logprob_dtype` where it looks for it, and refuses the store.
    dtype = document["log"]["logprob_dtype"] if "log" in document else document["logprob_dtype"]
    root = Root(Manifest.from_json(document["manifest"], owner), read_as(LogprobDtype, dtype, owner))
    return root if unseal(data) is not None else None


#: Sealed JSON.
ROOT = RootFile("lopd.json", _encode_root, _decode_root)


@frozen
class TableEntry:
    """Which table holds the rollouts, or a column.

    Args:
        table: its name in the database.
        provenance: who computed the scores; None for the rollouts.
        seed: where the checksums of its lines begin, so that lines of another table are noticed; 0 in tables of an older lopd.
    """

    table: _TableName
    provenance: Provenance | None
    seed: int


class _Record(TypedDict):
    """What each record says."""

    kind: Kind
    when: Seconds


class _Begun(_Record):
    table: _TableName
    column: ColumnName | None


class _Table(_Begun):
    provenance: Provenance | None


class _Generation(_Record):
    generation: Count
    policy: ModelId


class _Quarantine(_Record):
    column: ColumnName
    reasons: Mapping[Count, str]


class _Compaction(_Record):
    column: ColumnName | None
    rows: Count
    tokens: Count


class _Old(_Record):
    files: Mapping[str, str]


@frozen
class Quarantine:
    """Rows that could not be scored.

    Args:
        column: column that lacks their scores.
        reasons: by row.
    """

    column: str
    reasons: Mapping[int, str]


@mutable
class CatalogState:
    """What was there at one moment; only `Catalog` adds to it.

    Args:
        tables: table of each column; that of the rollouts has the key None, and is there from the first append on.
        begun: names of all tables that somebody began to make, with their columns.
        generations: policies, by round.
        quarantines: of all columns, oldest first.
        events: generations, compactions and quarantines, for the history.
        number: number of records.
        last: checksum of the last record; of lopd.json before there is one; "" before anything was read.
        old: files of an older lopd, with their checksums.
    """

    tables: dict[str | None, TableEntry] = field(factory=dict)
    begun: dict[str, str | None] = field(factory=dict)
    generations: dict[int, ModelId] = field(factory=dict)
    quarantines: list[Quarantine] = field(factory=list)
    events: list[Commit] = field(factory=list)
    number: int = 0
    last: str = ""
    old: dict[str, str] = field(factory=dict)


@final
class Catalog:
    """The catalog of one store, as it was at the last `refresh`.

    Args:
        files: of the store.   state: what was seen so far.
    """

    def __init__(self, files: Files, state: CatalogState) -> None:
        """Reads nothing."""
        self._files = files
        self._owner = f"Store {files.url}"
        self.state = state

    def refresh(self) -> None:
        """Take in what was added since; files never change.

        Raises:
            CorruptStoreError: one is damaged, missing, or another store's.
            StoreReadError: the storage refused.
        """
        state, expected, first = self.state, 0, not self.state.last
        if first:
            names = self._names("")
            expected = max(self.least(LOG), 0, *(int(name[:10]) + 1 for name in self._names(LOG) if _RECORD_NAME.fullmatch(name)))
            state.last = checksum(self._read(ROOT.name) or b"")
            self._read_old(names)
        while (data := self._read(path := _path(state.number))) is not None:
            document = self._unsealed(path, data)
            if (document.get("number"), document.get("previous")) != (state.number, state.last):
                raise self._broken(path, "does not follow the record before it", "one that does")
            self._add(document, f"{self._owner}: {path}")
            state.number, state.last = state.number + 1, checksum(data)
        if state.number < expected:
            raise self._broken(path, "is missing", f"{expected} records")
        # A table is marked after the record that names it.
        marked = {name.removesuffix(HEAD) for name in names if _MARKED.fullmatch(name)} if first else set[str]()
        for name in marked.difference(state.begun, (entry.table for entry in state.tables.values())):
            raise self._broken(path, "is missing", f"a record of table {name!r}, which has rows")

    def _read_old(self, names: Sequence[str]) -> None:
        paths = [_OLD_ROLLOUTS] if _OLD_ROLLOUTS in names else []
        paths += [
            f"{folder}/{name}" for folder in _OLD_FOLDERS if folder in names for name in self._names(folder) if name.endswith(".json")
        ]
        found = {path: self._read(path) or b"" for path in paths}
        documents = {path: self._unsealed(path, data) for path, data in found.items()}
        for path, document in documents.items():
            folder, _, name = path.removesuffix(".json").rpartition("/")
            document["kind"] = _OLD_FOLDERS.get(folder, "table")
            if document["kind"] == "table":
                document["column"] = name if folder else None
            read_as(_Record, document, f"{self._owner}: {path}")
        for path, document in sorted(documents.items(), key=lambda item: item[1]["when"]):
            self._add(document, f"{self._owner}: {path}", old=True)
        self.state.old = {path: checksum(data) for path, data in found.items()}

    def _add(self, document: dict[str, Any], owner: str, *, old: bool = False) -> None:
        state, kind = self.state, read_as(_Record, document, owner)["kind"]
        rows, tokens, column = 0, 0, document.get("column")
        if kind == "begun":
            begun = read_as(_Begun, document, owner)
            state.begun[begun["table"]] = begun["column"]
        elif kind == "table":
            table = read_as(_Table, document, owner)
            state.tables[table["column"]] = TableEntry(table["table"], table["provenance"], 0 if old else table_seed(table["table"]))
        elif kind == "generation":
            generation = read_as(_Generation, document, owner)
            state.generations[generation["generation"]] = generation["policy"]
        elif kind == "quarantine":
            quarantine = read_as(_Quarantine, document, owner)
            rows = len(quarantine["reasons"])
            state.quarantines.append(Quarantine(quarantine["column"], quarantine["reasons"]))
        elif kind == "compaction":
            merged = read_as(_Compaction, document, owner)
            rows, tokens = merged["rows"], merged["tokens"]
        elif differing := sorted(read_as(_Old, document, owner)["files"].items() ^ state.old.items()):
            raise self._broken(differing[0][0], "is not the file that was there when the log began", "that one")
        if kind in ("generation", "quarantine", "compaction"):
            state.events.append(Commit(0, kind, rows, tokens, column, document["when"]))

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

    def _unsealed(self, path: str, data: bytes | None) -> dict[str, Any]:
        document = None if data is None else unseal(data)
        if document is None:
            raise damaged(self._owner, path)
        return document

    def top_k(self, column: str) -> int:
        """K of a column; 0 where it has none, or is none."""
        entry = self.state.tables.get(column)
        return 0 if entry is None or entry.provenance is None else entry.provenance.top_k

    def reasons(self, column: str) -> dict[int, str]:
        """Why the column's model could not score rows, scored since or not; of several reasons the latest."""
        found = (quarantine.reasons for quarantine in self.state.quarantines if quarantine.column == column)
        return {row: reason for reasons in found for row, reason in reasons.items()}

    def put(self, kind: Kind, document: Mapping[str, Any]) -> bool:
        """Whether this call made the next record; `refresh` takes it in.

        Raises:
            StoreWriteError: the storage refused.
        """
        if self.state.old and not self.state.number:
            # What others have put meanwhile is to be seen first.
            self._put("old", {"files": self.state.old})
            return False
        return self._put(kind, document)

    def _put(self, kind: Kind, document: Mapping[str, Any]) -> bool:
        path = _path(self.state.number)
        sealed = {"number": self.state.number, "previous": self.state.last, "kind": kind, "when": time.time(), **document}
        with writing(self._owner, f"writing {path}"):
            # The key makes the bytes of each call its own, which is how a repeated request knows its own file.
            made = self._files.put_if_absent(path, seal({**sealed, "by": uuid4().hex}))
        if made:
            self.mark(LOG, self.state.number + 1)
        return made

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
            self._files.remove([f"{folder}/{old}" for old in self._files.names(folder) if old.isdecimal() and int(old) < number])

    def least(self, name: str) -> int:
        """How many rows a table has at least, or how many records the log.

        Raises:
            StoreReadError: the storage refused.
        """
        return max((int(number) for number in self._names(f"{name}{HEAD}") if number.isdecimal()), default=0)


def table_seed(table: str) -> int:
    """Where the checksums of a table's lines begin."""
    return xxh3_64_intdigest(table.encode())


def _path(number: int) -> str:
    return f"{LOG}/{number:010d}.json"
