"""Drift from the reference policy: each number against its definition, how it reaches the loop's metrics, and when the guards speak."""

import copy
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import asdict, evolve
from conftest import TOKENIZER_ID

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_intervals import Chain

from lopd import (
    FusedLoss,
    FusedOPDLoss,
    MemoryStore,
    ReferenceLoss,
    ReferenceOPDLoss,
    SamplingParams,
    SFTLoss,
    TopKObjective,
    WeightedLoss,
    batches,
    by_token,
    collect_rollouts,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.student import CausalLMStudent
from lopd.errors import AdvantageWarning, DriftWarning, InvalidRecordError, NoSuchRowError
from lopd.guards import DriftLimits, judge_loss, stored_advantages, watch_drift
from lopd.losses.divergences import forward_kl
from lopd.losses.objective import OPDObjective
from lopd.losses.variants import ppo_clip
from lopd.records import AdvantageSummary, Drift, Lineage, StepMetrics
from lopd.records.drift import LEVELS, TokenLogprobs, effective_share, measure_drift, measure_step


def random_tokens(seed=0, lengths=(5, 1, 30, 12)):
    rng = np.random.default_rng(seed)
    size = sum(lengths)
    student, teacher, ref = (-rng.exponential(2.0, size) for _ in range(3))
    segments = np.repeat(np.arange(len(lengths)), lengths)
    return TokenLogprobs(student, teacher, ref, rng.uniform(0.1, 2.0, size), segments)


def test_every_number_is_its_definition():
    tokens = random_tokens()
    drift = measure_drift(tokens)
    ratio = np.exp(tokens.student - tokens.ref)
    rows = [tokens.segments == i for i in range(4)]
    w = np.array([np.prod(ratio[row]) for row in rows])
    sums = np.array([np.sum((tokens.weight * np.abs(tokens.teacher - tokens.student))[row]) for row in rows])
    sigma = math.sqrt(np.mean((4 * sums / tokens.weight.sum()) ** 2))
    spread = np.mean((ratio - 1) ** 2)
    assert (drift.rollouts, drift.tokens) == (4, 48)
    assert drift.ratio_mean == pytest.approx(ratio.mean())
    assert drift.ratio_std == pytest.approx(ratio.std())
    assert drift.ess == pytest.approx(w.sum() ** 2 / (4 * (w**2).sum()))
    assert drift.chi2 == pytest.approx(np.mean([(1 + spread) ** row.sum() - 1 for row in rows]), rel=1e-6)
    assert drift.kl == pytest.approx(np.mean(ratio - 1 - np.log(ratio)))
    assert drift.gap_bound == pytest.approx(sigma * math.sqrt(drift.chi2))
    lowest = np.argsort(tokens.ref)[:10]
    nearer = np.abs(tokens.teacher - tokens.ref) - np.abs(tokens.teacher - tokens.student)
    assert drift.gain[0] == pytest.approx(nearer[lowest].mean())
    assert sum(drift.gain[i] * n for i, n in enumerate((10, 10, 10, 9, 9))) == pytest.approx(nearer.sum())
    assert drift.mean_gain == pytest.approx(nearer.mean())
    gaps = tokens.teacher - tokens.student
    assert drift.advantages.quantiles == pytest.approx([np.quantile(gaps, level) for level in LEVELS])
    assert (drift.advantages.negative, drift.advantages.tail) == pytest.approx((np.mean(gaps < 0), np.mean(gaps < -5)))


def test_a_student_that_is_the_reference_policy_has_not_drifted():
    tokens = random_tokens()
    drift = measure_drift(evolve(tokens, student=tokens.ref))
    assert (drift.ratio_mean, drift.ratio_std, drift.chi2, drift.kl, drift.gap_bound) == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert drift.ess == 1.0
    assert set(drift.gain) == {0.0}


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 9])
def test_the_mean_gain_of_a_few_tokens_is_that_of_each(size):
    tokens = random_tokens(lengths=(size,))
    nearer = np.abs(tokens.teacher - tokens.ref) - np.abs(tokens.teacher - tokens.student)
    assert measure_drift(tokens).mean_gain == pytest.approx(nearer.mean())
    colder, weight = evolve(tokens, sampler=1.5 * tokens.ref), np.exp(-0.5 * tokens.ref)
    assert measure_drift(colder).mean_gain == pytest.approx(np.average(nearer, weights=weight))
    alike, plain = measure_drift(evolve(tokens, sampler=tokens.ref)), measure_drift(tokens)
    assert alike.gain == pytest.approx(plain.gain)


