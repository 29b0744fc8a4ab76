"""The suite of stores against stores that are wrong on purpose."""

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from suite_cases import broken_clauses, clauses

from lopd.backends.memory_store import MemoryStore
from lopd.errors import ConflictError
from lopd.protocols import LogprobStore
from lopd.records import Manifest, Provenance, Rollout, ScoredRollout, Scores
from lopd.testing import StoreConformance


class SkipsEmptyCalls(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        if scores:
            super().append_scores(column, provenance, scores)


class BeginsColumnsWithNothing(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        super().append_scores(column, provenance, scores)
        self._columns.setdefault(column, provenance)


class ForgetsWhoseColumnItIs(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        super().append_scores(column, self._columns.get(column, provenance), scores)


class ForgetsWhoGaveReasons(MemoryStore):
    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        begun = column in self._columns
        super().quarantine(column, provenance, reasons)
        if not begun:
            self._columns.pop(column, None)


class KeepsTheLatestScores(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        super().append_scores(column, provenance, scores)
        self._scores.setdefault(column, {}).update({self._rows[score.rollout_id]: score for score in scores})


class CommitsOneByOne(MemoryStore):
    def append(self, rollouts: Sequence[Rollout], /) -> None:
        for rollout in rollouts:
            super().append([rollout])


class ScoresOneByOne(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        for part in [[score] for score in scores] or [[]]:
            super().append_scores(column, provenance, part)


class KeepsWhatCameFirst(MemoryStore):
    def append(self, rollouts: Sequence[Rollout], /) -> None:
        super().append([rollout for rollout in rollouts if rollout.rollout_id not in self._rows])


class ReplacesOnAppend(MemoryStore):
    def append(self, rollouts: Sequence[Rollout], /) -> None:
        super().append(rollouts)
        for rollout in rollouts:
            self._rollouts[self._rows[rollout.rollout_id]] = rollout


class KeepsSixteenBits(MemoryStore):
    def append(self, rollouts: Sequence[Rollout], /) -> None:
        super().append([evolve(r, prompt_ids=r.prompt_ids & 0xFFFF, response_ids=r.response_ids & 0xFFFF) for r in rollouts])


class KeepsSixteenBitsOfCandidates(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        cut = [s if s.top_k is None else evolve(s, top_k=evolve(s.top_k, ids=s.top_k.ids & 0xFFFF)) for s in scores]
        super().append_scores(column, provenance, cut)


class BelievesThePosition(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        here = [evolve(s, rollout_id=r.rollout_id) for s, r in zip(scores, self._rollouts, strict=False)]
        super().append_scores(column, provenance, here)


class BelievesTheName(MemoryStore):
    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        rows = [self._rollouts[self._rows[s.rollout_id]] if s.rollout_id in self._rows else None for s in scores]
        super().append_scores(
            column, provenance, [s if r is None else evolve(s, content_hash=r.content_hash) for s, r in zip(scores, rows, strict=True)]
        )


class TakesZeroForNothing(MemoryStore):
    def scored(self, column: str, /) -> Any:
        there = super().scored(column)
        for row in np.flatnonzero(there):
            there[row] = self._logprobs(int(row), self._rollouts[row], column).any()
        return there


class CountsFromTheEnd(MemoryStore):
    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> list[ScoredRollout]:
        return super().read([i + len(self) if i < 0 else i for i in indices], columns, top_k)


class ReadsInRowOrder(MemoryStore):
    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> list[ScoredRollout]:
        return super().read(sorted(indices), columns, top_k)


class LosesReasons(MemoryStore):
    def quarantined(self, column: str, /) -> Mapping[int, str]:
        return dict(list(super().quarantined(column).items())[:1])


class BeginsARoundTwice(MemoryStore):
    def begin_generation(self, generation: int, policy: Any, /) -> None:
        try:
            super().begin_generation(generation, policy)
        except ConflictError:
            self._generations[generation] = policy


class BelongsToItsThread(MemoryStore):
    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._thread = get_ident()

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> list[ScoredRollout]:
        assert get_ident() == self._thread, "a sqlite3.Connection refuses it too"
        return super().read(indices, columns, top_k)


class GivesRecords(MemoryStore):
    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Any:
        return list(super().read(indices, columns, top_k))


class GivesRecordsOfScores(MemoryStore):
    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Any:
        rows = super().read(indices, columns, top_k)
        return list(rows) if columns else rows


class GoesOverNamesFirst(MemoryStore):
    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Any:
        assert all(isinstance(name, str) for name in (*columns, *top_k))
        return super().read(indices, columns, top_k)


class GivesRoundsOfOthers(MemoryStore):
    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Any:
        rows = super().read(indices, columns, top_k)
        return evolve(rows, generations=np.append(rows.generations, 7))


LARGE_IDS = "test_ids_that_need_more_than_16_bits_come_back_as_they_went_in"
EMPTY_CALL = "test_a_call_without_scores_commits_nothing_and_is_still_refused_if_the_column_is_of_another_model"
WRONG_STORES: dict[type[MemoryStore], str] = {
    SkipsEmptyCalls: EMPTY_CALL,
    BeginsColumnsWithNothing: EMPTY_CALL,
    ForgetsWhoGaveReasons: EMPTY_CALL,
    ForgetsWhoseColumnItIs: "test_a_column_belongs_to_one_model",
    KeepsTheLatestScores: "test_scores_already_there_are_skipped",
    CommitsOneByOne: "test_other_content_under_an_id_is_a_conflict_and_nothing_is_committed",
    ScoresOneByOne: "test_scores_of_an_unknown_rollout_are_refused_and_nothing_is_committed",
    KeepsWhatCameFirst: "test_other_content_under_an_id_is_a_conflict_and_nothing_is_committed",
    ReplacesOnAppend: "test_appending_again_or_nothing_changes_nothing",
    KeepsSixteenBits: LARGE_IDS,
    KeepsSixteenBitsOfCandidates: LARGE_IDS,
    BelievesThePosition: "test_pain_15_resume_is_keyed_by_id_and_content_not_position",
    BelievesTheName: "test_pain_05_a_score_is_bound_to_the_tokens_it_was_computed_on",
    TakesZeroForNothing: "test_pain_07_zero_is_a_log_probability_not_a_missing_value",
    CountsFromTheEnd: "test_a_row_outside_is_refused",
    ReadsInRowOrder: "test_read_gives_the_order_asked_and_an_index_may_repeat",
    LosesReasons: "test_what_cannot_be_scored_is_kept_with_its_reason_until_it_is_scored",
    BeginsARoundTwice: "test_a_round_of_sampling_is_begun_with_its_policy_and_then_takes_rollouts",
    GivesRecords: "test_every_kind_of_rollout_comes_back_as_it_went_in",
    GivesRecordsOfScores: "test_scores_come_with_the_columns_asked_for_and_no_others",
    GoesOverNamesFirst: "test_names_of_columns_may_come_from_a_generator",
    GivesRoundsOfOthers: "test_every_kind_of_rollout_comes_back_as_it_went_in",
    BelongsToItsThread: "test_another_thread_may_read_it",
}


class StoreOfAKind(StoreConformance):
    kind: type[MemoryStore] = MemoryStore

    def make(self, manifest: Manifest) -> LogprobStore:
        return self.kind(manifest)

    def reopen(self, store: LogprobStore) -> LogprobStore:
        return store


def test_the_suite_accepts_what_is_right() -> None:
    left_out: list[str] = []
    assert broken_clauses(StoreOfAKind(), left_out) == []
    assert left_out == []


@pytest.mark.parametrize(("kind", "clause"), WRONG_STORES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_suite_rejects_a_store_that_is_wrong(kind: type[MemoryStore], clause: str) -> None:
    suite = StoreOfAKind()
    suite.kind = kind
    assert clause in clauses(suite)
    assert clause in broken_clauses(suite)


def test_only_the_clause_on_empty_calls_notices_a_store_that_does_not_look_at_them() -> None:
    suite = StoreOfAKind()
    suite.kind = SkipsEmptyCalls
    assert broken_clauses(suite) == [EMPTY_CALL]
