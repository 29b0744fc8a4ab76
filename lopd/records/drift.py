r"""How far a student has moved from the policy that sampled its rollouts, and what the bound of theorem 3.5 makes of it.

Offline OPD trains on the reference policy's rollouts; that its gradient is the online one holds at the start and fades with drift:
\(\|\nabla J_{on} - \nabla J_{off}\| \le G \sigma_A \sqrt{\chi^2(\pi_\theta \| \pi_{ref})}\) (Lightning OPD, arXiv 2604.13010v2, theorem 3.5).
All of it follows from log-probs that a training step has at hand: plain numpy on one value a token, no further pass of any model.

Shape suffixes: M tokens that count, B rollouts.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from attrs import evolve, fields, frozen
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

#: Levels of the advantage quantiles.
LEVELS = (0.01, 0.05, 0.5, 0.95, 0.99)
#: Advantages below this (nats) are in the tail: half the clip of the paper (tau = 10, table 6).
TAIL = -5.0
_BINS = 5


@frozen
class AdvantageSummary:
    """Unclipped advantages (teacher minus student log-prob) of some tokens.

    Args:
        mean: nats.
        quantiles: nats, at `LEVELS`.
        negative: share of tokens below 0, which training pushes down.
        tail: share of tokens below `TAIL`: what the teacher finds nearly impossible.
        tokens: how many there were.
    """

    mean: float
    quantiles: tuple[float, ...]
    negative: float
    tail: float
    tokens: int

    @classmethod
    def of(cls, advantages_M: NDArray[Any]) -> "AdvantageSummary":
        """Return the summary of these, at least one."""
        levels = np.quantile(advantages_M, LEVELS)
        shares = float(np.mean(advantages_M < 0)), float(np.mean(advantages_M < TAIL))
        return cls(float(np.mean(advantages_M, dtype=np.float64)), tuple(levels.tolist()), *shares, advantages_M.size)

    def __str__(self) -> str:
        levels = ", ".join(f"{level:.0%} {value:+.2f}" for level, value in zip(LEVELS, self.quantiles, strict=True))
        return f"mean {self.mean:+.3f} nats, quantiles {levels}, {self.negative:.1%} below 0, {self.tail:.1%} below {TAIL:g}"

    def numbers(self) -> dict[str, float]:
        """Return every field by its name, the quantiles as q01, q05, q50, q95 and q99."""
        quantiles = {f"q{level * 100:02.0f}": value for level, value in zip(LEVELS, self.quantiles, strict=True)}
        return _plain_numbers(self, without=("quantiles",)) | quantiles

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> "AdvantageSummary":
        """Return the inverse of `numbers`."""
        return cls(**known_numbers(cls, numbers), quantiles=tuple(float(numbers[f"q{level * 100:02.0f}"]) for level in LEVELS))


@frozen
class Drift:
    r"""Where the student stands against the reference policy, on the rollouts of one step, before its update.

    With \(r_t = \pi_\theta(a_t|s_t) / \pi_{ref}(a_t|s_t)\) and \(w = \prod_t r_t\) over the tokens of a rollout that count.  Both policies are at
    temperature 1, whatever drew the tokens, so a student that has not moved has ratios of 1; the ratio of a loss is another where
    temperature or top-p is.  With `Batch.sampler_logprobs`, means of \(r_t\), and `gain`, weigh tokens by \(\pi_{ref} / q\), q what drew them, so
    that they are those of draws of the reference policy after the same texts; under top-p or at temperature 0 only over the tokens that were left.
    What is of whole rollouts (`ess`, \(\sigma_A\)), and `advantages`, are over what was drawn.

    Args:
        rollouts, tokens: that it was measured on.
        ratio_mean, ratio_std: mean and spread of \(r_t\) over tokens.  Over fresh draws of the reference policy the mean is 1 for every student; what
            it lacks on stored rollouts is probability that left the tokens the teacher has judged to tokens that it has not.  Where top-p left out
            tokens, or temperature 0 did, it also lacks what moved to those.  Where the temperature is 0.5 or lower, few tokens have most of the
            weight, and it is often below 1 by chance.
        ess: effective sample size of the rollouts under w, as a share: \((\sum w)^2 / (B \sum w^2)\).  At least 1 / B, so with long rollouts it
            only shows that one of them has all the weight.  It is 1 for a student that has not moved, whatever drew the rollouts: the share that is
            effective for a ratio to the distribution which drew them is less.
        chi2: \(\chi^2(\pi_\theta \| \pi_{ref})\) of whole rollouts, the larger of two estimates.  1 / ess - 1 is at most B - 1, and far too small
            for long rollouts.  The mean over rollouts of \((1 + c)^T - 1\), with T the tokens of a rollout and c the mean of \((r_t - 1)^2\) over
            all tokens, takes all tokens to move alike and independently; it is too small where a few states, or rollouts longer than these,
            have most of the drift.  It grows exponentially with T and may be infinite.  Of rollouts with `sampler_logprobs` it is the second alone,
            as weights of whole rollouts would leave one of them.
        kl: \(KL(\pi_{ref} \| \pi_\theta)\), nats per token: the mean of \(r_t - 1 - \log r_t\).
        gap_bound: \(\sigma_A \sqrt{\chi^2}\), nats: times the largest norm of \(\nabla \log \pi_\theta(a_t|s_t)\) it bounds the distance
            of the gradient of this loss from the online one, as far as chi2 is right.  \(\sigma_A^2\) is the mean over rollouts of the
            squared weighted sum of \(|A_t|\), A unclipped, weights as in the loss.  Where chi2 is above 1 or so, it is useless.
        advantages: those of the student as it is now.
        gain: by fifths of the tokens (of their weight, where they are weighed), the least likely under the reference policy first: nats by which the
            student is nearer to the teacher than the reference policy was, the mean of \(|\ell_T - \ell_{ref}| - |\ell_T - \ell_\theta|\).
    """

    rollouts: int
    tokens: int
    ratio_mean: float
    ratio_std: float
    ess: float
    chi2: float
    kl: float
    gap_bound: float
    advantages: AdvantageSummary
    gain: tuple[float, ...]

    @property
    def mean_gain(self) -> float:
        """Nats a token by which the student is nearer to the teacher than the reference policy was."""
        # as `np.array_split` cuts: the first ones have a token more, and of fewer than five tokens the last ones none
        return float(np.average(self.gain, weights=[(self.tokens + _BINS - 1 - place) // _BINS for place in range(_BINS)]))

    def numbers(self) -> dict[str, float]:
        """Return every field by its name: advantages/mean and so on, and the gains as gain/fifth1 (the least likely tokens) to gain/fifth5."""
        advantages = {f"advantages/{name}": value for name, value in self.advantages.numbers().items()}
        gain = {f"gain/fifth{place}": value for place, value in enumerate(self.gain, 1)}
        return _plain_numbers(self, without=("advantages", "gain")) | advantages | gain

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> "Drift":
        """Return the inverse of `numbers`."""
        gain = tuple(float(numbers[f"gain/fifth{place}"]) for place in range(1, _BINS + 1))
        return cls(**known_numbers(cls, numbers), advantages=AdvantageSummary.from_numbers(below("advantages", numbers)), gain=gain)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Drift":
        """Return the inverse of `attrs.asdict`, also after a way through JSON."""
        advantages = AdvantageSummary(**{**data["advantages"], "quantiles": tuple(data["advantages"]["quantiles"])})
        return cls(**{**data, "advantages": advantages, "gain": tuple(data["gain"])})


@frozen(eq=False)
class TokenLogprobs:
    """What is known of M tokens: log-probs, nats.

    Args:
        student, teacher, ref: (M,).
        weight: (M,), as in the loss.
        segments: (M,), which rollout.
        sampler: (M,), log-probs of the distribution that drew the tokens; None where that is the reference policy.
    """

    student: NDArray[Any]
    teacher: NDArray[Any]
    ref: NDArray[Any]
    weight: NDArray[Any]
    segments: NDArray[Any]
    sampler: NDArray[Any] | None = None


def below(group: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """Return numbers whose names begin with `group/`, without that.

    >>> below("drift", {"loss": 1.0, "drift/kl": 0.5})
    {'kl': 0.5}
    """
    return {name.removeprefix(f"{group}/"): value for name, value in numbers.items() if name.startswith(f"{group}/")}


def known_numbers(kind: type[Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that these numbers have, also as text; loggers add names of their own, which are left out.

    >>> known_numbers(TokenLogprobs, {"weight": "Infinity", "ref": None, "_timestamp": 1.0})
    {'weight': inf}
    """
    found = ((f, numbers.get(f.name)) for f in fields(kind))
    return {f.name: int(float(value)) if f.type is int else float(value) for f, value in found if value is not None}


