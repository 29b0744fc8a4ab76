"""What each process of a training phase does; `recipes.run` starts them with torchrun.

torchrun --nproc-per-node 8 -m recipes.train RUN sft|opd START
"""

import json
import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
import transformers
from attrs import fields
from torch.distributed.fsdp import fully_shard

from lopd import CausalLMStudent, FusedOPDLoss, FusedSFTLoss, ZarrStore, batches
from lopd.engines.hf import load_model
from lopd.protocols import OPDLoss
from lopd.records import Ranks
from lopd.tools.phases import train_phase, write_json
from lopd.verbs import StepStream
from recipes.paper import Recipe


@attrs.frozen
class Phase:
    """A training phase.

    Args:
        stream: its steps, this rank's share of each.
        loss: loss of every step.
        rate: step -> learning rate.
    """

    stream: StepStream
    loss: OPDLoss
    rate: Callable[[int], float]


def sft_phase(folder: Path, recipe: Recipe) -> Phase:
    """Return the phase in which the base model imitates the teacher's text (table 5).

    The rate rises in a straight line and falls by a cosine.
    """
    warmup = max(recipe.sft_warmup * recipe.sft_steps, 1.0)

    def rate(step: int) -> float:
        left = math.cos(math.pi * max(step - warmup, 0.0) / max(recipe.sft_steps - warmup, 1.0))
        return recipe.sft_lr * min((step + 1) / warmup, 1.0) * (1 + left) / 2

    stream = _steps(folder / "sft.zarr", recipe, recipe.sft_rollouts_per_step, recipe.sft_steps, teacher=None)
    return Phase(stream, FusedSFTLoss(), rate)


def opd_phase(folder: Path, recipe: Recipe) -> Phase:
    """Return the phase of Lightning OPD on the stored scores (table 6), at a constant rate."""
    # with the ratio the log-probs of what drew the rollouts come along, at whatever temperature and top-p
    ref = "behavior" if recipe.ratio_to_ref else None
    stream = _steps(folder / "opd.zarr", recipe, recipe.opd_rollouts_per_step, recipe.opd_steps, ref=ref)
    return Phase(stream, FusedOPDLoss(clip=recipe.clip, ratio_to_ref=recipe.ratio_to_ref), lambda _: recipe.opd_lr)


def _steps(path: Path, recipe: Recipe, rollouts: int, steps: int, **columns: Any) -> StepStream:
    store = ZarrStore.open(str(path))
    return batches(store, rollouts_per_step=rollouts, tokens_per_batch=recipe.tokens_per_batch, seed=recipe.seed, **columns)[:steps]


def make_student(start: str, recipe: Recipe) -> tuple[CausalLMStudent, Any]:
    """Load float32 weights, sharded layer by layer, computed in the dtype of the recipe with activations recomputed; and the tokenizer."""
    model, tokenizer = load_model(start, torch.float32)
    autocast = None if recipe.dtype == "float32" else getattr(torch, recipe.dtype)
    student = CausalLMStudent(model, tokenizer, autocast=autocast, gradient_checkpointing=autocast is not None)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(student)
    return student, tokenizer


def phase_of(folder: Path, name: str, recipe: Recipe) -> Phase:
    """Return the training phase of this name."""
    return {"sft": sft_phase, "opd": opd_phase}[name](folder, recipe)


def make_optimizer(student: CausalLMStudent, recipe: Recipe) -> torch.optim.AdamW:
    """Make an AdamW (table 6) for what is trained; the rate is set step by step."""
    trained = [p for p in student.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)


def run_phase(checkpoints: Path, phase: Phase, student: CausalLMStudent, recipe: Recipe) -> dict[str, Any]:
    """Train this student, resumably; the tokens that it was trained on, and the metrics of all steps."""
    return train_phase(checkpoints, student, make_optimizer(student, recipe), phase.stream, phase.loss, rate=phase.rate)


def train(folder: Path, name: str, start: str, recipe: Recipe) -> None:
    """Train from this start, and export the student to the folder of this name."""
    phase = phase_of(folder, name, recipe)
    student, tokenizer = make_student(start, recipe)
    found = run_phase(folder / "checkpoints" / name, phase, student, recipe)
    student.export(folder / name, tokenizer, phase.stream.lineage)
    Ranks.current().first(lambda: write_json(folder / f"{name}.json", found))


def main() -> None:
    """Train a phase, started by torchrun."""
    folder, name, start = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    settings = json.loads((folder / "settings.json").read_text())
    recipe = Recipe(**{f.name: settings[f.name] for f in fields(Recipe)})
    transformers.utils.logging.disable_progress_bar()
    if recipe.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # ranks wait while the first one writes a checkpoint, by default at most ten minutes
    dist.init_process_group("nccl" if recipe.device == "cuda" else "gloo", timeout=timedelta(hours=2))
    train(folder, name, start, recipe)
    # what is trained is on disk; an interpreter that takes itself apart while a thread of gloo still holds a tensor now and then aborts
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
