"""VERB `score_rollouts`: a store's rollouts -> one model's column of log-probs.  Run it again to resume."""

import warnings
from collections.abc import Mapping

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from lopd.errors import EngineError, QuarantineWarning
from lopd.guards.consistency import check_vocabulary, vocabulary_of
from lopd.protocols import LogprobStore, Progress, TeacherScorer
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import chosen, in_batches, named, to_score
from lopd.records.checks import check_at_least
from lopd.records.manifest import Provenance
from lopd.records.parity import Parity
from lopd.verbs.asking import ask, check_scores, shown
from lopd.verbs.preflight import Preflight

_PREFLIGHT = Preflight()


@frozen
class ScoringReport:
    """What one call of `score_rollouts` did.

    Args:
        rollouts: number that were scored.
        read_tokens: tokens of their prompts and responses.
        floored: log-probs that were exactly -inf, and are stored as a floor that is finite (`Scores.floored`).  Where there are any, the teacher
            rules out what the policy sampled: look whether both are asked in the same way.
        refused: rollouts that could not be scored, and why, by id; they are in the store's quarantine now.
        skipped: rollouts that were in quarantine before, and were not tried again.
        parity: how the engine compares with the truth it was tested against, if it was.
        response_tokens: those of the read tokens that have log-probs.
    """

    rollouts: int = 0
    read_tokens: int = 0
    floored: int = 0
    refused: Mapping[str, str] = field(factory=dict)
    skipped: int = 0
    parity: Parity | None = None
    response_tokens: int = field(default=0, eq=False)


def score_rollouts(
    store: LogprobStore,
    scorer: TeacherScorer,
    *,
    column: str = "teacher",
    rows: NDArray[np.int64] | None = None,
    rollouts_per_batch: int = 256,
    batches_at_once: int = 1,
    preflight: Preflight | None = _PREFLIGHT,
    max_refused: int = 64,
    retry_quarantined: bool = False,
    progress: Progress | None = None,
) -> ScoringReport:
    """Score every rollout (or every one of `rows`) that has no scores in this column yet, shortest first, and commit batch by batch.

    A rollout that the scorer refuses (too long, a NaN) does not stop the others.  When all are done, the refused ones are put in quarantine
    with their reasons, and `batches` leaves them out; a call that is stopped before leaves them for the next.
    If the scorer itself fails, its error is raised and the batches before it are kept.

    Args:
        store: with rollouts in it.
        scorer: the teacher, or any other model (the reference policy into column "ref").  One whose provenance has `candidates` or `drawn` is given
            what the policy kept while it sampled (`SamplingParams.candidates`).
        column: where the scores go; it belongs to one model.
        rows: score these only, for example `lopd.rows_of(store, prompts)` where several teachers share the prompts among them; None for
            all.
        rollouts_per_batch: committed together.
        batches_at_once: calls of `scorer.score` that are under way at the same time; more than 1 for engines with several workers (Ray, servers).
        preflight: the self-test before anything is scored; None leaves it out.
        max_refused: stop when one call meets more, for then it is not the rollouts.
        retry_quarantined: try those too that are in quarantine since an earlier call.
        progress: None shows a bar on a terminal and in a notebook, and a line a minute elsewhere (`lopd.tools.console.RichProgress`).

    Warns:
        QuarantineWarning: some rollouts are without scores in quarantine.

    Raises:
        ArgumentError: store or scorer are something else.
        TokenizerMismatchError: the scorer's token-to-id map is not the store's; nothing is scored.
        ConflictError: the column belongs to another model; nothing is scored.
        ScorerError: the scorer failed the self-test, and nothing is scored; or it gave scores of other rollouts than it was asked for.
        EngineError: more than `max_refused` rollouts were refused, or more than have scores; none of them is put in quarantine.
        NoSuchRowError: a row is not in the store.
        MissingScoresError: the scorer is to score candidates, and the policy's column does not keep so many.
        InvalidRecordError: the store is empty, there are no `rows`, `rollouts_per_batch` or `batches_at_once` is less than 1, or `max_refused` less
            than 0.
    """
    check_noun(store, LogprobStore)
    check_noun(scorer, TeacherScorer)
    rollouts_per_batch = check_at_least("Scoring", "rollouts_per_batch", rollouts_per_batch, 1)
    batches_at_once = check_at_least("Scoring", "batches_at_once", batches_at_once, 1)
    max_refused = check_at_least("Scoring", "max_refused", max_refused, 0)
    check_vocabulary(f"Scorer {scorer.provenance.model}", vocabulary_of(scorer), "the store's", store.manifest.tokenizer)
    # nothing is added, but a column of another model is refused before anything is paid for
    store.append_scores(column, scorer.provenance, ())
    wanted = chosen(store, rows)
    pending, tokens, skipped = _pending(store, column, wanted, retry_quarantined)
    provenance = scorer.provenance if preflight is None or not len(pending) else preflight.check(store, scorer, column, wanted)
    report = ScoringReport(skipped=skipped, parity=provenance.parity)
    batches = (to_score(store, part, provenance) for part in in_batches(pending, rollouts_per_batch))
    asked = ask(f"Scorer {provenance.model}", scorer.score, batches, at_once=batches_at_once, most=max_refused)
    with shown(progress, f"scoring {column}", len(wanted), len(wanted) - len(pending), tokens) as advance:
        for rollouts, scores, refused in asked:
            reasons = check_scores(rollouts, scores, refused)
            store.append_scores(column, provenance, scores)
            tokens = sum(len(rollout) for rollout in rollouts if rollout.rollout_id not in reasons)
            report = evolve(
                report,
                rollouts=report.rollouts + len(scores),
                read_tokens=report.read_tokens + tokens,
                response_tokens=report.response_tokens + sum(score.logprobs.size for score in scores),
                floored=report.floored + sum(score.floored for score in scores),
                refused={**report.refused, **reasons},
            )
            advance(len(scores), tokens, len(reasons))
    _put_in_quarantine(store, column, provenance, report)
    return report


def _pending(store: LogprobStore, column: str, wanted: NDArray[np.int64], retry: bool) -> tuple[NDArray[np.int64], int, int]:
    """Rows to score, shortest first; their tokens; and how many are left out because they are in quarantine."""
    unscored = wanted[~store.scored(column)[wanted]]
    rows = unscored if retry else unscored[~np.isin(unscored, list(store.quarantined(column)))]
    lengths = store.lengths()[rows].sum(axis=1)
    return rows[np.argsort(lengths, kind="stable")], int(lengths.sum()), len(unscored) - len(rows)


def _put_in_quarantine(store: LogprobStore, column: str, provenance: Provenance, report: ScoringReport) -> None:
    if not report.refused and not report.skipped:
        return
    first = next(iter(report.refused.values()), "they were in quarantine before; pass `retry_quarantined=True` to try them again")
    accepted = int(store.scored(column).sum())
    if len(report.refused) > accepted:
        raise EngineError(
            f"{named(store)}, column {column!r}: {len(report.refused)} rollouts were refused and {accepted} accepted, expected most to be "
            f"accepted; the first reason is {first!r}; none was put in quarantine, so set right what is wrong with them all and run it again."
        )
    if report.refused:
        store.quarantine(column, provenance, report.refused)
    warnings.warn(
        f"{named(store)}, column {column!r}: {len(report.refused) + report.skipped} rollouts are without scores in quarantine, and training leaves "
        f"them out; {first}",
        QuarantineWarning,
        stacklevel=3,
    )
