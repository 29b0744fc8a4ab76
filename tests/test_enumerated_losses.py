"""What losses say of themselves, summed over all responses of a bigram model: the KL of a step, weights and lengths, the ratio of a window."""

from functools import partial

import pytest
import torch
from attrs import evolve
from helpers import BigramLM, flat_gradient
from test_gradient_equivalence import Problem, assert_same, make_problem
from test_top_k import with_all_tokens
from torch import Tensor

from lopd.losses.divergences import reverse_kl
from lopd.losses.fused import FusedLoss, FusedOPDLoss
from lopd.losses.reference import ReferenceLoss, ReferenceOPDLoss
from lopd.losses.top_k import TopKObjective
from lopd.losses.variants import add_labels, window_ratio
from lopd.protocols import OPDLoss
from lopd.records import LossOutput

PLAIN, RATIO = ReferenceOPDLoss(clip=None), ReferenceOPDLoss(clip=None, ratio_to_ref=True)
BASELINE = ReferenceOPDLoss(clip=None, kl_baseline=True)
WORLDS = range(10)


def lengths_R(problem: Problem) -> Tensor:
    return torch.tensor([len(response) for _, response in problem.world.responses], dtype=torch.float64)


def expected(problem: Problem, loss: OPDLoss, sampled_by: BigramLM, *, by_rollout: bool = False, ref: BigramLM | None = None) -> LossOutput:
    """Return the sums of a loss over responses of this model, in expectation."""
    weights_R = problem.world.probabilities_R(sampled_by) / (lengths_R(problem) if by_rollout else 1)
    batch = problem.world.batch(weights_R, problem.teacher, ref or sampled_by)
    return problem.student(with_all_tokens(batch, problem.teacher), loss)


def gradient(problem: Problem, loss: OPDLoss, *, by_rollout: bool) -> Tensor:
    """Return the direction of descent, at the reference policy."""
    return -flat_gradient(problem.student, expected(problem, loss, problem.student, by_rollout=by_rollout).loss_sum)


def mean_gradient(problem: Problem, values_R: Tensor) -> Tensor:
    """Return the gradient of the mean of a function of responses by the student."""
    sums_R = torch.stack([values_T.sum() for values_T in problem.world.per_response(problem.student.logprobs_VV())])
    return flat_gradient(problem.student, (sums_R.exp() / len(problem.world.prompts) * values_R).sum())


def lengthening(problem: Problem, direction: Tensor) -> float:
    """Return by how much a unit step in this direction changes the mean length."""
    return float(direction @ mean_gradient(problem, lengths_R(problem)) / direction.norm())


def stored_kl(problem: Problem) -> float:
    return -float(problem.world.objective(problem.student, problem.teacher, states_of=problem.ref).detach())


# --- the reverse KL that a step reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [PLAIN, RATIO, FusedOPDLoss(), FusedLoss(TopKObjective(reverse_kl)), ReferenceLoss(TopKObjective(reverse_kl))]
)
@pytest.mark.parametrize("drift", [0.0, 0.5, 2.0])
def test_the_reported_reverse_kl_is_in_expectation_that_at_the_stored_states_also_of_a_student_that_has_moved(
    drift: float, loss: OPDLoss
) -> None:
    problem = make_problem(5, horizon=3, drift=drift)
    exact = stored_kl(problem)
    assert float(expected(problem, loss, problem.ref).reverse_kl_sum) == pytest.approx(exact, rel=1e-9)


def test_the_ratio_of_the_reported_reverse_kl_is_to_what_drew_the_tokens() -> None:
    problem, heated = make_problem(5, horizon=1), BigramLM(3, 3, 99)
    batch = problem.world.batch(problem.world.probabilities_R(heated), problem.teacher, problem.ref)
    drawn = heated.logprobs_VV().detach()[batch.inputs, batch.targets]
    exact = problem.world.kl(problem.student, problem.teacher)
    assert float(problem.student(evolve(batch, sampler_logprobs=drawn), PLAIN).reverse_kl_sum) == pytest.approx(exact, rel=1e-9)


def test_without_a_ref_column_the_reported_reverse_kl_is_off_once_the_student_has_moved() -> None:
    problem = make_problem(5, horizon=3)
    batch = problem.world.batch(problem.world.probabilities_R(problem.ref), problem.teacher, problem.ref)
    reported = float(problem.student(evolve(batch, ref_logprobs=None), PLAIN).reverse_kl_sum)
    exact = stored_kl(problem)
    assert abs(reported - exact) > 0.1 * exact


def test_by_rollout_the_reported_reverse_kl_is_not_the_mean_kl_of_the_states_of_a_rollout_even_before_the_student_moves() -> None:
    problem = make_problem(5, horizon=3, drift=0.0)
    log_s, log_t = problem.student.logprobs_VV().detach(), problem.teacher.logprobs_VV().detach()
    kl_V = (log_s.exp() * (log_s - log_t)).sum(-1, keepdim=True)
    means_R = torch.stack([kl_T.mean() for kl_T in problem.world.per_response(kl_V.expand_as(log_s))])
    exact = float((problem.world.probabilities_R(problem.ref) * means_R).sum())
    reported = float(expected(problem, PLAIN, problem.ref, by_rollout=True).reverse_kl_sum)
    assert abs(reported - exact) > 0.01 * exact


