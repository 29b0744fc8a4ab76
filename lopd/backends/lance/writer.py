"""How a store on LanceDB changes: add rows of the next commit number to a table, or a file to the catalog."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, final
from uuid import uuid4

from attrs import asdict

from lopd.backends.files import Files, local_folder, writing
from lopd.backends.lance import tiers
from lopd.backends.lance.catalog import COLUMNS, COMPACTIONS, GENERATIONS, QUARANTINE, Catalog, generation_path, new_path, table_path
from lopd.backends.lance.encode import encode_rollouts, encode_scores, no_scores, tokens_of
from lopd.backends.lance.part import Part
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.table import BEGAN_EMPTY, COMMIT, TABLE_SUFFIX, Database, first_line, is_conflict, is_lance_error
from lopd.backends.retry import repeat
from lopd.backends.root import Root
from lopd.errors import LopdError, StoreWriteError
from lopd.records.flush import flush
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores

_LOG = logging.getLogger(__name__)
# Seconds by which the clock of a writer and that of its storage may differ.
_CLOCKS = 24 * 3600.0
_HINT = "latest_version_hint.json"


@final
class Writer:
    """The writing half of one store.

    Args:
        files, database, catalog, snapshot, root: of the store; the snapshot moves with each call.
    """

    def __init__(self, files: Files, database: Database, catalog: Catalog, snapshot: Snapshot, root: Root) -> None:
        """Writes nothing."""
        self._files = files
        self._database = database
        self._catalog = catalog
        self._snapshot = snapshot
        self._formats = root.manifest.tokenizer.vocab_size, root.logprob_dtype
        # None in a bucket, where what is written is durable.
        self._folder = local_folder(files.url)
        self._owner = database.owner
        self._flushed: dict[str, set[str]] = {}

    def add_generation(self, generation: int, policy: ModelId, /) -> bool:
        """Commit which policy samples in a round."""
        made = self._catalog.put(generation_path(generation), {"generation": generation, "policy": asdict(policy)})
        return made and self._seen(None)

    def add_rollouts(self, rollouts: Sequence[Rollout], first_row: int, /) -> bool:
        """Commit rollouts in the rows from `first_row` on."""
        data = encode_rollouts(rollouts, first_row, *self._formats, commit=self._next_commit(None), when=time.time())
        return self._insert(None, None, data, rollouts)

    def add_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], rows: Sequence[int], /) -> bool:
        """Commit scores of these rows, which ascend."""
        data = encode_scores(scores, rows, *self._formats, commit=self._next_commit(column), when=time.time())
        return self._insert(column, provenance, data, scores)

    def add_reasons(self, column: str, provenance: Provenance, reasons: Mapping[int, str], /) -> bool:
        """Commit why rows could not be scored; a column that is not there is made first, so that it has one owner."""
        if self._snapshot.parts().get(column) is None:
            empty = no_scores(provenance, *self._formats, commit=0, when=time.time())
            if not self._create(column, provenance, empty):
                return False
        named = {str(row): reason for row, reason in reasons.items()}
        self._catalog.put(new_path(QUARANTINE), {"column": column, "reasons": named, "when": self._catalog.later()})
        return self._seen(column)

    def _seen(self, column: str | None) -> bool:
        """True, once the snapshot has what was put into the catalog, and it is durable."""
        self._snapshot.refresh()
        self.settle(column)
        return True

    def _next_commit(self, column: str | None) -> int:
        part = self._snapshot.parts().get(column)
        return 0 if part is None else part.next_commit()

    def _insert(self, column: str | None, provenance: Provenance | None, data: Any, records: Sequence[Rollout] | Sequence[Scores]) -> bool:
        """Whether the next commit of a table is now this one."""
        part = self._snapshot.parts().get(column)
        try:
            if part is None:
                made = self._create(column, provenance, data)
            else:
                made = repeat(partial(part.table.insert, data), is_conflict, seconds=60.0, pause=0.02, longest=0.1)
        except LopdError:
            raise
        except BaseException as error:
            if not is_lance_error(error):
                raise
            raise self._refused(error, column, [record.rollout_id for record in records]) from error
        if made:
            if part is not None:
                self._tidy(part, data[COMMIT][0].as_py())
            self.settle(column)
        return made

    def _tidy(self, part: Part, commit: int) -> None:
        """Do a share of what `compact` does, after some commits.  They are committed, however this ends."""
        try:
            if commit % tiers.FAN == 0:
                tiers.tidy(part.table.dataset(), partial(self._look, part.table.name))
            # Lance removes unknown files that it believes to be a week old: where clocks disagree, those of other writers.
            if commit % (tiers.VERSIONS // 2) == 0 and abs(self._files.age(f"{part.table.name}{TABLE_SUFFIX}/_versions")) < _CLOCKS:
                tiers.drop_versions(part.table.dataset())
        except BaseException as error:
            if not is_lance_error(error):
                raise
            if not is_conflict(error):
                _LOG.warning("%s: merging small files failed, which a later commit repeats: %s", self._owner, first_line(error))

    def _look(self, table: str, name: str, size: int) -> None:
        """Make a file that a merge wrote durable, if it is whole."""
        if self._folder is None:
            return
        path = self._folder / f"{table}{TABLE_SUFFIX}" / "data" / name
        if (found := path.stat().st_size) != size:
            raise StoreWriteError(f"{self._owner}: file {path} has {found} bytes, expected {size}; check the disk and repeat the call.")
        flush(path)

    def _create(self, column: str | None, provenance: Provenance | None, data: Any) -> bool:
        """Whether the table of a column, or of the rollouts, is now one that this call made."""
        kind = "rollouts" if column is None else f"{'scores.' if len(data) else BEGAN_EMPTY}{column}"
        name = f"{kind}-{uuid4().hex}"
        self._database.create(name, data)
        self._flush(name)
        entry = {"table": name, "provenance": None if provenance is None else provenance.to_json()}
        made = self._catalog.put(table_path(column), entry)
        if made:
            self._snapshot.refresh()
        else:
            self._database.drop(name)
        return made

    def _refused(self, error: BaseException, column: str | None, rollout_ids: Sequence[str]) -> StoreWriteError:
        there = True
        with suppress(LopdError):
            self._snapshot.refresh()
            rows = self._snapshot.find(rollout_ids)
            there = bool((rows >= 0).all() and (column is None or self._snapshot.scored(column)[rows].all()))
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
                merged = tiers.compact(part.table.dataset(), partial(self._look, part.table.name))
                tiers.drop_versions(part.table.dataset(), older_than)
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
                self._catalog.put(new_path(COMPACTIONS), record)
        self._remove_strangers(older_than)
        self._snapshot.refresh()

    def _remove_strangers(self, older_than: float) -> None:
        """Tables of writers that were killed, or refused, before they could say which column theirs is."""
        known = {f"{part.table.name}{TABLE_SUFFIX}" for part in self._snapshot.parts().values()}
        with writing(self._owner, "removing what killed writers left"):
            found = [name for name in self._files.names("") if name.endswith(TABLE_SUFFIX) and name not in known]
            self._files.remove([name for name in found if self._files.age(name) >= older_than])

    def end(self) -> None:
        """Nothing is written before it is committed."""

    def settle(self, column: str | None, /) -> None:
        """Make durable what a call relies on, also where another process wrote it and may not have come to flush it."""
        if self._folder is None:
            return
        for part in {self._snapshot.rollouts, self._snapshot.parts().get(column)}:
            if part is not None:
                self._flush(part.table.name)
        for folder in ("", COLUMNS, GENERATIONS, QUARANTINE):
            self._files.settle(folder)

    def _flush(self, table: str) -> None:
        """Lance flushes nothing: flush the files of a table that are new, and the folders that lead to them."""
        if self._folder is None:
            return
        known, found = self._flushed.get(table, set()), set[str]()
        try:
            for folder, folders, names in os.walk(self._folder / f"{table}{TABLE_SUFFIX}", topdown=False):
                paths = {f"{folder}/{name}" for name in [*folders, *names]}
                new = paths - known
                # Lance never changes a file, but for the one that says which version it believes to be the latest.
                for path in [*new, *(paths & {f"{folder}/{_HINT}"}), folder] if new else []:
                    # What a compaction removes just now needs no flushing.
                    with suppress(FileNotFoundError):
                        flush(path)
                found |= paths
            flush(self._folder)
            self._flushed[table] = found
        except OSError as error:
            raise StoreWriteError(
                f"{self._owner}: flushing table {table!r} failed with {error}, expected it to be durable; what was committed "
                "may not survive a power cut, so check the disk and repeat the call, which is safe."
            ) from error
