"""What a store on LanceDB says outside its tables: small JSON files, each made by exactly one of those who try, each with a checksum.

    lopd.json                      the manifest; the store exists from here on
    rollouts.json                  the name of the table that holds the rollouts
    columns/<column>.json          the name of the table of a score column, and who computed it
    generations/<number>.json      who sampled in a round
    compactions/<key>.json         what was merged, for the history
    quarantine/<key>.json          rows that a column's model could not score, and why

They are files and not rows because creating a LanceDB table is not atomic: two concurrent creators can both be told that they succeeded.
"""

import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, final
from uuid import uuid4

from attrs import field, frozen

from lopd.backends.admission import ColumnName
from lopd.backends.files import Files, reading, writing
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root, RootFile
from lopd.backends.sealing import damaged, seal, unseal
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.stored import Count, Seconds, parse, read_as

ROLLOUTS_FILE = "rollouts.json"
COLUMNS, GENERATIONS, COMPACTIONS, QUARANTINE = "columns", "generations", "compactions", "quarantine"
_EVENTS: dict[str, Literal["generation", "compaction", "quarantine"]] = {
    GENERATIONS: "generation",
    COMPACTIONS: "compaction",
    QUARANTINE: "quarantine",
}
# A table is a folder of the database.
_TableName = Annotated[str, re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")]


def _encode_root(root: Root) -> bytes:
    return seal({"manifest": root.manifest.to_json(), "logprob_dtype": root.logprob_dtype, "by": uuid4().hex})


def _decode_root(url: str, data: bytes) -> Root | None:
    document, owner = parse(data), f"Store {url}: lopd.json"
    root = Root(Manifest.from_json(document["manifest"], owner), read_as(LogprobDtype, document["logprob_dtype"], owner))
    return root if unseal(data) is not None else None


#: Sealed JSON.
ROOT = RootFile("lopd.json", _encode_root, _decode_root)


@frozen
class TableEntry:
    """Which table holds the rollouts, or a column.

    Args:
        table: its name in the database.
        provenance: who computed the scores; None for the rollouts.
    """

    table: _TableName
    provenance: Provenance | None


class _Table(TypedDict):
    """What a file of a table says."""

    table: _TableName
    provenance: Provenance | None
    when: Seconds


class _Generation(TypedDict):
    generation: Count
    policy: ModelId
    when: Seconds


class _Quarantine(TypedDict):
    column: ColumnName
    reasons: Mapping[Count, str]
    when: Seconds


class _Compaction(TypedDict):
    column: ColumnName | None
    rows: Count
    tokens: Count
    when: Seconds


@frozen
class Quarantine:
    """Rows that could not be scored.

    Args:
        column: column that lacks their scores.
        reasons: by row.
        when: seconds since 1970.
    """

    column: str
    reasons: Mapping[int, str]
    when: float


@frozen
class CatalogState:
    """What was there at one moment; only `Catalog` adds to it.

    Args:
        tables: table of each column; that of the rollouts has the key None, and is there from the first append on.
        generations: policies, by round.
        quarantines: of all columns, in no order.
        events: generations, compactions and quarantines, for the history.
        seen: files that are in all this.
    """

    tables: dict[str | None, TableEntry] = field(factory=dict)
    generations: dict[int, ModelId] = field(factory=dict)
    quarantines: list[Quarantine] = field(factory=list)
    events: list[Commit] = field(factory=list)
    seen: set[str] = field(factory=set)


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
            CorruptStoreError: one is damaged.
            StoreReadError: the storage refused.
        """
        with reading(self._owner, "reading its catalog"):
            listed = {folder: self._files.names(folder) for folder in (COLUMNS, *_EVENTS, "")}
        found = [f"{folder}/{name}" for folder, names in listed.items() if folder for name in names if name.endswith(".json")]
        found += [ROLLOUTS_FILE] if ROLLOUTS_FILE in listed[""] else []
        for path in sorted(set(found) - self.state.seen):
            self._add(path, self.document(path))

    def _add(self, path: str, document: Mapping[str, Any]) -> None:
        state, (folder, _, name), owner = self.state, path.removesuffix(".json").rpartition("/"), f"{self._owner}: {path}"
        rows, tokens, column = 0, 0, None
        if folder in ("", COLUMNS):
            table = read_as(_Table, document, owner)
            state.tables[read_as(ColumnName, name, owner) if folder else None] = TableEntry(table["table"], table["provenance"])
        elif folder == GENERATIONS:
            generation = read_as(_Generation, document, owner)
            state.generations[generation["generation"]] = generation["policy"]
        elif folder == QUARANTINE:
            quarantine = read_as(_Quarantine, document, owner)
            rows, column = len(quarantine["reasons"]), quarantine["column"]
            state.quarantines.append(Quarantine(**quarantine))
        else:
            merged = read_as(_Compaction, document, owner)
            rows, tokens, column = merged["rows"], merged["tokens"], merged["column"]
        if folder in _EVENTS:
            state.events.append(Commit(0, _EVENTS[folder], rows, tokens, column, document["when"]))
        state.seen.add(path)

    def document(self, path: str) -> dict[str, Any]:
        """What one file says.

        Raises:
            CorruptStoreError: it is damaged.
            StoreReadError: the storage refused.
        """
        with reading(self._owner, "reading its catalog"):
            document = unseal(self._files.read(path))
        if document is None:
            raise damaged(self._owner, path)
        return document

    def top_k(self, column: str) -> int:
        """K of a column; 0 where it has none, or is none."""
        entry = self.state.tables.get(column)
        return 0 if entry is None or entry.provenance is None else entry.provenance.top_k

    def reasons(self, column: str) -> dict[int, str]:
        """Why the column's model could not score rows, scored since or not; of several reasons the latest."""
        ordered = sorted(self.state.quarantines, key=lambda quarantine: quarantine.when)
        return {row: reason for quarantine in ordered if quarantine.column == column for row, reason in quarantine.reasons.items()}

    def later(self) -> float:
        """Now, or just after the latest quarantine that is known, should the clock of its writer be ahead."""
        return max([time.time(), *(quarantine.when + 1e-3 for quarantine in self.state.quarantines)])

    def put(self, path: str, document: Mapping[str, Any]) -> bool:
        """Whether this call made the file.

        Raises:
            StoreWriteError: the storage refused.
        """
        with writing(self._owner, f"writing {path}"):
            # The key makes the bytes of each call its own, which is how a repeated request knows its own file.
            return self._files.put_if_absent(path, seal({"when": time.time(), **document, "by": uuid4().hex}))


def table_path(column: str | None) -> str:
    """The file that says where a column is, or the rollouts."""
    return ROLLOUTS_FILE if column is None else f"{COLUMNS}/{column}.json"


def new_path(folder: str) -> str:
    """A file for one compaction or quarantine, named as no other."""
    return f"{folder}/{uuid4().hex}.json"


def generation_path(generation: int) -> str:
    """The file that says who sampled in a round."""
    return f"{GENERATIONS}/{generation:010d}.json"
