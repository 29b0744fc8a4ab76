"""The verbs, wired: collect, score, batches, steps, checkpoints, evaluation -- each run again, interrupted, or given the wrong thing."""

# ruff: noqa: PLR0917 (fixtures are arguments)

import copy
import gc
import json
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from conftest import TOKENIZER_ID

import lopd.verbs.checkpoint
from lopd import batches, collect_rollouts, evaluate, evaluate_reverse_kl, load_checkpoint, opd_steps, save_checkpoint, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.student import CausalLMStudent
from lopd.errors import (
    CheckpointError,
    ConflictError,
    EndTokenWarning,
    EngineError,
    InvalidRecordError,
    ManifestMismatchError,
    MissingScoresError,
    NoSuchRowError,
    QuarantineWarning,
    RefusedPromptsWarning,
    ScorerError,
    SourceError,
    TeacherConsistencyError,
    TeacherConsistencyWarning,
    TokenizerMismatchError,
    TrainingDivergedError,
)
from lopd.guards import ConsistencyPolicy
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.protocols.reading import rows_of
from lopd.records import (
    Lineage,
    Manifest,
    ModelId,
    Prompt,
    Rollout,
    SamplingParams,
    Scores,
    fingerprint_tokenizer,
    measure_parity,
    rollout_id,
)
from lopd.verbs import Preflight, ScoringReport

pytestmark = pytest.mark.filterwarnings("ignore:.*of its advantages are below:lopd.errors.AdvantageWarning")  # the models are random

VOCAB = 96
PARAMS = SamplingParams(max_new_tokens=6, samples_per_prompt=2, stop_ids=(0, 5, 6, 7))


class Interrupted(Exception):  # noqa: N818
    """What stops a run in these tests."""


class Stopping:
    """A source or scorer that gives `calls` batches and then raises; it counts what it was asked for."""

    def __init__(self, inner, calls):
        self.inner, self.calls, self.asked = inner, calls, []

    @property
    def manifest(self):
        return self.inner.manifest

    @property
    def provenance(self):
        return self.inner.provenance

    def _take(self, items):
        self.asked.append(len(items))
        if len(self.asked) > self.calls:
            raise Interrupted

    def sample(self, prompts):
        self._take(prompts)
        return self.inner.sample(prompts)

    def score(self, rollouts):
        self._take(rollouts)
        return self.inner.score(rollouts)


class Bar:
    """A progress bar that writes down what it is told."""

    def __init__(self):
        self.told = []

    def begin(self, what, total, done, tokens):
        self.told.append(("begin", what, total, done, tokens))

    def advance(self, rollouts, tokens, quarantined):
        self.told.append(("advance", rollouts, tokens, quarantined))

    def end(self):
        self.told.append(("end",))

    @property
    def advanced(self):
        return [told[1] for told in self.told if told[0] == "advance"]


@pytest.fixture(params=["memory", "zarr"])
def make_store(request, tmp_path):
    """`make_store(manifest)`: a new, empty store of each kind."""
    made = []

    def make(manifest):
        made.append(1)
        return MemoryStore(manifest) if request.param == "memory" else ZarrStore.create(tmp_path / f"store{len(made)}", manifest)

    return make


def reopened(store, tmp_path):
    return store if isinstance(store, MemoryStore) else ZarrStore.open(sorted(tmp_path.glob("store*"))[-1])


@pytest.fixture
def source(llama, tokenizer):
    return HFSource(llama, tokenizer, PARAMS)


@pytest.fixture(scope="module")
def teacher_model(make_model):
    return make_model("llama_tied", seed=77)


@pytest.fixture(scope="module")
def scored(llama, tokenizer, prompts, teacher_model):
    """A store of the llama's rollouts, scored by the teacher that is recorded as its SFT teacher.  Only to be read."""
    scorer = HFScorer(teacher_model, tokenizer)
    made = HFSource(llama, tokenizer, PARAMS, Lineage(sft_teacher=scorer.provenance.model))
    store = MemoryStore(made.manifest)
    collect_rollouts(made, prompts, store)
    score_rollouts(store, scorer)
    return store


def behavior(store):
    return np.concatenate([r.scores["behavior"] for r in store.read(range(len(store)), columns=["behavior"])])


def column(store, name="teacher"):
    return [r.scores[name] for r in store.read(range(len(store)), columns=[name])]


# --- collect_rollouts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches_done", [0, 1, 2, 3])
def test_collecting_again_after_any_prefix_gives_the_store_of_an_unbroken_run(
    batches_done, source, prompts, make_store, contents, tmp_path
):
    whole, broken = make_store(source.manifest), make_store(source.manifest)
    collect_rollouts(source, prompts, whole, prompts_per_batch=2)
    with pytest.raises(Interrupted):
        collect_rollouts(Stopping(source, batches_done), prompts, broken, prompts_per_batch=2)
    assert len(broken) == 2 * 2 * batches_done
    again = Stopping(source, 99)
    broken = reopened(broken, tmp_path)
    collect_rollouts(again, prompts, broken, prompts_per_batch=2)
    assert sum(again.asked) == len(prompts) - 2 * batches_done, "only what is missing is sampled"
    assert contents(broken) == contents(whole)
    assert len(whole) == 2 * len(prompts)
    np.testing.assert_array_equal(behavior(broken), behavior(whole))
    finished = Stopping(source, 0)
    collect_rollouts(finished, prompts, broken, prompts_per_batch=2)
    assert finished.asked == [], "a finished collection samples nothing"


def test_collecting_more_prompts_or_in_other_batches_keeps_what_is_there(source, prompts, make_store, contents):
    one, other = make_store(source.manifest), make_store(source.manifest)
    collect_rollouts(source, prompts, one)
    collect_rollouts(source, prompts[2:3], other)
    collect_rollouts(source, prompts, other, prompts_per_batch=3)
    assert dict(contents(one)) == dict(contents(other))


def test_a_prompt_of_which_one_sample_is_missing_is_completed(source, prompts, make_store, contents):
    whole, partly = make_store(source.manifest), make_store(source.manifest)
    collect_rollouts(source, prompts, whole)
    partly.append([whole.read([0])[0].rollout])
    bar = Bar()
    collect_rollouts(source, prompts, partly, progress=bar)
    assert dict(contents(partly)) == dict(contents(whole))
    assert bar.told[0] == ("begin", "sampling", 14, 0, None)
    assert sum(bar.advanced) == 14


