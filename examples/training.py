"""What every training phase of the quickstart shares: the optimizer and its schedule."""

from collections.abc import Iterator

import torch

from lopd import CausalLMStudent
from lopd.records import Step
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
