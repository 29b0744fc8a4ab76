"""Two columns of log-probs side by side: of one store or of two, matched by rollout id."""

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.protocols import LogprobReader
from lopd.protocols.labels import refuse_labels
from lopd.protocols.reading import in_batches
from lopd.tools.advantages import check_columns, scored_rows

# The upper bits of a float32 that is not negative sort like the number itself: 20 of its 32 bits tell numbers apart to 0.1 %.
_DROPPED_BITS = 12


@frozen
class Worst:
    """The two log-probs, nats, that are farthest apart.

    Args:
        rollout_id: whose.   position: of the response token, from 0.
        left, right: nats.
    """

    rollout_id: str
    position: int
    left: float
    right: float


@frozen
class Difference:
    """How far two columns are apart.  Every response token counts, whatever its loss mask.

    Args:
        rollouts, tokens: compared: in both, with the same content.
        only_left, only_right: rollouts with scores on one side only.
        other_content: rollouts under the same id with another content hash.   first_other: the id of the first.
        max, p99, mean: maximum, 99 % quantile and mean of the absolute difference, nats; the quantile to 0.1 % of its value.
        worst: where the maximum is; None if no token differs.
    """

    rollouts: int
    tokens: int
    only_left: int
    only_right: int
    other_content: int
    first_other: str | None
    max: float
    p99: float
    mean: float
    worst: Worst | None

    def exceeds(self, tolerance: float) -> bool:
        """Return whether a rollout has no equal on the other side, or a log-prob is farther than `tolerance` (nats) from its own."""
        return bool(self.only_left or self.only_right or self.other_content or self.max > tolerance)


def _quantile(counts: NDArray[np.int64], level: float) -> float:
    """Return the upper end of the bin in which this share of all differences is reached."""
    bin_number = int(np.searchsorted(np.cumsum(counts), level * counts.sum()))
    upper = np.array([((bin_number + 1) << _DROPPED_BITS) - 1], np.uint32).view(np.float32)[0]
    return float(upper) if bin_number else 0.0


def compare_columns(left: LogprobReader, right: LogprobReader, left_column: str, right_column: str) -> Difference:
    """Return how far a column of one store is from a column of another, or of the same store.

    Memory: flat, whatever the size of the stores; one batch of rollouts from each.

    Args:
        left: a store.
        right: another, or the same one.
        left_column: column of `left`; `behavior` is one, too.
        right_column: column of `right`.

    Raises:
        MissingScoresError: a store has no such column.
        InvalidRecordError: one column holds labels, the other log-probs.
        CorruptStoreError: a row is damaged.
    """
    check_columns(left, [left_column])
    check_columns(right, [right_column])
    made = left.columns.get(left_column), right.columns.get(right_column)
    if len({one is not None and one.label for one in made}) > 1:
        refuse_labels(left, left_column)
        refuse_labels(right, right_column)
    left_rows, right_scored = scored_rows(left, [left_column]), right.scored(right_column)
    rollouts, others, total, greatest = 0, 0, 0.0, 0.0
    first_other: str | None = None
    worst: Worst | None = None
    counts = np.zeros(1 << (31 - _DROPPED_BITS), np.int64)
    for batch in in_batches(left_rows):
        mine = left.read(batch, columns=(left_column,))
        places = right.find([row.rollout.rollout_id for row in mine])
        both = [(row, place) for row, place in zip(mine, places.tolist(), strict=True) if place >= 0 and right_scored[place]]
        theirs = right.read([place for _, place in both], columns=(right_column,))
        for (row, _), other in zip(both, theirs, strict=True):
            if row.rollout.content_hash != other.rollout.content_hash:
                others, first_other = others + 1, first_other or row.rollout.rollout_id
                continue
            # exact in float64; the greatest difference of two float32 fits into one again
            left_T, right_T = row.scores[left_column], other.scores[right_column]
            gap_T = np.abs(left_T.astype(np.float64) - right_T)
            place = int(gap_T.argmax())
            if gap_T[place] > greatest:
                greatest = float(gap_T[place])
                worst = Worst(row.rollout.rollout_id, place, float(left_T[place]), float(right_T[place]))
            rollouts += 1
            total += float(gap_T.sum())
            np.add.at(counts, gap_T.astype(np.float32).view(np.uint32) >> _DROPPED_BITS, 1)
    tokens = int(counts.sum())
    return Difference(
        rollouts=rollouts,
        tokens=tokens,
        only_left=len(left_rows) - rollouts - others,
        only_right=int(right_scored.sum()) - rollouts - others,
        other_content=others,
        first_other=first_other,
        max=greatest,
        p99=min(_quantile(counts, 0.99), greatest),
        mean=total / max(1, tokens),
        worst=worst,
    )
