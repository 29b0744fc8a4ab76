"""Whether what LanceDB reports as written can be read: it drops the error of a `write()` that fails, and leaves a file that is cut."""

from functools import partial
from typing import Any

import numpy as np

from lopd.backends.lance.table import Database, LanceTable
from lopd.backends.retry import repeat
from lopd.errors import CorruptStoreError


def check_added(database: Database, table: LanceTable, data: Any) -> None:
    """Compare the last rows of a table's version with the rows that were added.

    It reads the latest version: a compaction beside it may have removed the one that was written.  What it finds removed while it reads, it
    looks for again.

    Args:
        database: one whose caches the writer has not filled.
        table: that was written to.
        data: the rows.

    Raises:
        CorruptStoreError: they are others, or cannot be read.
        StoreReadError: the storage does not answer.
    """
    look = partial(_check_once, database, table, data)
    repeat(look, lambda error: isinstance(error, CorruptStoreError), seconds=10.0, times=3, pause=0.01, longest=0.05)


def _check_once(database: Database, table: LanceTable, data: Any) -> None:
    stored = database.open(table.name)
    if stored.version < table.version or not _same(stored.take(np.arange(table.rows - len(data), table.rows), data.column_names), data):
        raise CorruptStoreError(
            f"Table {table.name!r}: the rows that are stored are not those that were written; restore its files from a backup."
        )


def _same(found: Any, wanted: Any) -> bool:
    """Return whether two Arrow tables have the same rows, in whatever order."""
    if found["row"] != wanted["row"]:
        found, wanted = found.sort_by("row"), wanted.sort_by("row")
    return all(found[name].combine_chunks() == wanted[name].combine_chunks() for name in wanted.column_names)
