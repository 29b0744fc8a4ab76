"""How a score column is filled: what is left to do, committed batch by batch; what was refused goes into quarantine when all is done."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from lopd.errors import EngineError, QuarantineWarning
from lopd.protocols import LogprobStore, Progress
from lopd.protocols.doors import check_noun, check_scores
from lopd.protocols.reading import in_batches, in_runs, named
from lopd.records.checks import own_numbers
from lopd.records.manifest import Provenance
from lopd.records.parity import Parity
from lopd.records.rollouts import Rollout, Scores
from lopd.records.warn import warn_user
from lopd.verbs.asking import shown

# log-probs of one commit, and of one batch of a scorer, supports included: a table of LanceDB takes up to 2**31 at once, and all of them are in
# memory until it is done
_VALUES = 1 << 28


@frozen
class ScoringReport:
    """What one call of `score_rollouts` did.

    Args:
        rollouts: number that were scored, without those that another process has scored meanwhile.
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


@frozen(eq=False)
class Work:
    """What is left to do of a column.

    Args:
        rows: to score, shortest first.
        tokens: number of tokens of their prompts and responses.
        skipped: rows that are left out because they are in quarantine.
        wanted: rows in all, with those that are scored.
    """

    rows: NDArray[np.int64]
    tokens: int
    skipped: int
    wanted: int


@frozen(eq=False)
class Filling:
    """A column that is being filled, and at what pace; see `lopd.score_rollouts` for the numbers.

    Raises:
        ArgumentError: the progress is something else.
        InvalidRecordError: a number makes no sense.
    """

    store: LogprobStore
    column: str
    rollouts_per_batch: int
    batches_at_once: int
    max_refused: int
    progress: Progress | None

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Scoring", rollouts_per_batch=1, batches_at_once=1, max_refused=0)
        if self.progress is not None:
            check_noun(self.progress, Progress)

    def left(self, wanted: NDArray[np.int64], retry: bool) -> Work:
        """Return what is left to do of these rows; `retry` those in quarantine too.

        Raises:
            StoreWriteError: something is left, and the store cannot be written to: nothing shall be paid for that is lost then.
        """
        unscored = wanted[~self.store.scored(self.column)[wanted]]
        rows = unscored if retry else unscored[~np.isin(unscored, list(self.store.quarantined(self.column)))]
        if len(rows):
            self.store.append(())
        lengths = self.store.lengths()[rows].sum(axis=1)
        return Work(rows[np.argsort(lengths, kind="stable")], int(lengths.sum()), len(unscored) - len(rows), len(wanted))

    def batches(self, work: Work, width: int) -> Iterator[Sequence[int]]:
        """Yield rows to score together: `rollouts_per_batch`, or fewer where their log-probs, `width` a response token, are too many.

        Those that another process has scored meanwhile are left out: each commit sees what is there.
        """
        for part in in_batches(work.rows, self.rollouts_per_batch, self.store.lengths()[work.rows, 1] * width, _VALUES):
            if (left := np.asarray(part)[~self.store.scored(self.column)[part]]).size:
                yield left.tolist()

    def fill(
        self,
        what: str,
        provenance: Provenance,
        work: Work,
        asked: Generator[tuple[Sequence[Rollout], Sequence[Scores], Sequence[tuple[Rollout, str]]], None, None],
    ) -> ScoringReport:
        """Commit each batch as it comes (`commit_scores`), with its refused rollouts counted, and put those in quarantine at the end.

        Scores that are there by then are neither stored nor counted.

        Raises:
            ScorerError: see `check_scores`.
            EngineError: more were refused than have scores.
        """
        report, left = ScoringReport(skipped=work.skipped, parity=provenance.parity), len(work.rows)
        with closing(asked), shown(self.progress, what, work.wanted, work.wanted - len(work.rows), work.tokens) as advance:
            for rollouts, scores, refused in asked:
                reasons = check_scores(rollouts, scores, refused)
                self.store.append_scores(self.column, provenance, ())  # it sees by that what others have committed
                rows = self.store.find([score.rollout_id for score in scores])
                new = [scores[i] for i in np.flatnonzero(~self.store.scored(self.column)[rows]).tolist()]
                commit_scores(self.store, self.column, provenance, new)
                names = {score.rollout_id for score in new}
                tokens = sum(len(rollout) for rollout in rollouts if rollout.rollout_id in names)
                report = evolve(
                    report,
                    rollouts=report.rollouts + len(new),
                    read_tokens=report.read_tokens + tokens,
                    response_tokens=report.response_tokens + sum(score.logprobs.size for score in new),
                    floored=report.floored + sum(score.floored for score in new),
                    refused={**report.refused, **reasons},
                )
                advance(len(scores), tokens, len(reasons))
                left -= len(rollouts)
            if left:  # others have scored them meanwhile
                advance(left, 0, 0)
        self._put_in_quarantine(provenance, report)
        return report

    def _put_in_quarantine(self, provenance: Provenance, report: ScoringReport) -> None:
        store, column = self.store, self.column
        if not report.refused and not report.skipped:
            return
        first = next(iter(report.refused.values()), "they were in quarantine before; pass `retry_quarantined=True` to try them again")
        accepted = int(store.scored(column).sum())
        if len(report.refused) > accepted:
            raise EngineError(
                f"{named(store)}, column {column!r}: {len(report.refused)} rollouts were refused and {accepted} accepted; "
                f"the first reason is {first!r}; none was put in quarantine, so set right what is wrong with them all and run it again."
            )
        if report.refused:
            store.quarantine(column, provenance, report.refused)
        warn_user(
            f"{named(store)}, column {column!r}: {len(report.refused) + report.skipped} rollouts are without scores in quarantine, and training "
            f"leaves them out; {first}",
            QuarantineWarning,
        )


def commit_scores(store: LogprobStore, column: str, provenance: Provenance, scores: Sequence[Scores]) -> None:
    """Append scores in one commit, or in several where they are many."""
    values = np.array([score.logprobs.size * max(provenance.top_k, 1) for score in scores], np.int64)
    for run in in_runs(values, _VALUES):
        store.append_scores(column, provenance, [scores[i] for i in run])
