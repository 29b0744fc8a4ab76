"""Estimates: the numbers they estimate, and intervals that hold what they promise."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lopd import MemoryStore
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl
from lopd.errors import InvalidRecordError, TokenizerMismatchError
from lopd.records import Rollout, RolloutSums, Scores
from lopd.records import estimates as metrics
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout
from lopd.tools.doctor import describe_advantages


def direct_kl(student: Any, teacher: Any, rollout: Rollout) -> float:
    """Return the KL over the whole vocabulary at each response token that counts, summed: one rollout alone, nothing clever."""
    ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])[None]
    with torch.no_grad():
        p, q = (model(input_ids=ids, use_cache=False).logits[0, :, :96].double().log_softmax(-1) for model in (student, teacher))
    first, last = rollout.prompt_ids.size - 1, ids.shape[1] - 1
    return float((p.exp() * (p - q)).sum(-1)[first:last][torch.tensor(rollout.loss_mask)].sum())


@pytest.mark.parametrize(("tokens_per_batch", "rows_per_chunk"), [(8192, 256), (20, 3)])
def test_exact_reverse_kl_is_the_sum_over_the_vocabulary_at_every_token_that_counts(
    tokens_per_batch: int, rows_per_chunk: int, rollouts: list[Rollout], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    student, teacher = make_model("qwen3_padded", seed=1), make_model("llama_tied", seed=2)
    scorer = HFScorer(teacher, tokenizer, tokens_per_batch=tokens_per_batch, rows_per_chunk=rows_per_chunk)
    got = exact_reverse_kl(HFSource(student, tokenizer), scorer, rollouts)
    assert got.counts.tolist() == [r.loss_mask.sum() for r in rollouts]
    np.testing.assert_allclose(got.sums, [direct_kl(student, teacher, r) for r in rollouts], rtol=2e-4)


def test_exact_reverse_kl_of_a_model_to_itself_is_zero(rollouts: list[Rollout], llama: Any, tokenizer: Any) -> None:
    assert np.abs(exact_reverse_kl(HFSource(llama, tokenizer), HFScorer(llama, tokenizer), rollouts).sums).max() < 1e-5


def test_exact_reverse_kl_sums_over_the_tokens_that_the_student_does_not_rule_out(
    rollouts: list[Rollout], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model("phi_bias")
    with torch.no_grad():
        model.lm_head.bias[40] = -torch.inf
    assert np.abs(exact_reverse_kl(HFSource(model, tokenizer), HFScorer(model, tokenizer), rollouts).sums).max() < 1e-5


def test_exact_reverse_kl_to_a_teacher_of_other_tokens_is_refused(
    rollouts: list[Rollout], llama: Any, tokenizer: Any, swapped_tokenizer: Any
) -> None:
    with pytest.raises(TokenizerMismatchError, match="Teacher: the hash of its vocabulary"):
        exact_reverse_kl(HFSource(llama, tokenizer), HFScorer(llama, swapped_tokenizer), rollouts)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9))
def test_the_estimator_has_the_exact_kl_as_its_mean(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
    each = [metrics.sampled_reverse_kl([np.log(p[i : i + 1])], [np.log(q[i : i + 1])]).per_token().mean for i in range(size)]
    assert np.dot(p, each) == pytest.approx(np.dot(p, np.log(p / q)), rel=1e-5, abs=1e-7)


def draws(rng: np.random.Generator, clusters: int) -> RolloutSums:
    """Draw rollouts of unequal length whose tokens share an effect of their rollout; the mean per token is 1."""
    counts = rng.integers(1, 30, clusters).astype(float)
    return RolloutSums(counts * (1 + 0.5 * rng.standard_normal(clusters)) + np.sqrt(counts) * rng.standard_normal(clusters), counts)


def skewed(rng: np.random.Generator, clusters: int) -> RolloutSums:
    """Draw sums whose rate a token is exponential over rollouts, as that of KL nearly is; the mean per token is 1."""
    counts = rng.integers(5, 200, clusters).astype(float)
    return RolloutSums(counts * rng.exponential(1.0, clusters), counts)


def sparse(rng: np.random.Generator, clusters: int) -> RolloutSums:
    """Draw sums in which three tokens of a hundred have any KL, two nats of it on average."""
    counts = rng.integers(5, 200, clusters).astype(float)
    return RolloutSums(rng.gamma(np.maximum(rng.binomial(counts.astype(int), 0.03), 1e-9), 1 / 0.03), counts)


@pytest.mark.parametrize("clusters", [10, 30, 100])
@pytest.mark.parametrize("draw", [draws, skewed, sparse])
def test_nineteen_of_twenty_intervals_hold_the_truth(draw: Callable[..., RolloutSums], clusters: int) -> None:
    """The normal quantile held it 0.83 to 0.94 times, least often where the sums are skewed."""
    found = [draw(np.random.default_rng(seed), clusters).per_token() for seed in range(600)]
    assert 0.92 <= np.mean([e.low <= 1 <= e.high for e in found]) <= 0.98
    assert found[0].clusters == clusters
    assert all(e.mean - e.ci95 <= e.low <= e.mean <= e.high <= e.mean + e.ci95 * (1 + 1e-9) for e in found)


@pytest.mark.parametrize("prompts", [10, 30, 100])
@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_of_scores_hold_the_truth_where_samples_of_a_prompt_agree_more_than_those_of_two(prompts: int, samples: int) -> None:
    """Chances of prompts follow a beta distribution.  Two standard errors held the truth 0.6 to 0.9 times."""
    rng, held = np.random.default_rng(0), []
    for chance in np.linspace(0.05, 0.95, 19):
        for _ in range(60):
            right = rng.beta(chance, 1 - chance, (prompts, 1))
            found = metrics.mean_score((rng.random((prompts, samples)) < right).astype(float))
            held.append(found.low <= chance <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_scores_that_all_agree_have_an_interval() -> None:
    wrong, right = metrics.mean_score(np.zeros((30, 2))), metrics.mean_score(np.ones((5, 1)))
    # Wilson: z^2 / (n + z^2)
    assert (wrong.low, wrong.high) == pytest.approx((0.0, 0.113513), abs=1e-6)
    assert (right.low, right.high) == pytest.approx((0.565518, 1.0), abs=1e-6)
    assert (wrong.ci95, wrong.clusters, wrong.values) == (wrong.high, 30, 60)
    with pytest.raises(InvalidRecordError, match="scores of 0 prompts"):
        metrics.mean_score(np.zeros((0, 4)))


def test_samples_that_agree_count_once_and_independent_ones_each() -> None:
    single = metrics.mean_score(np.repeat([[1.0], [0.0]], 15, axis=0))
    assert metrics.mean_score(np.repeat([[1.0] * 8, [0.0] * 8], 15, axis=0)).high == single.high
    independent = metrics.mean_score((np.random.default_rng(0).random((1000, 8)) < 0.5).astype(float))
    assert independent.ci95 == pytest.approx(1.96 * 0.5 / math.sqrt(8000), rel=0.1)


@pytest.mark.parametrize(
    ("chance", "freedom", "t"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.3026527),
        (0.975, 4, 2.7764451),
        (0.975, 9, 2.2621572),
        (0.975, 29, 2.0452296),
        (0.975, 99, 1.9842169),
        (0.95, 10, 1.8124611),
        (0.995, 5, 4.0321430),
        (0.975, 10**5, 1.9599877),
    ],
)
def test_the_quantiles_of_t_are_those_of_the_tables(chance: float, freedom: int, t: float) -> None:
    assert metrics.t_quantile(chance, freedom) == pytest.approx(t, abs=1e-6)
    assert metrics.t_quantile(1 - chance, freedom) == pytest.approx(-t, abs=1e-6)
    assert metrics.t_cdf(t, freedom) == pytest.approx(chance, abs=1e-8)


def test_a_single_token_with_all_of_the_kl_widens_an_interval_to_no_more_than_twice_that_of_t() -> None:
    found = metrics.mean([0.0] * 9 + [1.0])
    width = metrics.t_quantile(0.975, 9) * 0.1
    assert (found.low, found.high) == pytest.approx((0.1 - width, 0.1 + 2 * width))


def test_draws_without_tokens_prove_nothing() -> None:
    found = RolloutSums(np.array([3.0, 0.0, 0.0, 0.0, 0.0]), np.array([4.0, 0.0, 0.0, 0.0, 0.0])).per_token()
    assert (found.mean, found.ci95) == (0.75, np.inf)
    some = RolloutSums(np.array([3.0, 1.0, 2.0, 0.0, 0.0, 0.0]), np.array([4.0, 2.0, 3.0, 0.0, 0.0, 0.0])).per_token()
    assert some.low < some.mean < some.high < np.inf
    with pytest.raises(InvalidRecordError, match="2 draws have 0 tokens"):
        RolloutSums(np.zeros(2), np.zeros(2))


def test_rollouts_of_one_prompt_are_one_draw_wherever_they_stand() -> None:
    sums, counts = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 1.0, 1.0])
    pooled = RolloutSums(sums, counts).by_prompt(["b", "a", "b", "a"])
    assert sorted(zip(pooled.sums, pooled.counts, strict=True)) == [(4.0, 3.0), (6.0, 3.0)]
    assert pooled.per_token().clusters == 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda five, four: five.minus(four), "it has 5 draws, expected the other's 4"),
        (lambda five, four: five.p_value(four), "it has 5 draws, expected the other's 4"),
        (lambda five, _: five.pooled(2), "it has 5 draws, expected 2 of each prompt; `by_prompt` pools an unequal number"),
        (lambda five, _: five.pooled(0), "samples is 0, expected at least 1"),
        (lambda five, _: five.pooled(-1), "samples is -1, expected at least 1"),
        (lambda five, _: five.by_prompt(["a", "b"]), r"it has 5 draws and prompt ids of shape \(2,\), expected one of each"),
    ],
)
def test_draws_that_do_not_go_together_are_refused(call: Callable[[RolloutSums, RolloutSums], object], says: str) -> None:
    with pytest.raises(InvalidRecordError, match=f"^Estimate: {says}"):
        call(RolloutSums(np.ones(5), np.ones(5)), RolloutSums(np.ones(4), np.ones(4)))


@pytest.mark.parametrize("clusters", [4, 7, 30])
def test_a_p_value_is_as_rare_as_it_says_with_few_draws(clusters: int) -> None:
    """By the normal distribution 0.02 came up 0.04 times with 7 draws."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(3000):
        counts = rng.integers(5, 40, clusters).astype(float)
        both = [RolloutSums(rng.standard_normal(clusters) * np.sqrt(counts), counts) for _ in range(2)]
        found.append(both[0].p_value(both[1]))
    assert np.mean(np.array(found) <= 0.02) == pytest.approx(0.02, abs=0.008)
    assert both[0].p_value(both[1]) == pytest.approx(1 - both[1].p_value(both[0]))
    assert both[0].p_value(both[0]) == RolloutSums(np.ones(1), np.ones(1)).p_value(RolloutSums(np.zeros(1), np.ones(1))) == 0.5


