"""A store on LanceDB: tables that its tools can query, versions, and several writers at once, on a local disk or in a bucket.

    lopd.json, rollouts.json, columns/*.json, ...   what the store is, and which table holds what (see `lance_catalog`)
    rollouts-<key>.lance                            one row a rollout
    scores.<column>-<key>.lance                     one row a rollout that is scored

Rows are in the order of commits, then in the order of the call; each row carries its number, its commit, and checksums of its bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.backends.files import Files, StorageOptions, StorePath, local_folder, names_in, open_files
from lopd.backends.lance import encode, verify
from lopd.backends.lance.catalog import ROOT_FILE, Catalog, CatalogState, create_root, read_root, taken
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.table import Database
from lopd.backends.lance.writer import Draft, Writer
from lopd.backends.ragged import LogprobDtype
from lopd.errors import ManifestMismatchError, MissingScoresError, StoreExistsError, StorePathError
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.rollouts import Rollout, Scores
from lopd.records.rows import Rows

_WEEK = 7 * 24 * 3600.0
_SCHEMES = ("s3", "gs", "az", "abfss")


def _place(path: StorePath, options: StorageOptions | None) -> tuple[Files, Database]:
    files = open_files(path, options)
    scheme, separator, _ = files.url.partition("://")
    if separator and scheme not in _SCHEMES:
        raise StorePathError(
            f"Store {files.url}: LanceDB cannot store there, expected a local path, or a URL of {', '.join(_SCHEMES)}; choose another place."
        )
    return files, Database(files.url, options or {})


@final
class LanceStore:
    """A `DurableStore` of LanceDB tables; make one with `create`, `open` or `open_or_create`.  It needs `pip install 'lopd[lance]'`.

    A store sees the versions that were there when it was opened, last refreshed or last written to; `refresh` shows later ones.
    The virtual column `behavior` reads the rollouts' own `behavior_logprobs`; `columns` does not list it, and it cannot be written to.
    It pickles as its place and versions.  One thread at a time; processes as many as you like, but LanceDB does not survive a fork: a
    forked process is refused (start workers with "spawn" or "forkserver").
    Each commit costs about 70 kB of LanceDB's bookkeeping until `compact` removes it: append hundreds of rollouts at once.
    On a local disk a commit is flushed before its call returns.  LanceDB itself flushes nothing, so a power cut in the middle of a
    commit may leave a last version that cannot be read; what was returned before is whole in the versions before it.
    """

    def __init__(self, files: Files, database: Database, seen: tuple[CatalogState, Mapping[str, int]] | None = None) -> None:
        """Not for callers: `open` says what is wrong with a path."""
        self._files, self._database, self._owner = files, database, database.owner
        self._manifest, self._logprob_dtype = read_root(files)
        state, versions = seen or (CatalogState(generations={self._manifest.generation: self._manifest.policy}), {})
        self._catalog = Catalog(files, state)
        if seen is None:
            self._catalog.refresh()
        self._snapshot = Snapshot(database, self._catalog, versions)
        self._writer = Writer(files, database, self._catalog, self._snapshot, local_folder(files.url))

    def __repr__(self) -> str:
        """How messages name it."""
        return self._owner

    def __reduce__(self) -> tuple[Any, ...]:
        """Place and versions: connections do not travel to another process."""
        return LanceStore, (self._files, self._database, (self._catalog.state, self._snapshot.versions()))

    @classmethod
    def create(
        cls, path: StorePath, manifest: Manifest, *, logprob_dtype: LogprobDtype = "float32", storage_options: StorageOptions | None = None
    ) -> "LanceStore":
        """A new, empty store.

        Args:
            path: a folder that is empty or not there yet, or a URL such as `s3://bucket/run1.lance`.
            manifest: what all rollouts will have in common.
            logprob_dtype: "float32", or "float16" for half the bytes (a relative error of 2**-11; `history` says the largest of each commit).
            storage_options: of LanceDB: `aws_endpoint`, `aws_access_key_id`, `aws_secret_access_key`, `aws_region`, `allow_http`, ...

        Raises:
            MissingDependencyError: LanceDB is not installed.
            StoreExistsError: a store, or anything else, is there.
            StorePathError: nothing can be stored at such a path.
            StoreWriteError: the write failed.
        """
        files, database = _place(path, storage_options)
        create_root(files, manifest, logprob_dtype)
        return cls(files, database)

    @classmethod
    def open(cls, path: StorePath, manifest: Manifest | None = None, *, storage_options: StorageOptions | None = None) -> "LanceStore":
        """The store that is there, with all commits that are there now.

        Args:
            path: its folder or URL.
            manifest: what it must say; None takes whatever it says.
            storage_options: see `create`.

        Raises:
            StoreNotFoundError: no store is there.
            ManifestMismatchError: it says something else than `manifest`.
            CorruptStoreError: its manifest or a table is damaged, or of another schema version.
            StoreReadError: the storage does not answer.
        """
        store = cls(*_place(path, storage_options))
        difference = None if manifest is None else store.manifest.difference(manifest)
        if difference is not None:
            raise ManifestMismatchError(
                f"{store!r}: {difference}; open it with the manifest it was created with (or none), or create another store."
            )
        return store

    @classmethod
    def open_or_create(
        cls, path: StorePath, manifest: Manifest, *, logprob_dtype: LogprobDtype = "float32", storage_options: StorageOptions | None = None
    ) -> "LanceStore":
        """The store that is there if it has this manifest, a new one if there is nothing.

        Raises:
            ManifestMismatchError: a store with another manifest is there.
            StoreExistsError: something that is no store is there.
        """
        files, _ = _place(path, storage_options)
        if ROOT_FILE not in names_in(files):
            # Somebody else may be creating it right now; then theirs is as good.
            with suppress(StoreExistsError):
                return cls.create(path, manifest, logprob_dtype=logprob_dtype, storage_options=storage_options)
        if ROOT_FILE not in names_in(files):
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
        return MappingProxyType(dict(self._catalog.state.generations))

    def __len__(self) -> int:
        """Committed rollouts."""
        return self._snapshot.rows

    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]:
        """Rows of rollouts, -1 where there is none; reads all lines at the first call, and holds them from then on (about 130 bytes a rollout)."""
        return self._snapshot.find(rollout_ids)

    def lengths(self) -> NDArray[np.int64]:
        """(len, 2): prompt and response tokens of each rollout; reads no tokens."""
        lines = self._snapshot.lines()
        return np.stack([lines["prompt_length"], lines["response_length"]], axis=1).astype(np.int64)

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """(len,): which rollouts have scores in this column; reads no scores."""
        return self._snapshot.scored(column)

    def quarantined(self, column: str, /) -> Mapping[int, str]:
        """Rows that the column's model could not score, and why."""
        return self._snapshot.quarantined(column)

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Rows:
        """These rollouts with these columns, in the order asked; fetches and verifies these rows, and of columns also all lines, once."""
        rows = np.array(ragged.check_rows(self._owner, indices, len(self)), np.int64)
        return self._snapshot.read(rows, columns, top_k)

    def table(self, column: str | None = None) -> Any:
        """LanceDB's own table of the rollouts, or of the scores in a column, for its queries; it takes no writes.

        It is at the version that this store sees.  Its `row` is the row of the store, by which the tables join; `rollout_id` is UTF-8 in bytes,
        so a filter reads `CAST(rollout_id AS STRING) LIKE 'sums/%'`.

        Raises:
            MissingScoresError: no such column, or nothing was appended yet.
        """
        part = self._snapshot.parts().get(column)
        if part is None:
            what = "rollouts" if column is None else f"column {column!r}"
            raise MissingScoresError(f"{self!r}: there is no table of {what}, expected one; append some first.")
        return self._database.for_queries(part.table)

    def refresh(self) -> None:
        """See what was committed since, by this process or others.

        Raises:
            CorruptStoreError: what was committed is damaged.
            StoreReadError: the storage does not answer.
        """
        self._snapshot.refresh()

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        """Say, durably, which policy samples in another round.  Refreshes."""
        self._writer.begin_generation(generation, policy)

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts, durably; those already there are skipped.  Refreshes."""
        self._writer.commit(None, None, partial(self._draft_rollouts, rollouts))

    def _draft_rollouts(self, rollouts: Sequence[Rollout]) -> Draft | None:
        known = {name: content for name, (content, _) in self._known([rollout.rollout_id for rollout in rollouts]).items()}
        vocab_size = self._manifest.tokenizer.vocab_size
        new = ragged.new_rollouts(self._owner, rollouts, vocab_size=vocab_size, generations=self.generations, known=known)
        first_row = len(self)
        return partial(encode.encode_rollouts, new, first_row, vocab_size, self._logprob_dtype) if new else None

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores, durably; rows already scored are skipped.  Refreshes."""
        ragged.check_column(self._owner, column)
        self._writer.commit(column, provenance, partial(self._draft_scores, column, provenance, scores))

    def _draft_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores]) -> Draft | None:
        ragged.check_provenance(self._owner, column, self.columns.get(column), provenance)
        ids, vocab_size = [score.rollout_id for score in scores], self._manifest.tokenizer.vocab_size
        places, scored = dict(zip(ids, self.find(ids).tolist(), strict=True)), self.scored(column)
        new = ragged.new_scores(
            self._owner,
            scores,
            provenance=provenance,
            vocab_size=vocab_size,
            known=self._known(ids),
            done={name for name, row in places.items() if row >= 0 and scored[row]},
        )
        new.sort(key=lambda score: places[score.rollout_id])
        rows = [places[score.rollout_id] for score in new]
        return partial(encode.encode_scores, new, rows, vocab_size, self._logprob_dtype) if new else None

    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        """Say, durably, which rollouts this model cannot score, and why.  Refreshes."""
        ragged.check_column(self._owner, column)
        vocab_size = self._manifest.tokenizer.vocab_size
        empty = partial(encode.no_scores, provenance, vocab_size, self._logprob_dtype)
        self._writer.quarantine(column, provenance, empty, partial(self._new_quarantine, column, provenance, reasons))

    def _new_quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str]) -> dict[int, str]:
        ragged.check_provenance(self._owner, column, self.columns.get(column), provenance)
        rows, known = self.find(list(reasons)).tolist(), self.quarantined(column)
        return ragged.new_quarantine(self._owner, reasons, rows=rows, scored=self.scored(column), known=known)

    def _known(self, rollout_ids: Sequence[str]) -> dict[str, tuple[bytes, int]]:
        """Content hash and response tokens of those of these rollouts that are committed."""
        rows = self._snapshot.find(rollout_ids)
        there = np.flatnonzero(rows >= 0)
        lines = self._snapshot.lines()[rows[there]]
        contents = zip(lines["content_hash"].tolist(), lines["response_length"].tolist(), strict=True)
        return {rollout_ids[i]: content for i, content in zip(there.tolist(), contents, strict=True)}

    def compact(self, *, older_than: float = _WEEK) -> None:
        """Merge many small files into large ones; rows keep their numbers.  Refreshes.

        Versions, and tables that killed writers left behind, are removed if they are older than this many seconds: choose a time that no
        reader and no pickled store lives, for they read on only as long as their version is there.

        Raises:
            StoreWriteError: the write failed; nothing was lost.
        """
        self._writer.compact(older_than)

    def history(self) -> Sequence[Commit]:
        """What was committed up to this store's snapshot, by the clocks of the writers, oldest first."""
        return self._snapshot.history()

    def stored_bytes(self) -> int:
        """Bytes of the data files that the current versions are made of, without LanceDB's own bookkeeping."""
        return sum(part.table.stored_bytes() for part in self._snapshot.parts().values())

    def verify(self) -> Iterator[str]:
        """One sentence for each problem found; reads every row of the current versions, and the catalog."""
        return verify.problems(self._catalog, self._snapshot)
