"""VERB `score_rollouts`: a store's rollouts -> one model's column of log-probs.  Run it again to resume."""

from collections.abc import Sequence

import numpy as np

from lopd.checks import check_at_least
from lopd.consistency import check_vocabulary
from lopd.errors import InvalidRecordError
from lopd.protocols import LogprobStore, Progress, TeacherScorer
from lopd.types import Rollout, Scores


def score_rollouts(
    store: LogprobStore,
    scorer: TeacherScorer,
    *,
    column: str = "teacher",
    rollouts_per_batch: int = 256,
    progress: Progress | None = None,
) -> int:
    """Score every rollout that has no scores in this column yet, shortest first, and commit batch by batch.

    If the scorer fails on a batch, its error is raised and the batches before it are kept.

    Args:
        store: with rollouts in it.
        scorer: the teacher, or any other model (the reference policy into column "ref").
        column: where the scores go; it belongs to one model.
        rollouts_per_batch: committed together.
        progress: see `lopd.console`.

    Returns:
        How many of these log-probs were exactly -inf, and are stored as a floor that is finite (`Scores.floored`).  Where there are any, the
        teacher rules out what the policy sampled: look whether both are asked in the same way.

    Raises:
        TokenizerMismatchError: the scorer's token-to-id map is not the store's; nothing is scored.
        ConflictError: the column belongs to another model.
        InvalidRecordError: `rollouts_per_batch` is less than 1, or the scorer gave scores of other rollouts than it was asked for.
    """
    check_at_least("Scoring", "rollouts_per_batch", rollouts_per_batch, 1)
    check_vocabulary(f"Scorer {scorer.provenance.model}", scorer.provenance, "the store's", store.manifest.tokenizer)
    floored = 0
    pending = np.flatnonzero(~store.scored(column))
    pending = pending[np.argsort(store.lengths()[pending].sum(axis=1), kind="stable")]
    if progress:
        progress.begin(f"scoring {column}", len(store), len(store) - len(pending))
    try:
        for first in range(0, len(pending), rollouts_per_batch):
            rows = pending[first : first + rollouts_per_batch].tolist()
            rollouts = [record.rollout for record in store.read(rows)]
            scores = scorer.score(rollouts)
            _check_complete(rollouts, scores)
            store.append_scores(column, scorer.provenance, scores)
            floored += sum(score.floored for score in scores)
            if progress:
                progress.advance(len(rows), sum(len(r) for r in rollouts))
    finally:
        if progress:
            progress.end()
    return floored


def _check_complete(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> None:
    wanted, got = [r.rollout_id for r in rollouts], [s.rollout_id for s in scores]
    if wanted != got:
        lost = next((name for name in wanted if name not in got), wanted[0])
        raise InvalidRecordError(
            f"Rollout {lost!r}: the scorer gave {len(got)} scores for {len(wanted)} rollouts, expected one for each, in order; fix the scorer."
        )
