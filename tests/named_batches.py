"""Records whose scores name their tokens, and the steps over them."""

import pytest
from helpers import make_rollout, make_store, scored
from hypothesis import settings

from lopd import batches
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import ScoredRollout, Step, by_rollout, by_token
from lopd.verbs import StepStream

POSITIONS, VOCAB = 12, 5
PLAIN = ReferenceOPDLoss(clip=None)
weightings = pytest.mark.parametrize("weighting", [by_rollout, by_token])
quick = settings(deadline=None, max_examples=40)


def numbered_records(count: int) -> list[ScoredRollout]:
    """Make rollouts of different lengths whose first token is their row."""
    return [scored(make_rollout(f"r{i}", [i, 0], [1] * (1 + i % 4)), {"teacher": [-1.0] * (1 + i % 4)}) for i in range(count)]


def numbered_stream(count: int, per_step: int, seed: int = 0, start: int = 0, tokens_per_batch: int = 1000) -> StepStream:
    store = make_store(numbered_records(count), columns=("teacher",))
    return batches(store, rollouts_per_step=per_step, tokens_per_batch=tokens_per_batch, seed=seed)[start:]


def rows_of(step: Step) -> list[int]:
    return [row for batch in step.batches for row in batch.inputs[batch.position_ids == 0].tolist()]
