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

import json
import re
import time
from collections.abc import Mapping
from typing import Any, Literal, final
from uuid import uuid4

from attrs import field, frozen, mutable
from xxhash import xxh3_64_intdigest

from lopd.backends.admission import check_column
from lopd.backends.files import Files, reading, writing
from lopd.backends.root import Root, RootFile
from lopd.backends.sealing import checksum, damaged, seal, unseal
from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance

LOG, HEAD = "log", ".head"
#: A table that will be made; the table of a column, or of the rollouts; what was sampled, not scored, merged; files of an older lopd.
Kind = Literal["begun", "table", "generation", "quarantine", "compaction", "old"]
_OLD_FOLDERS: dict[str, Kind] = {"columns": "table", "generations": "generation", "quarantine": "quarantine", "compactions": "compaction"}
_OLD_ROLLOUTS = "rollouts.json"
_TABLE_NAME, _RECORD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"), re.compile(r"[0-9]{10}\.json")


def _encode_root(root: Root) -> bytes:
    return seal({"manifest": root.manifest.to_json(), "log": {"logprob_dtype": root.logprob_dtype}, "by": uuid4().hex})


def _decode_root(_: str, data: bytes) -> Root | None:
    document = json.loads(data)
    # An older lopd, which would not see the log, finds no `logprob_dtype` where it looks for it, and refuses the store.
    root = Root(Manifest.from_json(document["manifest"]), document.get("log", document)["logprob_dtype"])
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

    table: str
    provenance: Provenance | None
    seed: int


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
        state, expected = self.state, 0
        if not state.last:
            expected = max(self.least(LOG), 0, *(int(name[:10]) + 1 for name in self._names(LOG) if _RECORD_NAME.fullmatch(name)))
            state.last = checksum(self._read(ROOT.name) or b"")
            self._read_old()
        while (data := self._read(path := _path(state.number))) is not None:
            document = self._unsealed(path, data)
            if (document.get("number"), document.get("previous")) != (state.number, state.last):
                raise self._broken(path, "does not follow the record before it", "one that does")
            self._take(path, document)
            state.number, state.last = state.number + 1, checksum(data)
        if state.number < expected:
            raise self._broken(path, "is missing", f"{expected} records")

    def _read_old(self) -> None:
        names = self._names("")
        paths = [_OLD_ROLLOUTS] if _OLD_ROLLOUTS in names else []
        paths += [
            f"{folder}/{name}" for folder in _OLD_FOLDERS if folder in names for name in self._names(folder) if name.endswith(".json")
        ]
        found = {path: self._read(path) or b"" for path in paths}
        documents = {path: self._unsealed(path, data) for path, data in found.items()}
        for path, document in sorted(documents.items(), key=lambda item: item[1].get("when", 0.0)):
            folder, _, name = path.removesuffix(".json").rpartition("/")
            column = {"column": name if folder else None} if folder in ("", "columns") else {}
            self._take(path, {**document, **column, "kind": _OLD_FOLDERS.get(folder, "table"), "seed": 0})
        self.state.old = {path: checksum(data) for path, data in found.items()}

    def _take(self, path: str, document: Mapping[str, Any]) -> None:
        try:
            self._add(document)
        except (KeyError, TypeError, AttributeError, InvalidRecordError) as error:
            raise damaged(self._owner, path) from error

    def _add(self, document: Mapping[str, Any]) -> None:
        state, kind, column = self.state, document["kind"], document.get("column")
        if column is not None:
            check_column(self._owner, column)
        if kind == "old" and document["files"] != state.old:
            path = min(set(document["files"].items()) ^ set(state.old.items()))[0]
            raise self._broken(path, "is not the file that was there when the log began", "that one")
        if kind == "begun":
            state.begun[_table_name(document)] = column
        elif kind == "table":
            name, provenance = _table_name(document), document["provenance"]
            seed = document.get("seed", table_seed(name))
            state.tables[column] = TableEntry(name, None if provenance is None else Provenance.from_json(provenance), seed)
        elif kind == "generation":
            state.generations[document["generation"]] = ModelId(**document["policy"])
        elif kind == "quarantine":
            state.quarantines.append(Quarantine(document["column"], {int(row): reason for row, reason in document["reasons"].items()}))
        if kind in ("generation", "quarantine", "compaction"):
            rows = len(document.get("reasons", ())) or document.get("rows", 0)
            state.events.append(Commit(0, kind, rows, document.get("tokens", 0), column, document["when"]))

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
        if document is None or not isinstance(document.get("when", 0.0), int | float):
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


def _table_name(document: Mapping[str, Any]) -> str:
    if not _TABLE_NAME.fullmatch(document["table"]):
        raise CorruptStoreError(
            f"Catalog: it names table {document['table']!r}, expected letters, digits, '_', '-' or '.', and no '.' in front; "
            "restore the store from a backup."
        )
    return str(document["table"])
