"""VERB `score_rollouts`: a store's rollouts -> one model's column of log-probs.  Run it again to resume."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from lopd.guards.consistency import check_vocabulary, judge_scorer, vocabulary_of
from lopd.protocols import LogprobStore, Progress, TeacherScorer
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import chosen, to_score
from lopd.records.rollouts import Scores
from lopd.verbs.asking import bounded, isolate
from lopd.verbs.filling import Filling, ScoringReport
from lopd.verbs.preflight import Preflight

_PREFLIGHT = Preflight()


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
        rollouts_per_batch: scored together and committed together; fewer where they have more than some 2^28 log-probs, supports included.
        batches_at_once: calls of `scorer.score` that are under way at the same time; more than 1 for engines with several workers (Ray, servers).
        preflight: the self-test before anything is scored; None leaves it out.
        max_refused: stop when one call meets more, for then it is not the rollouts.
        retry_quarantined: try those too that are in quarantine since an earlier call.
        progress: None shows a bar on a terminal and in a notebook, and a line a minute elsewhere (`lopd.tools.console.RichProgress`).

    Warns:
        TeacherConsistencyWarning: the column "teacher" is begun, from which `batches` learns unless it is told otherwise, and it would refuse this
            model: it is not the SFT teacher that the store recorded, or none is recorded.
        QuarantineWarning: some rollouts are without scores in quarantine.

    Raises:
        ArgumentError: store, scorer or progress are something else.
        TokenizerMismatchError: the scorer's token-to-id map is not the store's; nothing is scored.
        ConflictError: the column belongs to another model; nothing is scored.
        ScorerError: the scorer failed the self-test, and nothing is scored; or it gave scores of other rollouts or tokens than it was asked for.
        EngineError: more than `max_refused` rollouts were refused, or more than have scores; none of them is put in quarantine.
        StoreWriteError: the store cannot be written to; before the first batch nothing is scored.
        NoSuchRowError: a row is not in the store.
        MissingScoresError: the scorer is to score candidates, and the policy's column does not keep so many.
        InvalidRecordError: the store is empty, there are no `rows`, `rollouts_per_batch` or `batches_at_once` is less than 1, or `max_refused` less
            than 0.
    """
    check_noun(store, LogprobStore)
    check_noun(scorer, TeacherScorer)
    filling = Filling(store, column, rollouts_per_batch, batches_at_once, max_refused, progress)
    check_vocabulary(f"Scorer {scorer.provenance.model}", vocabulary_of(scorer), "the store's", store.manifest.tokenizer)
    # nothing is added, but a column of another model is refused before anything is paid for
    store.append_scores(column, scorer.provenance, ())
    if column == "teacher" and column not in store.columns:  # other names are for what is compared, or made a residual of
        judge_scorer(store, scorer.provenance)
    wanted = chosen(store, rows)
    work = filling.left(wanted, retry_quarantined)
    provenance = scorer.provenance if preflight is None or not len(work.rows) else preflight.check(store, scorer, column, wanted)
    batches = (to_score(store, part, provenance) for part in filling.batches(work, max(provenance.top_k, 1)))
    owner = f"Scorer {provenance.model}"
    score = partial(isolate, owner, Scores, scorer.score, most=filling.max_refused)
    asked = bounded(owner, score, batches, at_once=filling.batches_at_once, most=filling.max_refused)
    return filling.fill(f"scoring {column}", provenance, work, asked)
