"""Folders that what is written stands in until it is whole: each has one writer, however many write under one name, and goes with that writer.

A writer holds its folder locked, and the system takes the lock from one that is killed.  Other machines do not see the lock, and some disks cannot
lock.  There the age of a folder decides.
"""

import fcntl
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4
from zlib import crc32

from lopd.records.paths import is_there, listed, walked

# No writer of a folder pauses for so many seconds; those that are killed again and again, each under another host name, must not fill the disk.
_PAUSE = 3600.0


@contextmanager
def unfinished(place: Path) -> Iterator[Path]:
    """Yield a new folder of this writer alone, whose name begins with that of `place`; remove it at the end, and first what killed writers left.

    Raises:
        OSError: it cannot be made.
    """
    machine = f"{crc32(os.fsencode(platform.node())):08x}"
    _sweep(place, machine)
    with ExitStack() as opened:  # which is closed though an interrupt ends the removal
        made = _make_locked(place, machine, opened)
        opened.callback(shutil.rmtree, made, ignore_errors=True)
        yield made


@contextmanager
def set_aside(paths: Iterable[Path], place: Path) -> Iterator[None]:
    """Move these, which stand beside `place`, away for the block and remove them after it; where it fails, they are put back.

    Raises:
        OSError: one cannot be moved.
    """
    with unfinished(place) as aside:
        try:
            for path in paths:
                path.rename(aside / path.name)
            yield
        except BaseException:
            for entry in listed(aside):
                with suppress(OSError):  # another process has taken its name
                    Path(entry).rename(place.with_name(entry.name))
            raise


def idle(folder: Path) -> float:
    """Return seconds since the newest file in a folder was written; of a folder without any, since the folder was changed."""
    now, times = time.time(), list[tuple[bool, float]]()
    for path in (folder, *walked(folder)):
        with suppress(FileNotFoundError):  # another process has removed it since
            found = os.lstat(path)
            times.append((not stat.S_ISDIR(found.st_mode), found.st_mtime))
    return now - max(times, default=(True, now))[1]


def _make_locked(place: Path, machine: str, opened: ExitStack) -> Path:
    """Make a folder and lock it; again where another writer took it for one that is left, before it was locked."""
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        made = place.with_name(f"{place.name}.{machine}-{uuid4().hex[:8]}")
        made.mkdir()
        with suppress(FileNotFoundError):
            opened.callback(os.close, lock := os.open(made, os.O_RDONLY))
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if is_there(made):
                return made


def _sweep(place: Path, machine: str) -> None:
    """Remove what writers left that are no more; an older lopd gave all of them the name of `place` itself."""
    name, entries = re.compile(rf"{re.escape(place.name)}(\.([0-9a-f]{{8}})-[0-9a-f]{{8}})?"), list[os.DirEntry[str]]()
    with suppress(OSError):  # who may write there need not be one who may list it
        entries = listed(place.parent)
    for path, found in ((Path(entry), name.fullmatch(entry.name)) for entry in entries):
        with suppress(OSError), ExitStack() as opened:  # it may be somebody else's
            if found:
                opened.callback(os.close, folder := os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
                # locked until it is removed: a writer that has only just made it waits, and makes another
                if (found[2] == machine and _locks(folder)) or idle(path) > _PAUSE:
                    shutil.rmtree(path, ignore_errors=True)


def _locks(folder: int) -> bool:
    with suppress(OSError):  # its writer is at work, or there are no locks
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
