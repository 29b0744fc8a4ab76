"""Flushing to disk: what was written survives a power cut from then on; and whom the umask lets, reads it."""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

_AT_ONCE = 8
# Few of those that a process may have open.
_OPEN = 64
# Answers of file systems that do not know how to flush a drive, or a folder.
_UNKNOWN = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}


def flush(*paths: str | os.PathLike[str] | int, missing_ok: bool = False) -> None:
    """Flush files, and the entries of folders, that were written before; of an open file the descriptor will do.

    Several at once: a file system makes the changes of all who wait durable together.

    Raises:
        OSError: the disk refused; or one is not there, unless `missing_ok`.
    """
    for start in range(0, len(paths), _OPEN):
        _flush(paths[start : start + _OPEN], missing_ok)


def share_mode(path: Path) -> None:
    """Give weights in the folder of a file its mode: safetensors 0.8 keeps what it writes from other users, whatever the umask."""
    for weights in path.parent.rglob("*.safetensors"):
        with suppress(OSError):  # of a file system without modes
            weights.chmod(path.stat().st_mode)


def _flush(paths: Sequence[str | os.PathLike[str] | int], missing_ok: bool) -> None:
    with ExitStack() as opened:
        descriptors = [path for path in paths if isinstance(path, int)]
        for path in (path for path in paths if not isinstance(path, int)):
            with suppress(*([FileNotFoundError] if missing_ok else [])):
                descriptors.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                opened.callback(os.close, descriptors[-1])
        try:
            if len(descriptors) > 1:
                _side_by_side(descriptors)
                return
        except RuntimeError:
            pass  # a process that is about to end starts no threads
        for descriptor in descriptors:
            _sync(descriptor)


def _side_by_side(descriptors: Sequence[int]) -> None:
    flushing = list[Future[None]]()
    try:
        for descriptor in descriptors:
            flushing.append(_threads().submit(_sync, descriptor))
        wait(flushing)
    finally:  # an interrupt too: the caller closes them after this, and their numbers become other files
        for one in flushing:
            one.cancel()
        wait(flushing)
    for one in flushing:
        one.result()


@cache
def _threads() -> ThreadPoolExecutor:
    """Return threads that flush, the same for a whole process: to start eight takes as long as to write a small segment."""
    return ThreadPoolExecutor(_AT_ONCE, "lopd-flush")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of its parent's threads


def _sync(descriptor: int) -> None:
    """Flush one; on macOS `fsync` leaves it to the drive, which may lose it, and writes after it are kept."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
        else:
            return
    try:
        os.fsync(descriptor)
    except OSError as error:  # the entries of a folder are left to such a file system: there is no other way to ask it
        if error.errno not in _UNKNOWN or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
