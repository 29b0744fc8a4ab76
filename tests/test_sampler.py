"""Rollouts drawn at another temperature or top-p than 1: the gradient by enumeration, what batches bring, and what is warned of."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from attrs import evolve
from helpers import BigramLM, BigramWorld, flat_gradient
from small_runs import PARAMS

from lopd import batches, collate, collect_rollouts, label_rollouts, opd_steps, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.student import CausalLMStudent
from lopd.errors import AdvantageWarning, InvalidRecordError, SamplerWarning
from lopd.losses.beside import EntropyBonus
from lopd.losses.fused import FusedLoss, FusedOPDLoss
from lopd.losses.objective import OPDObjective, Tokens, uncorrected
from lopd.losses.reference import ReferenceOPDLoss, WeightedLoss
from lopd.losses.variants import (
    drift_gate,
    entropy_advantage,
    extrapolate,
    importance_ratio,
    log_compress,
    position_weights,
    power,
    ppo_clip,
    prefix_fraction,
)
from lopd.records import SAMPLER_COLUMN, Lineage, Rollout, ScoredRollout
from lopd.records.checks import name_of
from lopd.records.drift import measure_step

pytestmark = pytest.mark.filterwarnings("ignore:.*nats a token from its teacher:lopd.errors.AdvantageWarning")  # the models are random

PLAIN = ReferenceOPDLoss(clip=None)
RATIOS = {
    "plain": ReferenceOPDLoss(clip=None, ratio_to_ref=True),
    "fused": FusedOPDLoss(clip=None, ratio_to_ref=True),
    "as weights": FusedOPDLoss(clip=None, transforms=(importance_ratio,)),
    "ppo": FusedOPDLoss(clip=None, transforms=(ppo_clip,)),
}
every_ratio = pytest.mark.parametrize("loss", RATIOS.values(), ids=RATIOS)
POLICY, TEACHER = (BigramLM(5, 3, seed, scale=0.8) for seed in (1, 2))


# --- by enumeration -------------------------------------------------------------------------------------------------------------------


def heated(model, temperature):
    """Return the model whose distributions are those of this one at a temperature."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.head_VD.div_(temperature)
        made.bias_V.div_(temperature)
    return made


def nucleus_VV(model, top_p):
    """Return (V, V) whether a token is left by the cut, after each token."""
    probs_VV = model.logprobs_VV().detach().exp()
    return torch.stack([torch.stack([row[row > p].sum() < top_p for p in row]) for row in probs_VV])


def gradient(world, weights_R, loss=PLAIN, sampler_VV=None):
    """Return the gradient by enumerated responses, each of which counts with its weight; the student is the policy that sampled."""
    batch = world.batch(weights_R, TEACHER, POLICY)
    if sampler_VV is not None:
        batch = evolve(batch, sampler_logprobs=sampler_VV[batch.inputs, batch.targets])
    return -flat_gradient(POLICY, POLICY(batch, loss).loss_sum)


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@every_ratio
@pytest.mark.parametrize("temperature", [0.8, 0.5, 1.6])
def test_of_one_token_at_another_temperature_the_corrected_gradient_is_the_online_one(temperature, loss):
    world, sampler = BigramWorld(5, 1), heated(POLICY, temperature)
    drawn_R, sampler_VV = world.probabilities_R(sampler), sampler.logprobs_VV().detach()
    online = gradient(world, world.probabilities_R(POLICY))
    assert_same(gradient(world, drawn_R, loss, sampler_VV), online)
    for biased in (gradient(world, drawn_R), gradient(world, drawn_R, loss)):
        assert float((biased - online).norm() / online.norm()) > 0.05, "without the sampler's log-probs, a ratio does not correct"


@every_ratio
def test_of_several_tokens_it_is_the_exact_one_on_the_states_that_the_sampler_visits(loss):
    world, sampler = BigramWorld(5, 3), heated(POLICY, 0.8)
    drawn_R, sampler_VV = world.probabilities_R(sampler), sampler.logprobs_VV().detach()
    exact = flat_gradient(POLICY, world.objective(POLICY, TEACHER, states_of=sampler))
    assert_same(gradient(world, drawn_R, loss, sampler_VV), exact)
    # with the ratio of whole responses it is the online one
    logs = [world.per_response(model.logprobs_VV().detach()) for model in (POLICY, sampler)]
    ratios_R = torch.stack([(p.sum() - q.sum()).exp() for p, q in zip(*logs, strict=True)])
    assert_same(gradient(world, drawn_R * ratios_R), gradient(world, world.probabilities_R(POLICY)))


