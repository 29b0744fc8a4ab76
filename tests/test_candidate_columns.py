"""Candidates from a source through stores into a batch: as columns of the policy and of the teacher, in rounds, and where they are missing."""

from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from small_runs import Stopping

from lopd import LanceStore, MemoryStore, SamplingParams, ZarrStore, batches, collect_rollouts, sample_round, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import ConflictError, InvalidRecordError, MissingScoresError, SourceError, TrainingWarning
from lopd.guards import ConsistencyPolicy
from lopd.guards.audit import audit
from lopd.records import Lineage, ModelId, policy_column
from lopd.records.collate import collate
from lopd.testing import assert_same_top_k
from lopd.tools.facts import score_columns
from lopd.tools.interop import export_parquet, import_parquet
from lopd.tools.plan import GpuRates, lightning, measured_rates, work_like
from lopd.verbs import filling

PARAMS = SamplingParams(max_new_tokens=4, samples_per_prompt=2, stop_ids=(0, 5), candidates=3, drawn=2)


@pytest.fixture(scope="module")
def teacher(near_teacher, tokenizer):
    return HFScorer(near_teacher, tokenizer, top_k=2, candidates=3, drawn=2)


@pytest.fixture
def source(llama, tokenizer, teacher):
    return HFSource(llama, tokenizer, PARAMS, Lineage(sft_teacher=teacher.provenance.model))


@pytest.fixture(params=["memory", "zarr", "lance"])
def store(request, source, tmp_path):
    return {
        "memory": lambda: MemoryStore(source.manifest),
        "zarr": lambda: ZarrStore.create(str(tmp_path / "s.zarr"), source.manifest),
        "lance": lambda: LanceStore.create(str(tmp_path / "s.lance"), source.manifest),
    }[request.param]()


def test_candidates_go_from_the_source_through_a_store_into_a_batch(store, source, prompts, teacher):
    collect_rollouts(source, prompts, store)
    score_rollouts(store, teacher)
    policy, taught = store.columns["policy"], store.columns["teacher"]
    assert (policy.model, policy.top_k, policy.candidates, policy.drawn) == (source.manifest.policy, 5, 0, 2)
    assert (taught.top_k, taught.candidates, taught.drawn) == (7, 3, 2)
    sampled = {rollout.rollout_id: rollout for rollout in source.sample(prompts)}
    for row in store.read(range(len(store)), columns=("policy", "teacher"), top_k=("policy", "teacher")):
        own, theirs, kept = row.top_k["policy"], row.top_k["teacher"], sampled[row.rollout.rollout_id].candidates
        np.testing.assert_array_equal(own.ids, kept.ids)
        np.testing.assert_array_equal(row.scores["policy"], row.rollout.behavior_logprobs)
        np.testing.assert_array_equal(theirs.ids[:, :3], own.ids[:, :3])
        np.testing.assert_array_equal(theirs.ids[:, -2:], own.ids[:, -2:])
        assert (own.drawn, theirs.drawn, theirs.distinct) == (2, 2, 5)
    stream = batches(store, ref="policy", top_k=True, consistency=ConsistencyPolicy.ERROR, rollouts_per_step=len(store))
    (batch,) = stream.step(0).batches
    on_N = batch.weight > 0
    assert batch.top_k_ids[on_N].shape == (int(on_N.sum()), 5)
    assert batch.drawn_ids[on_N].shape == batch.drawn_logprobs[on_N].shape == batch.drawn_ref_logprobs[on_N].shape == (int(on_N.sum()), 2)
    # where a drawn token is the sampled one, the three log-probs are those of the sampled token
    same_N = on_N & (batch.drawn_ids[:, 0] == batch.targets)
    assert same_N.any()
    torch.testing.assert_close(batch.drawn_logprobs[same_N, 0], batch.teacher_logprobs[same_N], atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.drawn_ref_logprobs[same_N, 0], batch.ref_logprobs[same_N], atol=1e-5, rtol=0)


def test_without_the_column_of_the_policy_drawn_tokens_come_without_what_drew_them(store, source, prompts, teacher):
    collect_rollouts(source, prompts, store)
    score_rollouts(store, teacher)
    (batch,) = batches(store, ref="behavior", top_k=True, rollouts_per_step=len(store)).step(0).batches
    assert batch.drawn_ids is not None
    assert batch.drawn_ref_logprobs is None


