"""What a suite of stores needs of the store that is tested."""

from collections.abc import Sequence

import numpy as np

from lopd.protocols import LogprobStore
from lopd.records.manifest import Manifest
from lopd.records.rollouts import VIRTUAL_COLUMNS, Rollout
from lopd.testing.records import assert_same_rollout, tiny_manifest, tiny_rollout


def assert_holds(store: LogprobStore, expected: Sequence[Rollout]) -> None:
    """Check that the store holds exactly these rollouts, in this order, however it is asked."""
    assert len(store) == len(expected)
    assert store.find([rollout.rollout_id for rollout in expected]).tolist() == list(range(len(expected)))
    pairs = [(rollout.prompt_ids.size, rollout.response_ids.size) for rollout in expected]
    np.testing.assert_array_equal(store.lengths(), np.array(pairs, np.int64).reshape(-1, 2))
    for column, name in VIRTUAL_COLUMNS.items():
        np.testing.assert_array_equal(store.scored(column), np.array([getattr(r, name) is not None for r in expected], bool))
    for row, rollout in zip(store.read(range(len(expected))), expected, strict=True):
        assert_same_rollout(row.rollout, rollout)
        assert row.scores == {}


class StoreSuite:
    """How to make a store, and how to open it again."""

    def make(self, manifest: Manifest) -> LogprobStore:
        """Return a new, empty store; called several times in one test."""
        raise NotImplementedError

    def reopen(self, store: LogprobStore) -> LogprobStore:
        """Return what a new process would see; the same object for a store that does not outlive one."""
        raise NotImplementedError

    def compact(self, store: LogprobStore) -> LogprobStore:
        """Merge small appends into large ones, if the store can; gives a store that sees the result."""
        return store

    def filled(self, n: int = 3) -> tuple[LogprobStore, list[Rollout]]:
        """Return a new store, and the rollouts that are in it."""
        store, items = self.make(tiny_manifest()), [tiny_rollout(f"r{i}", range(2, 3 + i)) for i in range(n)]
        store.append(items)
        return store, items
