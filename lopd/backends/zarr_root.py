"""The folder of a store: is it local, is it free, and what does its manifest say."""

import json
import os
from pathlib import Path
from typing import Any

from lopd.backends.commit_log import TEMPORARY_PREFIX, checksum, dump, make_folder, put_if_absent
from lopd.backends.zarr_segment import METADATA_FILE, group_document
from lopd.errors import CorruptStoreError, StoreExistsError, StoreNotFoundError, StorePathError, StoreWriteError
from lopd.manifest import Manifest

_ATTRIBUTE = "lopd"
StorePath = str | os.PathLike[str]


def local_path(path: StorePath) -> Path:
    """The path, if it can be one on a local disk.

    Raises:
        StorePathError: it is a URL.
    """
    text = os.fspath(path)
    if "://" in text:
        raise StorePathError(
            f"Store {text}: the path is a URL, expected a folder on a local disk; "
            "keep the store on one, because ZarrStore cannot live in the cloud yet."
        )
    return Path(text)


def taken(root: Path) -> StoreExistsError:
    """The error for a folder that is not free."""
    what = "a store" if (root / METADATA_FILE).exists() else "something that is no store"
    return StoreExistsError(f"Store {root}: {what} is there, expected an empty folder or nothing; open it, or choose another path.")


def _is_free(root: Path) -> bool:
    # What a creator that was killed leaves behind does not count.
    return not root.exists() or (root.is_dir() and all(path.name.startswith(TEMPORARY_PREFIX) for path in root.iterdir()))


def _document(manifest: Any) -> bytes:
    # The checksum is an attribute of its own because Zarr allows no other keys in a group.
    return dump(group_document({_ATTRIBUTE: manifest, "lopd_checksum": checksum(dump(manifest))}))


def create_root(root: Path, manifest: Manifest) -> None:
    """Make the folder of an empty store; of several creators, one wins.

    Raises:
        StoreExistsError: a store, or anything else, is there.
        StoreWriteError: the operating system refused.
    """
    try:
        free = _is_free(root)
        if free:
            make_folder(root.absolute())
            free = put_if_absent(root / METADATA_FILE, _document(manifest.to_json()))
    except StoreWriteError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"Store {root}: creating it failed with {error}, expected a folder that can be written to; nothing was created, "
            "so check the path, its permissions and the free space."
        ) from error
    if not free:
        raise taken(root)


def read_manifest(root: Path) -> Manifest:
    """What the store in this folder says of itself.

    Raises:
        StoreNotFoundError: no store is there.
        CorruptStoreError: the manifest is damaged, or of another schema version.
    """
    try:
        data = (root / METADATA_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "holds something that is no store" if root.exists() else "is not there"
        raise StoreNotFoundError(f"Store {root}: the folder {what}, expected a store; check the path, or create one there.") from error
    try:
        attributes = json.loads(data)["attributes"]
        manifest = Manifest.from_json(attributes[_ATTRIBUTE]) if _ATTRIBUTE in attributes else None
    except CorruptStoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(root) from error
    if manifest is None:
        raise StoreNotFoundError(f"Store {root}: it is a Zarr group without a lopd manifest, expected a store of lopd; check the path.")
    if data != _document(attributes[_ATTRIBUTE]):
        raise _damaged(root)
    return manifest


def _damaged(root: Path) -> CorruptStoreError:
    return CorruptStoreError(
        f"Store {root}: {METADATA_FILE} is damaged, expected a Zarr v3 group with a manifest of lopd; restore the file from a backup."
    )