def _plain_numbers(record: AdvantageSummary | Drift, without: Sequence[str]) -> dict[str, float]:
    return {f.name: float(getattr(record, f.name)) for f in fields(type(record)) if f.name not in without}


def measure_step(parts: Sequence[TokenLogprobs]) -> Drift | None:
    """Return the drift on the micro-batches of one step, no two of which have a rollout in common; None if no token of them counts."""
    parts = [part for part in parts if part.student.size]
    if not parts:
        return None
    before = np.cumsum([0, *(int(part.segments.max()) + 1 for part in parts)])
    parts = [evolve(part, segments=part.segments + first) for part, first in zip(parts, before, strict=False)]
    if any(part.sampler is not None for part in parts):
        parts = [evolve(part, sampler=part.ref if part.sampler is None else part.sampler) for part in parts]
    names = [f.name for f in fields(TokenLogprobs) if getattr(parts[0], f.name) is not None]
    return measure_drift(TokenLogprobs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names)))


def measure_drift(tokens: TokenLogprobs) -> Drift:
    """Return the drift of a student on these tokens; rollouts that have none are not there."""
    student_M, teacher_M, ref_M, weight_M = (
        np.asarray(values, np.float64) for values in (tokens.student, tokens.teacher, tokens.ref, tokens.weight)
    )
    _, segments_M = np.unique(tokens.segments, return_inverse=True)
    log_ratio_M = student_M - ref_M
    ess = effective_share(np.bincount(segments_M, log_ratio_M).astype(np.float64))
    rollouts = int(segments_M.max()) + 1
    size_B = np.bincount(segments_M, weight_M * np.abs(teacher_M - student_M)) * rollouts / weight_M.sum()
    size = math.sqrt(float(np.mean(size_B**2)))
    by_reference_M = None if tokens.sampler is None else _by_reference(ref_M, tokens.sampler)
    mean = partial(np.average, weights=by_reference_M)
    with np.errstate(over="ignore"):  # a student that has gone wild has an infinite ratio, and that is what to report
        ratio_M = np.exp(log_ratio_M)
        by_tokens = float(np.expm1(np.bincount(segments_M) * np.log1p(mean((ratio_M - 1) ** 2))).mean())
    chi2 = max(1 / ess - 1, by_tokens) if tokens.sampler is None else by_tokens
    ratio_mean = float(mean(ratio_M))
    return Drift(
        rollouts=rollouts,
        tokens=student_M.size,
        ratio_mean=ratio_mean,
        ratio_std=math.sqrt(mean((ratio_M - ratio_mean) ** 2)) if np.isfinite(ratio_M).all() else math.inf,
        ess=ess,
        chi2=chi2,
        kl=float(mean(ratio_M - 1 - log_ratio_M)),
        gap_bound=size * math.sqrt(chi2) if size else 0.0,
        advantages=AdvantageSummary.of(teacher_M - student_M),
        gain=_gain_by_likelihood(student_M, teacher_M, ref_M, by_reference_M),
    )


