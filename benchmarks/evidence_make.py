"""What `evidence.py` builds of a seed before the arms run: the teacher's text, students, and their stores; and what each cost."""

import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attrs import evolve
from evidence_bed import ROWS, Bed, Row, measure, near_copies, once, optimizer_of, teacher
from record import ROOT
from testbed.runs import Clock

from lopd import FusedSFTLoss, MemoryStore, Prompt, ZarrStore, batches, collect_rollouts, opd_steps, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.guards.start import measure_start
from lopd.protocols import LogprobStore

sys.path.insert(0, str(ROOT / "examples"))
import smollm2

#: Column -> what the teacher is asked for beside the log-prob of the sampled token.
COLUMNS: dict[str, dict[str, int]] = {
    "teacher": {},
    "top16": {"top_k": 16},
    "top64": {"top_k": 64},
    "candidates": {"candidates": 16},
    "drawn": {"drawn": 16},
}
#: What the policy keeps beside each token it samples: as many of its most likely as `measure_start` can use, and the draws.
KEPT = {"candidates": 64, "drawn": 16}


def make_teacher(folder: Path) -> Row:
    """Unpack the teacher's weights."""
    return once(folder / "teacher.json", lambda: smollm2.save_teacher(_fresh(folder / "teacher")) or {"kind": "teacher"})


def make_text(bed: Bed) -> Row:
    """Sample the teacher's answers to all prompts of a seed."""

    def work() -> Row:
        source = HFSource(*teacher(bed.folder / "teacher"), bed.sampling(), rows_per_batch=ROWS)
        store = ZarrStore.open_or_create(_fresh(bed.home / "text.zarr"), source.manifest)
        spent = _fill(store, source, [prompt for part in bed.prompts() for prompt in part], {})
        return {"kind": "text", "seed": bed.seed, "rollouts": len(store), "cpu_s": spent}

    return once(bed.home / "text.json", work)


def make_student(bed: Bed) -> Row:
    """Cut it, fine-tune it on the teacher's answers, and measure it."""

    def work() -> Row:
        clock, size, home = Clock(), bed.size, _fresh(bed.of_student / "model")
        smollm2.save_pruned(*teacher(bed.folder / "teacher"), home, bed.kind.dropped)
        student, tokenizer, _ = bed.student()
        optimizer = optimizer_of(student, size.sft_lr)
        rows = bed.rows_of_text(bed.prompts()[0])
        stream = batches(bed.text(), teacher=None, rollouts_per_step=size.sft_batch, seed=bed.seed, rows=rows)
        total = size.sft_epochs * size.sft_prompts // size.sft_batch
        for metrics in opd_steps(student, stream[:total], FusedSFTLoss(), optimizer):
            for group in optimizer.param_groups:
                group["lr"] = size.sft_lr * (1 - (metrics.step + 1) / total)
        student.export(_fresh(home), tokenizer, stream.lineage)
        spent = clock.split()
        row = {"kind": "sft", "seed": bed.seed, "student": bed.kind.name, "steps": total, "cpu_s": spent, "near_copies": near_copies(bed)}
        return {**row, **measure(bed, student.model)}

    return once(bed.of_student / "sft.json", work)


def make_store(bed: Bed, columns: Collection[str] = COLUMNS.keys(), shares: Collection[float] = ()) -> Row:
    """Sample the student's answers to the OPD prompts and score them in several ways; return what each part costs, and the diagnostics.

    Smaller stores are made, too, as they cost more than their share: their batches are smaller.  Of their scores only the plain ones are made, for
    what the others cost beside them is known from the whole store.

    Args:
        bed: with its student.
        columns: names in `COLUMNS`; `start_of` reads "top64".
        shares: shares of the prompts; for each, a store is made, timed, and thrown away.
    """

    def work() -> Row:
        student, tokenizer, lineage = bed.student()
        source, prompts = HFSource(student.model, tokenizer, bed.sampling(**KEPT), lineage, rows_per_batch=ROWS), bed.prompts()[1]
        store = ZarrStore.open_or_create(_fresh(bed.of_student / "store.zarr"), source.manifest)
        spent = _fill(store, source, prompts, {name: evolve(bed.scorer, **COLUMNS[name]) for name in columns})
        parts = {
            f"{share:g}": _fill(MemoryStore(source.manifest), source, prompts[: round(share * len(prompts))], {"teacher": bed.scorer})
            for share in shares
        }
        return {"kind": "store", "seed": bed.seed, "student": bed.kind.name, "cpu_s": {"1": spent, **parts}, "start": start_of(store)}

    return once(bed.of_student / "store.json", work)


def _fill(store: LogprobStore, source: HFSource, prompts: list[Prompt], scorers: Mapping[str, HFScorer]) -> Row:
    """Sample and score, and return what that cost.

    It is the CPU seconds of all that these calls do, as a live run pays for all of it.  Neither has the self-test of the scorer.
    """
    sampling = _seconds(partial(collect_rollouts, source, prompts, store, prompts_per_batch=ROWS))
    scoring = {
        name: _seconds(partial(score_rollouts, store, scorer, column=name, rollouts_per_batch=ROWS, preflight=None))
        for name, scorer in scorers.items()
    }
    return {"sampling": sampling, "scoring": scoring}


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def start_of(store: ZarrStore) -> Row:
    """Return the diagnostics before training, as plain numbers."""
    said = measure_start(store, teacher="top64", ref="policy")
    least, most = said.outside or (None, None)
    return {
        "reverse_kl": said.reverse_kl.mean,
        "overlap": {str(k): found.mean for k, found in said.overlap.items()},
        "outside_top64": [part.mean for part in (least, most) if part is not None],
        "advantage_quantiles": said.advantages.quantiles,
        "tail": said.beyond_tail,
        "verdict": said.verdict,
    }


def _fresh(folder: Path) -> Path:
    """Remove what a killed attempt left in a folder: its seconds are lost, so its work is done again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder
