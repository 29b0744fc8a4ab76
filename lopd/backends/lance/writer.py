"""How a store on LanceDB changes: take the next commit number of a table; if somebody else took it, look again at what is new."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, final
from uuid import uuid4

from attrs import asdict

from lopd.backends import ragged
from lopd.backends.files import Files
from lopd.backends.lance.catalog import ROLLOUTS_FILE, Catalog, column_path, compaction_path, generation_path, quarantine_path
from lopd.backends.lance.encode import tokens_of
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.table import BEGAN_EMPTY, Database, first_line, is_conflict, is_lance_error
from lopd.errors import LopdError, StoreWriteError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance

_TABLE_SUFFIX, _HINT = ".lance", "latest_version_hint.json"
_PAUSE, _PATIENCE = 0.01, 60.0


class Draft(Protocol):
    """Rows that are new."""

    def __call__(self, *, commit: int, when: float) -> Any:
        """They, as an Arrow table of one commit."""
        ...


@final
class Writer:
    """The writing half of one store.

    Args:
        files, database, catalog, snapshot: of the store; the snapshot moves with each call.
        folder: of a local store; None in a bucket, where what is written is durable.
    """

    def __init__(self, files: Files, database: Database, catalog: Catalog, snapshot: Snapshot, folder: Path | None) -> None:
        """Writes nothing."""
        self._files = files
        self._database = database
        self._catalog = catalog
        self._snapshot = snapshot
        self._folder = folder
        self._owner = database.owner
        self._flushed: set[str] = set()

    def begin_generation(self, generation: int, policy: ModelId) -> None:
        """Commit which policy samples in a round, unless it is known."""
        self._snapshot.refresh()
        known = self._catalog.state.generations.get(generation)
        ragged.check_generation(self._owner, generation, known, policy)
        if known is None:
            self._catalog.put(generation_path(generation), {"generation": generation, "policy": asdict(policy)})
            # Somebody else may have been quicker.
            self._snapshot.refresh()
            ragged.check_generation(self._owner, generation, self._catalog.state.generations[generation], policy)
        self._settle(None)

    def quarantine(self, column: str, provenance: Provenance, empty: Draft, make_reasons: Callable[[], Mapping[int, str]]) -> None:
        """Commit which rows could not be scored, unless it is known; a column that is not there is made first, so that it has one owner."""
        self._snapshot.refresh()
        if make_reasons() and self._snapshot.part(column) is None:
            self._create(column, provenance, empty)
            self._snapshot.refresh()
        reasons = {str(row): reason for row, reason in make_reasons().items()}
        if reasons:
            self._catalog.put(quarantine_path(), {"column": column, "reasons": reasons, "when": self._catalog.later()})
            self._snapshot.refresh()
        self._settle(column)

    def commit(self, column: str | None, provenance: Provenance | None, make_draft: Callable[[], Draft | None]) -> None:
        """Commit what is new; when another process commits first, look again at what is new."""
        started = time.monotonic()
        while True:
            self._snapshot.refresh()
            draft = make_draft()
            if draft is None:
                return self._settle(column)
            try:
                if self._insert(column, provenance, draft):
                    return self._settle(column)
            except LopdError:
                raise
            except BaseException as error:
                if not is_lance_error(error):
                    raise
                if not is_conflict(error) or time.monotonic() - started > _PATIENCE:
                    raise self._refused(error, make_draft) from error
                time.sleep(_PAUSE)

    def _insert(self, column: str | None, provenance: Provenance | None, draft: Draft) -> bool:
        """Whether the next commit of a table is now this one."""
        part = self._snapshot.part(column)
        if part is None:
            return self._create(column, provenance, draft)
        return part.table.insert(draft(commit=part.next_commit(), when=time.time()))

    def _create(self, column: str | None, provenance: Provenance | None, draft: Draft) -> bool:
        """Whether the table of a column, or of the rollouts, is now one that this call made."""
        data = draft(commit=0, when=time.time())
        kind = "rollouts" if column is None else f"{'scores.' if len(data) else BEGAN_EMPTY}{column}"
        name = f"{kind}-{uuid4().hex}"
        self._database.create(name, data)
        self._flush(name)
        entry = {"table": name, "provenance": None if provenance is None else provenance.to_json()}
        made = self._catalog.put(ROLLOUTS_FILE if column is None else column_path(column), entry)
        if made:
            self._snapshot.refresh()
        else:
            self._database.drop(name)
        return made

    def _refused(self, error: BaseException, make_draft: Callable[[], Draft | None]) -> StoreWriteError:
        there = True
        with suppress(LopdError):
            self._snapshot.refresh()
            there = make_draft() is None
        doubt = "it is not known whether it was committed, but repeating it is safe" if there else "nothing of this call was committed"
        return StoreWriteError(
            f"{self._owner}: the write failed with {first_line(error)!r}, expected it to succeed; {doubt}, "
            "so free space or fix permissions and repeat it."
        )

    def compact(self, older_than: float) -> None:
        """Merge small files of each table, drop its old versions, and remove tables that nobody knows of."""
        self._snapshot.refresh()
        for column, part in self._snapshot.parts().items():
            try:
                merged = part.table.compact(older_than)
                self._flush(part.table.name)
            except LopdError:
                raise
            except BaseException as error:
                if not is_lance_error(error):
                    raise
                if not is_conflict(error):
                    raise StoreWriteError(
                        f"{self._owner}: compacting table {part.table.name!r} failed with {first_line(error)!r}, expected it to succeed; "
                        "nothing of it was lost, so free space or fix permissions and repeat it."
                    ) from error
                # Another compaction was quicker.
                merged = False
            if merged:
                record = {"rows": part.table.rows, "tokens": tokens_of(part.lines()), "column": column}
                self._catalog.put(compaction_path(), record)
        self._remove_strangers(older_than)
        self._snapshot.refresh()

    def _remove_strangers(self, older_than: float) -> None:
        """Tables of writers that were killed, or refused, before they could say which column theirs is."""
        known = {f"{name}{_TABLE_SUFFIX}" for name in self._snapshot.versions()}
        try:
            found = [name for name in self._files.names("") if name.endswith(_TABLE_SUFFIX) and name not in known]
            self._files.remove([name for name in found if self._files.age(name) >= older_than])
        except OSError as error:
            raise StoreWriteError(
                f"{self._owner}: removing what killed writers left failed with {error}, expected the storage to list and remove; "
                "check it and repeat the call."
            ) from error

    def _settle(self, column: str | None) -> None:
        """Make durable what a call relies on, also where another process wrote it and may not have come to flush it."""
        if self._folder is None:
            return
        for part in {self._snapshot.rollouts, self._snapshot.part(column)}:
            if part is not None:
                self._flush(part.table.name)
        for path in (ROLLOUTS_FILE, column_path(""), generation_path(0), quarantine_path()):
            self._files.settle(path.rpartition("/")[0])

    def _flush(self, table: str) -> None:
        """Lance flushes nothing: flush the files of a table that are new, and the folders that lead to them."""
        if self._folder is None:
            return
        try:
            for folder, folders, names in os.walk(self._folder / f"{table}{_TABLE_SUFFIX}", topdown=False):
                paths = {f"{folder}/{name}" for name in [*folders, *names]}
                new = paths - self._flushed
                # Lance never changes a file, but for the one that says which version it believes to be the latest.
                for path in [*new, *(paths & {f"{folder}/{_HINT}"}), folder] if new else []:
                    _flush_file(path)
                self._flushed |= new
            _flush_file(str(self._folder))
        except OSError as error:
            raise StoreWriteError(
                f"{self._owner}: flushing table {table!r} failed with {error}, expected it to be durable; what was committed "
                "may not survive a power cut, so check the disk and repeat the call, which is safe."
            ) from error


def _flush_file(path: str) -> None:
    # What a compaction removes just now needs no flushing.
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
