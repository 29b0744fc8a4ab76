"""One committed segment: a table of int64, one line per rollout (or per scored rollout), and the ragged arrays that its lines point into.

A line says where its rollout's values are, and carries checksums of them and of itself: so any single rollout can be fetched and verified
without reading anything else.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, final

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from lopd.backends.commit_log import dump
from lopd.backends.files import Bytes, Files
from lopd.backends.zarr_format import METADATA_FILE, ArrayMeta, Codec, chunk_path, decode_zstd, encode_array, group_document
from lopd.errors import CorruptStoreError, StoreReadError

LINES = "lines"
# Of a store written with codec "zstd": whole arrays that are kept decompressed.
_DECODED_ARRAYS = 8
# A record that named any other place could make a store read, or a sweep remove, what is not its own.
_SEGMENT_PATH = re.compile(r"(segments|scores/(?![.])[A-Za-z0-9_.-]+)/[0-9a-f]{32}")
_Int64 = NDArray[np.int64]


@frozen
class SegmentMeta:
    """A segment as its commit record describes it.

    Args:
        path: of its group in the store.
        rows: lines.
        tokens: of the rollouts, or scored ones.
        first_row, last_row: of the rollouts in the store; lines of scores may skip some in between.
        arrays: name -> what it is.
    """

    path: str
    rows: int
    tokens: int
    first_row: int
    last_row: int
    arrays: Mapping[str, ArrayMeta]

    @property
    def dense(self) -> bool:
        """Whether its lines are the rows from first to last, in order."""
        return self.last_row - self.first_row + 1 == self.rows

    @property
    def stored_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.stored_bytes for array in self.arrays.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {**asdict(self, recurse=False), "arrays": {name: array.to_json() for name, array in self.arrays.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], owner: str) -> "SegmentMeta":
        """The inverse of `to_json`.

        Raises:
            CorruptStoreError: the path leads out of the store.
        """
        if not _SEGMENT_PATH.fullmatch(data["path"]):
            raise CorruptStoreError(
                f"{owner}: a commit record names the segment {data['path']!r}, expected a folder of segments/ or scores/; "
                "restore the record from a backup."
            )
        return cls(**{**data, "arrays": {name: ArrayMeta.from_json(array) for name, array in data["arrays"].items()}})


@frozen(eq=False)
class SegmentData:
    """What is in a segment that is to be written.

    Args:
        fields: what the columns of a line mean; the last is its checksum.
        lines: (rows, fields) int64.
        arrays: ragged values.
        tokens: of the rollouts, or scored ones.
        first_row, last_row: of the rollouts in the store.
        rounding: largest error in nats by which a log-prob was rounded.
    """

    fields: Sequence[str]
    lines: _Int64
    arrays: Mapping[str, NDArray[Any]]
    tokens: int
    first_row: int
    last_row: int
    rounding: float = 0.0


def seal_lines(lines: _Int64) -> _Int64:
    """The same lines with the checksum of each in its last column."""
    lines = np.ascontiguousarray(lines)
    lines[:, -1] = _line_checksums(lines)
    return lines


def _line_checksums(lines: _Int64) -> _Int64:
    data, width = lines.view(np.uint8).reshape(-1).data, lines.shape[1] * 8
    sums = [xxh3_64_intdigest(data[start : start + width - 8]) for start in range(0, len(data), width)]
    return np.array(sums, np.uint64).view(np.int64)


def checksum_of(*arrays: NDArray[Any] | None) -> int:
    """64 bits of all these arrays' bytes, one after the other, as the int64 that a line holds; what is None does not count."""
    total = 0
    for array in arrays:
        total = total if array is None else xxh3_64_intdigest(array.data, seed=total)
    return total - (1 << 64) if total >= 1 << 63 else total


