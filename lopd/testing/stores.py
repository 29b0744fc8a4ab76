"""The contract of a `LogprobStore`, one test a clause."""

import numpy as np
import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopd.errors import ConflictError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.records.identity import ModelId
from lopd.records.rollouts import Rollout, Scores
from lopd.records.support import TopK
from lopd.testing.records import (
    assert_same_rollout,
    assert_same_top_k,
    rollouts,
    scores_for,
    tiny_manifest,
    tiny_provenance,
    tiny_rollout,
    tiny_scores,
    tiny_top_k,
)
from lopd.testing.store_suite import StoreSuite, assert_holds


class StoreConformance(StoreSuite):
    """Every clause of the `LogprobStore` contract, as one test each.  Subclass it, and supply `make` and `reopen`."""

    def test_a_new_store_is_empty_and_says_its_manifest(self) -> None:
        store = self.make(tiny_manifest())
        assert_holds(store, [])
        assert store.lengths().dtype == np.int64
        assert store.scored("teacher").dtype == np.bool_
        assert (store.manifest, dict(store.columns)) == (tiny_manifest(), {})
        assert dict(store.generations) == {0: tiny_manifest().policy}
        assert store.find(["r0", ""]).tolist() == [-1, -1]
        assert store.find([]).dtype == np.int64

    def test_every_kind_of_rollout_comes_back_as_it_went_in(self) -> None:
        store, manifest = self.make(tiny_manifest()), tiny_manifest()
        kinds = [
            tiny_rollout("one token each", [299]),
            tiny_rollout("cut", finish_reason="length"),
            tiny_rollout("masked", loss_mask=[True, False, True]),
            tiny_rollout("nothing counts", loss_mask=[False] * 3),
            tiny_rollout("behavior", behavior_logprobs=[0.0, -1e-45, -100.0]),
            tiny_rollout("sampler", sampler_logprobs=[-0.25, 0.0, -100.0]),
            tiny_rollout("both", behavior_logprobs=[-1.0, -2.0, -3.0], sampler_logprobs=[-0.5, -1.5, -2.5]),
            tiny_rollout("long", np.arange(2000) % manifest.tokenizer.vocab_size, prompt_ids=np.arange(299)),
            tiny_rollout("", [1]),
            tiny_rollout("\u4f60/\U0001f600\ud800", [1]),
        ]
        store.append(kinds)
        assert_holds(store, kinds)
        assert_holds(self.reopen(store), kinds)

    def test_ids_that_need_more_than_16_bits_come_back_as_they_went_in(self) -> None:
        store, ids, top_k = self.make(tiny_manifest(200_000)), [65_535, 65_536, 199_999], tiny_top_k(3, start=199_994)
        large = tiny_rollout("large", ids, prompt_ids=ids)
        store.append([large])
        store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(large), top_k=top_k)])
        assert_holds(store := self.reopen(store), [large])
        assert_same_top_k(store.read([0], top_k=("teacher",))[0].top_k["teacher"], top_k)

    def test_any_rollouts_and_scores_come_back_as_they_went_in(self) -> None:
        # @given stays inside: on a method that subclasses share, Hypothesis would see one test with many executors.
        @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(items=st.lists(rollouts(), min_size=1, max_size=4, unique_by=lambda rollout: rollout.rollout_id), data=st.data())
        def check(items: list[Rollout], data: st.DataObject) -> None:
            store, scores = self.make(tiny_manifest()), [data.draw(scores_for(rollout)) for rollout in items]
            store.append(items)
            store.append_scores("teacher", tiny_provenance(), scores)
            again = self.reopen(store)
            assert_holds(again, items)
            for row, score in zip(again.read(range(len(items)), ("teacher",)), scores, strict=True):
                np.testing.assert_array_equal(row.scores["teacher"], score.logprobs)

        check()

    def test_rows_are_in_the_order_of_appends(self) -> None:
        store, items = self.filled()
        store.append([tiny_rollout("a"), items[1], tiny_rollout("b")])
        assert [row.rollout.rollout_id for row in self.reopen(store).read(range(5))] == ["r0", "r1", "r2", "a", "b"]

    def test_read_gives_the_order_asked_and_an_index_may_repeat(self) -> None:
        store, items = self.filled()
        asked = [2, 0, 2, 1]
        for row, index in zip(store.read(asked), asked, strict=True):
            assert_same_rollout(row.rollout, items[index])
        assert len(store.read([])) == 0

    @pytest.mark.parametrize("index", [3, -1])
    def test_a_row_outside_is_refused(self, index: int) -> None:
        store, _ = self.filled()
        with pytest.raises(NoSuchRowError):
            store.read([0, index])

    def test_appending_again_or_nothing_changes_nothing(self) -> None:
        store, items = self.filled()
        first = [items[0], tiny_rollout("twice", behavior_logprobs=[-1.0] * 3)]
        # what came first stays, whatever is said of the same tokens later
        later = [evolve(r, behavior_logprobs=[-2.0] * r.response_ids.size, finish_reason="length") for r in first]
        for call in (items, [], [first[1], later[1]], later):
            store.append(call)
        assert_holds(self.reopen(store), [*items, first[1]])

    def test_other_content_under_an_id_is_a_conflict_and_nothing_is_committed(self) -> None:
        store, items = self.filled()
        for call in ([tiny_rollout("new"), tiny_rollout("r1", [9])], [tiny_rollout("new"), tiny_rollout("new", [9])]):
            with pytest.raises(ConflictError, match=call[1].rollout_id):
                store.append(call)
        assert_holds(self.reopen(store), items)

    def test_a_token_outside_the_vocabulary_is_refused_and_named(self) -> None:
        store, items = self.filled()
        with pytest.raises(InvalidRecordError, match=r"'bad'.*response_ids\[1\] is 300"):
            store.append([tiny_rollout("new"), tiny_rollout("bad", [299, 300, 301])])
        assert_holds(self.reopen(store), items)

    def test_rollouts_are_found_by_id_in_the_order_asked(self) -> None:
        store, _ = self.filled()
        assert self.reopen(store).find(["r2", "nobody", "r0", "r2"]).tolist() == [2, -1, 0, 2]

    def test_a_round_of_sampling_is_begun_with_its_policy_and_then_takes_rollouts(self) -> None:
        store, items = self.filled()
        later, policy = tiny_rollout("later", generation=3), ModelId("policy", "rev-3", "float32")
        with pytest.raises(InvalidRecordError, match=r"'later'.*generation is 3"):
            store.append([tiny_rollout("now"), later])
        assert_holds(self.reopen(store), items)
        for _ in range(2):
            store.begin_generation(3, policy)
            store.append([later])
        with pytest.raises(ConflictError, match="generation 3"):
            store.begin_generation(3, ModelId("policy", "rev-4", "float32"))
        with pytest.raises(ConflictError, match="generation 0"):
            store.begin_generation(0, policy)
        for number in (-1, 1 << 60, True, 4.0):
            with pytest.raises(InvalidRecordError, match=f"generation is {number}"):
                store.begin_generation(number, policy)  # type: ignore[arg-type]
        store = self.reopen(store)
        assert dict(store.generations) == {0: tiny_manifest().policy, 3: policy}
        assert_holds(store, [*items, later])

    def test_a_column_may_keep_the_most_likely_tokens(self) -> None:
        store, items = self.filled()
        column = tiny_provenance(top_k=3, drawn=1)
        scores = [evolve(tiny_scores(r), top_k=tiny_top_k(r.response_ids.size, start=i, drawn=1)) for i, r in enumerate(items[:2])]
        store.append_scores("teacher", column, scores)
        store.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[1], -2.0)])
        store = self.reopen(store)
        assert dict(store.columns) == {"teacher": column, "ref": tiny_provenance("ref")}
        row = store.read([1], ("teacher", "ref"), top_k=("teacher",))[0]
        assert row.scores["teacher"].tolist() == [-1.0] * 2
        assert row.top_k.keys() == {"teacher"}
        for i in (1, 0):
            top_k = scores[i].top_k
            assert top_k is not None
            assert_same_top_k(store.read([i], top_k=("teacher",))[0].top_k["teacher"], top_k)
        assert store.read([1], ("teacher",))[0].top_k == {}
        for wanted, row_number in (("ref", 1), ("behavior", 1), ("behavior/sampler", 1), ("nothing", 1), ("teacher", 2)):
            with pytest.raises(MissingScoresError):
                store.read([row_number], top_k=(wanted,))

    def test_scores_with_another_top_k_than_their_provenance_says_are_refused(self) -> None:
        store, items = self.filled()
        plain, ranked = tiny_scores(items[1]), evolve(tiny_scores(items[1]), top_k=tiny_top_k(2))
        outside = evolve(plain, top_k=TopK([[299], [300]], [[-0.5]] * 2, [1 - np.exp(-0.5)] * 2))
        for score, k in ((plain, 2), (ranked, 0), (ranked, 3), (outside, 1)):
            with pytest.raises(InvalidRecordError, match="'r1'"):
                store.append_scores("teacher", tiny_provenance(top_k=k), [score])
        assert not self.reopen(store).scored("teacher").any()

    def test_compaction_changes_nothing_that_can_be_read(self) -> None:
        store, items = self.filled(1)
        policy = ModelId("policy", "rev-1", "float32")
        store.begin_generation(1, policy)
        for i in range(1, 6):
            reported = {4: "behavior_logprobs", 5: "sampler_logprobs"}
            kind = {"loss_mask": [True, False, True]} if i == 2 else {reported[i]: [-0.5] * 3} if i in reported else {}
            items.append(tiny_rollout(f"r{i}", generation=i % 2, **kind))
            store.append(items[-1:])
        for i in (4, 0, 3, 5):
            store.append_scores(
                "teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(items[i], -i), top_k=tiny_top_k(items[i].response_ids.size))]
            )
        for _ in range(2):
            store = self.reopen(self.compact(store))
            assert_holds(store, items)
            assert dict(store.generations) == {0: tiny_manifest().policy, 1: policy}
            np.testing.assert_array_equal(store.scored("teacher"), [True, False, False, True, True, True])
            for row, i in zip(store.read([5, 0, 4, 3], ("teacher",), top_k=("teacher",)), (5, 0, 4, 3), strict=True):
                assert row.scores["teacher"].tolist() == [-i] * items[i].response_ids.size
                assert_same_top_k(row.top_k["teacher"], tiny_top_k(items[i].response_ids.size))
        store.append([tiny_rollout("after")])
        store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(items[1], -7.0), top_k=tiny_top_k(3))])
        assert_holds(self.reopen(store), [*items, tiny_rollout("after")])
        assert self.reopen(store).read([1], ("teacher",))[0].scores["teacher"].tolist() == [-7.0] * 3

    def test_pain_15_resume_is_keyed_by_id_and_content_not_position(self) -> None:
        store, items = self.filled()
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[1], -1.0)])
        store = self.reopen(store)
        store.append([tiny_rollout("new"), *reversed(items)])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout, -2.0) for rollout in reversed(items)])
        assert_holds(store, [*items, tiny_rollout("new")])
        np.testing.assert_array_equal(store.scored("teacher"), [True, True, True, False])
        assert [row.scores["teacher"][0] for row in store.read([0, 1, 2], ("teacher",))] == [-2.0, -1.0, -2.0]

    def test_pain_05_a_score_is_bound_to_the_tokens_it_was_computed_on(self) -> None:
        store, items = self.filled()
        other = tiny_rollout("r1", [9, 9])
        with pytest.raises(ConflictError, match="r1"):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0]), tiny_scores(other)])
        assert not self.reopen(store).scored("teacher").any()
        assert dict(store.columns) == {}

    def test_pain_07_zero_is_a_log_probability_not_a_missing_value(self) -> None:
        store = self.make(tiny_manifest())
        certain = tiny_rollout("certain", behavior_logprobs=[0.0, 0.0, 0.0], sampler_logprobs=[0.0, 0.0, 0.0])
        unscored = tiny_rollout("unscored")
        store.append([certain, unscored])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(certain, 0.0)])
        store = self.reopen(store)
        for column in ("teacher", "behavior", "behavior/sampler"):
            np.testing.assert_array_equal(store.scored(column), [True, False])
            np.testing.assert_array_equal(store.read([0], (column,))[0].scores[column], np.zeros(3, np.float32))
            with pytest.raises(MissingScoresError, match="unscored"):
                store.read([0, 1], (column,))

    def test_scores_of_an_unknown_rollout_are_refused_and_nothing_is_committed(self) -> None:
        store, items = self.filled()
        with pytest.raises(MissingScoresError, match="nobody"):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0]), tiny_scores(tiny_rollout("nobody"))])
        assert not self.reopen(store).scored("teacher").any()

    def test_scores_of_another_length_are_refused(self) -> None:
        store, items = self.filled()
        with pytest.raises(InvalidRecordError, match="r2"):
            store.append_scores("teacher", tiny_provenance(), [Scores("r2", items[2].content_hash, [-1.0])])

    def test_a_column_belongs_to_one_model(self) -> None:
        store, items = self.filled()
        store.append_scores("teacher", tiny_provenance("A"), [tiny_scores(items[0])])
        another = tiny_provenance("B")
        for other in (another, evolve(tiny_provenance("A"), logprobs_mode="processed")):
            with pytest.raises(ConflictError, match="column 'teacher' was scored"):
                store.append_scores("teacher", other, [tiny_scores(items[1])])
        store.append_scores("second", another, [tiny_scores(items[1], -3.0)])
        store = self.reopen(store)
        assert dict(store.columns) == {"teacher": tiny_provenance("A"), "second": another}
        np.testing.assert_array_equal(store.scored("second"), [False, True, False])

    def test_a_call_without_scores_commits_nothing_and_is_still_refused_if_the_column_is_of_another_model(self) -> None:
        store, items = self.filled()
        store.append_scores("teacher", tiny_provenance("A"), [])
        store.append_scores("teacher", tiny_provenance("B"), [])
        assert dict(self.reopen(store).columns) == {}, "nothing was committed, so the column is still free"
        store.append_scores("teacher", tiny_provenance("A"), [tiny_scores(items[0])])
        store.quarantine("reasons", tiny_provenance("A"), {"r0": "too long"})
        for column in ("teacher", "reasons"):
            store.append_scores(column, tiny_provenance("A"), [])
            with pytest.raises(ConflictError, match=f"column '{column}' was scored"):
                store.append_scores(column, tiny_provenance("B"), [])
        for seen in (store, self.reopen(store)):
            assert dict(seen.columns) == {"teacher": tiny_provenance("A"), "reasons": tiny_provenance("A")}
            assert seen.scored("teacher").tolist() == [True, False, False]
            assert dict(seen.quarantined("reasons")) == {0: "too long"}

    def test_scores_come_with_the_columns_asked_for_and_no_others(self) -> None:
        store, items = self.filled()
        for column, logprob in (("teacher", -1.0), ("ref", -2.0)):
            store.append_scores(column, tiny_provenance(column), [tiny_scores(rollout, logprob) for rollout in items])
        rows = store.read([1], ("ref", "teacher"))
        assert rows.named(teacher="ref").scores["teacher"].tolist() == [-2.0] * 2
        row = rows[0]
        assert {column: values.tolist() for column, values in row.scores.items()} == {"ref": [-2.0] * 2, "teacher": [-1.0] * 2}
        assert all(values.dtype == np.float32 for values in row.scores.values())
        assert store.read([1], ("ref",))[0].scores.keys() == {"ref"}

    def test_a_column_that_is_not_there_covers_nothing_and_cannot_be_read(self) -> None:
        store, _ = self.filled()
        store.append_scores("empty", tiny_provenance(), [])
        for column in ("teacher", "empty"):
            assert not store.scored(column).any()
            with pytest.raises(MissingScoresError, match=column):
                store.read([0], (column,))
        assert "empty" not in store.columns

    def test_scores_already_there_are_skipped(self) -> None:
        store, items = self.filled()
        for logprob in (-1.0, -2.0):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0], logprob), tiny_scores(items[0], -3.0)])
        assert self.reopen(store).read([0], ("teacher",))[0].scores["teacher"].tolist() == [-1.0]

    @pytest.mark.parametrize("column", ["", "a/b", "..", ".hidden", "a b", "a\n", "zarr.json", "behavior", "behavior/sampler", "\u00e4"])
    def test_a_column_name_is_plain_and_behavior_is_taken(self, column: str) -> None:
        store, items = self.filled()
        with pytest.raises(InvalidRecordError):
            store.append_scores(column, tiny_provenance(), [tiny_scores(items[0])])
