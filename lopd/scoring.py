"""VERB `score_rollouts`: a store's rollouts -> one model's column of log-probs.  Run it again to resume."""

import numpy as np

from lopd.errors import TokenizerMismatchError
from lopd.protocols import LogprobStore, Progress, TeacherScorer


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
            store.append_scores(column, scorer.provenance, scorer.score(rollouts))
            if progress:
                progress.advance(len(rows), sum(len(r) for r in rollouts))
    finally:
        if progress:
            progress.end()
