"""How a store on segments changes: write a segment, then take the next number of the commit log; if somebody else took it, look again."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, final
from uuid import uuid4

from attrs import asdict, evolve, frozen

from lopd.backends import ragged
from lopd.backends.files import Files
from lopd.backends.sealing import dump
from lopd.backends.zarr import compaction
from lopd.backends.zarr.commit_log import COMMITS_PER_CHECKPOINT, CommitLog
from lopd.backends.zarr.format import METADATA_FILE, group_document
from lopd.backends.zarr.root import StorageTypes
from lopd.backends.zarr.segment import SegmentData, SegmentMeta, encode_segment
from lopd.backends.zarr.snapshot import Snapshot
from lopd.errors import StoreWriteError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance


@frozen(eq=False)
class Draft:
    """Rows that are to be committed.

    Args:
        ids: what tells them from others.
        parent: folder of the segment.
        record: what the commit record says beside the segment.
        rows: of the rollouts in the store, as it is now; in order.
        encode: makes the segment; called once, however often the commit is tried.
    """

    ids: tuple[str, ...]
    parent: str
    record: Mapping[str, Any]
    rows: Sequence[int]
    encode: Callable[[], SegmentData]


@frozen(eq=False)
class _Written:
    ids: tuple[str, ...]
    segment: SegmentMeta
    rounding: float


@final
class Writer:
    """Changes the files of a store, and its snapshot with them.

    Args:
        files, log, snapshot, storage: of the store.   owner: how messages name it.
    """

    def __init__(self, files: Files, log: CommitLog, snapshot: Snapshot, storage: StorageTypes, *, owner: str) -> None:
        """Nothing is written yet."""
        self._files = files
        self._log = log
        self._snapshot = snapshot
        self._storage = storage
        self._owner = owner
        self._groups: set[str] = set()

    def refresh(self) -> None:
        """Take in what was committed since.

        Raises:
            CorruptStoreError: a later commit is damaged.
            StoreReadError: the storage does not answer.
        """
        while (record := self._log.next(self._snapshot.commits)) is not None:
            self._snapshot.add(record)

    def begin_generation(self, generation: int, policy: ModelId) -> None:
        """Commit which policy samples in a round, unless it is known."""
        record = {"kind": "generation", "generation": generation, "policy": asdict(policy), "by": uuid4().hex}
        while True:
            self.refresh()
            known = self._snapshot.generations.get(generation)
            ragged.check_generation(self._owner, generation, known, policy)
            if known is not None:
                return self._settle()
            if self._publish(record):
                return None

    def quarantine(self, column: str, provenance: Provenance, make_reasons: Callable[[], Mapping[int, str]]) -> None:
        """Commit which rows could not be scored, unless it is known; when another process commits first, look again at what is new."""
        while True:
            self.refresh()
            reasons = {str(row): reason for row, reason in make_reasons().items()}
            if not reasons:
                return self._settle()
            record = {"kind": "quarantine", "column": column, "provenance": provenance.to_json(), "reasons": reasons, "by": uuid4().hex}
            if self._publish(record):
                return None

    def commit(self, make_draft: Callable[[], Draft]) -> None:
        """Commit what is new; when another process commits first, look again at what is new."""
        written: _Written | None = None
        while True:
            self.refresh()
            draft = make_draft()
            if written is not None and written.ids != draft.ids:
                self._remove([written.segment.path])
                written = None
            if not draft.ids:
                return self._settle()
            written = written or self._write(draft)
            # Another process may have put rollouts before these; the bytes of the segment are the same.
            segment = evolve(written.segment, first_row=draft.rows[0], last_row=draft.rows[-1])
            if self._publish({**draft.record, "rounding": written.rounding, "segment": segment.to_json()}, [segment.path]):
                return None

    def _settle(self) -> None:
        """Another process may have committed these rows a moment ago, and not have flushed its record yet."""
        try:
            self._log.settle()
        except StoreWriteError:
            raise
        except OSError as error:
            raise self._refused([], error) from error

    def _write(self, draft: Draft) -> _Written:
        data = draft.encode()
        return _Written(draft.ids, self._put_segment(draft.parent, data), data.rounding)

    def _put_segment(self, parent: str, data: SegmentData) -> SegmentMeta:
        path = f"{parent}/{uuid4().hex}"
        files, meta = encode_segment(path, data)
        try:
            self._make_groups(parent)
            self._files.write(files)
        except OSError as error:
            raise self._refused([path], error) from error
        return meta

    def _make_groups(self, parent: str) -> None:
        """The Zarr groups that lead to a segment, made once."""
        parts = parent.split("/")
        for group in ["/".join(parts[: i + 1]) for i in range(len(parts))]:
            if group not in self._groups:
                self._files.put_if_absent(f"{group}/{METADATA_FILE}", dump(group_document({})))
                self._groups.add(group)

    def _publish(self, record: Mapping[str, Any], written: Sequence[str] = ()) -> bool:
        """Whether this record is the next commit; if so, the snapshot has it."""
        record = {**record, "when": time.time()}
        try:
            mine = self._log.commit(self._snapshot.commits, record)
        except StoreWriteError:
            # The record is there, only its durability is in doubt: its segments must stay.
            raise
        except OSError as error:
            raise self._refused(written, error) from error
        if mine:
            self._snapshot.add(record)
            if self._snapshot.commits % COMMITS_PER_CHECKPOINT == 0 or record["kind"] == "compaction":
                # The commit is made; a checkpoint only makes opening quicker, and the next one will do as well.
                with suppress(OSError):
                    self._log.put_checkpoint(self._snapshot.commits, self._snapshot.to_json())
        return mine

    def _remove(self, paths: Sequence[str]) -> None:
        # What cannot be removed now is for a sweep: no record names it.
        with suppress(OSError):
            self._files.remove(paths)

    def _refused(self, paths: Sequence[str], error: OSError) -> StoreWriteError:
        self._remove(paths)
        return StoreWriteError(
            f"{self._owner}: the write failed with {error}, expected it to succeed; nothing of this call was committed, "
            "so free space or fix permissions and repeat it."
        )

    def compact(self, target_tokens: int) -> None:
        """Merge until there is nothing to merge."""
        self.refresh()
        while jobs := compaction.plan(self._snapshot, target_tokens):
            self._merge(jobs[0], target_tokens)

    def _merge(self, job: compaction.Merge, target_tokens: int) -> None:
        parent = "segments" if job.column is None else f"scores/{job.column}"
        added: list[SegmentMeta] = []
        try:
            for data in compaction.merge(job, target_tokens):
                added.append(self._put_segment(parent, data))  # noqa: PERF401 (what was put before an error is removed)
        except Exception:
            self._remove([meta.path for meta in added])
            raise
        gone, paths = [segment.meta.path for segment in job.segments], [meta.path for meta in added]
        record = {"kind": "compaction", "column": job.column, "removes": gone, "adds": [meta.to_json() for meta in added]}
        while not self._publish(record, paths):
            self.refresh()
            if not set(gone) <= self._snapshot.paths():
                # Another compaction was quicker.
                return self._remove(paths)
        return None

    def sweep(self, older_than: float) -> list[str]:
        """Remove segments that nothing needs; gives their paths."""
        self.refresh()
        records = self._log.records(0)
        recent = {path for r in records if time.time() - r["when"] < older_than for path in r.get("removes", ())}
        keep = self._snapshot.paths() | recent
        try:
            dead = [path for path in self._found() if path not in keep and self._files.age(path) >= older_than]
            self._files.remove(dead)
        except OSError as error:
            raise StoreWriteError(
                f"{self._owner}: sweeping failed with {error}, expected the storage to list and remove; check it and repeat the call."
            ) from error
        return dead

    def _found(self) -> list[str]:
        """Paths of all segments that are there, whether a record names them or not."""
        parents = ["segments", *(f"scores/{name}" for name in self._files.names("scores") if name != METADATA_FILE)]
        return [f"{parent}/{name}" for parent in parents for name in self._files.names(parent) if name != METADATA_FILE]
