"""What Lightning OPD claims about its gradient, by exact enumeration of all responses of a bigram model: no sampling noise.

The gradient of the paper is that of an advantage-weighted policy gradient, `sum_t A_t * grad log pi(a_t | s_t)`: each token answers for its
own advantage only.  That is the gradient of minus the KL with the states held fixed; for responses of one token, of the KL itself.
"""

from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from attrs import field, frozen
from helpers import BigramLM, BigramWorld, flat_gradient
from hypothesis import given, settings
from torch import Tensor

from lopd.losses.fused import FusedOPDLoss
from lopd.losses.objective import Transform
from lopd.losses.reference import ReferenceOPDLoss
from lopd.losses.variants import drift_gate, extrapolate, importance_ratio, ppo_clip
from lopd.protocols import OPDLoss
from lopd.records import Batch, LMHead, LossOutput

PLAIN = ReferenceOPDLoss(clip=None)
RATIO = ReferenceOPDLoss(clip=None, ratio_to_ref=True)
FUSED_RATIO = FusedOPDLoss(clip=None, transforms=(importance_ratio,))

exact = settings(deadline=None, max_examples=30)


@frozen(eq=False)
class Problem:
    """A student that has moved from the reference policy, and two teachers."""

    world: BigramWorld
    ref: BigramLM
    student: BigramLM
    teacher: BigramLM
    other_teacher: BigramLM

    def gradient(self, weights_R: Tensor, loss: OPDLoss = PLAIN, teacher: BigramLM | None = None) -> Tensor:
        """Return the direction in which descent on the loss goes, so the gradient of J; each response counts with its weight."""
        output = self.student(self.world.batch(weights_R, teacher or self.teacher, self.ref), loss)
        return -flat_gradient(self.student, output.loss_sum)

    def offline(self, loss: OPDLoss = PLAIN, teacher: BigramLM | None = None) -> Tensor:
        return self.gradient(self.world.probabilities_R(self.ref), loss, teacher)

    def online(self, loss: OPDLoss = PLAIN, teacher: BigramLM | None = None) -> Tensor:
        return self.gradient(self.world.probabilities_R(self.student), loss, teacher)

    def exact_online(self, states_of: BigramLM | None = None) -> Tensor:
        """Return the same without lopd's loss, without sampled tokens, and without enumeration of responses."""
        return flat_gradient(self.student, self.world.objective(self.student, self.teacher, states_of or self.student))

    def ratios_R(self) -> Tensor:
        logs = [self.world.per_response(m.logprobs_VV().detach()) for m in (self.student, self.ref)]
        return torch.stack([(s.sum() - r.sum()).exp() for s, r in zip(*logs, strict=True)])

    def chi_square(self) -> float:
        return max(float((self.world.probabilities_R(self.ref) * self.ratios_R().square()).sum()) - 1.0, 0.0)

    def score_bound(self) -> float:
        """Return G: the largest norm of the gradient of one log-prob, over all states that are ever predicted from."""
        entries = self.student.logprobs_VV()[:-1].flatten()
        rows = torch.autograd.grad(
            entries, list(self.student.parameters()), torch.eye(len(entries), dtype=entries.dtype), is_grads_batched=True
        )
        return float(torch.cat([row.flatten(1) for row in rows], dim=1).norm(dim=1).max())

    def second_moment(self, per_token_VV: Tensor) -> float:
        """Return sigma: root of the mean over the reference policy's responses of the squared sum of absolute per-token values."""
        sums_R = torch.stack([values_T.abs().sum() for values_T in self.world.per_response(per_token_VV.detach())])
        return float((self.world.probabilities_R(self.ref) * sums_R.square()).sum().sqrt())


def make_problem(seed: int, vocab: int = 3, horizon: int = 2, drift: float = 1.0, scale: float = 1.0) -> Problem:
    ref, teacher, other = (BigramLM(vocab, 3, 10 * seed + i, scale) for i in range(3))
    return Problem(BigramWorld(vocab, horizon), ref, ref.drifted(10 * seed + 3, drift), teacher, other)


