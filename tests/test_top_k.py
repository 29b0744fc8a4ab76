"""Divergences over stored top-k, against torch's own over distributions; and the way of a top-k from the store to the loss."""

import math
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from attrs import evolve
from helpers import BigramLM, make_manifest, make_provenance, make_rollout, scored
from hypothesis import given, settings
from test_fused_losses import SMALL, broken_clauses
from test_gradient_equivalence import Problem, assert_same, problems
from torch import Tensor

from lopd import batches, collate
from lopd.backends.memory_store import MemoryStore
from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses.divergences import (
    LEAST_TAIL,
    entropy_gated,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    reverse_kl_renormalised,
)
from lopd.losses.fused import FusedLoss, FusedOPDLoss
from lopd.losses.reference import ReferenceLoss, ReferenceOPDLoss
from lopd.losses.top_k import TopKObjective
from lopd.protocols import OPDLoss
from lopd.records import Batch, Rollout, Scores, TopK
from lopd.testing import loss_case

WITH_TAIL = [forward_kl, reverse_kl, jensen_shannon, partial(jensen_shannon, beta=0.1), entropy_gated]
EVERY = [*WITH_TAIL, reverse_kl_renormalised]
exact = settings(deadline=None, max_examples=40)


def distributions(seed: int, rows: int = 5, vocab: int = 9, k: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (rows, V) log-probs of student and teacher, both at the teacher's k most likely tokens, and the teacher's tail."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, vocab, generator=random, dtype=torch.float64) for _ in range(2))
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    top, ids = teacher.topk(k)
    return student, teacher, student.gather(-1, ids), top, 1 - top.exp().sum(-1)


def kl(left: Tensor, right: Tensor) -> Tensor:
    """Return torch's own KL, of log-probs."""
    return torch.nn.functional.kl_div(right, left, reduction="none", log_target=True).sum(-1)


def with_tail(logprobs: Tensor) -> Tensor:
    return torch.cat([logprobs, (1 - logprobs.exp().sum(-1, keepdim=True)).log()], -1)


def test_forward_and_reverse_kl_are_those_of_the_buckets() -> None:
    _, _, student, teacher, tail = distributions(0)
    torch.testing.assert_close(forward_kl(student, teacher, tail), kl(with_tail(teacher), with_tail(student)))
    torch.testing.assert_close(reverse_kl(student, teacher, tail), kl(with_tail(student), with_tail(teacher)))


def test_the_renormalised_reverse_kl_is_that_of_two_softmaxes_over_the_k() -> None:
    _, _, student, teacher, tail = distributions(1)
    expected = kl(student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(reverse_kl_renormalised(student, teacher, tail), expected)
    torch.testing.assert_close(reverse_kl_renormalised(student - 3, teacher, tail), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_mean_kl_to_the_mixture(beta: float) -> None:
    _, _, student, teacher, tail = distributions(2)
    s, t = with_tail(student), with_tail(teacher)
    mixture = (beta * t.exp() + (1 - beta) * s.exp()).log()
    torch.testing.assert_close(jensen_shannon(student, teacher, tail, beta), beta * kl(t, mixture) + (1 - beta) * kl(s, mixture))


def test_the_entropy_gate_adds_the_forward_kl_where_the_teacher_is_uncertain() -> None:
    _, _, student, teacher, tail = distributions(3)
    buckets = with_tail(teacher)
    entropy = -(buckets.exp() * buckets).sum(-1)
    middle = float(entropy.sort().values[2]) - 1e-9
    forward, reverse = forward_kl(student, teacher, tail), reverse_kl(student, teacher, tail)
    made = entropy_gated(student, teacher, tail, threshold=middle)
    torch.testing.assert_close(made, reverse + torch.where(entropy > middle, forward, 0.0))
    assert int((entropy > middle).sum()) == 3


@given(st.integers(0, 2**20), st.integers(1, 9), st.sampled_from(WITH_TAIL))
@exact
def test_with_the_tail_a_divergence_is_never_negative_and_zero_for_equal_distributions(seed: int, k: int, divergence: object) -> None:
    _, _, student, teacher, tail = distributions(seed, k=k)
    assert (divergence(student, teacher, tail) >= -1e-12).all()
    assert (divergence(teacher, teacher, tail).abs() < 1e-9).all()


@given(st.integers(0, 2**20), st.integers(1, 8))
@exact
def test_what_the_buckets_see_is_at_most_what_the_whole_vocabulary_sees_and_all_of_it_with_every_token(seed: int, k: int) -> None:
    student, teacher, few_s, few_t, tail = distributions(seed, k=k)
    assert (forward_kl(few_s, few_t, tail) <= kl(teacher, student) + 1e-9).all()
    assert (reverse_kl(few_s, few_t, tail) <= kl(student, teacher) + 1e-9).all()
    _, _, all_s, all_t, nothing = distributions(seed, k=9)
    torch.testing.assert_close(forward_kl(all_s, all_t, nothing), kl(teacher, student), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reverse_kl(all_s, all_t, nothing), kl(student, teacher), rtol=1e-9, atol=1e-9)


def test_without_the_tail_the_forward_kl_could_be_negative() -> None:
    student, teacher = torch.tensor([[0.9]]).log(), torch.tensor([[0.5]]).log()
    assert (teacher.exp() * (teacher - student)).sum() < 0 < forward_kl(student, teacher, torch.tensor([0.5]))


@pytest.mark.parametrize("divergence", EVERY)
def test_finite_differences_agree_with_every_divergence(divergence: object) -> None:
    _, _, student, teacher, tail = distributions(4)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, tail), (student.requires_grad_(),))


@pytest.mark.parametrize("divergence", EVERY)
def test_a_student_without_a_tail_gives_finite_values_and_gradients_in_float32(divergence: object) -> None:
    student = torch.tensor([[-1e-9, -30.0], [-0.7, -0.69]], requires_grad=True)
    teacher = torch.tensor([[0.0, -80.0], [-0.1, -2.4]])
    made = divergence(student, teacher, torch.tensor([0.0, LEAST_TAIL]))
    assert made.isfinite().all()
    assert torch.autograd.grad(made.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("divergence", EVERY)
def test_a_divergence_means_the_same_to_the_fused_loss_as_to_the_plain_one(divergence: object) -> None:
    objective = TopKObjective(divergence)
    assert broken_clauses(FusedLoss(objective, SMALL), ReferenceLoss(objective)) == []


def test_a_kl_baseline_means_the_same_to_the_fused_loss_as_to_the_plain_one() -> None:
    assert broken_clauses(FusedOPDLoss(kl_baseline=True, chunking=SMALL), ReferenceOPDLoss(kl_baseline=True)) == []


def test_a_top_k_loss_without_a_top_k_is_refused() -> None:
    case = loss_case("none")
    batch = evolve(case.batch, top_k_ids=None)
    for loss in (FusedLoss(TopKObjective(forward_kl)), FusedOPDLoss(kl_baseline=True), ReferenceLoss(TopKObjective(forward_kl))):
        with pytest.raises(MissingScoresError, match=r"top_k_ids is None.*batches\(top_k=True\)"):
            loss(*case.leaves(), batch)


def with_all_tokens(batch: Batch, teacher: BigramLM) -> Batch:
    """Return a batch with the teacher's whole distribution as its top-k."""
    logprobs, ids = teacher.logprobs_VV().detach()[batch.inputs].sort(descending=True)
    return evolve(batch, top_k_ids=ids, top_k_logprobs=logprobs, top_k_tail=torch.zeros(len(ids), dtype=torch.float64))


def online_gradient(problem: Problem, loss: OPDLoss) -> Tensor:
    from helpers import flat_gradient

    batch = problem.world.batch(problem.world.probabilities_R(problem.student), problem.teacher, problem.ref)
    return -flat_gradient(problem.student, problem.student(with_all_tokens(batch, problem.teacher), loss).loss_sum)


@given(problems())
@exact
def test_the_kl_baseline_leaves_the_expected_online_gradient_as_it_is(problem: Problem) -> None:
    assert_same(online_gradient(problem, FusedOPDLoss(None, kl_baseline=True)), problem.exact_online())


@given(problems())
@exact
def test_the_reverse_kl_over_all_tokens_has_the_exact_online_gradient_without_sampling_the_token(problem: Problem) -> None:
    assert_same(online_gradient(problem, FusedLoss(TopKObjective(reverse_kl))), problem.exact_online())


# --- from the store to the batch ---------------------------------------------------------------------------------------------------------


def support(rollout: Rollout, k: int = 2) -> TopK:
    """Return ids that name position and rank."""
    length = rollout.response_ids.size
    ids = 10 * np.arange(1, length + 1)[:, None] + np.arange(k)
    logprobs = np.log(np.linspace(0.1, 0.4, length * k).reshape(length, k) / k)
    return TopK(ids, logprobs, 1 - np.exp(logprobs).sum(-1))


def store(k: int = 2, scorer_k: int | None = None) -> tuple[MemoryStore, list[Rollout]]:
    rollouts = [make_rollout("a", [1, 2, 3], [4, 5]), make_rollout("b", [6], [7, 8, 9])]
    made = MemoryStore(make_manifest())
    made.append(rollouts)
    scores = [Scores.of(r, [-1.0] * r.response_ids.size, top_k=support(r, k) if k else None) for r in rollouts]
    made.append_scores("teacher", evolve(make_provenance(), top_k=k), scores)
    return made, rollouts


def test_each_response_token_has_the_top_k_of_its_own_place_and_prompt_tokens_have_zeros() -> None:
    made, rollouts = store()
    (batch,) = batches(made, rollouts_per_step=2, top_k=True).step(0).batches
    assert batch.top_k_ids is not None
    assert batch.top_k_ids.dtype == torch.int64
    for segment in range(2):
        rows = batch.segment_ids == segment
        # which rollout it is shows in its length
        rollout = next(r for r in rollouts if len(r) - 1 == int(rows.sum()))
        expected = support(rollout)
        prompt = rollout.prompt_ids.size - 1
        for name, values in (("top_k_ids", expected.ids), ("top_k_logprobs", expected.logprobs), ("top_k_tail", expected.tail)):
            column = getattr(batch, name)[rows]
            assert not column[:prompt].any(), name
            np.testing.assert_array_equal(column[prompt:].numpy(), values, err_msg=name)


def test_without_being_asked_for_no_top_k_is_read() -> None:
    (batch,) = batches(store()[0], rollouts_per_step=2).step(0).batches
    assert batch.top_k_ids is batch.top_k_logprobs is batch.top_k_tail is None


def test_a_column_that_keeps_no_top_k_is_refused_before_the_first_step() -> None:
    with pytest.raises(MissingScoresError, match=r"'teacher' keeps 0 most likely tokens.*top_k=True.*top_k=20.*column='teacher-20'"):
        batches(store(k=0)[0], top_k=True)
    with pytest.raises(MissingScoresError, match="top_k=True needs a teacher"):
        batches(store()[0], teacher=None, top_k=True)


def test_records_with_another_k_or_without_are_named() -> None:
    first, second = (scored(rollout, {"teacher": [-1.0] * rollout.response_ids.size}) for rollout in store()[1])
    with pytest.raises(MissingScoresError, match=r"'a': top-k of column 'teacher' was not read"):
        collate([first, second], top_k="teacher")
    unequal = [evolve(row, top_k={"teacher": support(row.rollout, k)}) for row, k in ((first, 2), (second, 3))]
    with pytest.raises(InvalidRecordError, match="'b': its top-k has 3 tokens, 0 of them drawn, expected 2 and 0"):
        collate(unequal, top_k="teacher")


def test_a_top_k_moves_to_another_device_with_its_batch() -> None:
    (batch,) = batches(store()[0], rollouts_per_step=2, top_k=True).step(0).batches
    moved = batch.to(torch.device("meta"))
    assert moved.top_k_tail is not None
    assert moved.top_k_tail.device.type == "meta"
    assert math.isclose(float(batch.top_k_tail.max()), max(float(support(r).tail.max()) for r in store()[1]), rel_tol=1e-6)
