r"""Divergences between teacher and student over a support of K tokens: the teacher's most likely ones, or candidates of the policy.

What the K leave out is one more bucket, the tail: \(p_{tail} = 1 - \sum_{v \in S} p_v\), of the teacher as stored, of the student as what its
log-probs of the K leave.  With it a divergence is one between two distributions over K + 1 buckets, so it is never negative and never more
than that over the whole vocabulary.  The token that was sampled plays no part: given the states, a divergence has no sampling noise.  It has
a bias instead, since it does not see how either model divides the tail.

Every function takes the student's log-probs (with the gradient), the teacher's, and the teacher's tail; and gives (M,) nats.

Shape suffixes: M tokens, K most likely ones, B = K + 1 buckets.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lopd.errors import InvalidRecordError
from lopd.records.checks import check_number, to_real

#: The least that a tail is taken for in a log without a gradient: below it, 1 minus a float32 sum is noise.
LEAST_TAIL = 1e-6

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Buckets(NamedTuple):
    """(M, B) probabilities, and their logs."""

    shares: Tensor
    logs: Tensor


def _buckets(logprobs_MK: Tensor, tail_M: Tensor | None = None) -> _Buckets:
    """Return the K and the tail: the one that is given, or what the student's K leave."""
    rest_M = _rest(logprobs_MK) if tail_M is None else tail_M
    log_rest_M = _log_tail(rest_M) if tail_M is None else tail_M.clamp(min=LEAST_TAIL).log()
    return _Buckets(torch.cat([logprobs_MK.exp(), rest_M[:, None]], -1), torch.cat([logprobs_MK, log_rest_M[:, None]], -1))


def _log_tail(tail_M: Tensor) -> Tensor:
    """Return (M,) log of the student's tail.

    One of less than a rounding is taken for that much, and its gradient passes: a clamp would let a student without a tail ignore the teacher's.
    """
    return (tail_M + (tail_M.clamp(min=torch.finfo(tail_M.dtype).eps) - tail_M).detach()).log()


def _kl(these: _Buckets, others: Tensor) -> Tensor:
    """Return KL of the first to the second, whose (M, B) logs are given, over what is listed."""
    return (these.shares * (these.logs - others)).sum(-1)


def forward_kl(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""Return \(\sum_b p_T \log(p_T / p_\theta)\) over the K and the tail: the student covers whatever the teacher finds likely.

    Source: knowledge distillation (arXiv 1503.02531) on the buckets; robust to stale rollouts according to AsyncOPD (arXiv 2606.24143).
    """
    return _kl(_buckets(teacher_MK, tail_M), _buckets(student_MK).logs)


def reverse_kl(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""Return \(\sum_b p_\theta \log(p_\theta / p_T)\) over the K and the tail.

    Leaving the tail out instead would bias the gradient: the +1 of \(\partial (p \log p)\) cancels over a whole distribution only.  Here logs carry
    no gradient, so it never comes up: each bucket's is its probability's, times an advantage.

    Source: the reverse KL of OPD; for the bias arXiv 2605.11182.
    """
    gaps_MK = student_MK.detach() - teacher_MK
    return (student_MK.exp() * gaps_MK).sum(-1) - _rest(student_MK) * _tail_advantages(student_MK, tail_M)


def _rest(student_MK: Tensor) -> Tensor:
    """Return (M,) the student's tail."""
    return 1 - student_MK.exp().sum(-1)


def _tail_advantages(student_MK: Tensor, tail_M: Tensor) -> Tensor:
    """Return (M,) nats, detached: what the teacher's tail is above the student's."""
    return tail_M.clamp(min=LEAST_TAIL).log() - _rest(student_MK.detach()).clamp(min=LEAST_TAIL).log()


def generalised_kl(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""Return \(\sum_{v \in S} p_\theta \log(p_\theta / p_T) - p_\theta + p_T\): the generalised reverse KL of two measures on the K, without the
    tail.

    Each term is at least 0, and has the gradient that its token has in the KL over the whole vocabulary.  Tokens outside the K get none: the bias
    of the gradient is their share of it, where that of `reverse_kl` is what their share differs from the bucket's.

    Source: generalised Kullback-Leibler divergence (Csiszar 1991) on the K.
    """
    del tail_M
    return (student_MK.exp() * (student_MK - teacher_MK - 1) + teacher_MK.exp()).sum(-1)


def tail_advantages(divergence: Divergence, student_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""Return (M,) nats, detached: the advantage that a reverse KL gives to every token outside the K, \(\log(p_{T,tail} / p_{\theta,tail})\).

    It is 0 for `generalised_kl`, which has no bucket for them.

    Raises:
        InvalidRecordError: the divergence is neither of the two: in others a token's gradient is not its probability times an advantage.
    """
    if divergence is generalised_kl:
        return torch.zeros_like(tail_M)
    if divergence is reverse_kl:
        return _tail_advantages(student_MK, tail_M)
    name = getattr(divergence, "__name__", repr(divergence))
    raise InvalidRecordError(
        f"TopKObjective: divergence is {name}, expected reverse_kl or generalised_kl with residual=True; pass one of these."
    )


def reverse_kl_renormalised(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""Return \(\sum_{v \in S} \hat p_\theta \log(\hat p_\theta / \hat p_T)\), both renormalised over the K; does not measure how much mass they
    have.

    Source: arXiv 2603.25562.
    """
    del tail_M
    own_MK = student_MK.log_softmax(-1)
    return _kl(_Buckets(own_MK.exp(), own_MK), teacher_MK.log_softmax(-1))


def jensen_shannon(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor, beta: float = 0.5) -> Tensor:
    r"""Return \(\beta\,KL(p_T, m) + (1 - \beta)\,KL(p_\theta, m)\), \(m = \beta p_T + (1 - \beta) p_\theta\), over the K and the tail; at most log 2.

    Args:
        student_MK: the student's log-probs.
        teacher_MK: the teacher's.
        tail_M: the teacher's tail.
        beta: share of the teacher in the mixture, between 0 and 1.

    Raises:
        InvalidRecordError: beta is not between 0 and 1.

    Source: generalised Jensen-Shannon divergence as in GKD (arXiv 2306.13649), eq. 4.
    """
    beta = to_real("Jensen-Shannon divergence", "beta", beta)
    check_number("Jensen-Shannon divergence", "beta", beta, 0 < beta < 1, "between 0 and 1")
    student, teacher = _buckets(student_MK), _buckets(teacher_MK, tail_M)
    mixture_MB = torch.logaddexp(teacher.logs + math.log(beta), student.logs + math.log1p(-beta))
    return beta * _kl(teacher, mixture_MB) + (1 - beta) * _kl(student, mixture_MB)


def entropy_gated(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Return reverse KL, plus forward KL where the teacher is uncertain: \(KL(p_\theta, p_T) + [H(p_T) > h]\,KL(p_T, p_\theta)\).

    The entropy is that of the buckets, which is at most the teacher's own.

    Args:
        student_MK: the student's log-probs.
        teacher_MK: the teacher's.
        tail_M: the teacher's tail.
        threshold: h, nats.

    Source: EOPD (arXiv 2603.07079).  Secondary sources disagree on a threshold or a soft gate; this is the threshold.
    """
    teacher = _buckets(teacher_MK, tail_M)
    entropy_M = -(teacher.shares * teacher.logs).sum(-1)
    gate_M = (entropy_M > threshold).to(student_MK.dtype)
    return reverse_kl(student_MK, teacher_MK, tail_M) + gate_M * forward_kl(student_MK, teacher_MK, tail_M)
