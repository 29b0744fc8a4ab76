r"""Variants of Lightning OPD as transforms of (advantage, weight): they compose, and the plain and the fused losses take them alike.

    FusedOPDLoss(transforms=(partial(importance_ratio, cap=2.0), partial(position_weights, gamma=0.5)))

Each is a pure function of a `Signal`; options come through `functools.partial`.  They apply in their order to the unclipped advantage, and
the loss clips what comes out.  A transform that replaces the advantage (`extrapolate`, `power`) belongs first.  The loss keeps the value
\(-w A\,\ell_\theta\): its *gradient* is that of the objective that a variant names.

Those marked `per_token` keep a fused loss at three matrix products.  The others look at whole rollouts, never at the batch, so how a step
is split changes nothing.

Shape suffixes: M counted tokens of a batch, T of one rollout.
"""

import math
from collections.abc import Callable

import torch
from attrs import evolve
from torch import Tensor
from torch.nn.functional import pad

from lopd.losses import functional
from lopd.losses.objective import Signal, baselined, changing, per_token, replacing, uncorrected, with_entropy, with_labels, with_ratio
from lopd.records.checks import check_at_least, check_number, to_finite, to_real
from lopd.records.devices import running_sums

_LEAST_RANGE = 2e-3


def _ratio(signal: Signal, cap: float | None = None) -> Tensor:
    return functional.bounded_ratio(signal.student_logprobs - signal.tokens.sampler(), cap)


@with_ratio
@per_token
def importance_ratio(signal: Signal, cap: float | None = None) -> Signal:
    r"""Return weights times the truncated per-token ratio, \(w \min(\exp(\ell_\theta - \ell_q), c)\), to the distribution q that drew the tokens.

    Without a cap the gradient is that of `ratio_to_ref=True`.  q is the ref column where temperature and top-p are 1; let that be `"behavior"`
    for the ratio to what the engine reported.

    Args:
        signal: what is changed.
        cap: \(c\), more than 0; None for none but that which keeps the ratio finite (`functional.MAX_LOG_RATIO`).

    Raises:
        InvalidRecordError: the cap is not more than 0.

    Source: truncated importance sampling (Ionides 2008); without a cap AsyncOPD (arXiv 2606.24143).
    """
    return evolve(signal, weight=signal.weight * _ratio(signal, cap))


@with_ratio
@per_token
def ppo_clip(signal: Signal, low: float = 0.2, high: float = 0.2) -> Signal:
    r"""Return the gradient of PPO's \(\max(-rA, -\mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high})\,A)\).

    With \(r = \exp(\ell_\theta - \ell_{ref})\): weights times r, and 0 where r is already beyond the clip in the direction of the advantage.
    Where another distribution than the reference policy drew the tokens, the weight is the ratio to that one, and r measures how far the student
    has moved.

    Args:
        signal: what is changed.
        low: \(\epsilon_{low}\), at least 0.
        high: \(\epsilon_{high}\), at least 0.

    Source: PPO (arXiv 1707.06347), eq. 7; with two bounds DAPO (arXiv 2503.14476).
    """
    low, high = to_real("PPO clip", "low", low), to_real("PPO clip", "high", high)
    check_number("PPO clip", "(low, high)", (low, high), low >= 0 <= high, "at least 0 each")
    moved_M = functional.bounded_ratio(signal.student_logprobs - signal.tokens.ref())
    beyond_M = ((signal.advantages > 0) & (moved_M > 1 + high)) | ((signal.advantages < 0) & (moved_M < 1 - low))
    return evolve(signal, weight=signal.weight * _ratio(signal).masked_fill(beyond_M, 0.0))


@replacing
@uncorrected
@per_token
def extrapolate(signal: Signal, scale: float) -> Signal:
    r"""Make the advantage \(\lambda(\ell_T - \ell_{ref}) - (\ell_\theta - \ell_{ref})\): 1 is OPD, more goes beyond the teacher.

    Args:
        signal: what is changed; the ref column is the policy from which the teacher's step is measured.
        scale: \(\lambda\), finite.

    Source: ExOPD (arXiv 2602.12125).
    """
    ref_M, scale = signal.tokens.ref(), to_finite("Extrapolate", "scale", scale)
    return evolve(signal, advantages=scale * (signal.tokens.teacher() - ref_M) - (signal.student_logprobs - ref_M))


