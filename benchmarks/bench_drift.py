"""Whether the guards speak where offline OPD fails, are silent where it works, and what they cost.

    python benchmarks/bench_drift.py           # writes benchmarks/results/drift.json and docs/bench_drift.png; about fifteen minutes on two cores
    python benchmarks/bench_drift.py --report  # its goals and its picture again, from its runs

Two settings of the testbed, several seeds: a healthy one, in which online OPD gains and plain Lightning gains as much, and a failing one, in
which plain Lightning falls below its start.  Held-out accuracy is of sampled responses, every few steps; the guards look at training
alone.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict
from pictures import band, color_of, label_ends, panels, rule, save
from record import ROOT, describe_machine, judge_again, result_file
from testbed.models import FAILING, HEALTHY, Setting, prepare
from testbed.runs import Training, offline, online, scored_rollouts
from testbed.seeds import GUARDS

from lopd import FusedOPDLoss, stored_advantages, watch_drift
from lopd.errors import DriftWarning
from lopd.guards.watch import MAX_TAIL
from lopd.records.drift import TokenLogprobs, measure_drift

RESULT, PLOT = ROOT / "benchmarks" / "results" / "drift.json", ROOT / "docs" / "bench_drift.png"
FALL = 0.05
RUNS = {
    "plain": (FusedOPDLoss(), 1.0),
    "plain, a third of the rate": (FusedOPDLoss(), 1 / 3),
    "ratio to ref": (FusedOPDLoss(ratio_to_ref=True), 1.0),
    "online": (FusedOPDLoss(), 1.0),
}


def follow(setting: Setting, seed: int, name: str, folder: Path) -> dict[str, Any]:
    """Train one run, and record its accuracy along the way and the step, counted from 0, at which the watch warned."""
    loss, share = RUNS[name]
    bed = prepare(setting, seed, folder, ("A",))
    lr = setting.opd_lr * share
    training = Training.of(bed.students["A"], lr)
    store = scored_rollouts(bed, "A", "A")
    steps = online(bed, training, loss, "A") if name == "online" else offline(bed, store, training, loss)
    curve, drift, spoke = [(0, training.accuracy(bed).mean)], [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for m in watch_drift(steps):
            if spoke is None and any(issubclass(w.category, DriftWarning) for w in caught):
                spoke = m.step
            if m.drift is not None:
                drift.append((m.drift.kl, m.drift.mean_gain, m.drift.ratio_mean, m.drift.ess))
            if (m.step + 1) % (2 if m.step < 20 else 10) == 0:
                curve.append((m.step + 1, training.accuracy(bed).mean))
    start = curve[0][1]
    fell = next((step for step, accuracy in curve if accuracy < start - FALL), None)
    return {
        "setting": setting.name,
        "seed": seed,
        "run": name,
        "lr": lr,
        "accuracy_at_start": start,
        "accuracy_at_end": curve[-1][1],
        "step_at_which_it_had_fallen": fell,
        "step_at_which_the_watch_spoke": spoke,
        "curve": curve,
        "kl_gain_ratio_ess": drift,
    }


def spoke_after(row: dict[str, Any]) -> int | None:
    """Return after how many updates the watch warned, as curves count: it sees a step when its update is done."""
    step = row["step_at_which_the_watch_spoke"]
    return None if step is None else int(step) + 1


def change_when_it_spoke(row: dict[str, Any]) -> float | None:
    """Return the change of accuracy by then, by straight lines between the points of the curve."""
    if (after := spoke_after(row)) is None:
        return None
    steps, accuracies = zip(*row["curve"], strict=True)
    return float(np.interp(after, steps, accuracies)) - float(row["accuracy_at_start"])


def judge(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """Return the summary of the advantages before the first step, and whether it warns."""
    bed = prepare(setting, seed, folder, ("A",))
    summary = stored_advantages(scored_rollouts(bed, "A", "A"))
    warned = summary is not None and summary.tail > MAX_TAIL
    said = {} if summary is None else asdict(summary)
    return {"setting": setting.name, "seed": seed, "run": "before the first step", "warned": warned, **said}


def cost(tokens: int = 2**20, rollouts: int = 256, repeats: int = 7) -> dict[str, Any]:
    """Measure the seconds that the drift of one step of the paper's size takes."""
    rng = np.random.default_rng(0)
    columns = [-rng.exponential(1.0, tokens).astype(np.float32) for _ in range(3)]
    sample = TokenLogprobs(*columns, np.ones(tokens, np.float32), np.repeat(np.arange(rollouts), tokens // rollouts))
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        measure_drift(sample)
        seconds.append(time.process_time() - started)
    return {"run": "cost", "tokens": tokens, "cpu_s": statistics.median(seconds), "spread_s": [min(seconds), max(seconds)]}


def work(job: tuple[str, Setting, int, str, Path]) -> dict[str, Any]:
    """Run one job in this process."""
    torch.set_num_threads(1)
    kind, setting, seed, name, folder = job
    return judge(setting, seed, folder) if kind == "judge" else follow(setting, seed, name, folder)


def build(job: tuple[Setting, int, Path]) -> None:
    """Make the models of one setting and seed."""
    torch.set_num_threads(1)
    prepare(*job, ("A",))


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every goal, met or not; the limits of the guards were chosen on other seeds."""
    found: list[dict[str, Any]] = []

    def add(name: str, values: Sequence[bool]) -> None:
        found.append({"name": name, "goal": "all", "measured": f"{sum(values)} of {len(values)}", "met": all(values)})

    def in_time(row: dict[str, Any]) -> bool:
        change = change_when_it_spoke(row)
        return change is not None and change > -FALL

    judged, runs = [row for row in rows if "warned" in row], [row for row in rows if "curve" in row]
    plain = [row for row in runs if row["setting"] == "failing" and row["run"] == "plain"]
    slow = [row for row in runs if row["setting"] == "failing" and row["run"] == "plain, a third of the rate"]
    healthy = [row for row in runs if row["setting"] == "healthy"]
    add("failing: warned of the advantages before the first step", [row["warned"] for row in judged if row["setting"] == "failing"])
    add("healthy: not warned", [not row["warned"] for row in judged if row["setting"] == "healthy"])
    add("failing, a third of the rate: the watch speaks before accuracy has fallen by 5 points", [in_time(row) for row in slow])
    add("failing, full rate (falls within two to twelve steps): likewise", [in_time(row) for row in plain])
    add("healthy: the watch is silent, offline and online", [row["step_at_which_the_watch_spoke"] is None for row in healthy])
    spent = next(row["cpu_s"] for row in rows if row["run"] == "cost")
    # the paper's step: 16 GPU-hours over 150 steps on 8 GPUs (table 2, 8B)
    share = spent / (16 * 3600 / 150 / 8)
    name = "cost of the drift of 2**20 tokens, share of the paper's step of 48 s"
    return [*found, {"name": name, "goal": "< 0.01", "measured": share, "met": share < 0.01}]


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the change of accuracy along the runs, mean and interval over seeds.

    A dot marks the step at which the watch warned, one for each seed.
    """
    figure, both = panels(1, 2, height=3.4)
    for axes, setting in zip(both, ("healthy", "failing"), strict=True):
        for name in RUNS:
            cell = [row for row in rows if "curve" in row and (row["setting"], row["run"]) == (setting, name)]
            curves = np.array([row["curve"] for row in cell])
            steps, changes = curves[0, :, 0], curves[:, :, 1] - curves[:, :1, 1]
            band(axes, steps, changes, name, mark="", line="--" if "third" in name else "-")
            spoke = [after for row in cell if (after := spoke_after(row)) is not None]
            axes.plot(spoke, np.interp(spoke, steps, changes.mean(0)), "o", color=color_of(name))
        rule(axes, y=0)
        axes.set(title=f"Change of accuracy, {setting}", xlabel="optimizer step")
        label_ends(axes)
    save(figure, path)


def main() -> None:
    """Build the models, run all jobs, write the result file, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "testbed")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.report:
        rows = json.loads(RESULT.read_text())["rows"]
        judge_again(RESULT, rows, goals(rows))
        draw(PLOT, rows)
        return
    settings = (HEALTHY, FAILING)
    jobs = [("follow", setting, seed, name, options.folder) for name in RUNS for setting in settings for seed in GUARDS]
    jobs += [("judge", setting, seed, "", options.folder) for setting in settings for seed in GUARDS]
    with ProcessPoolExecutor(options.workers) as pool:
        list(pool.map(build, [(setting, seed, options.folder) for setting in settings for seed in GUARDS]))
        rows = []
        for row in pool.map(work, jobs):
            print({name: value for name, value in row.items() if name not in {"curve", "kl_gain_ratio_ess"}}, flush=True)
            rows.append(row)
    rows.append(cost())
    found = goals(rows)
    for goal in found:
        print("met   " if goal["met"] else "MISSED", goal["name"], "goal", goal["goal"], "measured", goal["measured"])
    result_file(RESULT.stem, describe_machine(), rows, found)
    draw(PLOT, rows)


if __name__ == "__main__":
    main()
