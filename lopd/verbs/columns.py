"""Which rows and which score columns a run trains on: one teacher, several that share the rollouts among them, or none."""

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from lopd.errors import ArgumentError, InvalidRecordError, MissingScoresError, QuarantineWarning, TrainingWarning
from lopd.protocols import LogprobReader
from lopd.protocols.doors import ids_of
from lopd.protocols.labels import check_labels, labels_and_means, refuse_labels
from lopd.protocols.reading import check_same_prompts, chosen, elsewhere, named, samples_of, way_to
from lopd.records.arrays import Float32Array
from lopd.records.checks import a_kind
from lopd.records.manifest import Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, Prompt, ScoredRollout
from lopd.records.rows import Rows
from lopd.records.warn import warn_user

Teacher = str | Mapping[str, Sequence[Prompt]] | None


@frozen(eq=False)
class Columns:
    """Which score columns a step reads.

    Args:
        teachers: columns to learn from: none for SFT, one, or several that share the rollouts among them.
        ref: column of the reference policy, or None.
        top_k: whether the teachers' supports come along.
        place: (len(store),) which of several teachers a rollout learns from, or None.
        drawn: whether that of the reference policy comes along too, for tokens that were drawn from it.
        label: column of labels, or None.
        labels, means: (len(store),) the label of each rollout, and the mean of its group, or None.
    """

    teachers: tuple[str, ...]
    ref: str | None
    top_k: bool
    place: NDArray[np.int64] | None = None
    drawn: bool = False
    label: str | None = None
    labels: Float32Array | None = None
    means: Float32Array | None = None

    def width(self, store: LogprobReader) -> int:
        """Return how many log-probs of a token are read, about: those of the supports, where they come along."""
        return max([1, *(store.columns[name].top_k * (1 + self.drawn) for name in self.teachers if self.top_k)])

    def read(self, store: LogprobReader, rows: NDArray[np.int64]) -> Rows:
        """Return the rows in this order: scores of each one's own teacher as "teacher", of the reference policy as "ref", labels as "label"."""
        read = self._read_teachers(store, rows)
        if self.means is None:
            return read
        return evolve(read, scores={**read.scores, "label_mean": np.repeat(self.means[rows], read.response_lengths)})

    def _read_teachers(self, store: LogprobReader, rows: NDArray[np.int64]) -> Rows:
        if self.place is None:
            return self._read(store, rows, *self.teachers)
        records: dict[int, ScoredRollout] = {}
        for place in np.unique(self.place[rows]):
            mine = rows[self.place[rows] == place]
            records.update(zip(mine.tolist(), self._read(store, mine, self.teachers[place]), strict=True))
        return Rows.of([records[row] for row in rows.tolist()], top_k=[*["teacher"] * self.top_k, *["ref"] * self.drawn])

    def _read(self, store: LogprobReader, rows: NDArray[np.int64], teacher: str | None = None) -> Rows:
        columns = [column for column in (teacher, self.ref, self.label) if column is not None]
        read = store.read(rows.tolist(), columns=columns, top_k=columns[: self.top_k + self.drawn])
        return read.named(teacher=teacher, ref=self.ref, label=self.label)

    def provenances(self, store: LogprobReader) -> list[Provenance]:
        """Return who computed each of the teachers' columns."""
        return [_provenance(store, column, self.top_k) for column in self.teachers]


def choose(
    store: LogprobReader, teacher: Teacher, ref: str | None, rows: NDArray[np.int64] | None, *, label: str | None, top_k: bool
) -> tuple[Columns, NDArray[np.int64]]:
    """Return the columns to read, and the rows, ascending, that have scores in them; see `lopd.batches`.

    Warns:
        TrainingWarning: a row is named more than once.

    Raises:
        ArgumentError: `teacher` is neither a name nor a mapping of names, `ref` or `label` is not a name, or `top_k` not a bool.
        MissingScoresError: a column is not there, or not complete, or keeps no top-k though it is asked for.
        NoSuchRowError: a row is not in the store.
        ConflictError: rollouts have other prompts under the ids of a teacher's prompts.
        InvalidRecordError: there are no rows, a rollout has two teachers, teachers keep supports that are unlike, or labels are given for log-probs
            or the other way round.
    """
    if isinstance(teacher, Mapping) and (others := [column for column in teacher if not isinstance(column, str)]):
        raise ArgumentError(
            f"Teacher: one of several is {others[0]!r:.80}, expected the name of a column; leave it out, and train on text in a run of its own."
        )
    if not isinstance(teacher, str | Mapping | None):
        raise ArgumentError(
            f"Teacher: it is {a_kind(teacher)}, expected the name of a column; of several pass a dict with the prompts of each."
        )
    for name, column in (("Reference", ref), ("Label", label)):
        if not isinstance(column, str | None):
            raise ArgumentError(f"{name}: it is {a_kind(column)}, expected the name of a column; pass a str.")
    if not isinstance(top_k, bool | np.bool_):
        raise ArgumentError(f"Steps: top_k is {top_k!r:.80}, expected True or False; pass `top_k=True`, how many is the column's.")
    top_k = bool(top_k)
    refuse_labels(store, ref, *(teacher if isinstance(teacher, Mapping) else [teacher]))
    if label is not None:
        check_labels(store, label)
    wanted = chosen(store, rows)
    if rows is not None and len(wanted) < len(rows):
        warn_user(
            f"{named(store)}: {len(rows) - len(wanted)} of {len(rows)} rows are named again, and each is trained on once an epoch; pass "
            "`np.unique(rows)`, and sample more prompts of the kind that is to count more.",
            TrainingWarning,
        )
    parts = _parts(store, teacher, wanted)
    place, usable = np.full(len(store), -1, np.int64), list[NDArray[np.int64]]()
    for i, (column, part) in enumerate(parts.items()):
        place[part] = i
        usable.append(_usable(store, part, [name for name in (column, ref, label) if name is not None], ref))
    if top_k and teacher is None:
        raise MissingScoresError(f"{named(store)}: top_k=True needs a teacher; pass `teacher=`.")
    shares, names = place if isinstance(teacher, Mapping) else None, tuple(name for name in parts if name is not None)
    if top_k:
        _check_alike(store, names)
    kept = [store.columns.get(name or "") for name in (*names, ref)]
    drawn = top_k and all(provenance is not None and provenance.drawn for provenance in kept)
    labels, means = (None, None) if label is None else labels_and_means(store, label, wanted)
    return Columns(names, ref, top_k, shares, drawn, label, labels, means), np.sort(np.concatenate(usable))


