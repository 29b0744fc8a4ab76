"""How a store on LanceDB changes: add rows of the next commit number to a table, or a file to the catalog."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, final
from uuid import uuid4

from attrs import asdict

from lopd.backends.files import Files, local_folder, writing
from lopd.backends.files.local import remove_unfinished
from lopd.backends.lance import tiers
from lopd.backends.lance.catalog import LOG, Catalog
from lopd.backends.lance.encode import encode_rollouts, encode_scores, no_scores, tokens_of
from lopd.backends.lance.failures import first_line, is_conflict, is_lance_error, remedy
from lopd.backends.lance.part import Part
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.state import table_seed
from lopd.backends.lance.table import BEGAN_EMPTY, COMMIT, PATIENCE, Database, LanceTable
from lopd.backends.lance.versions import TABLE_SUFFIX
from lopd.backends.lance.written import check_added, check_unmarked, take_back
from lopd.backends.retry import repeat
from lopd.backends.root import Root
from lopd.errors import CorruptStoreError, LopdError, StoreReadError, StoreWriteError
from lopd.records.flush import flush
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores

_LOG = logging.getLogger(__name__)
_HINT = "latest_version_hint.json"
_Records = Sequence[Rollout] | Sequence[Scores]


@final
class Writer:
    """The writing half of one store.

    Args:
        files, database, catalog, snapshot, root: the store's; the snapshot moves with each call.
    """

    def __init__(self, files: Files, database: Database, catalog: Catalog, snapshot: Snapshot, root: Root) -> None:
        self._files = files
        self._database = database
        self._catalog = catalog
        self._snapshot = snapshot
        self._root = root
        # None in a bucket, where what is written is durable.
        self._folder = local_folder(files.url)
        self._owner = database.owner
        self._flushed: dict[str, set[str]] = {}
        # for reading back what was written: its caches hold nothing of it
        self._reread = Database(files, lasting=False)
        self._marked: dict[str, int] = {}

    def add_generation(self, generation: int, policy: ModelId, /) -> bool:
        """Commit which policy samples in a round."""
        return self._catalog.put("generation", {"generation": generation, "policy": asdict(policy)}) and self._seen(None)

    def add_rollouts(self, rollouts: Sequence[Rollout], first_row: int, /) -> bool:
        """Commit rollouts in the rows from `first_row` on."""
        encode = partial(encode_rollouts, rollouts, first_row, *self._root.formats(), commit=self._next_commit(None), when=time.time())
        return self._insert(None, None, encode, rollouts)

    def add_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], rows: Sequence[int], /) -> bool:
        """Commit scores of these rows, which ascend."""
        part = self._snapshot.parts().get(column)
        # an older lopd kept labels as log-probs are kept
        formats = self._root.formats(provenance, None if part is None else part.table.logprob_dtype())
        encode = partial(encode_scores, scores, rows, *formats, commit=self._next_commit(column), when=time.time())
        return self._insert(column, provenance, encode, scores)

    def add_reasons(self, column: str, provenance: Provenance, reasons: Mapping[int, str], /) -> bool:
        """Commit why rows could not be scored; a column that is not there is made first, so that it has one owner."""
        self._rely(None)
        if self._snapshot.parts().get(column) is None:
            empty = partial(no_scores, provenance, *self._root.formats(provenance), commit=0, when=time.time())
            self._insert(column, provenance, empty, ())
            # Whoever made it, it is to be looked at.
            return False
        named = {str(row): reason for row, reason in reasons.items()}
        return self._catalog.put("quarantine", {"column": column, "reasons": named}) and self._seen(column)

    def _seen(self, column: str | None) -> bool:
        """Return True, once the snapshot has what was put into the catalog, and it is durable."""
        self._snapshot.refresh()
        self._settle(column)
        return True

    def _next_commit(self, column: str | None) -> int:
        """Return a number that no commit has that this version knows of."""
        part = self._snapshot.parts().get(column)
        return int(part.lines()[COMMIT][-1]) + 1 if part is not None and part.lines().size else 0

    def _insert(self, column: str | None, provenance: Provenance | None, encode: Callable[..., Any], records: _Records) -> bool:
        """Return whether the next commit of a table is now this one."""
        for name in {None, column}:
            self._rely(name, hold=name != column)
        part = self._snapshot.parts().get(column)
        if part is not None:  # a new table's record is put behind the last one, which is looked at then
            self._catalog.check()
        try:
            made = self._create(column, provenance, encode, records) if part is None else self._add(part, encode(seed=part.seed))
        except BaseException as error:
            if not is_lance_error(error):
                raise
            raise self._refused(error, column, [record.rollout_id for record in records]) from error
        if made:
            self._settle(column)
        return made

    def _tidy(self, table: LanceTable, commit: int) -> None:
        """Do a share of what `compact` does, after some commits.  They are committed, however this ends."""
        try:
            # First what a table that may not be merged needs, too.
            if commit % (tiers.VERSIONS // 2) == 0:
                self._catalog.check_clock()
                tiers.drop_versions(table.dataset())
            if commit % tiers.FAN == 0:
                tiers.tidy(table.dataset(), table.rows, partial(self._flush_file, table.name))
        except BaseException as error:
            if not isinstance(error, LopdError) and not is_lance_error(error):
                raise
            if not is_conflict(error):
                _LOG.warning("%s: merging small files failed, which a later commit repeats: %s", self._owner, first_line(error))

    def _flush_file(self, table: str, name: str) -> None:
        """Make a file of rows durable that no version has yet."""
        if self._folder is not None:
            flush(self._folder / f"{table}{TABLE_SUFFIX}" / "data" / name)

    def _add(self, part: Part, data: Any) -> bool:
        table = part.table
        made = repeat(partial(table.insert, data, table.version), lambda error: is_conflict(error) or table.is_behind(), **PATIENCE)
        if made:
            try:
                check_added(self._reread, table, data)
            except LopdError as error:
                raise self._unreadable(table.name, error, self._take_back(table, len(data), error)) from error
            self._flush(table.name)
            self._mark(table.name, table.rows)
            part.marked = table.rows
            self._tidy(table, data[COMMIT][0].as_py())
        return made

    def _take_back(self, table: LanceTable, count: int, error: LopdError) -> str:
        """Remove rows that cannot be read, unless the storage may give them later, or others rely on them; gives what came of it."""
        if isinstance(error, StoreReadError):
            return "it is not known whether it was committed"
        with suppress(Exception):
            if self._catalog.least(table.name) <= table.rows - count and take_back(table, count):
                return "nothing of this call was committed"
        return "its rows could not be taken back"

    def _create(self, column: str | None, provenance: Provenance | None, encode: Callable[..., Any], records: _Records) -> bool:
        """Return whether the table of a column, or of the rollouts, is now one that this call made."""
        kind = "rollouts" if column is None else f"{'scores.' if records else BEGAN_EMPTY}{column}"
        name, tables = f"{kind}-{uuid4().hex}", self._catalog.state.tables
        data = encode(seed=table_seed(name))
        # Only tables that were announced are ever removed, and only when their column has another one.
        self._catalog.say("begun", {"table": name, "column": column})
        try:
            check_added(self._reread, self._database.create(name, data), data)
        except BaseException as error:
            if not isinstance(error, LopdError) and not is_lance_error(error):
                raise
            self._database.drop(name)
            self._catalog.refresh()
            if column in tables:
                return False
            if isinstance(error, LopdError):
                raise self._unreadable(name, error, "nothing of this call was committed") from error
            raise
        self._flush(name)
        entry = {"table": name, "column": column, "provenance": None if provenance is None else provenance.to_json()}
        while column not in tables:
            if self._catalog.put("table", entry):
                self._mark(name, len(data))
                self._snapshot.refresh()
                return True
            self._catalog.refresh()
        self._database.drop(name)
        return False

    def _unreadable(self, table: str, error: LopdError, after: str) -> StoreWriteError:
        """Return the error for a table that cannot be read after a write: LanceDB drops the error of a write that fails."""
        return StoreWriteError(
            f"{self._owner}: what was written to table {table!r} cannot be read ({first_line(error.__cause__ or error)})"
            f"; {after}, so check the disk and repeat the call."
        )

    def _refused(self, error: BaseException, column: str | None, rollout_ids: Sequence[str]) -> StoreWriteError:
        there = True
        with suppress(LopdError):
            self._snapshot.refresh()
            rows = self._snapshot.find(rollout_ids)
            there = bool((rows >= 0).all() and (column is None or self._snapshot.scored_rows(column, rows).all()))
        doubt = "it is not known whether it was committed, but repeating it is safe" if there else "nothing of this call was committed"
        return StoreWriteError(f"{self._owner}: the write failed with {first_line(error)!r}; {doubt}, so {remedy(error)} and repeat it.")

    def compact(self, older_than: float) -> None:
        """Merge small files of each table, drop its old versions, and remove tables that no column will have."""
        self._snapshot.refresh()
        self._catalog.check()
        self._catalog.check_clock()
        for column, part in self._snapshot.parts().items():
            began = time.monotonic()
            self._rely(column, hold=False)
            try:
                merged = tiers.compact(part.table.dataset(), part.table.rows, partial(self._flush_file, part.table.name))
                # What was committed meanwhile is read by writers that began before.
                tiers.drop_versions(part.table.dataset(), max(older_than, time.monotonic() - began))
                self._flush(part.table.name)
            except BaseException as error:
                if not is_lance_error(error):
                    raise
                if not is_conflict(error) and not part.table.is_behind():
                    raise StoreWriteError(
                        f"{self._owner}: compacting table {part.table.name!r} failed with {first_line(error)!r}; "
                        f"nothing of it was lost, so {remedy(error)} and repeat it."
                    ) from error
                merged = False  # another compaction was quicker
            if merged:
                self._catalog.say("compaction", {"rows": part.table.rows, "tokens": int(tokens_of(part.lines()).sum()), "column": column})
        self._remove_strangers()
        remove_unfinished(self._files.url, older_than)
        self._snapshot.refresh()

    def _remove_strangers(self) -> None:
        """Remove tables of writers that were killed or came too late: their column has another table, which it keeps."""
        tables, begun = self._catalog.state.tables, self._catalog.state.begun.items()
        dead = {f"{name}{TABLE_SUFFIX}" for name, column in begun if column in tables and tables[column].table != name}
        with writing(self._owner, "removing what killed writers left"):
            self._files.remove(dead.intersection(self._files.names("")))

    def end(self) -> None:
        """Do nothing: what is written is committed at once."""

    def settle(self, column: str | None, /) -> None:
        """Make durable what a call relies on, also where another process wrote it and may not have come to flush it; refuse it where it is gone."""
        self._catalog.check()
        self._settle(column)

    def _settle(self, column: str | None) -> None:
        for name in {None, column}:
            self._rely(name)
            if (part := self._snapshot.parts().get(name)) is not None:
                self._flush(part.table.name)
                self._mark(part.table.name, part.read)
        for folder in ("", LOG):
            self._files.settle(folder)

    def _rely(self, column: str | None, *, hold: bool = True) -> None:
        """Make sure of what was not acknowledged, before anything is built on it; adding rows behind it holds it, too."""
        part = self._snapshot.parts().get(column)
        if part is None or part.table.rows <= max(part.marked, self._marked.get(part.table.name, 0)):
            return
        try:
            sure = check_unmarked(self._snapshot, self._catalog, column, hold=hold)
        except CorruptStoreError as error:
            raise self._unreadable(part.table.name, error, "it was not acknowledged") from error
        except BaseException as error:
            if not is_lance_error(error):
                raise
            raise self._refused(error, column, ()) from error
        if sure:
            self._flush(part.table.name)
            self._mark(part.table.name, part.table.rows)

    def _mark(self, table: str, rows: int) -> None:
        """Keep that so many rows, which were read, are there."""
        if rows > self._marked.get(table, 0):
            self._catalog.mark(table, rows)
            self._marked[table] = rows

    def _flush(self, table: str) -> None:
        """Flush the files of a table that are new, and the folders that lead to them, as Lance does not."""
        if self._folder is None:
            return
        known, found, changed = self._flushed.get(table, set()), set[str](), list[str]()
        try:
            for folder, folders, names in os.walk(self._folder / f"{table}{TABLE_SUFFIX}", topdown=False):
                paths = {f"{folder}/{name}" for name in [*folders, *names]}
                new = paths - known
                # Lance never changes a file, except the one that names the version it believes to be the latest.
                changed += [*new, *(paths & {f"{folder}/{_HINT}"}), folder] if new else []
                found |= paths
            # What a compaction removes just now needs no flushing.
            flush(*changed, self._folder, missing_ok=True)
            self._flushed[table] = found
        except OSError as error:
            raise StoreWriteError(
                f"{self._owner}: flushing table {table!r} failed with {error}; what was committed "
                "may not survive a power cut, so check the disk and repeat the call, which is safe."
            ) from error
