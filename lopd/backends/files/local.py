"""Files on a local disk: flushed before they count, linked into place whole, read by position.

They are not mapped: a mapped file that is cut under a reader, or whose disk fails, ends the process; a read gives fewer bytes, or an error.
"""

import errno
import os
import re
import resource
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import repeat
from operator import sub
from pathlib import Path
from typing import Any, final
from uuid import uuid4
from weakref import finalize

from lopd.backends.files.contract import Bytes, Piece, StorageOptions, T, in_doubt, local_folder, read_spans
from lopd.errors import StorePathError, StoreWriteError
from lopd.records.flush import flush
from lopd.records.paths import is_there, open_regular
from lopd.records.unfinished import idle

#: Leftovers of a killed writer start with this; nothing ever reads them.
TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{32}}")

# Opening a file costs more than reading some rows of it; the rest of the process opens files as well.
_OPEN_FILES = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 512)
# Reading so many bytes along costs less than another read; to look for them does not, where parts are few, or larger than this on average.
_GAP, _FEW, _SMALL = 4096, 64, 1024
# One call of Linux reads so many bytes at most; one of macOS refuses to read 2 GiB.
_MOST = (1 << 31) - 4096
# No put takes so many seconds.
_DAY = 24 * 3600.0
# What an attempt to link ends in where there are no links; the file is new, so it belongs to this process, and has one name.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@final
class _Open:
    """A file that is open for reading as long as it is used."""

    def __init__(self, path: Path) -> None:
        file = open_regular(path)
        finalize(self, file.close)
        self._descriptor = file.fileno()
        self.size = os.fstat(self._descriptor).st_size

    def read(self, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Return the bytes from places up to others, or fewer at the end of the file."""
        if max(ends, default=0) > self.size:  # a read takes memory for all that is asked for, whatever is there
            starts, ends = [min(start, self.size) for start in starts], [min(end, self.size) for end in ends]
        sizes = list(map(sub, ends, starts))
        asked = sizes if max(sizes, default=0) <= _MOST else [min(size, _MOST) for size in sizes]
        found = list(map(os.pread, repeat(self._descriptor), asked, starts))
        for i in [i for i, size in enumerate(sizes) if len(found[i]) < size]:
            parts, place = [found[i]], starts[i] + len(found[i])
            while more := os.pread(self._descriptor, min(ends[i] - place, _MOST), place):
                parts.append(more)
                place += len(more)
            found[i] = b"".join(parts)
        return found


@final
class LocalFiles:
    """`Files` in a folder; kill -9 and a power cut leave whole files or none."""

    def __init__(self, root: Path) -> None:
        """Keep an absolute path, and make nothing yet.  A relative path would change its meaning with the working directory."""
        self.root = root.absolute()
        self.url = str(self.root)
        self.options: StorageOptions = {}
        self._open: OrderedDict[str, _Open] = OrderedDict()
        # Folders of single files whose own entry this object has flushed: nothing ever removes them.
        self._durable: set[Path] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the path: open files do not travel to another process."""
        return LocalFiles, (self.root,)

    def read(self, path: str, /) -> bytes:
        """Return a whole file."""
        whole = self.root / path
        try:
            file = _Open(whole)
        except FileNotFoundError:
            # a client of NFS that looked before it was there takes it for missing for up to a minute, until the folder is opened
            with suppress(PermissionError):  # it may be entered, and not listed
                os.close(os.open(whole.parent, os.O_RDONLY))
            file = _Open(whole)
        return file.read([0], [file.size])[0]

    def read_ranges(self, path: str, starts: Sequence[int], ends: Sequence[int], /) -> list[Piece]:
        """Return parts of one file, which stays open for the next time; views of one read where they are neighbours."""
        try:
            return self._parts(path, starts, ends)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            # on a file server, another machine has removed what is open here, or put another file in its place
            self._open.pop(path, None)
            return self._parts(path, starts, ends)

    def _parts(self, path: str, starts: Sequence[int], ends: Sequence[int]) -> list[Piece]:
        file = self._open.get(path) or self._opened(partial(_Open, self.root / path))
        with suppress(KeyError):  # a thread that reads ahead of training may have closed it since; it is open as long as it is read here
            self._open[path] = file
            self._open.move_to_end(path)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        if starts and starts[1:] == ends[:-1]:
            first, whole = starts[0], memoryview(file.read(starts[:1], ends[-1:])[0])
            return [whole[start - first : end - first] for start, end in zip(starts, ends, strict=True)]
        if len(starts) < _FEW or sum(ends) - sum(starts) > _SMALL * len(starts):
            return list(file.read(starts, ends))
        return list(read_spans(file.read, starts, ends, _GAP))

    def _opened(self, opening: Callable[[], T]) -> T:
        """Return what this opens; files that were kept open are closed where the process may not open another."""
        try:
            return opening()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            self._open.clear()
            return opening()

    def run(self, calls: Sequence[Callable[[], T]], /) -> list[T]:
        """Return what each call gives, one after the other."""
        return [call() for call in calls]

    def write(self, files: Mapping[str, Bytes], /) -> None:
        """Write new files, and flush them to disk with the folders that lead to them."""
        folders = {(self.root / path).parent for path in files}
        made = [folder for parent in folders for folder in _make_folder(parent)]
        with ExitStack() as opened:  # until they are flushed, so that no error of the disk is lost
            written = [self._write_file(opened, self.root / path, data) for path, data in files.items()]
            self._opened(partial(flush, *written, *{*folders, *made}))

    def _write_file(self, opened: ExitStack, path: Path, data: Any) -> int:
        file: Any = opened.enter_context(self._opened(partial(path.open, "xb", buffering=0)))
        left = memoryview(data).cast("B")
        while left:  # one call writes at most 2 GiB, and fewer on a disk that is full
            left = left[file.write(left) :]
        return int(file.fileno())

    def put_if_absent(self, path: str, data: bytes, /) -> bool:
        """Return whether this call made the file: written under a temporary name, flushed, and linked to its own, which fails if that is taken."""
        final = self.root / path
        if final.parent not in self._durable or not final.parent.is_dir():
            flush(*_make_folder(final.parent))
            self._durable.add(final.parent)
        temporary = final.parent / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        try:
            with ExitStack() as opened:
                flush(self._write_file(opened, temporary, data))
            if not _link(temporary, final):
                return False
        finally:
            with suppress(OSError):
                temporary.unlink()
        self.settle(str(final.parent.relative_to(self.root)))
        return True

    def mark(self, folder: str, number: int, /) -> None:
        """Make an empty file of this number, and remove the one before it, if that is allowed; only the first of a folder is flushed."""
        path = self.root / folder / f"{number:010d}"
        changed = [] if path.parent.is_dir() else [path.parent, path.parent.parent]
        path.parent.mkdir(exist_ok=True)
        path.touch()
        flush(*changed)
        with suppress(OSError):  # in a sticky folder it may be somebody else's
            path.with_name(f"{number - 1:010d}").unlink()

    def settle(self, folder: str, /) -> None:
        """Flush a folder, and its entry in the one that it stands in, unless this object has done so before."""
        path = self.root / folder
        try:
            if is_there(path):
                flush(path)
                if path not in self._durable:
                    flush(path.parent)
                    self._durable.add(path)
        except OSError as error:
            raise StoreWriteError(
                f"Folder {path}: flushing it failed with {error}, expected its newest file to be durable; "
                "the file may not survive a power cut, so check the disk and repeat the call, which is safe."
            ) from error

    def names(self, folder: str, /) -> list[str]:
        """Return sorted names of what is in a folder."""
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith(TEMPORARY_PREFIX))  # noqa: PTH208 (names)
        return []

    def age(self, folder: str, /) -> float:
        """Return seconds since the newest file in a folder was written; of a folder without any, since the folder was changed."""
        return idle(self.root / folder)

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


def remove_unfinished(url: str, older_than: float) -> None:
    """Remove temporary files of puts in a local store, if they are older than so many seconds and a day; a put at work would be a StoreWriteError."""
    root = local_folder(url)
    for folder, _, names in () if root is None else os.walk(root):
        for path in (Path(folder, name) for name in names if _TEMPORARY.fullmatch(name)):
            with suppress(OSError):  # another process has removed it since, or it is somebody else's
                if time.time() - path.lstat().st_mtime > max(older_than, _DAY):
                    path.unlink()


def _link(file: Path, name: Path) -> bool:
    """Give a new file another name; False if that is taken.  A file server may answer with an error after it has done so.

    Raises:
        StorePathError: this file system has no hard links.
        StoreWriteError: the file server does not answer whether it has done so.
    """
    try:
        os.link(file, name)
    except OSError as error:
        try:
            if file.stat().st_nlink > 1:
                return True
        except OSError:
            raise in_doubt(str(name.parent), name.name, error) from error
        if error.errno in _NO_LINKS:
            raise StorePathError(
                f"Folder {name.parent}: its file system has no hard links ({error.strerror}), by which one of several writers makes a file; "
                "use a local disk and copy the store afterwards, or the URL of the bucket if one is mounted there."
            ) from error
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
