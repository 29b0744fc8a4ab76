"""Lance stores with something in them."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lancedb
import pytest
from forked import FORKS
from zarr_stores import fill, place

from lopd.backends.lance.store import LanceStore
from lopd.testing import tiny_manifest


def reopened(store: Any, storage_options: dict[str, Any] | None = None) -> LanceStore:
    """Open the store as a new process would."""
    assert isinstance(store, LanceStore)
    return LanceStore.open(store._files.url, store.manifest, storage_options=storage_options)


@pytest.fixture
def filled(tmp_path: Path) -> LanceStore:
    """Return a store of two commits of rollouts of all kinds, and one of scores with top-k."""
    return fill(LanceStore.create(tmp_path / "run.lance", tiny_manifest()))


def table_of(store: LanceStore, name: str) -> Any:
    """Open LanceDB's own table: `rollouts`, or `scores.<column>`."""
    database = lancedb.connect(place(store))
    (found,) = [path.stem for path in place(store).glob(f"{name}-*.lance")]
    return database.open_table(found)


def started(work: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """Start a process that inherits nothing of ours, with a pipe to it."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=work, args=(*args, theirs), daemon=True)
    process.start()
    return process, ours
