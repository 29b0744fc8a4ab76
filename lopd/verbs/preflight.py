"""What a scorer must show on a few rollouts before a whole column is paid for."""

import math
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from lopd.errors import EndTokenWarning, EngineChangeWarning, ScorerError
from lopd.protocols import LogprobReader, TeacherScorer
from lopd.protocols.reading import evenly, to_score
from lopd.records.checks import check_number, own_numbers
from lopd.records.manifest import Provenance
from lopd.records.parity import Parity, measure_parity
from lopd.records.rollouts import Rollout, ScoredRollout, Scores
from lopd.records.warn import warn_user
from lopd.verbs.asking import score_each

_ENDS_NEEDED = 3  # one response that the policy ended in a strange place is not evidence about the teacher

Answers = Mapping[str, Scores]  # by rollout id: what the scorer gave in its one call with all rollouts


@final
@frozen(eq=False)
class Preflight:
    """A self-test of a scorer, and a comparison with another engine that runs the same model.

    - *Repeatable*: a few rollouts are scored in one call and again one by one.  Prefix caches, kernels that depend on the
      batch, and replicas with different weights fail here.
    - *As before*: a column that was begun is continued only by a scorer that agrees with what is stored, of other rows where
      none of these is; another engine, or another version of it, draws a warning with the difference.
    - *As the trainer computes* (with `truth`): the differences are stored with the column (`Provenance.parity`).
    - *It knows how responses end*: a warning if its tokenizer ends texts with another token than the policy's, or if it finds the tokens that
      ended the responses next to impossible.

    Args:
        rollouts: how many are scored for the first two.
        repeat_bound: mean absolute difference, nats, that is allowed between two answers.
        truth: the same model in another engine, usually `HFScorer`, which computes as the trainer does; None leaves the comparison out.
        parity_rollouts: how many are compared with it.
        parity_bound: mean absolute difference, nats, that is allowed; what vLLM and transformers differ by is in
            `benchmarks/results/bench_engines.json`.
        parity_p99_bound: the largest allowed 99 % quantile: few tokens that are far off are a sign of misalignment, not of rounding.
        parity_bias_bound: the largest allowed mean difference, which does not average out.
        end_bound: how much less likely the end tokens may be than the policy's own before them, nats, before it warns.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    rollouts: int = 8
    repeat_bound: float = 0.05
    truth: TeacherScorer | None = None
    parity_rollouts: int = 32
    parity_bound: float = 0.1
    parity_p99_bound: float = 1.0
    parity_bias_bound: float = 0.05
    end_bound: float = 7.0

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Preflight", rollouts=1, parity_rollouts=1)
        for name in ("repeat_bound", "parity_bound", "parity_p99_bound", "parity_bias_bound", "end_bound"):
            value = getattr(self, name)
            check_number("Preflight", name, value, 0 <= value < math.inf, "finite and at least 0 nats")

    def check(self, store: LogprobReader, scorer: TeacherScorer, column: str, rows: NDArray[np.int64]) -> Provenance:
        """Return the provenance to store with the column: the scorer's, and how it compares with `truth`, on some of these rows.

        The rollouts of all checks are read first, and the scorer is called once with all of them; then once with each rollout that the column
        does not hold yet, alone; and `truth` once.  Rollouts that the scorer refuses are left out, except those that the column holds already.

        Raises:
            ScorerError: it does not give the same log-probs twice, is further from what is stored or from `truth` than allowed, or refuses what
                it scored before, or all.
        """
        lengths, scored = store.lengths().sum(axis=1), store.scored(column)

        def some(among: NDArray[np.int64], count: int) -> list[int]:
            return list(evenly(among[np.argsort(lengths[among], kind="stable")], count).tolist())

        done = rows[scored[rows]]
        # a new round, or the prompts of another file, begin with none; the column was begun all the same, with rows that this scorer may not take
        elsewhere = np.flatnonzero(scored & (lengths <= lengths[rows].max(initial=0)))
        new, held = some(rows[~scored[rows]], self.rollouts), some(done if done.size else elsewhere, self.rollouts)
        compared = [] if self.truth is None else some(rows, self.parity_rollouts)
        # a store may refuse a column that is not there, also for no rows
        before: Sequence[ScoredRollout] = store.read(held, columns=(column,)) if held else []
        others = [row for row in dict.fromkeys([*new, *compared]) if row not in set(held)]
        tested = [*held, *others]
        rollouts = dict(zip(tested, to_score(store, tested, scorer.provenance), strict=True))
        self._check_eos(scorer.provenance, store.manifest.tokenizer.eos_id, list(rollouts.values()))
        scores, refused = score_each(scorer, list(rollouts.values()), len(rollouts))
        together = {score.rollout_id: score for score in scores}
        if not done.size:
            before = [record for record in before if record.rollout.rollout_id not in refused]
        self._check_repeatable(scorer, [rollouts[row] for row in new], together, refused, begun=bool(done.size))
        difference = self._check_continued(scorer, column, before, together, refused)
        if (begun := store.columns.get(column)) is not None and begun.engine != scorer.provenance.engine:
            differ = f"; on {len(before)} rollouts their log-probs differ by {difference:.2g} nats on average" if before else ""
            warn_user(
                f"Scorer {scorer.provenance.model}: column {column!r} was begun with {begun.engine!r} and goes on with "
                f"{scorer.provenance.engine!r}{differ}",
                EngineChangeWarning,
            )
        if self.truth is None:
            return scorer.provenance
        return evolve(scorer.provenance, parity=self._check_parity(scorer, self.truth, [rollouts[row] for row in compared], together))

    def _check_repeatable(
        self, scorer: TeacherScorer, rollouts: Sequence[Rollout], together: Answers, refused: Mapping[str, str], *, begun: bool
    ) -> None:
        accepted = [rollout for rollout in rollouts if rollout.rollout_id in together]
        if rollouts and not accepted and not begun:
            raise ScorerError(
                f"Scorer {scorer.provenance.model}: it refused all {len(rollouts)} rollouts that it was tested on; the "
                f"first reason is {refused[rollouts[0].rollout_id]!r}; set right what is wrong with them all."
            )
        alone = []
        for rollout in accepted:
            scores, reasons = score_each(scorer, [rollout], 1)
            if reasons:
                raise ScorerError(
                    f"Scorer {scorer.provenance.model}, rollout {rollout.rollout_id!r}: it was refused alone and not in company "
                    f"({reasons[rollout.rollout_id]}); check that all replicas are set up alike."
                )
            alone += scores
        self._compare(scorer, alone, together, "when they are scored alone and in company")
        self._check_ends(scorer, accepted, together)

    def _check_continued(
        self, scorer: TeacherScorer, column: str, held: Sequence[ScoredRollout], together: Answers, refused: Mapping[str, str]
    ) -> float:
        for name in (record.rollout.rollout_id for record in held if record.rollout.rollout_id in refused):
            raise ScorerError(
                f"Scorer {scorer.provenance.model}, rollout {name!r}: it is refused ({refused[name]}) although column {column!r} holds its scores, "
                "expected the answer it gave before; see what has changed since."
            )
        stored = [Scores.of(record.rollout, record.scores[column], signed=scorer.provenance.signed) for record in held]
        return self._compare(scorer, stored, together, f"from those that column {column!r} holds")

    def _compare(self, scorer: TeacherScorer, others: Sequence[Scores], together: Answers, what: str) -> float:
        """Return the mean absolute difference over all tokens; stop if it is too large."""
        gaps = [np.abs(together[other.rollout_id].logprobs.astype(np.float64) - other.logprobs) for other in others]
        difference = float(np.concatenate(gaps).mean()) if gaps else 0.0
        if difference > self.repeat_bound:
            worst = others[int(np.argmax([gap.mean() for gap in gaps]))].rollout_id
            raise ScorerError(
                f"Scorer {scorer.provenance.model} ({scorer.provenance.engine}): its log-probs of {len(gaps)} rollouts differ by "
                f"{difference:.3g} nats on average {what}, expected at most {self.repeat_bound:g}, and most for {worst!r}; turn prefix caching "
                "off, check that all replicas serve the same weights, or raise `repeat_bound` if this noise is acceptable."
            )
        return difference

    def _check_eos(self, provenance: Provenance, eos_id: int | None, rollouts: Sequence[Rollout]) -> None:
        as_the_teacher = any(r.response_ids[-1] == provenance.eos_id for r in rollouts if r.finish_reason == "stop")
        if provenance.eos_id is not None and eos_id is not None and provenance.eos_id != eos_id and not as_the_teacher:
            warn_user(
                f"Scorer {provenance.model}: its texts end with token {provenance.eos_id}, expected the policy's {eos_id}; a student that learns "
                "from a base model while it ends as an instructed one, or the other way round, may not stop, so check how the responses end.",
                EndTokenWarning,
            )

    def _check_ends(self, scorer: TeacherScorer, rollouts: Sequence[Rollout], together: Answers) -> None:
        # the policy did not write what tools and users said
        own = [r for r in rollouts if r.finish_reason == "stop" and r.loss_mask[-1] and r.loss_mask[:-1].any()]
        ended = [together[r.rollout_id].logprobs[r.loss_mask] for r in own]
        if len(ended) < _ENDS_NEEDED:
            return
        at_end, before = float(np.mean([values[-1] for values in ended])), float(np.concatenate([values[:-1] for values in ended]).mean())
        if before - at_end > self.end_bound:
            warn_user(
                f"Scorer {scorer.provenance.model}: the tokens that ended {len(ended)} responses have a mean log-prob of {at_end:.3g} nats, and "
                f"those before them {before:.3g}, expected less than {self.end_bound:g} between the two; the teacher may end its own responses with "
                "another token, and a student that learns from it will not stop, so compare the EOS ids and chat templates of both.",
                EndTokenWarning,
            )

    def _check_parity(self, scorer: TeacherScorer, truth: TeacherScorer, rollouts: Sequence[Rollout], together: Answers) -> Parity:
        ours, theirs_is = scorer.provenance, truth.provenance
        if not ours.model.same_weights(theirs_is.model) or ours.logprobs_mode != theirs_is.logprobs_mode:
            raise ScorerError(
                f"Scorer {ours.model}: the truth it is to be compared with is {theirs_is.model} ({theirs_is.logprobs_mode}), expected the same "
                f"weights and {ours.logprobs_mode} log-probs; pass the same model to both, or the same `identity`, and the same privileged prompts."
            )
        accepted = [rollout for rollout in rollouts if rollout.rollout_id in together]
        theirs, refused = score_each(truth, accepted, len(accepted))
        rollouts = [rollout for rollout in accepted if rollout.rollout_id not in refused]
        if not any(rollout.loss_mask.any() for rollout in rollouts):
            raise ScorerError(
                f"Scorer {scorer.provenance.model}: {len(rollouts)} rollouts could be compared with {truth.provenance.engine}, and none "
                "of their tokens count; see why both do not accept them."
            )
        parity = measure_parity(
            rollouts, [together[s.rollout_id] for s in theirs], theirs, engine=scorer.provenance.engine, truth=truth.provenance.engine
        )
        bounds = {"mean": self.parity_bound, "p99": self.parity_p99_bound, "bias": self.parity_bias_bound}
        for name, bound in bounds.items():
            if abs(getattr(parity, name)) > bound:
                raise ScorerError(
                    f"Scorer {scorer.provenance.model}: {parity}, expected a {name} of at most {bound:g}; look for other dtypes, templates, "
                    f"quantisation or padded vocabularies, or raise `parity_{'' if name == 'mean' else name + '_'}bound` if this is acceptable."
                )
        return parity
