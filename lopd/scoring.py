"""VERB `score_rollouts`: a store's rollouts -> one model's column of log-probs.  Run it again to resume."""

from collections.abc import Sequence

import numpy as np

from lopd.errors import InvalidRecordError, TokenizerMismatchError
from lopd.protocols import LogprobStore, Progress, TeacherScorer
from lopd.types import Rollout, Scores


def score_rollouts(
    store: LogprobStore,
    scorer: TeacherScorer,
    *,
    column: str = "teacher",
    rollouts_per_batch: int = 256,
    progress: Progress | None = None,
) -> None:
    """Score every rollout that has no scores in this column yet, shortest first, and commit batch by batch.

    If the scorer fails on a batch, its error is raised and the batches before it are kept.

    Args:
        store: with rollouts in it.
        scorer: the teacher, or any other model (the reference policy into column "ref").
        column: where the scores go; it belongs to one model.
        rollouts_per_batch: committed together.
        progress: see `lopd.console`.

    Raises:
        TokenizerMismatchError: the scorer's token-to-id map is not the store's; nothing is scored.
        ConflictError: the column belongs to another model.
        InvalidRecordError: the scorer gave scores of other rollouts than it was asked for.
    """
    theirs, ours = scorer.provenance.vocab_hash, store.manifest.tokenizer.vocab_hash
    if theirs != ours:
        raise TokenizerMismatchError(
            f"Scorer {scorer.provenance.model}: the hash of its vocabulary is {theirs[:12]}, expected the store's {ours[:12]}; "
            "ids mean other tokens to this model, use a teacher that shares the student's tokenizer."
        )
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
            if progress:
                progress.advance(len(rows), sum(len(r) for r in rollouts))
    finally:
        if progress:
            progress.end()


def _check_complete(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> None:
    wanted, got = [r.rollout_id for r in rollouts], [s.rollout_id for s in scores]
    if wanted != got:
        lost = next((name for name in wanted if name not in got), wanted[0])
        raise InvalidRecordError(
            f"Rollout {lost!r}: the scorer gave {len(got)} scores for {len(wanted)} rollouts, expected one for each, in order; fix the scorer."
        )
