"""What more processes and more rollouts cost: training and scoring by two workers, several readers of one store, stores of up to a million.

    python benchmarks/bench_scale.py            # benchmarks/results/scale.json and docs/bench_scale.png; about ten minutes on two cores
    python benchmarks/bench_scale.py --quick    # tiny, into runs/scale-quick; under a minute

Two processes that compute at the same time slow each other down, whatever they compute: they share memory, and maybe more.  So beside two ranks
or two workers run two processes that know nothing of each other; how much faster they are than one is the ceiling of the machine, and it is
that to which speed-ups are compared.  Arms take turns, in another order each time; wall time.
"""

import argparse
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from attrs import field, frozen
from record import ROOT, describe_machine, result_file
from scale_growth import STORES, draw, look, write
from scale_parts import (
    ALONE,
    APART,
    DDP,
    FSDP,
    SHARES,
    VOCABULARY,
    collectives,
    load,
    make_rollouts,
    make_scorer,
    make_store,
    make_tokenizer,
    score,
    scored,
    train,
)
from scale_summary import ALONE_SCORING, APART_SCORING, RAY, RAY_AHEAD, find_goals, growth_rows, loading_rows, scoring_rows, training_rows
from scale_workers import Found, Workers

from lopd import ZarrStore
from lopd.records import fingerprint_tokenizer
from lopd.testing import tiny_manifest


@frozen
class Plan:
    """How much is measured.

    Args:
        repeats: turns of each arm.
        hidden, layers: size of student and teacher.
        median: tokens of a response, in training and scoring.
        steps: rollouts of a training step -> how many steps.
        to_score, per_batch: rollouts to score, and how many are committed together.
        to_load, per_load, seconds, readers: rollouts in the store that is read, of a step; how long, and by how many.
        sizes, per_commit: rollouts of the stores that are looked at, and of each commit.
    """

    repeats: int = 5
    hidden: int = 256
    layers: int = 4
    steps: dict[int, int] = field(factory=lambda: {16: 4, 64: 2})
    median: int = 48
    to_score: int = 256
    per_batch: int = 64
    to_load: int = 4096
    per_load: int = 256
    seconds: float = 1.0
    readers: tuple[int, ...] = (1, 2, 4, 8)
    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6)
    per_commit: int = 8192

    @property
    def model(self) -> dict[str, int]:
        """Arguments of `make_model`."""
        return {"hidden": self.hidden, "layers": self.layers}


QUICK = Plan(
    repeats=1,
    hidden=64,
    layers=1,
    steps={4: 2},
    median=16,
    to_score=32,
    per_batch=16,
    to_load=64,
    per_load=16,
    seconds=0.1,
    readers=(1, 2),
    sizes=(10**2, 10**3),
    per_commit=256,
)


def measure_training(plan: Plan, folder: Path) -> list[Found]:
    """Measure the steps of one rank and of two, and what keeps two from being twice as fast.

    Larger steps update and sum weights less often.
    """
    made = make_rollouts(max(per_step * (steps + 1) for per_step, steps in plan.steps.items()), plan.median)
    make_store(folder / "training", fingerprint_tokenizer(make_tokenizer()), made)
    options = {"folder": folder / "training", "tokens_per_batch": 8 * plan.median + 512, **plan.model}
    runs: dict[int, list[dict[str, list[Found]]]] = {per_step: [] for per_step in plan.steps}
    with Workers(2) as workers:
        for repeat, (per_step, steps) in product(range(plan.repeats), plan.steps.items()):
            run = {}
            for arm in random.Random(repeat).sample((ALONE, APART, SHARES, DDP, FSDP), 5):  # noqa: S311
                task = {"arm": arm, "meeting": folder / f"{arm}{repeat}-{per_step}", "per_step": per_step, "steps": steps, **options}
                run[arm] = workers.run(train, [{**task, "rank": rank} for rank in range(1 if arm == ALONE else 2)])
            runs[per_step].append(run)
        bare, _ = workers.run(collectives, [{"rank": rank, "meeting": folder / "bare", "repeats": 5, **plan.model} for rank in range(2)])
    rows = [row for per_step, repeats in runs.items() for row in training_rows(repeats, per_step)]
    return [*rows, {"kind": "training", "arm": "bare collectives", **bare}]