def encode_segment(path: str, data: SegmentData, codec: Codec) -> tuple[dict[str, Bytes], SegmentMeta]:
    """The files of one segment, and how a commit record describes it.  The lines are never compressed: they are read one by one."""
    files: dict[str, Bytes] = {f"{path}/{METADATA_FILE}": np.frombuffer(dump(group_document({})), np.uint8)}
    metas = {}
    encoded, metas[LINES] = encode_array(path, LINES, seal_lines(data.lines), "raw", {"fields": list(data.fields)})
    files |= encoded
    for name, array in data.arrays.items():
        encoded, metas[name] = encode_array(path, name, array, codec)
        files |= encoded
    return files, SegmentMeta(path, len(data.lines), data.tokens, data.first_row, data.last_row, metas)


@final
class Segment:
    """Reads one committed segment.

    Args:
        files: of the store.   meta: from the commit record.   owner: how messages name the store.
        decoded: gives a compressed array whole; shared by the segments of a store, which keeps the latest few.
    """

    def __init__(self, files: Files, meta: SegmentMeta, owner: str, decoded: Callable[[str], Bytes]) -> None:
        """Nothing is read yet."""
        self.meta = meta
        self._files = files
        self._owner = owner
        self._decoded = decoded

    def __contains__(self, name: str) -> bool:
        """Whether the segment has this array."""
        return name in self.meta.arrays

    def lines(self, indices: Sequence[int] | None = None) -> _Int64:
        """(n, fields): these lines, or all of them; each verified."""
        shape = self.meta.arrays[LINES].shape
        if indices is None:
            lines = self.ranges(LINES, [0], [shape[0]])[0]
        else:
            parts = self.ranges(LINES, indices, [i + 1 for i in indices])
            lines = np.concatenate(parts) if parts else np.zeros((0, shape[1]), np.int64)
        lines = np.ascontiguousarray(lines)
        bad = np.flatnonzero(_line_checksums(lines) != lines[:, -1])
        if bad.size:
            raise self.damaged(LINES, f"line {bad[0] if indices is None else indices[bad[0]]}")
        return lines

    def ranges(self, name: str, starts: Sequence[int], ends: Sequence[int]) -> list[NDArray[Any]]:
        """Parts of one array along its first dimension; not verified, the lines have the checksums."""
        meta = self.meta.arrays[name]
        dtype = np.dtype(meta.dtype).newbyteorder("<")
        size = dtype.itemsize * int(np.prod(meta.shape[1:], dtype=np.int64))
        path = chunk_path(self.meta.path, name, len(meta.shape))
        try:
            if (whole := self._whole(name, path, meta, size)) is not None:
                array = whole.view(dtype).reshape(meta.shape)
                return [array[start:end] for start, end in zip(starts, ends, strict=True)]
            parts = self._files.read_ranges(path, [s * size for s in starts], [e * size for e in ends])
        except FileNotFoundError as error:
            raise self.damaged(name, "its file is missing") from error
        except OSError as error:
            raise StoreReadError(
                f"{self._owner}: reading {path} failed with {error}, expected the storage to answer; check it and try again."
            ) from error
        for part, start, end in zip(parts, starts, ends, strict=True):
            if part.size != (end - start) * size:
                raise self.damaged(name, "its file is too short")
        return [part.view(dtype).reshape(-1, *meta.shape[1:]) for part in parts]

    def _whole(self, name: str, path: str, meta: ArrayMeta, size: int) -> Bytes | None:
        try:
            whole = self._files.map(path) if meta.codec == "raw" else self._decoded(path)
        except ValueError as error:
            raise self.damaged(name, f"it cannot be decompressed ({error})") from error
        if whole is not None and whole.size != meta.shape[0] * size:
            raise self.damaged(name, f"its file has {whole.size} bytes of {meta.shape[0] * size}")
        return whole

    def damaged(self, name: str, what: str) -> CorruptStoreError:
        """The error for bytes that are not what was committed."""
        return CorruptStoreError(
            f"{self._owner}: segment {self.meta.path}, array {name!r}: {what}, expected what was committed; "
            "restore the file from a backup, or write the store again."
        )


def decoded_arrays(files: Files) -> Callable[[str], Bytes]:
    """A function that gives a compressed file's content, and keeps the latest few."""
    return lru_cache(maxsize=_DECODED_ARRAYS)(lambda path: decode_zstd(files.read(path)))
