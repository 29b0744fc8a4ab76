"""Guards of offline OPD: advantages and sampling judged before the first step, and drift from the reference policy watched at every one.

Offline OPD without an importance ratio is a promise about closeness.  Where the teacher finds many sampled tokens nearly impossible, the
regression on its log-probs pushes them down long after the student has dropped them, and their mass goes anywhere: held-out accuracy falls
while the loss does too.  `benchmarks/results/drift.json` has a run of that kind, and what these guards reported of it.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import AdvantageWarning, ArgumentError, DriftWarning, InvalidRecordError, SamplerWarning
from lopd.protocols import LogprobReader, StatesCorrection, StatesRatio
from lopd.protocols.doors import check_noun
from lopd.protocols.labels import refuse_labels
from lopd.protocols.reading import chosen, evenly, named, walk
from lopd.records.checks import a_kind, check_at_least, check_kind, check_number, own_numbers
from lopd.records.drift import TAIL, AdvantageSummary, Drift
from lopd.records.manifest import SamplingParams
from lopd.records.rollouts import BEHAVIOR_COLUMN, SAMPLER_COLUMN
from lopd.records.steps import Batch, StepMetrics
from lopd.records.warn import warn_user

#: Share of advantages in the tail from which a loss without an importance ratio is not to be trusted.
MAX_TAIL = 0.02


@frozen
class DriftLimits:
    """Where `watch_drift` warns: means over the last steps beyond one of these.  None leaves one out.

    A student has to move to learn, so distance alone proves little; distance that brings it no nearer to the teacher does.  The defaults were chosen
    on three seeds of a testbed, held on two others, and hold on five more in part (`docs/decisions/0007-guards.md`).

    Args:
        gain_per_kl: lowest gain (`Drift.mean_gain`) for each nat of KL from the reference policy, once that is above `kl_floor`.
        kl_floor: nats per token.
        ratio_mean: lowest mean per-token ratio.  The paper's runs stay near 0.94 (arXiv 2604.13010v2, figure 3a).  Under top-p, and at temperature 0,
            it falls where the student has only become flatter, and at one of 0.5 or lower by chance (`Drift.ratio_mean`): give a lower one, or None.
        ess: lowest share of effective rollouts.  It falls with the length of rollouts, so no limit fits all.
        steps: how many are averaged; the first few are judged by what there is.

    Raises:
        InvalidRecordError: `steps` is less than 1, `kl_floor` than 0, or a limit is not a number.
    """

    gain_per_kl: float | None = 0.25
    kl_floor: float = 0.005
    ratio_mean: float | None = 0.9
    ess: float | None = None
    steps: int = 4

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Drift limits", steps=1)
        check_number("Drift limits", "kl_floor", self.kl_floor, self.kl_floor >= 0, "at least 0 nats")

    def exceeded(self, drifts: Iterable[Drift]) -> dict[str, str]:
        """Return the limits that the means of these are beyond, and a sentence on each; NaN exceeds every limit."""
        recent = list(drifts)
        kl, gain, ratio, ess = (float(np.mean([getattr(d, name) for d in recent])) for name in ("kl", "mean_gain", "ratio_mean", "ess"))
        measured = {"gain_per_kl": gain / kl if not kl <= self.kl_floor else np.inf, "ratio_mean": ratio, "ess": ess}
        beyond = {name: value for name, value in measured.items() if (low := getattr(self, name)) is not None and not value >= low}
        where = f"over the last {len(recent)} steps, KL {kl:.3g} nats a token"
        what = {"gain_per_kl": " (nats nearer to the teacher for each nat of KL; below 0 is further away)"}
        return {
            name: f"{name}{what.get(name, '')} is {value:.3g} ({where}), expected at least {getattr(self, name):g}"
            for name, value in beyond.items()
        }


_LIMITS = DriftLimits()


def watch_drift(metrics: Iterable[StepMetrics], limits: DriftLimits = _LIMITS) -> Iterator[StepMetrics]:
    """Yield the same metrics; a `DriftWarning` the first time each limit is passed (`warnings.simplefilter("error", DriftWarning)` stops there).

    Args:
        metrics: what `opd_steps` yields, over steps with a teacher's and a ref column.
        limits: where it warns.

    Raises:
        ArgumentError: an argument is something else.
        InvalidRecordError: there is no drift in the metrics.
    """
    check_kind("Limits", limits, DriftLimits, "make one: `DriftLimits()`")
    if not isinstance(metrics, Iterable):
        raise ArgumentError(f"Metrics: it is {a_kind(metrics)}; pass `opd_steps(...)`.")
    recent: deque[Drift] = deque(maxlen=limits.steps)
    said: set[str] = set()
    for m in metrics:
        check_kind("Metrics", m, StepMetrics, "pass what `opd_steps` gives")
        if m.drift is None:
            raise InvalidRecordError(
                f"Step {m.step}: its drift is None, expected a measured one; pass a teacher and `ref=` to `batches`, and a loss that gives its "
                "log-probs, or leave `watch_drift` out: without a teacher there is no drift."
            )
        recent.append(m.drift)
        for name, sentence in limits.exceeded(recent).items():
            if name not in said:
                said.add(name)
                warn_user(
                    f"Step {m.step}: {sentence}; the stored rollouts are no longer this student's own: lower the learning rate or the clip, "
                    "pass `ratio_to_ref=True` to a loss that has no importance ratio, or sample again (`lopd.refresh_when`).",
                    DriftWarning,
                )
        yield m


def stored_advantages(
    store: LogprobReader,
    *,
    teacher: str = "teacher",
    student: str = BEHAVIOR_COLUMN,
    rows: NDArray[np.int64] | None = None,
    count: int = 256,
) -> AdvantageSummary | None:
    """Return advantages of the policy that sampled, on the counted tokens of evenly spaced rollouts; None if none of them is scored in both columns.

    Args:
        store: with both columns.
        teacher: whose log-probs.
        student: minus whose.
        rows: among which to choose; None for all.
        count: at most so many rollouts.

    Raises:
        ArgumentError: the store is something else.
        InvalidRecordError: a column holds labels, `count` is less than 1, or `rows` is empty or holds other than whole numbers.
        NoSuchRowError: a row is not in the store.
    """
    check_noun(store, LogprobReader)
    count = check_at_least("Advantages", "count", count, 1)
    refuse_labels(store, teacher, student)
    every = np.arange(len(store)) if rows is None else chosen(store, rows)
    usable = store.scored(teacher) & store.scored(student)
    records = walk(store, evenly(every[usable[every]], count), (teacher, student))
    gaps = [(record.scores[teacher] - record.scores[student])[record.rollout.loss_mask] for record in records]
    return AdvantageSummary.of(np.concatenate(gaps)) if sum(gap.size for gap in gaps) else None


def judge_advantages(store: LogprobReader, summary: AdvantageSummary | None, teacher: str = "teacher") -> None:
    """Warn if too many of these advantages of a teacher's column are in the tail."""
    if summary is not None and summary.tail > MAX_TAIL:
        warn_user(f"{named(store)}, column {teacher!r}: {_objection(summary)}", AdvantageWarning)


