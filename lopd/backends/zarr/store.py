"""A store on a local disk or in a bucket: durable, appendable by several processes at once, readable by any Zarr v3 reader.

    zarr.json                      a Zarr v3 group; its attributes hold the manifest
    segments/<key>/<array>/        one group per append of rollouts
    scores/<column>/<key>/<array>/ one group per append of scores
    commits/<number>.json          which segments exist, in order; written last
    checkpoints/<number>.json      what the commits up to a number add up to

A segment that no commit record names does not exist.  Rows are in the order of commits, then in the order of the call.
"""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, final

from lopd.backends.durable import DurableBase
from lopd.backends.files import Files
from lopd.backends.root import Root
from lopd.backends.sealing import checksum, dump
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.format import METADATA_FILE, ROOT, chunk_path, group_document
from lopd.backends.zarr.snapshot import Snapshot
from lopd.backends.zarr.writer import Writer
from lopd.errors import LopdError
from lopd.records.manifest import Commit


@final
class ZarrStore(DurableBase[Snapshot, Writer]):
    """A `DurableStore` of raw Zarr v3 segments; make one with `create`, `open` or `open_or_create`.

    A store sees the commits that were there when it was opened, last refreshed or last written to; `refresh` shows later ones.
    The virtual columns `behavior` and `behavior/sampler` read the rollouts' own log-probs; `columns` does not list them, and they cannot be
    written to.
    It pickles as its place and the number of commits it sees.  One thread at a time; processes as many as you like.
    On a local disk it survives a fork; in a bucket, a forked process is refused (start workers with "spawn" or "forkserver").
    `find` takes 24 bytes of memory a rollout from the first call on.
    """

    _ROOT = ROOT

    def __init__(self, files: Files, root: Root | None = None, commits: int | None = None) -> None:
        """Not for callers: `open` says what is wrong with a path."""
        super().__init__(files, root)
        self._log = CommitLog(files, self._owner)
        self._snapshot = Snapshot(files, self._log, self.manifest, self._owner, commits)
        self._writer = Writer(files, self._log, self._snapshot, self._root, owner=self._owner)

    def __reduce__(self) -> tuple[Any, ...]:
        """Place and snapshot: memory maps and connections do not travel to another process."""
        return ZarrStore, (self._files, None, self._snapshot.commits)

    def compact(self, *, target_tokens: int = 1 << 24) -> None:
        """Merge small segments into ones of about `target_tokens`; rows keep their numbers, and open readers read on.  Refreshes.

        Nothing is removed: `sweep` does that once no reader can need the old segments any more.  Compactions may run beside appends and
        beside each other; of two that want the same segments, one wins and the other looks again.

        Raises:
            CorruptStoreError: a line that would be moved is damaged; nothing of its merge was committed.
            StoreWriteError: the write failed; merges before it are kept.
        """
        self._proven_writer.compact(target_tokens)

    def sweep(self, *, older_than: float = 7 * 24 * 3600.0) -> list[str]:
        """Remove segments that no commit names, and those that compactions replaced, if both are older than this many seconds.

        A reader that was opened before a compaction, or a writer in the middle of an append, needs them: choose a time that none lives.

        Returns:
            The paths that were removed.
        """
        return self._writer.sweep(older_than)

    def history(self) -> Sequence[Commit]:
        """What was committed up to this store's snapshot, oldest first."""
        commits = []
        for number, record in enumerate(self._log.records(0, self._snapshot.commits)):
            segments = record.get("adds", [record["segment"]] if "segment" in record else [])
            rows, tokens = sum(meta["rows"] for meta in segments), sum(meta["tokens"] for meta in segments)
            rows += len(record.get("reasons", ()))
            rounding = record.get("rounding", 0.0)
            commits.append(Commit(number, record["kind"], rows, tokens, record.get("column"), record["when"], rounding))
        return commits

    def stored_bytes(self) -> int:
        """Bytes of the arrays of all segments that the current state is made of."""
        return sum(segment.meta.stored_bytes for segment in self._snapshot.all_segments())

    def verify(self) -> Iterator[str]:
        """One sentence for each problem found: every checksum of every file that the current state is made of, and the whole log."""
        try:
            self._log.records(0, self._snapshot.commits)
            self._log.checkpoint(self._snapshot.commits)
        except LopdError as error:
            yield str(error)
        segments = [segment.meta for segment in self._snapshot.all_segments()]
        groups = {str(folder) for meta in segments for folder in [PurePosixPath(meta.path), *PurePosixPath(meta.path).parents[:-1]]}
        for folder in sorted(groups):
            yield from self._compare(f"{folder}/{METADATA_FILE}", checksum(dump(group_document({}))))
        for meta in segments:
            for name, array in meta.arrays.items():
                yield from self._compare(f"{meta.path}/{name}/{METADATA_FILE}", array.metadata_checksum)
                yield from self._compare(chunk_path(meta.path, name, len(array.shape)), array.checksum)

    def _compare(self, path: str, wanted: str) -> Iterator[str]:
        try:
            found = checksum(self._files.read(path))
        except FileNotFoundError:
            found = "no file"
        except OSError as error:
            found = str(error)
        if found != wanted:
            yield f"{self._files.url}: the checksum of {path} is {found}, expected {wanted}; restore the file from a backup."
