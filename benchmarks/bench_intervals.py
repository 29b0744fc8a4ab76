r"""How often the intervals hold the truth, and whether errors, chi-squares and audits are what they are said to be: known truths, simulated.

    python benchmarks/bench_intervals.py        # writes benchmarks/results/intervals.json; a few minutes

Intervals: means per token over few prompts, by the normal quantile, by Student's t and as lopd makes them; mean scores, by the normal quantile and
as lopd makes them, averaged over the chance of a right answer.  Audits: a text and candidates that are Markov chains.  Chi-square: long rollouts
of Markov chains, for which it is a product of matrices.
"""

import argparse
import math
from collections.abc import Callable
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import describe_machine, result_file

from lopd.records import Estimate, RolloutSums
from lopd.records.drift import TokenLogprobs, measure_drift
from lopd.records.estimates import mean_score, t_quantile

Array = NDArray[np.float64]
Row = dict[str, Any]
PROMPTS = (5, 10, 30, 100)
FOREIGN_Z = 4.0


class Chain:
    """A policy and another one to both of which only the last token matters."""

    def __init__(self, rng: np.random.Generator, moved: float, vocabulary: int = 24) -> None:
        logits = 1.5 * rng.standard_normal((vocabulary, vocabulary))
        self.rng, self.ref = rng, _softmax(logits)
        self.student = _softmax(logits + moved * rng.standard_normal(logits.shape))

    def log_second_moment(self, length: int) -> float:
        r"""Return \(\log E_{ref}[w^2]\) of responses of this length; their chi-square is its exponential minus 1."""
        values, log = np.ones(len(self.ref)), 0.0
        for _ in range(length):
            values = self.student**2 / self.ref @ values
            log += math.log(values.max())
            values = values / values.max()
        return log + math.log(values[0])

    def sample(self, length: int, rollouts: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return (length, rollouts): tokens drawn by the first policy, and the tokens before them."""
        last, states, tokens = np.zeros(rollouts, np.intp), [], []
        for _ in range(length):
            states.append(last)
            last = np.minimum((self.rng.random((rollouts, 1)) > self.ref[last].cumsum(-1)).sum(-1), len(self.ref) - 1)
            tokens.append(last)
        return np.array(states), np.array(tokens)

    def drift(self, length: int, rollouts: int) -> Any:
        """Measure the drift as a training step measures it."""
        places = self.sample(length, rollouts)
        student, ref = (np.log(policy[places]).ravel() for policy in (self.student, self.ref))
        return measure_drift(TokenLogprobs(student, ref, ref, np.ones(ref.size), np.tile(np.arange(rollouts), length)))


def _softmax(logits: Array) -> Array:
    chances: Array = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return chances


def _even(rng: np.random.Generator, counts: Array) -> Array:
    return counts * (1 + 0.5 * rng.standard_normal(counts.size)) + np.sqrt(counts) * rng.standard_normal(counts.size)


def _sparse(rng: np.random.Generator, counts: Array) -> Array:
    return rng.gamma(np.maximum(rng.binomial(counts.astype(int), 0.03), 1e-9), 1 / 0.03)


#: Sums of prompts with these counts of tokens; the mean per token is 1.
KINDS: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "symmetric": _even,
    "3 % of the tokens have all of it": _sparse,
    "log-normal rates, sigma 0.5": lambda rng, counts: counts * rng.lognormal(-0.125, 0.5, counts.size),
    "exponential rates": lambda rng, counts: counts * rng.exponential(1.0, counts.size),
    "log-normal rates, sigma 1": lambda rng, counts: counts * rng.lognormal(-0.5, 1.0, counts.size),
}


def cover_means(kind: str, prompts: int, draws: int) -> Row:
    """Return the shares of intervals that contain the mean per token."""
    rng, held = np.random.default_rng(prompts), []
    for _ in range(draws):
        counts = rng.integers(5, 200, prompts).astype(float)
        sums = KINDS[kind](rng, counts)
        found = RolloutSums(sums, counts).per_token()
        error = math.sqrt(prompts / (prompts - 1) * float(np.square(sums - found.mean * counts).sum())) / counts.sum()
        reach = [q * error for q in (NormalDist().inv_cdf(0.975), t_quantile(0.975, prompts - 1))]
        held.append([*(abs(found.mean - 1) <= r for r in reach), *_held(found, 1)])
    normal, t, ours, ci95 = np.mean(held, 0).tolist()
    return {"what": "mean per token", "kind": kind, "prompts": prompts, "normal": normal, "t": t, "lopd": ours, "within_ci95": ci95}


def cover_scores(alike: float, prompts: int, samples: int, draws: int) -> Row:
    """Return the shares of intervals that contain the mean score, for scores of 0 and 1.

    A prompt's chance follows a beta distribution with a uniform mean.
    """
    rng, held = np.random.default_rng(prompts), []
    for mean in rng.uniform(0.02, 0.98, draws):
        right = rng.beta(mean * alike, (1 - mean) * alike, (prompts, 1))
        scores = (rng.random((prompts, samples)) < right).astype(float)
        error = float(scores.mean(1).std(ddof=1)) / math.sqrt(prompts)
        held.append([abs(scores.mean() - mean) <= NormalDist().inv_cdf(0.975) * error, *_held(mean_score(scores), mean)])
    normal, ours, ci95 = np.mean(held, 0).tolist()
    kind = f"beta distribution, a + b = {alike:g}"
    return {
        "what": "mean score",
        "kind": kind,
        "prompts": prompts,
        "samples": samples,
        "normal": normal,
        "lopd": ours,
        "within_ci95": ci95,
    }


def _held(found: Estimate, truth: float) -> tuple[bool, bool]:
    return found.low <= truth <= found.high, abs(found.mean - truth) <= found.ci95


def name_authors(rollouts: int, noise: float, draws: int, stated: float = 0.02) -> Row:
    """Count how often another candidate is named with a stated error of at most 2 %.

    Author and candidate are chains whose logits differ by noise.
    """
    wrong = named = 0
    for draw in range(draws):
        chain = Chain(np.random.default_rng(draw), noise, vocabulary=16)
        places = chain.sample(40, rollouts)
        lengths = chain.rng.integers(5, 41, rollouts).astype(float)
        on_TB = np.arange(40)[:, None] < lengths
        author, other = (RolloutSums(-(np.log(policy[places]) * on_TB).sum(0), lengths) for policy in (chain.ref, chain.student))
        wrong += author.p_value(other) <= stated
        named += min(author.p_value(other), other.p_value(author)) <= stated
    return {"what": "audit", "rollouts": rollouts, "noise": noise, "stated_error": stated, "wrong": wrong / draws, "named": named / draws}


def pass_for_the_author(noise: float, tokens: int, draws: int) -> Row:
    """Count how often a text is consistent with a model whose logits are its author's and noise.

    z is that of `lopd.audit`, of whole distributions.
    """
    found = []
    for draw in range(draws):
        chain = Chain(np.random.default_rng(draw), noise, vocabulary=24)
        states, drawn = (part.ravel() for part in chain.sample(100, tokens // 100))
        p = chain.student
        mean, square = (p**2).sum(-1), (p**3).sum(-1)
        total, variance = (mean[states] - p[states, drawn]).sum(), (square - mean**2)[states].sum()
        found.append(total / math.sqrt(1 + variance))
    return {
        "what": "sibling",
        "noise": noise,
        "tokens": tokens,
        "consistent": float(np.mean(np.abs(found) <= FOREIGN_Z)),
        "z": float(np.mean(found)),
    }


def chi_square(length: int, moved: float, draws: int, rollouts: int = 32) -> Row:
    """Return log(1 + chi-square) of long rollouts: the exact one, and the shares of it that are estimated."""
    chains = [Chain(np.random.default_rng(draw), moved) for draw in range(draws)]
    exact = np.array([chain.log_second_moment(length) for chain in chains])
    drifts = [chain.drift(length, rollouts) for chain in chains]
    estimates = {"by_rollouts": [-math.log(drift.ess) for drift in drifts], "lopd": [math.log1p(drift.chi2) for drift in drifts]}
    shares = {name: float(np.mean(np.array(values) / exact)) for name, values in estimates.items()}
    return {"what": "log(1 + chi-square)", "length": length, "moved": moved, "rollouts": rollouts, "exact": float(exact.mean()), **shares}


def main() -> None:
    """Simulate all cases, judge them, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    rows = [cover_means(kind, prompts, draws) for kind, prompts in product(KINDS, PROMPTS)]
    rows += [cover_scores(alike, prompts, samples, draws) for alike, prompts, samples in product((0.3, 2.0), PROMPTS, (1, 4, 8))]
    rows += [name_authors(rollouts, noise, draws) for rollouts, noise in product((4, 7, 16, 64), (0.01, 0.1))]
    rows += [pass_for_the_author(noise, tokens, max(1, draws // 40)) for noise, tokens in product((0.1, 0.3, 1.0), (1000, 10_000, 100_000))]
    rows += [chi_square(length, moved, max(1, draws // 200)) for length, moved in product((10, 100, 1000), (0.03, 0.1, 0.3))]
    for row in rows:
        print(row, flush=True)
    result_file("intervals", describe_machine(), rows, goals(rows))


def goals(rows: list[Row]) -> list[Row]:
    """Return every goal, met or not."""
    found = []
    for row in rows:
        if row["what"] in ("mean per token", "mean score") and row["prompts"] >= 10:
            where = f"{row['what']}, {row['kind']}, {row['prompts']} prompts" + (f" of {row['samples']}" if "samples" in row else "")
            held = row["lopd"]
            found.append({"name": f"coverage: {where}", "goal": "0.93 to 0.97", "measured": held, "met": 0.93 <= held <= 0.97})
        if row["what"] == "audit":
            name = f"another named at a stated error of 0.02: {row['rollouts']} rollouts, noise {row['noise']:g}"
            found.append({"name": name, "goal": "<= 0.025", "measured": row["wrong"], "met": row["wrong"] <= 0.025})
        if row["what"] == "log(1 + chi-square)" and row["exact"] > 1:
            name = f"estimated share of log(1 + chi-square): {row['length']} tokens, moved {row['moved']:g}"
            found.append({"name": name, "goal": "0.85 to 1.15", "measured": row["lopd"], "met": 0.85 <= row["lopd"] <= 1.15})
    return found


if __name__ == "__main__":
    main()
