"""Files on any file system of fsspec that creates files exclusively: s3fs, gcsfs, adlfs and `memory://` do, and `prove` finds out."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, final

from lopd.backends.files.contract import PROBES, Bytes, StorageOptions, T, in_doubt
from lopd.errors import StorePathError, StoreReadError
from lopd.records.optional import need
from lopd.records.paths import asked, without_secrets
from lopd.records.waiting import QUIET_S, waiting


@final
class FsspecFiles:
    """`Files` on any file system of fsspec, `memory://` among them."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        # with the secrets that are in it
        self._given = url.rstrip("/")
        self.url = without_secrets(self._given)
        self.options = dict(options)
        core = need("fsspec.core", f"Store {self.url}", "zarr")
        try:
            self._fs, self._root = self._call(core.url_to_fs, self._given, **self.options)
        except OSError as error:
            # Some ask a server at once.
            kind = StoreReadError if isinstance(error.__cause__, OSError) else StorePathError
            raise kind(
                f"Store {self.url}: fsspec cannot open it ({error}), expected a URL it knows; check scheme, options and the storage."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return FsspecFiles, (self._given, self.options)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _call(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        with waiting(f"Store {self.url}: its storage has not answered for {QUIET_S:.0f} s; still waiting"):
            return asked(self._given, partial(work, *args, **options), secret=bool(self.options))

    def read(self, path: str, /) -> bytes:
        """Return a whole file."""
        return bytes(self._call(self._fs.cat_file, self._path(path)))

    def read_ranges(self, path: str, starts: Sequence[int], ends: Sequence[int], /) -> list[bytes]:
        """Return parts of one file."""
        if not starts:
            return []
        return list(self._call(self._fs.cat_ranges, [self._path(path)] * len(starts), list(starts), list(ends), on_error="raise"))

    def run(self, calls: Sequence[Callable[[], T]], /) -> list[T]:
        """Return what each call gives, one after the other: not every file system may be used from several threads."""
        return [call() for call in calls]

    def write(self, files: Mapping[str, Bytes], /) -> None:
        """Write new files."""
        for path, data in files.items():
            self._call(self._fs.pipe_file, self._path(path), data.tobytes())

    def put_if_absent(self, path: str, data: bytes, /) -> bool:
        """Return whether this call made the file; safe against other writers where the file system creates exclusively."""
        try:
            self._call(self._fs.pipe_file, self._path(path), data, mode="create")
        except OSError as error:
            try:  # an answer may be lost after the work is done
                return self.read(path) == data
            except FileNotFoundError:
                raise error from error.__cause__
            except OSError:
                raise in_doubt(self.url, path, error) from error
        return True

    def mark(self, folder: str, number: int, /) -> None:
        """Make an empty file of this number, and remove the one before it, if that is allowed."""
        self._call(self._fs.pipe_file, self._path(f"{folder}/{number:010d}"), b"")
        with suppress(OSError):
            self.remove([f"{folder}/{number - 1:010d}"] if number else [])

    def settle(self, folder: str, /) -> None:
        """Do nothing: a file counts when it is closed."""

    def names(self, folder: str, /) -> list[str]:
        """Return sorted names of what is in a folder."""
        try:
            listed = self._call(self._fs.ls, self._path(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed} - {PROBES})

    def age(self, folder: str, /) -> float:
        """Return seconds since the newest file in a folder was written; 0 where the file system does not report it."""
        return float(time.time() - self._call(self._newest, self._path(folder)))

    def _newest(self, path: str) -> float:
        try:
            return float(max(self._fs.modified(file).timestamp() for file in self._fs.find(path)))
        except (NotImplementedError, ValueError):
            return time.time()

    def remove(self, paths: Iterable[str], /) -> None:
        """Remove files, and folders with all that is in them."""
        for path in paths:
            if self._call(self._fs.exists, self._path(path)):
                self._call(self._fs.rm, self._path(path), recursive=True)
