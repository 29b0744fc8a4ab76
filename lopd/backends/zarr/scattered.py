"""Which rows are where in segments of scores that leave some out: 16 bytes a row of those segments that were looked into."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from typing import final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.backends.files import Run
from lopd.backends.zarr.columns import S
from lopd.backends.zarr.encode import SCORED_ROWS
from lopd.backends.zarr.segment import Segment, SegmentGoneError
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


# With the place at which line 0 of each of its segments would be if its rows began the block.
_Placed = tuple[_Block, _Int64]
# Blocks of the segments that were read, the others, and (segments, 2) the first and the last row of those.
_Known = tuple[Sequence[_Placed], Sequence[Segment], _Int64]


def _rows_of(segment: Segment) -> _Int64:
    return segment.keys(SCORED_ROWS, S["row"])


def _rows_or_gone(segment: Segment) -> _Int64 | SegmentGoneError:
    try:
        return _rows_of(segment)
    except SegmentGoneError as error:
        return error


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
        blocks: list[_Placed] = []
        merged: dict[Segment, _Int64] = {}
        for block, _ in before._known[0] if before else ():
            if self._numbers.keys() >= set(block.segments):
                blocks.append(self._placed(block))
            else:
                merged |= {segment: rows for segment, rows in block.parts().items() if segment in self._numbers}
        if merged:
            blocks = self._with(blocks, merged)
        read = {segment for block, _ in blocks for segment in block.segments}
        unread = [segment for segment in self._numbers if segment not in read]
        ranges = np.array([(segment.meta.first_row, segment.meta.last_row) for segment in unread], np.int64).reshape(-1, 2)
        # one attribute, so that an interrupt leaves no half, and of two threads each has a whole
        self._known: _Known = blocks, unread, ranges
        self._gone: set[Segment] = set()

    def _placed(self, block: _Block) -> _Placed:
        return block, (np.array([self._numbers[segment] for segment in block.segments]) << LINE_BITS) - block.starts

    def _with(self, blocks: Sequence[_Placed], parts: Mapping[Segment, _Int64]) -> list[_Placed]:
        blocks = [*blocks]
        while blocks and blocks[-1][0].rows.size <= sum(part.size for part in parts.values()):
            parts = {**blocks.pop()[0].parts(), **parts}
        ordered = dict(sorted(parts.items(), key=lambda part: self._numbers[part[0]]))
        return [*blocks, self._placed(_Block.of(ordered))]

    def _read_near(self, rows: _Int64, run: Run) -> Sequence[_Placed]:
        """Return blocks, with those segments that were not looked into yet, and may have one of these rows; they are read side by side.

        What was read is kept though others are gone: a reader that stands before a merge asks again and again.
        """
        blocks, unread, ranges = self._known
        ordered = np.sort(rows if unread else rows[:0])
        near = np.searchsorted(ordered, ranges[:, 0]) < np.searchsorted(ordered, ranges[:, 1], side="right")
        if near.any():
            asked = [*compress(unread, near)]
            for segment in self._gone.intersection(asked):
                _rows_of(segment)  # an error after one request, unless a backup has brought it back
            answers = dict(zip(asked, run([partial(_rows_or_gone, segment) for segment in asked]), strict=True))
            errors = {segment: answer for segment, answer in answers.items() if isinstance(answer, SegmentGoneError)}
            if read := {segment: answers[segment] for segment in asked if segment not in errors}:
                left = np.array([segment not in read for segment in unread])
                blocks = self._with(blocks, read)
                self._known = blocks, [*compress(unread, left)], ranges[left]
            self._gone.update(errors)
            for error in errors.values():
                raise error
        return blocks

    def places(self, rows: _Int64, run: Run) -> _Int64:
        """Return (n,): where these rows are, -1 for one that is not there; of two segments that have a row, the first."""
        blocks = self._read_near(rows, run)
        found = np.full(len(rows), _NOWHERE)
        for block, bases in blocks:
            at = np.minimum(np.searchsorted(block.rows, rows), block.rows.size - 1)
            hit = np.flatnonzero(block.rows[at] == rows)
            order = block.order[at[hit]]
            found[hit] = np.minimum(found[hit], bases[np.searchsorted(block.starts, order, side="right") - 1] + order)
        found[found == _NOWHERE] = -1
        return found
