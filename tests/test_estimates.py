"""Estimates: the numbers they estimate, and intervals that hold what they promise."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl
from lopd.errors import InvalidRecordError, TokenizerMismatchError
from lopd.records import Rollout, RolloutSums
from lopd.records import estimates as metrics


def direct_kl(student: Any, teacher: Any, rollout: Rollout) -> float:
    """KL over the whole vocabulary at each response token, summed: one rollout alone, nothing clever."""
    ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])[None]
    with torch.no_grad():
        p, q = (model(input_ids=ids, use_cache=False).logits[0, :, :96].double().log_softmax(-1) for model in (student, teacher))
    first, last = rollout.prompt_ids.size - 1, ids.shape[1] - 1
    return float((p.exp() * (p - q)).sum(-1)[first:last].sum())


@pytest.mark.parametrize(("tokens_per_batch", "rows_per_chunk"), [(8192, 256), (20, 3)])
def test_exact_reverse_kl_is_the_sum_over_the_vocabulary_at_every_response_token(
    tokens_per_batch: int, rows_per_chunk: int, rollouts: list[Rollout], make_model: Callable[..., Any], tokenizer: Any
) -> None:
    student, teacher = make_model("qwen3_padded", seed=1), make_model("llama_tied", seed=2)
    scorer = HFScorer(teacher, tokenizer, tokens_per_batch=tokens_per_batch, rows_per_chunk=rows_per_chunk)
    got = exact_reverse_kl(HFSource(student, tokenizer), scorer, rollouts)
    assert got.counts.tolist() == [r.response_ids.size for r in rollouts]
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
    """Rollouts of unequal length whose tokens share an effect of their rollout; the mean per token is 1."""
    counts = rng.integers(1, 30, clusters).astype(float)
    return RolloutSums(counts * (1 + 0.5 * rng.standard_normal(clusters)) + np.sqrt(counts) * rng.standard_normal(clusters), counts)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    estimates = [draws(np.random.default_rng(seed), 60).per_token() for seed in range(1000)]
    share = np.mean([abs(e.mean - 1) <= e.ci95 for e in estimates])
    assert 0.92 <= share <= 0.97
    assert estimates[0].clusters == 60


def test_what_two_policies_share_cancels_in_their_difference() -> None:
    rng = np.random.default_rng(0)
    before = draws(rng, 200)
    after = RolloutSums(before.sums - 0.1 * before.counts + 0.1 * rng.standard_normal(200), before.counts)
    change = after.minus(before)
    assert change.mean == pytest.approx(after.per_token().mean - before.per_token().mean)
    assert change.mean == pytest.approx(-0.1, abs=0.01)
    assert change.ci95 < 0.1 * before.per_token().ci95
    assert before.minus(before).ci95 == 0


def test_one_draw_has_no_interval_and_none_is_refused() -> None:
    assert metrics.mean([2.0]).ci95 == np.inf
    with pytest.raises(InvalidRecordError, match="0 sums"):
        metrics.mean([])
