"""Raw Zarr v3 groups and arrays, written by hand: one chunk per array, so that a part of an array is a range of a file.

Any Zarr v3 reader reads them; lopd itself needs no zarr.  A segment is one group: written once, never changed.  The commit record that
names it has type, shape and checksum of each array, so reading one fetches no metadata.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.backends.files import Bytes, Piece
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root, RootFile
from lopd.backends.sealing import checksum, dump
from lopd.errors import StoreNotFoundError
from lopd.records.checks import check_number
from lopd.records.manifest import STORE_VERSION, Manifest
from lopd.records.optional import need
from lopd.records.stored import Count, parse, read_as

METADATA_FILE = "zarr.json"
RAW = "raw"
_MANIFEST, _STORAGE, _CHECKSUM, _CREATION = "lopd", "lopd_storage", "lopd_checksum", "lopd_creation"
_ABOUT = (
    "Groups under segments/ hold rollouts, those under scores/<column>/ scores.  A group whose name is in the attribute `lopd_replaces` of another "
    "is no longer live; commits/*.json name those that are."
)


class _Storage(TypedDict):
    logprob_dtype: LogprobDtype
    chained: NotRequired[bool]


_Checksum = Annotated[str, re.compile("[0-9a-f]{32}")]


@frozen
class ArrayMeta:
    """One array of a segment, as its commit record describes it.

    Args:
        dtype: numpy name.
        shape: the array's shape.
        codec: "raw"; older stores may also have "zstd", which is only read.
        checksum: hash of the chunk file.
        metadata_checksum: hash of its `zarr.json`.
        stored_bytes: size of both files.
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

    @property
    def row_bytes(self) -> int:
        """Bytes of each place along its first dimension."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])

    def values(self, data: Piece) -> NDArray[Any]:
        """Return what a part of its chunk holds, along its first dimension."""
        return np.frombuffer(data, np.dtype(self.dtype).newbyteorder("<")).reshape(-1, *self.shape[1:])

    def is_chunk(self, data: Piece) -> bool:
        """Return whether these are the bytes of its chunk."""
        return checksum(data) == self.checksum

    def is_metadata(self, attributes: Mapping[str, Any], data: bytes) -> bool:
        """Return whether this is its `zarr.json`, as it was written with these attributes, or with others that were added."""
        return checksum(data) == self.metadata_checksum or has_content(_array_document(self.dtype, self.shape, attributes), data)


def chunk_path(folder: str, name: str, dimensions: int) -> str:
    """Return where the one chunk of an array is."""
    return f"{folder}/{name}/c{'.0' * dimensions}"


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _array_document(dtype: str, shape: Sequence[int], attributes: Mapping[str, Any]) -> dict[str, Any]:
    # A chunk has at least one row, even when the array has none.
    chunk_shape = [max(1, shape[0]), *shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        # A dot keeps the chunk in the array's own folder: half as many folders to flush.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": dict(attributes),
        "storage_transformers": [],
    }


def encode_array(folder: str, name: str, array: NDArray[Any], attributes: Mapping[str, Any]) -> tuple[dict[str, Bytes], ArrayMeta]:
    """Return the two files of one array, and how a commit record describes them."""
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    metadata = np.frombuffer(dump(_array_document(array.dtype.name, array.shape, attributes)), np.uint8)
    files = {f"{folder}/{name}/{METADATA_FILE}": metadata, chunk_path(folder, name, array.ndim): data}
    meta = ArrayMeta(array.dtype.name, array.shape, RAW, checksum(data.data), checksum(metadata.data), data.size + metadata.size)
    return files, meta


def decode_zstd(data: bytes | Bytes, size: int) -> Bytes:
    """Return the `size` bytes that were compressed; small input may claim to be terabytes, so no more of them are made.

    Raises:
        ValueError: the bytes are not what zstd made, or of another size.
    """
    zstandard = need("zstandard", "Codec zstd", "zarr")
    try:
        with zstandard.ZstdDecompressor().stream_reader(bytes(data)) as reader:
            found = np.frombuffer(reader.read(size + 1), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if found.size != size:
        raise ValueError(f"it holds {'more' if found.size > size else 'fewer'} bytes than {size}")
    return found


def _encode_root(root: Root) -> bytes:
    storage = {"logprob_dtype": root.logprob_dtype, "codec": RAW, "chained": root.chained}
    ours = {_MANIFEST: {**root.manifest.to_json(), "schema_version": STORE_VERSION}, _STORAGE: storage, _CREATION: root.creation}
    # The checksum is an attribute of its own because Zarr allows no other keys in a group.
    return dump(group_document({**ours, "lopd_about": _ABOUT, _CHECKSUM: checksum(dump(ours))}))


def _decode_root(url: str, data: bytes) -> Root | None:
    document, owner = parse(data, constants=True), f"Store {url}: {METADATA_FILE}"
    attributes = document["attributes"]
    if _MANIFEST not in attributes:
        raise StoreNotFoundError(f"Store {url}: it is a Zarr group without a lopd manifest, expected a store of lopd; check the path.")
    storage = read_as(_Storage, attributes[_STORAGE], owner)
    manifest, creation = Manifest.from_json(attributes[_MANIFEST], owner), read_as(_Checksum, attributes[_CREATION], owner)
    root = Root(manifest, storage["logprob_dtype"], creation, storage.get("chained", False))
    # attributes of the user's, and metadata that Zarr consolidates, may stand beside ours
    ours = {key: attributes[key] for key in (_MANIFEST, _STORAGE, _CREATION)}
    return root if checksum(dump(ours)) == attributes[_CHECKSUM] and same_node(document, group_document({})) else None


def same_node(document: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether the metadata of a group or array has this content, whatever attributes and consolidated metadata others have added.

    >>> same_node(group_document({"mine": 1, "theirs": 2}), group_document({"mine": 1}))
    True
    """
    added = {"attributes", "consolidated_metadata"}
    bare, ours = ({key: value for key, value in node.items() if key not in added} for node in (document, wanted))
    return bare == ours and wanted["attributes"].items() <= document["attributes"].items()


def has_content(wanted: Mapping[str, Any], data: bytes) -> bool:
    """Return whether these bytes are metadata that `same_node`."""
    try:
        return same_node(parse(data, constants=True), parse(dump(wanted)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


#: The metadata of a Zarr v3 group; its attributes state what the store is.
ROOT = RootFile(METADATA_FILE, _encode_root, _decode_root)
