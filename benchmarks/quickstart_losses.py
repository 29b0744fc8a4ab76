"""Other losses beside the quickstart's, from the SFT student of a finished quickstart, on its own rollouts and held-out prompts.

    make bench-quickstart

Same start, rollouts, order, optimizer and steps.  The rate of the quickstart's loss is the best of several on another seed, that of the residual the
better of two there; losses on the sampled token keep the rate they had when one of them was the quickstart's, and draws have that of the residual.
Draws of the policy change no token, so sampling once more with them gives the very rollouts that the quickstart stored.
A variant that is measured is kept in `runs/quickstart_losses`, and a second call goes on with the next.
Writes `benchmarks/results/quickstart_losses.json`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import quickstart
from attrs import frozen
from record import ROOT, result_file

from lopd import FusedLoss, FusedOPDLoss, SamplingParams, TopKObjective, ZarrStore, collect_rollouts, score_rollouts
from lopd.engines.hf import HFSource
from lopd.losses.divergences import reverse_kl
from lopd.protocols import OPDLoss
from lopd.records import RolloutSums
from lopd.tools.console import table
from lopd.tools.phases import Run, console, counted_in, digest

BASE, SCRATCH = ROOT / "runs" / "quickstart", ROOT / "runs" / "quickstart_losses"
DRAWS = 16


@frozen
class Variant:
    """Another way to train.

    Args:
        name: in the table.
        loss: for every step.
        lr: learning rate.
        store: where its rollouts and scores are.
        ref: column of the policy; "policy" has its draws.
    """

    name: str
    loss: OPDLoss
    lr: float
    store: Path = BASE / "store.zarr"
    ref: str = "behavior"


VARIANTS = (
    Variant("sampled token, ratio 1 (the paper's)", FusedOPDLoss(clip=10.0), 2e-4),
    Variant("sampled token, ratio to the sampler", FusedOPDLoss(clip=10.0, ratio_to_ref=True), 2e-4),
    Variant("teacher's top 64 with the residual", FusedLoss(TopKObjective(reverse_kl, residual=True)), 4e-4),
    Variant(
        f"{DRAWS} draws of the policy",
        FusedLoss(TopKObjective(reverse_kl, residual=True)),
        4e-4,
        store=SCRATCH / "drawn.zarr",
        ref="policy",
    ),
)


def main() -> None:
    """Train each variant, measure it, write the table."""
    settings, run = quickstart.Settings(**json.loads((BASE / "settings.json").read_text())), Run(SCRATCH)
    run.claim(attrs.asdict(settings), {"the quickstart's rollouts": digest(str(BASE / "phases" / "student-rollouts.json"))})
    run.phase("draws", lambda: store_draws(settings))
    start, stored = (finished(f"evaluate-after-{name}") for name in ("sft", "opd"))
    measured = {"after SFT": start, "the quickstart's": stored, "the quickstart's, online": finished("evaluate-after-online-opd")}
    for variant in VARIANTS:
        measured[variant.name] = sums_of(run.phase(variant.name, lambda variant=variant: train(variant, settings)))  # type: ignore[misc]
    rates = {"after SFT": None} | {variant.name: variant.lr for variant in VARIANTS}
    rows = [{"variant": name, "lr": rates.get(name, settings.opd_lr), **numbers(sums, start, stored)} for name, sums in measured.items()]
    result_file("quickstart_losses", json.loads((BASE / "metrics.json").read_text()), rows, [])
    columns = ["variant", "lr", "held_out_reverse_kl", "ci95", "change", "change_ci95", "against_stored", "against_stored_ci95"]
    console.print(table("OPD from the same SFT student", columns, [[row[c] for c in columns] for row in rows]))


def store_draws(settings: quickstart.Settings) -> dict[str, Any]:
    """Sample the quickstart's rollouts once more, with draws of the policy at each place, and the teacher's log-probs of them."""
    teacher, path = BASE / "models" / "teacher", SCRATCH / "drawn.zarr"
    sampling = SamplingParams(max_new_tokens=settings.max_new_tokens, seed=settings.seed, drawn=DRAWS)
    source = HFSource.from_folder(BASE / "sft", sampling, device=settings.device)
    store = ZarrStore.open_or_create(str(path), source.manifest)
    collect_rollouts(source, quickstart.split_prompts(settings, teacher)[1], store, prompts_per_batch=64)
    scorer = attrs.evolve(quickstart.make_teacher(teacher, settings), top_k=0, drawn=DRAWS)
    score_rollouts(store, scorer, rollouts_per_batch=32)
    return counted_in(store)


def train(variant: Variant, settings: quickstart.Settings) -> dict[str, Any]:
    """Train from the quickstart's SFT student and measure; the student is removed when it is measured."""
    folder, teacher = SCRATCH / "student", BASE / "models" / "teacher"
    shutil.rmtree(folder, ignore_errors=True)
    steps = quickstart.opd_batches(str(variant.store), settings, variant.ref)
    quickstart.train(folder, "opd", BASE / "sft", steps, variant.loss, variant.lr, settings)
    found = quickstart.evaluate(folder / "opd", teacher, quickstart.split_prompts(settings, teacher)[2], settings)
    shutil.rmtree(folder)
    return found


def finished(phase: str) -> RolloutSums:
    """Return what a phase of the quickstart measured."""
    return sums_of(json.loads((BASE / "phases" / f"{phase}.json").read_text()))


def sums_of(row: dict[str, Any]) -> RolloutSums:
    """Return the sums of an evaluation."""
    return RolloutSums(np.array(row["per_rollout"]["sums"]), np.array(row["per_rollout"]["counts"]))


def numbers(sums: RolloutSums, start: RolloutSums, stored: RolloutSums) -> dict[str, float | None]:
    """Return the held-out reverse KL, and its differences from the start and from the quickstart's stored run over the same prompts."""
    kl, change, against = sums.per_token(), sums.minus(start), sums.minus(stored)
    return {
        "held_out_reverse_kl": kl.mean,
        "ci95": kl.ci95,
        "change": change.mean if sums is not start else None,
        "change_ci95": change.ci95 if sums is not start else None,
        "against_stored": against.mean if sums is not stored else None,
        "against_stored_ci95": against.ci95 if sums is not stored else None,
    }


if __name__ == "__main__":
    main()
