"""The entropy bonus: its gradient goes through every logit, at three matrix products."""

import math

import hypothesis.strategies as st
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from test_fused_losses import SMALL, Recorded, broken_clauses, products, unmarked  # noqa: F401
from torch import Tensor

from lopd.errors import InvalidRecordError
from lopd.losses.beside import EntropyBonus
from lopd.losses.divergences import forward_kl, reverse_kl
from lopd.losses.fused import FusedLoss
from lopd.losses.objective import OPDObjective, Signal, with_entropy
from lopd.losses.reference import ReferenceLoss
from lopd.losses.top_k import TopKObjective
from lopd.records import Batch, LMHead, LossOutput
from lopd.testing import loss_case
from lopd.testing.losses import evaluate_case

LSPD = EntropyBonus(OPDObjective(clip=5.0), 0.05)
FOUR = EntropyBonus(OPDObjective(transforms=(unmarked,)), -0.3)


@pytest.mark.parametrize(
    "objective", [LSPD, EntropyBonus(TopKObjective(reverse_kl, residual=True), 1.0), FOUR], ids=["lspd", "support", "four"]
)
def test_the_fused_bonus_is_the_plain_one(objective: EntropyBonus) -> None:
    assert broken_clauses(FusedLoss(objective, SMALL), ReferenceLoss(objective)) == []


def lspd(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
    """Compute the loss as its paper writes it."""
    on_N = batch.weight > 0
    logprobs_MV = head.logits(hidden_ND[on_N]).log_softmax(-1)
    assert batch.teacher_logprobs is not None
    gap_M = logprobs_MV.gather(-1, batch.targets[on_N][:, None])[:, 0] - batch.teacher_logprobs[on_N]
    huber_M = torch.where(gap_M.abs() <= 5, gap_M.square(), 10 * gap_M.abs() - 25)
    entropy_M = torch.distributions.Categorical(logits=logprobs_MV).entropy()
    return LossOutput((batch.weight[on_N] * (huber_M - 0.1 * entropy_M)).sum(), torch.zeros(()), torch.zeros(()))


def test_lspd_has_twice_the_gradient_of_lightning_with_half_its_bonus() -> None:
    case = loss_case("lspd", [30, 20], size=3.0)
    _, paper = evaluate_case(lspd, case)
    for made, expected in zip(evaluate_case(FusedLoss(LSPD), case)[1], paper, strict=True):
        torch.testing.assert_close(2 * made, expected)


def bonus_alone(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
    entropy_N = torch.distributions.Categorical(logits=head.logits(hidden_ND)).entropy()
    return LossOutput(-(batch.weight * entropy_N).sum(), torch.zeros(()), torch.zeros(()))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bonus_alone_has_the_gradient_of_the_entropy(softcap: float | None, dtype: torch.dtype) -> None:
    loss = FusedLoss(EntropyBonus(OPDObjective(clip=None, advantage=0.0), 1.0), SMALL)
    case = loss_case("alone", [20, 9], bias=True, softcap=softcap, scale=0.7).rounded(dtype)
    _, expected = evaluate_case(bonus_alone, case.rounded(torch.float64))
    for made, truth in zip(evaluate_case(loss, case)[1], expected, strict=True):
        torch.testing.assert_close(made.double(), truth, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_a_bonus_leaves_a_loss_at_three_products(products: Recorded) -> None:
    case = loss_case("products", [40], counted=1.0, seed=27).rounded(torch.float32)
    FusedLoss(EntropyBonus(TopKObjective(forward_kl)), SMALL)(*case.leaves(), case.batch).loss_sum.backward()
    assert (len(products.logits), products.hidden_gradients, products.weight_gradients) == (3, 3, 3)


@given(st.integers(0, 2**20), st.sampled_from([0.01, 0.3, 3.0]), st.sampled_from([None, 2.0]))
@settings(deadline=None, max_examples=25)
def test_what_the_filter_leaves_out_of_a_bonus_is_within_its_bound(seed: int, epsilon: float, softcap: float | None) -> None:
    case = loss_case("filter", [30, 20], seed=seed, size=5.0, softcap=softcap)
    objective = EntropyBonus(OPDObjective(), 0.5)
    output, mine = evaluate_case(FusedLoss(objective, SMALL, epsilon), case)
    _, exact = evaluate_case(FusedLoss(objective), case)
    assert output.neglected_sum is not None
    error = float((mine[1] - exact[1]).norm())
    assert error <= float(output.neglected_sum) * float(case.hidden.norm(dim=-1).max()) + 1e-9


@with_entropy
def surprise(signal: Signal) -> Signal:
    return evolve(signal, advantages=signal.tokens.entropies())


def weighted_by_entropy(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
    logprobs_NV = head.logits(hidden_ND).log_softmax(-1)
    entropy_N = torch.distributions.Categorical(logits=logprobs_NV.detach()).entropy()
    own_N = logprobs_NV.gather(-1, batch.targets[:, None])[:, 0]
    return LossOutput(-(batch.weight * entropy_N * own_N).sum(), torch.zeros(()), torch.zeros(()))


def test_a_transform_that_reads_entropies_passes_no_gradient_through_them() -> None:
    objective, case = OPDObjective(clip=None, transforms=(surprise,)), loss_case("entropies", [20])
    _, expected = evaluate_case(weighted_by_entropy, case)
    for loss in (FusedLoss(objective, SMALL), ReferenceLoss(objective)):
        for made, truth in zip(evaluate_case(loss, case)[1], expected, strict=True):
            torch.testing.assert_close(made, truth)


def test_a_bonus_says_of_drift_what_its_objective_says() -> None:
    assert FusedLoss(EntropyBonus(OPDObjective())).uncorrected
    assert not FusedLoss(EntropyBonus(OPDObjective(ratio_to_ref=True))).uncorrected


@pytest.mark.parametrize("coefficient", [math.nan, math.inf, "much"])
def test_a_coefficient_that_makes_no_sense_is_refused(coefficient: float) -> None:
    with pytest.raises(InvalidRecordError, match="Entropy bonus: coefficient is"):
        EntropyBonus(OPDObjective(), coefficient)