def _parts(store: LogprobReader, teacher: Teacher, wanted: NDArray[np.int64]) -> dict[str | None, NDArray[np.int64]]:
    """Return column -> the rows that learn from it; None stands for SFT."""
    if not isinstance(teacher, Mapping):
        return {teacher: wanted}
    parts: dict[str | None, NDArray[np.int64]] = {}
    for column, rows in zip(teacher, samples_of(store, [*map(ids_of, teacher.values())], store.generations), strict=True):
        mine = np.intersect1d(rows, wanted)
        if not mine.size:
            raise InvalidRecordError(
                f"{named(store)}: column {column!r} was given prompts with 0 rollouts, expected at least 1; leave it out."
            )
        check_same_prompts(store, teacher[column], mine)
        parts[column] = mine
    every = np.concatenate([np.zeros(0, np.int64), *parts.values()])
    twice = np.flatnonzero(np.bincount(every, minlength=1) > 1)
    if twice.size or not every.size:
        what = f"row {twice[0]} has two teachers" if twice.size else "there are 0 teachers"
        raise InvalidRecordError(f"{named(store)}: {what}; give each prompt to one column.")
    return parts


def _usable(store: LogprobReader, rows: NDArray[np.int64], columns: Sequence[str], ref: str | None) -> NDArray[np.int64]:
    """Return those of the rows that have scores in all columns; the others must be in quarantine."""
    usable = np.ones(len(rows), np.bool_)
    for column in columns:
        scored = store.scored(column)[rows]
        reasons = store.quarantined(column)
        quarantined = rows[np.isin(rows, np.fromiter(reasons, np.int64))].tolist()
        done = int(scored.sum())
        if done + len(quarantined) < len(rows):
            if column not in (*store.columns, BEHAVIOR_COLUMN):
                # what the policy itself reported is not a teacher's
                there = [*store.columns, *([BEHAVIOR_COLUMN] if column == ref else [])]
                others = f", expected one of {there}; name one of them, or" if there else " and the rollouts have no scores yet;"
                raise MissingScoresError(
                    f"{named(store)}: column {column!r} is absent{others} run `score_rollouts(store, scorer, column={column!r})`"
                    f"{elsewhere(store)}."
                )
            labels = column in store.columns and store.columns[column].label
            remedy = way_to(store, column, " also for the others, with a constant where nothing can judge them" * labels)
            raise MissingScoresError(f"{named(store)}: column {column!r} has scores for {done} rollouts, expected {len(rows)}; {remedy}.")
        for row in quarantined[:1]:
            warn_user(
                f"{named(store)}: {len(quarantined)} of {len(rows)} rollouts could not be scored into column {column!r} and are left out; the first "
                f"is row {row} ({reasons[row]})",
                QuarantineWarning,
            )
        usable &= scored
    if not usable.any():
        raise MissingScoresError(f"{named(store)}: all {len(rows)} rollouts are in quarantine; see `store.quarantined`.")
    return rows[usable]


def _check_alike(store: LogprobReader, names: Sequence[str]) -> None:
    """Refuse teachers whose supports do not fit into one batch; a column that keeps none is refused by itself."""
    widths = {
        name: (store.columns[name].top_k, store.columns[name].drawn)
        for name in names
        if name in store.columns and store.columns[name].top_k
    }
    first = next(iter(widths), "")
    for name, (k, drawn) in widths.items():
        if widths[name] != widths[first]:
            raise InvalidRecordError(
                f"{named(store)}: column {name!r} keeps {k} tokens, {drawn} of them drawn, expected {widths[first][0]} and {widths[first][1]} as in "
                f"column {first!r}; score one of them again, into another column, with a support like the other's."
            )


def _provenance(store: LogprobReader, column: str, top_k: bool) -> Provenance:
    if column not in store.columns:
        raise InvalidRecordError(
            f"{named(store)}: column {column!r} holds what the policy itself reported, expected the scores of a teacher; pass `teacher='teacher'`."
        )
    if top_k and store.columns[column].top_k == 0:
        raise MissingScoresError(
            f"{named(store)}: column {column!r} keeps 0 most likely tokens, expected at least 1 for top_k=True; score another column with a scorer "
            f"that keeps them, `score_rollouts(store, HFScorer.from_folder(FOLDER, top_k=20), column='{column}-20')`, and name it as `teacher`."
        )
    return store.columns[column]
