"""VERB `batches`: a store -> the micro-batches of optimizer step k, which depend on (seed, k) alone."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import final

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from lopd.collate import Weighting, by_rollout, collate
from lopd.consistency import ConsistencyPolicy, check_teacher_consistency, lineage_after
from lopd.errors import InvalidRecordError, MissingScoresError, NoSuchRowError, QuarantineWarning
from lopd.guards import judge_advantages, stored_advantages
from lopd.manifest import Lineage, Provenance
from lopd.protocols import LogprobReader
from lopd.reading import rows_of
from lopd.types import BEHAVIOR_COLUMN, Batch, Prompt, ScoredRollout, Step

#: Where the scores of several teachers' columns go, one teacher for each rollout.
_MIXED = "teacher of the prompt"


@frozen(eq=False)
class Columns:
    """Which score columns a step reads.

    Args:
        teachers: columns to learn from: none for SFT, one, or several that share the rollouts among them.
        ref: of the reference policy, or None.
        top_k: whether the teachers' most likely tokens come along.
        place: (len(store),) which of several teachers a rollout learns from, or None.
    """

    teachers: tuple[str, ...]
    ref: str | None
    top_k: bool
    place: NDArray[np.int64] | None = None

    def read(self, store: LogprobReader, rows: NDArray[np.int64]) -> list[ScoredRollout]:
        """The rows in this order, each with the scores of its own teacher."""
        if self.place is None:
            return self._read(store, rows, self.teachers)
        records: dict[int, ScoredRollout] = {}
        for place in np.unique(self.place[rows]):
            mine, column = rows[self.place[rows] == place], self.teachers[place]
            records.update(zip(mine.tolist(), (_renamed(r, column) for r in self._read(store, mine, (column,))), strict=True))
        return [records[row] for row in rows.tolist()]

    def _read(self, store: LogprobReader, rows: NDArray[np.int64], teachers: tuple[str, ...]) -> list[ScoredRollout]:
        ref = () if self.ref is None else (self.ref,)
        return store.read(rows.tolist(), columns=(*teachers, *ref), top_k=teachers if self.top_k else ())

    @property
    def teacher(self) -> str | None:
        """The name under which `read` gives the teacher's scores."""
        return None if not self.teachers else self.teachers[0] if self.place is None else _MIXED


def _renamed(record: ScoredRollout, column: str) -> ScoredRollout:
    scores, top_k = ({_MIXED if name == column else name: value for name, value in d.items()} for d in (record.scores, record.top_k))
    return evolve(record, scores=scores, top_k=top_k)


@final
@frozen(eq=False)
class StepStream:
    """An iterable of `Step`; made by `batches`, which checks what it is made of.  Iterating twice gives the same steps twice.

    It trains on the `rows` that were there when it was made, also if the store grows.
    """

    lineage: Lineage
    store: LogprobReader = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    columns: Columns
    rollouts_per_step: int
    tokens_per_batch: int
    seed: int
    start: int
    stop: int | None
    weighting: Weighting

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
        records, teacher, ref = self.columns.read(self.store, rows), self.columns.teacher, self.columns.ref
        if ref is not None:
            _check_reference(self.store, ref, {record.rollout.generation for record in records})
        return collate(records, self.weighting, teacher=teacher, ref=ref, top_k=teacher if self.columns.top_k else None)


