"""Rollouts that cannot be scored: put in quarantine, counted, bounded, and left out of training."""

import threading

import numpy as np
import pytest
from attrs import evolve
from small_runs import Bar, Interrupted, Refusing, Stopping, make_store, names, reopened, source, teacher_model  # noqa: F401

from lopd import batches, collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines.hf import HFScorer
from lopd.errors import EngineError, InvalidRecordError, MissingScoresError, QuarantineWarning, ScorerError
from lopd.records import Lineage, Prompt, Rollout
from lopd.verbs import ScoringReport
from lopd.verbs.asking import bounded, isolate

pytestmark = pytest.mark.filterwarnings("ignore:.*of its advantages are below:lopd.errors.AdvantageWarning")  # the models are random


def rows_by_length(store):
    return np.argsort(store.lengths().sum(axis=1), kind="stable")


def test_a_rollout_that_cannot_be_scored_is_put_in_quarantine_and_the_rest_goes_on(
    source, prompts, teacher_model, tokenizer, make_store, tmp_path
):
    store, scorer, bar = make_store(source.manifest), HFScorer(teacher_model, tokenizer), Bar()
    collect_rollouts(source, prompts, store)
    rows = rows_by_length(store)[[4, 7]].tolist()
    bad = names(store, rows)
    with pytest.warns(QuarantineWarning, match=r"2 rollouts are without scores in quarantine.*logprobs\[0\] is nan"):
        report = score_rollouts(store, Refusing(scorer, bad), rollouts_per_batch=3, progress=bar)
    assert set(report.refused) == set(bad)
    assert (report.rollouts, [told[1:] for told in bar.told if told[0] == "advance"][1][::2]) == (12, (2, 1))
    store = reopened(store, tmp_path)
    assert set(np.flatnonzero(~store.scored("teacher"))) == set(rows)
    assert {row: reason.partition(":")[0] for row, reason in store.quarantined("teacher").items()} == {
        row: f"Rollout {name!r}" for row, name in zip(rows, bad, strict=True)
    }
    again = Refusing(scorer, bad)
    with pytest.warns(QuarantineWarning, match="2 rollouts are without scores.*retry_quarantined"):
        assert score_rollouts(store, again) == ScoringReport(skipped=2), "what is in quarantine is not tried again"
    assert again.asked == []
    assert score_rollouts(store, scorer, retry_quarantined=True).rollouts == 2
    assert (store.scored("teacher").all(), dict(store.quarantined("teacher"))) == (True, {})


def test_training_leaves_out_what_is_in_quarantine_and_says_so_but_not_what_was_never_tried(
    source, prompts, teacher_model, tokenizer, make_store
):
    store, scorer = make_store(evolve(source.manifest, sft_teacher=HFScorer(teacher_model, tokenizer).provenance.model)), None
    scorer = HFScorer(teacher_model, tokenizer)
    collect_rollouts(evolve(source, lineage=Lineage(scorer.provenance.model)), prompts, store)
    bad = names(store, [5])
    with pytest.warns(QuarantineWarning):
        score_rollouts(store, Refusing(scorer, bad))
    with pytest.warns(QuarantineWarning, match=r"1 of 14 rollouts could not be scored into column 'teacher'.*row 5"):
        stream = batches(store, rollouts_per_step=13, tokens_per_batch=512)
    assert sorted(stream.rows.tolist()) == [row for row in range(14) if row != 5]
    assert stream.step(0).index == 0
    for index in range(3):
        assert sum(int(batch.segment_ids.max()) + 1 for batch in stream.step(index).batches) == 13
    collect_rollouts(evolve(source, lineage=Lineage(scorer.provenance.model)), [*prompts, Prompt("new", [9, 10])], store)
    with pytest.raises(MissingScoresError, match="has scores for 13 rollouts, expected 16"):
        batches(store, rollouts_per_step=13, tokens_per_batch=512)


def test_a_scorer_that_refuses_everything_is_stopped_and_nothing_is_put_in_quarantine(
    source, prompts, teacher_model, tokenizer, make_store
):
    store, scorer = make_store(source.manifest), HFScorer(teacher_model, tokenizer)
    collect_rollouts(source, prompts, store)
    everything = names(store, range(14))
    with pytest.raises(ScorerError, match=r"refused all 8 rollouts.*logprobs\[0\] is nan"):
        score_rollouts(store, Refusing(scorer, everything))
    with pytest.raises(EngineError, match="14 rollouts were refused and 0 accepted"):
        score_rollouts(store, Refusing(scorer, everything), preflight=None)
    with pytest.raises(Interrupted):
        score_rollouts(store, Stopping(scorer, 1), rollouts_per_batch=4, preflight=None)
    with pytest.raises(ScorerError, match=r"is refused \(.*although column 'teacher' holds its scores"):
        score_rollouts(store, Refusing(scorer, everything))
    assert dict(store.quarantined("teacher")) == {}


def test_more_refused_rollouts_than_allowed_stop_the_run_and_none_is_put_in_quarantine(
    source, prompts, teacher_model, tokenizer, make_store
):
    store, scorer = make_store(source.manifest), HFScorer(teacher_model, tokenizer)
    collect_rollouts(source, prompts, store)
    ordered = names(store, rows_by_length(store).tolist())
    bad = [ordered[0], *ordered[3:5], *ordered[6:7]]
    with pytest.raises(EngineError, match="refused 4 rows, expected at most 3 "):
        score_rollouts(store, Refusing(scorer, bad), rollouts_per_batch=3, max_refused=3)
    assert (dict(store.quarantined("teacher")), int(store.scored("teacher").sum())) == ({}, 3 + 3 - 3)
    with pytest.warns(QuarantineWarning, match="4 rollouts"):
        score_rollouts(store, Refusing(scorer, bad), rollouts_per_batch=1, max_refused=4)
    assert len(store.quarantined("teacher")) == 4


def test_a_rollout_in_quarantine_may_be_longer_than_a_batch(source, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    store = MemoryStore(evolve(source.manifest, sft_teacher=scorer.provenance.model))
    store.append(
        [Rollout("long", [9] * 90, [5] * 90, [True] * 90, "length"), *(Rollout(f"r{i}", [9], [5], [True], "stop") for i in range(3))]
    )
    with pytest.warns(QuarantineWarning):
        score_rollouts(store, Refusing(scorer, ["long"]))
    with pytest.warns(QuarantineWarning):
        assert batches(store, rollouts_per_step=3, tokens_per_batch=8).rows.tolist() == [1, 2, 3]


def test_what_is_refused_is_not_tried_in_halves_after_the_call_was_left():
    asked, begun, left = [], threading.Event(), threading.Event()

    def sample(prompts):
        asked.append(prompts)
        if prompts == ["a"]:
            assert begun.wait(30)
            return []
        begun.set()
        assert left.wait(30)
        raise InvalidRecordError("Prompt: it is odd.")

    loop = bounded("Source", lambda batch: isolate("Source", Rollout, sample, batch, 9), [["a"], ["b", "c"]], at_once=2, most=9)
    next(loop)
    loop.close()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "lopd-overlap")
    left.set()
    thread.join()
    assert sorted(asked) == [["a"], ["b", "c"]]
