"""What `bench_scale` makes of its runs: speed-ups and what limits them, exponents, and goals."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from scale_growth import COSTS, READ, exponents
from scale_parts import ALONE, APART, DDP, FSDP, SHARES
from scale_workers import Found

#: Arms of scoring; the first character is the number of workers.
ALONE_SCORING, APART_SCORING, RAY = "1, without Ray", "2, without Ray", "Ray"
RAY_AHEAD = "Ray, two batches at once"
#: What each arm of one repeat found, a process each.
Run = Mapping[str, Sequence[Found]]


def spread(values: Sequence[float]) -> Found:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def over(runs: Sequence[Run], figure: Callable[[Run], float]) -> Found:
    """Return the spread of a figure over repeats; ratios are those of runs beside each other."""
    return spread([figure(run) for run in runs])


def rate(found: Sequence[Found]) -> float:
    """Return the tokens a second of processes that do not wait for each other."""
    return sum(_total(one, "tokens") / _total(one, "wall_s") for one in found)


def _total(found: Found, name: str) -> float:
    value = found[name]
    return sum(value) if isinstance(value, list) else value


def multiples(run: Run) -> Found:
    """Return the seconds of training over half of those of one rank, each with one more cost than the one before.

    DDP and FSDP2 both follow the last.
    """
    ideal = _total(run[ALONE][0], "wall_s") / 2
    by_rank = [found["wall_s"] for found in run[SHARES]]
    return {
        "bandwidth": 2 * rate(run[ALONE]) / rate(run[APART]),
        "repeated": statistics.mean(map(sum, by_rank)) / ideal,
        "slowest": sum(map(max, zip(*by_rank, strict=True))) / ideal,
        **{arm: max(_total(found, "wall_s") for found in run[arm]) / ideal for arm in (DDP, FSDP)},
    }


def lost(run: Run, arm: str) -> Found:
    """Return where the time of two ranks goes beyond half of the time of one, in units of that half."""
    steps = multiples(run)
    return {
        "two processes slow each other down": steps["bandwidth"] - 1,
        "each rank updates all weights, and its micro-batches are smaller and less even": steps["repeated"] - steps["bandwidth"],
        "waiting for the slower rank": steps["slowest"] - steps["repeated"],
        "collectives, and waiting in them": steps[arm] - steps["slowest"],
    }


def share(found: Sequence[Found], name: str) -> float:
    """Return one of the times as a share of the wall time of these processes."""
    return sum(_total(one, name) for one in found) / sum(_total(one, "wall_s") for one in found)


def cpu(found: Sequence[Found]) -> float:
    """Return the processor seconds of all these processes, without waiting and without time that others take from them."""
    return sum(_total(one, "cpu_s") for one in found)


def cpu_per_token(found: Sequence[Found]) -> float:
    """Return the same over the tokens of each."""
    return cpu(found) / sum(_total(one, "tokens") for one in found)


def training_rows(runs: Sequence[Run], per_step: int) -> list[Found]:
    """Return the rows of every arm, at steps of so many rollouts."""
    ceiling = over(runs, lambda run: rate(run[APART]) / rate(run[ALONE]) / 2)
    slower = over(runs, lambda run: cpu_per_token(run[APART]) / cpu_per_token(run[ALONE]))
    rows = [{"arm": APART, "tokens_per_s": over(runs, lambda run: rate(run[APART])), "efficiency": ceiling, "cpu_s_over_one_rank": slower}]
    for arm in (ALONE, DDP, FSDP):
        tokens = over(runs, lambda run, arm=arm: _total(run[arm][0], "tokens") / max(_total(found, "wall_s") for found in run[arm]))
        shares = {name: over(runs, lambda run, arm=arm, name=name: share(run[arm], f"{name}_s")) for name in ("cpu", "read", "update")}
        row = {"arm": arm, "tokens_per_s": tokens, "share_of_wall_time": shares}
        row["step_s"] = over(runs, lambda run, arm=arm: statistics.median(run[arm][0]["wall_s"]))
        if arm != ALONE:
            row["cpu_s_over_one_rank"] = over(runs, lambda run, arm=arm: cpu(run[arm]) / cpu(run[ALONE]))
            row["efficiency"] = over(runs, lambda run, arm=arm: 1 / multiples(run)[arm])
            row["over_ceiling"] = over(runs, lambda run, arm=arm: multiples(run)["bandwidth"] / multiples(run)[arm])
            row["lost"] = {name: over(runs, lambda run, arm=arm, name=name: lost(run, arm)[name]) for name in lost(runs[0], arm)}
        rows.append(row)
    return [{"kind": "training", **row, "arm": f"{row['arm']}, {per_step} rollouts a step"} for row in rows]


def scoring_rows(runs: Sequence[Run]) -> list[Found]:
    """Return the rows of every arm; of two workers also how much faster they are than one, and than two processes without Ray."""
    rows = []
    for arm in runs[0]:
        row = {"kind": "scoring", "arm": arm, "tokens_per_s": over(runs, lambda run, arm=arm: rate(run[arm]))}
        if arm.startswith("2"):
            row["efficiency"] = over(runs, lambda run, arm=arm: speed_up(run, arm) / 2)
            row["over_ceiling"] = over(runs, lambda run, arm=arm: speed_up(run, arm) / speed_up(run, APART_SCORING))
            row["over_processes_without_ray"] = over(runs, lambda run, arm=arm: rate(run[arm]) / rate(run[APART_SCORING]))
        whose = "cpu_share" if arm in {ALONE_SCORING, APART_SCORING} else "cpu_share_of_the_process_that_commits"
        row[whose] = over(runs, lambda run, arm=arm: share(run[arm], "cpu_s"))
        rows.append(row)
    return rows


def speed_up(run: Run, arm: str) -> float:
    """Return the speed of two over that of one, all else alike."""
    return rate(run[arm]) / rate(run[f"1{arm[1:]}"])


def loading_rows(runs: Mapping[tuple[str, int], Sequence[Sequence[Found]]]) -> list[Found]:
    """Return the tokens a second of all readers and of each, and of a second of processor time."""
    rows = []
    for (kind, readers), repeats in runs.items():
        everything = spread([rate(found) for found in repeats])
        each = {name: value / readers for name, value in everything.items()}
        row = {"kind": "loading", "store": kind, "readers": readers, "tokens_per_s": everything, "tokens_per_s_of_each": each}
        row["tokens_per_cpu_s"] = spread([sum(one["tokens"] for one in found) / sum(one["cpu_s"] for one in found) for found in repeats])
        rows.append({**row, "cpu_share": spread([share(found, "cpu_s") for found in repeats])})
    return rows


def growth_rows(found: Sequence[Found]) -> list[Found]:
    """Return the rows as measured, with the exponent of every cost."""
    rows = [{"kind": "growth", **row} for row in found]
    for kind in dict.fromkeys(row["store"] for row in found):
        mine = [row for row in found if row["store"] == kind]
        names = (*COSTS, "read_compacted_s", "bytes_per_rollout", "write_s")
        rows.append({"kind": "exponents", "store": kind, **{name: exponents(mine, name) for name in names}})
    return rows


def find_goals(rows: Sequence[Found]) -> list[Found]:
    """Return the goals of the parts that were measured."""
    found: list[tuple[str, str, float, bool]] = []
    for row in rows:
        if row["kind"] == "scoring" and row["arm"] == f"2, {RAY}":
            value = row["over_ceiling"]["median"]
            found.append(("scoring efficiency at 2 workers, over the machine's own ceiling", ">= 0.9", value, value >= 0.9))
        elif row["kind"] == "training" and row["arm"].startswith(DDP):
            value = row["over_ceiling"]["median"]
            name = f"training efficiency at 2 ranks (DDP), over the ceiling{row['arm'].removeprefix(DDP)}"
            found.append((name, ">= 0.9", value, value >= 0.9))
        elif row["kind"] == "exponents":
            value = max(row["read_s"].values())
            name = f"read of {READ} random rows grows slower than rollouts^0.5 ({row['store']})"
            found.append((name, "< 0.5, over all sizes and over the last decade", value, value < 0.5))
    growth = [row for row in rows if row["kind"] == "growth" and row["store"] == "zarr"]
    if growth:
        largest = growth[-1]
        name = f"open at 1e{math.log10(largest['rollouts']):g} rollouts under 1 s (first time in a process)"
        found.append((name, "< 1", largest["open_s"], largest["open_s"] < 1))
    return [{"name": name, "goal": goal, "measured": value, "met": bool(met)} for name, goal, value, met in found]
