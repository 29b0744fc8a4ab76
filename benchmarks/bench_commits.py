"""What one more commit costs a store that has many, when it is never compacted: appends of 100 rollouts and their scores, up to 10,000 of each.

    python benchmarks/bench_commits.py            # benchmarks/results/commits.json; half an hour on two cores
    python benchmarks/bench_commits.py --quick    # tiny, into runs/commits-quick; under a minute

At each size one fresh process writes on, and another one opens the store and reads.  Appends are means, for a writer merges files now and then,
and that counts.  Memory is what the process takes beyond its imports and a tiny store; an index of ids takes 24 bytes a rollout, so beside the
exponent it is judged by rollout.  An exponent is the slope of log cost over log commits; its interval is of 400 resamplings of what was timed.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from record import ROOT, describe_machine, result_file
from scale_growth import STORES, memory, warm_up
from scale_parts import VOCABULARY, Clock
from scale_workers import Found, Workers

from lopd import Rollout, Scores
from lopd.testing import tiny_manifest, tiny_provenance

PROMPT, RESPONSE, READ = 8, 56, 64
EXPONENT, READ_MS, STATE_BYTES, MILLION = 0.2, 10.0, 64.0, 10**6
MEMORY = {"writer_mb": "memory of a writer", "reader_mb": "memory of a reader"}
#: A figure of a row: how it is named in goals.
COSTS = {
    "append_s": "append",
    "append_scores_s": "append_scores",
    "open_s": "open",
    "read_s": f"{READ} random rows",
    **MEMORY,
    "bookkeeping_bytes": "bookkeeping bytes a commit",
}


@frozen
class Plan:
    """How much is measured.

    Args:
        sizes: commits.
        per_commit: rollouts of each.
        timed: number of the last commits at each size that are timed, at most.
        draws: reads and opens.
    """

    sizes: tuple[int, ...] = (10, 100, 1000, 10_000)
    per_commit: int = 100
    timed: int = 512
    draws: int = 50


QUICK = Plan(sizes=(4, 20), per_commit=10, timed=16, draws=4)


def rollouts(commit: int, count: int) -> list[Rollout]:
    """Return the rollouts of one commit, of 64 tokens each."""
    ids = np.random.default_rng(commit).integers(2, VOCABULARY, (count, PROMPT + RESPONSE), dtype=np.uint32)
    mask = np.ones(RESPONSE, np.bool_)
    return [Rollout(f"{commit}/s{i}/g0", line[:PROMPT], line[PROMPT:], mask, "stop") for i, line in enumerate(ids)]


def write(kind: str, folder: Path, first: int, last: int, plan: Plan) -> Callable[[], Found]:
    """Add commits; gives the seconds of each of the last ones, and of the slowest of all."""
    opening, clock = STORES[kind], Clock()
    warm_up(opening)
    before = memory("VmRSS")
    store = opening.open_or_create(folder, tiny_manifest(VOCABULARY))

    def work() -> Found:
        spent: Found = {"append_s": [], "append_scores_s": []}
        for commit in range(first, last):
            made = rollouts(commit, plan.per_commit)
            scores = [Scores.of(rollout, np.full(RESPONSE, -1.0, np.float32)) for rollout in made]
            for name, add in (
                ("append_s", lambda made=made: store.append(made)),
                ("append_scores_s", lambda scores=scores: store.append_scores("teacher", tiny_provenance(), scores)),
            ):
                clock.timed(add)()
                spent[name].append(clock.read())
        kept = min(plan.timed, (last - first) // 2)
        found = {name: seconds[-kept:] for name, seconds in spent.items()}
        files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
        size = {"bytes": sum(files), "files": len(files), "bookkeeping_bytes": (sum(files) - store.stored_bytes()) / last}
        return {**found, **size, "writer_mb": taken_since(before), "slowest_append_s": max(spent["append_s"])}

    return work


def taken_since(before: float) -> float:
    """Return the megabytes by which this process has grown, at least 0.1: less is chance, and has no logarithm."""
    return max(memory("VmRSS") - before, 0.1)


def look(kind: str, folder: Path, plan: Plan) -> Callable[[], Found]:
    """Return a function that times opens, reads of random rows, a read of all rows in order, and a query for the rollouts of one commit."""
    opening, clock = STORES[kind], Clock()
    warm_up(opening)
    before = memory("VmRSS")
    store = opening.open(folder)
    store.read([0])

    def work() -> Found:
        nonlocal store
        found: Found = {"open_s": [], "read_s": []}
        for _ in range(plan.draws):
            store = clock.timed(opening.open)(folder)
            found["open_s"].append(clock.read())
        rng = np.random.default_rng(0)
        for i in range(plan.draws + 1):
            rows = rng.integers(0, len(store), READ).tolist()
            clock.timed(store.read)(rows, ("teacher",))
            # the first one reads where rows are
            found["first_read_s" if i == 0 else "read_s"] = clock.read() if i == 0 else [*found["read_s"], clock.read()]
        found["reader_mb"] = taken_since(before)
        many = min(len(store), 20_000)
        clock.timed(store.read)(range(many), ("teacher",))
        found["tokens_per_s"] = many * (PROMPT + RESPONSE) / clock.read()
        clock.timed(ask)(store)
        return {**found, "query_s": clock.read()}

    return work


def ask(store: Any) -> int:
    """Count the rows whose id begins with `1/`: by a LanceDB query where the store has a table, and by reading all rollouts elsewhere."""
    if hasattr(store, "table"):
        table = store.table().search().where("CAST(rollout_id AS STRING) LIKE '1/%'").select(["row"])
        return len(table.to_arrow())
    rows = range(len(store))
    return sum(row.rollout.rollout_id.startswith("1/") for start in rows[::4096] for row in store.read(rows[start : start + 4096]))


def slope(commits: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of the log values over the log commits."""
    return float(np.polyfit(np.log10(commits), np.log10(values), 1)[0])