def test_what_two_policies_share_cancels_in_their_difference() -> None:
    rng = np.random.default_rng(0)
    before = draws(rng, 200)
    after = RolloutSums(before.sums - 0.1 * before.counts + 0.1 * rng.standard_normal(200), before.counts)
    change = after.minus(before)
    assert change.mean == pytest.approx(after.per_token().mean - before.per_token().mean)
    assert change.mean == pytest.approx(-0.1, abs=0.01)
    assert change.ci95 < 0.1 * before.per_token().ci95
    assert before.minus(before).ci95 == 0


def test_an_infinite_sum_has_no_interval() -> None:
    """A student has a token that its teacher's head lacks: the interval was NaN, with a warning of numpy's."""
    infinite, finite = (RolloutSums(np.array([1.0, each, 2.0, 3.0, 4.0]), np.ones(5)) for each in (np.inf, 1.0))
    for found, mean in ((infinite.per_token(), np.inf), (finite.minus(infinite), -np.inf), (infinite.minus(infinite), np.nan)):
        assert (found.low, found.high, found.ci95, found.clusters) == (-np.inf, np.inf, np.inf, 5)
        np.testing.assert_equal(found.mean, mean)
        assert str(found) == f"{mean} (no interval)"
    assert infinite.p_value(finite) == infinite.p_value(infinite) == 0.5
    assert str(metrics.mean([2.0])) == "2.0000 (one draw has no interval)"


def test_one_draw_has_no_interval_and_none_is_refused() -> None:
    assert metrics.mean([2.0]).ci95 == np.inf
    with pytest.raises(InvalidRecordError, match="0 sums"):
        metrics.mean([])


def test_the_doctors_interval_of_a_mean_advantage_has_prompts_as_draws() -> None:
    store, rng = MemoryStore(tiny_manifest()), np.random.default_rng(0)
    gaps = rng.standard_normal(6)
    items = [tiny_rollout(f"p{i}/s{s}/g0", behavior_logprobs=[-3.0] * 3) for i in range(6) for s in range(4)]
    store.append(items)
    store.append_scores("teacher", tiny_provenance(), [Scores.of(r, [gaps[i // 4] * 0.1 - 3] * 3) for i, r in enumerate(items)])
    found, alike = describe_advantages(store, "teacher", "behavior"), metrics.mean(0.1 * gaps)
    assert found is not None
    assert found.mean.ci95 == pytest.approx(alike.ci95, rel=1e-4), "four samples that agree are not four draws"
