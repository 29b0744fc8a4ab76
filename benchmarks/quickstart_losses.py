"""Plain Lightning OPD beside the per-token importance ratio and online OPD, from the SFT student of a finished quickstart.

    make bench-quickstart

Same start, order, optimizer, steps and held-out prompts; the offline ones share the stored rollouts too.
Writes `benchmarks/results/quickstart_losses.json`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import quickstart
from phases import Run, console
from record import ROOT, result_file

from lopd.records import RolloutSums
from lopd.tools.console import table

VARIANTS = {"Lightning, ratio 1 (plain)": {"ratio_to_ref": False}}


def main() -> None:
    """Train each variant, measure it, write the table."""
    base, scratch = ROOT / "runs" / "quickstart", ROOT / "runs" / "quickstart_losses"
    settings = quickstart.Settings(**json.loads((base / "settings.json").read_text()))
    start = sums_of(phase(base, "evaluate-after-sft"))
    rows = [{"variant": "after SFT", **numbers(start, start), "stored_reverse_kl": None}]
    for name, changes in VARIANTS.items():
        folder = scratch / "-".join(str(value) for value in changes.values())
        rows.append({"variant": name, **run_variant(base, folder, attrs.evolve(settings, **changes), start)})
    rows.append({"variant": "Lightning, ratio to ref (the quickstart)", **finished(base, "opd", "lightning-opd", start)})
    rows.append({"variant": "online OPD, ratio to ref", **finished(base, "online-opd", "online-opd", start)})
    result_file("quickstart_losses", json.loads((base / "metrics.json").read_text()), rows, [])
    columns = ["variant", "held_out_reverse_kl", "ci95", "change", "change_ci95"]
    console.print(table("OPD from the same SFT student", columns, [[row[c] for c in columns] for row in rows]))


def phase(base: Path, name: str) -> dict[str, Any]:
    """What a finished phase of the quickstart left."""
    row: dict[str, Any] = json.loads((base / "phases" / f"{name}.json").read_text())
    return row


def finished(base: Path, evaluated: str, trained: str, start: RolloutSums) -> dict[str, Any]:
    """A variant that the quickstart itself ran; what online OPD trains on is fresh, so it has no number on stored rollouts."""
    stored = None if trained == "online-opd" else [m["reverse_kl"] for m in phase(base, trained)["history"]]
    return {**numbers(sums_of(phase(base, f"evaluate-after-{evaluated}")), start), "stored_reverse_kl": stored}


def run_variant(base: Path, folder: Path, settings: quickstart.Settings, start: RolloutSums) -> dict[str, Any]:
    """One variant from the quickstart's SFT student; its folder is removed when it is measured."""
    prompts = quickstart.split_prompts(settings, base / "models" / "teacher")[2]
    run = Run(folder)
    steps = quickstart.opd_batches(str(base / "store.zarr"), settings)
    trained = quickstart.train(run.folder, "opd", base / "sft", steps, quickstart.opd_loss(settings), settings.opd_lr, settings)
    sums = sums_of(quickstart.evaluate(folder / "opd", base / "models" / "teacher", prompts, settings))
    shutil.rmtree(folder)
    return {**numbers(sums, start), "stored_reverse_kl": [m["reverse_kl"] for m in trained["history"]]}


def sums_of(row: dict[str, Any]) -> RolloutSums:
    """The sums of an evaluation."""
    return RolloutSums(np.array(row["per_rollout"]["sums"]), np.array(row["per_rollout"]["counts"]))


def numbers(sums: RolloutSums, start: RolloutSums) -> dict[str, float]:
    """Held-out reverse KL, and its change against the start over the same prompts."""
    kl, change = sums.per_token(), sums.minus(start)
    return {"held_out_reverse_kl": kl.mean, "ci95": kl.ci95, "change": change.mean, "change_ci95": change.ci95}


if __name__ == "__main__":
    main()
