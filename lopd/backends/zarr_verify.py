"""Every checksum of a store, compared."""

from collections.abc import Iterator

from lopd.backends.commit_log import CommitLog, checksum
from lopd.backends.files import Files
from lopd.backends.zarr_format import METADATA_FILE, chunk_path
from lopd.backends.zarr_segment import SegmentMeta
from lopd.backends.zarr_snapshot import Snapshot
from lopd.errors import LopdError


def problems(files: Files, log: CommitLog, snapshot: Snapshot) -> Iterator[str]:
    """One sentence for each file that is missing or is not what was committed."""
    try:
        log.records(0, snapshot.commits)
        log.checkpoint(snapshot.commits)
    except LopdError as error:
        yield str(error)
    for segment in snapshot.all_segments():
        yield from _problems_of(files, segment.meta)


def _problems_of(files: Files, segment: SegmentMeta) -> Iterator[str]:
    for name, array in segment.arrays.items():
        expected = {
            f"{segment.path}/{name}/{METADATA_FILE}": array.metadata_checksum,
            chunk_path(segment.path, name, len(array.shape)): array.checksum,
        }
        for path, wanted in expected.items():
            try:
                found = checksum(files.read(path))
            except FileNotFoundError:
                found = "no file"
            except OSError as error:
                found = str(error)
            if found != wanted:
                yield f"{files.url}: the checksum of {path} is {found}, expected {wanted}; restore the file from a backup."
