"""What the commit records up to some number add up to: rows, columns, rounds of sampling, and where their bytes are.

It keeps a few numbers per segment.  What grows with the number of rollouts (their lengths, an index of their ids, where their scores are) is
read when it is first asked for, and is some bytes per rollout.
"""

from collections.abc import Mapping, Sequence
from functools import partial
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
from lopd.backends.zarr.encode import BOUND_BY, ID_HASH, LENGTHS, R
from lopd.backends.zarr.segment import Segment, SegmentMeta, decoded_arrays
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, Rollout, RolloutArrays, ScoredRollout

_Group = tuple[Segment, list[int], list[int]]


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
        self._behavior = np.zeros(0, np.bool_)
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
        self._behavior = np.concatenate([self._behavior, added[:, R["has_behavior"]].astype(np.bool_)])

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
        if column == BEHAVIOR_COLUMN:
            self._scan()
            return self._behavior
        if column not in self.columns:
            return np.zeros(self.rows, np.bool_)
        return self.columns[column].places(np.arange(self.rows)) >= 0

    def quarantined(self, column: str) -> dict[int, str]:
        """Rows that could not be scored, and why."""
        return self.columns[column].quarantined() if column in self.columns else {}

    def content(self, rows: NDArray[np.int64]) -> list[tuple[bytes, int]]:
        """Content hash and number of response tokens of rollouts."""
        groups = self._grouped(rows)
        lines = self._files.run([partial(segment.lines, indices) for segment, _, indices in groups])
        found = [list(zip(decode.contents(part), part[:, R["response_length"]].tolist(), strict=True)) for part in lines]
        return _scatter(len(rows), [where for _, where, _ in groups], found)

    def read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str]) -> list[ScoredRollout]:
        """These rows with these columns; everything is verified."""
        if not len(rows):
            return []
        groups = self._grouped(rows)
        parts = self._files.run([partial(decode.rollouts, segment, indices) for segment, _, indices in groups])
        rollouts: list[Rollout] = _scatter(len(rows), [where for _, where, _ in groups], parts)
        scores: list[dict[str, Any]] = [{} for _ in rollouts]
        supports: list[dict[str, Any]] = [{} for _ in rollouts]
        for name in dict.fromkeys([*columns, *top_k]):
            for i, (logprobs_T, support) in enumerate(self._read_column(name, rows, rollouts, name in top_k)):
                if name in columns:
                    scores[i][name] = logprobs_T
                if name in top_k:
                    supports[i][name] = support
        return [ScoredRollout(*three) for three in zip(rollouts, scores, supports, strict=True)]

    def _read_column(self, name: str, rows: NDArray[np.int64], rollouts: Sequence[Rollout], wants_top_k: bool) -> list[Any]:
        if name == BEHAVIOR_COLUMN and not wants_top_k:
            return [(self._behavior_of(rollout), None) for rollout in rollouts]
        groups = self._grouped_scores(name, rows)
        if wants_top_k and self.columns[name].provenance.top_k == 0:
            raise admission.missing_top_k(self._owner, name)
        calls = []
        for segment, where, lines in groups:
            bound_to = decode.bound_to([rollouts[i] for i in where])
            calls.append(partial(decode.scores, segment, lines, bound_to, top_k=wants_top_k))
        return _scatter(len(rows), [where for _, where, _ in groups], self._files.run(calls))

    def read_arrays(self, rows: NDArray[np.int64], columns: Sequence[str]) -> RolloutArrays:
        """These rows end to end; everything is verified."""
        if not len(rows):
            nothing = np.zeros(0, np.int64)
            return RolloutArrays(nothing, nothing, np.zeros(0, np.int32), None, {name: np.zeros(0, np.float32) for name in columns})
        groups = self._grouped(rows)
        wheres = [where for _, where, _ in groups]
        lines = self._files.run([partial(segment.lines, indices) for segment, _, indices in groups])
        ordered = np.empty((len(rows), len(R)), np.int64)
        for where, part in zip(wheres, lines, strict=True):
            ordered[where] = part
        masks = [decode.masks(g[0], part) for g, part in zip(groups, lines, strict=True)] if ordered[:, R["masked"]].any() else None
        tokens = [decode.tokens(g[0], part) for g, part in zip(groups, lines, strict=True)]
        return RolloutArrays(
            prompt_lengths=ordered[:, R["prompt_length"]],
            response_lengths=ordered[:, R["response_length"]],
            token_ids=self._join(len(rows), wheres, tokens),
            loss_mask=None if masks is None else _join_masks(ordered[:, R["response_length"]], _scatter(len(rows), wheres, masks)),
            scores={name: self._column_array(name, rows, ordered, groups, lines) for name in columns},
        )

    def _column_array(
        self, name: str, rows: NDArray[np.int64], ordered: NDArray[np.int64], groups: Sequence[_Group], lines: Sequence[NDArray[np.int64]]
    ) -> NDArray[Any]:
        if name == BEHAVIOR_COLUMN:
            found = _scatter(
                len(rows), [g[1] for g in groups], [decode.behaviors(g[0], part) for g, part in zip(groups, lines, strict=True)]
            )
            if any(piece is None for piece in found):
                raise admission.missing_scores(self._owner, self._name(int(rows[[piece is None for piece in found].index(True)])), name)
            return np.concatenate(found)
        scored = self._grouped_scores(name, rows)
        bound_to = ordered[:, BOUND_BY[0]]
        pieces = self._files.run([partial(_logprobs, segment, where_lines, bound_to[where]) for segment, where, where_lines in scored])
        return self._join(len(rows), [where for _, where, _ in scored], pieces)

    def _join(self, count: int, wheres: Sequence[Sequence[int]], parts: Sequence[decode.Pieces]) -> NDArray[Any]:
        """The pieces end to end in the order of the call; not copied where they lie so in one file."""
        if len(parts) == 1 and parts[0].neighbours:
            return parts[0].read_whole()
        pieces = _scatter(count, wheres, self._files.run([part.read_bytes for part in parts]))
        return np.frombuffer(b"".join(pieces), parts[0].dtype)

    def _grouped_scores(self, name: str, rows: NDArray[np.int64]) -> list[_Group]:
        """The same for the scores of a column."""
        column = self.columns.get(name)
        places = column.places(rows) if column else np.full(len(rows), -1, np.int64)
        if column is None or (places < 0).any():
            raise admission.missing_scores(self._owner, self._name(int(rows[int(np.argmax(places < 0))])), name)
        return _group(column.segments, places >> LINE_BITS, places & ((1 << LINE_BITS) - 1))

    def _name(self, row: int) -> str:
        """The rollout's id, for messages."""
        return self.read(np.array([row]), (), ())[0].rollout.rollout_id

    def _behavior_of(self, rollout: Rollout) -> Any:
        if rollout.behavior_logprobs is None:
            raise admission.missing_scores(self._owner, rollout.rollout_id, BEHAVIOR_COLUMN)
        return rollout.behavior_logprobs

    def _grouped(self, rows: NDArray[np.int64]) -> list[_Group]:
        """(segment, places in the call, lines in the segment) for each segment that some of these rows are in."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        return _group(self.segments, numbers, rows - self._starts[numbers]) if len(rows) else []


def _group(segments: Sequence[Segment], numbers: NDArray[np.int64], lines: NDArray[np.int64]) -> list[_Group]:
    if (numbers == numbers[0]).all():
        # After a compaction, nearly always.
        return [(segments[int(numbers[0])], list(range(len(lines))), lines.tolist())]
    groups = []
    for number in np.unique(numbers).tolist():
        where = np.flatnonzero(numbers == number)
        groups.append((segments[number], where.tolist(), lines[where].tolist()))
    return groups


def _scatter(count: int, wheres: Sequence[Sequence[int]], parts: Sequence[Sequence[Any]]) -> list[Any]:
    """The parts as one list in the order of the call."""
    if len(parts) == 1:
        return list(parts[0])
    whole: list[Any] = [None] * count
    for where, part in zip(wheres, parts, strict=True):
        for place, value in zip(where, part, strict=True):
            whole[place] = value
    return whole


def _logprobs(segment: Segment, indices: Sequence[int], bound_to: NDArray[np.int64]) -> decode.Pieces:
    return decode.logprobs(segment, segment.lines(indices), bound_to)


def _join_masks(lengths: NDArray[np.int64], masks: Sequence[NDArray[Any] | None]) -> NDArray[np.bool_]:
    parts = [
        np.ones(length, np.bool_) if mask is None else mask.astype(np.bool_) for length, mask in zip(lengths.tolist(), masks, strict=True)
    ]
    return np.concatenate(parts)
