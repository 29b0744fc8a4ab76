"""Metrics into any logger: `opd_steps` is a generator of plain numbers, so logging is three lines of your own loop.

JSON lines are written always; TensorBoard, trackio and Weights & Biases where they are installed: the extra `loggers` brings all three.
"""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from tiny import QUESTIONS, model_folders

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, SamplingParams, batches, collect_rollouts, opd_steps, score_rollouts
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts

OUT = Path("runs/14")


def loggers(until: ExitStack) -> dict[str, Callable[[dict[str, float], int], None]]:
    """Return one function for each logger that is installed; each has written all it was given when `until` is left."""
    found: dict[str, Callable[[dict[str, float], int], None]] = {}
    if find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        writer = until.enter_context(SummaryWriter(str(OUT)))

        def add_scalars(row: dict[str, float], step: int) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, step)

        found["tensorboard"] = add_scalars
    if find_spec("trackio"):
        import trackio

        trackio.init(project="lopd")
        until.callback(trackio.finish)
        found["trackio"] = lambda row, step: trackio.log(row, step=step)
    if find_spec("wandb"):
        import wandb

        run = until.enter_context(wandb.init(project="lopd", dir=OUT, mode=os.environ.get("WANDB_MODE", "offline")))
        found["wandb"] = lambda row, step: run.log(row, step=step)
    return found


student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
store = MemoryStore(source.manifest)
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
score_rollouts(store, HFScorer.from_folder(teacher_dir))
model, tokenizer = load_model(student_dir, torch.float32)
student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

OUT.mkdir(parents=True, exist_ok=True)
steps = batches(store, rollouts_per_step=8, ref="behavior")[:8]
with ExitStack() as until, (OUT / "metrics.jsonl").open("w") as lines:
    logs = loggers(until)
    for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer):
        row = metrics.numbers()
        print(json.dumps({"step": metrics.step, **row}), file=lines, flush=True)
        for log in logs.values():
            log(row, metrics.step)
print(f"logged {len(row)} numbers a step to {', '.join(['JSON lines', *logs])}: {', '.join(row)}")
