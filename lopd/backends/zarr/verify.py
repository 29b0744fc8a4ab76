"""Every checksum of a store, compared."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from lopd.backends.files import Files
from lopd.backends.sealing import checksum, dump
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.format import METADATA_FILE, chunk_path, group_document
from lopd.backends.zarr.snapshot import Snapshot
from lopd.errors import LopdError

_GROUP = checksum(dump(group_document({})))


def problems(files: Files, log: CommitLog, snapshot: Snapshot) -> Iterator[str]:
    """One sentence for each file that is missing or is not what was committed."""
    try:
        log.records(0, snapshot.commits)
        log.checkpoint(snapshot.commits)
    except LopdError as error:
        yield str(error)
    segments = [segment.meta for segment in snapshot.all_segments()]
    groups = {str(folder) for meta in segments for folder in [PurePosixPath(meta.path), *PurePosixPath(meta.path).parents[:-1]]}
    for folder in sorted(groups):
        yield from _compare(files, f"{folder}/{METADATA_FILE}", _GROUP)
    for meta in segments:
        for name, array in meta.arrays.items():
            yield from _compare(files, f"{meta.path}/{name}/{METADATA_FILE}", array.metadata_checksum)
            yield from _compare(files, chunk_path(meta.path, name, len(array.shape)), array.checksum)


def _compare(files: Files, path: str, wanted: str) -> Iterator[str]:
    try:
        found = checksum(files.read(path))
    except FileNotFoundError:
        found = "no file"
    except OSError as error:
        found = str(error)
    if found != wanted:
        yield f"{files.url}: the checksum of {path} is {found}, expected {wanted}; restore the file from a backup."
