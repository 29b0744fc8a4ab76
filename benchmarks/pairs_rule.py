"""What the diagnostics of pairs say of what came out: rank correlations, and a rule with one threshold, judged on pairs that it has not seen.

A pair is the mean over its seeds.  An arm's outcome is the share of the SFT student's reverse KL that it removes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress, pairwise
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from pairs_runs import DRAWN, ONLINE, ONLINE_DRAWN, PLAIN, RATIO, REFRESHED, TEXT

Row = dict[str, Any]

#: Those of every kind of pair, in the order in which ties between them are settled.
DIAGNOSTICS = (
    "reverse_kl",
    "overlap8",
    "outside",
    "tail",
    "overlap1",
    "overlap4",
    "size50",
    "size90",
    "size99",
    "heaviest",
)
#: Those that `lopd.guards.advise` could see: a rule chooses among few, or chance chooses.
CHOICES = DIAGNOSTICS[:4]
#: Share of the KL by which a live teacher must do better, for what it costs.  Stated before anything was measured.
MARGIN = 0.05

#: Those that may be better than to go offline at once.
VERDICTS = ("more SFT first", "live", "refresh")

#: Share of the KL that is almost no gain.  Stated when the pairs on sums had been seen.
LITTLE = 0.2
LITTLE_GAIN = f"neither a stored nor a live run removes {LITTLE:g} of the KL"
#: Nats a token: a student that is nearer to its teacher has nothing to learn, and shares of so small a KL are noise; such pairs are not judged.
LEAST_KL = 0.01

Outcome = Callable[[Row], float]


@frozen
class Correlation:
    """Spearman's rank correlation, and its 95 % interval by Fisher's z with the variance of Bonett and Wright (2000)."""

    rho: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, ones: Sequence[float], others: Sequence[float]) -> "Correlation":
        """Compute the rank correlation of two numbers of each pair; NaN where one of them is the same for all."""
        first, second = (_ranks(np.asarray(values, np.float64)) for values in (ones, others))
        if len(ones) < 4 or not np.ptp(first) or not np.ptp(second):
            return cls(math.nan, math.nan, math.nan, len(ones))
        rho = float(np.corrcoef(first, second)[0, 1])
        z, half = math.atanh(min(max(rho, -1 + 1e-9), 1 - 1e-9)), 1.96 * math.sqrt((1 + rho**2 / 2) / (len(ones) - 3))
        return cls(rho, math.tanh(z - half), math.tanh(z + half), len(ones))

    def shown(self) -> str:
        """Return the text that tables show; bold where 0 is outside of the interval."""
        mark = "**" if self.sure else ""
        return f"{mark}{self.rho:+.2f}{mark} ({self.low:+.2f} to {self.high:+.2f})"

    @property
    def sure(self) -> bool:
        """0 is outside of the interval."""
        return self.low > 0 or self.high < 0


def _ranks(values_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks; equal values share their mean rank."""
    below, same = ((values_P[:, None] > values_P).sum(1), (values_P[:, None] == values_P).sum(1))
    return below + (same + 1) / 2


def pairs_of(rows: Sequence[Row]) -> list[Row]:
    """Return means over the seeds of each pair.

    Every arm is the KL that it removes, as a share and in nats, and its gain in accuracy where there is one.
    """
    found = []
    for name in dict.fromkeys(row["pair"] for row in rows):
        mine = [row for row in rows if row["pair"] == name]
        means = {key: float(np.mean([row[key] for row in mine])) for key in (*DIAGNOSTICS, "held_out_kl")}
        arms = {arm: _arm(mine, arm) for arm in mine[0]["arms"]}
        said = max((row["verdict"] for row in mine), key=[row["verdict"] for row in mine].count)
        found.append({"pair": name, "kind": mine[0]["kind"], "seeds": len(mine), "said": said, **_start(mine), **means, "arms": arms})
    return found


