"""What a store on LanceDB holds, at the versions of its tables that were last looked at."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.backends.id_index import IdIndex
from lopd.backends.lance import decode
from lopd.backends.lance.catalog import Catalog
from lopd.backends.lance.decode import Wanted
from lopd.backends.lance.encode import ROLLOUT_LINE, SCORE_LINE
from lopd.backends.lance.part import Part
from lopd.backends.lance.state import TableEntry
from lopd.backends.lance.table import Database, Seen
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, VIRTUAL_COLUMNS
from lopd.records.rows import Rows

T = TypeVar("T")


@final
class Snapshot:
    """Reads at fixed versions, which only `refresh` and a writer move.

    Args:
        database, catalog: the store's.
        versions: table name -> version to look at, and its rows; the latest of those that are not named.
    """

    def __init__(self, database: Database, catalog: Catalog, versions: Seen) -> None:
        """Open the tables that the catalog names."""
        self._owner = database.owner
        self._database = database
        self._catalog = catalog
        self._index, self._indexed = IdIndex(), 0
        self.rollouts: Part | None = None
        self.columns: dict[str, Part] = {}
        self._open(versions)

    def _open(self, versions: Seen) -> None:
        tables, there = self._catalog.state.tables, self.parts()
        new = {column: entry for column, entry in tables.items() if column not in there}
        unknown = [entry.table for entry in new.values() if entry.table not in versions]
        least = dict(zip(unknown, self._together([partial(self._catalog.least, table) for table in unknown]), strict=True))
        # Columns before rollouts: so every visible score has a visible rollout.
        rollouts = new.pop(None, None)
        if new:
            _ = self._database.connection  # one for all of them
        opened = self._together([partial(self._part, entry, SCORE_LINE, versions, least, lambda: self.rows) for entry in new.values()])
        self.columns.update(zip(filter(None, new), opened, strict=True))
        if rollouts is not None:
            self.rollouts = self._part(rollouts, ROLLOUT_LINE, versions, least, None)
        if self.columns and self.rollouts is None:
            raise CorruptStoreError(
                f"{self._owner}: there are scores, and the catalog does not name a table of rollouts; restore the store from a backup."
            )

    def _part(
        self, entry: TableEntry, line: np.dtype[Any], versions: Seen, least: Mapping[str, int], limit: Callable[[], int] | None
    ) -> Part:
        part = Part(self._owner, self._database.open(entry.table, versions.get(entry.table)), line, entry.seed, limit)
        return self._checked(part, least.get(entry.table, 0))

    def _checked(self, part: Part, least: int) -> Part:
        """Return the part, unless it has fewer rows than were there before it was opened."""
        if part.table.rows < least:
            raise CorruptStoreError(
                f"{self._owner}: table {part.table.name!r} has {part.table.rows} rows, expected at least {least}, for that many were written; "
                "restore its newest files from a backup."
            )
        part.marked = max(part.marked, least)
        return part

    def _move(self, part: Part, there: bool, least: int) -> None:
        before, unsure = part.table.rows, part.read > part.marked
        part.table.refresh(there)
        if self._checked(part, least).table.rows < max(before, part.read) or (unsure and part.replaced()):
            # A writer took back what it could not read.
            part.forget()
            self._index, self._indexed = IdIndex(), 0

    def _together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Return what each call gives; side by side in a bucket, where one after the other would take as many round trips."""
        return self._database.files.run(calls)

    def refresh(self) -> None:
        """Move to the latest version of everything."""
        self._catalog.refresh()
        parts = self.parts()
        looks: list[Callable[[], int]] = [part.table.check for part in parts.values()]
        # before a column moves and its rows are counted
        looks += [partial(self._catalog.least, part.table.name) for part in self.columns.values()]
        found, rollouts = self._together(looks), self.rollouts
        there, least = dict(zip(parts, map(bool, found), strict=False)), found[len(parts) :]
        self._together([partial(self._move, part, there[name], n) for (name, part), n in zip(self.columns.items(), least, strict=True)])
        self._open({})
        if rollouts is not None:  # last: every score that is seen then has its rollout
            self._move(rollouts, there[None], self._catalog.least(rollouts.table.name))

    def parts(self) -> dict[str | None, Part]:
        """Return all tables that are there: that of each column by its name, that of the rollouts under None."""
        found: dict[str | None, Part] = {} if self.rollouts is None else {None: self.rollouts}
        found.update(self.columns)
        return found

    def provenances(self) -> dict[str, Provenance]:
        """Return the provenance of each column."""
        entries = {name: self._catalog.state.tables[name] for name in self.columns}
        return {name: entry.provenance for name, entry in entries.items() if entry.provenance is not None}

    @property
    def rows(self) -> int:
        """Rollouts."""
        return 0 if self.rollouts is None else self.rollouts.table.rows

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Policy of each round of sampling."""
        return self._catalog.state.generations

    def _lines(self) -> NDArray[np.void]:
        return np.zeros(0, ROLLOUT_LINE) if self.rollouts is None else self.rollouts.lines()

    def lengths(self) -> NDArray[np.int64]:
        """Return (rows, 2): prompt and response tokens."""
        lines = self._lines()
        return np.stack([lines["prompt_length"], lines["response_length"]], axis=1).astype(np.int64)

    def known(self, rollout_ids: Sequence[str]) -> tuple[NDArray[np.int64], list[tuple[bytes, int]]]:
        """Return rows of rollouts, -1 for one that is not there, and content hash and number of response tokens of each that is."""
        rows = self.find(rollout_ids)
        lines = self._lines()[rows[rows >= 0]]
        return rows, list(zip(lines["content_hash"].tolist(), lines["response_length"].tolist(), strict=True))

    def find(self, rollout_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return (n,): rows of rollouts, -1 for one that is not there."""
        new = self._lines()["id_hash"][self._indexed :]
        if new.size:
            self._index.add(new, self._indexed)
            self._indexed += new.size
        return self._index.find(rollout_ids)

    def scored_rows(self, column: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (n,): which of these rows have scores in this column; looks at no others."""
        if column in VIRTUAL_COLUMNS:
            return (self._lines()["has_behavior"][rows] & (1 if column == BEHAVIOR_COLUMN else 2)) > 0
        return self.columns[column].find(rows) >= 0 if column in self.columns else np.zeros(rows.size, np.bool_)

    def quarantined(self, column: str) -> dict[int, str]:
        """Return rows that could not be scored, and why, without those that were scored later."""
        reasons = sorted(self._catalog.state.reasons.get(column, {}).items())
        if reasons and reasons[-1][0] >= self.rows:
            raise CorruptStoreError(
                f"{self._owner}: column {column!r} has a reason for row {reasons[-1][0]}, expected rows below {self.rows}; "
                "restore the store from a backup."
            )
        done = self.scored_rows(column, np.array([row for row, _ in reasons], np.int64))
        return {row: reason for (row, reason), scored in zip(reasons, done.tolist(), strict=True) if not scored}

    def read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str]) -> Rows:
        """Return these rollouts with these columns and supports, in the order asked."""
        try:
            return self._read(rows, columns, top_k)
        except CorruptStoreError:
            moved = [part.moved(rows) for name, part in self.parts().items() if name is None or name in columns]
            if not any(moved):
                raise
            return self._read(rows, columns, top_k)

    def _read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str]) -> Rows:
        if self.rollouts is None or not rows.size:
            return Rows.of(())
        lines = self.rollouts.lines_of(rows)
        scored = {name: self._scored(name, rows, lines) for name in columns}
        supports = {name: self._catalog.top_k(name) for name in top_k}
        return decode.read(Wanted(self._owner, self.rollouts.fetch, rows, lines), scored, supports)

    def _scored(self, column: str, rows: NDArray[np.int64], lines: NDArray[np.void]) -> Wanted:
        """Return the scores of these rows, if there are some, of these rows' tokens."""
        owner, part = f"{self._owner}: column {column!r}", self.columns.get(column)
        absent = rows if part is None else rows[part.find(rows) < 0]
        if part is None or absent.size:
            raise admission.missing_scores(self._owner, self._name(int(absent[0])), column)
        found = part.lines_of(rows)
        for i in np.flatnonzero((found["content_hash"] != lines["content_hash"]) | (found["length"] != lines["response_length"]))[:1]:
            raise CorruptStoreError(
                f"{owner}: scores of rollout {self._name(int(rows[i]))!r} were computed on other tokens; restore the store from a backup."
            )
        return Wanted(owner, part.fetch, rows, found)

    def _name(self, row: int) -> str:
        """Return the rollout's id, for messages."""
        return self.read(np.array([row]), (), ()).rollout_ids[0]