def test_each_round_keeps_the_candidates_of_its_own_policy(store, source, prompts, teacher):
    later = evolve(source, generation=1, identity=ModelId("student", "step-1", "float32"))
    for each in (source, later):
        collect_rollouts(each, prompts, store)
    assert {policy_column(0), policy_column(1)} <= set(store.columns)
    score_rollouts(store, teacher)
    for record in store.read(range(len(store)), top_k=("teacher",)):
        name = policy_column(record.rollout.generation)
        (row,) = store.find([record.rollout.rollout_id]).tolist()
        own = store.read([row], top_k=(name,))[0].top_k[name]
        np.testing.assert_array_equal(record.top_k["teacher"].ids[:, :3], own.ids[:, :3])


def test_a_scorer_that_wants_more_than_the_policy_kept_is_refused_before_it_computes(store, source, prompts, near_teacher, tokenizer):
    plain = evolve(source, sampling=evolve(PARAMS, candidates=2, drawn=0))
    with pytest.raises(InvalidRecordError, match="candidates"):
        HFScorer(near_teacher, tokenizer, candidates=3).score(plain.sample(prompts[:1]))
    store = MemoryStore(plain.manifest)
    collect_rollouts(plain, prompts, store)
    for wanted in ({"candidates": 3}, {"drawn": 1}):
        with pytest.raises(MissingScoresError, match="'policy' has 2 candidates and 0 drawn"):
            score_rollouts(store, HFScorer(near_teacher, tokenizer, **wanted))
    assert "teacher" not in store.columns


def test_candidates_of_a_batch_with_many_values_are_committed_in_parts(source, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "_VALUES", 100)
    store = ZarrStore.create(tmp_path / "s.zarr", source.manifest)
    collect_rollouts(source, prompts, store)
    assert store.scored("policy").all()
    assert 1 < sum(commit.column == "policy" for commit in store.history()) < len(store)


def test_a_batch_of_scores_ends_where_its_supports_are_many_and_is_one_commit(source, prompts, teacher, tmp_path, monkeypatch):
    store = ZarrStore.create(tmp_path / "s.zarr", source.manifest)
    collect_rollouts(source, prompts, store)
    # a little more than two of the longest responses, each token with a top-7
    monkeypatch.setattr(filling, "_VALUES", 60)
    asked = Stopping(teacher, 99)
    score_rollouts(store, asked, preflight=None)
    assert sum(asked.asked) == len(store) == 14
    assert 14 // 3 <= len(asked.asked) < 14
    assert sum(commit.column == "teacher" for commit in store.history()) == len(asked.asked)
    plain = Stopping(evolve(teacher, top_k=0, candidates=0, drawn=0), 99)
    score_rollouts(store, plain, column="plain", preflight=None)
    assert plain.asked == [14]


def test_a_policy_fills_in_what_a_killed_call_left_out(source, prompts, llama, tokenizer, teacher):
    plain = evolve(source, sampling=evolve(PARAMS, drawn=0))
    store, scorer = MemoryStore(plain.manifest), evolve(teacher, drawn=0)
    store.append(plain.sample(prompts[:2]))
    with pytest.raises(MissingScoresError):
        score_rollouts(store, scorer)
    score_rollouts(store, HFScorer(llama, tokenizer, top_k=3), column="policy")
    assert collect_rollouts(plain, prompts, store).skipped == 4
    assert score_rollouts(store, scorer).rollouts == len(store)


def test_a_round_that_was_killed_between_rollouts_and_candidates_is_gone_on_with_by_another_policy(store, source, prompts, teacher):
    collect_rollouts(source, prompts[:2], store)
    store.append(source.sample(prompts[2:4]))
    resumed = evolve(source, identity=evolve(source.manifest.policy, revision="weights:recomputed/0"))
    with pytest.warns(TrainingWarning, match="round 0 has 4 of these rollouts with their candidates, expected 8; .* was stopped"):
        rows = sample_round(resumed, teacher, prompts[:4], store)
    assert rows.tolist() == [0, 1, 2, 3]
    assert store.scored("teacher")[rows].all()
    with pytest.raises(ConflictError, match=r"round 0 has 0 of these rollouts with their candidates, expected 4; .* a number of its own"):
        sample_round(resumed, teacher, prompts[2:4], store)


