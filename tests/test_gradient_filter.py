"""Tokens whose gradient is provably small may skip two of the three products; what that neglects is bounded and reported."""

import math

import hypothesis.strategies as st
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from test_fused_losses import SMALL, Recorded, broken_clauses, products  # noqa: F401

from lopd.errors import InvalidRecordError
from lopd.losses.chunking import Chunking
from lopd.losses.divergences import forward_kl
from lopd.losses.fused import FusedLoss, FusedOPDLoss
from lopd.losses.objective import OPDObjective, Signal, per_token
from lopd.losses.reference import ReferenceOPDLoss, WeightedLoss
from lopd.losses.top_k import TopKObjective
from lopd.testing import LossCase, loss_case
from lopd.testing.losses import evaluate_case


def agreeing(seed: int = 0, size: float = 4.0, **options: object) -> LossCase:
    """Make a case of many tokens, at half of which the teacher finds nearly what the student finds."""
    case = loss_case("agreeing", [60, 50, 70], counted=0.9, size=size, seed=seed, **options)
    own_N = case.head.logits(case.hidden).log_softmax(-1).gather(-1, case.batch.targets[:, None])[:, 0]
    assert case.batch.teacher_logprobs is not None
    near_N = torch.arange(len(own_N)) % 2 == 0
    teacher_N = torch.where(near_N, (own_N - 1e-3).clamp(max=0), case.batch.teacher_logprobs)
    return evolve(case, batch=evolve(case.batch, teacher_logprobs=teacher_N))


def test_with_an_epsilon_of_zero_the_filter_is_exact_and_reports_that_nothing_was_neglected() -> None:
    assert FusedOPDLoss().epsilon == 0.0
    output, _ = evaluate_case(FusedOPDLoss(), agreeing())
    assert output.neglected_sum is not None
    assert float(output.neglected_sum) == 0.0


@per_token
def nothing(signal: Signal) -> Signal:
    return evolve(signal, weight=0 * signal.weight)


def unmarked_nothing(signal: Signal) -> Signal:
    return nothing(signal)


def test_with_an_epsilon_tokens_without_any_gradient_skip_two_products_also_where_four_are_needed(products: Recorded) -> None:
    case = agreeing().rounded(torch.float32)
    for transform in (nothing, unmarked_nothing):
        for epsilon in (0.0, 1e-30):
            products.__init__()
            FusedOPDLoss(transforms=(transform,), chunking=SMALL, epsilon=epsilon)(*case.leaves(), case.batch).loss_sum.backward()
            chunks = len(products.logits) // (1 if transform is nothing else 2)
            assert chunks > 5
            # one, of no rows: it fills the gradients with zeros
            made = chunks if epsilon == 0 else 1
            assert (products.hidden_gradients, products.weight_gradients) == (made, made)


@given(st.integers(0, 2**20), st.sampled_from([1e-4, 1e-2, 0.1, 1.0, 5.0]), st.sampled_from([None, 2.0]))
@settings(deadline=None, max_examples=40)
def test_what_is_neglected_is_within_the_reported_bound(seed: int, epsilon: float, softcap: float | None) -> None:
    case = agreeing(seed, softcap=softcap, bias=True)
    output, mine = evaluate_case(FusedOPDLoss(epsilon=epsilon, chunking=SMALL), case)
    exact_output, exact = evaluate_case(FusedOPDLoss(), case)
    torch.testing.assert_close(output.loss_sum, exact_output.loss_sum)
    assert output.neglected_sum is not None
    bound = float(output.neglected_sum)
    on_N = case.batch.weight > 0
    hidden, weight, bias = (float((a - b).norm()) for a, b in zip(mine, exact, strict=True))
    assert weight <= bound * float(case.hidden[on_N].norm(dim=-1).max()) + 1e-9
    assert hidden <= bound * float(case.head.weight.norm(dim=-1).max()) + 1e-9
    assert bias <= bound + 1e-9


