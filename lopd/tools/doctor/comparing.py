"""Two columns of log-probs side by side: of one store or of two, matched by rollout id."""

from typing import final

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from lopd.protocols import LogprobReader
from lopd.protocols.reading import in_batches
from lopd.records.arrays import Float32Array
from lopd.records.rollouts import Rollout
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


@final
@define(eq=False)
class _Tally:
    """What is kept while pairs go by: memory does not grow with them."""

    rollouts: int = 0
    tokens: int = 0
    others: int = 0
    first_other: str | None = None
    total: float = 0.0
    greatest: float = 0.0
    worst: Worst | None = None
    counts: NDArray[np.int64] = field(factory=lambda: np.zeros(1 << (31 - _DROPPED_BITS), np.int64))

    def add(self, left: Rollout, right: Rollout, left_T: Float32Array, right_T: Float32Array) -> None:
        """Count one pair; of other content, only that it is there."""
        if left.content_hash != right.content_hash:
            self.others += 1
            self.first_other = self.first_other or left.rollout_id
            return
        # exact in float64; the greatest difference of two float32 fits into one again
        gap_T = np.abs(left_T.astype(np.float64) - right_T)
        place = int(gap_T.argmax())
        if gap_T[place] > self.greatest:
            self.greatest = float(gap_T[place])
            self.worst = Worst(left.rollout_id, place, float(left_T[place]), float(right_T[place]))
        self.rollouts += 1
        self.tokens += gap_T.size
        self.total += float(gap_T.sum())
        np.add.at(self.counts, gap_T.astype(np.float32).view(np.uint32) >> _DROPPED_BITS, 1)

    def quantile(self, level: float) -> float:
        """Return the upper end of the bin in which this share of all differences is reached."""
        bin_number = int(np.searchsorted(np.cumsum(self.counts), level * self.tokens))
        upper = np.array([((bin_number + 1) << _DROPPED_BITS) - 1], np.uint32).view(np.float32)[0]
        return min(float(upper), self.greatest) if bin_number else 0.0


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
        CorruptStoreError: a row is damaged.
    """
    check_columns(left, [left_column])
    check_columns(right, [right_column])
    left_rows, right_scored, tally = scored_rows(left, [left_column]), right.scored(right_column), _Tally()
    for batch in in_batches(left_rows):
        mine = left.read(batch, columns=(left_column,))
        places = right.find([row.rollout.rollout_id for row in mine])
        both = [(row, place) for row, place in zip(mine, places.tolist(), strict=True) if place >= 0 and right_scored[place]]
        theirs = right.read([place for _, place in both], columns=(right_column,))
        for (row, _), other in zip(both, theirs, strict=True):
            tally.add(row.rollout, other.rollout, row.scores[left_column], other.scores[right_column])
    matched = tally.rollouts + tally.others
    return Difference(
        rollouts=tally.rollouts,
        tokens=tally.tokens,
        only_left=len(left_rows) - matched,
        only_right=int(right_scored.sum()) - matched,
        other_content=tally.others,
        first_other=tally.first_other,
        max=tally.greatest,
        p99=tally.quantile(0.99),
        mean=tally.total / max(1, tally.tokens),
        worst=tally.worst,
    )
