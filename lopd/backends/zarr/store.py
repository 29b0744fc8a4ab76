"""A store on a local disk or in a bucket: durable, appendable by several processes at once, readable by any Zarr v3 reader.

    zarr.json                      a Zarr v3 group; its attributes hold the manifest
    segments/<key>/<array>/        one group per append of rollouts
    scores/<column>/<key>/<array>/ one group per append of scores
    commits/<number>.json          which segments exist, in order; written last
    checkpoints/<number>.json      what the commits up to a number add up to
    head/<number>                  the number of the last commit

A segment that no commit record names does not exist.  Rows are in the order of commits, then in the order of the call.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, final

from lopd.backends.durable import DurableBase
from lopd.backends.files import Files, problem
from lopd.backends.root import Root
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.encode import ROLLOUT_ATTRIBUTES, SCORE_ATTRIBUTES
from lopd.backends.zarr.format import METADATA_FILE, ROOT, group_document, has_content
from lopd.backends.zarr.segment import LINES, Segment, SegmentMeta, segment_group
from lopd.backends.zarr.snapshot import Snapshot
from lopd.backends.zarr.state import State
from lopd.backends.zarr.writer import Writer
from lopd.errors import CorruptStoreError, StoreReadError
from lopd.records.checks import check_at_least, to_real
from lopd.records.manifest import Commit


@final
class ZarrStore(DurableBase[Snapshot, Writer]):
    """A `DurableStore` of raw Zarr v3 segments; make one with `create`, `open` or `open_or_create`.

    A store sees the commits that were there when it was opened, last refreshed or last written to; `refresh` shows later ones.
    Where scores that skip rows were merged, and their segment removed before it looked at them, it cannot tell rows between the first and the last of
    them that were scored since, and calls them scored.
    The virtual columns `behavior` and `behavior/sampler` read the rollouts' own log-probs; `columns` does not list them, and they cannot be
    written to.
    It pickles as its place and the commits it sees.  One thread at a time; processes as many as you like.
    On a local disk it survives a fork; in a bucket, a forked process is refused (start workers with "spawn" or "forkserver").
    `find` takes 24 bytes of memory a rollout from the first call on.
    """

    _ROOT = ROOT

    def __init__(self, files: Files, root: Root | None = None, commits: int | None = None, last: str | None = None) -> None:
        # a copy's store may not be there, or another one may
        super().__init__(files, root if last is None else None)
        self._log = CommitLog(files, self._root, self._owner)
        if root is not None and root.creation != self._root.creation:
            raise self._log.another()
        self._state = State(files, self._log, self.manifest, self._owner, commits)
        if last not in (None, self._state.last):
            raise self._log.put_back(self._state.commits)
        self._snapshot = Snapshot(files, self._state, self._owner)
        self._writer = Writer(files, self._log, self._state, self._root, owner=self._owner)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return place and snapshot, and of which store it is: memory maps and connections do not travel to another process."""
        return ZarrStore, (self._files, self._root, self._state.commits, self._state.last)

    def _counts(self) -> dict[str, int]:
        return {name: sum(segment.meta.rows for segment in column.segments) for name, column in self._state.columns.items()}

    def compact(self, *, target_tokens: int = 1 << 24) -> None:
        """Merge small segments into ones of about `target_tokens`; rows keep their numbers, and open readers read on.  Refreshes.

        Merged scores have at most a gigabyte of values a segment, so fewer tokens where a support is large (2 million of a top-64).  What is
        merged is in memory twice, one new segment at a time: at most about two gigabytes.

        Writers merge what is small by themselves, sixteen appends into one and sixteen of those; this does the rest.  What others append
        meanwhile is left for the next time.  Of two compactions of the same segments, one wins and the other looks again.
        Replaced segments are removed some 64 commits later, or by `sweep`.

        Raises:
            CorruptStoreError: a line that would be moved is damaged; nothing of its merge was committed.
            StoreWriteError: the write failed; merges before it are kept.
        """
        self._proven_writer.compact(check_at_least(self._owner, "target_tokens", target_tokens, 1))

    def sweep(self, *, older_than: float = 7 * 24 * 3600.0) -> list[str]:
        """Remove segments that no commit names, and those that compactions replaced, if both are older than this many seconds.

        Temporary files that killed writers left on a local disk go too, if they are older than a day as well.

        It is safe beside writers and readers, whatever the clocks show: what is removed is committed first, so a writer in the middle of an
        append notices and writes again, and a reader that was opened before a compaction looks up where its rows are now.
        Where the clock of this machine is ahead of the storage's by more than `older_than`, each append under way is written again.
        Only segments that this store has made are removed.

        Returns:
            The paths that were removed; what stands behind a link, on another disk, stays.
        """
        return self._proven_writer.sweep(to_real(self._owner, "older_than", older_than))

    def history(self) -> Sequence[Commit]:
        """Return what was committed up to this store's snapshot, oldest first."""
        commits = []
        for number, entry in enumerate(self._log.before(self._state.commits, self._state.last)):
            record = entry.body
            segments = record.get("adds", [record["segment"]] if "segment" in record else [])
            rows, tokens = sum(meta.rows for meta in segments), sum(meta.tokens for meta in segments)
            rows += len(record.get("reasons", ()))
            rounding = record.get("rounding", 0.0)
            commits.append(Commit(number, record["kind"], rows, tokens, record.get("column"), record["when"], rounding))
        return commits

    def stored_bytes(self) -> int:
        """Return bytes of the arrays of all segments that the current state is made of."""
        return sum(segment.meta.stored_bytes for segment in self._state.all_segments())

    def verify(self) -> Iterator[str]:
        """Yield one sentence for each problem found: every checksum of every file that the current state is made of, and the whole log.

        A log that lost its last records, a record of another store, and a folder of segments without its metadata are problems as well.
        What writers merge and remove meanwhile is verified where it is then.
        """
        yield from self._log.verify(self._state.commits, self._state.last)
        state, seen = self._state, set[str]()
        while segments := [segment for segment in state.all_segments() if segment.meta.path not in seen]:
            seen |= {segment.meta.path for segment in segments}
            folders = {str(parent) for segment in segments for parent in PurePosixPath(segment.meta.path).parents[:-1]}
            for folder in sorted(folders - seen):
                yield from self._compare(f"{folder}/{METADATA_FILE}", partial(has_content, group_document({})))
            seen |= folders
            for segment in segments:
                meta, problems = segment.meta, list(self._verify_segment(segment.meta)) or list(self._verify_lines(segment))
                if problems and meta.path not in (later := state.latest()).paths():
                    state = later
                else:
                    yield from problems

    def _verify_segment(self, meta: SegmentMeta) -> Iterator[str]:
        group = segment_group(self._root.creation, meta.replaces) if self._root.chained else group_document({})
        yield from self._compare(f"{meta.path}/{METADATA_FILE}", partial(has_content, group))
        described = ROLLOUT_ATTRIBUTES if meta.path.startswith("segments/") else SCORE_ATTRIBUTES
        for name, array in meta.arrays.items():
            is_metadata = partial(array.is_metadata, described if name == LINES else {})
            yield from self._compare(f"{meta.path}/{name}/{METADATA_FILE}", is_metadata)
            yield from self._compare(meta.chunk(name), array.is_chunk)

    def _compare(self, path: str, fits: Callable[[bytes], bool]) -> Iterator[str]:
        try:
            found = "" if fits(self._files.read(path)) else "it is damaged"
        except FileNotFoundError:
            found = "it is missing"
        except OSError as error:
            found = problem(self._files, error)
        if found:
            yield f"{self._files.url}: {path}: {found}; restore the file from a backup."

    def _verify_lines(self, segment: Segment) -> Iterator[str]:
        """Yield what is wrong with lines whose file is what was committed."""
        try:
            segment.lines()
        except (CorruptStoreError, StoreReadError) as error:
            yield problem(self._files, error)
