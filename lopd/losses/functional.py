r"""The equations, per token.  \(\ell_\theta = \log\pi_\theta(a_t|s_t)\) is the student's log-prob of the stored token, nats.

Every function takes and returns (M,) tensors, has no reduction inside, and says which of its arguments carry the gradient.
"""

import torch
from torch import Tensor


def advantages(teacher_logprobs_M: Tensor, student_logprobs_M: Tensor, clip: float | None) -> Tensor:
    r"""Detached advantages \(A = \mathrm{clip}(\ell_T - \mathrm{sg}[\ell_\theta],\, \pm\tau)\), nats.

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
    r"""\(\mathrm{clip}(A, \pm\tau)\); without a \(\tau\), A as it is."""
    return advantages_M if clip is None else advantages_M.clamp(-clip, clip)


def lightning(student_logprobs_M: Tensor, advantages_M: Tensor) -> Tensor:
    r"""\(-A\,\ell_\theta\): the advantage-weighted policy gradient, no importance correction.  Gradient through \(\ell_\theta\) only.

    With A as above this is the gradient of a Huber loss (delta = tau) on \(\ell_\theta - \ell_T\); without the stop-gradient in A the
    teacher would vanish from it.  With A = 1 it is supervised fine-tuning (eq. 6).

    Source: Lightning OPD (arXiv 2604.13010v2), section 3.1.

    >>> lightning(torch.tensor([-2.0]), torch.tensor([1.0]))
    tensor([2.])
    """
    return -advantages_M * student_logprobs_M


def lightning_with_ratio(student_logprobs_M: Tensor, advantages_M: Tensor, sampler_logprobs_M: Tensor) -> Tensor:
    r"""\(-A\,\exp(\ell_\theta - \ell_q)\): the same with the per-token importance ratio to the distribution q that drew the tokens.

    Gradient through the ratio.  Where temperature and top-p are 1, q is the reference policy; at another temperature the gradient is, in
    expectation, that of tokens drawn at temperature 1; of tokens that top-p cut off, which were never drawn, it lacks the share.

    It has the gradient of `lightning` at \(\theta = q\).  Away from it they differ: `lightning` regresses
    \(\ell_\theta\) on \(\ell_T\) at every frozen token, and one that the teacher finds nearly impossible keeps its large gap until the student
    finds it so too; here such a token fades as its probability falls.

    Source: the standard importance-sampled policy gradient, as AsyncOPD (arXiv 2606.24143) uses it for stale rollouts.

    >>> lightning_with_ratio(torch.tensor([-2.0]), torch.tensor([0.5]), torch.tensor([-2.0]))
    tensor([-0.5000])
    """
    return -advantages_M * torch.exp(student_logprobs_M - sampler_logprobs_M)
