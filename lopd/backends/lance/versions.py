"""The manifests of a table, a file for each version: which versions are there, and whether one is what it was when it was looked at."""

import re

from lopd.backends.files import Files, reading
from lopd.backends.sealing import checksum
from lopd.errors import CorruptStoreError

TABLE_SUFFIX = ".lance"
# Names of manifests count down, so that the newest is listed first.  Others beside them are Lance's detached commits, or a file manager's.
_LAST, _MANIFEST = (1 << 64) - 1, re.compile(r"([0-9]{20})\.manifest")


def versions_of(files: Files, table: str) -> set[int]:
    """Return the versions of a table that were not removed."""
    names = files.names(f"{table}{TABLE_SUFFIX}/_versions")
    return {_LAST - int(found[1]) for found in map(_MANIFEST.fullmatch, names) if found}


def identity(files: Files, table: str, version: int) -> str:
    """Return what no other version of this number has; "" for one that was removed.

    Raises:
        StoreReadError: the storage refused.
    """
    with reading(f"Store {files.url}", f"reading a version of table {table!r}"):
        try:
            return checksum(files.read(f"{table}{TABLE_SUFFIX}/_versions/{_LAST - version:020d}.manifest"))
        except FileNotFoundError:
            return ""


def check_version(files: Files, table: str, version: int, known: str) -> bool:
    """Return whether a version is still there; refuse another one of its number.  One whose identity is not known counts as there.

    Raises:
        CorruptStoreError: the store was put back to an older state, and gone on with.
        StoreReadError: the storage refused.
    """
    found = known and identity(files, table, version)
    if found not in ("", known):
        raise put_back(files, table, version)
    return found == known


def put_back(files: Files, table: str, version: int) -> CorruptStoreError:
    """Return the error for a version that is another one by now, or gone though none followed."""
    return CorruptStoreError(
        f"Store {files.url}: version {version} of table {table!r} is not what it was when it was read; the store was removed, or put back to an "
        "older state, so open it again, or restore it from a backup."
    )
