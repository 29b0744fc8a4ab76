"""Reverse KL on a stored support: with the residual of what was drawn it is unbiased on the stored states, without it the bias is the known one.

By enumeration in float64: every token is the sampled one, every tuple is what the policy drew besides, each with its probability.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from attrs import evolve, frozen
from hypothesis import given, settings
from test_fused_losses import SMALL, broken_clauses
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses import rows
from lopd.losses.beside import WindowRatio
from lopd.losses.divergences import (
    Divergence,
    entropy_gated,
    forward_kl,
    generalised_kl,
    jensen_shannon,
    reverse_kl,
    reverse_kl_renormalised,
)
from lopd.losses.fused import FusedLoss
from lopd.losses.objective import Objective
from lopd.losses.reference import ReferenceLoss
from lopd.losses.top_k import TopKObjective
from lopd.protocols import OPDLoss
from lopd.records import Batch, LMHead
from lopd.testing import loss_case
from lopd.testing.losses import evaluate_case

exact = settings(deadline=None, max_examples=25)
BOTH = [reverse_kl, generalised_kl]


@frozen(eq=False)
class States:
    """(S, V) log-probs of the policy that sampled, of the teacher and of the student at some states."""

    policy: Tensor
    teacher: Tensor
    student: Tensor

    @classmethod
    def random(cls, seed: int, states: int = 3, vocab: int = 6) -> "States":
        random = torch.Generator().manual_seed(seed)
        return cls(*((2 * torch.randn(states, vocab, generator=random, dtype=torch.float64)).log_softmax(-1) for _ in range(3)))

    def batch(self, support_SK: Tensor, temperature: float = 1.0, drawn: int = 0) -> Batch:
        """Make a batch of everything that may be drawn at each state, in rows that weigh what its probability is."""
        states, vocab = self.policy.shape
        sampler_SV = (self.policy / temperature).log_softmax(-1)
        tuples = torch.tensor(list(product(range(vocab), repeat=1 + drawn))).repeat(states, 1)
        rows = torch.arange(states).repeat_interleave(vocab ** (1 + drawn))
        sampled, more = tuples[:, 0], tuples[:, 1:]
        weight = sampler_SV[rows, sampled].exp() * self.policy[rows].gather(-1, more).exp().prod(-1)
        top_SK = self.teacher.gather(-1, support_SK)
        return Batch(
            rows, sampled, rows, rows, weight, self.teacher[rows, sampled], self.policy[rows, sampled],
            support_SK[rows], top_SK[rows], (1 - top_SK.exp().sum(-1))[rows].clamp(min=0),
            None if temperature == 1 else sampler_SV[rows, sampled],
            *((more, self.teacher[rows].gather(-1, more), self.policy[rows].gather(-1, more)) if drawn else ()),
        )  # fmt: skip

    def gradient(self, loss: OPDLoss, batch: Batch) -> Tensor:
        """Return (S, V): the expected gradient by the student's logits."""
        logits_SV = self.student.clone().requires_grad_()
        vocab = logits_SV.shape[1]
        output = loss(logits_SV[batch.inputs], LMHead(torch.eye(vocab, dtype=torch.float64)), batch)
        return torch.autograd.grad(output.loss_sum, logits_SV)[0]

    def score_sum(self, coefficients_SV: Tensor) -> Tensor:
        """Return (S, V): the sum over tokens of coefficient times gradient of the log-prob, by the logits."""
        return coefficients_SV - coefficients_SV.sum(-1, keepdim=True) * self.student.exp()

    def whole(self) -> Tensor:
        """Return (S, V): the gradient of the reverse KL over the whole vocabulary."""
        return self.score_sum(self.student.exp() * (self.student - self.teacher))


def supports(states: States, k: int) -> list[Tensor]:
    """Return the teacher's most likely tokens, and the policy's."""
    return [logprobs_SV.topk(k, -1).indices for logprobs_SV in (states.teacher, states.policy)]


