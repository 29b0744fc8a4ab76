"""Small files that appear whole or not at all, and the numbered log that says which segments exist.

A record is written under a temporary name, flushed to disk, and linked to its final name, which fails if somebody else took it.  So two
writers never overwrite one another, a reader never sees half a record, and what a record names was on disk before it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, final
from uuid import uuid4

from lopd.errors import CorruptStoreError, StoreWriteError

#: Leftovers of a killed writer start with this; nothing ever reads them.
TEMPORARY_PREFIX = ".tmp-"


def checksum(data: bytes) -> str:
    """What a byte string is recognised by."""
    return blake2b(data, digest_size=16).hexdigest()


def dump(document: Mapping[str, Any]) -> bytes:
    """JSON with no spare byte, so that any flipped bit breaks it or changes what it says."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """The document as JSON, with a checksum of itself."""
    body = dict(document)
    return dump({**body, "checksum": checksum(dump(body))})


def unseal(data: bytes) -> dict[str, Any] | None:
    """The inverse of `seal`; None if a single bit differs from what `seal` gave."""
    try:
        sealed = json.loads(data)
        body = {key: value for key, value in sealed.items() if key != "checksum"}
    except (ValueError, AttributeError):
        return None
    return body if seal(body) == data else None


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """A folder and its parents, durable."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def write_file(path: Path, data: Any) -> None:
    """A new file with these bytes, flushed to disk; its folder entry is not (see `sync_folder`)."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def put_if_absent(path: Path, data: bytes) -> bool:
    """Whether this call made the file; its folder must be there.

    Raises:
        OSError: the file was not made.
        StoreWriteError: the file was made, but may not survive a power cut.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
    try:
        write_file(temporary, data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink()
    _settle(path.parent)
    return True


def _settle(folder: Path) -> None:
    try:
        sync_folder(folder)
    except OSError as error:
        raise StoreWriteError(
            f"Folder {folder}: flushing it failed with {error}, expected its newest file to be durable; "
            "the file may not survive a power cut, so check the disk and repeat the call, which is safe."
        ) from error


@final
class CommitLog:
    """The records `0000000000.json`, `0000000001.json`, ... of one store, each with a checksum of itself.

    Args:
        folder: where they are; made by the first commit.   owner: how messages name the store.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        """Nothing is read yet."""
        self._folder = folder
        self._owner = owner

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:010d}.json"

    def commit(self, number: int, record: Mapping[str, Any]) -> bool:
        """Whether this record took this number; False if somebody else did."""
        make_folder(self._folder)
        # Another process may have made it a moment ago, and not have flushed that yet.
        sync_folder(self._folder.parent)
        return put_if_absent(self._path(number), seal(record))

    def make_durable(self) -> None:
        """Flush records that other processes may have made and not flushed yet.

        Raises:
            StoreWriteError: that failed; the records are there, but may not survive a power cut.
        """
        if self._folder.is_dir():
            _settle(self._folder)

    def records(self, start: int) -> Iterator[dict[str, Any]]:
        """The records from this number on, without a gap.

        Raises:
            CorruptStoreError: a record is damaged, or one is missing before others.
        """
        while (data := self._load(start)) is not None:
            yield self._check(start, data)
            start += 1

    def _load(self, number: int) -> bytes | None:
        with suppress(FileNotFoundError):
            return self._path(number).read_bytes()
        later = [name for name in self._names() if name > self._path(number).name]
        # Numbers are taken in order, so a later one means that this one is there by now, or was lost.
        if not later:
            return None
        with suppress(FileNotFoundError):
            return self._path(number).read_bytes()
        raise CorruptStoreError(
            f"{self._owner}: commit record {self._path(number).name} is missing, expected it before {min(later)}; restore it from a backup."
        )

    def _names(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [path.name for path in self._folder.iterdir() if path.suffix == ".json" and path.stem.isdigit()]
        return []

    def _check(self, number: int, data: bytes) -> dict[str, Any]:
        record = unseal(data)
        if record is None:
            raise CorruptStoreError(
                f"{self._owner}: commit record {self._path(number).name} is damaged, expected bytes that match its checksum; "
                "restore it from a backup."
            )
        return record
