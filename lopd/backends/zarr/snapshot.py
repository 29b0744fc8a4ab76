"""What the commit records up to some number add up to: rows, columns, rounds of sampling, and where their bytes are.

It keeps a few numbers per segment.  What grows with the number of rollouts (their lengths, an index of their ids, where their scores are) is
read when it is first asked for, and is some bytes per rollout.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from attrs import asdict
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.backends.files import Files
from lopd.backends.id_index import IdIndex
from lopd.backends.zarr import decode
from lopd.backends.zarr.column import LINE_BITS, Column
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.encode import ID_HASH, LENGTHS, REPORTED, R
from lopd.backends.zarr.segment import Segment, SegmentMeta, decoded_arrays
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import VIRTUAL_COLUMNS
from lopd.records.rows import Rows


@final
class Snapshot:
    """The state of a store after `commits` records.

    Args:
        files, log, manifest: of the store.   owner: how messages name it.
        until: number of records to take in; None for all that are there.
    """

    def __init__(self, files: Files, log: CommitLog, manifest: Manifest, owner: str, until: int | None = None) -> None:
        """Reads the latest checkpoint that is not after `until`, and the records behind it."""
        self.commits = 0
        self.rows = 0
        self.generations: dict[int, ModelId] = {manifest.generation: manifest.policy}
        self.segments: list[Segment] = []
        self.columns: dict[str, Column] = {}
        self._files = files
        self._log = log
        self._owner = owner
        self._decoded = decoded_arrays(files)
        self._index = IdIndex()
        self._lengths = np.zeros((0, 2), np.int64)
        self._reported = np.zeros(0, np.uint8)
        self._starts = np.zeros(0, np.int64)
        if (checkpoint := log.checkpoint(until)) is not None:
            self._load(checkpoint)
        for record in log.records(self.commits, until):
            self.add(record)

    def to_json(self) -> dict[str, Any]:
        """The state as a checkpoint keeps it."""
        return {
            "commits": self.commits,
            "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
            "segments": [segment.meta.to_json() for segment in self.segments],
            "columns": {name: column.to_json() for name, column in self.columns.items()},
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.commits = state["commits"]
        self.generations = {int(number): ModelId(**policy) for number, policy in state["generations"].items()}
        self._set_segments([self._segment(meta) for meta in state["segments"]])
        self.columns = {name: Column.from_json(column, self._segment) for name, column in state["columns"].items()}

    def refresh(self) -> None:
        """Take in the records that were added since.

        Raises:
            CorruptStoreError: one is damaged.
            StoreReadError: the storage does not answer.
        """
        while (record := self._log.next(self.commits)) is not None:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the next record of the log.

        Raises:
            CorruptStoreError: it names a place outside the store, or does not fit what came before.
        """
        kind = record["kind"]
        if kind == "rollouts":
            self._set_segments([*self.segments, self._segment(record["segment"])])
        elif kind == "scores":
            column = self.columns.setdefault(record["column"], Column(Provenance.from_json(record["provenance"])))
            column.segments.append(self._segment(record["segment"]))
        elif kind == "quarantine":
            column = self.columns.setdefault(record["column"], Column(Provenance.from_json(record["provenance"])))
            column.add_reasons(record["reasons"])
        elif kind == "generation":
            self.generations[record["generation"]] = ModelId(**record["policy"])
        elif kind == "compaction":
            self._compact(record)
        else:
            raise CorruptStoreError(
                f"{self._owner}: commit {self.commits} is of kind {kind!r}, expected one that this version of lopd knows; update lopd."
            )
        self.commits += 1

    def _compact(self, record: Mapping[str, Any]) -> None:
        gone, name = set(record["removes"]), record["column"]
        added = [self._segment(meta) for meta in record["adds"]]
        if name is None:
            kept = [segment for segment in self.segments if segment.meta.path not in gone]
            self._set_segments(sorted([*kept, *added], key=lambda segment: segment.meta.first_row))
        else:
            column = self.columns[name]
            kept = [segment for segment in column.segments if segment.meta.path not in gone]
            self.columns[name] = Column(column.provenance, [*kept, *added], column.reasons)

    def _segment(self, meta: Mapping[str, Any]) -> Segment:
        return Segment(self._files, SegmentMeta.from_json(meta, self._owner), self._owner, self._decoded)

    def _set_segments(self, segments: list[Segment]) -> None:
        """Segments of rollouts, if they hold the rows from 0 on without a gap; only the last one can be new where nothing was removed."""
        checked = min(len(self.segments), len(segments)) if segments[: len(self.segments)] == self.segments else 0
        end = self.rows if checked else 0
        for segment in segments[checked:]:
            if segment.meta.first_row != end or not segment.meta.dense:
                raise CorruptStoreError(
                    f"{self._owner}: segment {segment.meta.path} begins with row {segment.meta.first_row}, expected {end}; "
                    "restore the commit records from a backup."
                )
            end = segment.meta.last_row + 1
        self.segments, self.rows = segments, end
        self._starts = np.array([segment.meta.first_row for segment in segments], np.int64)

    def all_segments(self) -> list[Segment]:
        """Those of rollouts, then those of each column."""
        return [*self.segments, *(segment for column in self.columns.values() for segment in column.segments)]

    def paths(self) -> set[str]:
        """Where they are."""
        return {segment.meta.path for segment in self.all_segments()}

    def provenances(self) -> dict[str, Provenance]:
        """Columns and who computed them."""
        return {name: column.provenance for name, column in self.columns.items()}

    def _scan(self) -> None:
        """Read the lines of rollouts that were not read yet: their lengths, hashed ids, and whether the engine reported log-probs."""
        seen = len(self._lengths)
        new = [segment for segment in self.segments if segment.meta.last_row >= seen]
        lines = self._files.run([segment.lines for segment in new])
        # A compaction may have merged rollouts that were read already with some that were not.
        lines = [part[max(seen - segment.meta.first_row, 0) :] for segment, part in zip(new, lines, strict=True)]
        if not lines:
            return
        added = np.concatenate(lines)
        self._index.add(np.ascontiguousarray(added[:, ID_HASH]).view("V16")[:, 0], seen)
        self._lengths = np.concatenate([self._lengths, added[:, LENGTHS]])
        self._reported = np.concatenate([self._reported, added[:, R["has_behavior"]].astype(np.uint8)])

    def lengths(self) -> NDArray[np.int64]:
        """(rows, 2): prompt and response tokens."""
        self._scan()
        return self._lengths

    def find(self, rollout_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of rollouts, -1 where there is none."""
        self._scan()
        return self._index.find(rollout_ids)

    def scored(self, column: str) -> NDArray[np.bool_]:
        """(rows,): which have scores in this column."""
        if column in VIRTUAL_COLUMNS:
            self._scan()
            return (self._reported >> REPORTED.index(VIRTUAL_COLUMNS[column]) & 1).astype(np.bool_)
        if column not in self.columns:
            return np.zeros(self.rows, np.bool_)
        return self.columns[column].places(np.arange(self.rows)) >= 0

    def quarantined(self, column: str) -> dict[int, str]:
        """Rows that could not be scored, and why."""
        return self.columns[column].quarantined() if column in self.columns else {}

    def content(self, rows: NDArray[np.int64]) -> list[tuple[bytes, int]]:
        """Content hash and number of response tokens of rollouts."""
        groups, found = self._grouped(rows), np.empty((len(rows), len(R)), np.int64)
        for group, lines in zip(groups, self._files.run([group.lines for group in groups]), strict=True):
            found[group.places] = lines
        return list(zip(decode.contents(found), found[:, R["response_length"]].tolist(), strict=True))

    def read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str]) -> Rows:
        """These rows with these columns; everything is verified."""
        admission.check_supports(self._owner, top_k, self.provenances())
        names = [name for name in dict.fromkeys([*columns, *top_k]) if name not in VIRTUAL_COLUMNS]
        groups, scored = self._grouped(rows), {name: self._grouped_scores(name, rows) for name in names}
        read = decode.read(groups, scored, top_k, self._files.run) if groups else Rows.of(())
        return admission.with_columns(self._owner, read, columns)

    def _grouped_scores(self, name: str, rows: NDArray[np.int64]) -> list[decode.Group]:
        """Group rows by the segments that have their scores."""
        column = self.columns.get(name)
        places = column.places(rows) if column else np.full(len(rows), -1, np.int64)
        if len(rows) and (column is None or (places < 0).any()):
            raise admission.missing_scores(self._owner, self._name(int(rows[int(np.argmax(places < 0))])), name)
        return _group(column.segments if column else [], places >> LINE_BITS, places & ((1 << LINE_BITS) - 1))

    def _name(self, row: int) -> str:
        """The rollout's id, for messages."""
        return self.read(np.array([row]), (), ()).rollout_ids[0]

    def _grouped(self, rows: NDArray[np.int64]) -> list[decode.Group]:
        """Group rows by the segments that they are in."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        return _group(self.segments, numbers, rows - self._starts[numbers]) if len(rows) else []


def _group(segments: Sequence[Segment], numbers: NDArray[np.int64], lines: NDArray[np.int64]) -> list[decode.Group]:
    return [decode.Group(segments[n], where := np.flatnonzero(numbers == n), lines[where]) for n in np.unique(numbers).tolist()]
