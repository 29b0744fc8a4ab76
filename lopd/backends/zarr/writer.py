"""How a store on segments changes: write a segment, then try to take the next number of the commit log."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final
from uuid import uuid4

from attrs import asdict, evolve, frozen

from lopd.backends.files import Files, writing
from lopd.backends.root import Root
from lopd.backends.sealing import dump
from lopd.backends.zarr import compaction
from lopd.backends.zarr.commit_log import COMMITS_PER_CHECKPOINT, CommitLog
from lopd.backends.zarr.encode import encode_rollouts, encode_scores
from lopd.backends.zarr.format import METADATA_FILE, group_document
from lopd.backends.zarr.segment import Segment, SegmentData, SegmentMeta, encode_segment
from lopd.backends.zarr.snapshot import Snapshot
from lopd.errors import StoreWriteError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores


@frozen(eq=False)
class _Written:
    """A segment that no record names yet, and what it was made of."""

    parent: str
    records: Sequence[Rollout] | Sequence[Scores]
    segment: SegmentMeta
    rounding: float


@final
class Writer:
    """Changes the files of a store, and its snapshot with them.

    Args:
        files, log, snapshot, root: of the store.   owner: how messages name it.
    """

    def __init__(self, files: Files, log: CommitLog, snapshot: Snapshot, root: Root, *, owner: str) -> None:
        """Nothing is written yet."""
        self._files = files
        self._log = log
        self._snapshot = snapshot
        self._formats = root.manifest.tokenizer.vocab_size, root.logprob_dtype
        self._owner = owner
        self._groups: set[str] = set()
        self._spare: _Written | None = None

    def add_generation(self, generation: int, policy: ModelId, /) -> bool:
        """Commit which policy samples in a round."""
        return self._publish({"kind": "generation", "generation": generation, "policy": asdict(policy), "by": uuid4().hex})

    def add_rollouts(self, rollouts: Sequence[Rollout], first_row: int, /) -> bool:
        """Commit rollouts in the rows from `first_row` on."""
        written = self._take_spare("segments", rollouts)
        written = written or self._write("segments", rollouts, encode_rollouts(rollouts, first_row, *self._formats))
        return self._publish_segment({"kind": "rollouts"}, written, first_row, first_row + len(rollouts) - 1)

    def add_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], rows: Sequence[int], /) -> bool:
        """Commit scores of these rows, which ascend."""
        parent = f"scores/{column}"
        written = self._take_spare(parent, scores) or self._write(parent, scores, encode_scores(scores, rows, *self._formats))
        record = {"kind": "scores", "column": column, "provenance": provenance.to_json()}
        return self._publish_segment(record, written, rows[0], rows[-1])

    def add_reasons(self, column: str, provenance: Provenance, reasons: Mapping[int, str], /) -> bool:
        """Commit why rows could not be scored."""
        named = {str(row): reason for row, reason in reasons.items()}
        record = {"kind": "quarantine", "column": column, "provenance": provenance.to_json(), "reasons": named, "by": uuid4().hex}
        return self._publish(record)

    def settle(self, column: str | None, /) -> None:  # noqa: ARG002 (all columns are in one log)
        """Make durable what another process may have committed a moment ago, and not have flushed yet."""
        with self._writing([]):
            self._log.settle()

    def end(self) -> None:
        """Remove what was written for a call that is over: nothing keeps a sweep from it."""
        self._take_spare("", ())

    def _take_spare(self, parent: str, records: Sequence[Rollout] | Sequence[Scores]) -> _Written | None:
        """The segment that lost the race for a number, if it was made of these very records; any other is removed."""
        spare, self._spare = self._spare, None
        if spare is not None and (spare.parent, [*spare.records]) != (parent, [*records]):
            self._remove([spare.segment.path])
            return None
        return spare

    def _write(self, parent: str, records: Sequence[Rollout] | Sequence[Scores], data: SegmentData) -> _Written:
        return _Written(parent, records, self._put_segment(parent, data), data.rounding)

    def _publish_segment(self, record: Mapping[str, Any], written: _Written, first_row: int, last_row: int) -> bool:
        # Another process may have put rollouts before these since it was written; the bytes of the segment are the same.
        segment = evolve(written.segment, first_row=first_row, last_row=last_row)
        mine = self._publish({**record, "rounding": written.rounding, "segment": segment.to_json()}, [segment.path])
        self._spare = None if mine else written
        return mine

    def _put_segment(self, parent: str, data: SegmentData) -> SegmentMeta:
        path = f"{parent}/{uuid4().hex}"
        files, meta = encode_segment(path, data)
        with self._writing([path]):
            self._make_groups(parent)
            self._files.write(files)
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
        with self._writing(written):
            mine = self._log.commit(self._snapshot.commits, record)
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

    @contextmanager
    def _writing(self, paths: Sequence[str]) -> Iterator[None]:
        """Remove these segments when the storage refuses."""
        with writing(self._owner):
            try:
                yield
            except StoreWriteError:
                # The record is there, only its durability is in doubt: its segments must stay.
                raise
            except OSError:
                self._remove(paths)
                raise

    def compact(self, target_tokens: int) -> None:
        """Merge until there is nothing to merge."""
        self._snapshot.refresh()
        while job := compaction.plan(self._snapshot, target_tokens):
            self._merge(*job, target_tokens)

    def _merge(self, column: str | None, segments: Sequence[Segment], target_tokens: int) -> None:
        parent = "segments" if column is None else f"scores/{column}"
        added: list[SegmentMeta] = []
        try:
            for data in compaction.merge(column, segments, target_tokens):
                added.append(self._put_segment(parent, data))  # noqa: PERF401 (what was put before an error is removed)
        except Exception:
            self._remove([meta.path for meta in added])
            raise
        gone, paths = [segment.meta.path for segment in segments], [meta.path for meta in added]
        record = {"kind": "compaction", "column": column, "removes": gone, "adds": [meta.to_json() for meta in added]}
        while not self._publish(record, paths):
            self._snapshot.refresh()
            if not set(gone) <= self._snapshot.paths():
                # Another compaction was quicker.
                return self._remove(paths)
        return None

    def sweep(self, older_than: float) -> list[str]:
        """Remove segments that nothing needs; gives their paths."""
        self._snapshot.refresh()
        records = self._log.records(0)
        recent = {path for r in records if time.time() - r["when"] < older_than for path in r.get("removes", ())}
        keep = self._snapshot.paths() | recent
        with writing(self._owner, "sweeping"):
            parents = ["segments", *(f"scores/{name}" for name in self._files.names("scores") if name != METADATA_FILE)]
            found = [f"{parent}/{name}" for parent in parents for name in self._files.names(parent) if name != METADATA_FILE]
            dead = [path for path in found if path not in keep and self._files.age(path) >= older_than]
            self._files.remove(dead)
        return dead