@every_ratio
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 0.9), (1.0, 0.5)])
def test_what_top_p_leaves_of_the_bias_is_the_share_of_the_tokens_that_it_cut(temperature, top_p, loss):
    world, sampler = BigramWorld(5, 1), heated(POLICY, temperature)
    left_VV = nucleus_VV(sampler, top_p)
    sampler_VV = sampler.logprobs_VV().detach().masked_fill(~left_VV, -torch.inf).log_softmax(-1)
    kept_R = torch.stack([mask_T.all() for mask_T in world.per_response(left_VV)])
    assert 0 < int(kept_R.sum()) < len(kept_R)
    drawn_R = torch.stack([row_T.sum() for row_T in world.per_response(sampler_VV)]).exp() / len(world.prompts)
    online_R = world.probabilities_R(POLICY)
    missing = gradient(world, online_R * ~kept_R)
    assert_same(gradient(world, drawn_R, loss, sampler_VV) + missing, gradient(world, online_R))
    assert float(missing.norm()) > 0.01


# --- from an engine to the loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(llama, make_model, tokenizer, prompts):
    """Return `scored(**sampling)`: a store of rollouts with their sampler's log-probs, and a teacher's scores."""

    def get(**sampling):
        scorer = HFScorer(make_model("llama_tied", seed=8), tokenizer)
        lineage = Lineage(sft_teacher=scorer.provenance.model)
        source = HFSource(llama, tokenizer, evolve(PARAMS, **sampling), lineage)
        store = MemoryStore(source.manifest)
        collect_rollouts(source, prompts, store)
        score_rollouts(store, scorer)
        return store

    return get


def without_sampler(store, ids):
    """Return the same store without the sampler's log-probs of some rollouts."""
    made = MemoryStore(store.manifest)
    records = store.read(range(len(store)), ["teacher"])
    rollouts = [r.rollout if i not in ids else evolve(r.rollout, sampler_logprobs=None) for i, r in enumerate(records)]
    made.append(rollouts)
    made.append_scores("teacher", store.columns["teacher"], [store._scores["teacher"][i] for i in range(len(store))])
    return made


@pytest.mark.parametrize("sampling", [{"temperature": 0.8}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_batches_bring_both_log_probs_and_drift_begins_at_one(sampling, scored, llama, tokenizer):
    store = scored(**sampling)
    assert store.scored(SAMPLER_COLUMN).all()
    (step,) = batches(store, ref="behavior")[:1]
    for batch in step.batches:
        on = batch.weight > 0
        assert not torch.equal(batch.sampler_logprobs[on], batch.ref_logprobs[on])
        assert torch.equal(Tokens.counted(batch).sampler(), batch.sampler_logprobs[on])
    student = CausalLMStudent(copy.deepcopy(llama), tokenizer)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    (metrics,) = opd_steps(student, [step], FusedOPDLoss(ratio_to_ref=True), optimizer)
    assert metrics.drift.ratio_mean == pytest.approx(1, abs=1e-4)
    assert metrics.drift.kl == pytest.approx(0, abs=1e-6)


def test_at_temperature_one_nothing_is_brought_and_nothing_warned_of(scored):
    store = scored()
    (step,) = batches(store, ref="behavior")[:1]
    assert {batch.sampler_logprobs for batch in step.batches} == {None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdvantageWarning)
        batches(store)


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        ({"temperature": 0.8}, r"temperature 0.8 and top_p 1, so the gradient is biased .* likely tokens came too often; pass"),
        ({"temperature": 1.5}, r"temperature 1.5 and top_p 1, so the gradient is biased .* likely tokens came too rarely; pass"),
        ({"top_p": 0.9}, r"temperature 1 and top_p 0.9, .* were left came too often, and those that were never drawn are missing"),
        ({"temperature": 0.0}, r"temperature 0 and top_p 1, .* those that were never drawn are missing from it, with a ratio too"),
    ],
)
def test_a_run_without_a_ratio_is_warned_once_of_the_bias(sampling, why, scored):
    store = scored(**sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdvantageWarning)
        with pytest.warns(SamplerWarning, match=rf"MemoryStore: 14 of 14 rollouts have no importance ratio, .*{why}") as caught:
            stream = batches(store)
    assert [warning.category for warning in caught].count(SamplerWarning) == 1
    # with them `opd_steps` would warn again
    assert {(batch.ref_logprobs, batch.sampler_logprobs) for batch in stream.step(0).batches} == {(None, None)}
    batches(store, teacher=None)
    batches(store, ref="behavior")
    with pytest.raises(InvalidRecordError, match=r"'behavior/sampler', expected log-probs at temperature 1; pass 'behavior'"):
        batches(store, ref="behavior/sampler")


