"""A store on LanceDB: tables that its tools can query, versions, and several writers at once, on a local disk or in a bucket.

    lopd.json, log/, *.head/       what the store is, which table holds what, and how much there is (see `catalog`)
    rollouts-<key>.lance           one row a rollout
    scores.<column>-<key>.lance    one row a rollout that is scored

Rows are in the order of commits, then in the order of the call; each row carries its number, its commit, and checksums of its bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lopd.backends.durable import DurableBase
from lopd.backends.files import Files, StorageOptions, StorePath, problem
from lopd.backends.lance.catalog import ROOT, Catalog
from lopd.backends.lance.encode import tokens_of
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.state import CatalogState
from lopd.backends.lance.table import COMMIT, Database, Seen
from lopd.backends.lance.writer import Writer
from lopd.backends.root import Root, read_root
from lopd.errors import CorruptStoreError, LopdError, MissingScoresError
from lopd.protocols.reading import VALUES_AT_ONCE, in_batches, values_of
from lopd.records.checks import check_number, to_real
from lopd.records.manifest import Commit

_WEEK = 7 * 24 * 3600.0
# `verify` reads so many rows at once, or fewer where their values are very many.
_ROWS_AT_ONCE = 4096


@final
class LanceStore(DurableBase[Snapshot, Writer]):
    """A `DurableStore` of LanceDB tables; make one with `create`, `open` or `open_or_create`.  It needs the extra `lance`.

    A store sees the versions that were there when it was opened, last refreshed or last written to; `refresh` shows later ones.
    The virtual columns `behavior` and `behavior/sampler` read the rollouts' own log-probs; `columns` does not list them, and they cannot be
    written to.
    Whoever writes removes old versions; rows keep their numbers, and a store that sees an older version reads on.
    It pickles as its place and versions.  One thread at a time; processes as many as you like, but LanceDB does not survive a fork: a
    forked process is refused (start workers with "spawn" or "forkserver").
    `find`, `lengths`, `scored`, and `read` of a column, read all lines at the first call, and hold them from then on (about 130 bytes a rollout).
    A writer merges files of about one size after every 16th commit of a table, up to a gigabyte at once, and keeps the table's newest 128
    versions, about 70 kB each.
    What a commit added is read back and, on a local disk, flushed before its call returns.  LanceDB itself flushes nothing, so a power cut
    in the middle of a commit may leave a last version that cannot be read; what was returned before is whole in the versions before it.
    """

    _ROOT = ROOT

    def __init__(self, files: Files, root: Root | None = None, seen: tuple[CatalogState, Seen] | None = None) -> None:
        super().__init__(files, root)
        self._database = Database(files)
        state, versions = seen or (self._nothing_seen(), {})
        self._catalog = Catalog(files, state, self._root.chained)
        if seen is None:
            self._catalog.refresh()
        else:
            try:
                self._catalog.check()
            except CorruptStoreError:
                read_root(files, ROOT)  # the store of a copy may not be there at all
                raise
        self._snapshot = Snapshot(self._database, self._catalog, versions)
        self._writer = Writer(files, self._database, self._catalog, self._snapshot, self._root)

    def _nothing_seen(self) -> CatalogState:
        return CatalogState(generations={self.manifest.generation: self.manifest.policy})

    def __reduce__(self) -> tuple[Any, ...]:
        """Return place and versions: connections do not travel to another process."""
        versions = {part.table.name: part.table.seen for part in self._snapshot.parts().values()}
        return LanceStore, (self._files, self._root, (self._catalog.state, versions))

    @classmethod
    def _place(cls, path: StorePath, options: StorageOptions | None) -> Files:
        files = super()._place(path, options)
        # It refuses a place where LanceDB cannot be, before anything is made there.
        Database(files)
        return files

    def _counts(self) -> dict[str, int]:
        return {name: part.table.rows for name, part in self._snapshot.columns.items()}

    def table(self, column: str | None = None) -> Any:
        """Return LanceDB's own table of the rollouts, or of the scores in a column, for its queries; it does not take writes.

        It is at the version that this store sees, which is kept until 128 others have followed, and as long as it has a tag
        (`tags.create("run-1", version)`).  Its `row` is the row of the store, by which the tables join; `rollout_id` is UTF-8 in
        bytes, so a filter reads `CAST(rollout_id AS STRING) LIKE 'sums/%'`.  The files of a table of which another tool has made an index
        are not merged: drop the index, `compact`, and make it again.

        Raises:
            MissingScoresError: no such column, or nothing was appended yet.
            CorruptStoreError: that version was removed (`refresh` first), or is another one by now: the store was put back to an older state.
        """
        part = self._snapshot.parts().get(column)
        if part is None:
            what = "rollouts" if column is None else f"column {column!r}"
            raise MissingScoresError(f"{self.name}: there is no table of {what}; append some first.")
        part.table.check()
        return self._database.handle(part.table.name, part.table.version)

    def compact(self, *, older_than: float = _WEEK) -> None:
        """Merge many small files into large ones; rows keep their numbers.  Refreshes.

        Versions are removed if they are older than this many seconds; none are with `float("inf")`.  Stores read on, also pickled ones; what
        `table` gave reads on only as long as its version is there.  Tables that killed writers left behind are removed once their column has
        another table, and their temporary files on a local disk once these are a day old, too.

        Raises:
            InvalidRecordError: `older_than` is below 0, or not a number.
            CorruptStoreError: the store was removed, or put back to an older state, under its writer.
            StoreWriteError: the write failed, what was merged is not what was there before, or a table has an index of another tool; nothing was
                lost.
        """
        seconds = to_real(self._owner, "older_than", older_than)
        check_number(self._owner, "older_than", older_than, seconds >= 0, "at least 0 seconds")
        self._proven_writer.compact(seconds)

    def history(self) -> Sequence[Commit]:
        """Return what was committed up to this store's snapshot, by the clocks of the writers, oldest first."""
        found = list(self._catalog.state.events)
        for column, part in self._snapshot.parts().items():
            lines = part.lines()
            # A column of which no row was scored, only quarantined, has no lines.
            for commit in np.split(lines, np.flatnonzero(np.diff(lines[COMMIT])) + 1) if lines.size else ():
                when, rounding = float(commit["committed_at"][0]), float(commit["rounding"][0])
                kind: Literal["rollouts", "scores"] = "rollouts" if column is None else "scores"
                found.append(Commit(0, kind, len(commit), int(tokens_of(commit).sum()), column, when, rounding))
        found.sort(key=lambda commit: commit.when)
        return [evolve(commit, number=number) for number, commit in enumerate(found)]

    def stored_bytes(self) -> int:
        """Return bytes of the data files that the current versions are made of, without LanceDB's own bookkeeping."""
        return sum(part.table.stored_bytes() for part in self._snapshot.parts().values())

    def verify(self) -> Iterator[str]:
        """Yield one sentence for each problem found; reads every row of the current versions, and the catalog."""
        try:
            # Not what was read before, but what is stored now.
            LanceStore(self._files)
            self._catalog.check()
        except LopdError as error:
            yield problem(self._files, error)
        for column, part in self._snapshot.parts().items():
            part.forget()
            top_k = 0 if column is None else self._catalog.top_k(column)
            try:
                rows, values = np.sort(part.lines()["row"]), values_of(self, 0 if column is None else 1 + 2 * top_k)
            except LopdError as error:
                yield problem(self._files, error)
                continue
            columns = () if column is None else (column,)
            for batch in in_batches(rows, _ROWS_AT_ONCE, values[rows], VALUES_AT_ONCE):
                yield from self._problems_of(np.array(batch), columns, columns if top_k else ())

    def _problems_of(self, rows: NDArray[np.int64], columns: tuple[str, ...], ranked: tuple[str, ...]) -> Iterator[str]:
        """Yield the problems of many rows at once if they are sound, and else of each half; each sentence once."""
        try:
            self._snapshot.read(rows, columns, ranked)
        except LopdError as error:
            found: Iterator[str] = iter([problem(self._files, error)])
            if len(rows) > 1:
                found = (one for half in np.array_split(rows, 2) for one in self._problems_of(half, columns, ranked))
            yield from dict.fromkeys(found)
