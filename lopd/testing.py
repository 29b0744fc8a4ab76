"""Conformance suites and Hypothesis strategies, for our implementations and other people's.

Subclass a suite in a test module, say how to make the thing, and pytest runs every clause of its protocol's contract:

    class TestMyStore(StoreConformance):
        def make(self, manifest): return MyStore(manifest)
        def reopen(self, store): return store
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopd.errors import ConflictError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.manifest import Manifest, ModelId, Provenance, SamplingParams, TokenizerId
from lopd.protocols import LogprobStore
from lopd.types import Rollout, Scores


def tiny_manifest(vocab_size: int = 300) -> Manifest:
    """A manifest of a made-up policy; 300 ids do not fit into a byte, which is a border worth crossing."""
    tokenizer = TokenizerId("vocab-hash", vocab_size, eos_id=1, bos_id=None, pad_id=0, template_hash="")
    return Manifest(tokenizer, ModelId("policy", "rev-p", "float32"), SamplingParams(max_new_tokens=8))


def tiny_provenance(name: str = "teacher") -> Provenance:
    """The provenance of a made-up model."""
    return Provenance(ModelId(name, f"rev-{name}", "float32"), "vocab-hash", "made-up 1.0")


def tiny_rollout(rollout_id: str, response: Any = (5, 6, 1), **fields: Any) -> Rollout:
    """A rollout with a one-token prompt; `fields` are those of `Rollout`."""
    values: dict[str, Any] = {"prompt_ids": [4], "loss_mask": [True] * len(response), "finish_reason": "stop"} | fields
    return Rollout(rollout_id=rollout_id, response_ids=response, **values)


def tiny_scores(rollout: Rollout, logprob: float = -1.0) -> Scores:
    """Scores with one value for every token."""
    return Scores.of(rollout, np.full(rollout.response_ids.size, logprob))


def _logprobs(length: int) -> st.SearchStrategy[list[float]]:
    # Certainty (0.0), the floor and the ugliest float32 are as likely as the rest.
    value = st.sampled_from([0.0, -100.0, -1e-45, -3.4e38]) | st.floats(min_value=-128.0, max_value=0.0, width=32)
    return st.lists(value, min_size=length, max_size=length)


@st.composite
def rollouts(draw: st.DrawFn, manifest: Manifest | None = None, ids: st.SearchStrategy[str] | None = None, max_tokens: int = 6) -> Rollout:
    """One legal rollout of any kind: short or long, masked or not, with behavior log-probs or without.

    Args:
        draw: given by Hypothesis.
        manifest: whose vocabulary bounds the token ids; `tiny_manifest()` if None.
        ids: rollout ids; any text if None.
        max_tokens: cap on the prompt and on the response.
    """
    token = st.integers(0, (manifest or tiny_manifest()).tokenizer.vocab_size - 1)
    response = draw(st.lists(token, min_size=1, max_size=max_tokens))
    length = len(response)
    mask = st.just([True] * length) | st.lists(st.booleans(), min_size=length, max_size=length)
    return Rollout(
        rollout_id=draw(st.text(max_size=8) if ids is None else ids),
        prompt_ids=draw(st.lists(token, min_size=1, max_size=max_tokens)),
        response_ids=response,
        loss_mask=draw(mask),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        behavior_logprobs=draw(st.none() | _logprobs(length)),
    )


@st.composite
def scores_for(draw: st.DrawFn, rollout: Rollout) -> Scores:
    """Legal scores of this rollout.

    Args:
        draw: given by Hypothesis.
        rollout: whose tokens were scored.
    """
    return Scores.of(rollout, draw(_logprobs(rollout.response_ids.size)), draw(st.integers(0, 2)))


def assert_same_rollout(left: Rollout, right: Rollout) -> None:
    """Every field is equal; an absent array equals only an absent one."""
    assert (left.rollout_id, left.finish_reason, left.content_hash) == (right.rollout_id, right.finish_reason, right.content_hash)
    for name in ("prompt_ids", "response_ids", "loss_mask", "behavior_logprobs"):
        mine, theirs = getattr(left, name), getattr(right, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype, name
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


def assert_holds(store: LogprobStore, expected: Sequence[Rollout]) -> None:
    """The store holds exactly these rollouts, in this order, however it is asked."""
    assert len(store) == len(expected)
    assert all(rollout.rollout_id in store for rollout in expected)
    pairs = [(rollout.prompt_ids.size, rollout.response_ids.size) for rollout in expected]
    np.testing.assert_array_equal(store.lengths(), np.array(pairs, np.int64).reshape(-1, 2))
    np.testing.assert_array_equal(store.scored("behavior"), np.array([r.behavior_logprobs is not None for r in expected], bool))
    for row, rollout in zip(store.read(range(len(expected))), expected, strict=True):
        assert_same_rollout(row.rollout, rollout)
        assert row.scores == {}


class StoreConformance:
    """Every clause of the `LogprobStore` contract, as one test each.  Subclass it, and supply `make` and `reopen`."""

    def make(self, manifest: Manifest) -> LogprobStore:
        """A new, empty store; called several times in one test."""
        raise NotImplementedError

    def reopen(self, store: LogprobStore) -> LogprobStore:
        """What a new process would see; the same object for a store that does not outlive one."""
        raise NotImplementedError

    def _filled(self, n: int = 3) -> tuple[LogprobStore, list[Rollout]]:
        store, items = self.make(tiny_manifest()), [tiny_rollout(f"r{i}", range(2, 3 + i)) for i in range(n)]
        store.append(items)
        return store, items

    def test_a_new_store_is_empty_and_says_its_manifest(self) -> None:
        store = self.make(tiny_manifest())
        assert_holds(store, [])
        assert store.lengths().dtype == np.int64
        assert store.scored("teacher").dtype == np.bool_
        assert (store.manifest, dict(store.columns), "r0" in store, 0 in store) == (tiny_manifest(), {}, False, False)

    def test_every_kind_of_rollout_comes_back_as_it_went_in(self) -> None:
        store, manifest = self.make(tiny_manifest()), tiny_manifest()
        kinds = [
            tiny_rollout("one token each", [299]),
            tiny_rollout("cut", finish_reason="length"),
            tiny_rollout("masked", loss_mask=[True, False, True]),
            tiny_rollout("nothing counts", loss_mask=[False] * 3),
            tiny_rollout("behavior", behavior_logprobs=[0.0, -1e-45, -100.0]),
            tiny_rollout("long", np.arange(2000) % manifest.tokenizer.vocab_size, prompt_ids=np.arange(299)),
            tiny_rollout("", [1]),
            tiny_rollout("\u4f60/\U0001f600\ud800", [1]),
        ]
        store.append(kinds)
        assert_holds(store, kinds)
        assert_holds(self.reopen(store), kinds)

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
        store, items = self._filled()
        store.append([tiny_rollout("a"), items[1], tiny_rollout("b")])
        assert [row.rollout.rollout_id for row in self.reopen(store).read(range(5))] == ["r0", "r1", "r2", "a", "b"]

    def test_read_gives_the_order_asked_and_an_index_may_repeat(self) -> None:
        store, items = self._filled()
        asked = [2, 0, 2, 1]
        for row, index in zip(store.read(asked), asked, strict=True):
            assert_same_rollout(row.rollout, items[index])
        assert store.read([]) == []

    @pytest.mark.parametrize("index", [3, -1])
    def test_a_row_outside_is_refused(self, index: int) -> None:
        store, _ = self._filled()
        with pytest.raises(NoSuchRowError):
            store.read([0, index])

    def test_appending_again_or_nothing_changes_nothing(self) -> None:
        store, items = self._filled()
        store.append(items)
        store.append([])
        store.append([tiny_rollout("twice"), tiny_rollout("twice")])
        assert_holds(self.reopen(store), [*items, tiny_rollout("twice")])

    def test_other_content_under_an_id_is_a_conflict_and_nothing_is_committed(self) -> None:
        store, items = self._filled()
        for call in ([tiny_rollout("new"), tiny_rollout("r1", [9])], [tiny_rollout("new"), tiny_rollout("new", [9])]):
            with pytest.raises(ConflictError, match=call[1].rollout_id):
                store.append(call)
        assert_holds(self.reopen(store), items)

    def test_a_token_outside_the_vocabulary_is_refused_and_named(self) -> None:
        store, items = self._filled()
        with pytest.raises(InvalidRecordError, match=r"'bad'.*response_ids\[1\] is 300"):
            store.append([tiny_rollout("new"), tiny_rollout("bad", [299, 300, 301])])
        assert_holds(self.reopen(store), items)

    def test_pain_15_resume_is_keyed_by_id_and_content_not_position(self) -> None:
        store, items = self._filled()
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[1], -1.0)])
        store = self.reopen(store)
        store.append([tiny_rollout("new"), *reversed(items)])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout, -2.0) for rollout in reversed(items)])
        assert_holds(store, [*items, tiny_rollout("new")])
        np.testing.assert_array_equal(store.scored("teacher"), [True, True, True, False])
        assert [row.scores["teacher"][0] for row in store.read([0, 1, 2], ("teacher",))] == [-2.0, -1.0, -2.0]

    def test_pain_05_a_score_is_bound_to_the_tokens_it_was_computed_on(self) -> None:
        store, items = self._filled()
        other = tiny_rollout("r1", [9, 9])
        with pytest.raises(ConflictError, match="r1"):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0]), tiny_scores(other)])
        assert not self.reopen(store).scored("teacher").any()
        assert dict(store.columns) == {}

    def test_pain_07_zero_is_a_log_probability_not_a_missing_value(self) -> None:
        store = self.make(tiny_manifest())
        certain, unscored = tiny_rollout("certain", behavior_logprobs=[0.0, 0.0, 0.0]), tiny_rollout("unscored")
        store.append([certain, unscored])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(certain, 0.0)])
        store = self.reopen(store)
        for column in ("teacher", "behavior"):
            np.testing.assert_array_equal(store.scored(column), [True, False])
            np.testing.assert_array_equal(store.read([0], (column,))[0].scores[column], np.zeros(3, np.float32))
            with pytest.raises(MissingScoresError, match="unscored"):
                store.read([0, 1], (column,))

    def test_scores_of_an_unknown_rollout_are_refused_and_nothing_is_committed(self) -> None:
        store, items = self._filled()
        with pytest.raises(MissingScoresError, match="nobody"):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0]), tiny_scores(tiny_rollout("nobody"))])
        assert not self.reopen(store).scored("teacher").any()

    def test_scores_of_another_length_are_refused(self) -> None:
        store, items = self._filled()
        with pytest.raises(InvalidRecordError, match="r2"):
            store.append_scores("teacher", tiny_provenance(), [Scores("r2", items[2].content_hash, [-1.0])])

    def test_a_column_belongs_to_one_model(self) -> None:
        store, items = self._filled()
        store.append_scores("teacher", tiny_provenance("A"), [tiny_scores(items[0])])
        another = tiny_provenance("B")
        for other in (another, evolve(tiny_provenance("A"), logprobs_mode="processed")):
            with pytest.raises(ConflictError, match="column 'teacher' was scored"):
                store.append_scores("teacher", other, [tiny_scores(items[1])])
        store.append_scores("second", another, [tiny_scores(items[1], -3.0)])
        store = self.reopen(store)
        assert dict(store.columns) == {"teacher": tiny_provenance("A"), "second": another}
        np.testing.assert_array_equal(store.scored("second"), [False, True, False])

    def test_scores_come_with_the_columns_asked_for_and_no_others(self) -> None:
        store, items = self._filled()
        for column, logprob in (("teacher", -1.0), ("ref", -2.0)):
            store.append_scores(column, tiny_provenance(column), [tiny_scores(rollout, logprob) for rollout in items])
        row = store.read([1], ("ref", "teacher"))[0]
        assert {column: values.tolist() for column, values in row.scores.items()} == {"ref": [-2.0] * 2, "teacher": [-1.0] * 2}
        assert all(values.dtype == np.float32 for values in row.scores.values())
        assert store.read([1], ("ref",))[0].scores.keys() == {"ref"}

    def test_a_column_that_is_not_there_covers_nothing_and_cannot_be_read(self) -> None:
        store, _ = self._filled()
        store.append_scores("empty", tiny_provenance(), [])
        for column in ("teacher", "empty"):
            assert not store.scored(column).any()
            with pytest.raises(MissingScoresError, match=column):
                store.read([0], (column,))
        assert "empty" not in store.columns

    def test_scores_already_there_are_skipped(self) -> None:
        store, items = self._filled()
        for logprob in (-1.0, -2.0):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[0], logprob), tiny_scores(items[0], -3.0)])
        assert self.reopen(store).read([0], ("teacher",))[0].scores["teacher"].tolist() == [-1.0]

    @pytest.mark.parametrize("column", ["", "a/b", "..", ".hidden", "a b", "a\n", "zarr.json", "behavior", "\u00e4"])
    def test_a_column_name_is_plain_and_behavior_is_taken(self, column: str) -> None:
        store, items = self._filled()
        with pytest.raises(InvalidRecordError):
            store.append_scores(column, tiny_provenance(), [tiny_scores(items[0])])
