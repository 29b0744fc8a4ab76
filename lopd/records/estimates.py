"""Estimates with their intervals.  Pure functions of arrays."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError
from lopd.records.arrays import Float32Array

_Z95 = 1.959964


@frozen
class Estimate:
    """A mean and the half-width of its 95 % interval.

    Args:
        mean, ci95: in the unit of what was measured.
        clusters: independent draws behind it (rollouts or prompts).
        values: all values behind it (tokens, for a mean per token).
    """

    mean: float
    ci95: float
    clusters: int
    values: int


@frozen(eq=False)
class RolloutSums:
    """Sums and counts, one of each per rollout (or prompt, see `pooled`), in the same order of prompts wherever two are compared.

    Args:
        sums: (B,) float64, each over the tokens of one rollout.
        counts: (B,) float64, tokens of each rollout.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    def __attrs_post_init__(self) -> None:
        if not 0 < len(self.sums) == len(self.counts):
            raise InvalidRecordError(
                f"Estimate: it has {len(self.sums)} sums and {len(self.counts)} counts, expected one of each for at least 1 draw; "
                "evaluate on some prompts."
            )

    def per_token(self) -> Estimate:
        """The mean over all tokens.  Tokens of one rollout depend on each other, so a rollout counts as one draw (delta method)."""
        return _estimate(self.sums.sum() / self.counts.sum(), self._influence(), int(self.counts.sum()))

    def pooled(self, samples: int) -> "RolloutSums":
        """Every `samples` consecutive rollouts as one: samples of one prompt are not independent draws of prompts."""
        return RolloutSums(self.sums.reshape(-1, samples).sum(1), self.counts.reshape(-1, samples).sum(1))

    def minus(self, other: "RolloutSums") -> Estimate:
        """The difference of two means over the same prompts: what they share cancels, so its interval is narrower than either's."""
        if len(self.sums) != len(other.sums):
            raise InvalidRecordError(
                f"Estimate: it has {len(self.sums)} draws, expected the other's {len(other.sums)}; compare over the same prompts."
            )
        difference = self.per_token().mean - other.per_token().mean
        return _estimate(difference, self._influence() - other._influence(), int(self.counts.sum()))

    def _influence(self) -> NDArray[np.float64]:
        total = float(self.counts.sum())
        influence: NDArray[np.float64] = (self.sums - float(self.sums.sum()) / total * self.counts) / total
        return influence


def sampled_reverse_kl(student_logprobs: Sequence[Float32Array], teacher_logprobs: Sequence[Float32Array]) -> RolloutSums:
    r"""KL(student, teacher) in nats, summed over the tokens of each rollout, estimated from the sampled tokens alone.

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


def mean(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """The mean of independent values."""
    array = np.asarray(values, np.float64)
    return RolloutSums(array, np.ones_like(array)).per_token()


def _estimate(value: float, influence_B: NDArray[np.float64], values: int) -> Estimate:
    n = len(influence_B)
    error = float(np.sqrt(n / (n - 1) * np.square(influence_B).sum())) if n > 1 else float("inf")
    return Estimate(float(value), _Z95 * error, n, values)
