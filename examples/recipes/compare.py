"""The table at the end of `recipes.one_gpu`: accuracies of the arms with their intervals, differences over the same problems, hours."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from attrs import asdict, field, frozen
from numpy.typing import NDArray

import lopd
from lopd import ZarrStore, rows_of
from lopd.records import Estimate, Prompt, RolloutSums, prompt_id_of
from lopd.tools.console import table
from lopd.tools.phases import console, wall_time, write_json
from recipes.cards import Plan
from recipes.grading import MathGrader

#: Arms whose difference is of interest.
_PAIRS = (("OPD", "start"), ("online OPD", "start"), ("OPD", "online OPD"))


@frozen
class Arm:
    """A student that was tested.

    Args:
        name: the arm.
        seed: the one that it was trained and tested with.
        evaluation: the phase of its test, with its grades.
        phases: those that made it, in its seed.
    """

    name: str
    seed: int
    evaluation: Mapping[str, Any]
    phases: Sequence[Mapping[str, Any]] = field(default=())

    def scores(self, problems: Sequence[Prompt]) -> NDArray[np.float64]:
        """Return (B,) mean score of each problem."""
        return np.array([self.evaluation["grades"][problem.prompt_id]["score"] for problem in problems])


def grade(path: Path, problems: Sequence[Prompt], tokenizer: Any) -> dict[str, dict[str, float]]:
    """Return problem -> mean over its samples of the score, the tokens, and whether the answer was cut off."""
    store, grader = ZarrStore.open(str(path)), MathGrader(tokenizer)
    of, found = {problem.prompt_id: problem for problem in problems}, dict[str, list[tuple[float, int, bool]]]()
    for record in store.read(rows_of(store, problems).tolist()):
        rollout, name = record.rollout, prompt_id_of(record.rollout.rollout_id)
        found.setdefault(name, []).append((grader(of[name], rollout), rollout.response_ids.size, rollout.finish_reason == "length"))
    return {
        name: dict(zip(("score", "tokens", "cut"), np.mean(rows, axis=0, dtype=np.float64).tolist(), strict=True))
        for name, rows in found.items()
    }


@frozen
class Twice:
    """A mean with two intervals.

    Args:
        problems: over problems, these seeds given.
        seeds: over seeds, these problems given.
    """

    problems: Estimate
    seeds: Estimate

    @classmethod
    def of(cls, values_SB: NDArray[np.float64]) -> "Twice":
        """Take the mean over seeds and problems."""
        return cls(mean(values_SB.mean(axis=0)), mean(values_SB.mean(axis=1)))

    def __str__(self) -> str:
        intervals = ("-" if width is None else f"{width:.3f}" for width in self.widths)
        return " ± ".join([f"{self.problems.mean:.3f}", *intervals])

    @property
    def widths(self) -> tuple[float | None, float | None]:
        """Half-widths over problems and over seeds; None where there is one draw, or all agree: neither shows how far others are."""
        over_problems, over_seeds = (found.ci95 if 0 < found.ci95 < math.inf else None for found in (self.problems, self.seeds))
        return over_problems, over_seeds

    @property
    def numbers(self) -> dict[str, float | None]:
        """For a file."""
        return {
            "mean": self.problems.mean,
            **dict(zip(("ci95_over_problems", "ci95_over_seeds"), self.widths, strict=True)),
            "problems": self.problems.clusters,
            "seeds": self.seeds.clusters,
        }


def mean(values: Iterable[float]) -> Estimate:
    """Return the mean of independent values, with the interval of Student's t."""
    array = np.array(list(values), np.float64)
    return RolloutSums(array, np.ones_like(array)).per_token()


def compare(arms: Sequence[Arm], tests: Mapping[str, Sequence[Prompt]]) -> dict[str, dict[str, Twice]]:
    """Return arm, or difference of two -> test -> accuracy; an arm without seeds is the same for all."""
    found = dict[str, dict[str, Twice]]()
    names = list(dict.fromkeys(arm.name for arm in arms))
    scores = {
        (name, test): np.array([arm.scores(problems) for arm in arms if arm.name == name])
        for name in names
        for test, problems in tests.items()
    }
    for name in names:
        found[name] = {test: Twice.of(scores[name, test]) for test in tests}
    for left, right in _PAIRS:
        if left in names and right in names:
            found[f"{left} - {right}"] = {test: Twice.of(scores[left, test] - scores[right, test]) for test in tests}
    return found


def ratio(arms: Sequence[Arm]) -> Estimate | None:
    """Return the wall time of online over that of offline OPD, over seeds.

    It is None where a phase was resumed, for then only its last part was timed.
    """
    stored, live = ([arm.phases for arm in arms if arm.name == name] for name in ("OPD", "online OPD"))
    if not live or any(phase["attempts"] > 1 for phases in (*stored, *live) for phase in phases):
        return None
    return mean(_seconds(ours) / _seconds(theirs) for ours, theirs in zip(live, stored, strict=True))


def _seconds(phases: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(phase["wall_s"] for phase in phases))


def report(folder: Path, plan: Plan, arms: Sequence[Arm], tests: Mapping[str, Sequence[Prompt]]) -> None:
    """Print the tables, and write them to `table.json`."""
    found, speed = compare(arms, tests), ratio(arms)
    rows = [[name, *map(str, of_test.values()), *_lengths(name, arms)] for name, of_test in found.items()]
    title = "Accuracy: mean ± 95 % over problems ± 95 % over seeds; differences are over the same problems and seeds"
    console.print(table(title, ["", *(f"{test} ({len(problems)})" for test, problems in tests.items()), "tokens", "cut"], rows))
    phases = [(arm.seed, phase) for arm in arms for phase in (*arm.phases, arm.evaluation)]
    times = [[phase["name"], seed, f"{3600 * plan.hours[phase['name']]:,.0f}", wall_time(phase)] for seed, phase in phases]
    console.print(table("Wall time, s", ["phase", "seed", "planned", "measured"], times))
    console.print(f"online over offline OPD, wall time of the OPD stage: {_said(speed)}")
    write_json(
        folder / "table.json",
        {
            "accuracy": {name: {test: twice.numbers for test, twice in of_test.items()} for name, of_test in found.items()},
            "online_over_offline_s": speed and {"mean": speed.mean, "ci95": speed.ci95 if speed.clusters > 1 else None},
            "plan": asdict(plan),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "versions": {"lopd": lopd.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        },
    )


def _said(speed: Estimate | None) -> str:
    if speed is None:
        return "not given, as there is no online OPD, or a phase was resumed and only its last part was timed"
    return f"{speed.mean:.2f} " + (f"± {speed.ci95:.2f} over {speed.clusters} seeds" if speed.clusters > 1 else "in one seed")


def _lengths(name: str, arms: Sequence[Arm]) -> list[str]:
    """Return the mean tokens of a response, and the share that was cut off."""
    grades = [grade for arm in arms if arm.name == name for grade in arm.evaluation["grades"].values()]
    return [f"{np.mean([g['tokens'] for g in grades]):.0f}", f"{np.mean([g['cut'] for g in grades]):.1%}"] if grades else ["", ""]
