"""What the commit records up to some number add up to: where the bytes of rows and columns are, and who sampled and scored them.

It keeps a few numbers per segment, and reads no data.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from attrs import asdict, evolve, field, mutable
from numpy.typing import NDArray

from lopd.backends.files import Files, Run
from lopd.backends.zarr.columns import R, S
from lopd.backends.zarr.commit_log import CommitLog, Entry
from lopd.backends.zarr.decode import Group
from lopd.backends.zarr.record import Checkpoint
from lopd.backends.zarr.scattered import LINE_BITS, Scattered
from lopd.backends.zarr.segment import LINES, Segment, SegmentMeta, decoded_arrays
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance

_Int64 = NDArray[np.int64]


@final
@mutable(eq=False)
class Column:
    """Score segments of one model, which rollout is where in them, and which rollouts it could not score; reads nothing before it is asked."""

    provenance: Provenance
    segments: Sequence[Segment] = ()
    reasons: dict[int, str] = field(factory=dict)
    # Of the other segments; that of an earlier state until this one is asked.
    _scattered: Scattered | None = None
    # Of segments that have every row from their first to their last: number << LINE_BITS, first row, rows.
    _dense: tuple[_Int64, _Int64, _Int64] | None = field(init=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {
            "provenance": self.provenance.to_json(),
            "segments": [asdict(segment.meta) for segment in self.segments],
            "reasons": {str(row): reason for row, reason in self.reasons.items()},
        }

    def places(self, rows: NDArray[np.int64], run: Run) -> NDArray[np.int64]:
        """Return segment number * 2**32 + line of these rollouts' scores, -1 for one without; reads no lines."""
        found = np.full(len(rows), -1, np.int64)
        if not len(rows) or not self.segments:
            return found
        if self._scattered is None or self._dense is None:
            self._scattered, self._dense = Scattered(self.segments, self._scattered), self._arranged()
        bases, firsts, sizes = self._dense
        if bases.size:
            at = np.searchsorted(firsts, rows, side="right") - 1
            lines = rows - firsts[at]
            found = np.where((at >= 0) & (lines < sizes[at]), bases[at] + lines, -1)
        left = np.flatnonzero(found < 0)
        found[left] = self._scattered.places(rows[left], run)
        return found

    def _arranged(self) -> tuple[_Int64, _Int64, _Int64]:
        metas = [segment.meta for segment in self.segments]
        dense = sorted((number for number, meta in enumerate(metas) if meta.dense), key=lambda number: metas[number].first_row)
        table = np.array([(number << LINE_BITS, metas[number].first_row, metas[number].rows) for number in dense], np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1].copy(), table[:, 2]


