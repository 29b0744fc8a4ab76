"""The ratio of the tokens before, beside any objective."""

from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from helpers import flat_gradient
from test_fused_losses import SMALL, broken_clauses
from test_gradient_equivalence import Problem, assert_same, make_problem
from test_top_k import with_all_tokens

from lopd.errors import InvalidRecordError
from lopd.losses.beside import EntropyBonus, WindowRatio
from lopd.losses.divergences import generalised_kl, reverse_kl
from lopd.losses.fused import FusedLoss, FusedOPDLoss
from lopd.losses.objective import OPDObjective
from lopd.losses.reference import ReferenceLoss
from lopd.losses.top_k import TopKObjective
from lopd.losses.variants import window_ratio
from lopd.protocols import OPDLoss
from lopd.records import Batch

BUCKET, WHOLE = TopKObjective(reverse_kl, residual=True), TopKObjective(generalised_kl)


def stored_gradient(problem: Problem, loss: OPDLoss, k: int) -> torch.Tensor:
    """Return minus the gradient of a loss on all rollouts of the reference policy, each with its probability, and the teacher's top k."""
    batch = problem.world.batch(problem.world.probabilities_R(problem.ref), problem.teacher, problem.ref)
    return -flat_gradient(problem.student, problem.student(_cut(with_all_tokens(batch, problem.teacher), k), loss).loss_sum)


def _cut(batch: Batch, k: int) -> Batch:
    assert batch.top_k_ids is not None
    assert batch.top_k_logprobs is not None
    ids, logprobs = batch.top_k_ids[:, :k], batch.top_k_logprobs[:, :k]
    return evolve(batch, top_k_ids=ids, top_k_logprobs=logprobs, top_k_tail=(1 - logprobs.exp().sum(-1)).clamp(min=0))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_stored_support_with_residual_and_a_window_as_long_as_a_response_has_the_online_gradient(seed: int, k: int) -> None:
    problem = make_problem(seed, horizon=3, drift=2.0)
    for path in (FusedLoss, ReferenceLoss):
        assert_same(stored_gradient(problem, path(WindowRatio(BUCKET, window=2, cap=None)), k), problem.exact_online())
    alone = stored_gradient(problem, FusedLoss(BUCKET), k)
    assert float((alone - problem.exact_online()).norm()) > 1e-3 * float(problem.exact_online().norm())


@pytest.mark.parametrize("window", [1, 2, 3])
def test_beside_the_ratio_it_is_the_variant(window: int) -> None:
    problem = make_problem(1, horizon=4, drift=2.0)
    variant = FusedOPDLoss(None, ratio_to_ref=True, transforms=(partial(window_ratio, window=window, cap=1.5),))
    beside = FusedLoss(WindowRatio(OPDObjective(clip=None, ratio_to_ref=True), window, 1.5))
    assert_same(problem.offline(beside), problem.offline(variant))


def test_what_a_step_reports_stays_that_of_the_stored_states() -> None:
    problem = make_problem(2, horizon=3, drift=2.0)
    batch = with_all_tokens(problem.world.batch(problem.world.probabilities_R(problem.ref), problem.teacher, problem.ref), problem.teacher)
    inside, outside = (problem.student(batch, FusedLoss(objective)) for objective in (WHOLE, WindowRatio(WHOLE)))
    assert float(inside.reverse_kl_sum) == float(outside.reverse_kl_sum)
    assert not torch.equal(inside.loss_sum, outside.loss_sum)


@pytest.mark.parametrize("objective", [BUCKET, EntropyBonus(OPDObjective(ratio_to_ref=True))], ids=["support", "bonus"])
def test_the_fused_and_the_plain_path_are_one_function(objective: TopKObjective | EntropyBonus) -> None:
    weighed = WindowRatio(objective, window=3)
    assert not broken_clauses(FusedLoss(weighed, SMALL), ReferenceLoss(weighed))


def test_it_says_of_itself_what_the_other_objective_does() -> None:
    assert WindowRatio(OPDObjective()).uncorrected
    assert not WindowRatio(OPDObjective(ratio_to_ref=True)).uncorrected
    assert WindowRatio(EntropyBonus(BUCKET)).wants_entropy
    assert WindowRatio(OPDObjective(kl_baseline=True)).baselined


@pytest.mark.parametrize(("options", "named"), [({"window": 0}, "window"), ({"cap": 0.0}, "cap"), ({"cap": float("nan")}, "cap")])
def test_bounds_that_make_no_sense_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRecordError, match=f"WindowRatio: {named} is"):
        WindowRatio(BUCKET, **options)


def test_a_window_far_beyond_a_response_is_the_whole_response() -> None:
    problem = make_problem(1, horizon=4, drift=2.0)
    huge, whole = (WindowRatio(OPDObjective(ratio_to_ref=True), window, None) for window in (10**10, 4))
    assert_same(problem.offline(FusedLoss(huge)), problem.offline(FusedLoss(whole)))