def test_a_call_after_one_that_was_killed_keeps_the_candidates_that_are_missing(source, prompts, teacher):
    store = MemoryStore(source.manifest)
    store.append(source.sample(prompts[:2]))
    assert collect_rollouts(source, prompts, store).skipped == 0
    assert store.scored("policy").all()
    assert len(store) == 2 * len(prompts)
    assert score_rollouts(store, teacher).rollouts == len(store)
    assert collect_rollouts(source, prompts, store).skipped == len(store)


def test_candidates_of_other_tokens_than_a_killed_call_left_are_refused(source, prompts, teacher):
    store = MemoryStore(source.manifest)
    store.append(
        [evolve(r, response_ids=r.response_ids[::-1], behavior_logprobs=None, candidates=None) for r in source.sample(prompts[:2])]
    )
    lost = (
        r"is without candidates, as a call .* left it, .* into column 'policy' with a scorer whose top_k is 3, or sample this round again"
    )
    for _ in range(2):
        with pytest.raises(ConflictError, match=lost):
            collect_rollouts(source, prompts, store, prompts_per_batch=3)
    assert store.scored("policy").tolist() == [False] * 4 + [True] * 2


def test_of_candidates_that_another_process_commits_meanwhile_the_first_stay(source, prompts, tmp_path):
    store, other = ZarrStore.create(tmp_path / "run", source.manifest), ZarrStore.open(tmp_path / "run")
    at_work = Stopping(source, 99)
    at_work.sample = lambda batch: (collect_rollouts(source, prompts[:3], other), source.sample(batch))[1]
    report = collect_rollouts(at_work, prompts, store, prompts_per_batch=2)
    assert (report.rollouts, report.skipped) == (2 * len(prompts) - 6, 6)
    assert store.scored("policy").all()


def test_a_policy_column_of_another_model_is_refused_before_anything_is_sampled_or_scored(
    source, prompts, teacher, near_teacher, tokenizer
):
    store = MemoryStore(evolve(source, sampling=evolve(PARAMS, candidates=0, drawn=0)).manifest)
    collect_rollouts(evolve(source, sampling=store.manifest.sampling), prompts, store)
    score_rollouts(store, HFScorer(near_teacher, tokenizer, top_k=3), column="policy")
    with pytest.raises(MissingScoresError, match="has 0 candidates"):
        score_rollouts(store, evolve(teacher, drawn=0))
    other = MemoryStore(source.manifest)
    other.append(source.sample(prompts[:1]))
    score_rollouts(other, HFScorer(near_teacher, tokenizer, top_k=5), column="policy")
    with pytest.raises(ConflictError, match="column 'policy'"):
        collect_rollouts(source, prompts, other)
    assert len(other) == 2


def test_supports_of_one_width_but_other_draws_do_not_mix(source, prompts, teacher):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    for column, widths in (("near", {"top_k": 4, "candidates": 0, "drawn": 0}), ("other", {"top_k": 2, "candidates": 0, "drawn": 2})):
        score_rollouts(store, evolve(teacher, **widths), column=column)
    teachers = {"near": prompts[:3], "other": prompts[3:]}
    with pytest.raises(InvalidRecordError, match="2 of them drawn"):
        batches(store, teacher=teachers, ref="policy", top_k=True, rollouts_per_step=len(store)).step(0)


def test_an_audit_does_not_count_drawn_tokens_as_a_support(source, prompts, teacher):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    for column, drawn in (("plain", 0), ("drawing", 2)):
        score_rollouts(store, evolve(teacher, drawn=drawn), column=column)
    plain, drawing = (audit(store, [column]).candidates[0].z for column in ("plain", "drawing"))
    assert plain == drawing
    score_rollouts(store, evolve(teacher, top_k=0, candidates=0), column="only")
    assert audit(store, ["only"]).candidates[0].z is None


