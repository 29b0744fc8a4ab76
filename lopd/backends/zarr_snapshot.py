"""What the commit records up to some number add up to: rows, ids, columns, and where their bytes are."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.backends.zarr_segment import MapFile, Segment, bounded_maps
from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.manifest import Provenance
from lopd.types import BEHAVIOR_COLUMN, FinishReason, Float32Array, Rollout, ScoredRollout, Scores

_REASONS: tuple[FinishReason, ...] = ("stop", "length")


def rollout_arrays(rollouts: Sequence[Rollout], vocab_size: int) -> dict[str, NDArray[Any]]:
    """The arrays of one segment of rollouts (the smallest type that holds every id; no mask if nothing is masked)."""
    id_bytes, id_lengths = ragged.concat_texts([rollout.rollout_id for rollout in rollouts])
    tokens = [ids for rollout in rollouts for ids in (rollout.prompt_ids, rollout.response_ids)]
    arrays: dict[str, NDArray[Any]] = {
        "token_ids": ragged.concat(tokens, np.min_scalar_type(vocab_size - 1).name),
        "prompt_lengths": np.array([rollout.prompt_ids.size for rollout in rollouts], np.int32),
        "response_lengths": np.array([rollout.response_ids.size for rollout in rollouts], np.int32),
        "finish_reason": np.array([_REASONS.index(rollout.finish_reason) for rollout in rollouts], np.uint8),
        "content_hash": _stack_hashes([rollout.content_hash for rollout in rollouts]),
        "rollout_ids": id_bytes,
        "rollout_id_lengths": id_lengths,
    }
    if not all(rollout.loss_mask.all() for rollout in rollouts):
        arrays["loss_mask"] = ragged.concat([rollout.loss_mask for rollout in rollouts], "uint8")
    valid = np.array([rollout.behavior_logprobs is not None for rollout in rollouts], np.uint8)
    if valid.any():
        # NaN, not 0, where there is no value: other readers of these files must not take a gap for a certainty.
        gaps = [np.full(r.response_ids.size, np.nan, np.float32) if r.behavior_logprobs is None else r.behavior_logprobs for r in rollouts]
        arrays |= {"behavior_valid": valid, "behavior_logprobs": ragged.concat(gaps, "float32")}
    return arrays


def score_arrays(scores: Sequence[Scores], rows: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The arrays of one segment of scores.  Rows stay right because rollouts are only ever added behind them."""
    return {
        "row": np.array(rows, np.int64),
        "lengths": np.array([score.logprobs.size for score in scores], np.int32),
        "content_hash": _stack_hashes([score.content_hash for score in scores]),
        "logprobs": ragged.concat([score.logprobs for score in scores], "float32"),
        "floored": np.array([score.floored for score in scores], np.int64),
    }


def _stack_hashes(hashes: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)


@final
class _RolloutSegment:
    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.ids = ragged.split_texts(segment.load("rollout_ids"), segment.load("rollout_id_lengths"))
        self.hashes = [row.tobytes() for row in segment.load("content_hash")]
        self.lengths = np.stack([segment.load("prompt_lengths"), segment.load("response_lengths")], axis=1).astype(np.int64)
        valid = segment.load("behavior_valid") if "behavior_valid" in segment else np.zeros(len(self.ids))
        self.behavior = valid.astype(np.bool_)
        self._reasons = segment.load("finish_reason")
        self._tokens = ragged.offsets(self.lengths.sum(axis=1))
        self._responses = ragged.offsets(self.lengths[:, 1])

    def rollout(self, i: int) -> Rollout:
        start, middle, end = self._tokens[i], self._tokens[i] + self.lengths[i, 0], self._tokens[i + 1]
        tokens = self._segment.view("token_ids", start, end)
        begin, stop = self._responses[i], self._responses[i + 1]
        masked = "loss_mask" in self._segment
        return Rollout(
            rollout_id=self.ids[i],
            prompt_ids=tokens[: middle - start],
            response_ids=tokens[middle - start :],
            loss_mask=self._segment.view("loss_mask", begin, stop) if masked else np.ones(stop - begin, np.bool_),
            finish_reason=_REASONS[self._reasons[i]],
            behavior_logprobs=self._segment.view("behavior_logprobs", begin, stop) if self.behavior[i] else None,
        )


@final
class _ScoreSegment:
    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self.rows = segment.load("row")
        self.hashes = segment.load("content_hash")
        self._offsets = ragged.offsets(segment.load("lengths"))

    def logprobs(self, i: int) -> Float32Array:
        # A copy: a view would keep its map, and the file behind it, open for as long as the caller keeps the scores.
        logprobs_T = np.array(self._segment.view("logprobs", self._offsets[i], self._offsets[i + 1]))
        logprobs_T.flags.writeable = False
        return logprobs_T


