"""Stored advantages, teacher minus student log-prob, of a sample of rollouts: what the doctor and the reports summarise."""

from collections.abc import Iterable, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import MissingScoresError
from lopd.protocols import LogprobReader
from lopd.protocols.labels import refuse_labels
from lopd.protocols.reading import named, walk
from lopd.records.drift import AdvantageSummary
from lopd.records.rollouts import VIRTUAL_COLUMNS, prompt_id_of


@frozen(eq=False)
class SampledAdvantages:
    """Unclipped advantages of B rollouts, of their M tokens that count.

    Args:
        rows: (B,) rows of the store.
        rounds: (B,) rounds of sampling.
        prompt_ids: (B,) ids of their prompts.
        segments: (M,) place of the rollout among the B.
        place: (M,) position in the response, from 0 to 1.
        gap: (M,) advantage, nats.
    """

    rows: NDArray[np.int64]
    rounds: NDArray[np.int64]
    prompt_ids: NDArray[np.str_]
    segments: NDArray[np.int64]
    place: NDArray[np.float64]
    gap: NDArray[np.float64]

    @property
    def summary(self) -> AdvantageSummary | None:
        """Summary of all tokens; None if there are none."""
        return AdvantageSummary.of(self.gap) if self.gap.size else None


def check_columns(store: LogprobReader, columns: Iterable[str]) -> None:
    """Refuse columns that are not there.

    Raises:
        MissingScoresError: a column is absent.
    """
    there = [*store.columns, *(column for column in VIRTUAL_COLUMNS if store.scored(column).any())]
    for column in columns:
        if column not in there:
            raise MissingScoresError(f"{named(store)}: column {column!r} is absent, expected one of {there}; name one of them.")


def scored_rows(store: LogprobReader, columns: Iterable[str]) -> NDArray[np.int64]:
    """Return the rows that have scores in all of these columns."""
    usable = np.ones(len(store), np.bool_)
    for column in columns:
        usable &= store.scored(column)
    return np.flatnonzero(usable)


def sample_advantages(store: LogprobReader, teacher: str, student: str, rows: Sequence[int] | NDArray[np.int64]) -> SampledAdvantages:
    """Return the advantages of these rows, which have scores in both columns; InvalidRecordError where one is of labels."""
    refuse_labels(store, teacher, student)
    every, rounds, prompt_ids = np.asarray(rows, np.int64), list[int](), list[str]()
    places, gaps = [np.empty(0)], [np.empty(0)]
    for record in walk(store, every, (teacher, student)):
        on_T = record.rollout.loss_mask
        rounds.append(record.rollout.generation)
        prompt_ids.append(prompt_id_of(record.rollout.rollout_id))
        places.append(((np.arange(on_T.size) + 0.5) / on_T.size)[on_T])
        gaps.append((record.scores[teacher].astype(np.float64) - record.scores[student])[on_T])
    segments = np.repeat(np.arange(len(every)), [gap.size for gap in gaps[1:]])
    return SampledAdvantages(
        every, np.array(rounds, np.int64), np.array(prompt_ids, np.str_), segments, np.concatenate(places), np.concatenate(gaps)
    )
