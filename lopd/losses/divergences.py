r"""Divergences between teacher and student over the teacher's K most likely tokens, which a store may keep beside the sampled one.

What the K leave out is one more bucket, the tail: \(p_{tail} = 1 - \sum_{v \in S} p_v\), of the teacher as stored, of the student as what its
log-probs of the K leave.  With it a divergence is one between two distributions over K + 1 buckets, so it is never negative and never more
than that over the whole vocabulary.  The token that was sampled plays no part: given the states, a divergence has no sampling noise.

Every function takes the student's log-probs (with the gradient), the teacher's, and the teacher's tail; and gives (M,) nats.

Shape suffixes: M tokens, K most likely ones, B = K + 1 buckets.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lopd.records.checks import check_number, to_real

#: A tail of less is taken for this much: below it, 1 minus a float32 sum is noise.
LEAST_TAIL = 1e-6

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]


def _buckets(logprobs_MK: Tensor, tail_M: Tensor | None = None) -> Tensor:
    """(M, B) log-probs of the K and of the tail."""
    rest_M = 1 - logprobs_MK.exp().sum(-1) if tail_M is None else tail_M
    return torch.cat([logprobs_MK, rest_M.clamp(min=LEAST_TAIL).log()[:, None]], dim=-1)


def _kl(logprobs_MB: Tensor, other_MB: Tensor) -> Tensor:
    """KL of the first to the second over what is listed."""
    return (logprobs_MB.exp() * (logprobs_MB - other_MB)).sum(-1)


def forward_kl(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""\(\sum_b p_T \log(p_T / p_\theta)\) over the K and the tail: the student covers whatever the teacher finds likely.

    Source: knowledge distillation (arXiv 1503.02531) on the buckets; robust to stale rollouts according to AsyncOPD (arXiv 2606.24143).
    """
    return _kl(_buckets(teacher_MK, tail_M), _buckets(student_MK))


def reverse_kl(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""\(\sum_b p_\theta \log(p_\theta / p_T)\) over the K and the tail.

    Leaving the tail out instead would bias the gradient: the +1 of \(\partial (p \log p)\) cancels over a whole distribution only.

    Source: the reverse KL of OPD; for the bias arXiv 2605.11182.
    """
    return _kl(_buckets(student_MK), _buckets(teacher_MK, tail_M))


def reverse_kl_renormalised(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor) -> Tensor:
    r"""\(\sum_{v \in S} \hat p_\theta \log(\hat p_\theta / \hat p_T)\), both renormalised over the K; says nothing about how much mass they have.

    Source: arXiv 2603.25562.
    """
    del tail_M
    return _kl(student_MK.log_softmax(-1), teacher_MK.log_softmax(-1))


def jensen_shannon(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor, beta: float = 0.5) -> Tensor:
    r"""\(\beta\,KL(p_T, m) + (1 - \beta)\,KL(p_\theta, m)\), \(m = \beta p_T + (1 - \beta) p_\theta\), over the K and the tail; at most log 2.

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
    student_MB, teacher_MB = _buckets(student_MK), _buckets(teacher_MK, tail_M)
    mixture_MB = torch.logaddexp(teacher_MB + math.log(beta), student_MB + math.log1p(-beta))
    return beta * _kl(teacher_MB, mixture_MB) + (1 - beta) * _kl(student_MB, mixture_MB)


def entropy_gated(student_MK: Tensor, teacher_MK: Tensor, tail_M: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Reverse KL, plus forward KL where the teacher is uncertain: \(KL(p_\theta, p_T) + [H(p_T) > h]\,KL(p_T, p_\theta)\).

    The entropy is that of the buckets, which is at most the teacher's own.

    Args:
        student_MK: the student's log-probs.
        teacher_MK: the teacher's.
        tail_M: the teacher's tail.
        threshold: h, nats.

    Source: EOPD (arXiv 2603.07079).  Secondary sources disagree on a threshold or a soft gate; this is the threshold.
    """
    teacher_MB = _buckets(teacher_MK, tail_M)
    entropy_M = -(teacher_MB.exp() * teacher_MB).sum(-1)
    gate_M = (entropy_M > threshold).to(student_MK.dtype)
    return reverse_kl(student_MK, teacher_MK, tail_M) + gate_M * forward_kl(student_MK, teacher_MK, tail_M)
