"""One table of a store: which rows it has, and at which place Lance keeps each."""

from collections.abc import Sequence
from threading import RLock
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.lance.decode import read_lines
from lopd.backends.lance.encode import line_columns
from lopd.backends.lance.table import COMMIT, LanceTable
from lopd.errors import CorruptStoreError

_ROWS_AT_ONCE = 1 << 16


@final
class Part:
    """One table and its lines, which are read when they are first asked for, and then only those that were added.

    Lance keeps rows in the order of commits, and a compaction does not change that; but it promises neither.  So every line carries its
    row number, every read compares it, and places that have moved are found anew.

    Args:
        owner: how messages name the store.   table: whose lines.   line: what they consist of.   seed: of their checksums.
        dense: the table has every row from 0 on.
    """

    def __init__(self, owner: str, table: LanceTable, line: np.dtype[Any], seed: int, *, dense: bool) -> None:
        """Reads nothing."""
        self.table = table
        self._owner = owner
        self._line, self.seed = line, seed
        self._dense, self._asked = dense, False
        # Fetches may run side by side; what is in memory changes under one of them at a time.
        self._lock = RLock()
        self.forget()

    def forget(self) -> None:
        """Read lines anew when they are next asked for."""
        self._lines = np.zeros(0, self._line)
        self._rows, self._places = np.zeros(0, np.int64), np.zeros(0, np.int64)

    @property
    def read(self) -> int:
        """Number of rows whose lines were read, so that they are there whole."""
        return len(self._lines)

    def lines(self) -> NDArray[np.void]:
        """All lines of the table's version, by row number.

        Raises:
            CorruptStoreError: one is damaged, missing, or there twice.
        """
        if len(self._lines) != self.table.rows:
            try:
                self._read_on()
            except CorruptStoreError:
                # Perhaps what was read before has moved.
                self.forget()
                self._read_on()
        return self._lines

    def _read_on(self) -> None:
        parts, start = [self._lines], len(self._lines)
        for first in range(start, self.table.rows, _ROWS_AT_ONCE):
            places = np.arange(first, min(first + _ROWS_AT_ONCE, self.table.rows))
            parts.append(read_lines(self._owner, self.table.take(places, line_columns(self._line)), self._line, self.seed))
        lines, places = np.concatenate(parts), np.concatenate([self._places, np.arange(start, self.table.rows)])
        order = np.argsort(lines["row"], kind="stable")
        if not (order[:-1] < order[1:]).all():
            lines, places = lines[order], places[order]
        rows = np.ascontiguousarray(lines["row"])
        if (rows[:-1] == rows[1:]).any() or (self._dense and rows.size and (rows[0], rows[-1]) != (0, rows.size - 1)):
            raise CorruptStoreError(
                f"{self._owner}: table {self.table.name!r} has a row twice or none of a number, expected each row once; "
                "restore the store from a backup."
            )
        self._lines, self._rows, self._places = lines, rows, places

    def find(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,): where the lines of these rows are in `lines`, -1 where there is none."""
        self.lines()
        if not self._rows.size:
            return np.full(rows.size, -1, np.int64)
        if self._rows[-1] == self._rows.size - 1:
            # No row is missing.
            return np.where(rows < self._rows.size, rows, -1)
        at = np.minimum(np.searchsorted(self._rows, rows), self._rows.size - 1)
        return np.where(self._rows[at] == rows, at, -1)

    def _places_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # In two steps: looking for rows may read on, and then there are more places.
        at = self.find(rows)
        return self._places[at]

    def next_commit(self) -> int:
        """A number that no commit has that this version knows of."""
        return int(self.lines()[COMMIT].max(initial=-1)) + 1

    def lines_of(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """Return the lines of rows that are there, in this order.

        The first call reads no others of a table that has every row; whoever asks again will ask often, and then all lines are read.

        Raises:
            CorruptStoreError: one is damaged.
        """
        if self._dense and not self._rows.size and not self._asked:
            self._asked = True
            distinct, places = np.unique(rows, return_inverse=True)
            found = read_lines(self._owner, self.table.take(distinct, line_columns(self._line)), self._line, self.seed)
            found = found[np.argsort(found["row"])]
            if np.array_equal(found["row"], distinct):
                return found[places]
        return self.lines()[self.find(rows)]

    def fetch(self, rows: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """Return these columns, and `row`, of rows that are there, distinct and ascending; in an order of Lance's choice.

        Raises:
            CorruptStoreError: other rows are in their places.
        """
        for _ in range(2):
            with self._lock:
                # Without its lines in memory, a row of a table that has every row is looked for where it ought to be.
                places = self._places_of(rows) if self._rows.size or not self._dense else rows
            found = self.table.take(np.sort(places), ["row", *columns])
            if np.array_equal(np.sort(found["row"].to_numpy()), rows):
                return found
            with self._lock:
                self.forget()
                self.lines()
        raise CorruptStoreError(
            f"{self._owner}: table {self.table.name!r} has other rows in the place of rows {rows[0]} to {rows[-1]}, expected those; "
            "restore the store from a backup."
        )
