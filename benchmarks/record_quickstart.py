"""Keep a quickstart run as evidence: `benchmarks/results/quickstart.json`, `docs/quickstart.png`, and the table in README.md.

    make quickstart && .venv/bin/python benchmarks/record_quickstart.py

Nothing in the README's table is typed by hand.
"""

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "quickstart"
BEGIN, END = "<!-- quickstart table: written by benchmarks/record_quickstart.py -->", "<!-- end of quickstart table -->"


def main() -> None:
    """Read the run, write the three files."""
    report = json.loads((RUN / "metrics.json").read_text())
    result = as_result(report)
    path = ROOT / "benchmarks" / "results" / "quickstart.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy(RUN / "curves.png", ROOT / "docs" / "quickstart.png")
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{table(report['phases'])}\n{END}{rest.split(END)[1]}")


def as_result(report: dict[str, Any]) -> dict[str, Any]:
    """The run in the form of all result files, with the goals of the quickstart."""
    held_out = {p["name"]: p for p in report["phases"] if p["held_out_reverse_kl"] is not None}
    before, after = held_out["evaluate after SFT"], held_out["evaluate after OPD"]
    fall = before["held_out_reverse_kl"] - after["held_out_reverse_kl"]
    offline = [p for p in report["phases"] if "online" not in p["name"]]
    seconds, peak = sum(p["wall_s"] for p in offline), max(p["peak_rss_gib"] for p in offline)
    goals = [
        {
            "name": "held-out reverse KL falls in the OPD phase by more than its 95 % half-width (nats per token)",
            "goal": f"> {after['ci95']:.4f}",
            "measured": fall,
            "met": fall > after["ci95"],
        },
        {"name": "wall time after installation, on 2 cores (s)", "goal": "<= 600", "measured": seconds, "met": seconds <= 600},
        {"name": "peak memory (GiB)", "goal": "< 8", "measured": peak, "met": peak < 8},
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    machine = {**report["machine"], "system": platform.system()}
    return {"machine": machine, "versions": report["versions"], "commit": commit, "rows": report["phases"], "goals": goals}


def table(phases: list[dict[str, Any]]) -> str:
    """The phases as a Markdown table."""
    lines = ["| phase | wall s | tokens | held-out reverse KL, nats per token (95 %) |", "|---|--:|--:|--:|"]
    for p in phases:
        value = "" if p["held_out_reverse_kl"] is None else f"{p['held_out_reverse_kl']:.3f} ± {p['ci95']:.3f}"
        lines.append(f"| {p['name']} | {p['wall_s']:.0f} | {p['tokens']:,} | {value} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