def judge_loss(loss: object, summary: AdvantageSummary) -> None:
    """Warn if too many of a step's advantages are in the tail for a loss that states that it is `uncorrected` (`StatesCorrection`)."""
    if isinstance(loss, StatesCorrection) and loss.uncorrected and summary.tail > MAX_TAIL:
        warn_user(f"Loss {type(loss).__name__}: {_objection(summary)}", AdvantageWarning)


def judge_sampling(store: LogprobReader, rows: NDArray[np.int64], *, ratio: bool) -> None:
    """Warn where the gradient is biased by how the rollouts were drawn, since no importance ratio to their distribution corrects that.

    Args:
        store: whose rollouts.
        rows: that are trained on.
        ratio: whether a loss can form an importance ratio; it is to the right distribution where rollouts have `sampler_logprobs`.
    """
    sampling, mixed = store.manifest.sampling, int(drawn_otherwise(store, rows).sum())
    if sampling.neutral:
        if mixed and not ratio:
            warn_user(
                f"{named(store)}: {mixed} of {len(rows)} rollouts have sampler_logprobs and no importance ratio, though its manifest has temperature "
                '1 and top_p 1; pass `ref="behavior"` and a loss with `ratio_to_ref=True`, or keep what was drawn otherwise in another store.',
                SamplerWarning,
            )
        return
    lacking = int((~store.scored(SAMPLER_COLUMN)[rows]).sum())
    what = "lack the sampler_logprobs that an importance ratio needs"
    remedy = "sample with an engine that records them (a server: `--logprobs-mode processed_logprobs`)"
    if not ratio:
        what = "have no importance ratio" + f", and {lacking} {what}" * bool(lacking)
        remedy = f"{remedy} and " * bool(lacking) + 'pass `ref="behavior"` and a loss with `ratio_to_ref=True`'
        lacking = len(rows)
    if lacking:
        warn_user(
            f"{named(store)}: {lacking} of {len(rows)} rollouts {what}, and they were drawn at {bias_of(sampling)}; {remedy}, or sample at "
            "temperature 1 and top_p 1.",
            SamplerWarning,
        )


def drawn_otherwise(store: LogprobReader, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of these rows were drawn at another temperature or top-p than 1: all if the manifest has another, and those whose source had."""
    return store.scored(SAMPLER_COLUMN)[rows] if store.manifest.sampling.neutral else np.ones(len(rows), np.bool_)


def bias_of(sampling: SamplingParams) -> str:
    """Return how tokens were drawn, and what that does to the gradient of a loss which takes them for draws at temperature 1."""
    often = "often" if sampling.temperature < 1 else "rarely"
    heated = f"likely tokens came too {often}" if sampling.temperature != 1 else "the tokens that were left came too often"
    cut = (
        ", and those that were never drawn are missing from it, with a ratio too" if sampling.top_p < 1 or sampling.temperature == 0 else ""
    )
    return f"temperature {sampling.temperature:g} and top_p {sampling.top_p:g}, so the gradient is biased before the student has moved: {heated}{cut}"


def judge_ratio(loss: object, batches: Iterable[Batch]) -> None:
    """Warn if a loss states that it is `uncorrected` or `ratioless`, and the batches were drawn at another temperature or top-p than 1."""
    lacking = (isinstance(loss, StatesCorrection) and loss.uncorrected) or (isinstance(loss, StatesRatio) and loss.ratioless)
    if lacking and any(batch.sampler_logprobs is not None for batch in batches):
        warn_user(
            f"Loss {type(loss).__name__}: it has no importance ratio, and its tokens were not drawn at temperature 1 and top_p 1, so the gradient "
            "is biased before the student has moved; pass `ratio_to_ref=True`.",
            SamplerWarning,
        )


def _objection(summary: AdvantageSummary) -> str:
    return (
        f"{summary.tail:.1%} of its advantages are below {TAIL:g} nats, expected at most {MAX_TAIL:.0%} ({summary}); pass "
        '`ref="behavior"` and a loss with `ratio_to_ref=True`, or a smaller clip, or train the student longer on the teacher\'s text first.'
    )