def test_a_column_of_other_widths_and_a_source_that_keeps_none_are_refused(source, prompts, teacher):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, teacher)
    with pytest.raises(ConflictError, match="drawn"):
        score_rollouts(store, evolve(teacher, top_k=4, drawn=0))

    class Forgetful:
        manifest = source.manifest

        def sample(self, asked):
            return [evolve(rollout, candidates=None) for rollout in source.sample(asked)]

    with pytest.raises(SourceError, match="without candidates"):
        collect_rollouts(Forgetful(), prompts, MemoryStore(source.manifest))


def test_other_drawn_tokens_in_the_reference_column_are_refused(source, prompts, teacher):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, teacher)
    records = list(store.read([0, 1], columns=("policy", "teacher"), top_k=("policy", "teacher")))
    assert collate(records, teacher="teacher", ref="policy", top_k="teacher").drawn_ref_logprobs is not None
    score_rollouts(store, evolve(teacher, drawn=1), column="fewer")
    fewer = list(store.read([0, 1], columns=("policy", "fewer"), top_k=("policy", "fewer")))
    assert collate(fewer, teacher="fewer", ref="policy", top_k="fewer").drawn_ref_logprobs.shape[1] == 1
    support = records[0].top_k["policy"]
    other = evolve(support, ids=np.concatenate([support.ids[:, :-1], (support.ids[:, -1:] + 1) % 10], axis=1))
    with pytest.raises(InvalidRecordError, match="other drawn tokens"):
        collate(
            [evolve(records[0], top_k={**records[0].top_k, "policy": other}), records[1]], teacher="teacher", ref="policy", top_k="teacher"
        )


def test_tools_know_what_a_support_is_made_of_and_how_fast_it_was_sampled(source, prompts, teacher, tmp_path):
    store = ZarrStore.create(str(tmp_path / "s.zarr"), source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=1)
    assert (work_like(store).columns, work_like(store).reads) == ((5, 0), 1)
    score_rollouts(store, teacher, rollouts_per_batch=4)
    work = work_like(store)
    assert work.columns == (5, 7)
    # the policy's own column was written while it sampled
    assert lightning(work, GpuRates(sampling=1, scoring=1, training=1), 1).phases[1].tokens == work.tokens
    assert score_columns(store)["top-k"][:2] == ["5 (2 drawn)", "7 (3 candidates, 2 drawn)"]
    assert measured_rates(store).keys() == {"sampling", "scoring"}
    assert list(store.verify()) == []
    export_parquet(store, tmp_path / "s.parquet")
    read = MemoryStore(source.manifest)
    import_parquet(tmp_path / "s.parquet", read)
    assert dict(read.columns) == dict(store.columns)
    for row, other in zip(store.read([0, 3], top_k=("teacher",)), read.read([0, 3], top_k=("teacher",)), strict=True):
        assert_same_top_k(row.top_k["teacher"], other.top_k["teacher"])


@pytest.mark.parametrize(("during", "at_once"), [(0, 1), (0, 2), (2, 1)], ids=["its own first batch", "the batch before", "its own"])
def test_rollouts_whose_candidates_are_on_the_way_are_not_taken_for_those_of_a_killed_call(during, at_once, source, prompts, tmp_path):
    """Another process is between the two appends of a batch, as this one samples it or has begun to."""
    ours, other = ZarrStore.create(tmp_path / "run", source.manifest), ZarrStore.open(tmp_path / "run")
    made = {prompt.prompt_id: source.sample([prompt]) for prompt in prompts}
    at, handed = during + 2 * (at_once - 1), Event()

    def sample(batch):
        if batch[0] is prompts[during]:
            assert at_once == 1 or handed.wait(20)
            others = [rollout for prompt in prompts[at : at + 2] for rollout in made[prompt.prompt_id]]
            other.append([evolve(r, response_ids=r.response_ids[::-1], behavior_logprobs=None, candidates=None) for r in others])
        else:
            handed.set()
        return [rollout for prompt in batch for rollout in made[prompt.prompt_id]]

    found = SimpleNamespace(manifest=source.manifest, sample=sample)
    report = collect_rollouts(found, prompts, ours, prompts_per_batch=2, batches_at_once=at_once)
    assert report.skipped == sum(len(made[prompt.prompt_id]) for prompt in prompts[at : at + 2])
