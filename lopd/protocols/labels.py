"""Columns of labels: a verifier's values of rollouts, or of their tokens.  They are read here, and kept from where log-probs are expected.

A label of a whole rollout stands at each of its response tokens, so that the stores know one kind of column.
"""

import numpy as np
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.protocols import LogprobReader
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import in_batches, named, samples_of
from lopd.records.arrays import Float32Array
from lopd.records.rollouts import prompt_id_of
from lopd.records.rows import Rows

_ROWS_PER_READ = 1024


def refuse_labels(store: LogprobReader, *columns: str | None) -> None:
    """Refuse columns of labels where log-probs are expected.

    Raises:
        InvalidRecordError: a column holds labels; it names the verifier.
    """
    for column in columns:
        made = store.columns.get(column or "")
        if made is not None and made.label:
            raise InvalidRecordError(
                f"{named(store)}: column {column!r} holds labels of {made.model}, expected a model's log-probs; pass "
                f"`batches(label={column!r})` to train with them."
            )


def check_labels(store: LogprobReader, column: str) -> None:
    """Refuse a column that does not hold labels.

    Raises:
        MissingScoresError: it is absent.
        InvalidRecordError: it holds log-probs.
    """
    made = store.columns.get(column)
    remedy = f"run `label_rollouts(store, verifier, prompts, column={column!r})`"
    if made is None:
        there = [name for name, provenance in store.columns.items() if provenance.label]
        raise MissingScoresError(f"{named(store)}: column {column!r} is absent, expected labels, of which there are {there}; {remedy}.")
    if not made.label:
        raise InvalidRecordError(
            f"{named(store)}: column {column!r} holds log-probs of {made.model}, expected labels; name another, or {remedy}."
        )


def labels_of(store: LogprobReader, column: str = "label") -> Float32Array:
    """Return (len(store),): the label of each rollout, NaN where it has none.  Reads the column once.

    Where tokens have labels of their own, it is their mean over the response tokens that count, or over all where none does.

        store_rows = np.flatnonzero(labels_of(store) == 1)  # for `batches(rows=...)`

    Raises:
        ArgumentError: the store is something else.
        MissingScoresError: there is no such column.
        InvalidRecordError: the column holds log-probs.
    """
    return _read(store, column)[0]


def labels_and_means(store: LogprobReader, column: str, rows: NDArray[np.int64] | None = None) -> tuple[Float32Array, Float32Array | None]:
    """Return (len(store),) labels, and (len(store),) the mean label of each rollout's group; None if no group has two rollouts.

    A group is all labelled rollouts of one prompt, by its id and its tokens, that one policy sampled, whichever of them are trained on.
    With `rows`, the others are NaN where no group needs them: labels of rounds that have none of these are not read.  Then members are found by their
    ids, as in `rows_of`; if that misses any of `rows`, all are read.

    Raises:
        MissingScoresError, InvalidRecordError: as `labels_of`.
    """
    labels, groups = _read(store, column, rows)
    there = groups >= 0
    counts = np.bincount(groups[there], minlength=1)
    if counts.max() < 2:
        return labels, None
    found = np.full(len(store), np.nan, np.float32)
    found[there] = (np.bincount(groups[there], labels[there]) / counts)[groups[there]]
    return labels, found


def _read(store: LogprobReader, column: str, rows: NDArray[np.int64] | None = None) -> tuple[Float32Array, NDArray[np.int64]]:
    """Return the (len(store),) labels, and the (len(store),) numbers of groups; a row that has no label, or was not asked for, has NaN and -1."""
    check_noun(store, LogprobReader)
    check_labels(store, column)
    labels, groups = np.full(len(store), np.nan, np.float32), np.full(len(store), -1, np.int64)
    numbers: dict[tuple[str, int, int], int] = {}
    left = store.scored(column)

    def take(rows: NDArray[np.int64]) -> None:
        for part in in_batches(rows[left[rows]], _ROWS_PER_READ):
            read = store.read(part, columns=(column,))
            labels[part] = mean_labels(read, column)
            # turns of one conversation share its id, and have other prompts
            starts = read.token_ends[:-1]
            prompts = [read.token_ids[start:stop].tobytes() for start, stop in zip(starts, starts + read.prompt_lengths, strict=True)]
            keys = zip(map(prompt_id_of, read.rollout_ids), map(hash, prompts), read.generations.tolist(), strict=True)
            groups[part] = [numbers.setdefault(key, len(numbers)) for key in keys]

    every = np.arange(len(store))
    take(every if rows is None else rows)
    if rows is not None and len(rows) < len(every):
        rounds = {generation for _, _, generation in numbers}
        rest = every if rounds == {*store.generations} else samples_of(store, [[prompt for prompt, _, _ in numbers]], rounds)[0]
        if not np.isin(rows[left[rows]], rest).all():  # ids of another form, of which more may be missed
            rest = every
        take(rest[groups[rest] < 0])
    return labels, groups


def mean_labels(read: Rows, column: str) -> NDArray[np.float64]:
    """Return (B,): the label of each rollout, the mean over its tokens that count."""
    starts, values_M = read.response_ends[:-1], read.scores[column].astype(np.float64)
    on_M = np.ones(len(values_M)) if read.loss_mask is None else read.loss_mask.astype(np.float64)
    on_M += np.repeat(np.add.reduceat(on_M, starts) == 0, read.response_lengths)
    means: NDArray[np.float64] = np.add.reduceat(on_M * values_M, starts) / np.add.reduceat(on_M, starts)
    return means
