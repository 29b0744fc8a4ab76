"""Bias, spread and error of every way from stored log-probs to the gradient of the reverse KL, at equal bytes, and what a step of each costs.

    make bench-estimators                          # benchmarks/results/estimators.json and docs/bench_estimators.png; under ten minutes
    python benchmarks/bench_estimators.py --quick  # tiny, no real weights, into runs/estimators-quick; seconds

Two judges.  On models that can be enumerated (`estimator_worlds`) the truth is the exact *online* gradient, so what counts is the error of the
states, too: rollouts are those of the policy, and the student has moved.  On SmolLM2 (`estimator_states`; student and rollouts are those of the
quickstart) the truth is the exact reverse KL at the stored states.  The error is that of one step: 256 rollouts of 32 tokens, and 8 of 48.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from estimator_states import Judge, States, bias_by_logits, check_fused, prepare, random_states, real_states
from estimator_worlds import World, mixing, modes
from estimator_worlds import judge as judge_world
from estimators import ONLINE, PLAIN, RATIO, Estimator, estimators, supported, whole, windowed
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from pictures import OFFLINE, SUPPORT, TEACHER, TEXT, TRL, legend, panels, save
from pictures import ONLINE as LIVE
from pictures import RATIO as BLUE
from record import ROOT, describe_machine, result_file

from lopd import FusedLoss

Row = dict[str, Any]
#: Squared bias over its standard deviation, beyond which it is not noise: one in 30,000.
LARGEST_Z = 4.0
STEP_TOKENS = 384
#: What a token may cost where the best of small stores is looked for.
MAX_BYTES = 100
SIZES = ("policy", "teacher", "drawn")
#: Families that are judged with float16, too.
ROUNDED = ("ratio", "candidates", "candidates + residual")


@frozen
class Plan:
    """How much is measured.

    Args:
        drifts, seeds, batches, rollouts, world_sizes: what the worlds take.
        states, held, moves, repetitions, sizes: what SmolLM2 takes.
        cost_tokens, cost_repeats: what the measurement of the cost takes.
    """

    drifts: tuple[float, ...] = (0.0, 0.1, 0.3)
    seeds: int = 2
    batches: int = 8
    rollouts: int = 256
    world_sizes: tuple[int, ...] = (4, 8)
    states: int = 768
    held: int = 16
    moves: tuple[float, ...] = (0.0, 0.25, 0.5)
    repetitions: int = 16
    sizes: tuple[int, ...] = (4, 16, 64)
    cost_tokens: int = 256
    cost_repeats: int = 3


QUICK = Plan((0.2,), 1, 4, 16, (4,), 64, 8, (1.0,), 8, (4,), 16, 2)


def judge_in(make: Callable[[], World], plan: Plan, drift: float, seed: int) -> list[Row]:
    """Judge all estimators in one world."""
    world = make()
    chosen = [*estimators(plan.world_sizes), *windowed(plan.world_sizes), whole(world.next_SV.shape[1]), ONLINE]
    return list(judge_world(world, chosen, drift, seed, batches=plan.batches, rollouts=plan.rollouts))


def judge_at(path: Path, move: float, chosen: Sequence[Estimator], plan: Plan) -> list[Row]:
    """Judge the estimators on one student, and check the fused loss against them; at the largest drift also judge float16 columns."""
    at: States = torch.load(path, weights_only=False)
    generator, rows, last = torch.Generator().manual_seed(0), list[Row](), move == plan.moves[-1]
    kl, to_teacher = (float(reverse_kl(*pair).mean()) for pair in ((at.policy, at.student), (at.student, at.teacher)))
    where = {"kind": "states", "drift": move, "kl": kl, "kl_to_teacher": to_teacher, "states": len(at.sampled)}
    judge = Judge(at, STEP_TOKENS, plan.repetitions)
    for estimator in chosen:
        found = {**where, **estimator.describe()}
        rows.append({**found, **judge.judge(estimator, generator)})
        if last:
            rows[-1]["fused_error"] = check_fused(at.some(plan.held), estimator, generator)
            if estimator.unbiased and not estimator.support.drawn:
                rows[-1]["exact_bias"] = bias_by_logits(at.some(plan.held), estimator)
            if estimator.family in ROUNDED:
                rows.append({**found, **judge.judge(estimator, generator, float16=True), "kind": "float16"})
    return rows


def reverse_kl(first_SV: torch.Tensor, second_SV: torch.Tensor) -> torch.Tensor:
    """Return the (S,) KL of the first to the second."""
    return (first_SV.exp() * (first_SV - second_SV)).sum(-1)


def measure_cost(plan: Plan, vocabulary: int, size: int) -> Iterable[Row]:
    """Yield the CPU seconds of a fused loss and its backward pass, each over those of the ratio in the same round; rounds are shuffled."""
    states = random_states(plan.cost_tokens, vocabulary, size)
    chosen, generator = estimators(plan.sizes), torch.Generator().manual_seed(0)
    made = {estimator.name: states.batch(estimator, generator) for estimator in chosen}
    hidden, weight = states.hidden.requires_grad_(), states.head.weight.requires_grad_()
    spent: dict[str, list[float]] = {estimator.name: [] for estimator in chosen}

    def run(estimator: Estimator) -> float:
        hidden.grad = weight.grad = None
        started = time.process_time()
        FusedLoss(estimator.objective)(hidden, states.head, made[estimator.name]).loss_sum.backward()
        return time.process_time() - started

    run(RATIO)
    for repeat in range(plan.cost_repeats):
        for estimator in random.Random(repeat).sample(chosen, len(chosen)):  # noqa: S311
            spent[estimator.name].append(run(estimator))
    for estimator in chosen:
        shares = [mine / theirs for mine, theirs in zip(spent[estimator.name], spent[RATIO.name], strict=True)]
        found = {"over_ratio": statistics.median(shares), "spread": [min(shares), max(shares)]}
        where = {
            "kind": "cost",
            "tokens": plan.cost_tokens,
            "vocabulary": vocabulary,
            "size": size,
            "cpu_s": statistics.median(spent[estimator.name]),
        }
        yield {**where, **estimator.describe(), **found}


def find_goals(rows: Sequence[Row]) -> list[Row]:
    """Judge what is claimed of the estimators, whether an offline one beats the ratio at its bytes, and the cost of a step."""
    goals: list[Row] = []

    def add(name: str, limit: float, values: Sequence[float]) -> None:
        if values:
            goals.append({"name": name, "goal": f"<= {limit:g}", "measured": max(values), "met": max(values) <= limit})

    worlds, states, rounded, costs = ([row for row in rows if row["kind"] == kind] for kind in ("world", "states", "float16", "cost"))
    for world in dict.fromkeys(row["world"] for row in worlds):
        claimed = [row["stored_bias_z"] for row in worlds if row["world"] == world and row["unbiased"]]
        add(f"{world}: squared bias on the stored states over its noise, largest of those that claim to have none", LARGEST_Z, claimed)
    exact = [row["exact_bias"] for row in states if "exact_bias" in row]
    add("vocabulary of SmolLM2, every sampled token at some states: relative bias, largest of those that claim to have none", 1e-3, exact)
    claimed = [row["bias_z"] for row in states if row["unbiased"]]
    add("vocabulary of SmolLM2: squared bias over its noise, largest of those that claim to have none", LARGEST_Z, claimed)
    add("the same with stored numbers in float16", LARGEST_Z, [row["bias_z"] for row in rounded if row["unbiased"]])
    fused = [row["fused_error"] for row in states if "fused_error" in row]
    add("the fused loss has the gradient that was judged, relative difference", 1e-4, fused)
    for name, group in (("mixing", worlds), ("modes", worlds), ("SmolLM2", states)):
        for drift in sorted({row["drift"] for row in group}):
            at = [row for row in group if row["drift"] == drift and row.get("world", name) == name]
            best = min((row for row in at if offline(row) and row["bytes"] <= MAX_BYTES), key=lambda row: row["rmse"])
            ratio = next(row for row in at if row["estimator"] == RATIO.name)
            goals.append(
                {
                    "name": f"{name}, drift {drift:g}: least error within {MAX_BYTES} bytes a token ({best['estimator']}) over that of the ratio",
                    "goal": "< 1",
                    "measured": best["rmse"] / ratio["rmse"],
                    "met": best["rmse"] < ratio["rmse"],
                }
            )
    add("a step with 16 ids or fewer over one of the ratio", 1.1, [row["over_ratio"] for row in costs if max(row[n] for n in SIZES) <= 16])
    return goals


def offline(row: Row) -> bool:
    """Return whether the estimator can be computed from a store of some size."""
    return row["estimator"] != ONLINE.name and row["family"] != "whole vocabulary"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw the error over bytes a token: a line for each family, a row for each judge, at the middle and the largest drift."""
    names = {"SmolLM2": "SmolLM2, stored states", "mixing": "a table that mixes, online", "modes": "modes that stay, online"}
    families = dict.fromkeys(row["family"] for row in rows if "rmse" in row)
    figure, axes = panels(len(names), 2, height=10.5)
    for place, (name, title) in enumerate(names.items()):
        group = [row for row in rows if row["kind"] in ("world", "states") and row.get("world", "SmolLM2") == name]
        for panel, drift in zip(axes[2 * place :], sorted({row["drift"] for row in group})[-2:], strict=False):
            at = [row for row in group if row["drift"] == drift]
            for family in families:
                _draw_family(panel, family, [row for row in at if row["family"] == family])
            panel.set(title=f"{title}\nKL(policy, student) {statistics.mean(row['kl'] for row in at):.2g} nats a token")
            panel.set(xlabel="bytes a token", xscale="log", yscale="log")
            for axis, ticks in ((panel.xaxis, (4, 16, 64, 256)), (panel.yaxis, (0.1, 0.2, 0.3, 0.5, 1, 2))):
                axis.set_major_locator(FixedLocator(ticks))
                axis.set_major_formatter(FormatStrFormatter("%g"))
                axis.set_minor_locator(NullLocator())
        axes[2 * place].set_ylabel("relative error of a step's gradient")
    legend(figure, 3)
    save(figure, path)


