"""What stored supports add to the quickstart: from its SFT student, the same rollouts with more stored of each token.

    make bench-quickstart-supports     # after `make quickstart`; about ten minutes

Same start, rollouts, order, optimizer, steps and held-out prompts as the quickstart's Lightning and online OPD, which are not run again.
Draws change no token, so sampling once more with them gives the very rollouts that the quickstart stored.
Writes `benchmarks/results/quickstart_supports.json`.
"""

import json
from pathlib import Path
from typing import Any

import attrs
import quickstart
from phases import console
from quickstart_losses import finished, numbers, phase, sums_of
from record import ROOT, result_file

from lopd import FusedLoss, SamplingParams, TopKObjective, ZarrStore, batches, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.losses.divergences import reverse_kl
from lopd.tools.console import table
from lopd.verbs import StepStream

WIDTH = 16
BUCKET, RESIDUAL = (TopKObjective(reverse_kl, residual=residual) for residual in (False, True))
#: Column -> what the teacher is asked for.
COLUMNS = {"own": {"top_k": WIDTH}, "candidates": {"candidates": WIDTH}, "drawn": {"drawn": WIDTH}}
ARMS = {
    "teacher's top 16": ("own", BUCKET),
    "teacher's top 16, residual": ("own", RESIDUAL),
    "16 candidates, residual": ("candidates", RESIDUAL),
    "16 drawn": ("drawn", RESIDUAL),
}


def main() -> None:
    """Store, train each arm, measure it, write the table."""
    base, scratch = ROOT / "runs" / "quickstart", ROOT / "runs" / "quickstart_supports"
    settings = quickstart.Settings(**json.loads((base / "settings.json").read_text()))
    start, ratio = (sums_of(phase(base, f"evaluate-after-{name}")) for name in ("sft", "opd"))
    rows = [
        {"variant": "after SFT", **numbers(start, start)},
        {"variant": "Lightning, ratio to ref (the quickstart)", **finished(base, "opd", "lightning-opd", start)},
        {"variant": "online OPD, ratio to ref (the quickstart)", **finished(base, "online-opd", "online-opd", start)},
    ]
    store = make_store(base, scratch / "store.zarr", settings)
    goals: list[dict[str, Any]] = []
    for name, (column, objective) in ARMS.items():
        folder = scratch / name.replace(" ", "-").replace(",", "").replace("'", "")
        loss = FusedLoss(objective)
        quickstart.train(folder, "opd", base / "sft", steps_of(store, column, settings), loss, settings.opd_lr, settings)
        prompts = quickstart.split_prompts(settings, base / "models" / "teacher")[2]
        sums = sums_of(quickstart.evaluate(folder / "opd", base / "models" / "teacher", prompts, settings))
        against = sums.minus(ratio)
        rows.append({"variant": name, **numbers(sums, start), "against_ratio": against.mean, "against_ratio_ci95": against.ci95})
        goals.append(
            {
                "name": f"{name}: held-out reverse KL minus that of the ratio, same prompts (nats per token)",
                "goal": "interval below 0",
                "measured": against.mean,
                "ci95": against.ci95,
                "met": against.high < 0,
            }
        )
        console.print(rows[-1])
    result_file("quickstart_supports", json.loads((base / "metrics.json").read_text()), rows, goals)
    columns = ["variant", "held_out_reverse_kl", "ci95", "change", "change_ci95"]
    console.print(table("OPD from the same SFT student", columns, [[row[c] for c in columns] for row in rows]))


def make_store(base: Path, path: Path, settings: quickstart.Settings) -> ZarrStore:
    """The quickstart's rollouts, with candidates and draws of the policy, and a column of the teacher for each kind of support."""
    sampling = SamplingParams(max_new_tokens=settings.max_new_tokens, seed=settings.seed, candidates=WIDTH, drawn=WIDTH)
    source = HFSource.from_folder(base / "sft", sampling, device=settings.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    store = ZarrStore.open_or_create(path, source.manifest)
    collect_rollouts(source, quickstart.split_prompts(settings, base / "models" / "teacher")[1], store, prompts_per_batch=64)
    scorer = HFScorer.from_folder(base / "models" / "teacher", device=settings.device)
    for column, widths in COLUMNS.items():
        score_rollouts(store, attrs.evolve(scorer, **widths), column=column, rollouts_per_batch=32)
    return store


def steps_of(store: ZarrStore, column: str, settings: quickstart.Settings) -> StepStream:
    """The steps of the quickstart, on this column."""
    return batches(
        store,
        rollouts_per_step=settings.opd_rollouts_per_step,
        tokens_per_batch=settings.tokens_per_batch,
        seed=settings.seed,
        teacher=column,
        ref="policy",
        top_k=True,
    )[: settings.opd_steps]


if __name__ == "__main__":
    main()
