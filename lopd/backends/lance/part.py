"""One table of a store: which rows it has, and at which place Lance keeps each."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import RLock
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.growing import Growing
from lopd.backends.lance.decode import read_lines
from lopd.backends.lance.encode import line_columns
from lopd.backends.lance.table import COMMIT, LanceTable
from lopd.errors import CorruptStoreError, LopdError

_ROWS_AT_ONCE = 1 << 16


@final
class Part:
    """One table and its lines, which are read when they are first asked for, and then only those that were added.

    Lance keeps rows in the order of commits, and our merges do not change that; but it promises neither, and updates by other tools put rows
    at the end.  So every line carries its row number, its commit and the checksum of its values, and rows that have moved are found again.

    Args:
        owner: how messages name the store.   table: whose lines.   line: what they consist of.   seed: of their checksums.
        limit: gives the number of rollouts of the store; None for their own table, which has every row from 0 on.
    """

    def __init__(self, owner: str, table: LanceTable, line: np.dtype[Any], seed: int, limit: Callable[[], int] | None) -> None:
        self.table = table
        self._owner = owner
        self._line, self.seed = line, seed
        #: So many rows were acknowledged, as far as is known; see `check_unmarked`.
        self.marked = 0
        self._limit, self._asked = limit, False
        # Fetches may run side by side; what is in memory changes under one of them at a time.
        self._lock = RLock()
        self.forget()

    def forget(self) -> None:
        """Read lines again when they are next asked for."""
        self._lines = Growing(self._line)
        # For each row of the store, where its line is in `lines`, -1 if it has none; a table of all rows needs no such thing.
        self._at = Growing(np.int64)
        # For each line its place in the table; None while all are where they ought to be.
        self._places: Growing | None = None

    @property
    def read(self) -> int:
        """Number of rows whose lines were read, so that they are there whole."""
        return len(self._lines)

    def lines(self) -> NDArray[np.void]:
        """Return all lines of the table's version, in the order of commits, and of rows within one.

        Raises:
            CorruptStoreError: one is damaged, missing, or there twice.
        """
        if len(self._lines) != self.table.rows:
            read_before = len(self._lines) > 0
            try:
                self._read_on()
            except BaseException as error:
                self.forget()
                # Perhaps what was read before has moved.
                if not (read_before and isinstance(error, CorruptStoreError)):
                    raise
                return self.lines()
        return self._lines.view()

    def replaced(self) -> bool:
        """Return whether the last line that was read is another one by now: its writer took it back, and others took its place."""
        last = np.array([self.read - 1]) if self._places is None else self._places.view()[-1:]
        now = read_lines(self._owner, self.table.take(last, line_columns(self._line)), self._line, self.seed)
        return bool((now != self._lines.view()[-1:]).any())

    def _read_on(self) -> None:
        if len(self._lines) > self.table.rows:
            self.forget()
        start = len(self._lines)
        for first in range(start, self.table.rows, _ROWS_AT_ONCE):
            places = np.arange(first, min(first + _ROWS_AT_ONCE, self.table.rows))
            self._lines.append(read_lines(self._owner, self.table.take(places, line_columns(self._line)), self._line, self.seed))
        lines = self._lines.view()[max(start - 1, 0) :]
        commits, rows = np.diff(lines[COMMIT]), np.diff(lines["row"])
        places = np.arange(start, self.table.rows)
        if ((commits < 0) | ((commits == 0) & (rows < 0))).any():
            if start:
                raise self._doubtful()
            places = np.lexsort([lines["row"], lines[COMMIT]])
            lines[:] = lines[places]
            self._places = Growing(np.int64)
        if self._places is not None:
            self._places.append(places)
        self._index(start)

    def _index(self, start: int) -> None:
        """Take in where the lines of rows are, from this line on."""
        rows = np.ascontiguousarray(self._lines.view()["row"][start:])
        if self._limit is None:
            if (rows != np.arange(start, start + rows.size)).any():
                raise self._doubtful()
            return
        if rows.size and not 0 <= rows.min() <= rows.max() < self._limit():
            raise CorruptStoreError(
                f"{self._owner}: table {self.table.name!r} has scores of rows {rows.min()} to {rows.max()}, expected rows below "
                f"{self._limit()}; restore the store from a backup."
            )
        self._at.append(np.full(max(rows.max(initial=-1) + 1 - len(self._at), 0), -1))
        at = self._at.view()
        if (at[rows] >= 0).any() or np.unique(rows).size != rows.size:
            raise self._doubtful()
        at[rows] = np.arange(start, start + rows.size)

    def _doubtful(self) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self._owner}: table {self.table.name!r} has a row twice or none of a number, expected each row once; "
            "restore the store from a backup."
        )

    def find(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n,): where the lines of these rows are in `lines`, -1 for a row without one."""
        count = len(self.lines())
        if self._limit is None:
            return np.where(rows < count, rows, -1)
        found, there = np.full(rows.size, -1, np.int64), rows < len(self._at)
        found[there] = self._at.view()[rows[there]]
        return found

    def _places_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # In two steps: looking for rows may read on, and then there are more places.
        at = self.find(rows)
        return at if self._places is None else self._places.view()[at]

    def lines_of(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Return the lines of rows that are there, in this order.

        The first call reads no others of a table that has every row; a second call is seldom the last, so then all lines are read.

        Raises:
            CorruptStoreError: one is damaged.
        """
        if self._limit is None and not len(self._lines) and not self._asked:
            self._asked = True
            distinct, places = np.unique(rows, return_inverse=True)
            found = read_lines(self._owner, self.table.take(distinct, line_columns(self._line)), self._line, self.seed)
            found = found[np.argsort(found["row"])]
            if np.array_equal(found["row"], distinct):
                return found[places]
        return self.lines()[self.find(rows)]

    def fetch(self, rows: NDArray[np.int64], columns: Sequence[str]) -> tuple[Any, NDArray[np.int64]]:
        """Return these columns of rows that are there, distinct and ascending, as an Arrow table, and at which place of it each row is."""
        with self._lock:
            # Without its lines in memory, a row of a table that has every row is looked for where it ought to be.
            places = self._places_of(rows) if len(self._lines) or self._limit is not None else rows
        ordered = np.sort(places)
        return self.table.take(ordered, columns), np.searchsorted(ordered, places)

    def moved(self, rows: NDArray[np.int64]) -> bool:
        """Return whether other rows are in the places of these by now, as far as that can be read; all lines are read again then."""
        with suppress(LopdError):  # it is asked after an error, which is the one to raise
            # in a table that has every row, one is where it was looked for last, which may be before its line was read
            rows = np.unique(rows if self._limit is None else rows[self.find(rows) >= 0])
            found, places = self.fetch(rows, ["row"])
            if not np.array_equal(found["row"].to_numpy()[places], rows):
                with self._lock:
                    self.forget()
                    self.lines()
                return True
        return False
