"""What a store on LanceDB says beside its tables: small JSON files, each made by exactly one of those who try, each with a checksum.

    lopd.json                      the manifest; the store exists from here on
    rollouts.json                  the name of the table that holds the rollouts
    columns/<column>.json          the name of the table of a score column, and who computed it
    generations/<number>.json      who sampled in a round
    compactions/<key>.json         what was merged, for the history
    quarantine/<key>.json          rows that a column's model could not score, and why

They are files and not rows because creating a LanceDB table is no decision: of several creators, more than one is told that it won.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any, final
from uuid import uuid4

from attrs import evolve, field, frozen

from lopd.backends.files import Files
from lopd.backends.root import Root
from lopd.backends.sealing import seal, unseal
from lopd.errors import CorruptStoreError, StoreNotFoundError, StoreReadError, StoreWriteError
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance

ROOT_FILE = "lopd.json"
ROLLOUTS_FILE = "rollouts.json"
_COLUMNS, _GENERATIONS, _COMPACTIONS, _QUARANTINE = "columns", "generations", "compactions", "quarantine"
_TABLE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@frozen
class TableEntry:
    """Which table holds the rollouts, or a column.

    Args:
        table: its name in the database.
        provenance: of a column; None for the rollouts.
    """

    table: str
    provenance: Provenance | None


@frozen
class Quarantine:
    """Rows that could not be scored.

    Args:
        column: of the scores that are not there.
        reasons: by row.
        when: seconds since 1970.
    """

    column: str
    reasons: Mapping[int, str]
    when: float


@frozen
class CatalogState:
    """What was there at one moment.

    Args:
        rollouts: the table of the rollouts, None before the first append.
        columns: those of the score columns.
        generations: policies, by round.
        quarantines: of all columns, in no order.
        events: generations, compactions and quarantines, for the history.
        seen: files that are in all this.
    """

    rollouts: TableEntry | None = None
    columns: Mapping[str, TableEntry] = field(factory=dict)
    generations: Mapping[int, ModelId] = field(factory=dict)
    quarantines: tuple[Quarantine, ...] = ()
    events: tuple[Commit, ...] = ()
    seen: frozenset[str] = frozenset()


@final
class LanceRoot:
    """A `RootFile`: sealed JSON."""

    name = ROOT_FILE

    def encode(self, root: Root, /) -> bytes:
        """The file's bytes."""
        return seal({"manifest": root.manifest.to_json(), "logprob_dtype": root.logprob_dtype, "by": uuid4().hex})

    def decode(self, url: str, data: bytes, /) -> Root | None:
        """What the bytes say."""
        document = json.loads(data)
        if "opd_teacher" in document:
            raise StoreNotFoundError(f"Store {url}: its {self.name} is the lineage of a trained model, expected a store; check the path.")
        root = Root(Manifest.from_json(document["manifest"]), document["logprob_dtype"])
        return root if unseal(data) is not None else None


