"""Raw Zarr v3 groups and arrays, written by hand: one chunk per array, so that a part of an array is a range of a file.

Any Zarr v3 reader reads them; lopd itself needs no zarr.  A segment is one group: written once, never changed.  The commit record that
names it says type, shape and checksum of each array, so reading one fetches no metadata.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any
from uuid import uuid4

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray

from lopd.backends.files import Bytes
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root, RootFile
from lopd.backends.sealing import checksum, dump
from lopd.errors import StoreNotFoundError
from lopd.records.checks import check_number
from lopd.records.manifest import Manifest
from lopd.records.optional import need
from lopd.records.stored import Count, parse, read_as

METADATA_FILE = "zarr.json"
RAW = "raw"
_MANIFEST, _STORAGE, _CHECKSUM, _CREATION = "lopd", "lopd_storage", "lopd_checksum", "lopd_creation"

_Checksum = Annotated[str, re.compile("[0-9a-f]{32}")]


@frozen
class ArrayMeta:
    """One array of a segment, as its commit record describes it.

    Args:
        dtype: numpy name.
        shape: of the array.
        codec: "raw"; older stores may also have "zstd", which is only read.
        checksum: of the chunk file.
        metadata_checksum: of its `zarr.json`.
        stored_bytes: of both files.
    """

    dtype: Annotated[str, re.compile("uint8|uint16|uint32|int32|int64|float16|float32")]
    shape: tuple[Count, ...]
    codec: Annotated[str, re.compile("raw|zstd")]
    checksum: _Checksum
    metadata_checksum: _Checksum
    stored_bytes: Count

    def __attrs_post_init__(self) -> None:
        dimensions = len(self.shape)
        check_number("Array", "number of dimensions", dimensions, dimensions in (1, 2), "1 or 2")
        # sizes in bytes are computed with 64 bits
        check_number("Array", "shape", self.shape, math.prod(self.shape) < 1 << 50, "fewer than 2**50 values")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return {**asdict(self), "shape": list(self.shape)}


def chunk_path(folder: str, name: str, dimensions: int) -> str:
    """Where the one chunk of an array is."""
    return f"{folder}/{name}/{'.'.join(['c'] + ['0'] * dimensions)}"


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What `zarr.json` of a group says."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _array_document(array: NDArray[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    # A chunk has at least one row, even when the array has none.
    chunk_shape = [max(1, array.shape[0]), *array.shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        # A dot keeps the chunk in the array's own folder: half as many folders to flush.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": dict(attributes),
        "storage_transformers": [],
    }


def encode_array(folder: str, name: str, array: NDArray[Any], attributes: Mapping[str, Any]) -> tuple[dict[str, Bytes], ArrayMeta]:
    """The two files of one array, and how a commit record describes them."""
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    metadata = np.frombuffer(dump(_array_document(array, attributes)), np.uint8)
    files = {f"{folder}/{name}/{METADATA_FILE}": metadata, chunk_path(folder, name, array.ndim): data}
    meta = ArrayMeta(array.dtype.name, array.shape, RAW, checksum(data.data), checksum(metadata.data), data.size + metadata.size)
    return files, meta


def decode_zstd(data: bytes | Bytes, size: int) -> Bytes:
    """The `size` bytes that were compressed; small input may claim to be terabytes.

    Raises:
        ValueError: the bytes are not what zstd made, or of another size.
    """
    zstandard = need("zstandard", "Codec zstd", "zarr")
    try:
        claimed = zstandard.frame_content_size(bytes(data))
        # it is -1 where the frame does not say; only then does the limit count
        if claimed not in (-1, size):
            raise ValueError(f"it has {claimed} bytes of {size}")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(bytes(data), max_output_size=max(size, 1)), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _encode_root(root: Root) -> bytes:
    storage = {"logprob_dtype": root.logprob_dtype, "codec": RAW}
    return _root_document({_MANIFEST: root.manifest.to_json(), _STORAGE: storage, _CREATION: uuid4().hex})


def _decode_root(url: str, data: bytes) -> Root | None:
    attributes, owner = parse(data)["attributes"], f"Store {url}: {METADATA_FILE}"
    if _MANIFEST not in attributes:
        raise StoreNotFoundError(f"Store {url}: it is a Zarr group without a lopd manifest, expected a store of lopd; check the path.")
    dtype = read_as(LogprobDtype, attributes[_STORAGE]["logprob_dtype"], owner)
    root = Root(Manifest.from_json(attributes[_MANIFEST], owner), dtype)
    return root if data == _root_document({key: attributes[key] for key in (_MANIFEST, _STORAGE, _CREATION)}) else None


def _root_document(body: Mapping[str, Any]) -> bytes:
    # The checksum is an attribute of its own because Zarr allows no other keys in a group.
    return dump(group_document({**body, _CHECKSUM: checksum(dump(body))}))


#: The metadata of a Zarr v3 group; its attributes say what the store is.
ROOT = RootFile(METADATA_FILE, _encode_root, _decode_root)
