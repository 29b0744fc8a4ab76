"""What the durable stores share: how one is opened and made, what it is asked, and the loop by which anything is added.

A store has a snapshot, which holds what was there when it last looked, and a writer, which tries to take the next number.  If another
process took that number first, the store looks again at what is new, and tries again.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.backends.files import Files, StorageOptions, StorePath, names_in, open_files, prove
from lopd.backends.ragged import LogprobDtype
from lopd.backends.root import Root, RootFile, put_root, read_root, taken
from lopd.errors import ManifestMismatchError
from lopd.protocols.reading import describe
from lopd.records.glance import Glance, Glanced
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import Rollout, Scores
from lopd.records.rows import Rows


class _Snapshot(Protocol):
    """What a store holds, as it was at the last `refresh`; the methods are those of `LogprobReader`, `read` without virtual columns.

    `known` gives what `find` does, and content hash and response tokens of each that is there; `scored_rows` which of these rows have scores.
    """

    @property
    def rows(self) -> int: ...
    @property
    def generations(self) -> Mapping[int, ModelId]: ...
    def provenances(self) -> Mapping[str, Provenance]: ...
    def refresh(self) -> None: ...
    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]: ...
    def known(self, rollout_ids: Sequence[str], /) -> tuple[NDArray[np.int64], Sequence[tuple[bytes, int]]]: ...
    def lengths(self) -> NDArray[np.int64]: ...
    def scored_rows(self, column: str, rows: NDArray[np.int64], /) -> NDArray[np.bool_]: ...
    def quarantined(self, column: str, /) -> Mapping[int, str]: ...
    def read(self, rows: NDArray[np.int64], columns: Sequence[str], top_k: Sequence[str], /) -> Rows: ...


class _Writer(Protocol):
    """Tries to commit what is new since the last `refresh`.

    Each `add_` returns True once the addition is durable and the snapshot has it, and False where another process was quicker: nothing
    was committed then.  Rows ascend.  `end` records that the call is over, however it ended.  `settle` makes durable what is there already,
    as who committed it may not have flushed it yet; CorruptStoreError where it is gone.  Each raises StoreWriteError when the storage refuses.
    """

    def add_generation(self, generation: int, policy: ModelId, /) -> bool: ...
    def add_rollouts(self, rollouts: Sequence[Rollout], first_row: int, /) -> bool: ...
    def add_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], rows: Sequence[int], /) -> bool: ...
    def add_reasons(self, column: str, provenance: Provenance, reasons: Mapping[int, str], /) -> bool: ...
    def settle(self, column: str | None, /) -> None: ...
    def end(self) -> None: ...


S = TypeVar("S", bound=_Snapshot)
W = TypeVar("W", bound=_Writer)


class DurableBase(Glanced, ABC, Generic[S, W]):
    """The face of `ZarrStore` and `LanceStore`; not for other stores, which implement `lopd.protocols.DurableStore`."""

    _ROOT: ClassVar[RootFile]
    _snapshot: S
    _writer: W

    @abstractmethod
    def __init__(self, files: Files, root: Root | None = None) -> None:
        """Hold the files; `open` is what callers use, as it reports what is wrong with a path.  `root` is the root file's content, if it was read."""
        self._files = files
        self.name = self._owner = f"Store {files.url}"
        self._root = root or read_root(files, self._ROOT)

    def _glance(self) -> Glance:
        return describe(self, self._counts())

    @abstractmethod
    def _counts(self) -> Mapping[str, int]:
        """Return how many rollouts have scores in each column, out of memory."""

    def __bool__(self) -> bool:
        """Return True, also while it is empty: `if store` asks whether there is a store."""
        return True

    @classmethod
    def create(
        cls, path: StorePath, manifest: Manifest, *, logprob_dtype: LogprobDtype = "float32", storage_options: StorageOptions | None = None
    ) -> Self:
        """Return a new, empty store.

        Args:
            path: a folder that is empty or not there yet, or a URL such as `s3://bucket/run1`.
            manifest: what all rollouts will have in common.
            logprob_dtype: "float32", or "float16" for half the bytes: off by up to 2**-11 of a value, or 3e-8 nats where that is more, so that what
                is above -3e-8 becomes 0 (see `history`).  Labels are float32 in both.
            storage_options: credentials, endpoint and time limits; see `lopd.backends.files.cloud`.

        Raises:
            StoreExistsError: a store, or anything else, is there.
            StorePathError: nothing can be stored at such a path, or its storage lets writers lose data.
            StoreWriteError: the write failed.
            MissingDependencyError: the package for this kind of store or URL is not installed.
        """
        files, root = cls._place(path, storage_options), Root(manifest, logprob_dtype)
        names = names_in(files)
        if names or not put_root(files, cls._ROOT, root):
            raise taken(files, cls._ROOT, names)
        return cls(files, root)

    @classmethod
    def open(cls, path: StorePath, manifest: Manifest | None = None, *, storage_options: StorageOptions | None = None) -> Self:
        """Return the store that is there, with all commits that are there now.

        Args:
            path: its folder or URL.
            manifest: the manifest that it must have; None takes any.
            storage_options: see `create`.

        Raises:
            StoreNotFoundError: the store is not there.
            ManifestMismatchError: its manifest is not `manifest`.
            CorruptStoreError: its manifest, or what was committed, is damaged or of another schema version.
            StoreReadError: the storage does not answer.
        """
        return cls._found(cls._place(path, storage_options), manifest)

    @classmethod
    def open_or_create(
        cls, path: StorePath, manifest: Manifest, *, logprob_dtype: LogprobDtype = "float32", storage_options: StorageOptions | None = None
    ) -> Self:
        """Return the store that is there if it has this manifest, whatever its `logprob_dtype`; a new one if there is nothing.

        Raises:
            ManifestMismatchError: a store with another manifest is there.
            StoreExistsError: something that is not a store is there.
        """
        files, root = cls._place(path, storage_options), Root(manifest, logprob_dtype)
        names = names_in(files)
        if names and cls._ROOT.name not in names:
            raise taken(files, cls._ROOT, names)
        # Another process may be creating it right now; then its store is as good.
        return cls(files, root) if not names and put_root(files, cls._ROOT, root) else cls._found(files, manifest)

    @classmethod
    def _place(cls, path: StorePath, options: StorageOptions | None) -> Files:
        return open_files(path, options)

    @classmethod
    def _found(cls, files: Files, manifest: Manifest | None) -> Self:
        root = read_root(files, cls._ROOT)
        if manifest is not None and (difference := root.manifest.difference(manifest)) is not None:
            raise ManifestMismatchError(
                f"Store {files.url}: {difference}; sample with the settings of this store, or create another (`open_store` opens it as it is)."
            )
        return cls(files, root)

    @property
    def _proven_writer(self) -> W:
        """What changes the store, once its storage has shown that this is safe."""
        prove(self._files)
        return self._writer

    @property
    def manifest(self) -> Manifest:
        """What all rollouts have in common."""
        return self._root.manifest

    @property
    def columns(self) -> Mapping[str, Provenance]:
        """Score columns and who computed them."""
        return MappingProxyType(dict(self._snapshot.provenances()))

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Rounds of sampling, and the policy of each."""
        return MappingProxyType(dict(self._snapshot.generations))

    def __len__(self) -> int:
        return self._snapshot.rows

    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]:
        """Return (n,): rows of rollouts, -1 for one that is not there; the first call reads the hashed id of each rollout."""
        return self._snapshot.find(rollout_ids)

    def lengths(self) -> NDArray[np.int64]:
        """Return (len, 2): prompt and response tokens of each rollout; reads no tokens."""
        return self._snapshot.lengths()

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """Return (len,): which rollouts have scores in this column; reads no scores."""
        return self._snapshot.scored_rows(column, np.arange(len(self)))

    def quarantined(self, column: str, /) -> Mapping[int, str]:
        """Return rows that the column's model could not score, and why."""
        return self._snapshot.quarantined(column)

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Rows:
        """Return these rollouts with these columns, in the order asked; fetches the values of these rows and no others, and verifies them."""
        rows, provenances = admission.check_rows(self._owner, indices, len(self)), self._snapshot.provenances()
        columns, top_k, names = admission.check_asked(self._owner, columns, top_k, provenances)
        return admission.with_columns(self._owner, self._snapshot.read(rows, names, top_k), columns, provenances)

    def refresh(self) -> None:
        """See what was committed since, by this process or others.

        Raises:
            CorruptStoreError: what was committed is damaged.
            StoreReadError: the storage does not answer.
        """
        self._snapshot.refresh()

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        """Say, durably, which policy samples in another round.  Refreshes."""
        while True:
            self.refresh()
            known = self.generations.get(generation)
            admission.check_generation(self._owner, generation, known, policy)
            if known is not None:
                return self._writer.settle(None)
            if self._proven_writer.add_generation(generation, policy):
                return None

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts, durably; those already there are skipped.  Refreshes."""
        rollouts = admission.listed(self._owner, rollouts, Rollout)
        ids, vocab_size = [rollout.rollout_id for rollout in rollouts], self.manifest.tokenizer.vocab_size
        try:
            while True:
                self.refresh()
                known = {name: content for name, (content, _) in self._known(ids)[1].items()}
                new = admission.new_rollouts(self._owner, rollouts, vocab_size=vocab_size, generations=self.generations, known=known)
                if not new:
                    return (self._writer if rollouts else self._proven_writer).settle(None)
                if self._proven_writer.add_rollouts(new, len(self)):
                    return None
        finally:
            self._writer.end()

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores, durably; rows already scored are skipped.  Refreshes."""
        scores = admission.listed(self._owner, scores, Scores)
        try:
            while True:
                self.refresh()
                new = self._new_scores(column, provenance, scores)
                if not new:
                    return self._writer.settle(column)
                if self._proven_writer.add_scores(column, provenance, list(new.values()), list(new)):
                    return None
        finally:
            self._writer.end()

    def _new_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores]) -> dict[int, Scores]:
        """Return the new scores by row, in ascending order."""
        admission.check_provenance(self._owner, column, self.columns, provenance)
        ids = [score.rollout_id for score in scores]
        found, known = self._known(ids)
        rows, done = dict(zip(ids, found.tolist(), strict=True)), self._done(column, found)
        new = admission.new_scores(
            self._owner,
            scores,
            provenance=provenance,
            vocab_size=self.manifest.tokenizer.vocab_size,
            known=known,
            done={name for name, row in rows.items() if row in done},
        )
        return {rows[score.rollout_id]: score for score in sorted(new, key=lambda score: rows[score.rollout_id])}

    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        """Say, durably, which rollouts this model cannot score, and why.  Refreshes."""
        while True:
            self.refresh()
            admission.check_provenance(self._owner, column, self.columns, provenance)
            rows, known = self.find(list(reasons)), self.quarantined(column)
            new = admission.new_quarantine(self._owner, reasons, rows=rows.tolist(), done=self._done(column, rows), known=known)
            if not new:
                return self._writer.settle(column)
            if self._proven_writer.add_reasons(column, provenance, new):
                return None

    def _done(self, column: str, rows: NDArray[np.int64]) -> set[int]:
        """Return those of these rows (-1: not there) that have scores."""
        there = rows[rows >= 0]
        return set(there[self._snapshot.scored_rows(column, there)].tolist())

    def _known(self, rollout_ids: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, tuple[bytes, int]]]:
        """Return rows (-1: not there), and content hash and response tokens of those of these rollouts that are committed."""
        rows, contents = self._snapshot.known(rollout_ids)
        return rows, {rollout_ids[i]: content for i, content in zip(np.flatnonzero(rows >= 0).tolist(), contents, strict=True)}
