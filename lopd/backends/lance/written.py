"""Whether what LanceDB reports as written can be read: it drops the error of a `write()` that fails, and leaves a file that is cut.

Rows that cannot are taken back, unless others rely on them.
"""

from functools import partial
from typing import Any

import numpy as np

from lopd.backends.lance.catalog import Catalog
from lopd.backends.lance.failures import is_conflict
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.table import BEGAN_EMPTY, Database, LanceTable
from lopd.backends.retry import repeat
from lopd.errors import CorruptStoreError

# A call that was killed may have scored a whole store: its rows are read in pieces.
_ROWS_AT_ONCE = 256


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


def check_unmarked(snapshot: Snapshot, catalog: Catalog, column: str | None, *, hold: bool) -> bool:
    """Return whether rows that no mark counted are to be marked, once they were read: their writer takes back what it cannot read, or was killed.

    Without any mark they are of an older lopd, or of the writer that made their table, and are taken as they are.

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
    # A mark that has risen since the refresh may be of other rows, for which these were taken back.
    marked = part.marked or catalog.least(part.table.name)
    if not marked and not (part.seed and part.table.name.startswith(BEGAN_EMPTY)):
        return True
    columns = () if column is None else (column,)
    rows = part.lines()["row"][marked:].astype(np.int64)
    for first in range(0, rows.size, _ROWS_AT_ONCE):
        snapshot.read(rows[first : first + _ROWS_AT_ONCE], columns, [name for name in columns if catalog.top_k(name)])
    if hold:
        hold_rows(part.table)
    return hold


def take_back(table: LanceTable, count: int) -> bool:
    """Return whether the last rows of a table's version were removed: not where what was committed since may rely on them.

    Nothing of their files is read.  The table moves to the latest version.
    """
    view = table.dataset()
    while all(_leaves_rows(view.read_transaction(version).operation) for version in range(table.version + 1, view.version + 1)):
        kept, rows = [fragment.metadata for fragment in view.get_fragments()], table.rows
        while kept and rows > table.rows - count:
            rows -= kept.pop().num_rows
        if rows != table.rows - count:
            break
        try:
            # Without retries it is the next version or nothing, and inserts that began before it fail.
            table.commit(view, "Overwrite", view.lance_schema, kept, retries=0)
        except Exception as error:
            if not is_conflict(error):
                raise
            view = table.dataset()
            continue
        table.refresh()
        return True
    return False


def _leaves_rows(operation: Any) -> bool:
    """Return whether a commit neither added rows nor holds any: a merge, a new column, or an insert whose number was taken."""
    kind, changes = type(operation).__name__, ("new_fragments", "updated_fragments", "removed_fragment_ids")
    return kind in {"Rewrite", "Merge", "Project"} or (kind == "Update" and not any(getattr(operation, name) for name in changes))


def hold_rows(table: LanceTable) -> None:
    """Commit nothing behind the rows of a table's version, after which none of them is taken back.

    Raises:
        CorruptStoreError: some were.
    """
    try:
        table.commit(None, "Append", [], retries=20)
    except Exception as error:
        if not is_conflict(error):
            raise
        raise CorruptStoreError(f"Table {table.name!r}: rows that were read were taken back by their writer; refresh the store.") from None


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
