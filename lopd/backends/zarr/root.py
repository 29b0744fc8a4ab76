"""The root of a store: is its place free, and what does it say of itself."""

import json
from typing import Any, get_args
from uuid import uuid4

from attrs import asdict, frozen

from lopd.backends.files import Files, names_in
from lopd.backends.ragged import LogprobDtype, check_manifest
from lopd.backends.sealing import checksum, dump
from lopd.backends.zarr.format import METADATA_FILE, RAW, group_document
from lopd.errors import CorruptStoreError, InvalidRecordError, StoreExistsError, StoreNotFoundError, StoreReadError, StoreWriteError
from lopd.records.manifest import Manifest

_MANIFEST, _STORAGE, _CHECKSUM, _CREATION = "lopd", "lopd_storage", "lopd_checksum", "lopd_creation"


@frozen
class StorageTypes:
    """How a store keeps its arrays.

    Args:
        logprob_dtype: float16 halves a log-prob and rounds it (a relative error of 2**-11; each commit says its largest error in nats).
        codec: "raw"; older stores may also say "zstd", which is only read.
    """

    logprob_dtype: LogprobDtype = "float32"
    codec: str = RAW

    def __attrs_post_init__(self) -> None:
        if self.logprob_dtype not in get_args(LogprobDtype):
            raise InvalidRecordError(
                f"Store: logprob_dtype is {self.logprob_dtype!r}, expected one of {', '.join(get_args(LogprobDtype))}; pass one of them."
            )


def taken(files: Files) -> StoreExistsError:
    """The error for a place that is not free."""
    what = "a store" if METADATA_FILE in names_in(files) else "something that is no store"
    return StoreExistsError(f"Store {files.url}: {what} is there, expected an empty folder or nothing; open it, or choose another path.")


def _document(manifest: Any, storage: Any, creation: str) -> bytes:
    # The checksum is an attribute of its own because Zarr allows no other keys in a group.
    body = {_MANIFEST: manifest, _STORAGE: storage, _CREATION: creation}
    return dump(group_document({**body, _CHECKSUM: checksum(dump(body))}))


def create_root(files: Files, manifest: Manifest, storage: StorageTypes) -> None:
    """Make an empty store; of several creators, one wins.

    Raises:
        InvalidRecordError: the manifest is none.
        StoreExistsError: a store, or anything else, is there.
        StoreWriteError: the storage refused.
    """
    check_manifest(f"Store {files.url}", manifest)
    try:
        free = not names_in(files) and files.put_if_absent(METADATA_FILE, _document(manifest.to_json(), asdict(storage), uuid4().hex))
    except StoreWriteError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"Store {files.url}: creating it failed with {error}, expected a place that can be written to; nothing was created, "
            "so check the path, its permissions and the free space."
        ) from error
    if not free:
        raise taken(files)


def read_root(files: Files) -> tuple[Manifest, StorageTypes]:
    """What the store in this place says of itself.

    Raises:
        StoreNotFoundError: no store is there.
        StoreReadError: the storage refused.
        CorruptStoreError: the manifest is damaged, or of another schema version.
    """
    try:
        data = files.read(METADATA_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "holds something that is no store" if names_in(files) else "is not there"
        raise StoreNotFoundError(f"Store {files.url}: the folder {what}, expected a store; check the path, or create one there.") from error
    except OSError as error:
        raise StoreReadError(
            f"Store {files.url}: opening it failed with {error}, expected the storage to answer; check it and try again."
        ) from error
    try:
        attributes = json.loads(data)["attributes"]
        if _MANIFEST not in attributes:
            raise StoreNotFoundError(
                f"Store {files.url}: it is a Zarr group without a lopd manifest, expected a store of lopd; check the path."
            )
        manifest, storage = Manifest.from_json(attributes[_MANIFEST]), StorageTypes(**attributes[_STORAGE])
        intact = data == _document(*(attributes[key] for key in (_MANIFEST, _STORAGE, _CREATION)))
    except CorruptStoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(files) from error
    if not intact:
        raise _damaged(files)
    return manifest, storage


def _damaged(files: Files) -> CorruptStoreError:
    return CorruptStoreError(
        f"Store {files.url}: {METADATA_FILE} is damaged, expected a Zarr v3 group with a manifest of lopd; restore the file from a backup."
    )