def exponents(rows: list[Found], cost: str) -> Found:
    """Return the slope over all sizes, with its interval, and the slope between the two largest sizes."""
    commits, rng = [row["commits"] for row in rows], np.random.default_rng(0)
    timed = [np.atleast_1d(row["timed"].get(cost, row[cost])) for row in rows]
    middle = np.mean if cost.startswith("append") else np.median
    again = [slope(commits, [float(middle(rng.choice(values, values.size))) for values in timed]) for _ in range(400)]
    low, high = np.percentile(again, [2.5, 97.5]).tolist()
    return {
        "all": slope(commits, [row[cost] for row in rows]),
        "low": low,
        "high": high,
        "last": slope(commits[-2:], [row[cost] for row in rows[-2:]]),
    }


def measure(kind: str, plan: Plan, folder: Path) -> list[Found]:
    """Return a row for each size, and one of exponents."""
    rows, before = [], 0
    for size in plan.sizes:
        with Workers(1) as writer:
            (written,) = writer.run(write, [{"kind": kind, "folder": folder, "first": before, "last": size, "plan": plan}])
        with Workers(1) as reader:
            (looked,) = reader.run(look, [{"kind": kind, "folder": folder, "plan": plan}])
        before, found = size, {**written, **looked}
        timed = {name: value for name, value in found.items() if isinstance(value, list)}
        single = {name: statistics.mean(value) if name.startswith("append") else statistics.median(value) for name, value in timed.items()}
        rows.append(
            {
                "kind": "commits",
                "store": kind,
                "commits": size,
                "rollouts": size * plan.per_commit,
                **found,
                **single,
                "timed": timed,
            }
        )
        print({name: value for name, value in rows[-1].items() if name != "timed"}, flush=True)
    slopes = {cost: exponents(rows, cost) for cost in COSTS}
    return [
        *({name: value for name, value in row.items() if name != "timed"} for row in rows),
        {"kind": "exponents", "store": kind, **slopes},
    ]


def find_goals(rows: list[Found]) -> list[Found]:
    """Judge the exponents of all costs, and among a million rollouts the memory of each and the time of a read of random rows."""
    goals = []
    for row, (cost, name) in product([row for row in rows if row["kind"] == "exponents"], COSTS.items()):
        value = row[cost]["all"]
        goals.append(
            {
                "name": f"{name} grows with commits to this power ({row['store']})",
                "goal": f"<= {EXPONENT}",
                "measured": value,
                "met": value <= EXPONENT,
            }
        )
    for row in rows:
        if row.get("rollouts", 0) >= MILLION:
            for cost, taken in MEMORY.items():
                value = 1e6 * row[cost] / row["rollouts"]
                name = f"{taken}, bytes a rollout, {row['rollouts']:,} rollouts that nobody compacted ({row['store']})"
                goals.append({"name": name, "goal": f"<= {STATE_BYTES:g}", "measured": value, "met": value <= STATE_BYTES})
            value = 1e3 * row["read_s"]
            name = f"{READ} random rows of {row['rollouts']:,} rollouts that nobody compacted, ms ({row['store']})"
            goals.append({"name": name, "goal": f"<= {READ_MS:g}", "measured": value, "met": value <= READ_MS})
    return goals


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    parser.add_argument("--largest", type=int, help="go to so many commits only")
    parser.add_argument("--out", type=Path, help="folder of the result")
    options = parser.parse_args()
    plan, rows = QUICK if options.quick else Plan(), []
    if options.largest:
        plan = Plan(sizes=tuple(size for size in plan.sizes if size <= options.largest))
    for kind in options.stores:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(kind, plan, Path(folder) / "store")
            shutil.rmtree(folder, ignore_errors=True)
    goals = find_goals(rows)
    for row in (*(row for row in rows if row["kind"] == "exponents"), *goals):
        print(row)
    home = options.out or (ROOT / "runs" / "commits-quick" if options.quick else None)
    result_file("commits", describe_machine(), rows, goals, *([home] if home else []))


if __name__ == "__main__":
    main()
