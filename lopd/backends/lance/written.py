"""Whether what LanceDB says it has written can be read: it drops the error of a `write()` that fails, and leaves a file that is cut."""

from functools import partial
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.files import Files
from lopd.backends.lance.table import COMMIT, Database, LanceTable
from lopd.backends.retry import repeat
from lopd.errors import CorruptStoreError

_ROWS_AT_ONCE = 256


@final
class Reader:
    """Reads what was written a moment ago, through caches that the writer has not filled.

    It reads the latest version: a compaction beside it may have removed the one that was written.  What it finds removed while it reads, it
    looks for again.

    Args:
        files: of the store.
    """

    def __init__(self, files: Files) -> None:
        """Reads nothing."""
        self._database = Database(files)

    def check_added(self, table: LanceTable, data: Any) -> None:
        """Compare the last rows of a table's version with the rows that were added.

        Raises:
            CorruptStoreError: they are others, or cannot be read.
            StoreReadError: the storage does not answer.
        """
        _again(partial(self._check_added, table, data))

    def _check_added(self, table: LanceTable, data: Any) -> None:
        stored = self._database.open(table.name)
        if stored.version == table.version:
            found = stored.take(np.arange(table.rows - len(data), table.rows), data.column_names)
        else:
            # A merge may have moved them.
            found = stored.with_commit(data[COMMIT][0].as_py(), data.column_names)
        if stored.version < table.version or not _same(found, data):
            raise _others(table)

    def check_merged(self, table: LanceTable, before: int, places: NDArray[np.int64]) -> None:
        """Compare the rows at these places with those of the version before, which were checked when they came.

        Raises:
            CorruptStoreError: they are others, or cannot be read.
            StoreReadError: the storage does not answer.
        """
        if places.size:
            _again(partial(self._check_merged, table, before, places))

    def _check_merged(self, table: LanceTable, before: int, places: NDArray[np.int64]) -> None:
        stored = self._database.open(table.name)
        try:
            old = self._database.open(table.name, before)
        except CorruptStoreError:
            # Another compaction has removed it, after a look of its own.
            return
        columns, (numbers, wanted) = sorted(old.columns), (_numbers(stored), _numbers(old)[places])
        order = np.argsort(numbers)
        moved = order[np.minimum(np.searchsorted(numbers, wanted, sorter=order), order.size - 1)]
        for first in range(0, places.size, _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            if not _same(stored.take(np.unique(moved[some]), columns), old.take(places[some], columns)):
                raise _others(table)


def _numbers(table: LanceTable) -> NDArray[np.int64]:
    """(rows,): the row number at each place."""
    found = table.take(np.arange(table.rows), ["row"])
    return found["row"].to_numpy()


def _again(look: Any) -> None:
    repeat(look, lambda error: isinstance(error, CorruptStoreError), seconds=10.0, times=3, pause=0.01, longest=0.05)


def _same(found: Any, wanted: Any) -> bool:
    """Whether two Arrow tables have the same rows, in whatever order."""
    if len(found) != len(wanted):
        return False
    if found["row"] != wanted["row"]:
        found, wanted = found.sort_by("row"), wanted.sort_by("row")
    return all(found[name].combine_chunks() == wanted[name].combine_chunks() for name in wanted.column_names)


def _others(table: LanceTable) -> CorruptStoreError:
    return CorruptStoreError(
        f"Table {table.name!r}: the rows that are stored are not those that were written; restore its files from a backup."
    )
