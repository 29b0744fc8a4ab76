"""One committed segment: a table of int64, one line per rollout (or per scored rollout), and the ragged arrays that its lines point into.

A line records where its rollout's values are, and carries checksums of them and of itself: so any single rollout can be fetched and verified
without reading anything else.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any, final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from lopd.backends.files import Bytes, Files, Piece
from lopd.backends.sealing import dump
from lopd.backends.zarr.columns import Limits
from lopd.backends.zarr.format import METADATA_FILE, RAW, ArrayMeta, chunk_path, decode_zstd, encode_array, group_document
from lopd.errors import CorruptStoreError, StoreReadError
from lopd.records.checks import check_number
from lopd.records.stored import Count, Name

LINES = "lines"
# Arrays of an old store that are compressed: so many are kept decompressed.
_DECODED_ARRAYS = 8
# A record that named any other place could make a store read, or a sweep remove, what is not its own.
SegmentPath = Annotated[str, re.compile(r"(segments|scores/(?![.])[A-Za-z0-9_.-]+)/[0-9a-f]{32}")]
_Int64 = NDArray[np.int64]


@frozen
class SegmentMeta:
    """A segment as its commit record describes it.

    Args:
        path: its group's path in the store.
        rows: lines.
        tokens: number of tokens of the rollouts, or of scored tokens.
        first_row, last_row: first and last row in the store; lines of scores may skip some in between.
        arrays: name -> what it is.
        level: 0 as an append made it; one more than those that were merged to make it.
        replaces: names of those, in the last that was made of them (in each of them, in older stores).
    """

    path: SegmentPath
    rows: Count
    tokens: Count
    first_row: Count
    last_row: Count
    arrays: Mapping[Name, ArrayMeta]
    level: Count = 0
    replaces: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        owner, span, lines = f"Segment {self.path}", self.last_row - self.first_row + 1, self.arrays.get(LINES)
        check_number(owner, "number of rows", self.rows, 0 < self.rows <= span, f"from 1 to {span}, the rows from first to last")
        shape = None if lines is None else lines.shape[0]
        check_number(owner, "number of lines", shape, shape == self.rows, f"{self.rows}, one for each row")

    @property
    def dense(self) -> bool:
        """Whether its lines are the rows from first to last, in order."""
        return self.last_row - self.first_row + 1 == self.rows

    @property
    def stored_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.stored_bytes for array in self.arrays.values())

    def chunk(self, name: str) -> str:
        """Return where the one chunk of an array is."""
        return chunk_path(self.path, name, len(self.arrays[name].shape))


@frozen(eq=False)
class SegmentData:
    """What is in a segment that is to be written.

    Args:
        attributes: what the columns and codes of the lines mean, for other readers.  The last column is the line's checksum.
        lines: (rows, fields) int64.
        arrays: ragged values.
        tokens: number of tokens of the rollouts, or of scored tokens.
        first_row, last_row: first and last row in the store.
        rounding: largest error in nats by which a log-prob was rounded.
        level, replaces: see `SegmentMeta`.
    """

    attributes: Mapping[str, Any]
    lines: _Int64
    arrays: Mapping[str, NDArray[Any]]
    tokens: int
    first_row: int
    last_row: int
    rounding: float = 0.0
    level: int = 0
    replaces: tuple[str, ...] = ()


def _line_checksums(lines: _Int64) -> _Int64:
    # numpy makes the bytes of all lines in one call
    return checksums(np.ascontiguousarray(lines[:, :-1]).view(f"V{8 * lines.shape[1] - 8}").reshape(-1).tolist())


def checksums(*columns: Sequence[Any]) -> _Int64:
    """Return (n,): 64 bits of the bytes that each row has in one column after the other, as a line holds them; what is None does not count."""
    sums = [0] * len(columns[0])
    for column in columns:
        if isinstance(column[0], bytes | memoryview):  # what is read has no gaps, and is most of all there is
            sums = list(map(xxh3_64_intdigest, column, sums))
        else:
            sums = [total if part is None else xxh3_64_intdigest(part, total) for part, total in zip(column, sums, strict=True)]
    return np.array(sums, np.uint64).view(np.int64)


def segment_group(store: str, replaces: Sequence[str]) -> dict[str, Any]:
    """Return the content of `zarr.json` of a segment: whose it is, and which others are no longer live."""
    return group_document({"lopd_store": store, "lopd_replaces": list(replaces)})


def encode_segment(path: str, data: SegmentData, store: str) -> tuple[dict[str, Bytes], SegmentMeta]:
    """Return the files of one segment of a store, and how a commit record describes it."""
    files: dict[str, Bytes] = {f"{path}/{METADATA_FILE}": np.frombuffer(dump(segment_group(store, data.replaces)), np.uint8)}
    metas, lines = {}, np.ascontiguousarray(data.lines)
    lines[:, -1] = _line_checksums(lines)
    for name, array in {LINES: lines, **data.arrays}.items():
        encoded, metas[name] = encode_array(path, name, array, data.attributes if name == LINES else {})
        files |= encoded
    meta = SegmentMeta(path, len(data.lines), data.tokens, data.first_row, data.last_row, metas, data.level, data.replaces)
    return files, meta


class SegmentGoneError(CorruptStoreError):
    """A file of a segment is missing: it is lost, or a segment that was merged from it has taken its place.  Users get `lost`.

    Attributes:
        segment: its path.
    """

    segment = ""

    def lost(self) -> CorruptStoreError:
        """Return the error for a file that did not leave by a merge."""
        return CorruptStoreError(str(self))


@final
class Segment:
    """Reads one committed segment.

    Args:
        files: the store's files.   meta: from the commit record.   owner: the store's name in messages.
        decoded: gives a compressed array of so many bytes whole; shared by the segments of a store, which keeps the latest few.
    """

    def __init__(self, files: Files, meta: SegmentMeta, owner: str, decoded: Callable[[str, int], Bytes]) -> None:
        self.meta = meta
        self._files = files
        self._owner = owner
        self._decoded = decoded

    def __contains__(self, name: str) -> bool:
        return name in self.meta.arrays

    def lines(self, indices: _Int64 | None = None) -> _Int64:
        """Return (n, fields): these lines, or all of them; each verified."""
        meta = self.meta.arrays[LINES]
        if indices is None:
            lines = meta.values(*self.pieces(LINES, np.array([0]), np.array([self.meta.rows])))
        else:
            lines = meta.values(b"".join(self.pieces(LINES, indices, indices + 1)))
        bad = np.flatnonzero(_line_checksums(lines) != lines[:, -1])
        if bad.size:
            raise self.damaged(LINES, f"line {bad[0] if indices is None else indices[bad[0]]} does not match its checksum")
        if (strange := self._limits.misfit(lines)) is not None:
            raise self.damaged(LINES, f"line {strange if indices is None else indices[strange]} is not what a writer makes")
        return lines

    @cached_property
    def _limits(self) -> Limits:
        return Limits.of({name: array.shape[0] for name, array in self.meta.arrays.items()})

    def keys(self, name: str, columns: int | slice) -> _Int64:
        """Return the whole array by which its rows are found: these columns of the lines, where an older segment lacks it.

        It has no other checksum than that of its bytes.
        """
        return self.whole(name) if name in self else self.lines()[:, columns].copy()

    def whole(self, name: str) -> NDArray[Any]:
        """Return a whole array, if its file is what was committed."""
        meta = self.meta.arrays[name]
        (data,) = self.pieces(name, np.array([0]), np.array([meta.shape[0]]))
        # the checksum of an array that is compressed is that of its file
        if not meta.is_chunk(data if meta.codec == RAW else self._files.read(self.meta.chunk(name))):
            raise self.damaged(name, "it does not match its checksum")
        return meta.values(data)

    def pieces(self, name: str, starts: _Int64, ends: _Int64) -> Sequence[Piece]:
        """Return the bytes of parts of one array along its first dimension; not verified, the lines have the checksums."""
        meta, path, size = self.meta.arrays[name], self.meta.chunk(name), self.meta.arrays[name].row_bytes
        begin, stop = (starts * size).tolist(), (ends * size).tolist()
        found: Sequence[Piece]
        try:
            if meta.codec == RAW:
                found = self._files.read_ranges(path, begin, stop)
            else:
                data = self._decoded(path, size * meta.shape[0])
                found = [data[first:last].tobytes() for first, last in zip(begin, stop, strict=True)]
        except ValueError as error:
            raise self.damaged(name, f"it cannot be decompressed ({error})") from error
        except OSError as error:
            raise self._unread(name, error) from error
        if sum(map(len, found)) != sum(stop) - sum(begin):
            raise self.damaged(name, "its file is too short")
        return found

    def _unread(self, name: str, error: OSError) -> CorruptStoreError | StoreReadError:
        if isinstance(error, FileNotFoundError):
            gone = SegmentGoneError(str(self.damaged(name, "its file is missing")))
            gone.segment = self.meta.path
            return gone
        return StoreReadError(f"{self._owner}: reading array {name!r} of {self.meta.path} failed with {error}; check it and try again.")

    def damaged(self, name: str, what: str) -> CorruptStoreError:
        """Return the error for bytes that are not what was committed."""
        return CorruptStoreError(
            f"{self._owner}: segment {self.meta.path}, array {name!r}: {what}; restore the file from a backup, or write the store again."
        )


def decoded_arrays(files: Files) -> Callable[[str, int], Bytes]:
    """Return a function that gives the content of a compressed file, of so many bytes, and keeps the latest few."""
    return lru_cache(maxsize=_DECODED_ARRAYS)(lambda path, size: decode_zstd(files.read(path), size))
