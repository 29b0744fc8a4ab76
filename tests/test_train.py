"""`opd_steps` on real models: SFT, OPD, who taught whom, and what stops training."""

import copy
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from attrs import evolve
from conftest import TOKENIZER_ID
from small_runs import (  # noqa: F401
    PARAMS,
    adamw,
    assert_same_state,
    exact_reverse_kl,
    make_store,
    plain_sgd,
    scored,
    small,
    source,
    state_of,
    teacher_model,
)

from lopd import batches, collect_rollouts, opd_steps, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.student import CausalLMStudent
from lopd.errors import (
    InvalidRecordError,
    MissingScoresError,
    TeacherConsistencyError,
    TeacherConsistencyWarning,
    TokenizerMismatchError,
    TrainingDivergedError,
)
from lopd.guards import ConsistencyPolicy
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.records import Lineage, Manifest, ModelId, SamplingParams, fingerprint_tokenizer, rollout_id

pytestmark = pytest.mark.filterwarnings("ignore:.*of its advantages are below:lopd.errors.AdvantageWarning")  # the models are random


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
    assert evolve(steps.lineage, store=None) == Lineage(sft_teacher=teacher_source.manifest.policy)
    student.export(tmp_path / "sft", tokenizer, steps.lineage)

    policy = HFSource.from_folder(tmp_path / "sft", PARAMS)
    assert policy.manifest.sft_teacher == teacher_source.manifest.policy
    store = MemoryStore(policy.manifest)
    collect_rollouts(policy, prompts, store)
    score_rollouts(store, HFScorer(teacher, tokenizer), column="teacher")
    with pytest.warns(TeacherConsistencyWarning, match="SFT teacher"):
        score_rollouts(store, HFScorer(make_model("llama_tied", seed=78), tokenizer), column="other")
    stream = batches(store)[:1]
    assert evolve(stream.lineage, store=None) == Lineage(policy.manifest.sft_teacher, store.columns["teacher"].model)
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
    with pytest.raises(MissingScoresError, match=r"column 'teacher' is absent and the rollouts have no scores yet; run `score_rollouts"):
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


def test_a_manifest_and_a_lineage_survive_json(scored, tmp_path):
    manifest = evolve(scored.manifest, generation=3)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    lineage = Lineage(ModelId("a", "1", "bfloat16"), None, batches(scored).lineage.store)
    lineage.write(tmp_path)
    assert Lineage.read(tmp_path) == lineage
