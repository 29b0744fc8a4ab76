"""Plain Lightning OPD beside the per-token importance ratio, from the student and the store of a finished quickstart.

    make bench-quickstart

Same start, rollouts, order, optimizer and held-out prompts; only the loss differs.  Writes `benchmarks/results/quickstart_losses.json`.
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

from lopd.console import table
from lopd.metrics import RolloutSums

VARIANTS = {
    "plain, clip 10 (the paper's)": {"ratio_to_ref": False, "clip": 10.0},
    "plain, clip 1": {"ratio_to_ref": False, "clip": 1.0},
    "ratio to ref, clip 10 (the quickstart's)": {"ratio_to_ref": True, "clip": 10.0},
    "ratio to ref, clip 1": {"ratio_to_ref": True, "clip": 1.0},
}


def main() -> None:
    """Train each variant, measure it, write the table."""
    base, scratch = ROOT / "runs" / "quickstart", ROOT / "runs" / "quickstart_losses"
    settings = quickstart.Settings(**json.loads((base / "settings.json").read_text()))
    start = sums_of(json.loads((base / "phases" / "evaluate-after-sft.json").read_text()))
    rows = [{"variant": "after SFT", **numbers(start, start), "stored_reverse_kl": None}]
    for name, changes in VARIANTS.items():
        variant = attrs.evolve(settings, **changes)
        folder = scratch / name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "").replace("'", "")
        rows.append({"variant": name, **run_variant(base, folder, variant, start)})
    plain, ratio = rows[1], rows[3]
    goals = [
        {
            "name": "the quickstart's loss lowers held-out reverse KL by more than the paired 95 % half-width (nats per token)",
            "goal": f"< -{ratio['change_ci95']:.4f}",
            "measured": ratio["change"],
            "met": ratio["change"] < -ratio["change_ci95"],
        },
        {
            "name": "plain Lightning does so too (it need not: this is the reason for the choice)",
            "goal": f"< -{plain['change_ci95']:.4f}",
            "measured": plain["change"],
            "met": plain["change"] < -plain["change_ci95"],
        },
    ]
    result_file("quickstart_losses", json.loads((base / "metrics.json").read_text()), rows, goals)
    columns = ["variant", "held_out_reverse_kl", "ci95", "change", "change_ci95"]
    console.print(table("OPD from the same SFT student and store", columns, [[row[c] for c in columns] for row in rows]))


def run_variant(base: Path, folder: Path, settings: quickstart.Settings, start: RolloutSums) -> dict[str, Any]:
    """One variant from the quickstart's SFT student; its folder is removed when it is measured."""
    prompts = quickstart.split_prompts(settings, base / "models" / "teacher")[2]
    run = Run(folder)
    steps = quickstart.opd_batches(base / "store.zarr", settings)
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
