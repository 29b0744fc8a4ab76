"""Files on any file system of fsspec.

Where a file system cannot create a file exclusively (s3fs and gcsfs can), a store on it needs one writer at a time.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

from lopd.backends.files.contract import Bytes, Piece, StorageOptions, T, was_put
from lopd.errors import StorePathError
from lopd.records.optional import need
from lopd.records.paths import said_of, without_secrets
from lopd.records.waiting import QUIET_S, waiting


@final
class FsspecFiles:
    """`Files` on any file system of fsspec, `memory://` among them."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        """No request is made yet."""
        self._url = url.rstrip("/")
        self._shown = without_secrets(self._url)
        self._options = dict(options)
        core = need("fsspec.core", f"Store {self._shown}", "zarr")
        try:
            self._fs, self._root = core.url_to_fs(self._url, **self._options)
        except (ValueError, ImportError, TypeError) as error:
            raise StorePathError(
                f"Store {self._shown}: fsspec cannot open it ({type(error).__name__}), expected a URL it knows; check scheme and options."
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """URL and options."""
        return FsspecFiles, (self._url, self._options)

    @property
    def url(self) -> str:
        """The root, without options and passwords."""
        return self._shown

    @property
    def options(self) -> StorageOptions:
        """As they were given."""
        return self._options

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _call(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """What a file system answers; its packages raise errors of their own, and some show the whole URL."""
        try:
            with waiting(f"Store {self._shown}: its storage has not answered for {QUIET_S:.0f} s; still waiting"):
                return work(*args, **options)
        except (FileNotFoundError, FileExistsError, NotADirectoryError, NotImplementedError, ValueError):
            raise
        except Exception as error:
            said = "" if self._options else said_of(self._url, error)
            raise OSError(f"{type(error).__name__}: {said}".split("\n", 1)[0][:300]) from error

    def read(self, path: str, /) -> bytes:
        """A whole file."""
        return bytes(self._call(self._fs.cat_file, self._path(path)))

    def read_ranges(self, path: str, starts: Sequence[int], ends: Sequence[int], /) -> list[Piece]:
        """Parts of one file."""
        if not starts:
            return []
        return list(self._call(self._fs.cat_ranges, [self._path(path)] * len(starts), list(starts), list(ends), on_error="raise"))

    def run(self, calls: Sequence[Callable[[], T]], /) -> list[T]:
        """What each call gives, one after the other: not every file system may be used from several threads."""
        return [call() for call in calls]

    def write(self, files: Mapping[str, Bytes], /) -> None:
        """New files."""
        for path, data in files.items():
            self._call(self._fs.pipe_file, self._path(path), data.tobytes())

    def put_if_absent(self, path: str, data: bytes, /) -> bool:
        """Whether this call made the file; safe against other writers where the file system creates exclusively (s3fs and gcsfs do)."""
        try:
            self._call(self._fs.pipe_file, self._path(path), data, mode="create")
        except OSError as error:
            return was_put(self, path, data, error)
        return True

    def mark(self, folder: str, number: int, /) -> None:
        """Make an empty file of this number, and remove the one before it."""
        self._call(self._fs.pipe_file, self._path(f"{folder}/{number:010d}"), b"")
        self.remove([f"{folder}/{number - 1:010d}"] if number else [])

    def settle(self, folder: str, /) -> None:
        """Nothing to do: a file counts when it is closed."""

    def names(self, folder: str, /) -> list[str]:
        """Sorted names of what is in a folder."""
        try:
            listed = self._call(self._fs.ls, self._path(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed)

    def age(self, folder: str, /) -> float:
        """Seconds since the newest file in a folder was written; 0 where the file system does not say."""
        try:
            newest = max(self._call(self._fs.modified, path).timestamp() for path in self._call(self._fs.find, self._path(folder)))
        except (NotImplementedError, ValueError):
            return 0.0
        return float(time.time() - newest)

    def remove(self, paths: Iterable[str], /) -> None:
        """Remove files, and folders with all that is in them."""
        for path in paths:
            if self._call(self._fs.exists, self._path(path)):
                self._call(self._fs.rm, self._path(path), recursive=True)