def test_the_tokens_that_are_skipped_are_those_with_small_advantage_times_missing_probability() -> None:
    case = agreeing()
    student_N = case.head.logits(case.hidden).log_softmax(-1).gather(-1, case.batch.targets[:, None])[:, 0]
    assert case.batch.teacher_logprobs is not None
    sizes_N = (case.batch.teacher_logprobs - student_N).abs() * (1 - student_N.exp())
    on_N = case.batch.weight > 0
    epsilon = float(sizes_N[on_N].median()) + 1e-9
    _, gradients = evaluate_case(FusedOPDLoss(clip=None, epsilon=epsilon, chunking=SMALL), case)
    assert torch.equal(gradients[0].abs().sum(-1) > 0, on_N & (sizes_N > epsilon))


def test_tokens_that_are_kept_get_the_exact_gradient() -> None:
    case = agreeing(bias=True)
    _, mine = evaluate_case(FusedOPDLoss(epsilon=0.01, chunking=SMALL), case)
    _, exact = evaluate_case(ReferenceOPDLoss(), case)
    kept_N = mine[0].abs().sum(-1) > 0
    assert 50 < int(kept_N.sum()) < 120
    torch.testing.assert_close(mine[0][kept_N], exact[0][kept_N])
    only = evolve(case, batch=evolve(case.batch, weight=case.batch.weight * kept_N))
    for filtered, expected in zip(mine, evaluate_case(ReferenceOPDLoss(), only)[1], strict=True):
        torch.testing.assert_close(filtered, expected)


def test_rows_that_are_kept_are_gathered_until_the_buffer_is_half_full(products: Recorded) -> None:
    case = agreeing().rounded(torch.float32)
    counted = int((case.batch.weight > 0).sum())
    FusedOPDLoss(epsilon=0.01, chunking=Chunking(chunk_bytes=32 * 67 * 4))(*case.leaves(), case.batch)
    assert sum(len(out) for out in products.logits) == counted
    assert products.weight_gradients < math.ceil(counted / 32)


def test_a_filter_that_keeps_nothing_gives_zeros() -> None:
    output, gradients = evaluate_case(FusedOPDLoss(epsilon=1e6, chunking=SMALL), agreeing(bias=True).rounded(torch.bfloat16))
    assert not any(gradient.any() for gradient in gradients)
    assert output.neglected_sum is not None
    assert float(output.neglected_sum) > 0


def test_the_filter_bounds_a_loss_on_several_ids_too() -> None:
    case = agreeing()
    objective = TopKObjective(forward_kl)
    output, mine = evaluate_case(FusedLoss(objective, SMALL, epsilon=0.3), case)
    _, exact = evaluate_case(FusedLoss(objective), case)
    assert output.neglected_sum is not None
    error = float((mine[1] - exact[1]).norm())
    assert 0 < error <= float(output.neglected_sum) * float(case.hidden.norm(dim=-1).max())


def test_a_weighted_loss_adds_up_what_its_terms_neglect() -> None:
    case = agreeing()
    parts = [evaluate_case(FusedOPDLoss(epsilon=epsilon), case)[0].neglected_sum for epsilon in (0.01, 0.1)]
    both = WeightedLoss([(2.0, FusedOPDLoss(epsilon=0.01)), (-0.5, FusedOPDLoss(epsilon=0.1)), (1.0, ReferenceOPDLoss())])
    output, _ = evaluate_case(both, case)
    assert output.neglected_sum is not None
    assert parts[0] is not None
    assert parts[1] is not None
    torch.testing.assert_close(output.neglected_sum, 2.0 * parts[0] + 0.5 * parts[1])


@pytest.mark.parametrize("epsilon", [-1e-9, math.nan, math.inf])
def test_an_epsilon_that_makes_no_sense_is_refused(epsilon: float) -> None:
    for make in (lambda: FusedOPDLoss(epsilon=epsilon), lambda: FusedLoss(OPDObjective(), epsilon=epsilon)):
        with pytest.raises(InvalidRecordError, match="epsilon is"):
            make()


def test_a_filter_that_finds_nothing_passes_the_whole_suite() -> None:
    assert broken_clauses(FusedOPDLoss(clip=None, epsilon=1e-300, chunking=SMALL)) == []
