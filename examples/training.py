"""What every training phase of the quickstart shares: the optimizer and its schedule."""

import torch

from lopd import CausalLMStudent


def make_optimizer(student: CausalLMStudent) -> torch.optim.AdamW:
    """Make an AdamW with the betas of the paper (table 6); the rate is set step by step."""
    return torch.optim.AdamW([p for _, p in student.named_parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=0.0)


def learning_rate(step: int, lr: float, total: int) -> float:
    """Return the rate of a step: three steps of warm-up, then a straight line down to 0.

    It depends on the step alone, so that resuming needs no state.
    """
    return lr * min((step + 1) / 3, 1.0) * (1 - step / total)