@replacing
@per_token
def power(signal: Signal, alpha: float) -> Signal:
    r"""Make the advantage \((\pi_T^\alpha - \pi_\theta^\alpha) / \alpha\), within \(\pm 1/\alpha\); towards 0 it becomes the log-ratio.

    Args:
        signal: what is changed.
        alpha: more than 0.

    Raises:
        InvalidRecordError: alpha is not.

    Source: PowerOPD (arXiv 2606.17199).  Secondary sources also give \(((\pi_T/\pi_\theta)^\alpha - 1)/\alpha\), which has no bound above, and
    the numerator alone; this is the difference of two Box-Cox transforms, which is bounded as the paper states.
    """
    alpha = to_real("Power", "alpha", alpha)
    check_number("Power", "alpha", alpha, 0 < alpha < math.inf, "finite and more than 0")
    powers_M = [torch.expm1(alpha * logprobs_M) for logprobs_M in (signal.tokens.teacher(), signal.student_logprobs)]
    return evolve(signal, advantages=(powers_M[0] - powers_M[1]) / alpha)


@changing
@per_token
def log_compress(signal: Signal) -> Signal:
    r"""Make the advantage \(\mathrm{sign}(A) \log(1 + \lvert A\rvert)\): small ones stay, tens of nats become a few.

    Source: log-compression of the advantage as in arXiv 2607.13399; the formula is the usual symmetric one, that of the paper was not at hand.
    """
    return evolve(signal, advantages=signal.advantages.sign() * signal.advantages.abs().log1p())


@uncorrected
def window_ratio(signal: Signal, window: int = 8, cap: float | None = 4.0) -> Signal:
    r"""Return weights times the ratio of the tokens before: \(w_t \min\big(\prod_{k=t-L}^{t-1} \pi_\theta(a_k|s_k) / q(a_k|s_k), c\big)\).

    The token's own ratio corrects for what the student would draw at a state; this one for the states.  Without a cap, and with
    `ratio_to_ref=True`, the expected gradient is that at states of which q wrote all tokens but the last L, and the student those: with L
    at least the length of a response, the online gradient.  That is under `by_token`: the weight of a token must not depend on later ones.  A cap
    costs bias, and bounds the variance, which grows with L.

    Args:
        signal: what is changed.
        window: \(L\), at least 1: counted tokens of the same rollout; those that do not count are passed over.
        cap: \(c\), more than 0; None for none but that which keeps the ratio finite (`functional.MAX_LOG_RATIO`).

    Raises:
        InvalidRecordError: `window` is less than 1, or the cap not more than 0.

    Source: per-decision importance sampling (Precup et al. 2000), truncated in time and in size.
    """
    window = check_at_least("Window ratio", "window", window, 1)

    def factors(log_ratio_T: Tensor) -> Tensor:
        most = min(window, len(log_ratio_T))
        before_T = pad(log_ratio_T, (most, 0)).unfold(0, most, 1)[:-1].sum(-1)
        return functional.bounded_ratio(before_T, cap)

    return evolve(signal, weight=signal.weight * _by_rollout(signal, factors, signal.student_logprobs - signal.tokens.sampler()))


@uncorrected
def position_weights(signal: Signal, gamma: float = 0.5) -> Signal:
    r"""Weigh early tokens of a rollout more: \(w_t\,\big(1 + \gamma\,(1 - \sum_{k<t}\lvert A_k\rvert / \sum_k \lvert A_k\rvert)\big)\).

    Args:
        signal: what is changed; its advantages so far are the A.
        gamma: \(\gamma\), finite.

    Source: IW-OPD (arXiv 2606.22600).
    """
    gamma = to_finite("Position weights", "gamma", gamma)

    def factors(sizes_T: Tensor) -> Tensor:
        before_T = running_sums(sizes_T) - sizes_T
        return 1 + gamma * (1 - before_T / sizes_T.sum().clamp(min=torch.finfo(sizes_T.dtype).tiny))

    return evolve(signal, weight=signal.weight * _by_rollout(signal, factors, signal.advantages.abs()))


def drift_gate(signal: Signal, block: int = 64) -> Signal:
    r"""Weigh blocks less in which the student has moved from the reference policy.

    With \(d_b\) the mean of \(\ell_\theta - \ell_{ref}\) over the counted tokens of block b, the weights are multiplied by
    \(\exp(-\lvert d_b\rvert)\), divided by its mean over the rollout's tokens, so that a rollout keeps its weight.

    Args:
        signal: what is changed.
        block: tokens of a block, at least 1.

    Source: blockwise policy-drift gating (arXiv 2606.24084): block mean, detached, normalised by the mean.  The paper's gate function was not
    at hand; this one is 1 without drift and falls with the geometric mean of the ratio.
    """
    block = check_at_least("Drift gate", "block", block, 1)

    def factors(drift_T: Tensor) -> Tensor:
        moved_T = torch.cat([part.mean().abs().expand_as(part) for part in drift_T.split(block)])
        gates_T = (moved_T.min() - moved_T).exp()  # the smallest drift cancels in the mean, and may be beyond what exp can take
        return gates_T / gates_T.mean()

    return evolve(signal, weight=signal.weight * _by_rollout(signal, factors, signal.student_logprobs - signal.tokens.ref()))