#: By the first of these words that a family has: colours of the arms that are like it; that of TRL is free here.
_COLORS = {
    "whole": TEXT,
    "online": LIVE,
    "drawn": TRL,
    "union": TEXT,
    "candidates": SUPPORT,
    "top K": TEACHER,
    "ratio,": BLUE,
    "no ratio": OFFLINE,
}


def _draw_family(axes: Axes, family: str, rows: Sequence[Row]) -> None:
    """Draw mean errors by bytes: dashed where it is biased, hollow with a window, a line across where bytes mean nothing."""
    color = next((color for word, color in _COLORS.items() if word in family), BLUE)
    if family in ("whole vocabulary", ONLINE.name):
        if rows:
            axes.axhline(statistics.mean(row["rmse"] for row in rows), color=color, linestyle=":", label=family)
        return
    sizes = sorted({row["bytes"] for row in rows})
    errors = [statistics.mean(row["rmse"] for row in rows if row["bytes"] == size) for size in sizes]
    style = {"linestyle": "-" if all(row["unbiased"] for row in rows) else "--", "markerfacecolor": "none" if "window" in family else color}
    mark = next((mark for word, mark in {"candidates + drawn": "s", "generalised": "s", "union": "D"}.items() if word in family), "o")
    axes.plot(sizes, errors, marker=mark, color=color, label=family, **style)


