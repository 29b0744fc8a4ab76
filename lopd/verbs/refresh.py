"""Between Lightning and online OPD: rollouts that are sampled again when they have become old.

A *round* is: sample with the student as it is, score, train some steps.  Lightning OPD is one round without end, online OPD a round for every
step; `refresh_every` and `refresh_when` are what lies between, as plain generators around a function that makes a round:

    def make_round(generation, start):
        source = evolve(policy, generation=generation, identity=ModelId("student", f"step-{start}", "float32"))
        rows = sample_round(source, teacher, prompts, store)
        steps = batches(store, rows=rows, first=25 * generation, ref="behavior")[start:]
        return opd_steps(student, steps, loss, optimizer)

    for metrics in refresh_every(25, make_round, stop=150): ...

`first` is the step with which the round begins, and `start` that with which this call does: a later one where a run resumes within a round.
All rounds go into one store, each with its number and the policy that sampled it, so a ratio to `behavior` is one to the policy of the
rollout's own round.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lopd.errors import ConflictError, InvalidRecordError, TrainingWarning
from lopd.protocols import LogprobStore, RolloutSource, TeacherScorer
from lopd.protocols.doors import check_noun, ids_of
from lopd.protocols.reading import named, rows_of
from lopd.records.checks import check_at_least, check_call
from lopd.records.rollouts import Prompt, policy_column, rollout_id
from lopd.records.steps import StepMetrics
from lopd.records.warn import warn_user
from lopd.verbs.collect import collect_rollouts
from lopd.verbs.preflight import Preflight
from lopd.verbs.scoring import score_rollouts

_REMEDY = "give a round `batches(...)[start:]`, and the number of the last step to `stop=`."


class Round(Protocol):
    """Samples with the student as it is, and trains on that."""

    def __call__(self, generation: int, start: int, /) -> Iterable[StepMetrics]:
        """Return metrics of step `start` and all after it, without end, on rollouts of this generation."""
        ...


def refresh_every(steps: int, make_round: Round, *, start: int = 0, stop: int | None = None) -> Iterator[StepMetrics]:
    """Yield steps of a training run, none on rollouts of a policy that is `steps` steps or more behind.

    Args:
        steps: number of steps of a round; 1 is online OPD.
        make_round: one round.
        start: first step; its round is the one it would have been in, so that a run resumes exactly.
        stop: one past the last step, and no round begins there; None never ends.

    Raises:
        InvalidRecordError: `steps` is less than 1, or `start` or `stop` than 0; or a round ended by itself, or its steps have other numbers.
    """
    check_call("Refresh: make_round", make_round, "generation,first")
    steps = check_at_least("Refresh", "steps", steps, 1)
    start = check_at_least("Refresh", "start", start, 0)
    stop = None if stop is None else check_at_least("Refresh", "stop", stop, 0)
    for generation in count(start // steps):
        first, end = max(start, generation * steps), (generation + 1) * steps
        end = end if stop is None else min(end, stop)
        if first >= end:
            return
        ended = first
        for metrics in islice(make_round(generation, first), end - first):
            _check_step(generation, metrics, ended, most=ended)  # islice counts them
            yield metrics
            ended += 1
        _check_whole(generation, ended, end)


def refresh_when(
    stale: Callable[[StepMetrics], bool], make_round: Round, *, start: int = 0, stop: int | None = None, generation: int | None = None
) -> Iterator[StepMetrics]:
    """Yield steps of a training run; one after which the rollouts are stale is the last of its round.

    Args:
        stale: whether a step's metrics ask for a new round, such as `lambda m: m.drift.ratio_mean < 0.9`.
        make_round: one round.
        start: first step, so that a run resumes exactly.
        stop: one past the last step, and no round begins there; None never ends.  Where a round leaves steps out, the first beyond it is not given.
        generation: the round of `start`: that of the step before, or the next one if that step was stale.  None is 0, the first round.

    Warns:
        TrainingWarning: the run begins after step 0, and it is not known with which round.

    Raises:
        InvalidRecordError: `start`, `stop` or `generation` is less than 0; or a round ended by itself, or its steps have other numbers.
    """
    check_call("Refresh: stale", stale, "metrics")
    check_call("Refresh: make_round", make_round, "generation,first")
    start = check_at_least("Refresh", "start", start, 0)
    stop = None if stop is None else check_at_least("Refresh", "stop", stop, 0)
    if generation is None and start and (stop is None or start < stop):
        warn_user(
            f"Refresh: start is {start}, and `generation` is not given, so this run begins with round 0; pass the round of step {start}, or 0 if it "
            "is the first.",
            TrainingWarning,
        )
    for current in count(0 if generation is None else check_at_least("Refresh", "generation", generation, 0)):
        if stop is not None and start >= stop:
            return
        for metrics in make_round(current, start):
            _check_step(current, metrics, start)
            if stop is not None and metrics.step >= stop:
                return
            yield metrics
            start = metrics.step + 1  # some may be left out
            if stale(metrics) or start == stop:
                break
        else:
            _check_whole(current, start, None)


def _check_step(generation: int, metrics: StepMetrics, wanted: int, most: float = math.inf) -> None:
    """Refuse a round that counts its steps in another way, from 0 for example: checkpoints and `stop` go by these numbers."""
    if not wanted <= metrics.step <= most:
        later = " or a later one" if most > wanted else ""
        raise InvalidRecordError(f"Refresh: round {generation} gave step {metrics.step}, expected step {wanted}{later}; {_REMEDY}")


def _check_whole(generation: int, ended: int, wanted: int | None) -> None:
    """Refuse a round that ended by itself: the next ones would be sampled for nothing, or their steps be other ones."""
    if ended != wanted:
        raise InvalidRecordError(
            f"Refresh: round {generation} ended before step {ended}, expected steps {'without end' if wanted is None else f'up to {wanted}'}; "
            f"{_REMEDY}"
        )


def sample_round(
    source: RolloutSource,
    scorer: TeacherScorer,
    prompts: Sequence[Prompt],
    store: LogprobStore,
    *,
    column: str = "teacher",
    preflight: Preflight | None = None,
    prompts_per_batch: int = 1024,
) -> NDArray[np.int64]:
    """Collect the source's generation, unless another policy did, and score it; its rows in the store.

    A run that resumes in the middle of a round may have a student that is no longer the one that sampled: on a GPU, steps that are computed again
    are not equal bit for bit.  What was sampled is kept, and scored.

    Args:
        source: the student as it is, its manifest with the number of the round and an identity that no other step has.
        scorer: the teacher.
        prompts: this round's prompts.
        store: made with the manifest of the first round's source.
        column: where the scores go.
        preflight: the self-test of `score_rollouts`; the first round's is enough.
        prompts_per_batch: sampled together and committed together, and as many rollouts are scored together; training waits for the round, so many.

    Warns:
        TrainingWarning: another policy sampled a part of the round, and was stopped or refused the rest; or it sampled the round, and a later one
            is there: right for a run that resumes from a checkpoint of before that one, and for no other.

    Raises:
        ConflictError: none of these rollouts was committed by it, with its candidates where the source keeps them.
    """
    check_noun(source, RolloutSource)
    check_noun(store, LogprobStore)
    manifest, samples = source.manifest, source.manifest.sampling.samples_per_prompt
    sampled_by = store.generations.get(manifest.generation, manifest.policy)
    if sampled_by == manifest.policy:
        collect_rollouts(source, prompts, store, prompts_per_batch=prompts_per_batch)
    there, whole = store.find([rollout_id(name, s, manifest.generation) for name in ids_of(prompts) for s in range(samples)]), ""
    rows = np.unique(there[there >= 0])
    if sampled_by != manifest.policy and len(rows) < len(prompts) * samples:
        rows = rows_of(store, prompts, [manifest.generation])  # imported ones may be numbered with gaps
    if sampled_by != manifest.policy and manifest.sampling.candidates + manifest.sampling.drawn:
        # a kill between the two appends of a batch left it without, and only the policy that sampled could fill them in
        rows, whole = rows[store.scored(policy_column(manifest.generation))[rows]], " with their candidates"
    asked = len(prompts) * samples
    if len(rows) < asked and sampled_by != manifest.policy:
        found = f"{named(store)}: round {manifest.generation} has {len(rows)} of these rollouts{whole}, expected {asked}"
        found = f"{found}; {sampled_by} was stopped, or refused the rest"
        if not len(rows):
            raise ConflictError(f"{found}, and another policy cannot go on: give the round a number of its own (`generation`).")
        warn_user(f"{found}, and the student computes a little otherwise now, so this round trains on fewer.", TrainingWarning)
    if sampled_by != manifest.policy and manifest.generation < (latest := max(store.generations)):
        warn_user(
            f"{named(store)}: {sampled_by} sampled round {manifest.generation}, and round {latest} is there too, so the student "
            f"({manifest.policy}) trains on what an earlier run sampled; if this run goes on from a checkpoint of before round {latest}, this is "
            "right; if it is another run, give it a store of its own.",
            TrainingWarning,
        )
    score_rollouts(store, scorer, column=column, preflight=preflight, rows=rows, rollouts_per_batch=prompts_per_batch)
    return rows
