"""How a store on segments changes: write a segment, then try to take the next number of the commit log."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any, cast, final
from uuid import uuid4

from attrs import asdict, evolve, frozen

from lopd.backends.column_names import is_column_name
from lopd.backends.files import Files, writing
from lopd.backends.files.local import remove_unfinished
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root
from lopd.backends.sealing import dump
from lopd.backends.zarr import compaction
from lopd.backends.zarr.commit_log import COMMITS, COMMITS_PER_CHECKPOINT, CommitLog
from lopd.backends.zarr.encode import encode_rollouts, encode_scores
from lopd.backends.zarr.format import METADATA_FILE, group_document
from lopd.backends.zarr.segment import Segment, SegmentData, SegmentGoneError, SegmentMeta, encode_segment
from lopd.backends.zarr.state import State
from lopd.errors import CorruptStoreError, InvalidRecordError, LopdError, StorePathError, StoreWriteError
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores

_LOG = logging.getLogger(__name__)
_ATTEMPTS = 3
# For so many commits: most readers that stand before a merge read on without looking up anything.
_REPLACED_STAY = 64
# A merge by a writer makes one segment.
_NO_SPLIT = 1 << 62


@frozen(eq=False)
class _Written:
    """A segment that no record names yet, and what it was made of."""

    parent: str
    records: Sequence[Rollout] | Sequence[Scores]
    segment: SegmentMeta
    rounding: float


@final
class Writer:
    """Changes the files of a store, and its state with them.

    Args:
        files, log, state, root: the store's.   owner: the store's name in messages.
    """

    def __init__(self, files: Files, log: CommitLog, state: State, root: Root, *, owner: str) -> None:
        self._root = root
        self._files = files
        self._log = log
        self._state = state
        self._owner = owner
        self._groups: set[str] = set()
        self._spare: _Written | None = None
        # a checkpoint of so many segments was refused
        self._too_many = sys.maxsize

    def add_generation(self, generation: int, policy: ModelId, /) -> bool:
        """Commit which policy samples in a round."""
        return self._publish({"kind": "generation", "generation": generation, "policy": asdict(policy), "by": uuid4().hex})

    def add_rollouts(self, rollouts: Sequence[Rollout], first_row: int, /) -> bool:
        """Commit rollouts in the rows from `first_row` on."""
        written = self._take_spare("segments", rollouts)
        written = written or self._write("segments", rollouts, encode_rollouts(rollouts, first_row, *self._root.formats()))
        mine = self._publish_segment({"kind": "rollouts"}, written, first_row, first_row + len(rollouts) - 1)
        return mine and self._tidy(None)

    def add_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], rows: Sequence[int], /) -> bool:
        """Commit scores of these rows, which ascend."""
        parent = f"scores/{column}"
        there = self._state.segments_of(column) if column in self._state.columns else ()
        # an older lopd kept labels as log-probs are kept
        kept = cast("LogprobDtype", there[0].meta.arrays["logprobs"].dtype) if there else None
        written = self._take_spare(parent, scores)
        written = written or self._write(parent, scores, encode_scores(scores, rows, *self._root.formats(provenance, kept)))
        record = {"kind": "scores", "column": column, "provenance": provenance.to_json()}
        return self._publish_segment(record, written, rows[0], rows[-1]) and self._tidy(column)

    def add_reasons(self, column: str, provenance: Provenance, reasons: Mapping[int, str], /) -> bool:
        """Commit why rows could not be scored."""
        named = {str(row): reason for row, reason in reasons.items()}
        record = {"kind": "quarantine", "column": column, "provenance": provenance.to_json(), "reasons": named, "by": uuid4().hex}
        return self._publish(record)

    def settle(self, column: str | None, /) -> None:  # noqa: ARG002 (all columns are in one log)
        """Make durable what another process may have committed a moment ago, and not have flushed yet; refuse a store where it is gone."""
        with self._writing([]):
            self._log.check(self._state.commits, self._state.last)
            self._files.settle(COMMITS)

    def end(self) -> None:
        """Remove what was written for a call that is over: nothing keeps a sweep from it."""
        with suppress(OSError, LopdError):
            if self._spare:
                self._state.refresh()  # the call may have failed at this
                self._take_spare("", ())

    def _take_spare(self, parent: str, records: Sequence[Rollout] | Sequence[Scores]) -> _Written | None:
        """Return the segment that lost the race for a number, if it was made of these very records and not swept; remove any other."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        swept = spare.segment.path in self._state.condemned
        if swept or (spare.parent, [*spare.records]) != (parent, [*records]):
            self._remove([spare.segment.path])
            return None
        return spare

    def _write(self, parent: str, records: Sequence[Rollout] | Sequence[Scores], data: SegmentData) -> _Written:
        return _Written(parent, records, self._put_segment(parent, data), data.rounding)

    def _publish_segment(self, record: Mapping[str, Any], written: _Written, first_row: int, last_row: int) -> bool:
        # Another process may have put rollouts before these since it was written; the bytes of the segment are the same.
        segment = evolve(written.segment, first_row=first_row, last_row=last_row)
        mine = self._publish({**record, "rounding": written.rounding, "segment": asdict(segment)}, [segment.path])
        self._spare = None if mine else written
        return mine

    def _put_segment(self, parent: str, data: SegmentData) -> SegmentMeta:
        self._log.check(self._state.commits, self._state.last)  # where a store was removed, its folders must not come back
        left = _ATTEMPTS
        while True:
            left -= 1
            path = f"{parent}/{uuid4().hex}"
            files, meta = encode_segment(path, data, self._root.creation)
            with self._writing([path]):
                try:
                    self._make_groups(parent)
                    self._files.write(files)
                except FileNotFoundError:
                    # A sweep with a clock that is ahead has removed it while it was written.
                    self._groups.clear()
                    if not left:
                        raise
                else:
                    return meta

    def _make_groups(self, parent: str) -> None:
        """Make the Zarr groups that lead to a segment, once."""
        parts = parent.split("/")
        for group in ["/".join(parts[: i + 1]) for i in range(len(parts))]:
            if group not in self._groups:
                self._files.put_if_absent(f"{group}/{METADATA_FILE}", dump(group_document({})))
                self._groups.add(group)

    def _publish(self, record: Mapping[str, Any], written: Sequence[str] = ()) -> bool:
        """Return whether this record is the next commit; if so, the state has it."""
        record = {**record, "when": time.time()}
        with self._writing(written):
            entry = self._log.commit(self._state.commits, record, self._state.last)
        if entry is None:
            return False
        self._state.add(entry)
        if self._state.commits % COMMITS_PER_CHECKPOINT == 0:
            self._checkpoint()
        return True

    def _checkpoint(self) -> None:
        """Remove what was merged so long ago that few readers stand before it, who look up where their rows are now; and keep the state."""
        with suppress(OSError):
            self._files.remove(self._state.forget_replaced(self._state.commits - _REPLACED_STAY))
        # The commit is made; a checkpoint, which may also be too large, only makes opening quicker, and the next one will do as well.
        if (segments := len(self._state.all_segments())) < self._too_many:
            try:
                with suppress(OSError):
                    self._log.put_checkpoint(self._state.commits, self._state.to_json())
            except InvalidRecordError:
                if self._too_many == sys.maxsize:
                    _LOG.warning("%s: no checkpoint holds its %d segments, so opening gets slower; call compact", self._owner, segments)
                self._too_many = segments

    def _tidy(self, column: str | None) -> bool:
        """Do the share of merging that falls to the writer of the last segment; return True.  What was appended is there, however it ends."""
        try:
            while segments := compaction.due(self._state.segments_of(column), neighbours=column is None):
                if not self._merge(column, segments, _NO_SPLIT):
                    break
        except (LopdError, OSError) as error:
            _LOG.warning("%s: merging small segments failed, and is tried again later: %s", self._owner, error)
        return True

    def _remove(self, paths: Sequence[str]) -> None:
        # What a record names stays, whatever the storage answered; what cannot be removed now is for a sweep.  It does not look into the log:
        # the rows that a call is about to commit are those of its own look.
        with suppress(OSError):
            self._files.remove(set(paths) - self._state.paths())

    @contextmanager
    def _writing(self, paths: Sequence[str]) -> Iterator[None]:
        """Remove these segments when the storage refuses, or the log does: a record that is too large, or one of a store that is gone."""
        with writing(self._owner):
            try:
                yield
            except StoreWriteError:
                # The record is there, only its durability is in doubt: its segments must stay.
                raise
            except (OSError, StorePathError, InvalidRecordError, CorruptStoreError) as error:
                with suppress(OSError, LopdError):
                    if paths and not isinstance(error, CorruptStoreError):
                        self._state.refresh()
                    self._remove(paths)
                raise

    def compact(self, target_tokens: int) -> None:
        """Merge what is there now; what others append meanwhile is for the next time."""
        self._state.refresh()
        self.settle(None)
        for column in (None, *self._state.columns):
            for _ in range(_ATTEMPTS):
                there = self._state.segments_of(column)
                target = target_tokens if column is None else compaction.fitting(there, target_tokens)
                jobs = compaction.plan(there, target, neighbours=column is None)
                done = [self._merge(column, segments, target) for segments in jobs]
                if all(done):
                    break

    def _merge(self, column: str | None, segments: Sequence[Segment], target_tokens: int) -> bool:
        """Return whether these are merged now; False if another process merged or swept some of them."""
        parent = "segments" if column is None else f"scores/{column}"
        gone, added = [segment.meta.path for segment in segments], list[SegmentMeta]()
        try:
            for data in compaction.merge(column, segments, target_tokens, self._files.run):
                added.append(self._put_segment(parent, data))
        except Exception as error:
            self._remove([meta.path for meta in added])
            if isinstance(error, SegmentGoneError):
                self._state.refresh()
                if error.segment not in self._state.paths():
                    return False
                raise error.lost() from error.__cause__
            raise
        paths = [meta.path for meta in added]
        record = {"kind": "compaction", "column": column, "removes": gone, "adds": [asdict(meta) for meta in added]}
        # Another merge of the same plan may have met what others did before this one.
        while set(gone) <= self._state.paths() and self._state.condemned.isdisjoint(paths):
            if self._publish(record, paths):
                return True
            self._state.refresh()
        self._remove(paths)
        return False

    def sweep(self, older_than: float) -> list[str]:
        """Remove segments that nothing needs; gives the paths of those that are gone.

        That they will be removed is a record of its own, before they are.  A writer that has not committed one of them yet meets this record
        on its way to a number, and writes its segment again: so no clock decides what is lost.
        """
        while True:
            self._state.refresh()
            dead = self._dead(older_than)
            if not dead or self._publish({"kind": "sweep", "removes": dead, "by": uuid4().hex}):
                break
        with writing(self._owner, "sweeping"):
            self._files.remove(dead)
            remove_unfinished(self._files.url, older_than)
            # what stands behind a link stays
            return [path for path in dead if not self._files.names(path)]

    def _dead(self, older_than: float) -> list[str]:
        """Return paths of segments that this store has made, and that the current state does not name."""
        # by the names that are theirs alone: a file system that ignores capitals lists a column under the first of its names
        keep = {PurePosixPath(path).name for path in self._state.paths()}
        for entry in self._log.before(self._state.commits, self._state.last):
            record = entry.body
            if record["kind"] == "compaction" and time.time() - record["when"] < older_than:
                keep.update(PurePosixPath(path).name for path in record["removes"])
        with writing(self._owner, "sweeping"):
            parents = ["segments", *(f"scores/{name}" for name in self._files.names("scores") if is_column_name(name))]
            found = [f"{parent}/{name}" for parent in parents for name in self._files.names(parent)]
            names = {path: PurePosixPath(path).name for path in found}
            mine = [path for path, name in names.items() if name not in keep and re.fullmatch("[0-9a-f]{32}", name) and self._is_own(path)]
            return [path for path in mine if self._files.age(path) >= older_than]

    def _is_own(self, path: str) -> bool:
        """Return whether a segment of this store is there, whole or begun."""
        try:
            said = self._files.read(f"{path}/{METADATA_FILE}")
            document = json.loads(said or "{}")
        except FileNotFoundError:
            return not self._files.names(path)
        except (OSError, ValueError):
            return False
        if not said:
            return True  # a power cut took its content
        attributes = document.get("attributes") if isinstance(document, dict) else None
        older = not self._root.chained and attributes == {}
        return older or (isinstance(attributes, dict) and attributes.get("lopd_store") == self._root.creation)
