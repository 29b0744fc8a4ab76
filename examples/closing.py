"""What the quickstart prints and writes at its end: a table, the differences over the same prompts, `metrics.json`, and a page for a browser."""

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from attrs import asdict

import lopd
from lopd import ZarrStore
from lopd.records import RolloutSums
from lopd.tools.console import table
from lopd.tools.phases import Run, console, wall_time, write_json, write_page

#: Evaluations that are compared over the same prompts.
COMPARED = (("after OPD", "after SFT"), ("after online OPD", "after SFT"), ("after OPD", "after online OPD"))


def finish(run: Run, phases: list[dict[str, Any]], settings: Mapping[str, Any], store: str) -> None:
    """Print the closing table, and write `metrics.json` and `report.html`."""
    rows = [[p["name"], wall_time(p), p["response_tokens"], p["read_tokens"], interval(p)] for p in phases]
    columns = ["phase", "wall s", "response tokens", "read tokens", "held-out reverse KL (nats, 95 %)"]
    console.print(table("Lightning OPD, phase by phase", columns, rows))
    history = {p["name"]: p.pop("history") for p in phases if "history" in p}
    measured = {p["name"].removeprefix("evaluate "): p.pop("per_rollout") for p in phases if "per_rollout" in p}
    sums = {name: RolloutSums(np.array(found["sums"]), np.array(found["counts"])) for name, found in measured.items()}
    changes = {f"{a}, against {b}": sums[a].minus(sums[b]) for a, b in COMPARED if a in sums and b in sums}
    for name, change in changes.items():
        console.print(f"{name}: {change.mean:+.4f} ± {change.ci95:.4f} nats per token, over the same prompts")
    versions = {"lopd": lopd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    paired = {name: asdict(change) for name, change in changes.items()}
    found = {"phases": phases, "change": paired, "history": history["Lightning OPD"]}
    write_json(run.folder / "metrics.json", {**found, "settings": settings, "versions": versions, "machine": machine})
    write_page(run.folder, ZarrStore.open(store), "Lightning OPD: the quickstart")
    console.print(f"total {sum(p['wall_s'] for p in phases):.0f} s; written: {run.folder}/metrics.json, report.html")


def interval(phase: Mapping[str, Any]) -> str:
    """Return `mean ± half-width`, if it was measured."""
    return "" if phase["held_out_reverse_kl"] is None else f"{phase['held_out_reverse_kl']:.4f} ± {phase['ci95']:.4f}"