@uncorrected
def prefix_fraction(signal: Signal, fraction: float) -> Signal:
    """Keep the weights of the first tokens of each rollout, a `fraction` of them rounded up; make the others 0.

    Args:
        signal: what is changed.
        fraction: more than 0, at most 1.

    Source: prefix distillation (arXiv 2602.15260, 2605.31490).
    """
    return _keep(signal, fraction, lambda logprobs_T: torch.arange(len(logprobs_T), device=logprobs_T.device))


@uncorrected
def lowest_logprobs(signal: Signal, fraction: float = 0.2) -> Signal:
    r"""Keep the weights of the tokens that the student finds least likely, a `fraction` of each rollout; make the others 0.

    With a constant advantage this is a placebo that needs no teacher, `FusedOPDLoss(advantage=-0.5, transforms=(lowest_logprobs,))`: what OPD
    gains must be more than what this gains.

    Args:
        signal: what is changed.
        fraction: more than 0, at most 1.

    Source: OPSA (arXiv 2608.31046), with its constant advantage of -1/2; `entropy_advantage` is the dynamic one.
    """
    return _keep(signal, fraction, lambda logprobs_T: logprobs_T.argsort(stable=True))


@replacing
@with_entropy
def entropy_advantage(signal: Signal) -> Signal:
    r"""Make the advantage \(-\frac12 - \frac{H_t - H_{min}}{2\,(H_{max} - H_{min})}\): -1/2 where the student is surest, -1 where it is
    least.

    The dynamic placebo is `FusedOPDLoss(advantage=-0.5, transforms=(entropy_advantage, lowest_logprobs))`.  H is the student's entropy at a
    token, and its range that of the counted tokens of the rollout: a range over a batch would let the split of a step change the gradient.
    One below a thousandth of a nat counts as 0, or rounding would be blown up to advantages.

    Args:
        signal: what is changed.

    Source: OPSA (arXiv 2608.31046), dynamic advantage; over which tokens the paper takes the range was not at hand.
    """

    def scaled(entropies_T: Tensor) -> Tensor:
        above_T = entropies_T - entropies_T.min()
        return -0.5 - above_T / (2 * above_T.max()).clamp(min=_LEAST_RANGE)

    return evolve(signal, advantages=_by_rollout(signal, scaled, signal.tokens.entropies()).to(signal.advantages.dtype))


@baselined
@changing
@uncorrected
@per_token
@with_labels
def add_labels(signal: Signal, scale: float = 1.0) -> Signal:
    r"""Make the advantage \(A + \lambda\,(y - \bar y)\): OPD plus reward, y being the label and \(\bar y\) the mean of its prompt's
    rollouts.

    `FusedOPDLoss(advantage=0.0, ratio_to_ref=True, transforms=(add_labels,))` is the policy gradient of the labels alone, without a teacher.
    The mean is a baseline: with weights `by_token` it leaves the expected gradient as it is; `by_rollout` it acts on lengths.

    Args:
        signal: what is changed.
        scale: \(\lambda\), nats for each unit of the label; finite.

    Raises:
        InvalidRecordError: the scale is not.

    Source: GRPO (arXiv 2402.03300) without its division by the standard deviation, as in Dr. GRPO (arXiv 2503.20783).
    """
    scale = to_finite("Labels", "scale", scale)
    return evolve(signal, advantages=signal.advantages + scale * signal.tokens.labels(centred=True))


@uncorrected
@per_token
@with_labels
def weigh_labels(signal: Signal, by: Callable[[Tensor], Tensor]) -> Signal:
    r"""Return weights times a function of the label, \(w\,f(y)\); a gate, where f is 0 or 1: `partial(weigh_labels, by=lambda labels: labels == 1)`.

    Args:
        signal: what is changed.
        by: f, from (M,) labels to (M,) factors, each from its own label; one below 0 would turn the gradient of its token round.
    """
    return evolve(signal, weight=signal.weight * by(signal.tokens.labels()))


def _keep(signal: Signal, fraction: float, order: Callable[[Tensor], Tensor]) -> Signal:
    """Return weights of the first `fraction` of each rollout in this order; the others 0."""
    fraction = to_real("Variant", "fraction", fraction)
    check_number("Variant", "fraction", fraction, 0 < fraction <= 1, "more than 0 and at most 1")

    def factors(logprobs_T: Tensor) -> Tensor:
        kept = order(logprobs_T)[: math.ceil(fraction * len(logprobs_T))]
        return torch.zeros_like(logprobs_T).index_fill_(0, kept, 1.0)

    return evolve(signal, weight=signal.weight * _by_rollout(signal, factors, signal.student_logprobs))


def _by_rollout(signal: Signal, factors: Callable[[Tensor], Tensor], values_M: Tensor) -> Tensor:
    """Return (M,) what the function makes of the (T,) values of each rollout."""
    return torch.cat([values_M[:0], *map(factors, signal.tokens.split(values_M))])
