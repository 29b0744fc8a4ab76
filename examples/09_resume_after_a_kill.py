"""A run that is killed in the middle and started again ends with the very weights of one that was not: this script does it and compares."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    SamplingParams,
    ZarrStore,
    batches,
    collect_rollouts,
    load_checkpoint,
    opd_steps,
    save_checkpoint,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts

STEPS, BETWEEN_CHECKPOINTS = 12, 4


def run(folder: Path, kill_after: int | None = None) -> dict[str, torch.Tensor]:
    """Do the whole run, or what is left of it; a program that is written like this needs nothing else to be resumed."""
    student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
    source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
    store = ZarrStore.open_or_create(folder / "store.zarr", source.manifest)
    collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
    score_rollouts(store, HFScorer.from_folder(teacher_dir))

    model, tokenizer = load_model(student_dir, torch.float32)
    student = CausalLMStudent(model, tokenizer)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    steps = batches(store, rollouts_per_step=8, ref="behavior")[:STEPS]
    start = load_checkpoint(folder / "checkpoints", student, optimizer, steps=steps)
    for metrics in opd_steps(student, steps[start:], FusedOPDLoss(ratio_to_ref=True), optimizer):
        print(f"{folder}: step {metrics.step}, gap to the teacher {metrics.reverse_kl:+.3f}", flush=True)
        if metrics.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)  # no handler, no clean-up: as when the machine takes the process away
        if (metrics.step + 1) % BETWEEN_CHECKPOINTS == 0:
            save_checkpoint(folder / "checkpoints", student, optimizer, next_step=metrics.step + 1, steps=steps)
    return dict(student.named_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--killed-in", type=Path, help="run in this folder, and be killed after step 5")
    if folder := parser.parse_args().killed_in:
        run(folder, kill_after=5)
        return
    shutil.rmtree("runs/09", ignore_errors=True)  # so that this script can be run again; your own would go on from there
    folder = Path("runs/09/killed")
    child = subprocess.run([sys.executable, __file__, "--killed-in", str(folder)], check=False)
    print(f"the process ended with {child.returncode}; {folder} holds {[path.name for path in (folder / 'checkpoints').iterdir()]}")
    resumed, unbroken = run(folder), run(Path("runs/09/unbroken"))
    equal = all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    print(f"weights of both runs are {'equal, bit for bit' if equal else 'NOT equal'}")


if __name__ == "__main__":
    main()
