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
from typing import Any, final, get_args
from uuid import uuid4

from attrs import evolve, field, frozen

from lopd.backends.files import Files, names_in
from lopd.backends.ragged import LogprobDtype, check_manifest
from lopd.backends.sealing import seal, unseal
from lopd.errors import CorruptStoreError, InvalidRecordError, StoreExistsError, StoreNotFoundError, StoreReadError, StoreWriteError
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


def taken(files: Files) -> StoreExistsError:
    """The error for a place that is not free."""
    what = "a store" if ROOT_FILE in names_in(files) else "something that is no store"
    return StoreExistsError(f"Store {files.url}: {what} is there, expected an empty folder or nothing; open it, or choose another path.")


def create_root(files: Files, manifest: Manifest, logprob_dtype: LogprobDtype) -> None:
    """Make an empty store; of several creators, one wins.

    Raises:
        StoreExistsError: a store, or anything else, is there.
        StoreWriteError: the storage refused.
    """
    check_manifest(f"Store {files.url}", manifest)
    if logprob_dtype not in get_args(LogprobDtype):
        raise InvalidRecordError(
            f"Store {files.url}: logprob_dtype is {logprob_dtype!r}, expected one of {', '.join(get_args(LogprobDtype))}; pass one of them."
        )
    document = {"manifest": manifest.to_json(), "logprob_dtype": logprob_dtype}
    if names_in(files) or not put(files, ROOT_FILE, document):
        raise taken(files)


def read_root(files: Files) -> tuple[Manifest, LogprobDtype]:
    """The manifest of the store in this place, and the type of its log-probs.

    Raises:
        StoreNotFoundError: no store is there.
        StoreReadError: the storage refused.
        CorruptStoreError: the manifest is damaged, or of another schema version.
    """
    if ROOT_FILE not in (names := names_in(files)):
        what = "holds something that is no store" if names else "is not there"
        raise StoreNotFoundError(f"Store {files.url}: the folder {what}, expected a store; check the path, or create one there.")
    data = _read(files, ROOT_FILE)
    try:
        document = json.loads(data)
        manifest, logprob_dtype = Manifest.from_json(document["manifest"]), document["logprob_dtype"]
    except CorruptStoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(files, ROOT_FILE) from error
    if unseal(data) is None:
        raise _damaged(files, ROOT_FILE)
    return manifest, logprob_dtype


def put(files: Files, path: str, document: Mapping[str, Any]) -> bool:
    """Whether this call made the file.

    Raises:
        StoreWriteError: the storage refused.
    """
    try:
        # The key makes the bytes of each call its own, which is how a repeated request knows its own file.
        return files.put_if_absent(path, seal({**document, "by": uuid4().hex}))
    except StoreWriteError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"Store {files.url}: writing {path} failed with {error}, expected a place that can be written to; nothing was committed, "
            "so check the path, its permissions and the free space."
        ) from error


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
                raise _damaged(self._files, path) from error

    def paths(self) -> list[str]:
        """The files of the catalog that are there now."""
        try:
            listed = {folder: self._files.names(folder) for folder in (_COLUMNS, _GENERATIONS, _COMPACTIONS, _QUARANTINE, "")}
        except OSError as error:
            raise _unreadable(self._files, error) from error
        found = [f"{folder}/{name}" for folder, names in listed.items() if folder for name in names if name.endswith(".json")]
        return [ROLLOUTS_FILE, *found] if ROLLOUTS_FILE in listed[""] else found

    def document(self, path: str) -> dict[str, Any]:
        """What one file says.

        Raises:
            CorruptStoreError: it is damaged.
            StoreReadError: the storage refused.
        """
        document = unseal(_read(self._files, path))
        if document is None:
            raise _damaged(self._files, path)
        return document

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
        return put(self._files, path, {"when": time.time(), **document})


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


def _read(files: Files, path: str) -> bytes:
    try:
        return files.read(path)
    except OSError as error:
        raise _unreadable(files, error) from error


def _unreadable(files: Files, error: OSError) -> StoreReadError:
    return StoreReadError(
        f"Store {files.url}: reading its catalog failed with {error}, expected the storage to answer; check it and try again."
    )


def _damaged(files: Files, path: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"Store {files.url}: {path} is damaged, expected bytes that match their checksum; restore the file from a backup."
    )
