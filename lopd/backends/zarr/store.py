"""A store on a local disk or in a bucket: durable, appendable by several processes at once, readable by any Zarr v3 reader.

    zarr.json                      a Zarr v3 group; its attributes hold the manifest
    segments/<key>/<array>/        one group per append of rollouts
    scores/<column>/<key>/<array>/ one group per append of scores
    commits/<number>.json          which segments exist, in order; written last
    checkpoints/<number>.json      what the commits up to a number add up to

A segment that no commit record names does not exist.  Rows are in the order of commits, then in the order of the call.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.backends.files import Files, StorageOptions, StorePath, names_in, open_files
from lopd.backends.ragged import LogprobDtype
from lopd.backends.zarr import encode, verify
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.format import METADATA_FILE
from lopd.backends.zarr.root import StorageTypes, create_root, read_root, taken
from lopd.backends.zarr.snapshot import Snapshot
from lopd.backends.zarr.writer import Draft, Writer
from lopd.errors import ManifestMismatchError, StoreExistsError
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.rollouts import Rollout, RolloutArrays, ScoredRollout, Scores


@final
class ZarrStore:
    """A `DurableStore` of raw Zarr v3 segments; make one with `create`, `open` or `open_or_create`.

    A store sees the commits that were there when it was opened, last refreshed or last written to; `refresh` shows later ones.
    The virtual column `behavior` reads the rollouts' own `behavior_logprobs`; `columns` does not list it, and it cannot be written to.
    It pickles as its place and the number of commits it sees.  One thread at a time; processes as many as you like.
    On a local disk it survives a fork; in a bucket, a forked process is refused (start workers with "spawn" or "forkserver").
    """

    def __init__(self, files: Files, commits: int | None = None) -> None:
        """Not for callers: `open` says what is wrong with a path."""
        self._files = files
        self._owner = f"Store {files.url}"
        self._manifest, self._storage = read_root(files)
        self._log = CommitLog(files, self._owner)
        self._snapshot = Snapshot(files, self._manifest, self._owner)
        self._writer = Writer(files, self._log, self._snapshot, self._storage, owner=self._owner)
        self._load(commits)

    def __repr__(self) -> str:
        """How messages name it."""
        return self._owner

    def __reduce__(self) -> tuple[Any, ...]:
        """Place and snapshot: memory maps and connections do not travel to another process."""
        return ZarrStore, (self._files, self._snapshot.commits)

    @classmethod
    def create(
        cls,
        path: StorePath,
        manifest: Manifest,
        *,
        logprob_dtype: LogprobDtype = "float32",
        storage_options: StorageOptions | None = None,
    ) -> "ZarrStore":
        """A new, empty store.

        Args:
            path: a folder that is empty or not there yet, or a URL such as `s3://bucket/run1.zarr`.
            manifest: what all rollouts will have in common.
            logprob_dtype: "float32", or "float16" for half the bytes (see `StorageTypes`).
            storage_options: credentials, endpoint and time limits; see `lopd.backends.files.cloud`.

        Raises:
            StoreExistsError: a store, or anything else, is there.
            StorePathError: nothing can be stored at such a path.
            StoreWriteError: the write failed.
        """
        files = open_files(path, storage_options)
        create_root(files, manifest, StorageTypes(logprob_dtype))
        return cls(files)

    @classmethod
    def open(cls, path: StorePath, manifest: Manifest | None = None, *, storage_options: StorageOptions | None = None) -> "ZarrStore":
        """The store that is there, with all commits that are there now.

        Args:
            path: its folder or URL.
            manifest: what it must say; None takes whatever it says.
            storage_options: see `create`.

        Raises:
            StoreNotFoundError: no store is there.
            ManifestMismatchError: it says something else than `manifest`.
            CorruptStoreError: its manifest or commit log is damaged, or of another schema version.
            StoreReadError: the storage does not answer.
        """
        store = cls(open_files(path, storage_options))
        difference = None if manifest is None else store.manifest.difference(manifest)
        if difference is not None:
            raise ManifestMismatchError(
                f"{store!r}: {difference}; open it with the manifest it was created with (or none), or create another store."
            )
        return store

    @classmethod
    def open_or_create(
        cls,
        path: StorePath,
        manifest: Manifest,
        *,
        logprob_dtype: LogprobDtype = "float32",
        storage_options: StorageOptions | None = None,
    ) -> "ZarrStore":
        """The store that is there if it has this manifest, a new one if there is nothing.

        Raises:
            ManifestMismatchError: a store with another manifest is there.
            StoreExistsError: something that is no store is there.
        """
        files = open_files(path, storage_options)
        if METADATA_FILE not in names_in(files):
            # Somebody else may be creating it right now; then theirs is as good.
            with suppress(StoreExistsError):
                return cls.create(path, manifest, logprob_dtype=logprob_dtype, storage_options=storage_options)
        if METADATA_FILE not in names_in(files):
            raise taken(files)
        return cls.open(path, manifest, storage_options=storage_options)

    @property
    def manifest(self) -> Manifest:
        """What all rollouts have in common."""
        return self._manifest

    @property
    def columns(self) -> Mapping[str, Provenance]:
        """Score columns and who computed them."""
        return MappingProxyType(self._snapshot.provenances())

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Rounds of sampling, and the policy of each."""
        return MappingProxyType(dict(self._snapshot.generations))

    def __len__(self) -> int:
        """Committed rollouts."""
        return self._snapshot.rows

    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]:
        """Rows of rollouts, -1 where there is none; 24 bytes of memory a rollout from the first call on."""
        return self._snapshot.find(rollout_ids)

    def lengths(self) -> NDArray[np.int64]:
        """(len, 2): prompt and response tokens of each rollout; reads no tokens."""
        return self._snapshot.lengths()

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """(len,): which rollouts have scores in this column; reads no scores."""
        return self._snapshot.scored(column)

    def quarantined(self, column: str, /) -> Mapping[int, str]:
        """Rows that the column's model could not score, and why."""
        return self._snapshot.quarantined(column)

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> list[ScoredRollout]:
        """These rollouts with these columns, in the order asked; fetches and verifies these rows and no others."""
        rows = np.array(ragged.check_rows(self._owner, indices, len(self)), np.int64)
        return self._snapshot.read(rows, columns, top_k)

    def read_arrays(self, indices: Sequence[int], /, columns: Sequence[str] = ()) -> RolloutArrays:
        """The same rows end to end, several times faster than one by one; neighbours on a local disk are not even copied.

        Raises as `read` does.
        """
        return self._snapshot.read_arrays(np.array(ragged.check_rows(self._owner, indices, len(self)), np.int64), columns)

    def refresh(self) -> None:
        """See what was committed since, by this process or others.

        Raises:
            CorruptStoreError: a later commit is damaged.
            StoreReadError: the storage does not answer.
        """
        self._writer.refresh()

    def _load(self, until: int | None) -> None:
        checkpoint = self._log.checkpoint(until)
        if checkpoint is not None:
            self._snapshot.load(checkpoint)
        for record in self._log.records(self._snapshot.commits, until):
            self._snapshot.add(record)

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        """Say, durably, which policy samples in another round.  Refreshes."""
        self._writer.begin_generation(generation, policy)

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts, durably; those already there are skipped.  Refreshes."""
        self._writer.commit(partial(self._draft_rollouts, rollouts))

    def _draft_rollouts(self, rollouts: Sequence[Rollout]) -> Draft:
        vocab_size, first_row = self._manifest.tokenizer.vocab_size, len(self)
        names = [rollout.rollout_id for rollout in rollouts]
        known = {name: content for name, (content, _) in self._known(names, self.find(names)).items()}
        new = ragged.new_rollouts(self._owner, rollouts, vocab_size=vocab_size, generations=self._snapshot.generations, known=known)
        make_segment = partial(encode.encode_rollouts, new, first_row, vocab_size, self._storage.logprob_dtype)
        ids = tuple(rollout.rollout_id for rollout in new)
        return Draft(ids, "segments", {"kind": "rollouts"}, range(first_row, first_row + len(new)), make_segment)

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores, durably; rows already scored are skipped.  Refreshes."""
        ragged.check_column(self._owner, column)
        self._writer.commit(partial(self._draft_scores, column, provenance, scores))

    def _draft_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores]) -> Draft:
        ragged.check_provenance(self._owner, column, self._snapshot.provenances().get(column), provenance)
        ids = [score.rollout_id for score in scores]
        found, scored = self.find(ids), self.scored(column)
        places = dict(zip(ids, found.tolist(), strict=True))
        new = ragged.new_scores(
            self._owner,
            scores,
            provenance=provenance,
            vocab_size=self._manifest.tokenizer.vocab_size,
            known=self._known(ids, found),
            done={name for name, row in places.items() if row >= 0 and scored[row]},
        )
        new.sort(key=lambda score: places[score.rollout_id])
        rows = [places[score.rollout_id] for score in new]
        make_segment = partial(encode.encode_scores, new, rows, self._manifest.tokenizer.vocab_size, self._storage.logprob_dtype)
        record = {"kind": "scores", "column": column, "provenance": provenance.to_json()}
        return Draft(tuple(score.rollout_id for score in new), f"scores/{column}", record, rows, make_segment)

    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        """Say, durably, which rollouts this model cannot score, and why.  Refreshes."""
        ragged.check_column(self._owner, column)
        self._writer.quarantine(column, provenance, partial(self._new_quarantine, column, provenance, reasons))

    def _new_quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str]) -> dict[int, str]:
        ragged.check_provenance(self._owner, column, self.columns.get(column), provenance)
        rows, known = self.find(list(reasons)).tolist(), self.quarantined(column)
        return ragged.new_quarantine(self._owner, reasons, rows=rows, scored=self.scored(column), known=known)

    def _known(self, rollout_ids: Sequence[str], rows: NDArray[np.int64]) -> dict[str, tuple[bytes, int]]:
        """Content hash and response tokens of those of these rollouts that are committed, in these rows (-1: not)."""
        there = np.flatnonzero(rows >= 0)
        contents = self._snapshot.content(rows[there])
        return {rollout_ids[i]: content for i, content in zip(there.tolist(), contents, strict=True)}

    def compact(self, *, target_tokens: int = 1 << 24) -> None:
        """Merge small segments into ones of about `target_tokens`; rows keep their numbers, and open readers read on.  Refreshes.

        Nothing is removed: `sweep` does that once no reader can need the old segments any more.  Compactions may run beside appends and
        beside each other; of two that want the same segments, one wins and the other looks again.

        Raises:
            CorruptStoreError: a line that would be moved is damaged; nothing of its merge was committed.
            StoreWriteError: the write failed; merges before it are kept.
        """
        self._writer.compact(target_tokens)

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
        return verify.problems(self._files, self._log, self._snapshot)
