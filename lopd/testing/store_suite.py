"""What a suite of stores needs of the store that is tested, and the clauses on threads, and on what cannot be scored or is not a log-prob."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from attrs import evolve

from lopd.errors import ConflictError, InvalidRecordError, MissingScoresError
from lopd.protocols import LogprobStore
from lopd.records.manifest import LABEL, RESIDUAL, Manifest
from lopd.records.parity import Parity
from lopd.records.rollouts import VIRTUAL_COLUMNS, Rollout, Scores
from lopd.records.rows import Rows
from lopd.testing.records import assert_same_rollout, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k


def assert_holds(store: LogprobStore, expected: Sequence[Rollout]) -> None:
    """Check that the store holds exactly these rollouts, in this order, however it is asked."""
    assert len(store) == len(expected)
    assert store.find([rollout.rollout_id for rollout in expected]).tolist() == list(range(len(expected)))
    pairs = [(rollout.prompt_ids.size, rollout.response_ids.size) for rollout in expected]
    np.testing.assert_array_equal(store.lengths(), np.array(pairs, np.int64).reshape(-1, 2))
    for column, name in VIRTUAL_COLUMNS.items():
        np.testing.assert_array_equal(store.scored(column), np.array([getattr(r, name) is not None for r in expected], bool))
    rows = store.read(range(len(expected)))
    assert isinstance(rows, Rows), "training works on columns: make them of records with `Rows.of`"
    for row, rollout in zip(rows, expected, strict=True):
        assert_same_rollout(row.rollout, rollout)
        assert row.scores == {}
    assert rows.generations.tolist() == [rollout.generation for rollout in expected]
    assert list(rows.content_hashes) == [rollout.content_hash for rollout in expected]


class StoreSuite:
    """How to make a store, and how to open it again; and a part of `StoreConformance`."""

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

    def test_names_of_columns_may_come_from_a_generator(self) -> None:
        store, items = self.filled()
        for column in ("teacher", "ref"):
            top = evolve(tiny_scores(items[1]), top_k=tiny_top_k(items[1].response_ids.size))
            store.append_scores(column, tiny_provenance(column, top_k=2), [top])
        asked = store.read([1], (name for name in ("ref", "teacher")), (name for name in ("teacher",)))  # type: ignore[arg-type]
        assert (list(asked.scores), list(asked.top_k)) == (["ref", "teacher"], ["teacher"])
        assert len(asked[0].scores["ref"]) == 2

    def test_another_thread_may_read_it(self) -> None:
        store, items = self.filled()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(assert_holds, store, items).result()
        assert_holds(store, items)

    def test_what_cannot_be_scored_is_kept_with_its_reason_until_it_is_scored(self) -> None:
        store, items = self.filled()
        assert dict(store.quarantined("teacher")) == {}
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[2])])
        store.quarantine("teacher", tiny_provenance(), {"r1": "too long", "r0": "", "r2": "scored already"})
        store.quarantine("teacher", tiny_provenance(), {"r0": "an id outside \u20ac\ud800"})
        for seen in (store, self.reopen(store), self.compact(store)):
            assert dict(seen.quarantined("teacher")) == {0: "an id outside \u20ac\ud800", 1: "too long"}
            assert dict(seen.quarantined("another")) == {}
            assert seen.scored("teacher").tolist() == [False, False, True]
            with pytest.raises(MissingScoresError, match="'r1'"):
                seen.read([1], columns=("teacher",))
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0])])
        for seen in (store, self.reopen(store)):
            assert dict(seen.quarantined("teacher")) == {1: "too long"}
            assert seen.scored("teacher").tolist() == [True, False, True]

    def test_what_cannot_be_scored_survives_many_appends_and_their_compaction(self) -> None:
        store, items = self.make(tiny_manifest()), [tiny_rollout(f"r{i}") for i in range(6)]
        for item in items:
            store.append([item])
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(item)] if item.rollout_id in {"r0", "r3", "r4"} else [])
        store.quarantine("teacher", tiny_provenance(), {"r5": "first", "r1": "too long"})
        store.quarantine("teacher", tiny_provenance(), {"r5": "second"})
        for _ in range(2):
            store = self.reopen(self.compact(store))
            assert dict(store.quarantined("teacher")) == {1: "too long", 5: "second"}
            assert store.scored("teacher").tolist() == [True, False, False, True, True, False]

    def test_the_first_append_says_how_the_engine_of_a_column_compared(self) -> None:
        store, items = self.filled()
        parity = Parity("engine", "truth", rollouts=1, tokens=2, mean=0.25, p99=0.5, max=0.5, bias=-0.25)
        for item, compared in zip(items, (parity, None, evolve(parity, mean=0.5)), strict=True):
            store.append_scores("teacher", evolve(tiny_provenance(), parity=compared), [tiny_scores(item)])
        for seen in (store, self.reopen(store)):
            assert seen.columns["teacher"].parity == parity

    def test_values_above_zero_are_for_residuals_and_labels(self) -> None:
        store, items = self.filled()
        signed = Scores.of(items[2], [0.5, -1.0, 7.0], signed=True)
        for mode in (RESIDUAL, LABEL):
            made = evolve(tiny_provenance(), logprobs_mode=mode)
            with pytest.raises(InvalidRecordError, match="signed=False, expected True"):
                store.append_scores(mode, made, [tiny_scores(items[2])])
            store.append_scores(mode, made, [signed])
        with pytest.raises(InvalidRecordError, match="signed=True, expected False"):
            store.append_scores("teacher", tiny_provenance(), [signed])
        read = self.reopen(store).read([2], (LABEL, RESIDUAL))[0]
        assert [values.tolist() for values in read.scores.values()] == [[0.5, -1.0, 7.0]] * 2

    def test_a_column_may_have_nothing_but_reasons_and_still_belongs_to_its_model(self) -> None:
        store, items = self.filled()
        store.quarantine("teacher", tiny_provenance(), {"r0": "too long"})
        again = self.reopen(self.compact(store))
        assert dict(again.columns) == {"teacher": tiny_provenance()}
        assert not again.scored("teacher").any()
        with pytest.raises(ConflictError, match="'teacher'"):
            store.append_scores("teacher", tiny_provenance("other"), [tiny_scores(items[1])])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[1])])
        with pytest.raises(ConflictError, match="'teacher'"):
            store.quarantine("teacher", tiny_provenance("other"), {"r2": "too long"})
        assert dict(self.reopen(store).quarantined("teacher")) == {0: "too long"}

    def test_a_refused_quarantine_changes_nothing(self) -> None:
        store, _ = self.filled()
        with pytest.raises(MissingScoresError, match="'nobody'"):
            store.quarantine("teacher", tiny_provenance(), {"r0": "too long", "nobody": "too long"})
        with pytest.raises(InvalidRecordError, match=r"'\.\./up'"):
            store.quarantine("../up", tiny_provenance(), {"r0": "too long"})
        store.quarantine("teacher", tiny_provenance(), {})
        for seen in (store, self.reopen(store)):
            assert (dict(seen.columns), dict(seen.quarantined("teacher"))) == ({}, {})