@final
class Catalog:
    """The catalog of one store, as it was at the last `refresh`.

    Args:
        files: of the store.   state: what was seen so far.
    """

    def __init__(self, files: Files, state: CatalogState) -> None:
        """Reads nothing."""
        self._files = files
        self.state = state

    def refresh(self) -> None:
        """Take in what was added since; files never change.

        Raises:
            CorruptStoreError: one is damaged.
            StoreReadError: the storage refused.
        """
        for path in sorted(set(self.paths()) - self.state.seen):
            try:
                self.state = _grown(self.state, path, self.document(path))
            except (KeyError, TypeError, AttributeError) as error:
                raise self._damaged(path) from error

    def paths(self) -> list[str]:
        """The files of the catalog that are there now."""
        try:
            listed = {folder: self._files.names(folder) for folder in (_COLUMNS, _GENERATIONS, _COMPACTIONS, _QUARANTINE, "")}
        except OSError as error:
            raise self._unreadable(error) from error
        found = [f"{folder}/{name}" for folder, names in listed.items() if folder for name in names if name.endswith(".json")]
        return [ROLLOUTS_FILE, *found] if ROLLOUTS_FILE in listed[""] else found

    def document(self, path: str) -> dict[str, Any]:
        """What one file says.

        Raises:
            CorruptStoreError: it is damaged.
            StoreReadError: the storage refused.
        """
        try:
            document = unseal(self._files.read(path))
        except OSError as error:
            raise self._unreadable(error) from error
        if document is None:
            raise self._damaged(path)
        return document

    def _unreadable(self, error: OSError) -> StoreReadError:
        return StoreReadError(
            f"Store {self._files.url}: reading its catalog failed with {error}, expected the storage to answer; check it and try again."
        )

    def _damaged(self, path: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"Store {self._files.url}: {path} is damaged, expected bytes that match their checksum; restore the file from a backup."
        )

    def top_k(self, column: str) -> int:
        """K of a column; 0 where it has none, or is none."""
        entry = self.state.columns.get(column)
        return 0 if entry is None or entry.provenance is None else entry.provenance.top_k

    def reasons(self, column: str) -> dict[int, str]:
        """Why the column's model could not score rows, scored since or not; of several reasons the latest."""
        found = dict[int, str]()
        for quarantine in sorted(self.state.quarantines, key=_when):
            if quarantine.column == column:
                found.update(quarantine.reasons)
        return found

    def later(self) -> float:
        """Now, or just after the latest quarantine that is known, should the clock of its writer be ahead."""
        return max([time.time(), *(quarantine.when + 1e-3 for quarantine in self.state.quarantines)])

    def put(self, path: str, document: Mapping[str, Any]) -> bool:
        """Whether this call made the file.

        Raises:
            StoreWriteError: the storage refused.
        """
        try:
            # The key makes the bytes of each call its own, which is how a repeated request knows its own file.
            return self._files.put_if_absent(path, seal({"when": time.time(), **document, "by": uuid4().hex}))
        except StoreWriteError:
            raise
        except OSError as error:
            raise StoreWriteError(
                f"Store {self._files.url}: writing {path} failed with {error}, expected a place that can be written to; nothing was committed, "
                "so check the path, its permissions and the free space."
            ) from error


def column_path(column: str) -> str:
    """The file that says where a column is."""
    return f"{_COLUMNS}/{column}.json"


def generation_path(generation: int) -> str:
    """The file that says who sampled in a round."""
    return f"{_GENERATIONS}/{generation:010d}.json"


def compaction_path() -> str:
    """A file for one compaction, named as no other."""
    return f"{_COMPACTIONS}/{uuid4().hex}.json"


def quarantine_path() -> str:
    """A file for one quarantine, named as no other."""
    return f"{_QUARANTINE}/{uuid4().hex}.json"


def _when(quarantine: Quarantine) -> float:
    return quarantine.when


def _grown(state: CatalogState, path: str, document: Mapping[str, Any]) -> CatalogState:
    folder, _, name = path.removesuffix(".json").rpartition("/")
    state = evolve(state, seen=state.seen | {path})
    if path == ROLLOUTS_FILE:
        return evolve(state, rollouts=_entry(path, document))
    if folder == _COLUMNS:
        return evolve(state, columns={**state.columns, name: _entry(path, document)})
    if folder == _GENERATIONS:
        policies = {**state.generations, document["generation"]: ModelId(**document["policy"])}
        event = Commit(0, "generation", 0, 0, None, document["when"])
        return evolve(state, generations=policies, events=(*state.events, event))
    if folder == _QUARANTINE:
        reasons = {int(row): reason for row, reason in document["reasons"].items()}
        added = Quarantine(document["column"], reasons, document["when"])
        event = Commit(0, "quarantine", len(reasons), 0, added.column, added.when)
        return evolve(state, quarantines=(*state.quarantines, added), events=(*state.events, event))
    event = Commit(0, "compaction", document["rows"], document["tokens"], document["column"], document["when"])
    return evolve(state, events=(*state.events, event))


def _entry(path: str, document: Mapping[str, Any]) -> TableEntry:
    if not _TABLE_NAME.fullmatch(document["table"]):
        raise CorruptStoreError(
            f"Catalog file {path}: it names table {document['table']!r}, expected letters, digits, '_', '-' or '.', and no '.' in front; "
            "restore the file from a backup."
        )
    provenance = document["provenance"]
    return TableEntry(document["table"], None if provenance is None else Provenance.from_json(provenance))
