"""What the commit records up to some number add up to: rows, columns, rounds of sampling, and where their bytes are.

It keeps a few numbers per segment.  What grows with the number of rollouts (their lengths, an index of their ids, where their scores are) is
read when it is first asked for, and is some bytes per rollout.

Writers merge segments, and remove those that were merged some time later.  A reader that stands at an earlier state and misses one of them
looks up where its rows are now: rows keep their numbers, and what they hold never changes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, final

import numpy as np
from attrs import asdict
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.backends.files import Files
from lopd.backends.growing import Growing
from lopd.backends.id_index import encode_id, hash_ids
from lopd.backends.zarr import decode
from lopd.backends.zarr.column import LINE_BITS, Column
from lopd.backends.zarr.commit_log import CommitLog, Entry
from lopd.backends.zarr.encode import ID_HASH, ID_INDEX, LENGTHS, REPORTED, R, id_index
from lopd.backends.zarr.segment import Segment, SegmentGoneError, SegmentMeta, decoded_arrays
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import VIRTUAL_COLUMNS
from lopd.records.rows import Rows

T = TypeVar("T")
_ROWS_AT_ONCE = 1 << 17


@final
class Snapshot:
    """The state of a store after `commits` records.

    Args:
        files, log, manifest: of the store.   owner: how messages name it.
        until: number of records to take in; None for all that are there.

    Attributes:
        last: checksum of the last record.
        replaced: number of a compaction, and the path of a segment that it replaced, until the files are removed.
        condemned: paths that sweeps have removed since this snapshot was made.
    """

    def __init__(self, files: Files, log: CommitLog, manifest: Manifest, owner: str, until: int | None = None) -> None:
        """Reads the latest checkpoint that is not after `until`, and the records behind it."""
        self.commits = 0
        self.rows = 0
        self.last = ""
        self.generations: dict[int, ModelId] = {manifest.generation: manifest.policy}
        self.segments: list[Segment] = []
        self.columns: dict[str, Column] = {}
        self.replaced: list[tuple[int, str]] = []
        self.condemned: set[str] = set()
        self._files = files
        self._log = log
        self._manifest = manifest
        self._owner = owner
        self._decoded = decoded_arrays(files)
        self._lengths, self._reported = Growing(np.int64, 2), Growing(np.uint8)
        self._starts = np.zeros(0, np.int64)
        self._later: Snapshot | None = None
        if (checkpoint := log.checkpoint(until)) is not None:
            self._load(checkpoint)
        for entry in log.records(self.commits, self.last, until):
            self.add(entry)

    def to_json(self) -> dict[str, Any]:
        """The state as a checkpoint keeps it."""
        return {
            "commits": self.commits,
            "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
            "segments": [segment.meta.to_json() for segment in self.segments],
            "columns": {name: column.to_json() for name, column in self.columns.items()},
            "last": self.last,
            "replaced": self.replaced,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.commits = state["commits"]
        self.generations = {int(number): ModelId(**policy) for number, policy in state["generations"].items()}
        self._set_segments([self._segment(meta) for meta in state["segments"]])
        self.columns = {name: Column.from_json(column, self._segment) for name, column in state["columns"].items()}
        self.last = state["last"] if "last" in state else self._log.checksum(self.commits - 1)
        self.replaced = [(number, path) for number, path in state.get("replaced", ())]

    def refresh(self) -> None:
        """Take in the records that were added since.

        Raises:
            CorruptStoreError: one is damaged.
            StoreReadError: the storage does not answer.
        """
        self._later = None
        while (entry := self._log.next(self.commits, self.last)) is not None:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Take in the next record of the log.

        Raises:
            CorruptStoreError: it names a place outside the store, or does not fit what came before.
        """
        record = entry.body
        kind = record["kind"]
        if kind == "rollouts":
            self._set_segments([*self.segments, self._segment(record["segment"])])
        elif kind == "scores":
            column = self.columns.setdefault(record["column"], Column(Provenance.from_json(record["provenance"])))
            column.set_segments([*column.segments, self._segment(record["segment"])])
        elif kind == "quarantine":
            column = self.columns.setdefault(record["column"], Column(Provenance.from_json(record["provenance"])))
            column.add_reasons(record["reasons"])
        elif kind == "generation":
            self.generations[record["generation"]] = ModelId(**record["policy"])
        elif kind == "compaction":
            self._compact(record)
        elif kind == "sweep":
            self.condemned.update(record["removes"])
        else:
            raise CorruptStoreError(
                f"{self._owner}: commit {self.commits} is of kind {kind!r}, expected one that this version of lopd knows; update lopd."
            )
        self.commits += 1
        self.last = entry.checksum

    def _compact(self, record: Mapping[str, Any]) -> None:
        gone, name = set(record["removes"]), record["column"]
        self.replaced += [(self.commits, path) for path in record["removes"]]
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

    def segments_of(self, column: str | None) -> Sequence[Segment]:
        """Those of a column, or of rollouts, in the order of commits."""
        return self.segments if column is None else self.columns[column].segments

    def forget_replaced(self, before: int) -> list[str]:
        """Paths of segments that compactions before this number replaced, and that were not forgotten yet."""
        old = [path for number, path in self.replaced if number < before]
        self.replaced = [(number, path) for number, path in self.replaced if number >= before]
        return old

    def all_segments(self) -> list[Segment]:
        """Those of rollouts, then those of each column."""
        return [*self.segments, *(segment for column in self.columns.values() for segment in column.segments)]

    def paths(self) -> set[str]:
        """Where they are."""
        return {segment.meta.path for segment in self.all_segments()}

    def provenances(self) -> dict[str, Provenance]:
        """Columns and who computed them."""
        return {name: column.provenance for name, column in self.columns.items()}

    def _now(self, work: Callable[["Snapshot"], T]) -> T:
        """What this gives of this state, or of a later one where a segment that it needs was merged and removed since."""
        while True:
            now = self._later or self
            try:
                return work(now)
            except SegmentGoneError as error:
                later = Snapshot(self._files, self._log, self._manifest, self._owner)
                if error.segment in later.paths():
                    raise
                self._later = later

    def _scan(self) -> None:
        """Read the lines of rollouts that were not read yet: their lengths, and whether the engine reported log-probs."""
        while (seen := len(self._lengths)) < self.rows:
            rows = np.arange(seen, min(seen + _ROWS_AT_ONCE, self.rows))
            lines = self._now(lambda now, rows=rows: now._lines(rows))  # type: ignore[misc]
            self._lengths.append(lines[:, LENGTHS])
            self._reported.append(lines[:, R["has_behavior"]].astype(np.uint8))

    def _lines(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, fields): the lines of rollouts."""
        groups, found = self._grouped(rows), np.empty((len(rows), len(R)), np.int64)
        for group, lines in zip(groups, self._files.run([group.lines for group in groups]), strict=True):
            found[group.places] = lines
        return found

    def lengths(self) -> NDArray[np.int64]:
        """(rows, 2): prompt and response tokens."""
        self._scan()
        return self._lengths.view()

    def find(self, rollout_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of rollouts, -1 where there is none."""
        hashes = hash_ids([encode_id(rollout_id) for rollout_id in rollout_ids]).view("<i8").reshape(-1, 2)
        rows = self._now(lambda now: now._find(hashes))
        return np.where(rows < self.rows, rows, -1)

    def _find(self, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows by the first half of a hashed id, if the line has the second half too."""
        rows = np.full(len(hashes), -1, np.int64)
        self._files.run([partial(s.kept, ID_INDEX, id_index) for s in self.segments if not s.keeps(ID_INDEX)])
        for segment in self.segments:
            halves, lines = segment.kept(ID_INDEX, id_index)
            looking = np.flatnonzero(rows < 0)
            at = np.searchsorted(halves, hashes[looking, 0])
            # Nearly always one round: more only where two ids share the first half of their hash.
            while looking.size:
                fits = at < halves.size
                fits[fits] = halves[at[fits]] == hashes[looking[fits], 0]
                looking, at = looking[fits], at[fits]
                if looking.size:
                    same = (segment.lines(lines[at])[:, ID_HASH] == hashes[looking]).all(axis=1)
                    rows[looking[same]] = segment.meta.first_row + lines[at[same]]
                    looking, at = looking[~same], at[~same] + 1
        return rows

    def scored(self, column: str) -> NDArray[np.bool_]:
        """(rows,): which have scores in this column."""
        return self.scored_rows(column, np.arange(self.rows))

    def scored_rows(self, column: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,): which of these rows have scores in this column."""
        if column in VIRTUAL_COLUMNS:
            self._scan()
            return (self._reported.view()[rows] >> REPORTED.index(VIRTUAL_COLUMNS[column]) & 1).astype(np.bool_)
        if column not in self.columns:
            return np.zeros(len(rows), np.bool_)
        return self._now(lambda now: now.columns[column].places(rows) >= 0)

    def quarantined(self, column: str) -> dict[int, str]:
        """Rows that could not be scored, and why."""
        return self.columns[column].quarantined() if column in self.columns else {}

    def content(self, rows: NDArray[np.int64]) -> list[tuple[bytes, int]]:
        """Content hash and number of response tokens of rollouts."""
        found = self._now(lambda now: now._lines(rows))
        return list(zip(decode.contents(found), found[:, R["response_length"]].tolist(), strict=True))

    def read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str]) -> Rows:
        """These rows with these columns; everything is verified."""
        admission.check_supports(self._owner, top_k, self.provenances())
        names = [name for name in dict.fromkeys([*columns, *top_k]) if name not in VIRTUAL_COLUMNS]
        return admission.with_columns(self._owner, self._now(lambda now: now._read(rows, names, top_k)), columns)

    def _read(self, rows: NDArray[np.int64], names: Sequence[str], top_k: Sequence[str]) -> Rows:
        groups, scored = self._grouped(rows), {name: self._grouped_scores(name, rows) for name in names}
        return decode.read(groups, scored, top_k, self._files.run) if groups else Rows.of(())

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
