"""Many small segments -> few large ones with the same rows in the same order.  Plans and arrays; what is written where is the store's."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lopd.backends.files import Run
from lopd.backends.zarr import decode, encode
from lopd.backends.zarr.columns import LENGTHS, REPORTED, R, S
from lopd.backends.zarr.segment import LINES, Segment, SegmentData
from lopd.records.rows import ends

_FAN_IN = 16
# A merge by a writer moves no more bytes than that, which it has in memory.  An append of more tokens than this is left as it is where its rows
# follow those before it: scores, which may be of any rows, are where many segments cost.
_LARGE_TOKENS, _MOST_BYTES = 1 << 19, 1 << 28
# A compaction makes no segment of scores with more bytes of values: a support of 64 tokens has 520 a token, and twice as many are in memory.
_MERGED_BYTES = 1 << 30


def due(segments: Sequence[Segment], *, neighbours: bool) -> tuple[Segment, ...]:
    """Return segments that the writer of the last one should merge, so that their number grows with the logarithm of that of appends; empty if none.

    They are of one level: `_FAN_IN` appends make one of level 1, as many of those one of level 2.  So a row is moved once a level, and an
    append costs a bounded share of that.  Of a backlog of scores, as older versions leave it, each append merges `_FAN_IN`.

    Args:
        segments: those of rollouts, or of a column, in the order of commits.
        neighbours: they must follow one another, so that rows keep their numbers.
    """
    level = segments[-1].meta.level
    same, room = list[Segment](), _MOST_BYTES
    for segment in reversed(segments):
        small = (level or segment.meta.tokens < _LARGE_TOKENS) if neighbours else segment.meta.stored_bytes * _FAN_IN <= _MOST_BYTES
        fits = segment.meta.level == level and small
        if fits and (room := room - segment.meta.stored_bytes) >= 0:
            same.append(segment)
        elif neighbours:
            break
        # more would be moved at once; of neighbours, those that are left could not be merged with what comes behind the merged one
        if len(same) == _FAN_IN and not neighbours:
            break
    return () if len(same) < _FAN_IN else tuple(reversed(same))


def fitting(scores: Sequence[Segment], target_tokens: int) -> int:
    """Return how many tokens a merged segment of these scores may have: `target_tokens`, or fewer where a token has many bytes."""
    arrays = ((name, array) for segment in scores[:1] for name, array in segment.meta.arrays.items())
    sizes = [array.row_bytes for name, array in arrays if name not in (LINES, encode.SCORED_ROWS)]
    return max(min(target_tokens, _MERGED_BYTES // max(sum(sizes), 1)), 1)


def plan(segments: Sequence[Segment], target_tokens: int, *, neighbours: bool) -> list[tuple[Segment, ...]]:
    """Return which segments to merge together, so that none but the last is much smaller than `target_tokens`.

    Neighbouring segments of rollouts are merged up to the target, so rows keep their numbers.  Scores lie in the order in which they were
    computed, often shortest first, so all segments of a column that are small or overlap are sorted together.

    Args:
        segments: see `due`.
        target_tokens: tokens of a merged segment.
        neighbours: see `due`.
    """
    groups = [*_neighbours(segments, target_tokens)] if neighbours else [_loose(segments, target_tokens)]
    return [group for group in groups if len(group) > 1]


def _neighbours(segments: Sequence[Segment], target: int) -> Iterator[tuple[Segment, ...]]:
    group: list[Segment] = []
    for segment in segments:
        if group and sum(s.meta.tokens for s in group) + segment.meta.tokens > target:
            yield tuple(group)
            group = []
        group.append(segment)
    yield tuple(group)


def _loose(segments: Sequence[Segment], target: int) -> tuple[Segment, ...]:
    """Return segments that are small, or share a range of rows with another."""
    ordered = sorted(segments, key=lambda segment: segment.meta.first_row)
    overlapping, end = set(), -1
    for before, after in pairwise(ordered):
        end = max(end, before.meta.last_row)
        if after.meta.first_row <= end:
            overlapping |= {before.meta.path, after.meta.path}
    return tuple(s for s in ordered if s.meta.tokens < target // 2 or s.meta.path in overlapping)


def merge(column: str | None, segments: Sequence[Segment], target_tokens: int, run: Run) -> Iterator[SegmentData]:
    """Yield the new segments, one in memory at a time; everything that is moved is verified: nothing shows its damage once its file is new."""
    made = [_merge_rollouts(segments, run)] if column is None else _merge_scores(segments, target_tokens, run)
    level = 1 + max(segment.meta.level for segment in segments)
    replaces = tuple(segment.meta.path.rpartition("/")[2] for segment in segments)
    left = sum(segment.meta.rows for segment in segments)
    for data in made:
        found = encode.found_by(data.lines, data.first_row, data.last_row)
        left -= len(data.lines)
        # said once, or a record would grow with the product of old and new segments; and by the last, with which all rows are there
        yield evolve(data, arrays={**data.arrays, **found}, level=level, replaces=() if left else replaces)


def _merge_rollouts(segments: Sequence[Segment], run: Run) -> SegmentData:
    lines = [part.copy() for part in run([segment.lines for segment in segments])]
    responses = [int(part[:, LENGTHS][:, 1].sum()) for part in lines]
    sizes = {
        "token_start": [segment.meta.tokens for segment in segments],
        "response_start": responses,
        "id_start": [segment.meta.arrays["rollout_ids"].shape[0] for segment in segments],
    }
    for column, counts in sizes.items():
        for part, offset in zip(lines, ends(np.array(counts)), strict=False):
            part[:, R[column]] += offset
    arrays = {name: np.concatenate(run([partial(s.whole, name) for s in segments])) for name in ("token_ids", "rollout_ids")}
    for name, filler in (("loss_mask", 1), *((name, np.nan) for name in REPORTED)):
        having = [segment for segment in segments if name in segment]
        if having:
            full = partial(np.full, fill_value=filler, dtype=having[0].meta.arrays[name].dtype)
            parts = [partial(s.whole, name) if name in s else partial(full, n) for s, n in zip(segments, responses, strict=True)]
            arrays[name] = np.concatenate(run(parts))
    first, last = segments[0].meta.first_row, segments[-1].meta.last_row
    return SegmentData(encode.ROLLOUT_ATTRIBUTES, np.concatenate(lines), arrays, sum(sizes["token_start"]), first, last)


def _merge_scores(segments: Sequence[Segment], target: int, run: Run) -> Iterator[SegmentData]:
    lines = np.concatenate(run([segment.lines for segment in segments]))
    owners = np.repeat(np.arange(len(segments)), [segment.meta.rows for segment in segments])
    order = np.argsort(lines[:, S["row"]], kind="stable")
    lines, owners = lines[order], owners[order]
    lengths = lines[:, S["length"]]
    first, bounds = 0, ends(lengths)
    while first < len(lines):
        # as many as have `target` tokens, or one that alone has more
        last = max(int(np.searchsorted(bounds, bounds[first] + target, "right")) - 1, first + 1)
        yield _gather_scores(segments, lines[first:last], owners[first:last], lengths[first:last], run)
        first = last


def _gather_scores(
    segments: Sequence[Segment], lines: NDArray[np.int64], owners: NDArray[np.int64], lengths: NDArray[np.int64], run: Run
) -> SegmentData:
    groups = [decode.Group(segments[n], where := np.flatnonzero(owners == n), where) for n in np.unique(owners).tolist()]
    arrays = decode.joined_scores([(group, lines[group.places]) for group in groups], lengths, run)
    lines = lines.copy()
    lines[:, S["start"]] = ends(lengths)[:-1]
    rows = lines[:, S["row"]]
    return SegmentData(encode.SCORE_ATTRIBUTES, lines, arrays, int(lengths.sum()), int(rows[0]), int(rows[-1]))