def _by_reference(ref_M: Float64Array, sampler_M: NDArray[Any]) -> Float64Array:
    """Return weights of tokens under which draws of the sampler count as draws of the reference policy, the largest 1."""
    log_weight_M = ref_M - sampler_M
    # above 0, as an infinite ratio stays infinite under the least weight
    weight_M: Float64Array = np.exp(np.maximum(log_weight_M - log_weight_M.max(), -700))
    return weight_M


def effective_share(log_weights_B: Float64Array) -> float:
    r"""Return \((\sum w)^2 / (B \sum w^2)\) from log-weights of any size: only their differences count.

    >>> round(effective_share(np.array([-900.0, -900.0, -9000.0])), 4)
    0.6667
    """
    shifted_B = np.exp(log_weights_B - log_weights_B.max())
    return float(shifted_B.sum() ** 2 / (shifted_B.size * (shifted_B**2).sum()))


def _gain_by_likelihood(
    student_M: Float64Array, teacher_M: Float64Array, ref_M: Float64Array, weight_M: Float64Array | None
) -> tuple[float, ...]:
    gain_M = np.abs(teacher_M - ref_M) - np.abs(teacher_M - student_M)
    order_M = np.argsort(ref_M, kind="stable")
    parts = np.array_split(order_M, _BINS)
    if weight_M is None:
        return tuple(float(gain_M[part].mean()) if part.size else 0.0 for part in parts)
    weight_M, gain_M = weight_M[order_M], gain_M[order_M]
    # a fifth's share of the weight is its share of the tokens, by which `mean_gain` counts: a token on a border is cut
    upto_M, sums_M = (np.insert(np.cumsum(values), 0, 0.0) for values in (weight_M, weight_M * gain_M))
    ends = upto_M[-1] * np.cumsum([0, *(part.size for part in parts)]) / len(order_M)
    sums, weights = np.diff(np.interp(ends, upto_M, sums_M)), np.diff(ends)
    return tuple(float(total / weight) if weight else 0.0 for total, weight in zip(sums, weights, strict=True))