# --- weights, lengths and the baseline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_constant_advantage_pushes_by_rollout_towards_longer_responses_and_by_token_nowhere(seed: int) -> None:
    problem, loss = make_problem(seed, horizon=4, drift=0.0), ReferenceOPDLoss(clip=None, advantage=-0.3)
    pushed = gradient(problem, loss, by_rollout=True)
    assert_same(pushed, -0.3 * mean_gradient(problem, 1 / lengths_R(problem)))
    assert lengthening(problem, pushed) > 0
    assert float(gradient(problem, loss, by_rollout=False).norm()) < 1e-12


def test_with_a_teacher_by_rollout_lengthens_responses_more_than_by_token_and_the_baseline_takes_that_away() -> None:
    worlds = [make_problem(seed, horizon=3, drift=0.0) for seed in WORLDS]
    mean = {
        name: sum(lengthening(problem, gradient(problem, loss, by_rollout=by_rollout)) for problem in worlds) / len(worlds)
        for name, loss, by_rollout in (("token", PLAIN, False), ("rollout", PLAIN, True), ("baseline", BASELINE, True))
    }
    assert mean["rollout"] > max(mean["token"], mean["baseline"])


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_baseline_keeps_the_expected_gradient_by_token_and_changes_it_by_rollout(seed: int) -> None:
    problem = make_problem(seed, horizon=3, drift=0.0)
    assert_same(gradient(problem, BASELINE, by_rollout=False), gradient(problem, PLAIN, by_rollout=False))
    plain, based = (gradient(problem, loss, by_rollout=True) for loss in (PLAIN, BASELINE))
    assert float((based - plain).norm()) > 0.01 * float(plain.norm())


@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_labels_alone_have_the_gradient_of_the_mean_label_by_token_and_the_mean_of_a_group_changes_it_by_rollout(
    seed: int, ratio: bool
) -> None:
    problem = make_problem(seed, horizon=3, drift=0.0)
    loss = ReferenceOPDLoss(clip=None, advantage=0.0, ratio_to_ref=ratio, transforms=(partial(add_labels, scale=2.0),))
    labels_R = torch.randn(len(problem.world.responses), generator=torch.Generator().manual_seed(seed)).double()

    def pushed(mean: float, *, by_rollout: bool) -> Tensor:
        weights_R = problem.world.probabilities_R(problem.student) / (lengths_R(problem) if by_rollout else 1)
        batch = problem.world.batch(weights_R, problem.teacher, problem.student)
        labels_N = labels_R[batch.segment_ids]
        labelled = evolve(batch, label_values=labels_N, label_means=torch.full_like(labels_N, mean), teacher_logprobs=None)
        return -flat_gradient(problem.student, problem.student(labelled, loss).loss_sum)

    assert_same(pushed(0.7, by_rollout=False), 2.0 * mean_gradient(problem, labels_R))
    assert_same(pushed(0.7, by_rollout=True), 2.0 * mean_gradient(problem, (labels_R - 0.7) / lengths_R(problem)))
    assert float((pushed(0.7, by_rollout=True) - pushed(0.0, by_rollout=True)).norm()) > 0.01


# --- the ratio of the tokens before ------------------------------------------------------------------------------------------------------


def visits_after(problem: Problem, window: int) -> Tensor:
    """Return (V,) visits of states of which the reference policy wrote all tokens but the last `window`, and the student those."""
    ref_VV, student_VV = (model.logprobs_VV().detach().exp() for model in (problem.ref, problem.student))
    goes_on_V = torch.ones(problem.world.vocab, dtype=torch.float64)
    goes_on_V[-1] = 0.0
    start_V = torch.zeros_like(goes_on_V)
    for prompt in problem.world.prompts:
        start_V[prompt[-1]] += 1 / len(problem.world.prompts)
    visits_V = torch.zeros_like(start_V)
    for place in range(problem.world.horizon):
        now_V = start_V
        for earlier in range(place):
            now_V = (now_V @ (student_VV if place - earlier <= window else ref_VV)) * goes_on_V
        visits_V += now_V
    return visits_V


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_a_window_moves_the_states_to_those_of_which_the_student_wrote_the_last_tokens(seed: int, window: int) -> None:
    problem = make_problem(seed, horizon=4, drift=2.0)
    loss = FusedOPDLoss(None, ratio_to_ref=True, transforms=(partial(window_ratio, window=window, cap=None),))
    log_s, log_t = problem.student.logprobs_VV(), problem.teacher.logprobs_VV().detach()
    exact = -(visits_after(problem, window) * (log_s.exp() * (log_s - log_t)).sum(-1)).sum()
    assert_same(problem.offline(loss), flat_gradient(problem.student, exact))


@pytest.mark.parametrize("seed", range(3))
def test_a_window_as_long_as_a_response_gives_the_online_gradient_and_a_cap_costs_bias(seed: int) -> None:
    problem = make_problem(seed, horizon=3, drift=2.0)
    whole, capped = (
        problem.offline(FusedOPDLoss(None, ratio_to_ref=True, transforms=(partial(window_ratio, window=2, cap=cap),)))
        for cap in (None, 1.1)
    )
    assert_same(whole, problem.exact_online())
    assert float((capped - whole).norm()) > 1e-3 * float(whole.norm())


@pytest.mark.parametrize("seed", range(3))
def test_a_cap_of_the_ratio_costs_bias_where_the_student_has_moved_and_none_before(seed: int) -> None:
    capped = ReferenceOPDLoss(clip=None, ratio_to_ref=True, ratio_cap=1.2)
    still, moved = make_problem(seed, horizon=3, drift=0.0), make_problem(seed, horizon=3, drift=2.0)
    assert_same(still.offline(capped), still.exact_online())
    assert float((moved.offline(capped) - moved.offline(RATIO)).norm()) > 1e-3 * float(moved.offline(RATIO).norm())
