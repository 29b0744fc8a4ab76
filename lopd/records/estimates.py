r"""Estimates with their 95 % intervals.  Pure functions of arrays; a draw is one prompt, with all of its rollouts.

An interval of a mean over draws is that of Student's t.  Sums of KL are skewed, and with few draws t then misses the truth too often on one
side; that side is moved out to where a studentised bootstrap has it (Efron, "Nonparametric standard errors and confidence intervals", 1981;
Hall, "Theoretical comparison of bootstrap confidence intervals", 1988).  A mean of scores has a Wilson interval, which has a width also where
all scores agree.  How often they hold the truth: `benchmarks/results/intervals.json`.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from statistics import NormalDist

import numpy as np
from attrs import Factory, field, frozen
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError
from lopd.records.arrays import Float32Array
from lopd.records.checks import check_at_least

Float64Array = NDArray[np.float64]

_RESAMPLES = 1999
#: Fewer draws are too few to resample; with more than these, t holds the truth about as often.
_RESAMPLED = range(5, 401)
#: A resample may repeat one draw and have almost zero spread, so the bootstrap widens a side at most this much.
_WIDEST = 2.0


@frozen
class Estimate:
    """A mean and its 95 % interval, whose ends need not be equally far from the mean.

    Args:
        mean: in the unit of what was measured.
        low, high: ends of the interval; infinite for one draw, unless it is of scores, which are bounded, and where the mean is not finite.
        clusters: independent draws behind it (prompts; rollouts where their prompts are unknown).
        values: all values behind it (tokens, for a mean per token).

    Attributes:
        ci95: distance from the mean to the farther end, so mean ± ci95 contains the interval.
    """

    mean: float
    low: float
    high: float
    clusters: int
    values: int
    ci95: float = field(
        init=False, default=Factory(lambda e: max(e.mean - e.low, e.high - e.mean) if math.isfinite(e.mean) else math.inf, takes_self=True)
    )

    def __str__(self) -> str:
        interval = f"95 %: {self.low:.4f} to {self.high:.4f}"
        none = "one draw has no interval" if self.clusters == 1 else "no interval"
        return f"{self.mean:.4f} ({interval if math.isfinite(self.ci95) else none})"


@frozen(eq=False)
class RolloutSums:
    """Sums and counts, one of each per rollout (or prompt, see `pooled`), in the same order of prompts wherever two are compared.

    Args:
        sums: (B,) float64, each over the tokens of one rollout.
        counts: (B,) float64, tokens of each rollout.
    """

    sums: Float64Array
    counts: Float64Array

    def __attrs_post_init__(self) -> None:
        if not 0 < len(self.sums) == len(self.counts):
            raise InvalidRecordError(
                f"Estimate: it has {len(self.sums)} sums and {len(self.counts)} counts, expected one of each for at least 1 draw; "
                "evaluate on some prompts."
            )
        if not self.counts.sum() > 0:
            raise InvalidRecordError(
                f"Estimate: its {len(self.counts)} draws have 0 tokens, expected at least 1; evaluate on responses with tokens."
            )

    def per_token(self) -> Estimate:
        """Return the mean over all tokens.  Tokens of one rollout depend on each other, so a rollout counts as one draw (delta method)."""
        return _estimate([(1, self)])

    def pooled(self, samples: int) -> "RolloutSums":
        """Return every `samples` consecutive rollouts as one: samples of one prompt are not independent draws of prompts.

        Raises:
            InvalidRecordError: `samples` is less than 1, or there are not so many of each prompt.
        """
        samples = check_at_least("Estimate", "samples", samples, 1)
        if len(self.sums) % samples:
            raise InvalidRecordError(
                f"Estimate: it has {len(self.sums)} draws, expected {samples} of each prompt; `by_prompt` pools an unequal number."
            )
        return RolloutSums(self.sums.reshape(-1, samples).sum(1), self.counts.reshape(-1, samples).sum(1))

    def by_prompt(self, prompt_ids: Sequence[str] | NDArray[np.str_]) -> "RolloutSums":
        """Return the sums of prompts: rollouts of one prompt are one draw, wherever they stand.

        Args:
            prompt_ids: (B,), the prompt of each rollout (`prompt_id_of`).

        Raises:
            InvalidRecordError: there are not as many.
        """
        ids_B = np.asarray(prompt_ids)
        if ids_B.shape != self.sums.shape:
            raise InvalidRecordError(
                f"Estimate: it has {len(self.sums)} draws and prompt ids of shape {ids_B.shape}, expected one of each; pass that of every rollout."
            )
        _, place_B = np.unique(ids_B, return_inverse=True)
        return RolloutSums(*(np.bincount(place_B, values_B).astype(np.float64) for values_B in (self.sums, self.counts)))

    def minus(self, other: "RolloutSums") -> Estimate:
        """Return the difference of two means over the same prompts: what they share cancels, so its interval is narrower than either's.

        Raises:
            InvalidRecordError: the other has another number of draws.
        """
        return _estimate(self._less(other))

    def p_value(self, other: "RolloutSums") -> float:
        """Return the chance, by a one-sided t test over the same draws, that this mean is so far above the other's if it is not truly above it.

        0.5 for one draw, where all draws differ alike, and where a mean is not finite.

        Raises:
            InvalidRecordError: the other has another number of draws.
        """
        parts, draws = self._less(other), len(self.sums)
        value = _value(parts)
        error = _error(_features(parts)) if draws > 1 and math.isfinite(value) else 0.0
        return t_cdf(-value / error, draws - 1) if error else 0.5

    def _less(self, other: "RolloutSums") -> list[tuple[int, "RolloutSums"]]:
        if len(self.sums) != len(other.sums):
            raise InvalidRecordError(
                f"Estimate: it has {len(self.sums)} draws, expected the other's {len(other.sums)}; compare over the same prompts."
            )
        return [(1, self), (-1, other)]


def sampled_reverse_kl(student_logprobs: Sequence[Float32Array], teacher_logprobs: Sequence[Float32Array]) -> RolloutSums:
    r"""Return KL(student, teacher) in nats, summed over the tokens of each rollout, estimated from the sampled tokens alone.

    \(\sum_t (r_t - 1 - \log r_t)\) with \(r = \exp(\ell_T - \ell_\theta)\).  \(-\log r\) alone has the same mean, since
    \(E[r] = 1\) under the student, but a wider spread.

    Source: the estimator k3 of Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html.

    Args:
        student_logprobs: one (T_i,) array per rollout, of the sampled tokens.
        teacher_logprobs: the same under the teacher.
    """
    log_ratios = [t.astype(np.float64) - s for s, t in zip(student_logprobs, teacher_logprobs, strict=True)]
    sums = np.array([np.sum(np.expm1(log_ratio) - log_ratio) for log_ratio in log_ratios])
    return RolloutSums(sums, np.array([s.size for s in student_logprobs], np.float64))


def mean(values: Sequence[float] | Float64Array) -> Estimate:
    """Return the mean of independent values."""
    array = np.asarray(values, np.float64)
    return RolloutSums(array, np.ones_like(array)).per_token()


def mean_score(scores_BN: Float64Array) -> Estimate:
    r"""Return the mean of scores from 0 to 1, N samples for each of B prompts, with Wilson's interval.

    Its number of trials is \(B\,(m(1 - m) + u) / (s^2 + u)\), with m the mean and \(s^2\) the variance of the prompts' means: between B, where
    the samples of a prompt agree, and about B N, where they are independent.  \(u = 1 / 4B\) stands for one more prompt whose samples agree, so
    a few prompts that happen to be alike are not taken for many.  Scores of little spread that are not 0 or 1 get a wider interval than they need.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference"; trials by the design effect as in Dean and
    Pagano (2015), "Evaluating confidence interval methods for binomial proportions in clustered surveys".
    """
    prompts = len(scores_BN)
    if not scores_BN.size:
        raise InvalidRecordError(f"Estimate: it has scores of {prompts} prompts, expected at least 1 of each; evaluate on some prompts.")
    score, extra, z = float(scores_BN.mean()), 1 / (4 * prompts), NormalDist().inv_cdf(0.975)
    variance = score * (1 - score)
    trials = prompts * (variance + extra) / (float(scores_BN.mean(axis=1).var()) + extra)
    centre, half = score + z**2 / (2 * trials), z * math.sqrt(variance / trials + (z / (2 * trials)) ** 2)
    low, high = ((centre + side) / (1 + z**2 / trials) for side in (-half, half))
    return Estimate(score, min(max(low, 0.0), score), max(min(high, 1.0), score), prompts, scores_BN.size)


def t_cdf(t: float, freedom: int) -> float:
    """Return the chance that Student's t with these degrees of freedom is at most t.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4: a finite sum.
    """
    odd, angle, j = freedom % 2, math.atan(t / math.sqrt(freedom)), np.arange(1, freedom // 2)
    series = 1 + float(np.cumprod((2 * j - 1 + odd) / (2 * j + odd) * math.cos(angle) ** 2).sum())
    if not odd:
        return 0.5 + math.sin(angle) * series / 2
    return 0.5 + (angle + (math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0)) / math.pi


@cache
def t_quantile(chance: float, freedom: int) -> float:
    """Return the t that Student's t with these degrees of freedom is below with this chance."""
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(60):  # halves the interval of the angle atan(t / sqrt(freedom))
        angle = (low + high) / 2
        low, high = (angle, high) if t_cdf(math.sqrt(freedom) * math.tan(angle), freedom) < chance else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _estimate(parts: Sequence[tuple[int, RolloutSums]]) -> Estimate:
    """Return a sum of signed means over the same draws."""
    draws, values = len(parts[0][1].sums), int(parts[0][1].counts.sum())
    value = _value(parts)
    if draws == 1 or not math.isfinite(value):
        return Estimate(value, -math.inf, math.inf, draws, values)
    features_PBF = _features(parts)
    error, t = _error(features_PBF), t_quantile(0.975, draws - 1)
    lowest, highest = _bootstrap_t(features_PBF) if draws in _RESAMPLED else (-t, t)
    below, above = (min(max(reach, t), _WIDEST * t) * error for reach in (highest, -lowest))  # t is (mean - truth) / error
    return Estimate(value, value - below, value + above, draws, values)