# each pair is its own test: what another distribution drew counts otherwise only beside draws
@pytest.mark.parametrize(("temperature", "drawn"), [(1.0, 0), (1.0, 1), (1.0, 2), (0.6, 0), (0.6, 1)])
@given(seed=st.integers(0, 2**20), k=st.integers(0, 5), divergence=st.sampled_from(BOTH))
@exact
def test_with_the_residual_the_gradient_is_that_of_the_whole_vocabulary_for_every_support(
    seed: int, k: int, divergence: Divergence, temperature: float, drawn: int
) -> None:
    states = States.random(seed)
    for support_SK in supports(states, k):
        batch = states.batch(support_SK, temperature, drawn)
        objective = TopKObjective(divergence, residual=True)
        for loss in (FusedLoss(objective), ReferenceLoss(objective)):
            made = states.gradient(loss, batch)
            torch.testing.assert_close(made, states.whole(), rtol=0, atol=1e-12)


@given(st.integers(0, 2**20), st.integers(1, 5))
@exact
def test_without_the_residual_the_bias_is_what_tokens_outside_the_support_would_have_got(seed: int, k: int) -> None:
    states = States.random(seed)
    for support_SK in supports(states, k):
        batch = states.batch(support_SK)
        outside_SV = torch.ones_like(states.student).scatter(-1, support_SK, 0.0)
        p, gap = states.student.exp() * outside_SV, states.student - states.teacher
        tail_gap = (p.sum(-1, keepdim=True) / (states.teacher.exp() * outside_SV).sum(-1, keepdim=True)).log()
        for divergence, missing in ((generalised_kl, p * gap), (reverse_kl, p * (gap - tail_gap))):
            bias = states.gradient(FusedLoss(TopKObjective(divergence)), batch) - states.whole()
            # a tail is 1 minus the rest, which leaves so small a tail an error of 8e-12 in 6,000 seeds
            torch.testing.assert_close(bias, -states.score_sum(missing), rtol=0, atol=1e-10)


@given(st.integers(0, 2**20), st.integers(0, 6), st.integers(0, 1))
@exact
def test_the_expected_value_with_the_residual_is_the_reverse_kl_over_the_whole_vocabulary(seed: int, k: int, drawn: int) -> None:
    states = States.random(seed)
    kl = float((states.student.exp() * (states.student - states.teacher)).sum())
    loss = FusedLoss(TopKObjective(reverse_kl, residual=True))
    for support_SK in supports(states, k):
        batch = states.batch(support_SK, drawn=drawn)
        output = loss(states.student[batch.inputs], LMHead(torch.eye(6, dtype=torch.float64)), batch)
        assert float(output.loss_sum) == pytest.approx(kl, abs=1e-10)


def test_a_sampled_token_that_was_forced_into_the_support_leaves_the_bias_as_it_is() -> None:
    states = States.random(3)
    batch = states.batch(states.teacher.topk(2, -1).indices)
    assert batch.top_k_ids is not None
    forced_MK = torch.cat([batch.targets[:, None], batch.top_k_ids[:, :1]], -1)
    forced_MK[:, 1] = torch.where(forced_MK[:, 1] == batch.targets, batch.top_k_ids[:, 1], forced_MK[:, 1])
    top_MK = states.teacher[batch.inputs].gather(-1, forced_MK)
    forced = evolve(batch, top_k_ids=forced_MK, top_k_logprobs=top_MK, top_k_tail=1 - top_MK.exp().sum(-1))
    with_residual, without = (states.gradient(FusedLoss(TopKObjective(reverse_kl, residual=r)), forced) for r in (True, False))
    assert torch.equal(with_residual, without)
    assert (without - states.whole()).abs().max() > 0.05


def test_a_sampled_token_of_another_distribution_is_left_out_of_the_mean_of_what_the_policy_drew() -> None:
    states = States.random(4)
    batch = states.batch(states.teacher.topk(1, -1).indices, temperature=0.5, drawn=1)
    loss = FusedLoss(TopKObjective(reverse_kl, residual=True))
    others = evolve(batch, targets=(batch.targets + 1) % 6)  # its log-probs, too, are then another token's
    torch.testing.assert_close(states.gradient(loss, batch), states.gradient(loss, others))


