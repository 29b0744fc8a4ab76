"""Which segment and line the scores of a rollout are in."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.zarr.encode import S
from lopd.backends.zarr.segment import Segment
from lopd.records.manifest import Provenance

#: A place is a segment number above these bits, and a line below.
LINE_BITS = 32
_Int64 = NDArray[np.int64]


@final
class Column:
    """Score segments of one model, which rollout is where in them, and which rollouts it could not score."""

    def __init__(self, provenance: Provenance, segments: Iterable[Segment] = (), reasons: Mapping[int, str] | None = None) -> None:
        """Nothing is read yet."""
        self.provenance = provenance
        self.segments = list(segments)
        self.reasons = dict(reasons or {})
        self._known = np.zeros(0, np.int64)
        self._taken_in = 0
        # Of each segment, in the order of rows: its number, its first row, and how many it has.
        self._sorted: tuple[_Int64, _Int64, _Int64] | None = None
        self._dense = True

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "provenance": self.provenance.to_json(),
            "segments": [segment.meta.to_json() for segment in self.segments],
            "reasons": {str(row): reason for row, reason in self.reasons.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], make_segment: Callable[[Any], Segment]) -> "Column":
        """The inverse of `to_json`; checkpoints from before there were reasons have none."""
        column = cls(Provenance.from_json(data["provenance"]), [make_segment(meta) for meta in data["segments"]])
        column.add_reasons(data.get("reasons", {}))
        return column

    def add_reasons(self, reasons: Mapping[str, str]) -> None:
        """Take in why rows could not be scored; keys are rows, as JSON has them."""
        self.reasons.update({int(row): reason for row, reason in reasons.items()})

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Segment number * 2**32 + line of these rollouts' scores, -1 where there are none.

        Where segments follow one another without gaps (after a compaction, say), nothing is read, and nothing kept in memory.
        """
        if not self.segments:
            return np.full(len(rows), -1, np.int64)
        if self._sorted is None or len(self._sorted[0]) != len(self.segments):
            metas = [segment.meta for segment in self.segments]
            order = np.argsort([meta.first_row for meta in metas])
            firsts, sizes = (np.array(values, np.int64)[order] for values in ([m.first_row for m in metas], [m.rows for m in metas]))
            self._sorted, self._dense = (order << LINE_BITS, firsts, sizes), all(meta.dense for meta in metas)
        if not self._dense:
            return self._index(int(rows.max(initial=-1)) + 1)[rows]
        bases, firsts, sizes = self._sorted
        at = np.searchsorted(firsts, rows, side="right") - 1
        lines = rows - firsts[at]
        return np.where((at >= 0) & (lines < sizes[at]), bases[at] + lines, -1)

    def quarantined(self) -> dict[int, str]:
        """Rows that could not be scored, and why; but for those that were scored later."""
        rows = np.array(sorted(self.reasons), np.int64)
        return {row: self.reasons[row] for row in rows[self.places(rows) < 0].tolist()}

    def _index(self, rows: int) -> NDArray[np.int64]:
        """At least (rows,): the same of all rollouts; reads the lines of segments that skip some."""
        known = self._known
        for number in range(self._taken_in, len(self.segments)):
            meta = self.segments[number].meta
            if len(known) <= meta.last_row:
                known = np.concatenate([known, np.full(meta.last_row + 1 - len(known), -1, np.int64)])
            where = slice(meta.first_row, meta.last_row + 1) if meta.dense else self.segments[number].lines()[:, S["row"]]
            known[where] = (number << LINE_BITS) + np.arange(meta.rows)
        if len(known) < rows:
            known = np.concatenate([known, np.full(rows - len(known), -1, np.int64)])
        self._known, self._taken_in = known, len(self.segments)
        return known
