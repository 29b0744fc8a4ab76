"""The documents of a commit log, read by their types: one may be forged."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from lopd.backends.column_names import ColumnName
from lopd.backends.zarr.segment import SegmentMeta, SegmentPath
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.stored import Count, Seconds, read_as


class Record(TypedDict):
    """The fields of every commit record; `kind` decides the others.  Those that chain them are for the log."""

    kind: str
    when: Seconds


class _Rollouts(Record):
    segment: SegmentMeta
    rounding: NotRequired[float]


class _Scores(_Rollouts):
    column: ColumnName
    provenance: Provenance


class _Quarantine(Record):
    column: ColumnName
    provenance: Provenance
    reasons: Mapping[Count, str]


class _Generation(Record):
    generation: Count
    policy: ModelId


class _Compaction(Record):
    column: ColumnName | None
    removes: list[SegmentPath]
    adds: list[SegmentMeta]


class _Sweep(Record):
    removes: list[SegmentPath]


_KINDS: dict[str, Any] = {
    "rollouts": _Rollouts,
    "scores": _Scores,
    "quarantine": _Quarantine,
    "generation": _Generation,
    "compaction": _Compaction,
    "sweep": _Sweep,
}


class ColumnState(TypedDict):
    """A column as a checkpoint keeps it; those from before there were reasons have none."""

    provenance: Provenance
    segments: list[SegmentMeta]
    reasons: NotRequired[Mapping[Count, str]]


class Checkpoint(TypedDict):
    """A checkpoint; those of older stores do not hold the checksum of the last record, nor what was replaced in which commit."""

    commits: Count
    generations: Mapping[Count, ModelId]
    segments: list[SegmentMeta]
    columns: Mapping[ColumnName, ColumnState]
    last: NotRequired[str]
    replaced: NotRequired[Mapping[SegmentPath, Count]]


def read_record(body: Mapping[str, Any], owner: str) -> Any:
    """Return the typed values of a commit record.

    Args:
        body: the record's content.
        owner: its name in messages.

    Raises:
        CorruptStoreError: it is of a kind that this version does not know, or has something that such a record does not.
    """
    kind = body.get("kind")
    if kind not in _KINDS:
        raise CorruptStoreError(f"{owner}: it is of kind {kind!r:.80}, which this version of lopd does not know; update lopd.")
    return read_as(_KINDS[kind], body, owner)