def test_progress_of_collecting_is_told_totals_and_an_end_even_when_interrupted(source, prompts, make_store):
    store, bar = make_store(source.manifest), Bar()
    with pytest.raises(Interrupted):
        collect_rollouts(Stopping(source, 2), prompts, store, prompts_per_batch=2, progress=bar)
    sampled = [r.rollout.response_ids.size for r in store.read(range(8))]
    assert bar.told == [
        ("begin", "sampling", 14, 0, None),
        ("advance", 4, sum(sampled[:4]), 0),
        ("advance", 4, sum(sampled[4:]), 0),
        ("end",),
    ]
    bar = Bar()
    collect_rollouts(source, prompts, store, prompts_per_batch=2, progress=bar)
    assert bar.told[0] == ("begin", "sampling", 14, 8, None)
    assert bar.advanced == [4, 2]
    assert bar.told[-1] == ("end",)


@pytest.mark.parametrize("what", ["policy", "sampling", "sft_teacher", "tokenizer"])
def test_a_store_of_another_run_is_refused_before_anything_is_sampled(what, source, prompts, swapped_tokenizer, make_store):
    other = {
        "policy": ModelId("other", "0", "float32"),
        "sampling": evolve(PARAMS, temperature=0.9),
        "sft_teacher": ModelId("other", "0", "float32"),
        "tokenizer": fingerprint_tokenizer(swapped_tokenizer),
    }[what]
    store, asked = make_store(evolve(source.manifest, **{what: other})), Stopping(source, 99)
    with pytest.raises(ManifestMismatchError, match=what):
        collect_rollouts(asked, prompts, store)
    assert asked.asked == []
    assert len(store) == 0


def test_another_round_goes_into_the_same_store_with_its_policy(source, prompts, make_store):
    store = make_store(source.manifest)
    later = evolve(source, generation=1, identity=ModelId("student", "step-10", "float32"))
    for part in (source, later, later):
        collect_rollouts(part, prompts[:2], store)
    assert dict(store.generations) == {0: source.manifest.policy, 1: later.manifest.policy}
    assert [r.rollout.generation for r in store.read(range(len(store)))] == [0] * 4 + [1] * 4
    with pytest.raises(ManifestMismatchError, match="policy"):
        collect_rollouts(evolve(later, identity=ModelId("student", "step-11", "float32")), prompts, store)


def test_no_prompts_or_two_with_one_id_are_refused_before_anything_is_sampled(source, prompts, make_store):
    store, asked = make_store(source.manifest), Stopping(source, 99)
    with pytest.raises(InvalidRecordError, match="there are 0"):
        collect_rollouts(asked, [], store)
    with pytest.raises(InvalidRecordError, match=r"'p3'.*twice"):
        collect_rollouts(asked, [*prompts, Prompt("p3", [9])], store)
    assert asked.asked == []


@pytest.mark.parametrize("size", [0, -3])
def test_batches_that_hold_nothing_are_refused(size, source, prompts, teacher_model, tokenizer):
    store = MemoryStore(source.manifest)
    with pytest.raises(InvalidRecordError, match=f"prompts_per_batch is {size}, expected at least 1"):
        collect_rollouts(source, prompts, store, prompts_per_batch=size)
    with pytest.raises(InvalidRecordError, match=f"rollouts_per_batch is {size}, expected at least 1"):
        score_rollouts(store, HFScorer(teacher_model, tokenizer), rollouts_per_batch=size)