def _value(parts: Sequence[tuple[int, RolloutSums]]) -> float:
    """Return the sum of the signed means; a KL to a model without a token that this one has is infinite."""
    return sum(sign * float(part.sums.sum() / part.counts.sum()) for sign, part in parts)


def _features(parts: Sequence[tuple[int, RolloutSums]]) -> Float64Array:
    """Return, for each part and draw, what the draw adds to the part's error, times the tokens of the part, and its tokens."""
    features = [[sign * (part.sums - part.sums.sum() / part.counts.sum() * part.counts), part.counts] for sign, part in parts]
    return np.array(features).swapaxes(1, 2)


def _error(features_PBF: Float64Array) -> float:
    """Return the standard error by the jackknife: a draw of many tokens pulls the mean towards itself.  Infinite if one draw has all tokens."""
    errors_PB, counts_PB = np.moveaxis(features_PBF, -1, 0)
    with np.errstate(invalid="ignore"):
        influence_B = (errors_PB / (counts_PB.sum(-1, keepdims=True) - counts_PB)).sum(0)
    draws = influence_B.size
    error = math.sqrt((draws - 1) / draws * float(np.square(influence_B).sum()))
    return math.inf if math.isnan(error) else error


def _resampled(features_PBF: Float64Array, times_RB: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return deviations of a sum of means from its value, and their standard errors, where each draw is there so many times."""
    draws = times_RB.shape[-1]
    errors_PR, counts_PR = np.moveaxis(times_RB @ features_PBF, -1, 0)
    coefficients_PRF = np.stack([np.ones_like(errors_PR), -errors_PR / counts_PR], -1) / counts_PR[..., None]
    flat_BF = np.concatenate(list(features_PBF), -1)
    flat_RF = np.concatenate(list(coefficients_PRF), -1)
    products_RFF = np.tensordot(times_RB, flat_BF[:, :, None] * flat_BF[:, None], 1)
    squares_R = np.einsum("rf,rfg,rg->r", flat_RF, products_RFF, flat_RF)
    return (errors_PR / counts_PR).sum(0), np.sqrt(draws / (draws - 1) * squares_R.clip(0))


def _bootstrap_t(features_PBF: Float64Array) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of t over resamples; the same draws in the same order give the same ones."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may be one draw repeated, or have no tokens
        deviations_R, errors_R = _resampled(features_PBF, _times(features_PBF.shape[1]))
        t_R = np.sort(np.nan_to_num(deviations_R / errors_R, posinf=math.inf, neginf=-math.inf))
    tail = (_RESAMPLES + 1) // 40
    return float(t_R[tail - 1]), float(t_R[-tail])


@lru_cache(maxsize=4)
def _times(draws: int) -> Float64Array:
    """Return how often each draw is in each resample."""
    return np.random.default_rng(0).multinomial(draws, np.full(draws, 1 / draws), _RESAMPLES).astype(np.float64)