def batches(
    store: LogprobReader,
    *,
    rollouts_per_step: int = 256,
    tokens_per_batch: int = 4096,
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    rows: NDArray[np.int64] | None = None,
    teacher: str | Mapping[str, Sequence[Prompt]] | None = "teacher",
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
        rows: train on these only, for example `lopd.reading.rows_of(store, prompts, [generation])`; None for all.
        teacher: score column to learn from; None trains on the rollouts as they are (SFT).  Several teachers: column -> the prompts whose
            rollouts learn from it; rollouts of other prompts are left out.
        ref: score column of the reference policy, for losses with an importance ratio, and to have drift measured.  `"behavior"` is
            what each rollout's own policy reported, so also right where rollouts are of several rounds.
        weighting: what a token counts (`by_rollout` or `by_token`).
        top_k: bring the teacher's most likely tokens along, for losses on them.
        consistency: what to do about another, or an unknown, SFT teacher; each teacher is judged.

    Warns:
        AdvantageWarning: without a `ref`, so without an importance ratio, if many stored advantages are far below 0 (`lopd.guards`).

    Raises:
        TeacherConsistencyError: see `check_teacher_consistency`.
        MissingScoresError: a column is not there, or not complete, or keeps no top-k though it is asked for.
        NoSuchRowError: a row is not in the store.
        InvalidRecordError: the store is empty, a rollout has two teachers, `ref` is not of the policy, a rollout is longer than
            `tokens_per_batch`, or a number makes no sense.
    """
    if rollouts_per_step < 1 or seed < 0 or start < 0:
        raise InvalidRecordError(
            f"Steps: (rollouts_per_step, seed, start) is {(rollouts_per_step, seed, start)}, expected at least (1, 0, 0); pass such numbers."
        )
    if len(store) == 0:
        raise InvalidRecordError(f"{store!r}: it has 0 rollouts, expected at least 1; run `collect_rollouts` first.")
    parts = _parts(store, teacher, _wanted(store, rows))
    columns = Columns(
        tuple(parts) if teacher is not None else (), ref, top_k, _places(store, parts) if isinstance(teacher, Mapping) else None
    )
    usable = np.sort(np.concatenate([_usable(store, part, [c for c in (name, ref) if c is not None]) for name, part in parts.items()]))
    _check_lengths(store, usable, tokens_per_batch)
    if ref is not None and rows is None:
        _check_reference(store, ref, store.generations)
    provenances = [_provenance(store, column) for column in columns.teachers]
    for column, provenance in zip(columns.teachers, provenances, strict=True):
        check_teacher_consistency(store.manifest, provenance, consistency)
        if ref is None:
            judge_advantages(store, stored_advantages(store, teacher=column, rows=usable))
    _check_top_k(store, columns, provenances)
    lineage = lineage_after(store.manifest, provenances)
    return StepStream(lineage, store, usable, columns, rollouts_per_step, tokens_per_batch, seed, start, stop, weighting)


def _wanted(store: LogprobReader, rows: NDArray[np.int64] | None) -> NDArray[np.int64]:
    if rows is None:
        return np.arange(len(store))
    unique = np.unique(np.asarray(rows, np.int64))
    if not unique.size:
        raise InvalidRecordError(
            f"{store!r}: 0 rows were chosen, expected at least 1; look whether their prompts were sampled in that round."
        )
    if unique[0] < 0 or unique[-1] >= len(store):
        raise NoSuchRowError(f"{store!r}: row {unique[0] if unique[0] < 0 else unique[-1]} was chosen, expected one of {len(store)} rows.")
    return unique


def _parts(
    store: LogprobReader, teacher: str | Mapping[str, Sequence[Prompt]] | None, wanted: NDArray[np.int64]
) -> dict[str | None, NDArray[np.int64]]:
    """Column -> the rows that learn from it; None is no column, for SFT."""
    if not isinstance(teacher, Mapping):
        return {teacher: wanted}
    parts: dict[str | None, NDArray[np.int64]] = {}
    for column, prompts in teacher.items():
        mine = np.intersect1d(rows_of(store, prompts), wanted)
        if not mine.size:
            raise InvalidRecordError(f"{store!r}: column {column!r} was given prompts with 0 rollouts, expected at least 1; leave it out.")
        parts[column] = mine
    every = np.concatenate([np.zeros(0, np.int64), *parts.values()])
    twice = np.flatnonzero(np.bincount(every, minlength=1) > 1)
    if twice.size or not every.size:
        what = f"row {twice[0]} has two teachers" if twice.size else "there are 0 teachers"
        raise InvalidRecordError(f"{store!r}: {what}, expected one teacher for each rollout; give each prompt to one column.")
    return parts


def _places(store: LogprobReader, parts: Mapping[str | None, NDArray[np.int64]]) -> NDArray[np.int64]:
    place = np.full(len(store), -1, np.int64)
    for i, rows in enumerate(parts.values()):
        place[rows] = i
    return place


def _usable(store: LogprobReader, rows: NDArray[np.int64], columns: Sequence[str]) -> NDArray[np.int64]:
    """Those of the rows that have scores in all columns; the others must be in quarantine."""
    usable = np.ones(len(rows), np.bool_)
    for column in columns:
        scored = store.scored(column)[rows]
        chosen = set(rows.tolist())
        quarantined = {row: reason for row, reason in store.quarantined(column).items() if row in chosen}
        done = int(scored.sum())
        if done + len(quarantined) < len(rows):
            virtual = f"sample with an engine that reports its log-probs, or score the policy into another column than {BEHAVIOR_COLUMN!r}"
            remedy = virtual if column == BEHAVIOR_COLUMN else f"run `score_rollouts(..., column={column!r})`"
            raise MissingScoresError(f"{store!r}: column {column!r} has scores for {done} rollouts, expected {len(rows)}; {remedy}.")
        for row, reason in islice(quarantined.items(), 1):
            warnings.warn(
                f"{store!r}: {len(quarantined)} of {len(rows)} rollouts could not be scored into column {column!r} and are left out; the first is "
                f"row {row} ({reason})",
                QuarantineWarning,
                stacklevel=4,
            )
        usable &= scored
    if not usable.any():
        raise MissingScoresError(
            f"{store!r}: all {len(rows)} rollouts are in quarantine, expected some with scores; see `store.quarantined`."
        )
    return rows[usable]


def _check_lengths(store: LogprobReader, rows: NDArray[np.int64], tokens_per_batch: int) -> None:
    lengths = store.lengths()[rows].sum(axis=1) - 1
    longest = int(np.argmax(lengths))
    if lengths[longest] > tokens_per_batch:
        raise InvalidRecordError(
            f"Rollout {store.read([int(rows[longest])])[0].rollout.rollout_id!r}: it has {lengths[longest]} positions, expected at most "
            f"tokens_per_batch = {tokens_per_batch}; raise the cap."
        )


def _check_reference(store: LogprobReader, column: str, generations: Iterable[int]) -> None:
    provenance = store.columns.get(column)
    if provenance is None:  # the virtual column: of each rollout's own policy
        return
    for policy in (store.generations[generation] for generation in generations):
        if not provenance.model.same_weights(policy):
            raise InvalidRecordError(
                f"{store!r}: column {column!r} was scored by {provenance.model}, expected the policy that sampled, {policy}; "
                "an importance ratio to another model is none."
            )


def _check_top_k(store: LogprobReader, columns: Columns, provenances: Sequence[Provenance]) -> None:
    kept = [provenance.top_k for provenance in provenances]
    if columns.top_k and min(kept, default=0) == 0:
        column = columns.teachers[kept.index(0)] if kept else None
        raise MissingScoresError(
            f"{store!r}: column {column!r} keeps 0 most likely tokens, expected at least 1 for top_k=True; score with a scorer that keeps them."
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
