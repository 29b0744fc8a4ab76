"""Tables of docs/scale.md: what the planner predicts, beside the paper's table 2, and what `bench_scale` measured.

python benchmarks/scale_docs.py     # benchmarks/results/plan.json, and between the markers of docs/scale.md; a second
"""

import json
from collections.abc import Iterator
from typing import Any

from record import ROOT, describe_machine, fill, result_file

from lopd.tools.plan import PAPER_LOCKSTEP, TABLE_2, Work, lightning, lockstep_of, online, rates_like

GPUS, RESPONSE = 64, 3072
#: "Nearly": how far a prediction may be from what the paper reports.
NEAR = {"Lightning": 0.1, "online": 0.25}


def planned() -> Iterator[dict[str, Any]]:
    """Yield plans of three sizes."""
    for tokens in (1e6, 1e9, 1e12):
        work = Work(prompts=round(tokens / RESPONSE), response_tokens=RESPONSE)
        rates = rates_like(work)
        offline, at_least, lockstep = lightning(work, rates, GPUS), online(work, rates, GPUS), online(work, rates, GPUS, PAPER_LOCKSTEP)
        yield {
            "kind": "plan",
            "tokens": tokens,
            "store_gb": offline.store_bytes / 1e9,
            **{phase.name: phase.gpu_hours for phase in offline.phases},
            "lightning": offline.gpu_hours,
            "wall_days": offline.wall_hours / 24,
            "online_at_least": at_least.gpu_hours,
            "online_in_lockstep": lockstep.gpu_hours,
            "longest": offline.bottleneck.name,
            "limit": offline.bottleneck.limit,
        }


def checked() -> Iterator[dict[str, Any]]:
    """Yield the rows of table 2."""
    for name, row in TABLE_2.items():
        rates = rates_like(row.work)
        yield {
            "kind": "table 2",
            "name": name,
            "lightning_reported": row.total,
            "lightning": lightning(row.work, rates, 8).gpu_hours,
            "online_reported": row.online,
            "online_at_least": online(row.work, rates, 8).gpu_hours,
            "online_in_lockstep": online(row.work, rates, 8, PAPER_LOCKSTEP).gpu_hours,
            "lockstep": lockstep_of(row),
        }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge whether predictions are near what is reported."""
    found = []
    for row in rows:
        for name, given, made in (
            ("Lightning", "lightning_reported", "lightning"),
            ("online", "online_reported", "online_in_lockstep"),
        ):
            off = row[made] / row[given] - 1
            what = f"GPU-hours of {name}, {row['name']}: predicted over reported"
            found.append({"name": what, "goal": f"within {NEAR[name]:.0%}", "measured": 1 + off, "met": abs(off) <= NEAR[name]})
    return found


def number(value: float) -> str:
    """Format a number with three figures, as people write them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def range_of(found: dict[str, float]) -> str:
    """Return median and, in brackets, smallest and largest."""
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def plan_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of GPU-hours by size."""
    titles = {
        "rollouts": "rollouts, GPU-hours",
        "scores": "scores, GPU-hours",
        "training": "training, GPU-hours",
        "lightning": "**Lightning OPD, GPU-hours**",
        "online_at_least": "online OPD, at least, GPU-hours",
        "online_in_lockstep": "online OPD, in lockstep, GPU-hours",
        "wall_days": "Lightning OPD, wall, days",
        "store_gb": "store, GB",
    }
    return turned("stored response tokens", [format(row["tokens"], ".0e") for row in rows], titles, rows)


def check_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of reported GPU-hours, beside predictions."""
    titles = {
        "lightning_reported": "Lightning OPD, reported",
        "lightning": "Lightning OPD, predicted",
        "online_reported": "online OPD, reported",
        "online_at_least": "online OPD, predicted, at least",
        "online_in_lockstep": "online OPD, predicted, in lockstep",
        "lockstep": "lockstep factor that its hours imply",
    }
    return turned("GPU-hours", [row["name"] for row in rows], titles, rows)


def turned(corner: str, heads: list[str], titles: dict[str, str], rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table with a column for each row, and a line for each of its values that has a title."""
    yield f"| {corner} | {' | '.join(heads)} |"
    yield f"|---|{'--:|' * len(rows)}"
    for name, title in titles.items():
        yield f"| {title} | {' | '.join(number(row[name]) for row in rows)} |"


def pairs_table(rows: list[dict[str, Any]], kind: str) -> Iterator[str]:
    """Yield the table of training, or scoring, by one process and by two."""
    yield f"| {kind} | read tokens a second | of twice the speed of one | over the ceiling |"
    yield "|---|--:|--:|--:|"
    for row in rows:
        if row["kind"] == kind and "tokens_per_s" in row:
            shares = [range_of(row[name]) if name in row else "" for name in ("efficiency", "over_ceiling")]
            yield f"| {row['arm']} | {range_of(row['tokens_per_s'])} | " + " | ".join(shares) + " |"


def loading_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of loading by several processes."""
    yield "| store | readers | million tokens a second |"
    yield "|---|--:|--:|"
    for row in rows:
        if row["kind"] == "loading":
            speed = {name: value / 1e6 for name, value in row["tokens_per_s"].items()}
            yield f"| {row['store']} | {row['readers']} | {range_of(speed)} |"


def lost_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of where the time of two ranks goes."""
    training = [row for row in rows if "lost" in row]
    yield f"| | {' | '.join(row['arm'].removeprefix('2 ranks, ') for row in training)} |"
    yield f"|---|{'--:|' * len(training)}"
    for name in training[0]["lost"]:
        yield f"| {name} | {' | '.join(format(row['lost'][name]['median'], '+.0%') for row in training)} |"


def growth_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of milliseconds by rollouts."""
    yield "| store | rollouts | commits | open, ms | read 64 random rows, ms | the same when compacted | refresh, ms | compact, s | bytes a rollout |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        if row["kind"] == "growth":
            cells = [f"{1e3 * row[name]:.3g}" for name in ("open_s", "read_s", "read_compacted_s", "refresh_s")]
            what, size = f"{row['store']} | {row['rollouts']:,} | {row['commits']}", f"{row['bytes_per_rollout']:.0f}"
            yield f"| {what} | {' | '.join(cells)} | {row['compact_s']:.3g} | {size} |"


def main() -> None:
    """Write and fill."""
    plans, checks, page = list(planned()), list(checked()), ROOT / "docs" / "scale.md"
    result_file("plan", describe_machine(), [*plans, *checks], goals(checks))
    fill(page, "plan table", list(plan_table(plans)))
    fill(page, "check table", list(check_table(checks)))
    measured = ROOT / "benchmarks" / "results" / "scale.json"
    if measured.exists():
        rows = json.loads(measured.read_text())["rows"]
        fill(page, "training table", list(pairs_table(rows, "training")))
        fill(page, "scoring table", list(pairs_table(rows, "scoring")))
        fill(page, "loading table", list(loading_table(rows)))
        fill(page, "lost table", list(lost_table(rows)))
        fill(page, "growth table", list(growth_table(rows)))


if __name__ == "__main__":
    main()
