"""A store in one folder: durable, appendable by several processes at once, readable by any Zarr v3 reader.

    root/zarr.json                      a Zarr v3 group; its attributes hold the manifest
    root/segments/<key>/<array>/        one group per append of rollouts
    root/scores/<column>/<key>/<array>/ one group per append of scores
    root/commits/<number>.json          which segments exist, in order; written last

A segment without a commit record does not exist; its bytes may be deleted when nobody is writing.
Rows are in the order of commits, then in the order of the call.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, final
from uuid import uuid4

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.backends.commit_log import CommitLog
from lopd.backends.zarr_root import StorePath, create_root, local_path, read_manifest, taken
from lopd.backends.zarr_segment import METADATA_FILE, make_group, write_segment
from lopd.backends.zarr_snapshot import Snapshot, rollout_arrays, score_arrays
from lopd.errors import CorruptStoreError, ManifestMismatchError, StoreExistsError, StoreWriteError
from lopd.manifest import Manifest, Provenance
from lopd.types import Rollout, ScoredRollout, Scores


@frozen(eq=False)
class _Draft:
    """Rows that are to be committed: what tells them from others, where they go, what the record says, and how to make the arrays."""

    ids: tuple[str, ...]
    parent: str
    record: Mapping[str, Any]
    arrays: Callable[[], Mapping[str, NDArray[Any]]]


@frozen(eq=False)
class _Written:
    ids: tuple[str, ...]
    folder: Path
    record: Mapping[str, Any]


@final
class ZarrStore:
    """A `LogprobStore` on a local disk; make one with `create`, `open` or `open_or_create`.

    A store sees the commits that were there when it was opened, last refreshed or last written to; `refresh` shows later ones.
    The virtual column `behavior` reads the rollouts' own `behavior_logprobs`; `columns` does not list it, and it cannot be written to.
    It pickles as its path and the number of commits it sees.  One thread at a time; processes as many as you like.
    """

    def __init__(self, path: Path, manifest: Manifest, commits: int | None) -> None:
        """Not for callers: it does not look whether a store is there."""
        # A relative path would change its meaning with the working directory.
        self._root = Path(path).absolute()
        self._owner = f"Store {path}"
        self._manifest = manifest
        self._log = CommitLog(self._root / "commits", self._owner)
        self._snapshot = Snapshot(self._root, self._owner)
        self._take_in(commits)

    def __repr__(self) -> str:
        """How messages name it."""
        return self._owner

    def __reduce__(self) -> tuple[Any, ...]:
        """Path and snapshot: memory maps do not travel to another process."""
        return ZarrStore, (self._root, self._manifest, self._snapshot.commits)

    @classmethod
    def create(cls, path: StorePath, manifest: Manifest) -> "ZarrStore":
        """A new, empty store in a folder that is empty or not there yet.

        Raises:
            StoreExistsError: a store, or anything else, is there.
            StorePathError: the path is not on a local disk.
            StoreWriteError: the write failed.
        """
        root = local_path(path)
        create_root(root, manifest)
        return cls(root, manifest, None)

    @classmethod
    def open(cls, path: StorePath, manifest: Manifest | None = None) -> "ZarrStore":
        """The store in this folder, with all commits that are there now.

        Args:
            path: its folder.
            manifest: what it must say; None takes whatever it says.

        Raises:
            StoreNotFoundError: no store is there.
            ManifestMismatchError: it says something else than `manifest`.
            CorruptStoreError: its manifest or commit log is damaged, or of another schema version.
        """
        root = local_path(path)
        stored = read_manifest(root)
        difference = None if manifest is None else stored.difference(manifest)
        if difference is not None:
            raise ManifestMismatchError(
                f"Store {root}: {difference}; open it with the manifest it was created with (or none), or create another store."
            )
        return cls(root, stored, None)

    @classmethod
    def open_or_create(cls, path: StorePath, manifest: Manifest) -> "ZarrStore":
        """The store in this folder if there is one with this manifest, a new one if there is nothing.

        Raises:
            ManifestMismatchError: a store with another manifest is there.
            StoreExistsError: something that is no store is there.
        """
        root = local_path(path)
        if not (root / METADATA_FILE).exists():
            # Somebody else may be creating it right now; then theirs is as good.
            with suppress(StoreExistsError):
                return cls.create(root, manifest)
        if not (root / METADATA_FILE).exists():
            raise taken(root)
        return cls.open(root, manifest)

    @property
    def manifest(self) -> Manifest:
        """What all rollouts have in common."""
        return self._manifest

    @property
    def columns(self) -> Mapping[str, Provenance]:
        """Score columns and who computed them."""
        return MappingProxyType(self._snapshot.provenances())

    def __len__(self) -> int:
        """Committed rollouts."""
        return len(self._snapshot.rows)

    def __contains__(self, rollout_id: object, /) -> bool:
        """Whether a rollout with this id is committed."""
        return rollout_id in self._snapshot.rows

    def lengths(self) -> NDArray[np.int64]:
        """(len, 2): prompt and response tokens of each rollout; reads no tokens."""
        return self._snapshot.lengths()

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """(len,): which rollouts have scores in this column; reads no scores."""
        return self._snapshot.scored(column)

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = ()) -> list[ScoredRollout]:
        """These rollouts with these columns, in the order asked."""
        return [self._snapshot.read(row, columns) for row in ragged.check_rows(self._owner, indices, len(self))]

    def refresh(self) -> None:
        """See what was committed since, by this process or others.

        Raises:
            CorruptStoreError: a later commit is damaged.
        """
        self._take_in(None)

    def _take_in(self, until: int | None) -> None:
        if until == self._snapshot.commits:
            return
        for record in self._log.records(self._snapshot.commits):
            self._snapshot.add(record)
            if self._snapshot.commits == until:
                return
        if until is not None:
            raise CorruptStoreError(
                f"{self._owner}: the commit log has {self._snapshot.commits} records, expected the {until} that this store saw when it was "
                "pickled; restore the missing ones from a backup."
            )

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts, durably; those already there are skipped.  Refreshes."""
        vocab_size = self._manifest.tokenizer.vocab_size

        def draft() -> _Draft:
            new = ragged.new_rollouts(self._owner, rollouts, vocab_size, self._find_hash)
            record = {"kind": "rollouts", "rows": len(new), "tokens": sum(map(len, new))}
            return _Draft(tuple(rollout.rollout_id for rollout in new), "segments", record, lambda: rollout_arrays(new, vocab_size))

        self._commit(draft)

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores, durably; rows already scored are skipped.  Refreshes."""
        ragged.check_column(self._owner, column)

        def draft() -> _Draft:
            ragged.check_provenance(self._owner, column, self._snapshot.provenances().get(column), provenance)
            new = ragged.new_scores(self._owner, scores, self._snapshot.find, partial(self._snapshot.is_scored, column))
            ids, rows = tuple(score.rollout_id for score in new), [self._snapshot.rows[score.rollout_id] for score in new]
            tokens = sum(score.logprobs.size for score in new)
            record = {"kind": "scores", "rows": len(new), "tokens": tokens, "column": column, "provenance": provenance.to_json()}
            return _Draft(ids, f"scores/{column}", record, lambda: score_arrays(new, rows))

        self._commit(draft)

    def _find_hash(self, rollout_id: str) -> bytes | None:
        found = self._snapshot.find(rollout_id)
        return None if found is None else found[0]

    def _commit(self, make_draft: Callable[[], _Draft]) -> None:
        """Commit what is new; when another process commits first, look again at what is new."""
        written: _Written | None = None
        while True:
            self.refresh()
            draft = make_draft()
            if written is not None and written.ids != draft.ids:
                shutil.rmtree(written.folder, ignore_errors=True)
                written = None
            if not draft.ids:
                # Another process may have committed these rows a moment ago, and not have flushed its record yet.
                return self._log.make_durable()
            written = written or self._write(draft)
            if self._publish(written):
                return self.refresh()

    def _write(self, draft: _Draft) -> _Written:
        folder = self._root / draft.parent / uuid4().hex
        try:
            for parent in reversed(Path(draft.parent).parents[:-1]):
                make_group(self._root / parent)
            make_group(folder.parent)
            checksums = write_segment(folder, draft.arrays(), draft.record)
        except OSError as error:
            raise self._refused(folder, error) from error
        return _Written(draft.ids, folder, {**draft.record, "segment": f"{draft.parent}/{folder.name}", "checksums": checksums})

    def _publish(self, written: _Written) -> bool:
        try:
            return self._log.commit(self._snapshot.commits, written.record)
        except StoreWriteError:
            # The record is there, only its durability is in doubt: its segment must stay.
            raise
        except OSError as error:
            raise self._refused(written.folder, error) from error

    def _refused(self, folder: Path, error: OSError) -> StoreWriteError:
        shutil.rmtree(folder, ignore_errors=True)
        return StoreWriteError(
            f"{self._owner}: the write failed with {error}, expected it to succeed; nothing of this call was committed, "
            "so free space or fix permissions and repeat it."
        )
