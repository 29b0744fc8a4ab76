"""One OPD run of the claims: which way of training, on which testbed, and all that is recorded of it."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from lopd import ConsistencyPolicy, FusedLoss, FusedOPDLoss, MemoryStore, TopKObjective, watch_drift
from lopd.errors import DriftWarning
from lopd.losses.divergences import forward_kl, reverse_kl
from lopd.losses.variants import entropy_advantage, lowest_logprobs, prefix_fraction
from lopd.protocols import OPDLoss
from lopd.records import AdvantageSummary, StepMetrics
from testbed.models import Setting, prepare
from testbed.runs import ALONE, Clock, Support, Training, offline, online, scored_rollouts


@frozen
class Arm:
    """A way to run the OPD stage.

    Args:
        name: in tables.
        loss: loss of every step.
        every: sample and score again after so many steps (1 is online OPD); None is once, before the first (Lightning).
        rate: times the learning rate of the setting.
        prompts: share of the OPD prompts, for offline runs.
        samples: rollouts a prompt, likewise.
        support: what is kept beside each response token.
    """

    name: str
    loss: OPDLoss = field(factory=FusedOPDLoss)
    every: int | None = None
    rate: float = 1.0
    prompts: float = 1.0
    samples: int = 1
    support: Support = ALONE


PLAIN = Arm("Lightning")
RATIO = Arm("Lightning, ratio to ref", FusedOPDLoss(ratio_to_ref=True))
ONLINE = Arm("online OPD", every=1)
MAIN = (PLAIN, RATIO, ONLINE)

_TOP_K = Support(top_k=8)
REFRESH = tuple(Arm(f"refresh every {every} steps", every=every) for every in (50, 20, 5))
RATES = (
    Arm("Lightning, a third of the rate", rate=1 / 3),
    Arm("ratio, a third of the rate", RATIO.loss, rate=1 / 3),
    Arm("ratio, three times the rate", RATIO.loss, rate=3.0),
)
CLIPS = (
    Arm("Lightning, no clip", FusedOPDLoss(clip=None)),
    Arm("Lightning, clip 1", FusedOPDLoss(clip=1.0)),
    Arm("Lightning, clip 0.3", FusedOPDLoss(clip=0.3)),
    Arm("ratio, clip 1", FusedOPDLoss(clip=1.0, ratio_to_ref=True)),
)
SAMPLES = (
    Arm("ratio, a quarter of the prompts, 4 samples each", RATIO.loss, prompts=0.25, samples=4),
    Arm("ratio, all prompts, 4 samples each", RATIO.loss, samples=4),
    Arm("ratio, a quarter of the prompts, 1 sample each", RATIO.loss, prompts=0.25),
)
PREFIXES = tuple(
    Arm(
        f"ratio, first {share:.0%} of each response",
        FusedOPDLoss(ratio_to_ref=True, transforms=(partial(prefix_fraction, fraction=share),)),
    )
    for share in (0.5, 0.25)
)
TOP_K = Arm(f"stored top-{_TOP_K.top_k}, reverse KL", FusedLoss(TopKObjective(reverse_kl)), support=_TOP_K)
SUPPORTS = (Arm(f"stored top-{_TOP_K.top_k}, forward KL", FusedLoss(TopKObjective(forward_kl)), support=_TOP_K), TOP_K)
PLACEBOS = (
    Arm("no teacher: -0.5 on the least likely fifth", FusedOPDLoss(advantage=-0.5, transforms=(lowest_logprobs,))),
    Arm("no teacher: by entropy on the least likely fifth", FusedOPDLoss(transforms=(entropy_advantage, lowest_logprobs))),
)
ABLATIONS = {
    "refresh": REFRESH,
    "learning rate": RATES,
    "clip": CLIPS,
    "prompts and samples": SAMPLES,
    "prefix": PREFIXES,
    "top-k": SUPPORTS,
    "placebo": PLACEBOS,
}


def run_arm(
    setting: Setting, seed: int, folder: Path, arm: Arm, *, teachers: tuple[str, str] = ("A", "A"), curve: Sequence[int] = ()
) -> dict[str, Any]:
    """Train an arm, and return its row of the results.

    Args:
        setting: setting of the testbed.
        seed: seed of the testbed, and of the run.
        folder: where the testbed is.
        arm: how to train.
        teachers: style of the SFT teacher and of the OPD teacher.
        curve: after how many steps accuracy is measured on the way; the time it takes is not counted.
    """
    sft, opd = teachers
    bed = prepare(setting, seed, folder, sorted(set(teachers)))
    training = Training.of(bed.students[sft], setting.opd_lr * arm.rate)
    row = {"setting": setting.name, "seed": seed, "arm": arm.name, "sft_teacher": sft, "opd_teacher": opd, "steps": setting.opd_steps}
    row |= training.start(bed, bed.teachers[opd])
    warnings.simplefilter("ignore", UserWarning)
    clock = Clock()
    if arm.every is None:
        kept = evolve(bed, opd_prompts=bed.opd_prompts[: round(arm.prompts * len(bed.opd_prompts))])
        store = scored_rollouts(kept, sft, opd, samples=arm.samples, support=arm.support, clock=clock)
        row |= {"stored_rollouts": len(store), **clock.run("evaluation", _advantages, store)}
        steps = offline(bed, store, training, arm.loss, consistency=ConsistencyPolicy.WARN, support=arm.support)
    else:
        steps = online(bed, training, arm.loss, opd, every=arm.every, support=arm.support, clock=clock)
    points, drifts, spoke = [(0, row["start"], clock.total())], [], None
    for metrics, warned in _watched(steps):
        spoke = metrics.step if warned and spoke is None else spoke
        if metrics.drift is not None and (metrics.step < 20 or metrics.step % 5 == 4):
            drift = metrics.drift
            drifts.append((metrics.step, drift.ratio_mean, drift.ratio_std, drift.kl, drift.mean_gain, drift.ess))
        if metrics.step + 1 in curve:
            spent = clock.total()
            points.append((metrics.step + 1, clock.run("evaluation", training.accuracy, bed).mean, spent))
    row |= {"cpu_s": clock.split(), "watch_spoke_at": spoke, **training.measure(bed, bed.teachers[opd]), "curve": points}
    return {**row, "step_ratiomean_ratiostd_kl_gain_ess": drifts}


def _advantages(store: MemoryStore) -> dict[str, Any]:
    """Return what is known of all advantages before the first step."""
    records = store.read(np.arange(len(store)), columns=("teacher", "behavior"))
    gaps = np.concatenate([record.scores["teacher"] - record.scores["behavior"] for record in records])
    said = AdvantageSummary.of(gaps)
    sizes = {"advantage_mean": said.mean, "advantage_size": float(np.abs(gaps).mean())}
    return {**sizes, "advantage_quantiles": said.quantiles, "tail": said.tail}


def _watched(steps: Iterable[StepMetrics]) -> Iterator[tuple[StepMetrics, bool]]:
    """Yield steps, and whether the guard has warned by then."""
    watched, spoken = iter(watch_drift(steps)), False
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DriftWarning)
            metrics = next(watched, None)
        spoken = spoken or any(issubclass(w.category, DriftWarning) for w in caught)
        if metrics is None:
            return
        yield metrics, spoken