@pytest.mark.parametrize("shift", [-2000.0, 0.0, 2000.0])
def test_the_effective_share_depends_on_differences_of_log_weights_however_long_the_rollouts_are(shift):
    assert effective_share(np.log([1.0, 2.0, 3.0]) + shift) == pytest.approx(36 / (3 * 14))


def test_a_student_gone_wild_has_an_infinite_ratio_and_no_warning_of_numpy():
    tokens = random_tokens()
    drift = measure_drift(evolve(tokens, ref=np.full(48, -900.0)))
    assert (drift.ratio_mean, drift.ratio_std, drift.kl, drift.chi2, drift.gap_bound) == (math.inf,) * 5
    assert 0.25 <= drift.ess <= 1


def test_the_chi_square_of_independent_draws_is_the_one_of_the_distributions():
    """Rollouts of one token: reference uniform on four tokens, student (.4, .3, .2, .1): chi-square 4 * sum p^2 - 1 = 0.2."""
    rng = np.random.default_rng(3)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    drawn = rng.integers(0, 4, 200_000)
    ref = np.full(drawn.size, math.log(0.25))
    drift = measure_drift(TokenLogprobs(np.log(p[drawn]), ref, ref, np.ones(drawn.size), np.arange(drawn.size)))
    assert drift.chi2 == pytest.approx(0.2, abs=0.01)
    assert drift.ratio_mean == pytest.approx(1.0, abs=0.005)
    assert drift.kl == pytest.approx(float(np.sum(0.25 * np.log(0.25 / p))), abs=0.005)


def tempered(logits, temperature):
    scaled = logits / temperature
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


@pytest.mark.parametrize("moved", [0.8, 1.25])  # flatter, sharper
@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_drift_of_draws_at_another_temperature_is_that_of_draws_of_the_reference_policy(temperature, moved):
    """By enumeration: each token as often as the sampler draws it, in a million, as a rollout of its own; in halves, one without a sampler."""
    logits = 2 * np.random.default_rng(5).normal(size=(3, 6))
    ref, student, sampler = (tempered(logits, t) for t in (1.0, 1 / moved, temperature))
    often = np.round(1e6 * np.exp(sampler)).astype(int).ravel()
    teacher = tempered(logits + np.random.default_rng(6).normal(size=(3, 6)), 1.0)
    columns = [np.repeat(column.ravel(), often) for column in (student, teacher, ref)]
    count = len(columns[0])
    tokens = TokenLogprobs(*columns, np.ones(count), np.arange(count), np.repeat(sampler.ravel(), often))
    ratio, probs = np.exp(student - ref), np.exp(ref) / 3
    drift = measure_drift(tokens)
    assert drift.ratio_mean == pytest.approx(1, abs=1e-4)
    assert drift.ratio_std**2 == pytest.approx(drift.chi2) == pytest.approx((probs * (ratio - 1) ** 2).sum(), rel=1e-3)
    assert drift.kl == pytest.approx((probs * (ref - student)).sum(), rel=1e-3)
    assert abs(measure_drift(evolve(tokens, sampler=None)).ratio_mean - 1) > 0.03
    assert measure_drift(evolve(tokens, student=tokens.ref)).ess == 1
    nearer = np.abs(teacher - ref) - np.abs(teacher - student)
    assert drift.mean_gain == pytest.approx((probs * nearer).sum(), abs=1e-4)
    often = np.round(1e6 * np.exp(ref)).astype(int).ravel()
    drawn = TokenLogprobs(*(np.repeat(c.ravel(), often) for c in (student, teacher, ref)), np.ones(often.sum()), np.arange(often.sum()))
    assert drift.gain == pytest.approx(measure_drift(drawn).gain, abs=1e-4)
    exact = TokenLogprobs(*(np.repeat(c.ravel(), 2) for c in (student, ref, ref)), np.ones(36), np.arange(36))
    both = measure_step([evolve(exact, sampler=exact.ref), exact])
    assert (both.ratio_mean, both.kl) == (measure_drift(exact).ratio_mean, measure_drift(exact).kl)


def test_an_infinite_ratio_stays_infinite_under_the_least_weight():
    drift = measure_drift(
        TokenLogprobs(np.full(2, -1.0), np.zeros(2), np.array([-1.0, -9999.0]), np.ones(2), np.arange(2), np.full(2, -1.0))
    )
    assert (drift.ratio_mean, drift.ratio_std, drift.kl, drift.chi2) == (math.inf,) * 4


