"""What to try suites with, and which of their clauses fail."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from _pytest.outcomes import Skipped

from lopd.records import Prompt, Rollout

TABLE_CONTEXT = 64
SIZES = ((1, 1), (3, 7), (6, 4), (2, 12))


def some_rollouts(vocab_size: int) -> list[Rollout]:
    rng = np.random.default_rng(5)
    return [
        Rollout(f"r{i}", rng.integers(0, vocab_size, p), rng.integers(0, vocab_size, t), np.ones(t, bool), "length")
        for i, (p, t) in enumerate(SIZES)
    ]


def some_prompts(vocab_size: int) -> list[Prompt]:
    rng = np.random.default_rng(6)
    return [Prompt(f"p{i}", rng.integers(1, vocab_size, 1 + 2 * i)) for i in range(5)]


def filler(length: int) -> Rollout:
    return Rollout("filler", [2] * (length - 1), [3], [True], "length")


def prompts_of(rollouts: Sequence[Rollout]) -> list[Prompt]:
    return [Prompt(rollout.rollout_id, rollout.prompt_ids) for rollout in rollouts]


def told_for(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return each prompt with three tokens more in front."""
    return [Prompt(prompt.prompt_id, [7, 8, 9, *prompt.token_ids]) for prompt in prompts]


def clauses(suite: Any) -> list[str]:
    return [name for name in dir(suite) if name.startswith("test_")]


def broken_clauses(suite: Any, left_out: list[str] | None = None) -> list[str]:
    """Return the clauses that fail with any of their arguments; those that are skipped count as kept, and are added to `left_out`."""
    broken = []
    for name in clauses(suite):
        clause = getattr(suite, name)
        marks = [mark.args for mark in getattr(clause, "pytestmark", ()) if mark.name == "parametrize"]
        names = list(inspect.signature(clause).parameters)
        values = [value if isinstance(value, tuple) else (value,) for value in marks[0][1]] if marks else [()]
        for arguments in values:
            try:
                clause(**dict(zip(names, arguments, strict=True)))
            except Skipped:
                if left_out is not None:
                    left_out.append(name)
            except (Exception, pytest.fail.Exception):  # whatever is raised fails a test
                broken.append(name)
    return sorted(set(broken))
