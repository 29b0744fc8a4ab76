"""Raw Zarr v3 groups and arrays, written by hand: one uncompressed chunk per array, so that a read is a slice of a memory map.

Any Zarr v3 reader reads them; lopd itself needs no zarr.  A segment is one group: written once, flushed, never changed.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.commit_log import checksum, dump, make_folder, put_if_absent, sync_folder, write_file
from lopd.errors import CorruptStoreError

METADATA_FILE = "zarr.json"

# Every map holds a file descriptor; a store of many small appends would run out of them without a bound.
_OPEN_MAPS = 128

MapFile = Callable[[Path, str, int], NDArray[Any]]


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What `zarr.json` of a group says."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def make_group(folder: Path) -> None:
    """A group without attributes, if it is not there already; durable even if another process made it a moment ago."""
    make_folder(folder)
    sync_folder(folder.parent)
    if not (folder / METADATA_FILE).exists():
        put_if_absent(folder / METADATA_FILE, dump(group_document({})))


def _array_document(array: NDArray[Any]) -> dict[str, Any]:
    # A chunk has at least one row, even when the array has none.
    chunk_shape = [max(1, array.shape[0]), *array.shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
        "storage_transformers": [],
    }


def _chunk_path(dimensions: int) -> str:
    return "/".join(["c"] + ["0"] * dimensions)


def write_segment(folder: Path, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]) -> dict[str, str]:
    """Write one group of arrays, all of it durable on return; gives the checksum of each file, by its path in the folder.

    Raises:
        OSError: the operating system refused; what was written so far is left for the caller to remove.
    """
    make_folder(folder)
    metadata = dump(group_document(attributes))
    write_file(folder / METADATA_FILE, metadata)
    checksums = {METADATA_FILE: checksum(metadata)}
    for name, array in arrays.items():
        checksums |= _write_array(folder, name, array)
    sync_folder(folder)
    return checksums


def _write_array(folder: Path, name: str, array: NDArray[Any]) -> dict[str, str]:
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
    metadata, chunk = dump(_array_document(array)), _chunk_path(array.ndim)
    path = folder / name / chunk
    path.parent.mkdir(parents=True)
    write_file(folder / name / METADATA_FILE, metadata)
    write_file(path, data)
    for parent in path.relative_to(folder).parents[:-1]:
        sync_folder(folder / parent)
    return {f"{name}/{METADATA_FILE}": checksum(metadata), f"{name}/{chunk}": blake2b(data, digest_size=16).hexdigest()}


def _map_file(path: Path, dtype: str, size: int) -> NDArray[Any]:
    # As a plain array: slicing the subclass costs more than the read.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(size,)))


def bounded_maps() -> MapFile:
    """A function that maps a file, and keeps the latest maps open."""
    return lru_cache(maxsize=_OPEN_MAPS)(_map_file)


@final
class Segment:
    """Reads one committed segment; each array is checked against its checksums the first time it is touched.

    Args:
        folder: of the group.   checksums: what `write_segment` gave, from the commit record.
        owner: how messages name the store.   map_file: see `bounded_maps`.
    """

    def __init__(self, folder: Path, checksums: Mapping[str, str], owner: str, map_file: MapFile) -> None:
        """Nothing is read yet."""
        self._folder = folder
        self._checksums = checksums
        self._owner = owner
        self._map_file = map_file
        self._layouts: dict[str, tuple[Path, str, tuple[int, ...]]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the segment has this array."""
        return f"{name}/{METADATA_FILE}" in self._checksums

    def load(self, name: str) -> NDArray[Any]:
        """A whole array, in memory: for the small ones."""
        path, dtype, shape = self._layout(name)
        return np.fromfile(path, dtype).reshape(shape)

    def view(self, name: str, start: int, end: int) -> NDArray[Any]:
        """A slice of a one-dimensional array, straight from the page cache."""
        path, dtype, shape = self._layout(name)
        return self._map_file(path, dtype, shape[0])[start:end]

    def _layout(self, name: str) -> tuple[Path, str, tuple[int, ...]]:
        if name not in self._layouts:
            self._layouts[name] = self._verify(name)
        return self._layouts[name]

    def _verify(self, name: str) -> tuple[Path, str, tuple[int, ...]]:
        files = [file for file in self._checksums if file.startswith(f"{name}/")]
        for file in [METADATA_FILE, *files]:
            self._verify_file(name, file)
        # Verified just now, so it is what `_array_document` said.
        document = json.loads((self._folder / name / METADATA_FILE).read_bytes())
        dtype = np.dtype(document["data_type"]).newbyteorder("<").str
        shape = tuple(document["shape"])
        return self._folder / name / _chunk_path(len(shape)), dtype, shape

    def _verify_file(self, name: str, file: str) -> None:
        try:
            with (self._folder / file).open("rb") as stream:
                # file_digest reads in blocks: a segment may be larger than memory.
                found = file_digest(stream, lambda: blake2b(digest_size=16)).hexdigest()
        except FileNotFoundError:
            found = "no file"
        if found != self._checksums.get(file):
            raise CorruptStoreError(
                f"{self._owner}: segment {self._folder.name}, array {name!r}: the checksum of {file} is {found}, "
                f"expected {self._checksums.get(file)}; restore the file from a backup, or write the store again."
            )
