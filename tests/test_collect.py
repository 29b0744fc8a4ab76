"""`collect_rollouts`: runs that are resumed, stores of other runs, and what a source may not do."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from conftest import CONTEXT
from small_runs import PARAMS, Bar, Interrupted, Stopping, behavior, make_store, reopened, scored, source, teacher_model  # noqa: F401

from lopd import LanceStore, ZarrStore, collect_rollouts, label_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import (
    ConflictError,
    ContextOverflowError,
    ContextWarning,
    EngineError,
    InvalidRecordError,
    ManifestMismatchError,
    RefusedPromptsWarning,
    ScorerError,
    SourceError,
)
from lopd.records import ModelId, Prompt, Scores, fingerprint_tokenizer
from lopd.verbs import Preflight


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


def test_a_prompt_that_was_found_is_not_looked_for_again(source, prompts, make_store, monkeypatch):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts[:3], store)
    asked, real = [], store.find
    monkeypatch.setattr(store, "find", lambda names: asked.append(len(names)) or real(names))
    collect_rollouts(source, prompts, store)
    assert asked[0] == 2 * len(prompts)
    assert {*asked[1:]} == {2 * (len(prompts) - 3)}
    assert len(store) == 2 * len(prompts)


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
    assert bar.told[0] == ("begin", "sampling", 14, 0, None, "response tokens")
    assert sum(bar.advanced) == 14


def test_progress_of_collecting_is_told_totals_and_an_end_even_when_interrupted(source, prompts, make_store):
    store, bar = make_store(source.manifest), Bar()
    with pytest.raises(Interrupted):
        collect_rollouts(Stopping(source, 2), prompts, store, prompts_per_batch=2, progress=bar)
    sampled = [r.rollout.response_ids.size for r in store.read(range(8))]
    assert bar.told == [
        ("begin", "sampling", 14, 0, None, "response tokens"),
        ("advance", 4, sum(sampled[:4]), 0),
        ("advance", 4, sum(sampled[4:]), 0),
        ("end",),
    ]
    bar = Bar()
    collect_rollouts(source, prompts, store, prompts_per_batch=2, progress=bar)
    assert bar.told[0] == ("begin", "sampling", 14, 8, None, "response tokens")
    assert bar.advanced == [4, 2]
    assert bar.told[-1] == ("end",)


def test_a_progress_that_is_empty_before_it_begins_is_told_all_the_same(source, prompts, make_store):
    class Listed(Bar):
        def __len__(self):
            return len(self.told)

    bar = Listed()
    collect_rollouts(source, prompts, make_store(source.manifest), progress=bar)
    assert bar.told[0][0] == "begin"
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


class Yielding(Forgetful):
    """A source that gives the rollouts of each prompt as soon as it has them."""

    def sample(self, prompts):
        for prompt in prompts:
            yield from self.inner.sample([prompt])


def test_what_a_source_gave_before_it_refused_a_prompt_does_not_count_twice(source, prompts, contents):
    whole, store = MemoryStore(source.manifest), MemoryStore(source.manifest)
    collect_rollouts(source, prompts, whole)
    with pytest.warns(RefusedPromptsWarning, match="'endless'"):
        collect_rollouts(Yielding(source), [*prompts[:3], Prompt("endless", [5] * 5000), *prompts[3:]], store)
    assert contents(store) == contents(whole)


def test_a_source_that_loses_a_rollout_is_found_out(source, prompts):
    with pytest.raises(SourceError, match="every sample of every prompt"):
        collect_rollouts(Forgetful(source), prompts, MemoryStore(source.manifest))


def test_a_scorer_that_loses_a_rollout_is_found_out(source, prompts, teacher_model, tokenizer):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    for preflight in (Preflight(), None):
        with pytest.raises(ScorerError, match="one for each rollout, in order"):
            score_rollouts(store, Forgetful(HFScorer(teacher_model, tokenizer)), preflight=preflight)
    assert not store.scored("teacher").any()


def test_a_prompt_that_was_edited_is_refused_and_what_was_there_is_counted(source, prompts, make_store):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts[:3], store)
    edited = Prompt(prompts[1].prompt_id, [*prompts[1].token_ids.tolist(), 7])
    with pytest.raises(ConflictError, match=rf"'{prompts[1].prompt_id}/s\d/g0' has a prompt of .* tokens other than.*another id"):
        collect_rollouts(source, [prompts[0], edited, prompts[5]], store)
    assert len(store) == 6
    report = collect_rollouts(source, prompts, store)
    assert (report.skipped, report.rollouts) == (6, 2 * len(prompts) - 6)


def test_a_collection_that_is_repeated_reads_a_sample_of_the_prompts_and_compares_the_length_of_each(source, prompts, monkeypatch):
    store, read, asked = MemoryStore(source.manifest), MemoryStore.read, []
    collect_rollouts(source, prompts, store)
    monkeypatch.setattr("lopd.verbs.collect._COMPARED", 3)
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: asked.extend(rows) or read(self, rows, **options))
    assert collect_rollouts(source, prompts, store).skipped == 2 * len(prompts)
    assert len(asked) == 3
    longer = Prompt(prompts[1].prompt_id, [*prompts[1].token_ids.tolist(), 7])
    other = Prompt(prompts[6].prompt_id, prompts[6].token_ids[::-1])
    for edited in ([prompts[0], longer, *prompts[2:]], [*prompts[:6], other]):
        with pytest.raises(ConflictError, match="tokens other than"):
            collect_rollouts(source, edited, store)


def test_of_what_a_collection_goes_on_with_each_prompt_is_compared_before_anything_is_sampled(source, prompts, monkeypatch):
    store = MemoryStore(source.manifest)
    made = source.sample(prompts)
    store.append(made[:7] + made[8:])
    monkeypatch.setattr("lopd.verbs.collect._COMPARED", 2)
    monkeypatch.setattr(HFSource, "sample", lambda *_: pytest.fail("it was sampled"))
    edited = Prompt(prompts[3].prompt_id, [*prompts[3].token_ids[:-1].tolist(), 7])
    with pytest.raises(ConflictError, match="tokens other than"):
        collect_rollouts(source, [*prompts[:3], edited, *prompts[4:]], store)


def test_what_another_process_has_collected_meanwhile_is_not_sampled_again(source, prompts, tmp_path, monkeypatch):
    ours, stale = ZarrStore.create(tmp_path / "run", source.manifest), ZarrStore.open(tmp_path / "run")
    collect_rollouts(source, prompts, ZarrStore.open(tmp_path / "run"))
    monkeypatch.setattr(HFSource, "sample", lambda *_: pytest.fail("it was sampled"))
    assert collect_rollouts(source, prompts, ours).skipped == 2 * len(prompts)
    with pytest.raises(ConflictError, match="tokens other than"):
        collect_rollouts(source, [Prompt(prompts[0].prompt_id, [7])], stale)


class Meanwhile:
    """A source and a scorer that count what they are asked, and do something else once, while they are asked a second time."""

    def __init__(self, source, scorer, act):
        self.manifest, self.provenance, self.asked = source.manifest, scorer.provenance, []
        self.sample, self.score = (partial(self.ask, call, act) for call in (source.sample, scorer.score))

    def ask(self, call, act, items):
        self.asked.append(len(items))
        if len(self.asked) == 2:
            act()
        return call(items)


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_what_another_process_does_while_this_one_is_at_work_is_not_done_again(kind, source, prompts, teacher_model, tokenizer, tmp_path):
    ours, scorer = kind.create(tmp_path / "run", source.manifest), HFScorer(teacher_model, tokenizer)
    sampled = {rollout.rollout_id: rollout for rollout in source.sample(prompts)}

    def commit_others() -> None:  # an engine of another machine draws other tokens
        there = kind.open(tmp_path / "run")
        left = [evolve(r, response_ids=r.response_ids[::-1], behavior_logprobs=None) for r in sampled.values()]
        there.append([r for r in left if there.find([r.rollout_id])[0] < 0])

    ours_at_work = Meanwhile(source, scorer, commit_others)
    report = collect_rollouts(ours_at_work, prompts, ours, prompts_per_batch=2)
    assert (ours_at_work.asked, report.rollouts, report.skipped) == ([2, 2], 4, 2 * len(prompts) - 4)
    assert [r.rollout.content_hash == sampled[r.rollout.rollout_id].content_hash for r in ours.read(range(6))] == [True] * 4 + [False] * 2

    def score_others() -> None:
        score_rollouts(kind.open(tmp_path / "run"), scorer, preflight=None)

    ours_at_work, bar = Meanwhile(source, scorer, score_others), Bar()
    report = score_rollouts(ours, ours_at_work, rollouts_per_batch=4, preflight=None, progress=bar)
    assert (ours_at_work.asked, report.rollouts, sum(bar.advanced)) == ([4, 4], 4, len(ours))
    assert report.read_tokens == np.sort(ours.lengths().sum(axis=1))[:4].sum()
    assert ours.scored("teacher").all()

    def judge(prompt, rollout) -> float:  # the others are a call of the same verifier
        judged.append(rollout.rollout_id)
        if len(judged) == 1:
            label_rollouts(kind.open(tmp_path / "run"), judge, None, rollouts_per_batch=4)
        return 1.0

    judged = list[str]()
    assert label_rollouts(ours, judge, None, rollouts_per_batch=4).rollouts == 0
    assert len(judged) == len(ours) + 4


@pytest.mark.parametrize("others", [True, False])
def test_a_first_batch_that_another_process_commits_too_is_not_counted_and_the_next_is_looked_for(others, source, prompts, tmp_path):
    store = ZarrStore.create(tmp_path / "run", source.manifest)
    made = [evolve(r, response_ids=r.response_ids[::-1], behavior_logprobs=None) if others else r for r in source.sample(prompts[:5])]
    asked = []

    def sample(batch):
        asked.append(len(batch))
        if len(asked) == 1:
            ZarrStore.open(tmp_path / "run").append(made)
        return source.sample(batch)

    at_work = SimpleNamespace(manifest=source.manifest, sample=sample)
    bar = Bar()
    report = collect_rollouts(at_work, prompts, store, prompts_per_batch=2, progress=bar)
    assert sum(bar.advanced) == 2 * len(prompts)
    new = len(prompts) - 5
    assert (asked, report.rollouts, report.skipped) == ([2, 1, 1], 2 * new, 10)
    assert report.read_tokens == sum(len(row.rollout) for row in store.read(range(10, len(store))))


def test_another_prompt_that_another_process_samples_meanwhile_under_one_id_is_refused(source, prompts, teacher_model, tokenizer, tmp_path):
    store = ZarrStore.create(tmp_path / "run", source.manifest)
    other = Prompt(prompts[2].prompt_id, [7])
    at_work = Meanwhile(source, HFScorer(teacher_model, tokenizer), lambda: ZarrStore.open(tmp_path / "run").append(source.sample([other])))
    with pytest.raises(ConflictError, match=f"rollout '{other.prompt_id}/s0/g0' has content hash"):
        collect_rollouts(at_work, prompts, store, prompts_per_batch=2)
    assert len(store) == 6


def test_a_round_that_another_process_has_begun_meanwhile_is_not_sampled_by_another_policy(source, prompts, tmp_path):
    stale = ZarrStore.create(tmp_path / "run", source.manifest)
    first, second = (evolve(source, generation=1, identity=ModelId("student", name, "float32")) for name in ("step-10", "step-11"))
    collect_rollouts(first, prompts[:2], ZarrStore.open(tmp_path / "run"))
    asked = Stopping(second, 99)
    with pytest.raises(ManifestMismatchError, match=r"policy.*give the round of another policy a number of its own \(`generation`\)"):
        collect_rollouts(asked, prompts, stale)
    assert asked.asked == []


def test_a_round_that_another_process_begins_while_this_one_samples_is_its_own(source, prompts, tmp_path, monkeypatch):
    store = ZarrStore.create(tmp_path / "run", source.manifest)
    first, second = (evolve(source, generation=1, identity=ModelId("student", name, "float32")) for name in ("step-10", "step-11"))
    real, asked = HFSource.sample, []

    def sample(self, batch):
        asked.append(self)
        if len(asked) == 1:
            collect_rollouts(first, prompts[2:4], ZarrStore.open(tmp_path / "run"))
            raise ContextOverflowError("Prompt: it is too long.")
        return real(self, batch)

    monkeypatch.setattr(HFSource, "sample", sample)
    with pytest.raises(ConflictError, match="generation 1 was sampled by student@step-10"):
        collect_rollouts(second, prompts[:2], store, prompts_per_batch=1)
    assert len(store) == 4, "none of the second policy"


def test_a_resumed_collection_reads_one_row_of_each_prompt_that_is_there_once(source, prompts, make_store, monkeypatch):
    store = make_store(source.manifest)
    collect_rollouts(source, prompts[:5], store)
    rows, real = [], type(store).read

    def read(self, indices, *given, **named):
        rows.extend(indices)
        return real(self, indices, *given, **named)

    monkeypatch.setattr(type(store), "read", read)
    assert collect_rollouts(source, prompts, store).skipped == 10
    assert sorted(rows) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("wrong", ["3+4=?", ["3+4=?"], [1, 2]])
def test_what_is_no_prompt_is_refused_with_what_makes_one(wrong, source, make_store):
    with pytest.raises(InvalidRecordError, match=r"expected a (Prompt|list); .*make them .*with `lopd\.make_prompts`"):
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


def test_responses_that_the_context_cuts_are_said_once_and_counted(source, prompts, make_store):
    long = [Prompt(f"long{i}", [10 + i] * (CONTEXT - 1)) for i in range(2)]
    store = make_store(source.manifest)
    what = (
        r"2 of 2 responses were cut where the policy's context is full.*'long0/s0/g0'\) after 1 tokens, expected up to max_new_tokens = 6"
    )
    with pytest.warns(ContextWarning, match=what) as caught:
        report = collect_rollouts(source, [*prompts[:1], *long], store, prompts_per_batch=1)
    assert [warning.filename for warning in caught] == [__file__]
    ended = [r.rollout.finish_reason for r in store.read(range(2, 6))].count("stop")
    assert (report.rollouts, report.cut) == (6, 4 - ended)


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
