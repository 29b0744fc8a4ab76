"""What every training phase of the quickstart shares: the optimizer, its schedule, a line for each step, and checkpoints."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from attrs import asdict
from phases import console, write_json

from lopd import CausalLMStudent, Lineage, load_checkpoint, save_checkpoint
from lopd.records import Ranks, Step, StepMetrics
from lopd.verbs import StepStream


def make_optimizer(student: CausalLMStudent) -> torch.optim.AdamW:
    """AdamW with the betas of the paper (table 6); the rate is set step by step."""
    return torch.optim.AdamW([p for _, p in student.named_parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=0.0)


def set_lr(optimizer: torch.optim.Optimizer, step: int, lr: float, total: int) -> None:
    """Three steps of warm-up, then a straight line down to 0: a function of the step alone, so that resuming needs no state."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min((step + 1) / 3, 1.0) * (1 - step / total)


def scheduled(steps: StepStream, optimizer: torch.optim.Optimizer, lr: float, total: int) -> Iterator[Step]:
    """The same steps, with the learning rate set before each."""
    for step in steps:
        set_lr(optimizer, step.index, lr, total)
        yield step


def follow(steps: Iterable[StepMetrics], total: int) -> Iterator[StepMetrics]:
    """The same metrics, with a line for each printed, by one of the ranks if there are several."""
    quiet = Ranks.current().rank > 0
    for metrics in steps:
        if not quiet:
            console.print(f"{metrics}  ({metrics.step + 1} of {total})", soft_wrap=True)
        yield metrics


def resumably(
    checkpoints: Path,
    student: CausalLMStudent,
    optimizer: torch.optim.Optimizer,
    trained_on: StepStream | Lineage,
    begin: Callable[[int], Iterable[StepMetrics]],
    total: int,
) -> list[StepMetrics]:
    """Metrics of all steps, those of a killed process included: `begin(k)` trains on from step k, and every few steps there is a checkpoint.

    Steps of a store are compared with those that were saved; a run that samples anew at each step has a lineage only.
    """
    steps = trained_on if isinstance(trained_on, StepStream) else None
    lineage = trained_on.lineage if isinstance(trained_on, StepStream) else trained_on
    done = load_checkpoint(checkpoints, student, optimizer, steps=steps)
    history = [StepMetrics.from_json(row) for row in json.loads((checkpoints / "history.json").read_text())[:done]] if done else []
    for metrics in follow(begin(done), total):
        history.append(metrics)
        if (metrics.step + 1) % 5 == 0:
            if Ranks.current().rank == 0:
                write_json(checkpoints / "history.json", [asdict(m) for m in history])
            save_checkpoint(checkpoints, student, optimizer, next_step=metrics.step + 1, lineage=lineage, steps=steps)
    return history
