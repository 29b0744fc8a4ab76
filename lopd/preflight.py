"""What a scorer must show on a few rollouts before a whole column is paid for."""

import math
import warnings
from collections.abc import Sequence
from typing import final

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from lopd.checks import check_at_least, check_number
from lopd.errors import EndTokenWarning, ScorerError
from lopd.isolation import score_each
from lopd.manifest import Provenance
from lopd.parity import Parity, compare
from lopd.protocols import LogprobReader, TeacherScorer
from lopd.reading import evenly
from lopd.types import Rollout, Scores

_ENDS_NEEDED = 3  # one response that the policy ended in a strange place says nothing about the teacher


@final
@frozen(eq=False)
class Preflight:
    """A self-test of a scorer, and a comparison with another engine that runs the same model.

    - *It says the same twice*: a few rollouts are scored in one call and again one by one.  Prefix caches, kernels that depend on the
      batch, and replicas with different weights fail here.
    - *It says what it said before*: a column that was begun is continued only by a scorer that agrees with what is stored.
    - *It says what the trainer would say* (with `truth`): the differences are stored with the column (`Provenance.parity`).
    - *It knows how responses end*: a warning if it finds the tokens that ended the responses next to impossible, as a teacher does that
      ends its own with another token.

    Args:
        rollouts: how many are scored for the first two.
        repeat_bound: mean absolute difference, nats, that is allowed between two answers.
        truth: the same model in another engine, usually `HFScorer`, which computes as the trainer does; None leaves the comparison out.
        parity_rollouts: how many are compared with it.
        parity_bound: mean absolute difference, nats, that is allowed.  Measured with SmolLM2-135M in bfloat16: 0.05 between vLLM and transformers; in
            float32 less than 0.0001.
        end_bound: how much less likely the end tokens may be than those before them, nats, before it warns.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    rollouts: int = 8
    repeat_bound: float = 0.05
    truth: TeacherScorer | None = None
    parity_rollouts: int = 32
    parity_bound: float = 0.1
    end_bound: float = 7.0

    def __attrs_post_init__(self) -> None:
        for name in ("rollouts", "parity_rollouts"):
            check_at_least("Preflight", name, getattr(self, name), 1)
        for name in ("repeat_bound", "parity_bound", "end_bound"):
            value = getattr(self, name)
            check_number("Preflight", name, value, 0 <= value < math.inf, "finite and at least 0 nats")

    def check(self, store: LogprobReader, scorer: TeacherScorer, column: str) -> Provenance:
        """The provenance to store with the column: the scorer's, and how it compares with `truth`.

        Rollouts that the scorer refuses are left out.

        Raises:
            ScorerError: it does not give the same log-probs twice, or is further from what is stored or from `truth` than allowed.
        """
        by_length = np.argsort(store.lengths().sum(axis=1), kind="stable")
        scored = store.scored(column)[by_length]
        self._check_repeatable(store, scorer, evenly(by_length[~scored], self.rollouts))
        self._check_continued(store, scorer, column, evenly(by_length[scored], self.rollouts))
        if self.truth is None:
            return scorer.provenance
        parity = self._check_parity(scorer, self.truth, _read(store, evenly(by_length, self.parity_rollouts)))
        return evolve(scorer.provenance, parity=parity)

    def _check_repeatable(self, store: LogprobReader, scorer: TeacherScorer, rows: NDArray[np.int64]) -> None:
        rollouts, together = _accepted(scorer, _read(store, rows))
        for rollout, scores in reversed(list(zip(rollouts, together, strict=True))):
            alone, refused = score_each(scorer, [rollout])
            if refused:
                raise ScorerError(
                    f"Scorer {scorer.provenance.model}, rollout {rollout.rollout_id!r}: it was refused alone and not in company, expected the same "
                    f"answer to both ({refused[rollout.rollout_id]}); check that all replicas are set up alike."
                )
            self._compare(scorer, rollout, alone[0], scores, "when it is scored alone and in company")
        self._check_ends(scorer, rollouts, together)

    def _check_continued(self, store: LogprobReader, scorer: TeacherScorer, column: str, rows: NDArray[np.int64]) -> None:
        records = {r.rollout.rollout_id: r for r in store.read(rows.tolist(), columns=(column,))}
        rollouts, again = _accepted(scorer, [record.rollout for record in records.values()])
        for rollout, scores in zip(rollouts, again, strict=True):
            stored = Scores.of(rollout, records[rollout.rollout_id].scores[column])
            self._compare(scorer, rollout, scores, stored, f"from those that column {column!r} holds")

    def _compare(self, scorer: TeacherScorer, rollout: Rollout, mine: Scores, other: Scores, what: str) -> None:
        difference = float(np.abs(mine.logprobs.astype(np.float64) - other.logprobs).mean())
        if difference > self.repeat_bound:
            raise ScorerError(
                f"Scorer {scorer.provenance.model} ({scorer.provenance.engine}), rollout {rollout.rollout_id!r}: its log-probs differ by "
                f"{difference:.3g} nats on average {what}, expected at most {self.repeat_bound:g}; turn prefix caching off, check that all "
                "replicas serve the same weights, or raise `repeat_bound` if this noise is acceptable."
            )

    def _check_ends(self, scorer: TeacherScorer, rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> None:
        ended = [s.logprobs for r, s in zip(rollouts, scores, strict=True) if r.finish_reason == "stop" and r.response_ids.size > 1]
        if len(ended) < _ENDS_NEEDED:
            return
        at_end, before = float(np.mean([values[-1] for values in ended])), float(np.concatenate([values[:-1] for values in ended]).mean())
        if before - at_end > self.end_bound:
            warnings.warn(
                f"Scorer {scorer.provenance.model}: the tokens that ended {len(ended)} responses have a mean log-prob of {at_end:.3g} nats, and "
                f"those before them {before:.3g}, expected less than {self.end_bound:g} between the two; the teacher may end its own responses with "
                "another token, and a student that learns from it will not stop, so compare the EOS ids and chat templates of both.",
                EndTokenWarning,
                stacklevel=5,
            )

    def _check_parity(self, scorer: TeacherScorer, truth: TeacherScorer, rollouts: Sequence[Rollout]) -> Parity:
        if not scorer.provenance.model.same_weights(truth.provenance.model):
            raise ScorerError(
                f"Scorer {scorer.provenance.model}: the truth it is to be compared with is {truth.provenance.model}, expected the same weights; "
                "pass the same model to both, or the same `identity`."
            )
        rollouts, ours = _accepted(scorer, rollouts)
        accepted, theirs = _accepted(truth, rollouts)
        ours = [scores for scores in ours if scores.rollout_id in {rollout.rollout_id for rollout in accepted}]
        parity = compare(accepted, ours, theirs, engine=scorer.provenance.engine, truth=truth.provenance.engine)
        if parity.mean > self.parity_bound:
            raise ScorerError(
                f"Scorer {scorer.provenance.model}: {parity}, expected a mean of at most {self.parity_bound:g}; look for other dtypes, templates, "
                "quantisation or padded vocabularies, or raise `parity_bound` if this is acceptable."
            )
        return parity


def _read(store: LogprobReader, rows: NDArray[np.int64]) -> list[Rollout]:
    return [record.rollout for record in store.read(rows.tolist())]


def _accepted(scorer: TeacherScorer, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[Scores]]:
    """The rollouts that it does not refuse, and their scores."""
    scores, refused = score_each(scorer, rollouts)
    return [rollout for rollout in rollouts if rollout.rollout_id not in refused], scores