class Forgetful:
    """A source or scorer that loses the last item of each batch."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def manifest(self):
        return self.inner.manifest

    @property
    def provenance(self):
        return self.inner.provenance

    def sample(self, prompts):
        return self.inner.sample(prompts)[:-1]

    def score(self, rollouts):
        return self.inner.score(rollouts)[:-1]


def test_a_source_that_loses_a_rollout_is_found_out(source, prompts):
    with pytest.raises(SourceError, match="every sample of every prompt"):
        collect_rollouts(Forgetful(source), prompts, MemoryStore(source.manifest))


def test_a_scorer_that_loses_a_rollout_is_found_out(source, prompts, teacher_model, tokenizer):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    for preflight in (Preflight(), None):
        with pytest.raises(ScorerError, match="scores for"):
            score_rollouts(store, Forgetful(HFScorer(teacher_model, tokenizer)), preflight=preflight)
    assert not store.scored("teacher").any()


def test_a_prompt_that_was_edited_is_refused_and_what_was_there_is_counted(source, prompts, make_store):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts[:3], store)
    edited = Prompt(prompts[1].prompt_id, [*prompts[1].token_ids.tolist(), 7])
    with pytest.raises(ConflictError, match=rf"'{prompts[1].prompt_id}/s\d/g0' has a prompt of .* other tokens.*another id"):
        collect_rollouts(source, [prompts[0], edited, prompts[5]], store)
    assert len(store) == 6
    report = collect_rollouts(source, prompts, store)
    assert (report.skipped, report.rollouts) == (6, 2 * len(prompts) - 6)


@pytest.mark.parametrize("wrong", ["3+4=?", ["3+4=?"], [1, 2]])
def test_what_is_no_prompt_is_refused_with_what_makes_one(wrong, source, make_store):
    with pytest.raises(InvalidRecordError, match=r"expected a Prompt; make them with `lopd\.make_prompts`"):
        collect_rollouts(source, wrong, make_store(source.manifest))


def test_a_source_or_scorer_whose_weights_were_changed_after_it_was_identified_is_refused(llama, tokenizer, prompts, scored):
    model = copy.deepcopy(llama)
    source, scorer = HFSource(model, tokenizer, PARAMS), HFScorer(model, tokenizer)
    named = HFSource(model, tokenizer, PARAMS, identity=ModelId("student", "step-1", "float32"))
    source.sample(prompts[:1])
    rollouts = [record.rollout for record in scored.read([0])]
    scorer.score(rollouts)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(EngineError, match="HFSource: the weights of its model were changed after it was identified"):
        source.sample(prompts[:1])
    with pytest.raises(EngineError, match="HFScorer: the weights of its model were changed"):
        scorer.score(rollouts)
    store = MemoryStore(source.manifest)
    with pytest.raises(EngineError, match=r"^HFSource: the weights"):
        collect_rollouts(source, prompts, store)
    store.append([record.rollout for record in scored.read(range(6))])
    store.append_scores(
        "teacher", scorer.provenance, [Scores.of(r.rollout, r.scores["behavior"]) for r in scored.read(range(5), ["behavior"])]
    )
    with pytest.raises(EngineError, match=r"^HFScorer: the weights"):
        score_rollouts(store, scorer, preflight=None)
    assert dict(store.quarantined("teacher")) == {}, "no rollout is to blame"
    named.sample(prompts[:1])
    fresh = evolve(source)
    assert not fresh.manifest.policy.same_weights(source.manifest.policy)
    fresh.sample(prompts[:1])


# --- score_rollouts -------------------------------------------------------------------------------------------------------------------


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
    assert bar.told[0] == ("begin", "scoring teacher", 6, 0, int(store.lengths()[rows].sum()))
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


def rows_by_length(store):
    return np.argsort(store.lengths().sum(axis=1), kind="stable")


def names(store, rows):
    return [record.rollout.rollout_id for record in store.read(rows)]


class Refusing:
    """A scorer that gives NaN for some rollouts, and says another (true) thing about none."""

    def __init__(self, inner, bad):
        self.inner, self.bad, self.asked = inner, set(bad), []
        self.provenance = inner.provenance

    def score(self, rollouts):
        self.asked.append(len(rollouts))
        good = self.inner.score(rollouts)
        return [Scores.of(r, s.logprobs * (np.nan if r.rollout_id in self.bad else 1)) for r, s in zip(rollouts, good, strict=True)]


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


def test_a_prompt_that_is_too_long_is_left_out_and_the_rest_is_sampled_as_ever(source, prompts, make_store, contents):
    whole, store = make_store(source.manifest), make_store(source.manifest)
    collect_rollouts(source, prompts, whole)
    with pytest.warns(RefusedPromptsWarning, match=r"1 prompts could not be sampled.*'endless'.*context"):
        report = collect_rollouts(source, [*prompts[:3], Prompt("endless", [5] * 5000), *prompts[3:]], store)
    assert dict(contents(store)) == dict(contents(whole))
    assert (report.rollouts, list(report.refused)) == (14, ["endless"])
    with pytest.warns(RefusedPromptsWarning, match="1 prompts could not be sampled"):
        assert collect_rollouts(source, [Prompt("endless", [5] * 5000), *prompts], store, prompts_per_batch=1).rollouts == 0
    endless = [Prompt(f"endless{i}", [5] * 5000) for i in range(3)]
    with pytest.raises(EngineError, match="all 3 prompts were refused"):
        collect_rollouts(source, endless, store)
    with pytest.raises(EngineError, match="refused 2 rows, expected at most 1 "):
        collect_rollouts(source, [*prompts, *endless], store, max_refused=1)
    with pytest.raises(EngineError, match="refused 2 rows, expected at most 1 "):
        collect_rollouts(source, [endless[0], *prompts, endless[1]], store, prompts_per_batch=4, max_refused=1)


# --- the self-test of a scorer ----------------------------------------------------------------------------------------------------------


class Moody:
    """A scorer whose answers shift: by `company` nats in a call of several, or by a constant."""

    def __init__(self, inner, company=0.0, always=0.0, provenance=None):
        self.inner, self.company, self.always = inner, company, always
        self.provenance = provenance or inner.provenance

    def score(self, rollouts):
        shift = self.always + (self.company if len(rollouts) > 1 else 0.0)
        scores = self.inner.score(rollouts)
        return [Scores.of(r, np.minimum(s.logprobs - shift, 0)) for r, s in zip(rollouts, scores, strict=True)]


@pytest.fixture
def collected(source, prompts, make_store):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts, store)
    return store


def test_pain_16_a_scorer_whose_answers_depend_on_the_batch_is_refused_before_it_is_paid_for(collected, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    with pytest.raises(
        ScorerError, match=r"of 8 rollouts differ by 0\.1 nats on average when they are scored alone and in company.*at most 0\.05"
    ):
        score_rollouts(collected, Moody(scorer, company=0.1))
    assert (dict(collected.columns), collected.scored("teacher").any()) == ({}, False)
    score_rollouts(collected, Moody(scorer, company=0.1), preflight=Preflight(repeat_bound=0.2))
    assert collected.scored("teacher").all()


def test_a_column_is_not_continued_by_a_scorer_that_says_something_else_than_what_is_stored(collected, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    with pytest.raises(Interrupted):
        score_rollouts(collected, Stopping(scorer, 1), rollouts_per_batch=4, preflight=None)
    before = int(collected.scored("teacher").sum())
    with pytest.raises(ScorerError, match=r"differ by 0\.3 nats on average from those that column 'teacher' holds"):
        score_rollouts(collected, Moody(scorer, always=0.3))
    assert int(collected.scored("teacher").sum()) == before == 4


def test_pain_09_the_difference_to_the_trainers_own_log_probs_is_measured_stored_and_bounded(collected, teacher_model, tokenizer, tmp_path):
    truth = HFScorer(teacher_model, tokenizer)
    engine = evolve(truth.provenance, engine="shifted 1.0")
    with pytest.raises(ScorerError, match=r"shifted 1\.0 against transformers.*mean 0\.2.*expected a mean of at most 0\.1"):
        score_rollouts(collected, Moody(truth, always=0.2, provenance=engine), preflight=Preflight(truth=truth))
    report = score_rollouts(collected, Moody(truth, always=0.02, provenance=engine), preflight=Preflight(truth=truth))
    parity = reopened(collected, tmp_path).columns["teacher"].parity
    assert parity == report.parity
    assert (parity.engine, parity.rollouts, parity.tokens) == ("shifted 1.0", 14, int(collected.lengths()[:, 1].sum()))
    np.testing.assert_allclose([parity.mean, parity.p99, parity.max, -parity.bias], 0.02, atol=1e-5)
    gaps = np.concatenate(column(collected)).astype(np.float64) + 0.02 - behavior(collected)
    np.testing.assert_allclose(parity.advantage, np.abs(gaps).mean(), rtol=1e-4)
    np.testing.assert_allclose(parity.sign_flips, ((gaps > 0) & (gaps < 0.02)).mean(), atol=1e-9)
    assert dict(collected.columns) == {"teacher": engine}, "a comparison is no part of who computed a column"


def test_the_self_test_asks_for_all_its_rollouts_at_once_then_for_those_that_are_new_alone_and_the_truth_once(
    collected, teacher_model, tokenizer
):
    scorer, truth = (Refusing(HFScorer(teacher_model, tokenizer), []) for _ in range(2))
    score_rollouts(collected, scorer, rows=np.arange(4), preflight=Preflight(rollouts=3, truth=truth))
    assert (scorer.asked, truth.asked) == ([4, 1, 1, 1, 4], [4])
    scorer.asked.clear()
    score_rollouts(collected, scorer, preflight=Preflight(rollouts=3))
    assert scorer.asked == [6, 1, 1, 1, 10], "three that the column holds and three that are new; then the column"


def test_the_truth_must_be_the_same_model(collected, teacher_model, llama, tokenizer):
    with pytest.raises(ScorerError, match="expected the same weights"):
        score_rollouts(collected, HFScorer(teacher_model, tokenizer), preflight=Preflight(truth=HFScorer(llama, tokenizer)))


def test_pain_08_a_teacher_that_never_ends_as_the_policy_does_is_noticed(source, make_model, tokenizer):
    store, model = MemoryStore(source.manifest), make_model("phi_bias")
    store.append([Rollout(f"r{i}", [9, 10], [20 + i, 30, 40, 5], [True] * 4, "stop") for i in range(4)])
    score_rollouts(store, HFScorer(model, tokenizer), column="healthy")
    with torch.no_grad():
        model.lm_head.bias[5] = -20.0
    with pytest.warns(EndTokenWarning, match=r"tokens that ended 4 responses have a mean log-prob of -2\d.*those before them -6"):
        score_rollouts(store, HFScorer(model, tokenizer))


def test_pain_08_a_teacher_whose_tokenizer_ends_texts_with_another_token_is_noticed(source, prompts, teacher_model, tokenizer):
    scorer = HFScorer(teacher_model, tokenizer)
    assert scorer.provenance.eos_id == source.manifest.tokenizer.eos_id == tokenizer.eos_token_id
    store = MemoryStore(evolve(source.manifest, tokenizer=evolve(source.manifest.tokenizer, eos_id=3)))
    store.append([Rollout("r", [9, 10], [20, 30], [True] * 2, "length")])
    with pytest.warns(EndTokenWarning, match=f"end with token {tokenizer.eos_token_id}, expected the policy's 3"):
        score_rollouts(store, scorer)


def test_parity_is_over_the_tokens_that_count_and_says_what_becomes_of_the_advantage():
    items = [
        Rollout("a", [9], [1, 2, 3], [True, False, True], "stop", [-1.0, -1.0, -1.0]),
        Rollout("b", [9], [4, 5], [True, True], "length", [-2.0, -2.0]),
    ]
    truth = [Scores.of(items[0], [-1.5, -9.0, -0.5]), Scores.of(items[1], [-2.25, -1.0])]
    engine = [Scores.of(items[0], [-0.5, -0.0, -0.5]), Scores.of(items[1], [-2.75, -1.25])]
    parity = measure_parity(items, engine, truth, engine="E", truth="T")
    differences = np.array([1.0, 0.0, -0.5, -0.25])
    assert (parity.rollouts, parity.tokens) == (2, 4)
    assert (parity.mean, parity.max, parity.bias) == (np.abs(differences).mean(), 1.0, differences.mean())
    assert parity.p99 == pytest.approx(np.quantile(np.abs(differences), 0.99))
    assert (parity.advantage, parity.sign_flips) == (np.abs([-0.5, 0.5, -0.25, 1.0]).mean(), 0.25)
    assert measure_parity([evolve(items[0], behavior_logprobs=None)], engine[:1], truth[:1], engine="E", truth="T").advantage is None


class Tilted:
    """A scorer that is far off on some tokens, or on all by as much up as down."""

    def __init__(self, inner, provenance, offsets):
        self.inner, self.provenance, self.offsets = inner, provenance, offsets

    def score(self, rollouts):
        scores = self.inner.score(rollouts)
        return [Scores.of(r, np.minimum(s.logprobs + self.offsets(s.logprobs.size), 0)) for r, s in zip(rollouts, scores, strict=True)]


@pytest.mark.parametrize(
    ("name", "offsets"),
    [
        ("mean", lambda n: np.resize([0.2, -0.2], n)),
        ("p99", lambda n: np.eye(1, n, 2)[0] * -1.5),
        ("bias", lambda n: np.full(n, -0.07)),
    ],
)
def test_a_bound_for_each_way_in_which_an_engine_may_be_off(name, offsets, collected, teacher_model, tokenizer):
    truth = HFScorer(teacher_model, tokenizer)
    off = Tilted(truth, evolve(truth.provenance, engine="off 1.0"), offsets)
    loose = {"parity_bound": 1.0, "parity_p99_bound": 9.0, "parity_bias_bound": 1.0}
    score_rollouts(collected, off, column="loose", preflight=Preflight(truth=truth, **loose))
    field = "parity_bound" if name == "mean" else f"parity_{name}_bound"
    with pytest.raises(ScorerError, match=f"expected a {name} of at most.*raise `{field}`"):
        score_rollouts(collected, off, preflight=Preflight(truth=truth, **(loose | {field: getattr(Preflight(), field)})))


def test_what_the_truth_refuses_is_not_compared_and_the_rest_stays_in_line(collected, teacher_model, tokenizer):
    truth = HFScorer(teacher_model, tokenizer)
    bad = names(collected, [2, 9])
    report = score_rollouts(collected, truth, preflight=Preflight(truth=Refusing(truth, bad)))
    assert (report.parity.rollouts, report.parity.max) == (12, pytest.approx(0, abs=1e-5))
    everything = Refusing(truth, names(collected, range(14)))
    with pytest.raises(ScorerError, match="0 rollouts could be compared"):
        score_rollouts(collected, truth, column="again", preflight=Preflight(truth=everything))


class Alone:
    """A scorer that refuses what is alone in a call."""

    def __init__(self, inner):
        self.inner, self.provenance = inner, inner.provenance

    def score(self, rollouts):
        if len(rollouts) == 1:
            raise InvalidRecordError("Rollout: it is lonely.")
        return self.inner.score(rollouts)


def test_a_scorer_that_refuses_alone_what_it_takes_in_company_is_refused(collected, teacher_model, tokenizer):
    with pytest.raises(ScorerError, match=r"refused alone and not in company.*lonely"):
        score_rollouts(collected, Alone(HFScorer(teacher_model, tokenizer)))


@pytest.mark.parametrize(("field", "value"), [("rollouts", 0), ("parity_rollouts", -1), ("repeat_bound", -0.1), ("parity_bound", np.nan)])
def test_bounds_that_make_no_sense_are_refused(field, value):
    with pytest.raises(InvalidRecordError, match=f"{field} is {value}"):
        Preflight(**{field: value})


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
    assert bar.told[0] == ("begin", "scoring teacher", 14, 4, int(lengths[4:].sum()))
    assert bar.advanced == [4, 4, 2]
    assert report == ScoringReport(rollouts=10, tokens=int(lengths[4:].sum()))
    assert sum(told[2] for told in bar.told if told[0] == "advance") == int(lengths[4:].sum())
    assert bar.told[-1] == ("end",)


# --- checkpoints ----------------------------------------------------------------------------------------------------------------------


def adamw(student):
    return torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.8, 0.95))


def momentum(student):
    return torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9)


def plain_sgd(student):
    return torch.optim.SGD(student.parameters(), lr=1e-2)


def state_of(student, optimizer):
    """All numbers of a run: parameters, optimizer state, hyperparameters."""
    tensors = {f"parameter {name}": p.detach().clone() for name, p in student.named_parameters()}
    saved = optimizer.state_dict()
    for i, entry in saved["state"].items():
        tensors |= {f"{i} {k}": v.clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return tensors, saved["param_groups"]


def assert_same_state(a, b):
    assert a[0].keys() == b[0].keys()
    assert a[1] == b[1]
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


def advance(student, optimizer, store, start, stop):
    steps = batches(store, rollouts_per_step=5, tokens_per_batch=40, seed=3)[start:stop]
    return [m.loss for m in opd_steps(student, steps, ReferenceOPDLoss(), optimizer)]


@pytest.mark.parametrize("kind", ["gpt2_dropout", "llama_tied"])
@pytest.mark.parametrize("make_optimizer", [adamw, momentum, plain_sgd])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(kind, make_optimizer, make_model, scored, tmp_path):
    def fresh(seed):
        student = CausalLMStudent(make_model(kind, seed), TOKENIZER_ID)
        return student, make_optimizer(student)

    whole, whole_optimizer = fresh(1)
    torch.manual_seed(9)
    losses = advance(whole, whole_optimizer, scored, 0, 6)

    first, first_optimizer = fresh(1)
    torch.manual_seed(9)
    head = advance(first, first_optimizer, scored, 0, 3)
    save_checkpoint(tmp_path, first, first_optimizer, next_step=3, lineage=Lineage())

    second, second_optimizer = fresh(2)  # other weights and another random state: all must come from the checkpoint
    torch.manual_seed(1234)
    start = load_checkpoint(tmp_path, second, second_optimizer)
    assert start == 3
    tail = advance(second, second_optimizer, scored, start, 6)
    assert head + tail == losses
    assert_same_state(state_of(second, second_optimizer), state_of(whole, whole_optimizer))
    if kind == "gpt2_dropout":
        other, other_optimizer = fresh(1)
        torch.manual_seed(10)
        assert advance(other, other_optimizer, scored, 0, 6) != losses, "without dropout the random state would not be tested"


@pytest.fixture
def small(llama):
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    return student, adamw(student)


def test_a_checkpoint_is_found_by_its_own_folder_too(small, tmp_path):
    path = save_checkpoint(tmp_path / "run", *small, next_step=7, lineage=Lineage())
    assert load_checkpoint(path, *small) == load_checkpoint(tmp_path / "run", *small) == 7


def test_an_optimizer_of_another_model_and_a_loss_that_is_a_class_are_refused_before_the_first_step(small, scored, llama):
    student, optimizer = small
    strange = adamw(CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID))
    with pytest.raises(InvalidRecordError, match=r"Optimizer AdamW: it has none of the student's \d+ trained parameters"):
        next(opd_steps(student, batches(scored), ReferenceOPDLoss(), strange))
    with pytest.raises(InvalidRecordError, match=r"it is the class ReferenceOPDLoss, expected an object; call it: ReferenceOPDLoss\(\)"):
        next(opd_steps(student, batches(scored), ReferenceOPDLoss, optimizer))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(student.model.parameters(), llama.parameters(), strict=True))


def test_saving_leaves_one_checkpoint_and_its_lineage(small, scored, tmp_path):
    lineage = batches(scored).lineage
    assert lineage.opd_teacher == scored.columns["teacher"].model
    for step in (3, 12):
        path = save_checkpoint(tmp_path / "run", *small, next_step=step, lineage=lineage)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [path.name] == ["step-00000012.0"]
    assert Lineage.read(path) == lineage
    assert load_checkpoint(tmp_path / "run", *small) == 12


def test_without_a_checkpoint_a_run_starts_at_step_zero(small, tmp_path):
    before = state_of(*small)
    assert load_checkpoint(tmp_path / "none", *small) == 0
    assert_same_state(state_of(*small), before)


def test_weights_can_be_loaded_without_the_optimizer(small, make_model, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=4, lineage=Lineage())
    other = CausalLMStudent(make_model("llama_tied", 5), TOKENIZER_ID)
    random_state = torch.get_rng_state()
    assert load_checkpoint(tmp_path, other) == 4
    assert torch.equal(torch.get_rng_state(), random_state)
    for (name, a), (_, b) in zip(other.named_parameters(), small[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("what", ["names", "shapes", "dtype", "frozen", "optimizer", "groups"])
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(what, small, make_model, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=4, lineage=Lineage())
    model = make_model("mistral_window" if what == "names" else "llama_tied", 5)
    if what == "shapes":
        model.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    if what == "dtype":
        model.to(torch.bfloat16)
    student = CausalLMStudent(make_model("llama_tied", 5), TOKENIZER_ID)
    student.model = model
    if what == "frozen":
        model.model.norm.weight.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = momentum(student) if what == "optimizer" else torch.optim.AdamW(trained, lr=1e-3)
    if what == "groups":
        optimizer = torch.optim.AdamW([{"params": trained[:3]}, {"params": trained[3:]}], lr=1e-3)
    before = state_of(student, optimizer)
    match = {"names": "lm_head", "shapes": r"norm.weight.*\(32,\).*\(33,\)", "dtype": "bfloat16", "frozen": "norm.weight"}
    with pytest.raises(CheckpointError, match=match.get(what, "optimizer")):
        load_checkpoint(tmp_path, student, optimizer)
    assert_same_state(state_of(student, optimizer), before)


def test_an_optimizer_with_the_same_parameters_in_another_order_is_refused(small, tmp_path):
    student, optimizer = small
    save_checkpoint(tmp_path, student, optimizer, next_step=4, lineage=Lineage())
    # two matrices of one shape change places: nothing but their names tells them apart
    named = dict(student.named_parameters())
    names = list(named)
    first, second = (names.index(f"model.model.layers.{i}.self_attn.q_proj.weight") for i in (0, 1))
    names[first], names[second] = names[second], names[first]
    other = torch.optim.AdamW([named[name] for name in names], lr=3e-3)
    before = state_of(student, other)
    with pytest.raises(CheckpointError, match=rf"parameter {first} of optimizer group 0 is 'model.*layers.0.*expected 'model.*layers.1"):
        load_checkpoint(tmp_path, student, other)
    assert_same_state(state_of(student, other), before)


def test_an_optimizer_over_parameters_of_another_model_is_refused_when_saving(small, make_model, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    strangers = CausalLMStudent(make_model("llama_tied", 5), TOKENIZER_ID)
    with pytest.raises(CheckpointError, match="parameter 0 of optimizer group 0 is none of the student's"):
        save_checkpoint(tmp_path, small[0], adamw(strangers), next_step=5, lineage=Lineage())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.0"]


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"{}" + b"\xff" * 20, None])
def test_a_damaged_or_missing_file_of_a_checkpoint_is_named_and_nothing_is_changed(name, damage, small, scored, tmp_path):
    path = save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage()) / name
    advance(*small, scored, 3, 4)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    before, random_state = state_of(*small), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint(tmp_path, *small)
    assert_same_state(state_of(*small), before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("lacking", ["next_step", "trained", "optimizer"])
def test_a_state_file_that_lacks_something_says_what(lacking, small, tmp_path):
    path = save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage()) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != lacking}))
    with pytest.raises(CheckpointError, match=rf"state\.json.*lacks '{lacking}'"):
        load_checkpoint(tmp_path, *small)


@pytest.mark.parametrize("write", [1, 2])
def test_an_interrupted_save_leaves_the_checkpoint_before_it(write, small, scored, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    saved = state_of(*small)
    advance(*small, scored, 3, 5)
    whole, writes = lopd.verbs.checkpoint.save_file, []

    def save_file(tensors, path):
        writes.append(path)
        if len(writes) == write:
            Path(path).write_bytes(b"half of a")
            raise Interrupted
        whole(tensors, path)

    monkeypatch.setattr(lopd.verbs.checkpoint, "save_file", save_file)
    with pytest.raises(Interrupted):
        save_checkpoint(tmp_path, *small, next_step=5, lineage=Lineage())
    student = CausalLMStudent(copy.deepcopy(small[0].model), TOKENIZER_ID)
    optimizer = adamw(student)
    assert load_checkpoint(tmp_path, student, optimizer) == 3
    assert_same_state(state_of(student, optimizer), saved)
    monkeypatch.undo()
    save_checkpoint(tmp_path, *small, next_step=5, lineage=Lineage())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005.0"]


def test_an_interrupted_save_of_the_same_step_again_leaves_a_checkpoint(small, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())

    def rename(*_):
        raise Interrupted

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Interrupted):
        save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, *small) == 3


# --- training -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_reverse_kl(policy, teacher, prompts):
    """KL per token of two-token responses, over all first tokens and the whole vocabulary; a first token 0 ends the response."""
    gap, length = 0.0, 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids.tolist()])
        after = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
        logp, logq = (
            (m(input_ids=ids).logits[0, -1].double().log_softmax(-1), m(input_ids=after).logits[:, -1].double().log_softmax(-1))
            for m in (policy, teacher)
        )
        first = (logp[0].exp() * (logp[0] - logq[0])).sum()
        second = (logp[1].exp() * (logp[1] - logq[1])).sum(-1)
        goes_on = logp[0].exp().clone()
        goes_on[0] = 0
        gap += float(first + (goes_on * second).sum())
        length += 1 + float(goes_on.sum())
    return gap / length


def test_pain_01_training_needs_no_teacher_in_memory(make_model, prompts, tokenizer, llama, tmp_path):
    teacher = make_model("llama_tied", seed=77)
    scorer = HFScorer(teacher, tokenizer)
    lineage = Lineage(sft_teacher=scorer.provenance.model)
    store = ZarrStore.create(tmp_path / "store", HFSource(llama, tokenizer, PARAMS, lineage).manifest)
    collect_rollouts(HFSource(llama, tokenizer, PARAMS, lineage), prompts, store)
    score_rollouts(store, scorer)
    gone = weakref.ref(teacher)
    del teacher, scorer, store
    gc.collect()
    assert gone() is None
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    before = [p.detach().clone() for p in student.parameters()]
    store = ZarrStore.open(tmp_path / "store")
    metrics = list(opd_steps(student, batches(store, rollouts_per_step=14)[:12], ReferenceOPDLoss(), adamw(student)))
    assert metrics[-1].reverse_kl < metrics[0].reverse_kl
    assert all(not torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))


def test_sft_records_its_teacher_and_opd_holds_the_student_to_it(make_model, tokenizer, prompts, llama, tmp_path):
    teacher = make_model("llama_tied", seed=77)
    teacher_source = HFSource(teacher, tokenizer, PARAMS)
    sft_store = MemoryStore(teacher_source.manifest)
    collect_rollouts(teacher_source, prompts, sft_store)
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    steps = batches(sft_store, rollouts_per_step=7, teacher=None)[:4]
    metrics = list(opd_steps(student, steps, SFTLoss(), adamw(student)))
    assert metrics[-1].loss < metrics[0].loss
    assert {m.reverse_kl for m in metrics} == {0.0}
    assert steps.lineage == Lineage(sft_teacher=teacher_source.manifest.policy)
    student.export(tmp_path / "sft", tokenizer, steps.lineage)

    policy = HFSource.from_folder(tmp_path / "sft", PARAMS)
    assert policy.manifest.sft_teacher == teacher_source.manifest.policy
    store = MemoryStore(policy.manifest)
    collect_rollouts(policy, prompts, store)
    score_rollouts(store, HFScorer(teacher, tokenizer), column="teacher")
    score_rollouts(store, HFScorer(make_model("llama_tied", seed=78), tokenizer), column="other")
    stream = batches(store)[:1]
    assert stream.lineage == Lineage(policy.manifest.sft_teacher, store.columns["teacher"].model)
    with pytest.raises(TeacherConsistencyError, match="SFT teacher"):
        batches(store, teacher="other")
    with pytest.warns(TeacherConsistencyWarning, match="SFT teacher"):
        warned = batches(store, teacher="other", consistency=ConsistencyPolicy.WARN)[:1]
    assert len(list(opd_steps(student, warned, ReferenceOPDLoss(), adamw(student)))) == 1


def test_a_policy_whose_teacher_nobody_recorded_is_refused(source, prompts, teacher_model, tokenizer):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, HFScorer(teacher_model, tokenizer))
    with pytest.raises(TeacherConsistencyError, match="not recorded"):
        batches(store)


def test_pain_12_a_student_that_reads_other_tokens_is_refused_before_anything_is_learned(scored, llama, swapped_tokenizer):
    student = CausalLMStudent(copy.deepcopy(llama), fingerprint_tokenizer(swapped_tokenizer))
    optimizer, steps = adamw(student), batches(scored, rollouts_per_step=5)[:2]
    before = state_of(student, optimizer)
    for wrapped in (steps, (step for step in steps)):
        with pytest.raises(TokenizerMismatchError, match="Step 0: the hash of its vocabulary"):
            list(opd_steps(student, wrapped, ReferenceOPDLoss(), optimizer))
    assert_same_state(state_of(student, optimizer), before)
    silent = [evolve(step, vocab_hash=None) for step in steps]
    assert len(list(opd_steps(student, silent, ReferenceOPDLoss(), optimizer))) == 2, "steps that say nothing are taken as they are"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stops_training_and_leaves_weights_and_optimizer_as_they_were(value, small, scored):
    student, optimizer = small
    good, bad = batches(scored, rollouts_per_step=5, tokens_per_batch=20)[:2]
    poisoned = torch.where(bad.batches[-1].weight > 0, value, 0.0)
    bad = evolve(bad, batches=(*bad.batches[:-1], evolve(bad.batches[-1], teacher_logprobs=poisoned)))
    assert len(bad.batches) > 1
    steps = opd_steps(student, [good, bad], ReferenceOPDLoss(clip=None), optimizer)
    next(steps)
    before = state_of(student, optimizer)
    with pytest.raises(TrainingDivergedError, match=r"Step 1: the gradient norm is (nan|inf)"):
        next(steps)
    assert_same_state(state_of(student, optimizer), before)


def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(llama, tokenizer, prompts):
    scorer = HFScorer(llama, tokenizer)
    source = HFSource(llama, tokenizer, PARAMS, Lineage(sft_teacher=scorer.provenance.model))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, scorer)
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    (step,) = batches(store, rollouts_per_step=14, tokens_per_batch=60)[:1]
    assert len(step.batches) > 1
    (metrics,) = opd_steps(student, [step], ReferenceOPDLoss(), plain_sgd(student))
    assert abs(metrics.loss) < 1e-5
    assert abs(metrics.reverse_kl) < 1e-5
    assert metrics.grad_norm < 1e-4
    assert metrics.clip_fraction == 0
    ratio = ReferenceOPDLoss(ratio_to_ref=True)
    (metrics,) = opd_steps(student, batches(store, rollouts_per_step=14, ref="behavior")[:1], ratio, plain_sgd(student))
    assert metrics.grad_norm < 1e-4


def test_the_behavior_column_serves_as_reference_and_cannot_be_a_teacher(scored):
    (step,) = batches(scored, rollouts_per_step=14, ref="behavior")[:1]
    counted = step.batches[0].weight > 0
    sampled = {r.rollout.content_hash: r.scores["behavior"] for r in scored.read(range(14), columns=["behavior"])}
    assert float(step.batches[0].ref_logprobs[counted].double().sum()) == pytest.approx(
        sum(float(v.astype(np.float64).sum()) for v in sampled.values()), rel=1e-5
    )
    with pytest.raises(InvalidRecordError, match="what the policy itself reported"):
        batches(scored, teacher="behavior")


def test_training_on_a_store_that_is_empty_or_not_scored_is_refused(source, prompts, make_store):
    store = make_store(source.manifest)
    with pytest.raises(InvalidRecordError, match="0 rollouts"):
        batches(store)
    collect_rollouts(source, prompts, store)
    with pytest.raises(MissingScoresError, match=r"column 'teacher' is absent, expected one of \['behavior'\].*score_rollouts"):
        batches(store)
    with pytest.raises(MissingScoresError, match="'ref'"):
        batches(store, teacher=None, ref="ref")


def test_online_opd_is_the_same_verbs_on_a_store_that_forgets(near_teacher, tokenizer, prompts, llama):
    teacher = HFScorer(near_teacher, tokenizer)
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    lineage, params = Lineage(sft_teacher=teacher.provenance.model), SamplingParams(max_new_tokens=2, samples_per_prompt=24)
    policies = set()
    for generation in range(5):
        source = HFSource(student.model, tokenizer, params, lineage, generation=generation)
        store = MemoryStore(source.manifest)
        collect_rollouts(source, prompts, store)
        score_rollouts(store, teacher)
        steps = batches(store, rollouts_per_step=len(store))[:1]
        (metrics,) = opd_steps(student, steps, ReferenceOPDLoss(), optimizer)
        assert store.find([rollout_id("p0", 0, generation)])[0] == 0
        assert metrics.rollouts == len(store) == 24 * 7
        policies.add(source.manifest.policy.revision)
    assert len(policies) == 5, "each round is sampled by the weights of its moment"
    assert exact_reverse_kl(student.model.eval(), near_teacher, prompts) < 0.8 * exact_reverse_kl(llama, near_teacher, prompts)


def test_lightning_opd_on_frozen_rollouts_brings_the_student_nearer_to_the_teacher(near_teacher, tokenizer, prompts, llama):
    scorer = HFScorer(near_teacher, tokenizer)
    params = SamplingParams(max_new_tokens=2, samples_per_prompt=24)
    source = HFSource(llama, tokenizer, params, Lineage(sft_teacher=scorer.provenance.model))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, scorer)
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    list(opd_steps(student, batches(store, rollouts_per_step=56, seed=0)[:10], ReferenceOPDLoss(), optimizer))
    assert exact_reverse_kl(student.model.eval(), near_teacher, prompts) < 0.8 * exact_reverse_kl(llama, near_teacher, prompts)


# --- evaluation -----------------------------------------------------------------------------------------------------------------------


class Fixed:
    """A source whose i-th rollout of a prompt says how good it is: its only token is the score in percent, plus 10."""

    def __init__(self, scores_BN, tokenizer, sampling=None, reports=True):
        self.scores_BN, self.reports = scores_BN, reports
        sampling = sampling or SamplingParams(samples_per_prompt=len(scores_BN[0]), max_new_tokens=1)
        self.manifest = Manifest(fingerprint_tokenizer(tokenizer), ModelId("fixed", "1", "float32"), sampling)

    def sample(self, prompts):
        n = self.manifest.sampling.samples_per_prompt
        reported = [-0.5] if self.reports else None
        return [
            Rollout(rollout_id(p.prompt_id, s, 0), p.token_ids, [10 + round(100 * self.scores_BN[i][s])], [True], "stop", reported)
            for i, p in enumerate(prompts)
            for s in range(n)
        ]


def verify(prompt, rollout):
    assert rollout.rollout_id.startswith(f"{prompt.prompt_id}/"), "a rollout is judged with its own prompt"
    return (int(rollout.response_ids[0]) - 10) / 100


def test_avg_at_n_and_pass_at_k_are_the_values_one_gets_by_hand(tokenizer, prompts):
    right = [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1], [0.5, 0.5, 0, 1]]
    found = evaluate(Fixed(right, tokenizer), prompts[:5], verify)
    means = [0, 0.25, 0.5, 1, 0.5]
    assert found.n == 4
    assert found.avg_at_n.mean == pytest.approx(np.mean(means))
    assert found.avg_at_n.ci95 == pytest.approx(1.959964 * np.std(means, ddof=1) / np.sqrt(5), rel=1e-6)
    assert found.avg_at_n.clusters == 5
    # 1 - C(n-c, k) / C(n, k) for c = 0, 1, 2, 4, 1 right answers of 4; half a point is not right
    assert found.pass_at_k == pytest.approx(
        {
            1: np.mean([0, 1 / 4, 1 / 2, 1, 1 / 4]),
            2: np.mean([0, 1 / 2, 5 / 6, 1, 1 / 2]),
            3: np.mean([0, 3 / 4, 1, 1, 3 / 4]),
            4: np.mean([0, 1, 1, 1, 1]),
        }
    )


def test_evaluation_asks_for_n_fresh_samples_of_each_prompt_of_a_real_model(source, prompts):
    seen = []
    found = evaluate(source, prompts, lambda prompt, rollout: seen.append((prompt.prompt_id, rollout.rollout_id)) or 1.0)
    assert seen == [(p.prompt_id, rollout_id(p.prompt_id, s, 0)) for p in prompts for s in range(2)]
    assert found.avg_at_n.mean == 1
    assert found.avg_at_n.ci95 == 0
    assert found.pass_at_k == {1: 1.0, 2: 1.0}


def test_evaluating_on_no_prompts_is_refused(source, teacher_model, tokenizer):
    with pytest.raises(InvalidRecordError):
        evaluate(source, [], verify)
    with pytest.raises(InvalidRecordError):
        evaluate_reverse_kl(HFSource(source.model, tokenizer), HFScorer(teacher_model, tokenizer), [])


@pytest.mark.parametrize("answer", [None, float("nan"), 100, -1, "right"])
def test_a_verifier_that_gives_no_number_from_0_to_1_is_refused_and_the_prompt_named(answer, source, prompts):
    with pytest.raises(InvalidRecordError, match=rf"Prompt '{prompts[0].prompt_id}': the verifier gave .*, expected a number from 0 to 1"):
        evaluate(source, prompts[:2], lambda prompt, rollout: answer)


def test_a_verifier_may_answer_with_a_bool(source, prompts):
    assert evaluate(source, prompts[:2], lambda prompt, rollout: np.bool_(True)).avg_at_n.mean == 1


def test_the_estimated_reverse_kl_covers_the_exact_one(llama, near_teacher, tokenizer, prompts):
    exact = exact_reverse_kl(llama, near_teacher, prompts)
    source = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=2, samples_per_prompt=150, seed=2))
    estimate = evaluate_reverse_kl(source, HFScorer(near_teacher, tokenizer), prompts)
    assert (estimate.clusters, estimate.values) == (len(prompts), 2 * 150 * len(prompts))
    assert exact > 0.02
    assert estimate.ci95 < 0.4 * exact
    assert abs(estimate.mean - exact) <= estimate.ci95


class Spoken:
    """A source in whose responses somebody else says the first token, with a log-prob that means nothing."""

    def __init__(self, inner):
        self.inner, self.manifest = inner, inner.manifest

    def sample(self, prompts):
        changed = []
        for r in self.inner.sample(prompts):
            others = np.arange(r.response_ids.size) == 0
            changed.append(evolve(r, loss_mask=~others, behavior_logprobs=np.where(others, -50, r.behavior_logprobs)))
        return changed


def test_the_estimated_reverse_kl_counts_only_tokens_that_the_policy_said(llama, near_teacher, tokenizer, prompts):
    source, teacher = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=3, stop_ids=(1_000_000,))), HFScorer(near_teacher, tokenizer)
    estimate = evaluate_reverse_kl(Spoken(source), teacher, prompts)
    rollouts = source.sample(prompts)
    gaps = np.concatenate([(s.logprobs - r.behavior_logprobs)[1:] for r, s in zip(rollouts, teacher.score(rollouts), strict=True)])
    assert estimate.values == 2 * len(prompts)
    assert estimate.mean == pytest.approx(float(np.mean(np.expm1(gaps) - gaps)), rel=1e-4)


def test_pain_12_reverse_kl_to_a_teacher_of_other_tokens_is_refused_before_anything_is_sampled(
    source, prompts, teacher_model, swapped_tokenizer
):
    asked = Stopping(source, 99)
    with pytest.raises(TokenizerMismatchError, match="expected the policy's"):
        evaluate_reverse_kl(asked, HFScorer(teacher_model, swapped_tokenizer), prompts)
    assert asked.asked == []


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.9}])
def test_reverse_kl_of_samples_that_are_not_the_policys_own_is_refused(sampling, llama, tokenizer, prompts, teacher_model):
    with pytest.raises(InvalidRecordError, match="temperature"):
        evaluate_reverse_kl(HFSource(llama, tokenizer, SamplingParams(**sampling)), HFScorer(teacher_model, tokenizer), prompts)


def test_reverse_kl_needs_the_log_probs_of_the_sampler(tokenizer, prompts, teacher_model):
    silent = Fixed([[0.1]] * 7, tokenizer, reports=False)
    with pytest.raises(InvalidRecordError, match="behavior_logprobs"):
        evaluate_reverse_kl(silent, HFScorer(teacher_model, tokenizer), prompts)


def test_a_manifest_and_a_lineage_survive_json(scored, tmp_path):
    manifest = evolve(scored.manifest, generation=3)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    lineage = Lineage(ModelId("a", "1", "bfloat16"), None)
    lineage.write(tmp_path)
    assert Lineage.read(tmp_path) == lineage
