"""The root group of a store of Zarr segments: its attributes say what the store is."""

import json
from collections.abc import Mapping
from typing import Any, final
from uuid import uuid4

from lopd.backends.root import Root
from lopd.backends.sealing import checksum, dump
from lopd.backends.zarr.format import METADATA_FILE, RAW, group_document
from lopd.errors import StoreNotFoundError
from lopd.records.manifest import Manifest

_MANIFEST, _STORAGE, _CHECKSUM, _CREATION = "lopd", "lopd_storage", "lopd_checksum", "lopd_creation"


@final
class ZarrRoot:
    """A `RootFile`: the metadata of a Zarr v3 group."""

    name = METADATA_FILE

    def encode(self, root: Root, /) -> bytes:
        """The file's bytes."""
        storage = {"logprob_dtype": root.logprob_dtype, "codec": RAW}
        return _document({_MANIFEST: root.manifest.to_json(), _STORAGE: storage, _CREATION: uuid4().hex})

    def decode(self, url: str, data: bytes, /) -> Root | None:
        """What the bytes say."""
        attributes = json.loads(data)["attributes"]
        if _MANIFEST not in attributes:
            raise StoreNotFoundError(f"Store {url}: it is a Zarr group without a lopd manifest, expected a store of lopd; check the path.")
        root = Root(Manifest.from_json(attributes[_MANIFEST]), attributes[_STORAGE]["logprob_dtype"])
        return root if data == _document({key: attributes[key] for key in (_MANIFEST, _STORAGE, _CREATION)}) else None


def _document(body: Mapping[str, Any]) -> bytes:
    # The checksum is an attribute of its own because Zarr allows no other keys in a group.
    return dump(group_document({**body, _CHECKSUM: checksum(dump(body))}))