def problems(horizon: st.SearchStrategy[int] | None = None, drift: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[Problem]:
    return st.builds(
        make_problem,
        seed=st.integers(0, 2**24),
        vocab=st.integers(3, 4),
        horizon=st.integers(1, 3) if horizon is None else horizon,
        drift=st.sampled_from([0.0, 0.01, 0.5, 2.0]) if drift is None else drift,
        scale=st.sampled_from([0.1, 1.0, 2.0]),
    )


def assert_same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def sequence_kl(problem: Problem) -> Tensor:
    """Return KL(student, teacher) between whole responses, differentiable through the states too."""
    logprobs_R, teacher_R = (
        torch.stack([t.sum() for t in problem.world.per_response(model.logprobs_VV())]) for model in (problem.student, problem.teacher)
    )
    return (logprobs_R.exp() * (logprobs_R - teacher_R.detach())).sum() / len(problem.world.prompts)


def assert_is_online_gradient(loss: OPDLoss, problem: Problem) -> None:
    assert_same(problem.online(loss), problem.exact_online())


@given(problems())
@exact
def test_the_weights_of_all_responses_sum_to_one_and_visits_to_their_mean_length(problem: Problem) -> None:
    probabilities_R = problem.world.probabilities_R(problem.ref)
    lengths_R = torch.tensor([len(response) for _, response in problem.world.responses], dtype=torch.float64)
    assert float(probabilities_R.sum()) == pytest.approx(1.0)
    assert float(problem.world.visits_V(problem.ref).sum()) == pytest.approx(float((probabilities_R * lengths_R).sum()))


@given(problems(drift=st.just(0.0)))
@exact
def test_the_offline_gradient_is_the_online_gradient_at_the_reference_policy(problem: Problem) -> None:
    assert_same(problem.offline(), problem.exact_online())


@given(problems(), st.sampled_from([None, 0.2, 10.0]))
@exact
def test_theorem_3_5_the_gap_stays_under_score_bound_times_advantage_moment_times_root_chi_square(
    problem: Problem, clip: float | None
) -> None:
    advantages_VV = problem.teacher.logprobs_VV() - problem.student.logprobs_VV()
    sigma_a = problem.second_moment(advantages_VV if clip is None else advantages_VV.clamp(-clip, clip))
    loss = ReferenceOPDLoss(clip)
    gap = float((problem.online(loss) - problem.offline(loss)).norm())
    assert gap <= problem.score_bound() * sigma_a * problem.chi_square() ** 0.5 * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_away_from_the_reference_policy_the_gap_is_real(seed: int) -> None:
    problem = make_problem(seed, horizon=3, drift=2.0)
    assert float((problem.online() - problem.offline()).norm()) > 0.05 * float(problem.online().norm())


@pytest.mark.parametrize("seed", range(5))
def test_corollary_a_2_the_gap_doubles_when_a_small_drift_doubles(seed: int) -> None:
    near, far = (make_problem(seed, horizon=3, drift=drift) for drift in (1e-4, 2e-4))
    gaps = [float((p.online() - p.offline()).norm()) for p in (near, far)]
    assert gaps[1] / gaps[0] == pytest.approx(2.0, rel=0.01)


@given(problems())
@exact
def test_with_the_sequence_ratio_the_offline_gradient_is_the_online_gradient_everywhere(problem: Problem) -> None:
    weights_R = problem.world.probabilities_R(problem.ref) * problem.ratios_R()
    assert_same(problem.gradient(weights_R), problem.exact_online())


@given(problems())
@exact
def test_pain_10_the_online_gradient_is_autograd_of_minus_the_kl_on_the_states_of_the_student(problem: Problem) -> None:
    assert_is_online_gradient(PLAIN, problem)


@given(problems(horizon=st.just(1)))
@exact
def test_pain_10_for_one_token_responses_the_online_gradient_is_autograd_of_minus_the_sequence_kl(problem: Problem) -> None:
    assert_same(problem.online(), flat_gradient(problem.student, -sequence_kl(problem)))


@given(problems())
@exact
def test_the_gradient_of_the_sequence_kl_is_the_online_gradient_plus_the_advantages_still_to_come(problem: Problem) -> None:
    logprobs = problem.world.per_response(problem.student.logprobs_VV())
    gaps = problem.world.per_response((problem.teacher.logprobs_VV() - problem.student.logprobs_VV()).detach())
    probabilities_R = problem.world.probabilities_R(problem.student)
    to_come = torch.stack([(lp_T * (gap_T.flip(0).cumsum(0).flip(0) - gap_T)).sum() for lp_T, gap_T in zip(logprobs, gaps, strict=True)])
    later = flat_gradient(problem.student, (probabilities_R * to_come).sum())
    assert_same(problem.online() + later, flat_gradient(problem.student, -sequence_kl(problem)))


@pytest.mark.parametrize("seed", range(5))
def test_pain_10_a_small_step_of_descent_on_the_offline_loss_lowers_the_kl_of_one_token_responses(seed: int) -> None:
    problem = make_problem(seed, horizon=1, drift=0.0)
    before = problem.world.kl(problem.student, problem.teacher)
    step = torch.optim.SGD(problem.student.parameters(), lr=1e-3)
    problem.student(
        problem.world.batch(problem.world.probabilities_R(problem.ref), problem.teacher, problem.ref), PLAIN
    ).loss_sum.backward()
    step.step()
    assert problem.world.kl(problem.student, problem.teacher) < before


@given(problems())
@exact
def test_theorem_3_6_the_reported_reverse_kl_of_online_responses_is_the_exact_sequence_kl(problem: Problem) -> None:
    batch = problem.world.batch(problem.world.probabilities_R(problem.student), problem.teacher, problem.student)
    reported = float(problem.student(batch, PLAIN).reverse_kl_sum)
    assert reported == pytest.approx(problem.world.kl(problem.student, problem.teacher), rel=1e-9, abs=1e-12)
    assert reported == pytest.approx(sequence_kl(problem).item(), rel=1e-9, abs=1e-12)


@frozen
class Mutant:
    """A loss as somebody might get it wrong: `per_token` takes the student's and the teacher's log-probs of the counted tokens."""

    name: str
    per_token: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        counted_N = batch.weight > 0
        assert batch.teacher_logprobs is not None
        logprobs_MV = head.logits(hidden_ND[counted_N]).log_softmax(-1)
        student_M = logprobs_MV.gather(-1, batch.targets[counted_N][:, None])[:, 0]
        loss_sum = (batch.weight[counted_N] * self.per_token(student_M, batch.teacher_logprobs[counted_N])).sum()
        return LossOutput(loss_sum, torch.zeros(()), torch.zeros(()))


MUTANTS = [
    Mutant("wrong sign", lambda s, t: (t - s).detach() * s),
    Mutant("advantage not detached", lambda s, t: -(t - s) * s),
    Mutant("sampled KL backpropagated as it is, so the teacher vanishes", lambda s, t: s - t),
    Mutant("forward instead of reverse: the teacher's cross-entropy", lambda s, t: -t.exp() * s),
    Mutant("student log-prob left out of the advantage", lambda s, t: -t.detach() * s),
    Mutant("half the gradient", lambda s, t: (s - t).square() / 4),
]


def test_pain_10_the_check_accepts_the_correct_gradient_written_as_a_regression() -> None:
    assert_is_online_gradient(Mutant("half the squared gap", lambda s, t: (s - t).square() / 2), make_problem(7, horizon=3))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
@pytest.mark.parametrize("horizon", [1, 3])
def test_pain_10_the_check_rejects_a_loss_whose_gradient_is_wrong(mutant: Mutant, horizon: int) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_is_online_gradient(mutant, make_problem(7, horizon=horizon))


@given(problems(drift=st.just(0.0)))
@exact
def test_theorem_3_8_the_bias_of_a_mismatched_teacher_at_the_reference_policy_stays_under_its_bound(problem: Problem) -> None:
    sigma_delta = problem.second_moment(problem.teacher.logprobs_VV() - problem.other_teacher.logprobs_VV())
    bias = float((problem.offline(teacher=problem.other_teacher) - problem.offline()).norm())
    assert bias <= problem.score_bound() * sigma_delta * (1 + 1e-9)


@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_theorem_3_8_the_bias_of_a_mismatched_teacher_is_not_zero_at_the_reference_policy(seed: int, horizon: int) -> None:
    problem = make_problem(seed, horizon=horizon, drift=0.0)
    bias = float((problem.offline(teacher=problem.other_teacher) - problem.offline()).norm())
    sigma_delta = problem.second_moment(problem.teacher.logprobs_VV() - problem.other_teacher.logprobs_VV())
    assert bias > 0.05 * problem.score_bound() * sigma_delta


@given(problems(drift=st.just(0.0)))
@exact
def test_theorem_3_8_a_mismatched_teacher_biases_online_and_offline_alike_at_the_reference_policy(problem: Problem) -> None:
    states = problem.world.objective(problem.student, problem.other_teacher, problem.student)
    assert_same(problem.offline(teacher=problem.other_teacher), flat_gradient(problem.student, states))


@given(problems(), st.sampled_from([PLAIN, RATIO, ReferenceOPDLoss(clip=0.1), ReferenceOPDLoss(clip=0.1, ratio_to_ref=True)]))
@exact
def test_theorem_3_6_a_student_that_is_the_teacher_has_gradient_zero_online_and_offline(problem: Problem, loss: OPDLoss) -> None:
    for gradient in (problem.online(loss, teacher=problem.student), problem.offline(loss, teacher=problem.student)):
        assert float(gradient.abs().max()) < 1e-10


@given(problems(drift=st.just(0.0)), st.sampled_from([None, 0.2]))
@exact
def test_the_per_token_ratio_changes_nothing_in_the_gradient_at_the_reference_policy(problem: Problem, clip: float | None) -> None:
    assert_same(problem.offline(ReferenceOPDLoss(clip, ratio_to_ref=True)), problem.offline(ReferenceOPDLoss(clip)))


@given(problems(), st.sampled_from([RATIO, FUSED_RATIO]))
@exact
def test_the_per_token_ratio_gives_minus_the_exact_kl_gradient_on_the_states_of_the_reference_policy(
    problem: Problem, loss: OPDLoss
) -> None:
    assert_same(problem.offline(loss), problem.exact_online(states_of=problem.ref))


@given(problems(drift=st.just(0.0)), st.sampled_from([ppo_clip, partial(importance_ratio, cap=1.0), drift_gate]))
@exact
def test_variants_that_correct_for_drift_change_nothing_at_the_reference_policy(problem: Problem, variant: Transform) -> None:
    assert_same(problem.offline(FusedOPDLoss(None, transforms=(variant,))), problem.offline())


@given(problems())
@exact
def test_extrapolation_by_zero_has_the_reference_policy_for_its_teacher(problem: Problem) -> None:
    loss = FusedOPDLoss(None, transforms=(partial(extrapolate, scale=0.0),))
    assert_same(problem.online(loss), problem.online(FusedOPDLoss(None), teacher=problem.ref))


@given(problems())
@exact
def test_the_fused_loss_has_the_gradient_of_the_plain_one(problem: Problem) -> None:
    assert_same(problem.offline(FusedOPDLoss(0.5)), problem.offline(ReferenceOPDLoss(0.5)))


@pytest.mark.parametrize("seed", range(5))
def test_away_from_the_reference_policy_the_per_token_ratio_changes_the_gradient(seed: int) -> None:
    problem = make_problem(seed, drift=2.0)
    assert float((problem.offline(RATIO) - problem.offline()).norm()) > 0.05 * float(problem.offline().norm())
