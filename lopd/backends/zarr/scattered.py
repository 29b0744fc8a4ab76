"""Which rows are where in segments of scores that leave some out: 16 bytes a row of those segments that were looked into."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from typing import final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.backends.files import Run
from lopd.backends.zarr.encode import SCORED_ROWS, scored_rows
from lopd.backends.zarr.segment import Segment
from lopd.records.rows import ends

#: A place is a segment number above these bits, and a line below.
LINE_BITS = 32
_Int64 = NDArray[np.int64]
_NOWHERE = np.iinfo(np.int64).max


@frozen(eq=False)
class _Block:
    """Rows of some segments, in ascending order.

    Args:
        segments: in the order of the column.
        starts: (segments,), where the rows of each begin when those of all stand one after the other.
        rows: (n,), ascending.
        order: (n,), where each stands.
    """

    segments: Sequence[Segment]
    starts: _Int64
    rows: _Int64
    order: _Int64

    @classmethod
    def of(cls, parts: Mapping[Segment, _Int64]) -> "_Block":
        """Return a block of the rows of each segment; where two have a row, it is in the order of the segments."""
        rows = np.concatenate([*parts.values()])
        order = np.argsort(rows, kind="stable")
        return cls([*parts], ends(np.array([part.size for part in parts.values()]))[:-1], rows[order], order)

    def parts(self) -> dict[Segment, _Int64]:
        """Return what it was made of."""
        rows = np.empty_like(self.rows)
        rows[self.order] = self.rows
        return dict(zip(self.segments, np.split(rows, self.starts[1:]), strict=True))


@final
class Scattered:
    """Finds rows in those segments of a column that are not dense.

    They are in sorted blocks, each larger than the next (see `lopd.backends.id_index`).

    Args:
        segments: those of the column.
        before: the one of an earlier state of the column; what was read for that is not read again.
    """

    def __init__(self, segments: Sequence[Segment], before: "Scattered | None" = None) -> None:
        self._numbers = {segment: number for number, segment in enumerate(segments) if not segment.meta.dense}
        # each with the place at which line 0 of each of its segments would be if its rows began the block
        self._blocks: list[tuple[_Block, _Int64]] = []
        merged: dict[Segment, _Int64] = {}
        for block, _ in before._blocks if before else ():
            if self._numbers.keys() >= set(block.segments):
                self._blocks.append(self._placed(block))
            else:
                merged |= {segment: rows for segment, rows in block.parts().items() if segment in self._numbers}
        if merged:
            self._add(merged)
        read = {segment for block, _ in self._blocks for segment in block.segments}
        unread = [segment for segment in self._numbers if segment not in read]
        ranges = np.array([(segment.meta.first_row, segment.meta.last_row) for segment in unread], np.int64).reshape(-1, 2)
        # one attribute, so that an interrupt leaves no half
        self._unread = unread, ranges

    def _placed(self, block: _Block) -> tuple[_Block, _Int64]:
        return block, (np.array([self._numbers[segment] for segment in block.segments]) << LINE_BITS) - block.starts

    def _add(self, parts: Mapping[Segment, _Int64]) -> None:
        blocks = [*self._blocks]
        while blocks and blocks[-1][0].rows.size <= sum(part.size for part in parts.values()):
            parts = {**blocks.pop()[0].parts(), **parts}
        ordered = dict(sorted(parts.items(), key=lambda part: self._numbers[part[0]]))
        self._blocks = [*blocks, self._placed(_Block.of(ordered))]

    def _read_near(self, rows: _Int64, run: Run) -> None:
        """Read, side by side, which rows those segments have that were not looked into yet, and may have one of these."""
        segments, ranges = self._unread
        ordered = np.sort(rows if segments else rows[:0])
        near = np.searchsorted(ordered, ranges[:, 0]) < np.searchsorted(ordered, ranges[:, 1], side="right")
        if near.any():
            asked = [*compress(segments, near)]
            self._add(dict(zip(asked, run([partial(segment.keys, SCORED_ROWS, scored_rows) for segment in asked]), strict=True)))
            self._unread = [*compress(segments, ~near)], ranges[~near]

    def places(self, rows: _Int64, run: Run) -> _Int64:
        """Return (n,): where these rows are, -1 for one that is not there; of two segments that have a row, the first."""
        self._read_near(rows, run)
        found = np.full(len(rows), _NOWHERE)
        for block, bases in self._blocks:
            at = np.minimum(np.searchsorted(block.rows, rows), block.rows.size - 1)
            hit = np.flatnonzero(block.rows[at] == rows)
            order = block.order[at[hit]]
            found[hit] = np.minimum(found[hit], bases[np.searchsorted(block.starts, order, side="right") - 1] + order)
        found[found == _NOWHERE] = -1
        return found
