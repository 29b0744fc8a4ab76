"""Flushing to disk: what was written survives a power cut from then on."""

import os


def flush(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a folder, that was written before.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
