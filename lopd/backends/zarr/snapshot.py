"""What readers ask of a store, as it was at the last `refresh`.

What grows with the number of rollouts (their lengths, an index of their ids) is read when it is first asked for, and is some bytes per rollout.

Writers merge segments, and remove those that were merged some time later.  A reader that stands at an earlier state and misses one of them
looks up where its rows are now: rows keep their numbers, and what they hold never changes.  Which there are follows from its own state.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.backends.files import Files
from lopd.backends.growing import Growing
from lopd.backends.id_index import ID_HASH, IdIndex
from lopd.backends.zarr import decode
from lopd.backends.zarr.columns import ID_HALVES, LENGTHS, REPORTED, R
from lopd.backends.zarr.encode import ID_HASHES
from lopd.backends.zarr.segment import SegmentGoneError
from lopd.backends.zarr.state import State
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import VIRTUAL_COLUMNS
from lopd.records.rows import Rows

T = TypeVar("T")
_ROWS_AT_ONCE = 1 << 17


@final
class Snapshot:
    """The reading half of one store.

    Args:
        files, state: the store's.   owner: the store's name in messages.
    """

    def __init__(self, files: Files, state: State, owner: str) -> None:
        self._files = files
        self._state = state
        self._owner = owner
        # where the bytes are, unless `_state` is later
        self._later = state
        # prompt and response tokens, and which log-probs the engine reported
        self._seen = Growing(np.int64, 3)
        # rows keep their numbers, whatever is merged
        self._ids, self._indexed = IdIndex(), 0

    @property
    def rows(self) -> int:
        """Rollouts."""
        return self._state.rows

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Policy of each round of sampling."""
        return self._state.generations

    def refresh(self) -> None:
        """See `State.refresh`."""
        self._state.refresh()
        self._later = self._state

    def provenances(self) -> dict[str, Provenance]:
        """Return columns and who computed them."""
        return {name: column.provenance for name, column in self._state.columns.items()}

    def _now(self, work: Callable[[State], T]) -> T:
        """Return what this gives of the state, or of a later one where a segment that it needs was merged and removed since."""
        while True:
            # a copy: a thread may refresh the store meanwhile, which replaces attributes of its state as a whole
            now = copy(max(self._state, self._later, key=lambda state: state.commits))
            try:
                return work(now)
            except SegmentGoneError as error:
                later = self._state.latest()
                # a store that was removed, or put back to an older state, has merged nothing since, whatever was appended there
                if error.segment in later.paths() or not now.stands():
                    raise error.lost() from error.__cause__
                self._later = later

    def _scan(self) -> None:
        """Read the lines of rollouts that were not read yet: their lengths, and whether the engine reported log-probs."""
        while (seen := len(self._seen)) < self.rows:
            rows = np.arange(seen, min(seen + _ROWS_AT_ONCE, self.rows))
            lines = self._now(partial(self._lines, rows))
            self._seen.append(np.column_stack([lines[:, LENGTHS], lines[:, R["has_behavior"]]]))

    def _lines(self, rows: NDArray[np.int64], state: State) -> NDArray[np.int64]:
        """Return (n, fields): the lines of rollouts."""
        groups, found = state.grouped(rows), np.empty((len(rows), len(R)), np.int64)
        for group, lines in zip(groups, self._files.run([group.lines for group in groups]), strict=True):
            found[group.places] = lines
        return found

    def lengths(self) -> NDArray[np.int64]:
        """Return (rows, 2): prompt and response tokens."""
        self._scan()
        return self._seen.view()[:, :2].copy()

    def known(self, rollout_ids: Sequence[str]) -> tuple[NDArray[np.int64], list[tuple[bytes, int]]]:
        """Return rows of rollouts, -1 for one that is not there, and content hash and number of response tokens of each that is."""
        rows = self.find(rollout_ids)
        lines = self._now(partial(self._lines, rows[rows >= 0]))
        return rows, list(zip(decode.contents(lines), lines[:, R["response_length"]].tolist(), strict=True))

    def find(self, rollout_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return (n,): rows of rollouts, -1 for one that is not there."""
        if self._indexed < self.rows:
            self._ids.add(self._now(partial(self._id_hashes, self._indexed)), self._indexed)
            self._indexed = self.rows
        return self._ids.find(rollout_ids)

    def _id_hashes(self, first: int, state: State) -> NDArray[np.void]:
        """Return the hashed ids of the rows from this one on."""
        segments = [segment for segment in state.segments if segment.meta.last_row >= first]
        hashes = np.concatenate(self._files.run([partial(segment.keys, ID_HASHES, ID_HALVES) for segment in segments]))
        begin = first - segments[0].meta.first_row
        return hashes[begin : begin + self.rows - first].view(ID_HASH).reshape(-1)

    def scored_rows(self, column: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (n,): which of these rows have scores in this column."""
        if column in VIRTUAL_COLUMNS:
            self._scan()
            bits: NDArray[np.int64] = self._seen.view()[rows, 2] >> REPORTED.index(VIRTUAL_COLUMNS[column])
            return (bits & 1).astype(np.bool_)
        try:
            return self._state.places(column, rows) >= 0
        except SegmentGoneError:
            # what is left shows no more of its rows than the first and the last
            metas = [segment.meta for segment in self._state.segments_of(column)]
            within: NDArray[np.bool_] = np.any([(rows >= meta.first_row) & (rows <= meta.last_row) for meta in metas], axis=0)
            return within & self._now(lambda state: state.places(column, rows) >= 0)

    def quarantined(self, column: str) -> dict[int, str]:
        """Return rows that could not be scored, and why, without those that were scored later."""
        reasons = self._state.columns[column].reasons if column in self._state.columns else {}
        rows = np.array(sorted(reasons), np.int64)
        return {row: reasons[row] for row in rows[~self.scored_rows(column, rows)].tolist()}

    def read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str]) -> Rows:
        """Return these rows with these columns; everything is verified."""
        return self._now(partial(self._read, rows, columns, top_k))

    def _read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str], state: State) -> Rows:
        if not len(rows):
            return Rows.of(())
        places = {name: state.places(name, rows) for name in columns}
        for name, found in places.items():
            missing = found < 0 if state.commits <= self._state.commits else (found < 0) | ~self.scored_rows(name, rows)
            if missing.any():
                raise admission.missing_scores(self._owner, self._name(int(rows[int(np.argmax(missing))])), name)
        scored = {name: state.grouped_scores(name, found) for name, found in places.items()}
        return decode.read(state.grouped(rows), scored, top_k, self._files.run)

    def _name(self, row: int) -> str:
        """Return the rollout's id, for messages."""
        return self.read(np.array([row]), (), ()).rollout_ids[0]