def judged(rows: Sequence[Row]) -> list[Row]:
    """Return the pairs that have something to learn."""
    return [pair for pair in pairs_of(rows) if pair["held_out_kl"] >= LEAST_KL]


def _start(rows: Sequence[Row]) -> Row:
    """Return what only some kinds of pair have."""
    return {key: float(np.mean([row[key] for row in rows])) for key in ("accuracy", "overlap64") if key in rows[0]}


def _arm(rows: Sequence[Row], arm: str) -> Row:
    nats = [-row["arms"][arm]["change"] for row in rows]
    removed = [each / row["held_out_kl"] for each, row in zip(nats, rows, strict=True)]
    gains = [row["arms"][arm]["accuracy"] - row["accuracy"] for row in rows if "accuracy" in row]
    return {
        "removed": float(np.mean(removed)),
        "nats": float(np.mean(nats)),
        "by_seed": removed,
        **({"gain": float(np.mean(gains))} if gains else {}),
    }


def removed(arm: str) -> Outcome:
    """Return a function of a pair: the share of the KL that this arm removed."""
    return partial(_of, arm, "removed")


def _of(arm: str, key: str, pair: Row) -> float:
    """Return this number of an arm; NaN where it was not run or not measured."""
    return float(pair["arms"].get(arm, {}).get(key, math.nan))


def _minus(one: str, other: str, key: str = "removed") -> Outcome:
    return lambda pair: _of(one, key, pair) - _of(other, key, pair)


#: What a live teacher adds to a stored run with the same loss, and what a stored run adds to more SFT, in shares of the KL of the SFT student.
BESIDE_LIVE, BESIDE_SFT = f"{DRAWN.name} - {ONLINE_DRAWN.name}", f"{DRAWN.name} - {TEXT.name}"
STORED, LIVE = f"{DRAWN.name} - SFT", f"{ONLINE_DRAWN.name} - SFT"
#: Title -> outcome.
OUTCOMES: dict[str, Outcome] = {
    f"{PLAIN.name} - {ONLINE.name}": _minus(PLAIN.name, ONLINE.name),
    f"{RATIO.name} - {ONLINE.name}": _minus(RATIO.name, ONLINE.name),
    BESIDE_LIVE: _minus(DRAWN.name, ONLINE_DRAWN.name),
    f"{PLAIN.name} - SFT": removed(PLAIN.name),
    f"{RATIO.name} - SFT": removed(RATIO.name),
    STORED: removed(DRAWN.name),
    LIVE: removed(ONLINE_DRAWN.name),
    BESIDE_SFT: _minus(DRAWN.name, TEXT.name),
}
#: Those that are also judged in nats: a share is divided by the very KL that a diagnostic may be.
NATS: dict[str, Outcome] = {
    BESIDE_LIVE: _minus(DRAWN.name, ONLINE_DRAWN.name, "nats"),
    STORED: partial(_of, DRAWN.name, "nats"),
    LIVE: partial(_of, ONLINE_DRAWN.name, "nats"),
}
#: Of pairs with a verifier, in accuracy.
GAINS: dict[str, Outcome] = {
    f"{PLAIN.name} - {ONLINE.name}, accuracy": _minus(PLAIN.name, ONLINE.name, "gain"),
    f"{BESIDE_LIVE}, accuracy": _minus(DRAWN.name, ONLINE_DRAWN.name, "gain"),
    f"{DRAWN.name} - SFT, accuracy": partial(_of, DRAWN.name, "gain"),
}


def correlations(pairs: Sequence[Row]) -> Iterator[tuple[str, str, Correlation]]:
    """Yield diagnostic, outcome, and their rank correlation over the pairs that have both."""
    for diagnostic in DIAGNOSTICS:
        for title, outcome in {**OUTCOMES, **GAINS}.items():
            known = [(pair[diagnostic], outcome(pair)) for pair in pairs if math.isfinite(outcome(pair))]
            yield diagnostic, title, Correlation.of([one for one, _ in known], [other for _, other in known])