@final
class State:
    """The state of a store after `commits` records.

    Args:
        files, log, manifest: the store's.   owner: the store's name in messages.
        until: number of records to take in; None for all that are there.

    Attributes:
        last: checksum of the last record.
        replaced: path of a segment, and the number of the compaction that replaced it, until the files are removed.
        condemned: paths that sweeps have removed since this state was made.
    """

    def __init__(self, files: Files, log: CommitLog, manifest: Manifest, owner: str, until: int | None = None) -> None:
        """Read the latest checkpoint that is not after `until`, and the records behind it."""
        self.commits = 0
        self.rows = 0
        self.last = ""
        self.generations: dict[int, ModelId] = {manifest.generation: manifest.policy}
        self.segments: list[Segment] = []
        self.columns: dict[str, Column] = {}
        self.replaced: dict[str, int] = {}
        self.condemned: set[str] = set()
        self._files = files
        self._log = log
        self._manifest = manifest
        self._owner = owner
        self._decoded = decoded_arrays(files)
        self._starts = np.zeros(0, np.int64)
        if (checkpoint := log.checkpoint(until)) is not None:
            self._load(checkpoint)
        for entry in log.records(self.commits, self.last, until):
            self.add(entry)

    def latest(self) -> "State":
        """Return the state that there is now."""
        return State(self._files, self._log, self._manifest, self._owner)

    def stands(self) -> bool:
        """Return whether the last record is still there, as it was: the store was not removed, nor put back to an older state."""
        return self._log.checksum(self.commits - 1) == self.last

    def to_json(self) -> dict[str, Any]:
        """Return the state as a checkpoint keeps it."""
        return {
            "commits": self.commits,
            "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
            "segments": [asdict(segment.meta) for segment in self.segments],
            "columns": {name: column.to_json() for name, column in self.columns.items()},
            "last": self.last,
            "replaced": self.replaced,
        }

    def _load(self, state: Checkpoint) -> None:
        self.commits, self.generations = state["commits"], dict(state["generations"])
        vars(self).update(self._with_segments([self._segment(meta, None) for meta in state["segments"]]))
        for name, column in state["columns"].items():
            segments = [self._segment(meta, name) for meta in column["segments"]]
            self.columns[name] = Column(column["provenance"], segments, self._known_rows(column.get("reasons", {})))
        self.last = state["last"] if "last" in state else self._log.checksum(self.commits - 1)
        self.replaced = dict(state.get("replaced", {}))
        if live := self.paths() & self.replaced.keys():
            # the next checkpoint would remove it
            raise self._unfit(f"segment {min(live)} both live and replaced", "only one of them")

    def refresh(self) -> None:
        """Take in the records that were added since.

        Raises:
            CorruptStoreError: one is damaged.
            StoreReadError: the storage does not answer.
        """
        while (entry := self._log.next(self.commits, self.last)) is not None:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Take in the next record of the log.

        Raises:
            CorruptStoreError: it names a place outside the store, or does not fit what came before.
        """
        # all at once: of a half that an interrupt has left, the other could not be told when the record is met again
        vars(self).update(self._changed(entry.body), commits=self.commits + 1, last=entry.checksum)

    def _changed(self, record: Any) -> Mapping[str, Any]:
        """Return attributes as they are after a record."""
        kind, name = record["kind"], record.get("column")
        if kind == "rollouts":
            return self._with_segments([*self.segments, self._segment(record["segment"], None)])
        if kind == "compaction":
            return self._compacted(name, record["removes"], [self._segment(meta, name) for meta in record["adds"]])
        if kind == "generation":
            return {"generations": {**self.generations, record["generation"]: record["policy"]}}
        if kind == "sweep":
            return {"condemned": self.condemned.union(record["removes"])}
        column = self.columns.get(name) or Column(record["provenance"])
        if kind == "scores":
            return self._with_column(name, evolve(column, segments=[*column.segments, self._segment(record["segment"], name)]))
        column.reasons.update(self._known_rows(record["reasons"]))
        return self._with_column(name, column)

    def _with_column(self, name: str, column: Column) -> dict[str, Any]:
        return {"columns": {**self.columns, name: column}}

    def _compacted(self, name: str | None, removes: Sequence[str], added: Sequence[Segment]) -> dict[str, Any]:
        gone, replaced = set(removes), self.replaced | dict.fromkeys(removes, self.commits)
        if name is not None and name not in self.columns:
            raise self._unfit(f"a compaction of column {name!r}", "one of a column that is there")
        there = self.segments_of(name)
        kept = [segment for segment in there if segment.meta.path not in gone]
        before, after = ([segment.meta.rows for segment in segments] for segments in (there, [*kept, *added]))
        if len(there) - len(kept) != len(gone) or sum(before) != sum(after):
            raise self._unfit(f"a compaction of {len(gone)} segments into {len(added)}", "as many rows, of segments that are there")
        if name is None:
            return {**self._with_segments(sorted([*kept, *added], key=lambda segment: segment.meta.first_row)), "replaced": replaced}
        return {**self._with_column(name, evolve(self.columns[name], segments=[*kept, *added])), "replaced": replaced}

    def _segment(self, meta: SegmentMeta, column: str | None) -> Segment:
        parent = "segments" if column is None else f"scores/{column}"
        if meta.path.rpartition("/")[0] != parent:
            raise self._unfit(f"segment {meta.path}", f"one in {parent}/")
        if meta.arrays[LINES].shape[1:] != (len(R if column is None else S),):
            raise self._unfit(f"lines of shape {meta.arrays[LINES].shape}", f"{len(R if column is None else S)} columns")
        if column is not None and meta.last_row >= self.rows:
            raise self._unfit(f"scores of row {meta.last_row}", f"rows below {self.rows}")
        return Segment(self._files, meta, self._owner, self._decoded)

    def _known_rows(self, reasons: Mapping[int, str]) -> dict[int, str]:
        if max(reasons, default=-1) >= self.rows:
            raise self._unfit(f"a reason for row {max(reasons)}", f"rows below {self.rows}")
        return dict(reasons)

    def _unfit(self, found: str, expected: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self._owner}: commit {self.commits} has {found}, expected {expected}; restore the log from a backup.")

    def _with_segments(self, segments: list[Segment]) -> dict[str, Any]:
        """Return segments of rollouts, if they hold the rows from 0 on without a gap; only the last one can be new where nothing was removed."""
        checked = min(len(self.segments), len(segments)) if segments[: len(self.segments)] == self.segments else 0
        end = self.rows if checked else 0
        for segment in segments[checked:]:
            if segment.meta.first_row != end or not segment.meta.dense:
                raise CorruptStoreError(
                    f"{self._owner}: segment {segment.meta.path} begins with row {segment.meta.first_row}, expected {end}; "
                    "restore the commit records from a backup."
                )
            end = segment.meta.last_row + 1
        starts = np.array([segment.meta.first_row for segment in segments], np.int64)
        return {"segments": segments, "rows": end, "_starts": starts}

    def segments_of(self, column: str | None) -> Sequence[Segment]:
        """Return the segments of a column, or of rollouts, in the order of commits."""
        return self.segments if column is None else self.columns[column].segments

    def forget_replaced(self, before: int) -> list[str]:
        """Return paths of segments that compactions before this number replaced, and that were not forgotten yet."""
        old = [path for path, number in self.replaced.items() if number < before]
        self.replaced = {path: number for path, number in self.replaced.items() if number >= before}
        return old

    def all_segments(self) -> list[Segment]:
        """Return the segments of rollouts, then those of each column."""
        return [*self.segments, *(segment for column in self.columns.values() for segment in column.segments)]

    def paths(self) -> set[str]:
        """Return their places."""
        return {segment.meta.path for segment in self.all_segments()}

    def grouped(self, rows: NDArray[np.int64]) -> list[Group]:
        """Group rows by the segments that they are in."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        return _group(self.segments, numbers, rows - self._starts[numbers]) if len(rows) else []

    def places(self, column: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n,): see `Column.places`; -1 for a column that is not there."""
        return self.columns[column].places(rows, self._files.run) if column in self.columns else np.full(len(rows), -1, np.int64)

    def grouped_scores(self, column: str, places: NDArray[np.int64]) -> list[Group]:
        """Group rows, whose scores are in these places, by the segments that have those."""
        return _group(self.columns[column].segments, places >> LINE_BITS, places & ((1 << LINE_BITS) - 1)) if len(places) else []


def _group(segments: Sequence[Segment], numbers: NDArray[np.int64], lines: NDArray[np.int64]) -> list[Group]:
    return [Group(segments[n], where := np.flatnonzero(numbers == n), lines[where]) for n in np.unique(numbers).tolist()]