@final
class _Column:
    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance
        self._segments: list[_ScoreSegment] = []
        self._place: dict[int, tuple[int, int]] = {}

    def add(self, segment: _ScoreSegment) -> None:
        number = len(self._segments)
        self._segments.append(segment)
        self._place.update((row, (number, i)) for i, row in enumerate(segment.rows.tolist()))

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def rows(self) -> list[int]:
        return list(self._place)

    def read(self, row: int) -> tuple[bytes, Float32Array]:
        number, i = self._place[row]
        segment = self._segments[number]
        return segment.hashes[i].tobytes(), segment.logprobs(i)


@final
class Snapshot:
    """The rows and columns of a prefix of the commit log.

    Args:
        root: folder of the store.   owner: how messages name the store.
    """

    def __init__(self, root: Path, owner: str) -> None:
        """Of no commits yet; see `add`."""
        self._root = root
        self._owner = owner
        self._map_file: MapFile = bounded_maps()
        self._segments: list[_RolloutSegment] = []
        self._starts: list[int] = []
        self._columns: dict[str, _Column] = {}
        self.rows: dict[str, int] = {}
        self.commits = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the next commit record; if its segment is damaged, nothing changes.

        Raises:
            CorruptStoreError: an array that says what the rows are does not match its checksum.
        """
        segment = Segment(self._root / record["segment"], record["checksums"], self._owner, self._map_file)
        if record["kind"] == "rollouts":
            self._add_rollouts(_RolloutSegment(segment))
        else:
            scores, provenance = _ScoreSegment(segment), Provenance.from_json(record["provenance"])
            self._columns.setdefault(record["column"], _Column(provenance)).add(scores)
        self.commits += 1

    def _add_rollouts(self, segment: _RolloutSegment) -> None:
        start = len(self.rows)
        self._segments.append(segment)
        self._starts.append(start)
        self.rows.update((rollout_id, start + i) for i, rollout_id in enumerate(segment.ids))

    def provenances(self) -> dict[str, Provenance]:
        """Columns and who computed them."""
        return {name: column.provenance for name, column in self._columns.items()}

    def lengths(self) -> NDArray[np.int64]:
        """(rows, 2): prompt and response tokens."""
        return np.concatenate([np.zeros((0, 2), np.int64), *[segment.lengths for segment in self._segments]])

    def scored(self, column: str) -> NDArray[np.bool_]:
        """(rows,): which have scores in this column."""
        if column == BEHAVIOR_COLUMN:
            return np.concatenate([np.zeros(0, np.bool_), *[segment.behavior for segment in self._segments]])
        mask = np.zeros(len(self.rows), np.bool_)
        if column in self._columns:
            mask[self._columns[column].rows()] = True
        return mask

    def is_scored(self, column: str, rollout_id: str) -> bool:
        """Whether a committed rollout is in this column."""
        return column in self._columns and self.rows[rollout_id] in self._columns[column]

    def find(self, rollout_id: str) -> tuple[bytes, int] | None:
        """Content hash and number of response tokens of a committed rollout."""
        if rollout_id not in self.rows:
            return None
        segment, i = self._locate(self.rows[rollout_id])
        return segment.hashes[i], int(segment.lengths[i, 1])

    def _locate(self, row: int) -> tuple[_RolloutSegment, int]:
        number = bisect_right(self._starts, row) - 1
        return self._segments[number], row - self._starts[number]

    def read(self, row: int, columns: Sequence[str]) -> ScoredRollout:
        """One row with these columns; its tokens and its scores' tokens are checked against the committed hash."""
        segment, i = self._locate(row)
        try:
            rollout = segment.rollout(i)
        except InvalidRecordError as error:
            raise self._corrupt(segment.ids[i], "tokens") from error
        if rollout.content_hash != segment.hashes[i]:
            raise self._corrupt(segment.ids[i], "tokens")
        return ScoredRollout(rollout, {column: self._scores(row, rollout, column) for column in columns})

    def _scores(self, row: int, rollout: Rollout, column: str) -> Float32Array:
        if column == BEHAVIOR_COLUMN and rollout.behavior_logprobs is not None:
            return rollout.behavior_logprobs
        if column not in self._columns or row not in self._columns[column]:
            raise ragged.missing_scores(self._owner, rollout.rollout_id, column)
        content_hash, logprobs_T = self._columns[column].read(row)
        if content_hash != rollout.content_hash or logprobs_T.shape != rollout.response_ids.shape:
            raise self._corrupt(rollout.rollout_id, f"scores in column {column!r}")
        return logprobs_T

    def _corrupt(self, rollout_id: str, what: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self._owner}: rollout {rollout_id!r}: the {what} belong to other content than its committed hash names, "
            "expected the same; restore the store from a backup."
        )