def test_rollouts_that_lack_the_log_probs_of_the_sampler_are_counted_and_go_by_their_reference(scored):
    store = without_sampler(scored(temperature=0.8), {0, 3})
    with pytest.warns(SamplerWarning, match=r"2 of 14 rollouts lack the sampler_logprobs .*--logprobs-mode processed_logprobs") as caught:
        steps = batches(store, ref="behavior", tokens_per_batch=4096)
    assert len(caught) == 1
    (step,) = steps[:1]
    (batch,) = step.batches
    same = [torch.equal(batch.sampler_logprobs[batch.segment_ids == i], batch.ref_logprobs[batch.segment_ids == i]) for i in range(14)]
    assert sum(same) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdvantageWarning)
        with pytest.warns(
            SamplerWarning, match=r"14 of 14 rollouts have no .*, and 2 lack the .*; sample with .* that records them .* and pass `ref"
        ):
            batches(store)
    with pytest.warns(SamplerWarning, match="14 of 14"):
        steps = batches(without_sampler(store, set(range(14))), ref="behavior")
    assert {batch.sampler_logprobs for batch in next(iter(steps)).batches} == {None}
    store = without_sampler(store, {0, 3})
    label_rollouts(store, lambda _, rollout: float(rollout.response_ids[0] % 2), None, recheck=0)
    with pytest.warns(SamplerWarning, match=r"of 14 rollouts lack the sampler_logprobs"):
        batches(store, teacher=None, ref="behavior", label="label")
    batches(store, teacher=None, ref="behavior")


def test_rollouts_drawn_otherwise_than_the_manifest_has_it_are_warned_of(scored):
    hot = scored(temperature=0.8)
    mixed = MemoryStore(evolve(hot.manifest, sampling=evolve(hot.manifest.sampling, temperature=1.0)))
    mixed.append([record.rollout for record in without_sampler(hot, {0, 3}).read(range(len(hot)))])
    mixed.append_scores("teacher", hot.columns["teacher"], [hot._scores["teacher"][i] for i in range(len(hot))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdvantageWarning)
        with pytest.warns(
            SamplerWarning, match=r"12 of 14 rollouts have sampler_logprobs and no .* its manifest has temperature 1 and"
        ) as caught:
            batches(mixed)
    assert sum(warning.category is SamplerWarning for warning in caught) == 1
    batches(mixed, ref="behavior")


RATIOLESS = [
    (),
    (position_weights,),
    (partial(extrapolate, scale=1.5), partial(prefix_fraction, fraction=0.5)),
    (log_compress,),
    (partial(power, alpha=0.5),),
    (drift_gate,),
    (entropy_advantage,),
]


@pytest.mark.parametrize("transforms", RATIOLESS, ids=lambda transforms: " ".join(map(name_of, transforms)) or "none")
def test_a_loss_that_states_it_has_no_ratio_is_warned_of_at_the_first_step(transforms, scored, llama, tokenizer):
    student = CausalLMStudent(copy.deepcopy(llama), tokenizer)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    steps = batches(scored(temperature=0.8), ref="behavior")
    with pytest.warns(SamplerWarning, match=r"Loss FusedOPDLoss: it has no importance ratio, .*pass `ratio_to_ref=True`") as caught:
        next(iter(opd_steps(student, steps, FusedOPDLoss(transforms=transforms), optimizer)))
    assert sum(warning.category is SamplerWarning for warning in caught) == 1
    for corrected in ({"ratio_to_ref": True, "transforms": transforms}, {"transforms": (importance_ratio, *transforms)}):
        next(iter(opd_steps(student, steps, FusedOPDLoss(**corrected), optimizer)))


def test_what_surely_has_no_ratio_states_so_through_all_that_stands_on_it():
    def own(signal):
        return signal

    compressed = OPDObjective(transforms=(log_compress,))
    for loss in (compressed, FusedLoss(compressed), FusedLoss(EntropyBonus(compressed)), WeightedLoss(((1.0, FusedLoss(compressed)),))):
        assert loss.ratioless
        assert not loss.uncorrected
    for settings in ({"transforms": (own,)}, {"transforms": (log_compress, own)}, {"transforms": (ppo_clip,)}, {"advantage": 1.0}):
        assert not OPDObjective(**settings).ratioless
    assert OPDObjective(transforms=(uncorrected(own),)).ratioless


def test_the_drift_of_a_step_weighs_tokens_by_what_drew_them(scored, llama, tokenizer, monkeypatch):
    seen, loss = [], FusedOPDLoss(ratio_to_ref=True)
    monkeypatch.setattr("lopd.verbs.train.measure_step", lambda known: seen.extend(known) or measure_step(known))
    for temperature in (1.0, 0.6):
        student = CausalLMStudent(copy.deepcopy(llama), tokenizer)
        steps = batches(scored(temperature=temperature), ref="behavior", rollouts_per_step=7, tokens_per_batch=4096)
        next(iter(opd_steps(student, steps, loss, torch.optim.SGD(student.parameters(), lr=0.0))))
    plain, drawn = seen
    assert plain.sampler is None
    (batch,) = steps.step(0).batches
    np.testing.assert_array_equal(drawn.sampler, batch.sampler_logprobs[batch.counted].numpy())
    assert not np.allclose(drawn.sampler, drawn.ref)


def test_records_bring_them_too():
    rollout = Rollout("r", [1], [2, 3], [True, True], "stop", [-1.0, -2.0], sampler_logprobs=[-0.5, -1.5])
    record = ScoredRollout(rollout, {"ref": np.array([-1.0, -2.0], np.float32)})
    assert collate([record], ref="ref").sampler_logprobs.tolist() == [-0.5, -1.5]
    assert collate([record]).sampler_logprobs is None
