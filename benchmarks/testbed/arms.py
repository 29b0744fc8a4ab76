"""One OPD run of the claims: which way of training, on which testbed, and all that is recorded of it."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve, field, frozen

from lopd import ConsistencyPolicy, FusedLoss, FusedOPDLoss, MemoryStore, TopKObjective, stored_advantages, watch_drift
from lopd.errors import DriftWarning
from lopd.losses.divergences import forward_kl, reverse_kl
from lopd.losses.variants import entropy_advantage, lowest_logprobs, prefix_fraction
from lopd.protocols import OPDLoss
from lopd.types import StepMetrics
from testbed.models import Setting, Testbed, prepare
from testbed.runs import Clock, Training, offline, online, scored_rollouts

_Result = TypeVar("_Result")


@frozen
class Arm:
    """A way to run the OPD stage.

    Args:
        name: in tables.
        loss: of every step.
        every: sample and score anew after so many steps (1 is online OPD); None is once, before the first (Lightning).
        rate: times the learning rate of the setting.
        prompts: share of the OPD prompts, for offline runs.
        samples: rollouts a prompt, likewise.
        top_k: the teacher's most likely tokens that are stored, likewise.
    """

    name: str
    loss: OPDLoss = field(factory=FusedOPDLoss)
    every: int | None = None
    rate: float = 1.0
    prompts: float = 1.0
    samples: int = 1
    top_k: int = 0


PLAIN = Arm("Lightning")
RATIO = Arm("Lightning, ratio to ref", FusedOPDLoss(ratio_to_ref=True))
ONLINE = Arm("online OPD", every=1)
MAIN = (PLAIN, RATIO, ONLINE)

_TOP_K = 8
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
    Arm(f"ratio, first {share:.0%} of each response", FusedOPDLoss(ratio_to_ref=True, transforms=(partial(prefix_fraction, fraction=share),)))
    for share in (0.5, 0.25)
)
SUPPORTS = (
    Arm(f"stored top-{_TOP_K}, forward KL", FusedLoss(TopKObjective(forward_kl)), top_k=_TOP_K),
    Arm(f"stored top-{_TOP_K}, reverse KL", FusedLoss(TopKObjective(reverse_kl)), top_k=_TOP_K),
)
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
    """A row of the results.

    Args:
        setting, seed, folder: of the testbed.
        arm: how to train.
        teachers: style of the SFT teacher and of the OPD teacher.
        curve: after how many steps accuracy is measured on the way; the time it takes is not counted.
    """
    sft, opd = teachers
    bed, clock = prepare(setting, seed, folder, sorted(set(teachers))), Clock()
    training = Training.of(bed.students[sft], setting.opd_lr * arm.rate)
    started, greedy = training.accuracy(bed).mean, training.accuracy(bed, temperature=0.0).mean
    row: dict[str, Any] = {"setting": setting.name, "seed": seed, "arm": arm.name, "sft_teacher": sft, "opd_teacher": opd}
    row |= {"start": started, "start_greedy": greedy, "steps": setting.opd_steps}
    warnings.simplefilter("ignore", UserWarning)
    begun = time.process_time()
    steps = _steps(bed, arm, training, teachers, clock, row)
    points, drift, spoke, evaluating = [(0, started, 0.0)], [], None, 0.0
    for metrics, warned in _watched(steps):
        spoke = metrics.step if warned and spoke is None else spoke
        clock.add("training", metrics.seconds)
        if metrics.drift is not None and (metrics.step < 20 or metrics.step % 5 == 4):
            drift.append((metrics.step, metrics.drift.ratio_mean, metrics.drift.ratio_std, metrics.drift.kl, metrics.drift.mean_gain, metrics.drift.ess))
        if metrics.step + 1 in curve:
            accuracy, seconds = _timed(lambda: training.accuracy(bed).mean)
            evaluating += seconds
            points.append((metrics.step + 1, accuracy, time.process_time() - begun - evaluating))
    total = time.process_time() - begun - evaluating
    ended = points[-1][1] if points[-1][0] == setting.opd_steps else training.accuracy(bed).mean
    row |= {"accuracy": ended, "greedy": training.accuracy(bed, temperature=0.0).mean, "watch_spoke_at": spoke, "cpu_s": {**clock.seconds, "all": total}}
    return {**row, "curve": points if curve else None, "step_ratiomean_ratiostd_kl_gain_ess": drift}


def _timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    begun = time.process_time()
    return call(), time.process_time() - begun


def _steps(
    bed: Testbed, arm: Arm, training: Training, teachers: tuple[str, str], clock: Clock, row: dict[str, Any]
) -> Iterator[StepMetrics]:
    """Those of the arm; what is known before the first step goes into the row."""
    sft, opd = teachers
    if arm.every is not None:
        return online(bed, training, arm.loss, opd, arm.every, clock)
    kept = evolve(bed, opd_prompts=bed.opd_prompts[: round(arm.prompts * len(bed.opd_prompts))])
    store = scored_rollouts(kept, sft, opd, samples=arm.samples, top_k=arm.top_k, clock=clock)
    row |= {"stored_rollouts": len(store), **_before(store)}
    return offline(bed, store, training, arm.loss, consistency=ConsistencyPolicy.WARN, top_k=arm.top_k > 0)


def _before(store: MemoryStore) -> dict[str, Any]:
    said = stored_advantages(store)
    return {} if said is None else {"advantage_mean": said.mean, "advantage_quantiles": said.quantiles, "tail": said.tail}


def _watched(steps: Iterable[StepMetrics]) -> Iterator[tuple[StepMetrics, bool]]:
    """Steps, and whether the guard has spoken by then."""
    watched, spoken = iter(watch_drift(steps)), False
    while True:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DriftWarning)
            metrics = next(watched, None)
        spoken = spoken or any(issubclass(w.category, DriftWarning) for w in caught)
        if metrics is None:
            return
        yield metrics, spoken
