"""Stored advantages, teacher minus student log-prob, of a sample of rollouts: what the doctor and the reports summarise."""

from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import MissingScoresError
from lopd.protocols import LogprobReader
from lopd.protocols.reading import in_batches
from lopd.records.drift import AdvantageSummary
from lopd.records.rollouts import BEHAVIOR_COLUMN


@frozen(eq=False)
class SampledRollout:
    """The advantages of one rollout, of its N tokens that count.

    Args:
        row: in the store.   generation: round of sampling.
        place: (N,) position in the response, from 0 to 1.
        gap: (N,) advantage, nats, unclipped.
    """

    row: int
    generation: int
    place: NDArray[np.float64]
    gap: NDArray[np.float64]


def check_columns(store: LogprobReader, columns: Iterable[str]) -> None:
    """Refuse columns that are not there.

    Raises:
        MissingScoresError: a column is absent.
    """
    there = [*store.columns, *([BEHAVIOR_COLUMN] if store.scored(BEHAVIOR_COLUMN).any() else [])]
    for column in columns:
        if column not in there:
            raise MissingScoresError(f"{store!r}: column {column!r} is absent, expected one of {there}; name one of them.")


def scored_rows(store: LogprobReader, columns: Iterable[str]) -> NDArray[np.int64]:
    """Return the rows that have scores in all of these columns."""
    usable = np.ones(len(store), np.bool_)
    for column in columns:
        usable &= store.scored(column)
    return np.flatnonzero(usable)


def sample_advantages(store: LogprobReader, teacher: str, student: str, rows: Sequence[int] | NDArray[np.int64]) -> list[SampledRollout]:
    """Return the advantages of these rows, which have scores in both columns."""
    sampled = []
    for part in in_batches(np.asarray(rows, np.int64)):
        for row, record in zip(part, store.read(part, columns=(teacher, student)), strict=True):
            on_T = record.rollout.loss_mask
            place_T = (np.arange(on_T.size) + 0.5) / on_T.size
            gap_T = record.scores[teacher].astype(np.float64) - record.scores[student]
            sampled.append(SampledRollout(row, record.rollout.generation, place_T[on_T], gap_T[on_T]))
    return sampled


def summarise(sampled: Sequence[SampledRollout]) -> AdvantageSummary | None:
    """Summarise all tokens together; None if there are none."""
    return AdvantageSummary.of(np.concatenate([rollout.gap for rollout in sampled])) if any(r.gap.size for r in sampled) else None