@contextmanager
def ray_scorers(make: Callable[[], Any], counts: tuple[int, ...]) -> Iterator[dict[int, Any]]:
    """Open a scorer for each number of workers, and close them all at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from lopd.engines.on_ray import RayScorer

    ray.init(num_cpus=sum(counts), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with ExitStack() as stack:
            yield {count: stack.enter_context(closing(RayScorer(make, workers=count))) for count in counts}
    finally:
        ray.shutdown()


def measure_scoring(plan: Plan, folder: Path) -> list[Found]:
    """Measure one and two Ray workers, with one batch at a time and with two, and processes without Ray."""
    words, made = fingerprint_tokenizer(make_tokenizer()), make_rollouts(plan.to_score, plan.median)
    made.sort(key=len)
    for name, part in {"whole": made, "half0": made[::2], "half1": made[1::2]}.items():
        make_store(folder / name, words, part)
    # with batches half as large, two processes do just what two workers do
    alone, apart, runs = {"per_batch": plan.per_batch, **plan.model}, {"per_batch": plan.per_batch // 2, **plan.model}, []
    with Workers(2) as workers, ray_scorers(partial(make_scorer, **plan.model), (1, 2)) as scorers:
        with ThreadPoolExecutor() as threads:  # workers start with their first call
            list(threads.map(lambda scorer: scorer.score(made[:8]), scorers.values()))
        arms: dict[str, Callable[[str], list[Found]]] = {
            ALONE_SCORING: lambda column: workers.run(score, [{**alone, "folder": folder / "whole", "column": column}]),
            APART_SCORING: lambda column: workers.run(
                score, [{**apart, "folder": folder / f"half{i}", "column": column} for i in range(2)]
            ),
        }
        for at_once, name in ((1, RAY), (2, RAY_AHEAD)):
            for count, scorer in scorers.items():
                options = {"rollouts_per_batch": plan.per_batch, "batches_at_once": at_once}
                arms[f"{count}, {name}"] = lambda column, s=scorer, o=options: [
                    scored(ZarrStore.open(folder / "whole"), s, column=column, **o)
                ]
        for repeat in range(plan.repeats):
            order = random.Random(repeat).sample(list(arms), len(arms))  # noqa: S311
            runs.append({arm: arms[arm](f"scored-{repeat}-{place}") for place, arm in enumerate(order)})
    return scoring_rows([{arm: run[arm] for arm in arms} for run in runs])


def measure_loading(plan: Plan, folder: Path) -> list[Found]:
    """Measure several readers of one store of each kind; each reads its share."""
    made, words = make_rollouts(plan.to_load, 8 * plan.median), tiny_manifest(VOCABULARY).tokenizer
    task = {"seconds": plan.seconds, "per_step": plan.per_load, "tokens_per_batch": 8192}
    runs: dict[tuple[str, int], list[list[Found]]] = {(kind, size): [] for kind in STORES for size in plan.readers}
    for kind, opening in STORES.items():
        make_store(folder / kind, words, made, opening)
    with Workers(max(plan.readers)) as workers:
        for repeat in range(plan.repeats):
            for kind, size in random.Random(repeat).sample(list(runs), len(runs)):  # noqa: S311
                tasks = [{**task, "folder": folder / kind, "rank": rank, "size": size} for rank in range(size)]
                runs[kind, size].append(workers.run(load, tasks))
    return loading_rows(runs)


def measure_growth(plan: Plan, folder: Path) -> list[Found]:
    """Write each store, and have a process that has seen no other look at it."""
    found = []
    with Workers(1) as writer:
        for kind, size in product(STORES, plan.sizes):
            place = {"kind": kind, "folder": folder / kind}
            with Workers(1) as looker:
                (written,) = writer.run(write, [{"count": size, "per_commit": plan.per_commit, **place}])
                (looked,) = looker.run(look, [{"draws": 32, **place}])
            shutil.rmtree(folder / kind)
            found.append({"store": kind, "rollouts": size, **written, **looked})
    return growth_rows(found)


PARTS: Mapping[str, Callable[[Plan, Path], list[Found]]] = {
    "training": measure_training,
    "scoring": measure_scoring,
    "loading": measure_loading,
    "growth": measure_growth,
}


def main() -> None:
    """Measure, write the result file, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the result and the plot")
    options = parser.parse_args()
    plan, rows = QUICK if options.quick else Plan(), []
    home = options.out or (ROOT / "runs" / "scale-quick" if options.quick else None)
    for name in options.parts:
        begun = perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows += PARTS[name](plan, Path(folder))
        print(f"{name}: {perf_counter() - begun:.0f} s", flush=True)
    report = describe_machine()
    report["versions"] |= {name: version(name) for name in ("ray",) if find_spec(name)}
    goals = find_goals(rows)
    for row in (*rows, *goals):
        print(row)
    result_file("scale", report, rows, goals, *([home] if home else []))
    if "growth" in options.parts:
        draw((home or ROOT / "docs") / "bench_scale.png", rows)


if __name__ == "__main__":
    main()