def best_of(pair: Row) -> str:
    """Return the verdict that would have been right.

    It is SFT where it removes most, else the stored run unless a later one removes `MARGIN` more.
    """
    text, once, refreshed, live = (removed(arm.name)(pair) for arm in (TEXT, DRAWN, REFRESHED, ONLINE_DRAWN))
    if text > np.nanmax([once, refreshed, live]):
        return "more SFT first"
    if np.nanmax([refreshed, live]) <= once + MARGIN:
        return "offline"
    return "refresh" if refreshed > live - MARGIN else "live"  # never where it was not run


def labels() -> dict[str, Callable[[Row], bool]]:
    """Return, for each verdict that a rule may give, a function of a pair: whether it would have been right."""
    named = {repr(verdict): partial(_is_best, verdict) for verdict in VERDICTS}
    return {**named, LITTLE_GAIN: gains_little}


def _is_best(verdict: str, pair: Row) -> bool:
    return best_of(pair) == verdict


def gains_little(pair: Row) -> bool:
    """Return whether neither way to train is worth much."""
    return max(OUTCOMES[STORED](pair), OUTCOMES[LIVE](pair)) < LITTLE


@frozen
class Rule:
    """A verdict where a diagnostic is beyond a threshold, below it if `below`; never if the diagnostic is empty."""

    diagnostic: str = ""
    threshold: float = 0.0
    below: bool = False

    def holds(self, pair: Row) -> bool:
        """Return whether the rule gives its verdict on a pair."""
        if not self.diagnostic:
            return self.below
        return bool((pair[self.diagnostic] < self.threshold) == self.below)

    def shown(self) -> str:
        """Return the rule in words."""
        if not self.diagnostic:
            return "always" if self.below else "never"
        return f"{self.diagnostic} {'<' if self.below else '>='} {self.threshold:.3g}"


#: The rules that look at nothing: never, and always.
CONSTANT = (Rule(), Rule(below=True))


def fit(pairs: Sequence[Row], wanted: Sequence[bool], choices: Sequence[str] = CHOICES) -> Rule:
    """Return the rule with the fewest errors.

    Among equals, the first is a constant rule, then the first diagnostic, then the threshold in the widest gap of ranks.
    """

    def candidates() -> Iterator[tuple[int, float, Rule]]:
        for rule in CONSTANT:
            yield -2, 0.0, rule
        for place, name in enumerate(choices):
            values = sorted({pair[name] for pair in pairs})
            for low, high in pairwise(values):
                gap = (high - low) / (values[-1] - values[0])
                for below in (False, True):
                    yield place, -gap, Rule(name, (low + high) / 2, below)

    return min(candidates(), key=lambda found: (errors(found[2], pairs, wanted), *found[:2]))[2]


def errors(rule: Rule, pairs: Sequence[Row], wanted: Sequence[bool]) -> int:
    """Count the pairs that the rule gets wrong."""
    return sum(rule.holds(pair) != want for pair, want in zip(pairs, wanted, strict=True))


def left_out(pairs: Sequence[Row], wanted: Sequence[bool], choices: Sequence[str] = CHOICES, by: str = "pair") -> int:
    """Count the pairs that are wrong by the rule that was fitted without them, and without all that share their `by` with them."""
    wrong = 0
    for name in dict.fromkeys(pair[by] for pair in pairs):
        (theirs, those), (mine, these) = (_where(pairs, wanted, [(pair[by] == name) == same for pair in pairs]) for same in (False, True))
        wrong += errors(fit(theirs, those, choices), mine, these)
    return wrong


def _where(pairs: Sequence[Row], wanted: Sequence[bool], chosen: Sequence[bool]) -> tuple[list[Row], list[bool]]:
    return list(compress(pairs, chosen)), list(compress(wanted, chosen))
