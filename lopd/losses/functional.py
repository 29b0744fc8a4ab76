r"""The equations, per token.  \(\ell_\theta = \log\pi_\theta(a_t|s_t)\) is the student's log-prob of the stored token, nats.

Every function takes and returns (M,) tensors, has no reduction inside, and documents which of its arguments carry the gradient.
"""

import math

import torch
from torch import Tensor

from lopd.records.checks import check_number, to_real

#: Nats: the logarithm of a ratio counts as at most this much.  A ratio of 5e8 is far from any that a run learns from; float32 ends at 88 nats.
MAX_LOG_RATIO = 20.0


def advantages(teacher_logprobs_M: Tensor, student_logprobs_M: Tensor, clip: float | None) -> Tensor:
    r"""Return detached advantages \(A = \mathrm{clip}(\ell_T - \mathrm{sg}[\ell_\theta],\, \pm\tau)\), nats.

    Args:
        teacher_logprobs_M: \(\ell_T\), stored.
        student_logprobs_M: \(\ell_\theta\), of the current student.
        clip: \(\tau\), or None for no clipping.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 2, algorithm 1 and table 6 (tau = 10).

    >>> advantages(torch.tensor([-1.0, -30.0]), torch.tensor([-2.0, -1.0]), clip=10.0)
    tensor([  1., -10.])
    """
    return clip_advantages((teacher_logprobs_M - student_logprobs_M).detach(), clip)


def clip_advantages(advantages_M: Tensor, clip: float | None) -> Tensor:
    r"""Return \(\mathrm{clip}(A, \pm\tau)\); without a \(\tau\), A as it is."""
    return advantages_M if clip is None else advantages_M.clamp(-clip, clip)


def lightning(student_logprobs_M: Tensor, advantages_M: Tensor) -> Tensor:
    r"""Return \(-A\,\ell_\theta\): the advantage-weighted policy gradient, no importance correction.  Gradient through \(\ell_\theta\) only.

    With A as above this is the gradient of a Huber loss (delta = tau) on \(\ell_\theta - \ell_T\); without the stop-gradient in A the
    teacher would vanish from it.  With A = 1 it is supervised fine-tuning (eq. 6).

    Source: Lightning OPD (arXiv 2604.13010v2), section 3.1.

    >>> lightning(torch.tensor([-2.0]), torch.tensor([1.0]))
    tensor([2.])
    """
    return -advantages_M * student_logprobs_M


def bounded_ratio(log_ratio_M: Tensor, cap: float | None = None) -> Tensor:
    r"""Return \(\min(r, c)\) of \(r = \exp(\log r)\), with the gradient \(\min(r, c)\,\nabla\log r\) on both sides of the cap.

    A clamp would have no gradient beyond it: a token that has become too likely would never be pushed down again.

    Args:
        log_ratio_M: \(\log r\), (M,) nats; the gradient goes through it.
        cap: \(c\), more than 0; None for none but that of `MAX_LOG_RATIO`, which keeps the ratio finite.

    Source: truncated importance sampling (Ionides 2008).

    >>> bounded_ratio(torch.tensor([-1.0, 0.0, 2.0, 100.0]), cap=4.0)
    tensor([0.3679, 1.0000, 4.0000, 4.0000])
    """
    if cap is not None:
        check_number("Ratio", "cap", cap, to_real("Ratio", "cap", cap) > 0, "None, or more than 0")
    most = MAX_LOG_RATIO if cap is None else min(math.log(cap), MAX_LOG_RATIO)
    return torch.exp(log_ratio_M - (log_ratio_M.detach() - most).clamp(min=0))


def sampled_reverse_kl(student_logprobs_M: Tensor, teacher_logprobs_M: Tensor, sampler_logprobs_M: Tensor | None) -> Tensor:
    r"""Return \(r\,(\ell_\theta - \ell_T)\), detached, nats: its mean over tokens that q drew is \(KL(\pi_\theta, \pi_T)\) at the stored state.

    Tokens that top-p cut off were never drawn, so the mean lacks their share.

    Args:
        student_logprobs_M: \(\ell_\theta\), of the current student.
        teacher_logprobs_M: \(\ell_T\), stored.
        sampler_logprobs_M: \(\ell_q\), stored, for \(r = \exp(\ell_\theta - \ell_q)\) (`bounded_ratio`); None where q is not known.
            Then r is 1, and the mean is the KL only while the student is q.

    >>> sampled_reverse_kl(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-1.0]))
    tensor([2.])
    """
    student_M = student_logprobs_M.detach()
    gap_M = student_M - teacher_logprobs_M
    return gap_M if sampler_logprobs_M is None else bounded_ratio(student_M - sampler_logprobs_M) * gap_M


def lightning_with_ratio(student_logprobs_M: Tensor, advantages_M: Tensor, sampler_logprobs_M: Tensor, cap: float | None = None) -> Tensor:
    r"""Return \(-A\,\min(\exp(\ell_\theta - \ell_q), c)\): the same with the per-token importance ratio to the distribution q that drew the tokens.

    Gradient through the ratio, and \(-A c \nabla\ell_\theta\) where it is beyond the cap \(c\) (`bounded_ratio`).

    Where temperature and top-p are 1, q is the reference policy; at another temperature the gradient without a cap is, in expectation,
    that of tokens drawn at temperature 1; of tokens that top-p cut off, which were never drawn, it lacks the share.

    It has the gradient of `lightning` at \(\theta = q\).  Away from it they differ: `lightning` regresses
    \(\ell_\theta\) on \(\ell_T\) at every frozen token, and one that the teacher finds nearly impossible keeps its large gap until the student
    finds it so too; here such a token fades as its probability falls.

    Source: the standard importance-sampled policy gradient, as AsyncOPD (arXiv 2606.24143) uses it for stale rollouts.

    >>> lightning_with_ratio(torch.tensor([-2.0]), torch.tensor([0.5]), torch.tensor([-2.0]))
    tensor([-0.5000])
    """
    return -advantages_M * bounded_ratio(student_logprobs_M - sampler_logprobs_M, cap)
