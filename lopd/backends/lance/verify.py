"""Every row of a store on LanceDB, read and compared with its checksums."""

from collections.abc import Iterator

import numpy as np

from lopd.backends.lance.catalog import Catalog
from lopd.backends.lance.snapshot import Snapshot
from lopd.errors import LopdError

_ROWS_AT_ONCE = 256


def problems(catalog: Catalog, snapshot: Snapshot) -> Iterator[str]:
    """One sentence for each file of the catalog, and for each row, that cannot be read or is not what was committed."""
    for path in sorted(catalog.state.seen):
        try:
            catalog.document(path)
        except LopdError as error:
            yield str(error)
    for column, part in snapshot.parts().items():
        # Not what was read before, but what is stored now.
        part.forget()
        try:
            rows = part.lines()["row"]
        except LopdError as error:
            yield str(error)
            continue
        columns = () if column is None else (column,)
        ranked = tuple(name for name in columns if catalog.top_k(name))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield from _problems_of(snapshot, rows[start : start + _ROWS_AT_ONCE], columns, ranked)


def _problems_of(snapshot: Snapshot, rows: np.ndarray, columns: tuple[str, ...], ranked: tuple[str, ...]) -> Iterator[str]:
    """Of many rows at once if they are sound, and else of one after the other; the same sentence once."""
    try:
        snapshot.read(rows, columns, ranked)
    except LopdError as error:
        if len(rows) == 1:
            yield str(error)
        else:
            yield from dict.fromkeys(
                problem for row in np.split(rows, len(rows)) for problem in _problems_of(snapshot, row, columns, ranked)
            )
