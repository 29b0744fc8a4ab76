"""Files on a local disk: flushed before they count, linked into place whole, read through memory maps."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, final
from uuid import uuid4

import numpy as np

from lopd.backends.files.contract import Bytes, StorageOptions, T
from lopd.errors import StoreWriteError
from lopd.records.flush import flush

#: Leftovers of a killed writer start with this; nothing ever reads them.
TEMPORARY_PREFIX = ".tmp-"

# Every map holds a file descriptor; a store of many small appends would run out of them without a bound.
_OPEN_MAPS = 384


@final
class LocalFiles:
    """`Files` in a folder; kill -9 and a power cut leave whole files or none."""

    def __init__(self, root: Path) -> None:
        """Nothing is made yet.  A relative path would change its meaning with the working directory."""
        self.root = root.absolute()
        self.map = lru_cache(maxsize=_OPEN_MAPS)(self._map)
        # Folders of single files whose own entry this object has flushed: nothing ever removes them.
        self._durable: set[Path] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """The path: memory maps do not travel to another process."""
        return LocalFiles, (self.root,)

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    @property
    def options(self) -> StorageOptions:
        """None."""
        return {}

    def read(self, path: str, /) -> bytes:
        """A whole file."""
        return (self.root / path).read_bytes()

    def read_ranges(self, path: str, starts: Sequence[int], ends: Sequence[int], /) -> list[Bytes]:
        """Parts of one file, straight from the page cache."""
        mapped = self.map(path)
        return [mapped[start:end] for start, end in zip(starts, ends, strict=True)]

    def run(self, calls: Sequence[Callable[[], T]], /) -> list[T]:
        """What each call gives, one after the other."""
        return [call() for call in calls]

    def _map(self, path: str, /) -> Bytes:
        if (self.root / path).stat().st_size == 0:
            return np.zeros(0, np.uint8)
        # As a plain array: slicing the subclass costs more than the read.
        return np.asarray(np.memmap(self.root / path, np.uint8, mode="r"))

    def write(self, files: Mapping[str, Bytes], /) -> None:
        """New files, flushed to disk together with the folders that lead to them."""
        folders = {(self.root / path).parent for path in files}
        made = [folder for parent in folders for folder in _make_folder(parent)]
        for path, data in files.items():
            _write_file(self.root / path, data)
        for folder in {*folders, *made}:
            flush(folder)

    def put_if_absent(self, path: str, data: bytes, /) -> bool:
        """Whether this call made the file: written under a temporary name, flushed, and linked to its own, which fails if that is taken."""
        final = self.root / path
        if final.parent not in self._durable or not final.parent.is_dir():
            for folder in _make_folder(final.parent):
                flush(folder)
            self._durable.add(final.parent)
        temporary = final.parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        try:
            _write_file(temporary, data)
            if not _link(temporary, final):
                return False
        finally:
            with suppress(OSError):
                temporary.unlink()
        self.settle(str(final.parent.relative_to(self.root)))
        return True

    def mark(self, folder: str, number: int, /) -> None:
        """Make an empty file of this number, and remove the one before it; neither is flushed."""
        path = self.root / folder / f"{number:010d}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        if number:
            path.with_name(f"{number - 1:010d}").unlink(missing_ok=True)

    def settle(self, folder: str, /) -> None:
        """Flush a folder, and its entry in the one that it stands in, unless this object has done so before."""
        if not (self.root / folder).is_dir():
            return
        try:
            flush(self.root / folder)
            if self.root / folder not in self._durable:
                flush((self.root / folder).parent)
                self._durable.add(self.root / folder)
        except OSError as error:
            raise StoreWriteError(
                f"Folder {self.root / folder}: flushing it failed with {error}, expected its newest file to be durable; "
                "the file may not survive a power cut, so check the disk and repeat the call, which is safe."
            ) from error

    def names(self, folder: str, /) -> list[str]:
        """Sorted names of what is in a folder."""
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith(TEMPORARY_PREFIX))  # noqa: PTH208 (names)
        return []

    def age(self, folder: str, /) -> float:
        """Seconds since the newest file in a folder was written."""
        files = [self.root / folder, *(self.root / folder).rglob("*")]
        return time.time() - max(path.stat().st_mtime for path in files)

    def remove(self, paths: Iterable[str], /) -> None:
        """Remove files, and folders with all that is in them; neither links nor what they lead to."""
        root = self.root.resolve()
        for path in paths:
            whole = root / path
            if whole.resolve() != whole:
                continue
            if whole.is_dir():
                shutil.rmtree(whole, ignore_errors=True)
            else:
                whole.unlink(missing_ok=True)


def _write_file(path: Path, data: Any) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(file: Path, name: Path) -> bool:
    """Give a file another name; False if that is taken.  A file server may answer with an error after it has done so."""
    try:
        os.link(file, name)
    except OSError as error:
        if file.stat().st_nlink > 1:
            return True
        if not isinstance(error, FileExistsError):
            raise
        return False
    return True


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; gives those whose entries changed by it, to be flushed.

    Also when another process made one a moment ago, which it may not have flushed yet, the parent of `folder` is among them.
    """
    changed = [folder.parent]
    if not folder.is_dir():
        changed += _make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
    return changed
