"""VERB `batches`: a store -> the micro-batches of optimizer step k, which depend on (seed, k) alone."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import final

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from lopd.collate import Weighting, by_rollout, collate
from lopd.consistency import ConsistencyPolicy, check_teacher_consistency, lineage_after
from lopd.errors import InvalidRecordError, MissingScoresError, QuarantineWarning
from lopd.manifest import Lineage, Provenance
from lopd.protocols import LogprobReader
from lopd.types import BEHAVIOR_COLUMN, Batch, Step


@final
@frozen(eq=False)
class StepStream:
    """An iterable of `Step`; made by `batches`, which checks what it is made of.  Iterating twice gives the same steps twice.

    It trains on the `rows` that were there when it was made, also if the store grows.
    """

    lineage: Lineage
    store: LogprobReader = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    rollouts_per_step: int
    tokens_per_batch: int
    seed: int
    start: int
    stop: int | None
    teacher: str | None
    ref: str | None
    weighting: Weighting
    top_k: bool = False

    def __iter__(self) -> Iterator[Step]:
        """Steps from `start` up to `stop`, or for ever."""
        index = self.start
        while self.stop is None or index < self.stop:
            yield self.step(index)
            index += 1

    def step(self, index: int) -> Step:
        """Step `index`, whatever was asked for before."""
        rows = self.rows[_places_of_step(index, self.rollouts_per_step, len(self.rows), self.seed)]
        lengths = self.store.lengths()[rows].sum(axis=1) - 1
        parts = tuple(self._batch(rows[part]) for part in _split(lengths, self.tokens_per_batch))
        return Step(index, parts, self.store.manifest.tokenizer.vocab_hash)

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        columns = tuple(name for name in (self.teacher, self.ref) if name is not None)
        supported = self.teacher if self.top_k else None
        records = self.store.read(rows.tolist(), columns=columns, top_k=() if supported is None else (supported,))
        return collate(records, self.weighting, teacher=self.teacher, ref=self.ref, top_k=supported)


def batches(
    store: LogprobReader,
    *,
    rollouts_per_step: int = 256,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    teacher: str | None = "teacher",
    ref: str | None = None,
    weighting: Weighting = by_rollout,
    top_k: bool = False,
    consistency: ConsistencyPolicy = ConsistencyPolicy.ERROR,
) -> StepStream:
    """The steps of a training run over a store, shuffled anew in each epoch; rollouts in quarantine are left out, with a warning.

    A resumed run equals an unbroken one if store and arguments are those of the run that was stopped.

    Args:
        store: rollouts, and the columns named below.
        rollouts_per_step: size of an optimizer step.
        tokens_per_batch: cap on the packed micro-batches that a step is split into; this bounds memory, and a plain loss holds the logits of
            all its response tokens (4 bytes * V each, a few times over).
        seed: of the shuffle; step k depends on (seed, k) alone.
        start: first step, so that a run resumes exactly.
        stop: one past the last step; None never ends.
        teacher: score column to learn from; None trains on the rollouts as they are (SFT).
        ref: score column of the reference policy, for losses with an importance ratio.
        weighting: what a token counts (`by_rollout` or `by_token`).
        top_k: bring the teacher's most likely tokens along, for losses on them.
        consistency: what to do about another, or an unknown, SFT teacher.

    Raises:
        TeacherConsistencyError: see `check_teacher_consistency`.
        MissingScoresError: a column is not there, or not complete, or keeps no top-k though it is asked for.
        InvalidRecordError: the store is empty, `ref` is not of the policy, a rollout is longer than `tokens_per_batch`, or a number makes no sense.
    """
    if rollouts_per_step < 1 or seed < 0 or start < 0:
        raise InvalidRecordError(
            f"Steps: (rollouts_per_step, seed, start) is {(rollouts_per_step, seed, start)}, expected at least (1, 0, 0); pass such numbers."
        )
    if len(store) == 0:
        raise InvalidRecordError(f"{store!r}: it has 0 rollouts, expected at least 1; run `collect_rollouts` first.")
    rows = _usable(store, [column for column in (teacher, ref) if column is not None])
    _check_lengths(store, rows, tokens_per_batch)
    if ref is not None:
        _check_reference(store, ref)
    provenance = None
    if teacher is not None:
        provenance = _provenance(store, teacher)
        check_teacher_consistency(store.manifest, provenance, consistency)
    if top_k and (provenance is None or provenance.top_k == 0):
        raise MissingScoresError(
            f"{store!r}: column {teacher!r} keeps 0 most likely tokens, expected at least 1 for top_k=True; score with a scorer that keeps them."
        )
    lineage = lineage_after(store.manifest, provenance)
    return StepStream(lineage, store, rows, rollouts_per_step, tokens_per_batch, seed, start, stop, teacher, ref, weighting, top_k)


def _usable(store: LogprobReader, columns: Sequence[str]) -> NDArray[np.int64]:
    """Rows that have scores in all columns; the others must be in quarantine."""
    usable = np.ones(len(store), np.bool_)
    for column in columns:
        scored, quarantined = store.scored(column), store.quarantined(column)
        done = int(scored.sum())
        if done + len(quarantined) < len(store):
            virtual = f"sample with an engine that reports its log-probs, or score the policy into another column than {BEHAVIOR_COLUMN!r}"
            remedy = virtual if column == BEHAVIOR_COLUMN else f"run `score_rollouts(..., column={column!r})`"
            raise MissingScoresError(f"{store!r}: column {column!r} has scores for {done} rollouts, expected {len(store)}; {remedy}.")
        for row, reason in islice(quarantined.items(), 1):
            warnings.warn(
                f"{store!r}: {len(quarantined)} of {len(store)} rollouts could not be scored into column {column!r} and are left out; the first is "
                f"row {row} ({reason})",
                QuarantineWarning,
                stacklevel=3,
            )
        usable &= scored
    if not usable.any():
        raise MissingScoresError(
            f"{store!r}: all {len(store)} rollouts are in quarantine, expected some with scores; see `store.quarantined`."
        )
    return np.flatnonzero(usable)


def _check_lengths(store: LogprobReader, rows: NDArray[np.int64], tokens_per_batch: int) -> None:
    lengths = store.lengths()[rows].sum(axis=1) - 1
    longest = int(np.argmax(lengths))
    if lengths[longest] > tokens_per_batch:
        raise InvalidRecordError(
            f"Rollout {store.read([int(rows[longest])])[0].rollout.rollout_id!r}: it has {lengths[longest]} positions, expected at most "
            f"tokens_per_batch = {tokens_per_batch}; raise the cap."
        )


def _check_reference(store: LogprobReader, column: str) -> None:
    provenance = store.columns.get(column)
    for policy in store.generations.values():
        if provenance is not None and not provenance.model.same_weights(policy):
            raise InvalidRecordError(
                f"{store!r}: column {column!r} was scored by {provenance.model}, expected the policy that sampled, {policy}; "
                "an importance ratio to another model is none."
            )


def _provenance(store: LogprobReader, column: str) -> Provenance:
    if column not in store.columns:
        raise InvalidRecordError(
            f"{store!r}: column {column!r} holds what the policy itself reported, expected the scores of a teacher; pass `teacher='teacher'`, say."
        )
    return store.columns[column]


def _places_of_step(index: int, count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Places (of `total`) of step `index`: a window on the endless sequence of epochs, each a permutation seeded by (seed, epoch)."""
    places = np.arange(index * count, (index + 1) * count)
    epochs = places // total
    shuffles = {int(e): np.random.default_rng((seed, int(e))).permutation(total) for e in np.unique(epochs)}
    return np.array([shuffles[int(e)][p % total] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)


def _split(lengths: NDArray[np.int64], cap: int) -> list[slice]:
    """Consecutive slices whose lengths add up to at most `cap` each."""
    slices: list[slice] = []
    first, used = 0, 0
    for i, length in enumerate(lengths):
        if used + length > cap:
            slices.append(slice(first, i))
            first, used = i, 0
        used += int(length)
    return [*slices, slice(first, len(lengths))]