def parts(plan: Plan) -> list[list[Estimator]]:
    """Return the estimators that are judged on SmolLM2, in parts of about as much work."""
    return [[PLAIN, RATIO], *(supported(size) for size in plan.sizes)]


def keep(students: Iterable[tuple[float, States]], folder: Path) -> Iterable[tuple[float, Path]]:
    """Save the states of each student in a file, for other processes, and yield its drift and path."""
    folder.mkdir(parents=True, exist_ok=True)
    for move, states in students:
        path = folder / f"states-{move:g}.pt"
        torch.save(states, path)
        yield move, path


def call(job: Callable[[], list[Row]]) -> list[Row]:
    """Run one job in this process."""
    return job()


def main() -> None:
    """Measure, write the result file, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "estimators", help="where SmolLM2 and its students are kept")
    parser.add_argument("--out", type=Path, help="folder of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, shape = (QUICK, (256, 16)) if options.quick else (Plan(), (49_152, 576))
    home = options.out or (ROOT / "runs" / "estimators-quick" if options.quick else None)
    folder = home if options.quick else options.folder
    if not options.quick:
        prepare(folder)
    students = [(1.0, random_states(plan.states, *shape))] if options.quick else real_states(folder, plan.states, plan.moves)
    jobs = [partial(judge_at, path, move, part, plan) for move, path in keep(students, folder) for part in parts(plan)]
    jobs += [partial(judge_in, *job) for job in product((mixing, modes), [plan], plan.drifts, range(plan.seeds))]
    rows = list(measure_cost(plan, *shape))
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows += [row for found in pool.map(call, jobs) for row in found]
    for row in rows:
        print({name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in row.items()})
    goals = find_goals(rows)
    for goal in goals:
        print("met   " if goal["met"] else "MISSED", goal["name"], "goal", goal["goal"], "measured", goal["measured"])
    result_file("estimators", describe_machine(), rows, goals, *([home] if home else []))
    draw((home / "bench_estimators.png") if home else ROOT / "docs" / "bench_estimators.png", rows)


if __name__ == "__main__":
    main()
