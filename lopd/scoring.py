"""VERB `score_rollouts`: a store's rollouts -> one model's column of log-probs.  Run it again to resume."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from lopd.checks import check_at_least
from lopd.consistency import check_vocabulary
from lopd.errors import QuarantineWarning
from lopd.isolation import check_few, score_each
from lopd.manifest import Provenance
from lopd.parity import Parity
from lopd.preflight import Preflight
from lopd.protocols import LogprobStore, Progress, TeacherScorer
from lopd.types import Rollout, Scores

_PREFLIGHT = Preflight()


@frozen
class ScoringReport:
    """What one call of `score_rollouts` did.

    Args:
        rollouts, tokens: scored; tokens of prompts and responses.
        floored: log-probs that were exactly -inf, and are stored as a floor that is finite (`Scores.floored`).  Where there are any, the teacher
            rules out what the policy sampled: look whether both are asked in the same way.
        quarantined: rollouts that could not be scored, and why; the store keeps it (`quarantined`).
        parity: how the engine compares with the truth it was tested against, if it was.
    """

    rollouts: int = 0
    tokens: int = 0
    floored: int = 0
    quarantined: Mapping[str, str] = field(factory=dict)
    parity: Parity | None = None

    def and_then(self, more: "ScoringReport") -> "ScoringReport":
        """Both together."""
        return evolve(
            self,
            rollouts=self.rollouts + more.rollouts,
            tokens=self.tokens + more.tokens,
            floored=self.floored + more.floored,
            quarantined={**self.quarantined, **more.quarantined},
        )


def score_rollouts(
    store: LogprobStore,
    scorer: TeacherScorer,
    *,
    column: str = "teacher",
    rollouts_per_batch: int = 256,
    preflight: Preflight | None = _PREFLIGHT,
    max_quarantined: int = 64,
    retry_quarantined: bool = False,
    progress: Progress | None = None,
) -> ScoringReport:
    """Score every rollout that has no scores in this column yet, shortest first, and commit batch by batch.

    A rollout that the scorer refuses (too long, a NaN) is put in quarantine with the reason, and the rest goes on; `batches` leaves it out.
    If the scorer itself fails, its error is raised and the batches before it are kept.

    Args:
        store: with rollouts in it.
        scorer: the teacher, or any other model (the reference policy into column "ref").
        column: where the scores go; it belongs to one model.
        rollouts_per_batch: committed together.
        preflight: the self-test before anything is scored; None leaves it out.
        max_quarantined: stop when one call meets more, for then it is not the rollouts.
        retry_quarantined: try those too that could not be scored earlier.
        progress: see `lopd.console`.

    Raises:
        TokenizerMismatchError: the scorer's token-to-id map is not the store's; nothing is scored.
        ScorerError: the scorer failed the self-test, and nothing is scored; or it gave scores of other rollouts than it was asked for.
        EngineError: more than `max_quarantined` rollouts were refused, or all; those of the last batch are not put in quarantine.
        ConflictError: the column belongs to another model.
        InvalidRecordError: `rollouts_per_batch` is less than 1, or `max_quarantined` than 0.
    """
    check_at_least("Scoring", "rollouts_per_batch", rollouts_per_batch, 1)
    check_at_least("Scoring", "max_quarantined", max_quarantined, 0)
    provenance, owner = scorer.provenance, f"Scorer {scorer.provenance.model}"
    check_vocabulary(owner, provenance, "the store's", store.manifest.tokenizer)
    pending, tokens = _pending(store, column, retry_quarantined)
    if len(pending):
        # nothing is added; but a column of another model is refused before anything is paid for
        store.append_scores(column, provenance, ())
        if preflight is not None:
            provenance = preflight.check(store, scorer, column)
    report, already = ScoringReport(parity=provenance.parity), int(store.scored(column).sum())
    if progress:
        progress.begin(f"scoring {column}", len(store), len(store) - len(pending), tokens)
    try:
        for first in range(0, len(pending), rollouts_per_batch):
            rollouts = [record.rollout for record in store.read(pending[first : first + rollouts_per_batch].tolist())]
            scores, refused = score_each(scorer, rollouts)
            more = _report(rollouts, scores, refused)
            report = report.and_then(more)
            check_few(owner, report.quarantined, most=max_quarantined, accepted=already + report.rollouts)
            _commit(store, column, provenance, scores, refused)
            if progress:
                progress.advance(more.rollouts, more.tokens, len(refused))
    finally:
        if progress:
            progress.end()
    _warn(f"{store!r}, column {column!r}", report.quarantined)
    return report


def _pending(store: LogprobStore, column: str, retry: bool) -> tuple[NDArray[np.int64], int]:
    """Rows to score, shortest first, and their tokens."""
    missing = ~store.scored(column)
    if not retry:
        missing[list(store.quarantined(column))] = False
    rows = np.flatnonzero(missing)
    lengths = store.lengths()[rows].sum(axis=1)
    return rows[np.argsort(lengths, kind="stable")], int(lengths.sum())


def _commit(store: LogprobStore, column: str, provenance: Provenance, scores: Sequence[Scores], refused: Mapping[str, str]) -> None:
    if scores:
        store.append_scores(column, provenance, scores)
    if refused:
        store.quarantine(column, provenance, refused)


def _report(rollouts: Sequence[Rollout], scores: Sequence[Scores], refused: Mapping[str, str]) -> ScoringReport:
    tokens = sum(len(rollout) for rollout in rollouts if rollout.rollout_id not in refused)
    return ScoringReport(len(scores), tokens, sum(score.floored for score in scores), refused)


def _warn(owner: str, quarantined: Mapping[str, str]) -> None:
    if quarantined:
        first, reason = next(iter(quarantined.items()))
        warnings.warn(
            f"{owner}: {len(quarantined)} rollouts could not be scored, and training leaves them out; the first is {first!r} ({reason})",
            QuarantineWarning,
            stacklevel=3,
        )
