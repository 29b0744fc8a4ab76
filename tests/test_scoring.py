"""`score_rollouts`: runs that are resumed, columns of several models, and what is reported."""

import numpy as np
import pytest
import torch
from small_runs import Bar, Interrupted, Refusing, Stopping, behavior, column, make_store, names, reopened, scored, source, teacher_model  # noqa: F401

from lopd import collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer
from lopd.errors import ConflictError, InvalidRecordError, NoSuchRowError, QuarantineWarning, TokenizerMismatchError
from lopd.protocols.reading import rows_of
from lopd.records import Prompt
from lopd.verbs import ScoringReport


@pytest.mark.parametrize("batches_done", [0, 1, 3, 4])
def test_scoring_again_after_any_prefix_gives_the_column_of_an_unbroken_run(
    batches_done, source, prompts, teacher_model, tokenizer, make_store, tmp_path
):
    scorer = HFScorer(teacher_model, tokenizer)
    whole, broken = make_store(source.manifest), make_store(source.manifest)
    for store in (whole, broken):
        collect_rollouts(source, prompts, store)
    score_rollouts(whole, scorer, rollouts_per_batch=3)
    with pytest.raises(Interrupted):
        score_rollouts(broken, Stopping(scorer, batches_done), rollouts_per_batch=3, preflight=None)
    broken = reopened(broken, tmp_path)
    assert int(broken.scored("teacher").sum()) == 3 * batches_done, "batches before the interruption are kept"
    again = Stopping(scorer, 99)
    score_rollouts(broken, again, rollouts_per_batch=3, preflight=None)
    assert sum(again.asked) == 14 - 3 * batches_done
    for a, b in zip(column(broken), column(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    finished = Stopping(scorer, 0)
    score_rollouts(broken, finished)
    assert finished.asked == []


def test_only_the_chosen_rows_are_scored_tested_counted_and_put_in_quarantine(source, prompts, teacher_model, tokenizer, make_store):
    store, scorer, bar = make_store(source.manifest), HFScorer(teacher_model, tokenizer), Bar()
    collect_rollouts(source, prompts, store)
    rows = rows_of(store, prompts[2:5])
    outside, bad = names(store, [row for row in range(14) if row not in rows]), names(store, rows[:1].tolist())
    refusing = Refusing(scorer, [*outside, *bad])
    with pytest.warns(QuarantineWarning, match="1 rollouts are without scores"):
        report = score_rollouts(store, refusing, rows=rows[::-1].copy(), progress=bar)
    assert set(report.refused) == set(bad), "nothing outside was asked for, not even by the self-test"
    assert np.flatnonzero(store.scored("teacher")).tolist() == rows[1:].tolist()
    assert list(store.quarantined("teacher")) == [rows[0]]
    assert bar.told[0] == ("begin", "scoring teacher", 6, 0, int(store.lengths()[rows].sum()), "read tokens")
    others = np.setdiff1d(np.arange(14), rows)
    assert score_rollouts(store, scorer, rows=others).skipped == 0, "what is in quarantine elsewhere is no matter here"
    with pytest.warns(QuarantineWarning, match="retry_quarantined"):
        assert score_rollouts(store, scorer) == ScoringReport(skipped=1)
    with pytest.raises(NoSuchRowError, match="row 14 was chosen"):
        score_rollouts(store, scorer, rows=np.array([0, 14]))
    with pytest.raises(InvalidRecordError, match="0 rows were chosen"):
        score_rollouts(store, scorer, rows=np.zeros(0, np.int64))


def test_every_rollout_gets_the_scores_of_its_own_tokens(scored, teacher_model, full_logprobs):
    for record in scored.read(range(len(scored)), columns=["teacher"]):
        np.testing.assert_allclose(record.scores["teacher"], full_logprobs(teacher_model, record.rollout), atol=1e-5)


def test_a_second_model_is_one_more_column_and_cannot_write_into_the_first(source, prompts, teacher_model, llama, tokenizer, make_store):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, HFScorer(teacher_model, tokenizer), column="teacher")
    before = column(store)
    score_rollouts(store, HFScorer(llama, tokenizer), column="ref")
    assert set(store.columns) == {"teacher", "ref"}
    np.testing.assert_allclose(np.concatenate(column(store, "ref")), behavior(store), atol=2e-5)
    collect_rollouts(source, [*prompts, Prompt("new", [9, 10])], store)
    with pytest.raises(ConflictError, match="teacher"):
        score_rollouts(store, HFScorer(llama, tokenizer), column="teacher")
    for a, b in zip(before, (r.scores["teacher"] for r in store.read(range(14), columns=["teacher"])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pain_12_a_teacher_with_other_tokens_is_refused_though_its_vocabulary_is_as_large(
    source, prompts, teacher_model, tokenizer, swapped_tokenizer, make_store
):
    assert len(swapped_tokenizer) == len(tokenizer)
    store = make_store(source.manifest)
    collect_rollouts(source, prompts, store)
    scorer, bar = Stopping(HFScorer(teacher_model, swapped_tokenizer), 99), Bar()
    with pytest.raises(TokenizerMismatchError, match="vocabulary"):
        score_rollouts(store, scorer, progress=bar)
    assert scorer.asked == []
    assert dict(store.columns) == {}
    assert bar.told == []


def test_scoring_reports_how_many_log_probs_were_floored(source, prompts, make_model, tokenizer, make_store):
    store, model = make_store(source.manifest), make_model("phi_bias")
    collect_rollouts(source, prompts, store)
    ids, counts = np.unique(np.concatenate([r.rollout.response_ids for r in store.read(range(len(store)))]), return_counts=True)
    assert score_rollouts(store, HFScorer(model, tokenizer), column="all-possible").floored == 0
    with torch.no_grad():
        model.lm_head.bias[int(ids[counts.argmax()])] = -torch.inf
    scorer = HFScorer(model, tokenizer)
    assert score_rollouts(store, scorer, column="one-ruled-out", rollouts_per_batch=3).floored == counts.max() > 1
    assert (np.concatenate(column(store, "one-ruled-out")) == -100).sum() == counts.max()
    assert score_rollouts(store, scorer, column="one-ruled-out") == ScoringReport(), "nothing was left to score"


def test_progress_of_scoring_is_told_the_column_the_totals_and_the_tokens(source, prompts, teacher_model, tokenizer, make_store):
    store, bar, scorer = make_store(source.manifest), Bar(), HFScorer(teacher_model, tokenizer)
    collect_rollouts(source, prompts, store)
    with pytest.raises(Interrupted):
        score_rollouts(store, Stopping(scorer, 1), rollouts_per_batch=4, preflight=None)
    report = score_rollouts(store, scorer, rollouts_per_batch=4, progress=bar)
    lengths = np.sort(store.lengths().sum(axis=1))
    assert bar.told[0] == ("begin", "scoring teacher", 14, 4, int(lengths[4:].sum()), "read tokens")
    assert bar.advanced == [4, 4, 2]
    assert report == ScoringReport(rollouts=10, read_tokens=int(lengths[4:].sum()))
    assert sum(told[2] for told in bar.told if told[0] == "advance") == int(lengths[4:].sum())
    assert bar.told[-1] == ("end",)