@pytest.mark.parametrize("bound", [{"clip": 0.5}, {"ratio_cap": 0.5}])
def test_clip_and_cap_bound_the_advantage_and_the_ratio_of_the_residual(bound: dict[str, float]) -> None:
    states = States.random(5)
    support_SK = states.teacher.topk(2, -1).indices
    batch = states.batch(support_SK)
    outside_SV = torch.ones_like(states.student).scatter(-1, support_SK, 0.0)
    p, gap = states.student.exp() * outside_SV, states.teacher - states.student
    advantage = gap - ((states.teacher.exp() * outside_SV).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)).log()
    ratio = (states.student - states.policy).exp()
    bounded = ratio.clamp(max=bound.get("ratio_cap", math.inf)) * advantage.clamp(-bound.get("clip", math.inf), bound.get("clip", math.inf))
    expected = -states.score_sum(states.policy.exp() * outside_SV * bounded)
    objectives = [TopKObjective(reverse_kl, residual=True, **bound), TopKObjective(reverse_kl)]
    made, without = (states.gradient(FusedLoss(objective), batch) for objective in objectives)
    torch.testing.assert_close(made - without, expected, rtol=0, atol=1e-12)
    output = FusedLoss(objectives[0])(states.student[batch.inputs], LMHead(torch.eye(6, dtype=torch.float64)), batch)
    share = (states.policy.exp() * outside_SV * (advantage.abs() > bound.get("clip", math.inf))).sum()
    torch.testing.assert_close(output.clipped_sum, share)


@pytest.mark.parametrize(
    "objective",
    [
        TopKObjective(reverse_kl, residual=True),
        TopKObjective(generalised_kl, residual=True, clip=1.0, ratio_cap=2.0),
    ],
    ids=["reverse KL", "generalised KL, bounded"],
)
def test_the_fused_loss_is_the_plain_one(objective: TopKObjective) -> None:
    assert objective.per_token
    assert broken_clauses(FusedLoss(objective, SMALL), ReferenceLoss(objective)) == []


@given(st.integers(0, 2**20), st.sampled_from([1e-3, 0.1, 1.0]))
@exact
def test_what_the_filter_leaves_out_is_within_its_bound(seed: int, epsilon: float) -> None:
    case = loss_case("filter", [30, 20], seed=seed, drawn=3)
    objective = TopKObjective(reverse_kl, residual=True)
    output, mine = evaluate_case(FusedLoss(objective, SMALL, epsilon), case)
    _, exact_gradients = evaluate_case(FusedLoss(objective), case)
    assert output.neglected_sum is not None
    error = float((mine[1] - exact_gradients[1]).norm())
    assert error <= float(output.neglected_sum) * float(case.hidden.norm(dim=-1).max()) + 1e-9


@pytest.mark.parametrize("divergence", [forward_kl, entropy_gated, reverse_kl_renormalised, partial(reverse_kl)])
def test_a_residual_of_another_divergence_is_refused(divergence: Divergence) -> None:
    with pytest.raises(InvalidRecordError, match="expected reverse_kl or generalised_kl with residual=True"):
        TopKObjective(divergence, residual=True)


def test_bounds_that_make_no_sense_are_refused() -> None:
    for bound in ({"clip": 0.0}, {"ratio_cap": math.inf}, {"clip": math.nan}, {"ratio_cap": -1.0}):
        with pytest.raises(InvalidRecordError, match=r"TopKObjective: \w+ is .*, expected None, or finite and more than 0"):
            TopKObjective(reverse_kl, residual=True, **bound)
    with pytest.raises(InvalidRecordError, match="clip and ratio_cap bound a residual, and residual is False"):
        TopKObjective(reverse_kl, clip=1.0)


def test_columns_that_an_objective_needs_and_a_batch_lacks_are_named() -> None:
    case = loss_case("drawn", drawn=2)
    for changes, residual, message in (
        ({"ref_logprobs": None}, True, "ref_logprobs is None"),
        ({"drawn_ref_logprobs": None}, True, "drawn_ref_logprobs is None"),
        ({"top_k_ids": torch.zeros(15, 0, dtype=torch.int64)}, False, "top_k_ids has 0 tokens"),
    ):
        with pytest.raises(MissingScoresError, match=message):
            FusedLoss(TopKObjective(reverse_kl, residual))(*case.leaves(), evolve(case.batch, **changes))


