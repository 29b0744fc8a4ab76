"""Which segment and line the scores of a rollout are in."""

from collections.abc import Iterable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.zarr.encode import SCORED_ROWS, scored_rows
from lopd.backends.zarr.segment import Segment
from lopd.records.manifest import Provenance

#: A place is a segment number above these bits, and a line below.
LINE_BITS = 32
_Int64 = NDArray[np.int64]


@final
class Column:
    """Score segments of one model, which rollout is where in them, and which rollouts it could not score."""

    def __init__(self, provenance: Provenance, segments: Iterable[Segment] = (), reasons: dict[int, str] | None = None) -> None:
        """Keep the arguments; nothing is read yet, and the reasons are not copied."""
        self.provenance = provenance
        self.segments = list(segments)
        self.reasons = {} if reasons is None else reasons
        # Of segments that have every row from their first to their last: number << LINE_BITS, first row, rows; and the numbers of others.
        self._dense: tuple[_Int64, _Int64, _Int64] | None = None
        self._loose: list[int] = []

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {
            "provenance": self.provenance.to_json(),
            "segments": [segment.meta.to_json() for segment in self.segments],
            "reasons": {str(row): reason for row, reason in self.reasons.items()},
        }

    def having(self, segments: Iterable[Segment]) -> "Column":
        """Return the same column with these in place of its segments."""
        return Column(self.provenance, segments, self.reasons)

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return segment number * 2**32 + line of these rollouts' scores, -1 for one without; reads no lines."""
        found = np.full(len(rows), -1, np.int64)
        if not len(rows) or not self.segments:
            return found
        if self._dense is None:
            self._dense = self._arranged()
        bases, firsts, sizes = self._dense
        if bases.size:
            at = np.searchsorted(firsts, rows, side="right") - 1
            lines = rows - firsts[at]
            found = np.where((at >= 0) & (lines < sizes[at]), bases[at] + lines, -1)
        for number in self._loose:
            meta = self.segments[number].meta
            asked = np.flatnonzero((found < 0) & (rows >= meta.first_row) & (rows <= meta.last_row))
            if asked.size:
                known = self.segments[number].kept(SCORED_ROWS, scored_rows)
                lines = np.minimum(np.searchsorted(known, rows[asked]), known.size - 1)
                hit = known[lines] == rows[asked]
                found[asked[hit]] = (number << LINE_BITS) + lines[hit]
        return found

    def _arranged(self) -> tuple[_Int64, _Int64, _Int64]:
        metas = [segment.meta for segment in self.segments]
        self._loose = [number for number, meta in enumerate(metas) if not meta.dense]
        dense = sorted((number for number, meta in enumerate(metas) if meta.dense), key=lambda number: metas[number].first_row)
        table = np.array([(number << LINE_BITS, metas[number].first_row, metas[number].rows) for number in dense], np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1].copy(), table[:, 2]

    def quarantined(self) -> dict[int, str]:
        """Return rows that could not be scored, and why, without those that were scored later."""
        rows = np.array(sorted(self.reasons), np.int64)
        return {row: self.reasons[row] for row in rows[self.places(rows) < 0].tolist()}
