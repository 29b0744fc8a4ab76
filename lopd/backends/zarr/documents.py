"""What the records and checkpoints of a commit log may say, kind by kind."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from lopd.backends.admission import ColumnName
from lopd.backends.zarr.segment import SegmentMeta, SegmentPath
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.stored import Count, Seconds, read_as


class _Record(TypedDict):
    when: Seconds


class _Rollouts(_Record):
    kind: Literal["rollouts"]
    segment: SegmentMeta
    rounding: NotRequired[float]


class _Scores(_Record):
    kind: Literal["scores"]
    column: ColumnName
    provenance: Provenance
    segment: SegmentMeta
    rounding: NotRequired[float]


class _Quarantine(_Record):
    kind: Literal["quarantine"]
    column: ColumnName
    provenance: Provenance
    reasons: Mapping[Count, str]


class _Generation(_Record):
    kind: Literal["generation"]
    generation: Count
    policy: ModelId


class _Compaction(_Record):
    kind: Literal["compaction"]
    column: ColumnName | None
    removes: list[SegmentPath]
    adds: list[SegmentMeta]


class _Sweep(_Record):
    kind: Literal["sweep"]
    removes: list[SegmentPath]


class ColumnState(TypedDict):
    """A column in a checkpoint; those from before there were reasons have none."""

    provenance: Provenance
    segments: list[SegmentMeta]
    reasons: NotRequired[Mapping[Count, str]]


class State(TypedDict):
    """A checkpoint; those of older stores name neither the last record nor what was replaced."""

    commits: Count
    generations: Mapping[Count, ModelId]
    segments: list[SegmentMeta]
    columns: Mapping[ColumnName, ColumnState]
    last: NotRequired[str]
    replaced: NotRequired[list[tuple[Count, SegmentPath]]]


_KINDS: dict[Any, Any] = {
    "rollouts": _Rollouts,
    "scores": _Scores,
    "quarantine": _Quarantine,
    "generation": _Generation,
    "compaction": _Compaction,
    "sweep": _Sweep,
}


def read_record(body: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Give the typed values of a commit record.

    Raises:
        CorruptStoreError: it is something else, or of a kind that this version does not know.
    """
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CorruptStoreError(f"{owner}: its kind is {kind!r:.80}, expected one that this version of lopd knows; update lopd.")
    record: dict[str, Any] = read_as(_KINDS[kind], body, owner)
    return record