@pytest.mark.parametrize(("length", "moved"), [(100, 0.1), (100, 0.3), (1000, 0.1), (1000, 0.3)])
def test_chi_square_does_not_saturate_with_long_rollouts(length, moved):
    """1 / ESS - 1 of 32 rollouts is at most 31; the true one is up to exp(77)."""
    found = [
        (chain.log_second_moment(length), chain.drift(length, 32))
        for chain in (Chain(np.random.default_rng(seed), moved) for seed in range(3))
    ]
    for exact, drift in found:
        assert math.log1p(drift.chi2) == pytest.approx(exact, rel=0.15 if exact > 2 else 0.5)
    if length * moved >= 100:
        assert all(1 / drift.ess - 1 <= 31 < 0.05 * math.expm1(exact) for exact, drift in found)


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_theorem_3_5_holds_for_the_exact_gradients(seed, distance):
    """All responses of two tokens over three, each as likely as the other under the reference policy: the sample is the distribution."""
    torch.manual_seed(seed)
    theta = (distance * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    teacher = torch.randn(4, 3, dtype=torch.float64).log_softmax(-1)
    responses = [(a, b) for a in range(3) for b in range(3)]
    places = torch.tensor([[(0, a), (1 + a, b)] for a, b in responses])  # the second token has a table for each first one
    logprobs = theta.log_softmax(-1)[places[..., 0], places[..., 1]]
    advantages = (teacher[places[..., 0], places[..., 1]] - logprobs).detach()
    ratio = (logprobs.sum(-1) + 2 * math.log(3)).exp().detach()
    # a loss is a mean over tokens, so is the policy gradient: two tokens a response, nine responses
    on, off = (
        torch.autograd.grad((w[:, None] * advantages * logprobs).sum() / 18, theta, retain_graph=True)[0] for w in (ratio, torch.ones(9))
    )
    scores = [torch.autograd.grad(value, theta, retain_graph=True)[0].norm() for value in logprobs.flatten()]
    teacher_logprobs = teacher[places[..., 0], places[..., 1]]
    columns = [t.detach().flatten().numpy() for t in (logprobs, teacher_logprobs, torch.full((9, 2), -math.log(3.0)))]
    drift = measure_drift(TokenLogprobs(*columns, np.ones(18), np.repeat(np.arange(9), 2)))
    assert drift.chi2 >= float((ratio**2).mean() - 1) - 1e-9
    gap = float((on - off).norm())
    assert gap <= float(max(scores)) * drift.gap_bound + 1e-12
    assert (gap > 0.0) == (distance > 0)


def test_micro_batches_add_up_to_the_drift_of_all():
    tokens, found = random_tokens(), list[TokenLogprobs]()
    first = tokens.segments < 2
    for rows, renumber in ((first, 0), (~first, 2)):
        parts = {name: getattr(tokens, name)[rows] for name in ("student", "teacher", "ref", "weight", "segments")}
        parts["segments"] = parts["segments"] - renumber
        found.append(TokenLogprobs(**parts))
    assert measure_step(found) == measure_drift(tokens)
    assert measure_step([]) is None


# --- in the loop ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(llama, near_teacher, tokenizer, prompts):
    scorer = HFScorer(near_teacher, tokenizer)
    params = SamplingParams(max_new_tokens=6, samples_per_prompt=3, stop_ids=(0, 5))
    store = MemoryStore((source := HFSource(llama, tokenizer, params, Lineage(sft_teacher=scorer.provenance.model))).manifest)
    collect_rollouts(source, prompts, store)
    score_rollouts(store, scorer)
    return store


def trained(store, llama, loss, steps, **options):
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    stream = batches(store, rollouts_per_step=7, tokens_per_batch=options.pop("tokens_per_batch", 4096), **options)[:steps]
    return opd_steps(student, stream, loss, torch.optim.AdamW(student.parameters(), lr=options.pop("lr", 3e-3)))


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning")  # the models are random
@pytest.mark.parametrize("loss", [ReferenceOPDLoss(), FusedOPDLoss(), FusedOPDLoss(ratio_to_ref=True)])
def test_the_loop_measures_drift_that_starts_at_nothing_and_grows(loss, scored, llama):
    first, *_, last = [m.drift for m in trained(scored, llama, loss, 6, ref="behavior")]
    assert first.chi2 == pytest.approx(0, abs=1e-6)
    assert first.ratio_mean == pytest.approx(1, abs=1e-4)
    assert last.chi2 > 0.01
    assert last.kl > 100 * abs(first.kl)
    assert first.advantages.mean == pytest.approx(stored_mean(scored, 7), abs=1.0)


def stored_mean(store, count):
    return stored_advantages(store, count=count).mean


@pytest.mark.parametrize("weighting", [by_token, None])
def test_how_a_step_is_split_does_not_change_its_drift(weighting, scored, llama):
    extra = {} if weighting is None else {"weighting": weighting}
    whole, split = (
        next(iter(trained(scored, llama, ReferenceOPDLoss(), 1, ref="behavior", tokens_per_batch=cap, **extra))).drift for cap in (4096, 24)
    )
    for name, value in asdict(whole).items():
        if name != "advantages":
            np.testing.assert_allclose(getattr(split, name), value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_without_a_reference_column_or_a_teacher_there_is_no_drift(scored, llama):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdvantageWarning)
        assert next(iter(trained(scored, llama, ReferenceOPDLoss(), 1))).drift is None
    assert next(iter(trained(scored, llama, SFTLoss(), 1, teacher=None, ref="behavior"))).drift is None


def test_metrics_with_drift_go_through_json(scored, llama):
    (metrics,) = trained(scored, llama, ReferenceOPDLoss(), 1, ref="behavior")
    assert StepMetrics.from_json(json.loads(json.dumps(asdict(metrics)))) == metrics
    assert StepMetrics.from_json(asdict(evolve(metrics, drift=None))).drift is None
    written_before = {name: value for name, value in asdict(metrics).items() if name != "response_tokens"}
    written_before["tokens"] = written_before.pop("read_tokens")
    assert StepMetrics.from_json(written_before) == evolve(metrics, response_tokens=0)


def test_metrics_are_read_as_loggers_keep_them():
    metrics = metrics_of(1.0, step=3, gain=(0.1, 0.2, 0.3, 0.4, 0.5))
    flat = {"step": 3, **metrics.numbers()}
    assert StepMetrics.from_json(dict(reversed(flat.items()))) == metrics
    read = StepMetrics.from_json({**flat, "_timestamp": 1.0, "mean_label": None, "drift/chi2": "Infinity", "drift/lr": 0.1})
    assert read == evolve(metrics, drift=evolve(metrics.drift, chi2=math.inf))
    without, theirs = evolve(metrics, drift=None), [name for name in flat if name.startswith("drift/")]
    for beside in (dict.fromkeys(theirs), dict.fromkeys(theirs, math.nan), {"drift/lr": 0.1, "tokens": 9.0}):
        assert StepMetrics.from_json({"step": 3, **without.numbers(), **beside}) == without
    with pytest.raises(TypeError, match="'step'"):  # or all of them would be the first
        StepMetrics.from_json(metrics.numbers())


ADVANTAGES = ["mean", "negative", "tail", "tokens", "q01", "q05", "q50", "q95", "q99"]
DRIFT = ["rollouts", "tokens", "ratio_mean", "ratio_std", "ess", "chi2", "kl", "gap_bound"]
NUMBERS = ["loss", "reverse_kl", "clip_fraction", "grad_norm", "rollouts", "read_tokens", "seconds", "response_tokens"]
NUMBERS_OF_DRIFT = [
    *(f"drift/{name}" for name in DRIFT),
    *(f"drift/advantages/{name}" for name in ADVANTAGES),
    *(f"drift/gain/fifth{place}" for place in range(1, 6)),
]


def test_a_logger_gets_every_number_but_the_step_under_a_name_of_its_own(scored, llama):
    # a field that is added later comes along: write down its name here
    (metrics,) = trained(scored, llama, ReferenceOPDLoss(), 1, ref="behavior")
    row = metrics.numbers()
    assert list(row) == NUMBERS + NUMBERS_OF_DRIFT
    assert {type(value) for value in row.values()} == {float}
    everything = []

    def walk(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [] if value is None else None
        everything.append(value) if parts is None else [walk(part) for part in parts]

    walk({name: value for name, value in asdict(metrics).items() if name != "step"})
    assert sorted(row.values()) == sorted(everything)


def test_each_quantile_and_each_fifth_has_the_name_it_should(scored, llama):
    (metrics,) = trained(scored, llama, ReferenceOPDLoss(), 1, ref="behavior")
    row, advantages = metrics.numbers(), metrics.drift.advantages
    assert [row[f"drift/advantages/{name}"] for name in ("q01", "q05", "q50", "q95", "q99")] == list(advantages.quantiles)
    assert [row[f"drift/gain/fifth{place}"] for place in (1, 2, 3, 4, 5)] == list(metrics.drift.gain)
    assert row["drift/advantages/mean"] == advantages.mean
    assert row["read_tokens"] == metrics.read_tokens > row["drift/tokens"] == metrics.drift.tokens == metrics.response_tokens


def test_without_drift_a_logger_gets_no_number_of_it(scored, llama):
    (metrics,) = trained(scored, llama, ReferenceOPDLoss(), 1, ref="behavior")
    assert list(evolve(metrics, drift=None).numbers()) == NUMBERS


# --- the guards -----------------------------------------------------------------------------------------------------------------------


def metrics_of(ratio_mean, step=0, **changes):
    drift = evolve(measure_drift(random_tokens()), ratio_mean=ratio_mean, **changes)
    return StepMetrics(step, 0.0, 0.0, 0.0, 0.0, 4, 48, 1.0, drift)


def test_the_watch_speaks_once_when_the_mean_over_the_last_steps_is_beyond_the_limit():
    told = []
    ratios = [1.0, 0.98, 0.5, 0.95, 0.7, 0.7, 0.7]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for m in watch_drift((metrics_of(r, i) for i, r in enumerate(ratios)), DriftLimits(gain_per_kl=None, ratio_mean=0.8, steps=4)):
            told.append((m.step, len(caught)))
    assert told == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert "Step 4: ratio_mean is 0.782 (over the last 4 steps, KL " in str(caught[0].message)
    assert "nats a token), expected at least 0.8; " in str(caught[0].message)
    assert caught[0].category is DriftWarning
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("limits", "name", "healthy"),
    [
        (DriftLimits(), "ratio_mean", {"ratio_mean": 0.9}),
        (DriftLimits(), "gain_per_kl", {"gain": (0.02,) * 5}),
        (DriftLimits(), "gain_per_kl", {"kl": 0.005}),
        (DriftLimits(ess=0.5), "ess", {"ess": 0.5}),
    ],
)
def test_each_limit_is_one(limits, name, healthy):
    fine = {"ratio_mean": 1.0, "kl": 0.08, "gain": (0.1, 0.0, 0.0, 0.0, 0.0), "ess": 1.0}
    poor = {"ratio_mean": 0.899, "gain_per_kl": {"gain": (0.09, 0.0, 0.0, 0.0, 0.0)}, "ess": 0.499}[name]
    drift = evolve(metrics_of(1.0).drift, **fine)
    assert not limits.exceeded([drift])
    worse = evolve(drift, **(poor if isinstance(poor, dict) else {name: poor}))
    ((exceeded, sentence),) = limits.exceeded([worse]).items()
    assert exceeded == name
    assert ("nats nearer to the teacher for each nat of KL" in sentence) == (name == "gain_per_kl")
    assert not limits.exceeded([evolve(worse, **healthy)])
    assert not evolve(limits, **{name: None}).exceeded([worse])


def test_a_drift_that_is_no_number_is_beyond_every_limit():
    wild = evolve(metrics_of(math.nan).drift, kl=math.nan, ess=math.nan)
    assert set(DriftLimits(ess=0.1).exceeded([wild])) == {"ratio_mean", "gain_per_kl", "ess"}


def test_a_watch_with_nothing_to_watch_says_so():
    with pytest.raises(InvalidRecordError, match=r"Step 3: its drift is None.* pass a teacher and `ref=` .* or leave `watch_drift` out"):
        next(watch_drift([evolve(metrics_of(1.0, 3), drift=None)]))
    with pytest.raises(InvalidRecordError, match="steps is 0"):
        DriftLimits(steps=0)
    for floor in (-0.1, math.nan):
        with pytest.raises(InvalidRecordError, match=f"kl_floor is {floor}, expected at least 0 nats"):
            DriftLimits(kl_floor=floor)


def test_stored_advantages_are_those_of_the_counted_tokens_of_evenly_spaced_rollouts(scored):
    records = scored.read(range(len(scored)), columns=("teacher", "behavior"))
    gaps = [(r.scores["teacher"] - r.scores["behavior"])[r.rollout.loss_mask] for r in records]
    assert stored_advantages(scored) == AdvantageSummary.of(np.concatenate(gaps))
    assert stored_advantages(scored, rows=np.array([3]), count=9) == AdvantageSummary.of(gaps[3])
    assert stored_advantages(scored, count=2) == AdvantageSummary.of(np.concatenate([gaps[0], gaps[-1]]))
    assert stored_advantages(scored, teacher="nobody") is None


def test_stored_advantages_take_rows_and_a_count_as_verbs_do(scored):
    assert stored_advantages(scored, rows=[0, 3]) == stored_advantages(scored, rows=np.array([0, 3]))
    with pytest.raises(InvalidRecordError, match="of a mask pass"):
        stored_advantages(scored, rows=np.ones(len(scored), np.bool_))
    with pytest.raises(NoSuchRowError, match="row 1000000 was chosen"):
        stored_advantages(scored, rows=np.array([10**6]))
    for count in (-1, 0):
        with pytest.raises(InvalidRecordError, match=f"Advantages: count is {count}, expected at least 1"):
            stored_advantages(scored, count=count)


def self_scored(scored, llama, tokenizer):
    own = HFScorer(llama, tokenizer)
    store = MemoryStore(evolve(scored.manifest, sft_teacher=own.provenance.model))
    store.append([record.rollout for record in scored.read(range(len(scored)))])
    score_rollouts(store, own)
    return store


def test_the_advantages_are_judged_before_the_first_step_unless_a_ratio_is_at_hand(scored, llama, tokenizer, make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(self_scored(scored, llama, tokenizer))  # of a teacher that is the student: nothing to say
    far = HFScorer(make_model("llama_tied", seed=9), tokenizer)
    store = MemoryStore(evolve(scored.manifest, sft_teacher=far.provenance.model))
    store.append([record.rollout for record in scored.read(range(len(scored)))])
    score_rollouts(store, far)
    with pytest.warns(AdvantageWarning, match=r"of its advantages are below -5 nats, expected at most 2%.*ratio_to_ref=True") as caught:
        batches(store)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(store, ref="behavior")


def test_a_loss_without_a_ratio_is_judged_when_the_student_has_left_its_rollouts(scored, llama, tokenizer, make_model):
    far = HFScorer(make_model("llama_tied", seed=9), tokenizer)
    store = MemoryStore(evolve(scored.manifest, sft_teacher=far.provenance.model))
    store.append([record.rollout for record in scored.read(range(len(scored)))])
    score_rollouts(store, far)
    with pytest.warns(AdvantageWarning, match=r"Loss FusedOPDLoss: .* are below -5 nats.*ratio_to_ref=True") as caught:
        list(trained(store, llama, FusedOPDLoss(), 3, ref="behavior"))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(trained(store, llama, FusedOPDLoss(), 1, ref="behavior"))  # as each round of online OPD does
        list(trained(store, llama, SFTLoss(), 3, ref="behavior"))
    for corrected in (FusedOPDLoss(ratio_to_ref=True), FusedOPDLoss(transforms=(ppo_clip,))):
        with pytest.warns(AdvantageWarning, match=r"Student: it is 5\.04 nats a token from its teacher in step 0, expected") as caught:
            list(trained(store, llama, corrected, 3, ref="behavior"))
        assert [warning.filename for warning in caught] == [__file__]


def test_every_form_of_the_loss_without_a_ratio_is_warned_of_and_no_other(recwarn):
    summary = AdvantageSummary.of(np.full(10, -9.0, np.float32))
    plain, ratio = OPDObjective(), OPDObjective(ratio_to_ref=True)
    for loss in (FusedLoss(plain), ReferenceLoss(plain), FusedOPDLoss(), WeightedLoss([(1.0, SFTLoss()), (0.1, FusedLoss(plain))])):
        with pytest.warns(AdvantageWarning, match=f"Loss {type(loss).__name__}: 100.0% of its advantages"):
            judge_loss(loss, summary)
    silent = (
        FusedLoss(ratio),
        ReferenceLoss(OPDObjective.sft()),
        FusedLoss(TopKObjective(forward_kl)),
        FusedOPDLoss(transforms=(ppo_clip,)),
    )
    for loss in (*silent, SFTLoss(), WeightedLoss([(1.0, FusedLoss(ratio)), (0.1, SFTLoss())])):
        judge_loss(loss, summary)
    assert not recwarn


def test_a_summary_reads_as_one_line():
    summary = AdvantageSummary.of(np.array([-6.0, -1.0, 0.0, 1.0], np.float32))
    assert str(summary) == (
        "mean -1.500 nats, quantiles 1% -5.85, 5% -5.25, 50% -0.50, 95% +0.85, 99% +0.97, 50.0% below 0, 25.0% below -5"
    )
    assert isinstance(Drift.from_json(asdict(metrics_of(1.0).drift)), Drift)
