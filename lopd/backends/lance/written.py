"""Whether what LanceDB reports as written can be read: it drops the error of a `write()` that fails, and leaves a file that is cut."""

from functools import partial
from typing import Any

import numpy as np

from lopd.backends.lance.catalog import Catalog
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.table import BEGAN_EMPTY, Database, LanceTable
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


def check_unmarked(snapshot: Snapshot, catalog: Catalog, column: str | None, *, hold: bool) -> None:
    """Read rows that no mark counts, before others are built on them: their writer takes back what it cannot read, or was killed.

    An older lopd made no marks; its rows are taken as they are.

    Args:
        snapshot: what the call saw.
        catalog: the store's.
        column: whose table; None for the rollouts.
        hold: see to it that they are not taken back either.

    Raises:
        CorruptStoreError: one cannot be read, or was taken back.
        StoreReadError: the storage does not answer.
    """
    part = snapshot.parts()[column]
    if part.table.rows > part.marked:
        part.marked = catalog.least(part.table.name)
    if part.table.rows <= part.marked or not (part.marked or part.table.name.startswith(BEGAN_EMPTY)):
        return
    columns = () if column is None else (column,)
    rows = part.lines()["row"][part.marked :].astype(np.int64)
    snapshot.read(rows, columns, [name for name in columns if catalog.top_k(name)])
    if hold and catalog.least(part.table.name) < part.table.rows:
        part.table.hold(part.table.rows)


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
