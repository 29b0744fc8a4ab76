"""Tables of docs/scale.md: what the planner says, how it stands beside the paper's table 2, and what `bench_scale` measured.

python benchmarks/scale_docs.py     # benchmarks/results/plan.json, and between the markers of docs/scale.md; a second
"""

import json
from collections.abc import Iterator
from typing import Any

from record import ROOT, describe_machine, fill, result_file

from lopd.plan import PAPER_LOCKSTEP, TABLE_2, Work, lightning, lockstep_of, online, rates_like

GPUS, RESPONSE = 64, 3072
#: "Nearly": how far a prediction may be from what the paper reports.
NEAR = {"Lightning": 0.1, "online": 0.25}


def planned() -> Iterator[dict[str, Any]]:
    """Three sizes."""
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
    """Rows of table 2."""
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
    """Whether predictions are near what is reported."""
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
    """Three figures, as people write them."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def range_of(found: dict[str, float]) -> str:
    """Median and, in brackets, smallest and largest."""
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def plan_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """GPU-hours by size."""
    yield "| stored tokens | store, GB | rollouts | scores | training | Lightning OPD | wall, days | online OPD, at least | in lockstep |"
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        names = ("store_gb", "rollouts", "scores", "training", "lightning", "wall_days", "online_at_least", "online_in_lockstep")
        yield f"| {row['tokens']:.0e} | " + " | ".join(number(row[name]) for name in names) + " |"


def check_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """GPU-hours that are reported, beside predictions."""
    yield "| GPU-hours | Lightning, reported | predicted | online, reported | at least | in lockstep | lockstep factor that its hours imply |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        names = ("lightning_reported", "lightning", "online_reported", "online_at_least", "online_in_lockstep", "lockstep")
        yield f"| {row['name']} | " + " | ".join(number(row[name]) for name in names) + " |"


def scale_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Training and scoring by two, loading by several."""
    yield "| | tokens a second | of twice the speed of one | over the ceiling |"
    yield "|---|--:|--:|--:|"
    for row in rows:
        if row["kind"] in {"training", "scoring"} and "tokens_per_s" in row:
            shares = [range_of(row[name]) if name in row else "" for name in ("efficiency", "over_ceiling")]
            yield f"| {row['kind']}: {row['arm']} | {range_of(row['tokens_per_s'])} | " + " | ".join(shares) + " |"
    for row in rows:
        if row["kind"] == "loading":
            yield f"| loading, {row['store']}: {row['readers']} readers | {range_of(row['tokens_per_s'])} | | |"


def lost_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Where the time of two ranks goes."""
    training = [row for row in rows if "lost" in row]
    names = list(training[0]["lost"])
    yield f"| | {' | '.join(names)} |"
    yield f"|---|{'--:|' * len(names)}"
    for row in training:
        yield f"| {row['arm']} | {' | '.join(format(row['lost'][name]['median'], '+.0%') for name in names)} |"


def growth_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Milliseconds by rollouts."""
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
        fill(page, "scale table", list(scale_table(rows)))
        fill(page, "lost table", list(lost_table(rows)))
        fill(page, "growth table", list(growth_table(rows)))


if __name__ == "__main__":
    main()
