"""Storage is asked, before anything is written, whether it keeps what stores rely on: one of many writers makes an object, and ranges are read.

Some servers with the S3 protocol ignore `If-None-Match: *` or `Range` without an error: writers would replace each other's commits.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np

from lopd.backends.files.contract import PROBES, Files, T, writing
from lopd.errors import LopdError, StorePathError

# Several at once: a server may look first and then write, so that two that come together both find nothing.
_WRITERS = 4
_SIZE, _STARTS, _ENDS = 48, (3, 40), (17, 64)
# By place and options: they may lead to another server.
_PROVEN: set[tuple[str, str]] = set()


def prove(files: Files) -> None:
    """Try the storage under this root with an object of its own, and remove that; once a process.  On a local disk look at permissions alone.

    Raises:
        StorePathError: it lets several writers create the same object, does not know how to let one, or does not read ranges.
        StoreWriteError: it refuses to write or read at all.
    """
    if "://" not in files.url:
        with writing(f"Store {files.url}"):
            if Path(files.url).is_dir() and not os.access(files.url, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), files.url)
        return
    place = files.url, repr(sorted((name, str(value)) for name, value in files.options.items()))
    if place in _PROVEN:
        return
    folder = f"{PROBES}/{uuid4().hex}"
    try:
        with writing(f"Store {files.url}", "trying its storage"):
            _try_storage(files, f"{folder}/object")
    finally:
        # A writer may be allowed to create and not to remove; what stays is listed and never read.
        with suppress(OSError):
            files.remove([folder])
    _PROVEN.add(place)


def _try_storage(files: Files, path: str) -> None:
    contents = [bytes(range(i, i + _SIZE)) for i in range(_WRITERS)]
    creating = partial(files.run, [partial(files.put_if_absent, path, content) for content in contents])
    made = _asked(files, "creating an object where there is none", creating, lambda: files.write({f"{path}-plain": np.zeros(1, np.uint8)}))
    if sum(made) != 1:
        raise _unfit(files, f"{sum(made)} of {_WRITERS} writers created the same object, expected 1", "If-None-Match: *")
    content = contents[made.index(True)]
    ranges = _asked(files, "reading ranges", lambda: files.read_ranges(path, _STARTS, _ENDS), lambda: files.read(path))
    if [bytes(part) for part in ranges] != [content[start:end] for start, end in zip(_STARTS, _ENDS, strict=True)]:
        raise _unfit(files, "ranges of an object are answered with other bytes than theirs", "Range")


def _asked(files: Files, what: str, work: Callable[[], T], plainly: Callable[[], object]) -> T:
    """Return what this work gives; where only its plain form is possible, the storage does not know how."""
    try:
        return work()
    except OSError as error:
        plainly()
        said = error.__cause__ if isinstance(error, LopdError) else error
        raise _unfit(files, f"{what} fails ({said})", "If-None-Match: *` and `Range") from error


def _unfit(files: Files, what: str, header: str) -> StorePathError:
    return StorePathError(
        f"Store {files.url}: {what}; its storage must heed `{header}`, or data is lost, so use another server or a local disk."
    )