@pytest.mark.parametrize("tail", [1e-2, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("divergence", [forward_kl, entropy_gated, jensen_shannon, reverse_kl])
@pytest.mark.parametrize("objective", [lambda alone: alone, WindowRatio], ids=["three products", "four"])
def test_a_student_that_has_nearly_no_tail_gets_the_whole_gradient_of_the_teachers_in_float32(
    objective: Callable[[TopKObjective], Objective], divergence: Divergence, tail: float
) -> None:
    logits_V = torch.cat([torch.tensor([0.0, -1.0, -2.0, -3.0]), torch.linspace(-1, 1, 46)]).double()
    logits_V[4:] += math.log(tail) - logits_V[4:].logsumexp(0) + logits_V[:4].logsumexp(0)
    teacher = torch.tensor([[0.4, 0.3, 0.15, 0.05]]).log()
    ids = torch.arange(4)[None]
    hidden = logits_V.float()[None].requires_grad_()
    one = torch.ones(1, dtype=torch.int64)
    batch = Batch(one, one, one, one, torch.ones(1), teacher[:, 0], teacher[:, 0], ids, teacher, torch.tensor([0.1]))
    FusedLoss(objective(TopKObjective(divergence)))(hidden, LMHead(torch.eye(50)), batch).loss_sum.backward()
    # in float64, with the tail added up where it is
    exact_V = hidden.detach().double()[0].requires_grad_()
    logprobs_V = exact_V.log_softmax(-1)
    student_B, teacher_B = (
        torch.cat([logprobs_V[:4], logprobs_V[4:].logsumexp(0)[None]]),
        torch.cat([teacher[0].double(), torch.tensor([0.1]).double().log()]),
    )
    mixture_B = ((student_B.exp() + teacher_B.exp()) / 2).log()
    reverse, forward = (student_B.exp() * (student_B - teacher_B)).sum(), (teacher_B.exp() * (teacher_B - student_B)).sum()
    shannon = ((student_B.exp() * (student_B - mixture_B)).sum() + (teacher_B.exp() * (teacher_B - mixture_B)).sum()) / 2
    by_name = {"forward_kl": forward, "entropy_gated": forward + reverse, "jensen_shannon": shannon, "reverse_kl": reverse}
    (expected_V,) = torch.autograd.grad(by_name[getattr(divergence, "__name__", "")], exact_V)
    assert hidden.grad is not None
    assert expected_V.abs().max() > 1e-3
    torch.testing.assert_close(hidden.grad[0].double(), expected_V, rtol=1e-4, atol=1e-5 * float(expected_V.abs().max()))


class LargestMade(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.most = max(self.most, made.untyped_storage().nbytes() if isinstance(made, Tensor) else 0)
        return made


@pytest.mark.parametrize("k", [1, 8, 256])
def test_a_wide_support_takes_the_memory_of_a_block_and_gives_the_same_numbers(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A support of 256 ids compared with itself is 600 KB a row, as much as the row's logits."""
    ids_CK, gradient_CK = torch.randint(0, 2 * k, (50, k)), torch.randn(50, k)
    known = rows.Statistics(-torch.rand(50, k, dtype=torch.float64), torch.ones(50), torch.zeros(50))
    made = []
    for bytes_ in (1 << 40, 1 << 20):
        monkeypatch.setattr(rows, "_BLOCK_BYTES", bytes_)
        with LargestMade() as largest:
            by_ids = rows.selected_gradients(ids_CK, known, gradient_CK, None)
            made.append([by_ids, *rows.selected_logprobs_of(ids_CK, gradient_CK, torch.ones(50), torch.ones(50))])
        assert largest.most <= bytes_
    assert all(torch.equal(whole, part) for whole, part in zip(*made, strict=True))
