"""LanceDB behind one door: its import, its forks, small caches, and its errors in our words.

A row of a table carries the number of the commit that added it, and that column is declared the table's key.  So adding rows is a race for
a number, which Lance decides: of two writers that add commit 7 at once, one adds all of its rows and the other none.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.files import Files, T
from lopd.backends.fork import ForkGuard
from lopd.backends.retry import repeat
from lopd.errors import CorruptStoreError, LopdError, StorePathError, StoreReadError
from lopd.records.optional import need

#: The column that says which commit added a row, and what makes Lance let only one writer have a number.
COMMIT = "commit"
#: How tables of columns are named in which nothing was scored when they were made.
BEGAN_EMPTY = "unscored."
#: Columns that a table of rollouts gets when the first rollout with `sampler_logprobs` comes; other rows have nulls in them.
HAS_SAMPLER = "has_sampler"
LATER = (HAS_SAMPLER, "sampler_logprobs")
KEY_METADATA = {"lance-schema:unenforced-primary-key": "true"}

# Lance 2.0 files are read nearly twice as fast as those of its default format, and take 1.15 times the space.
_FILE_FORMAT = {"new_table_data_storage_version": "2.0", "new_table_enable_v2_manifest_paths": "true"}
# Left alone, the caches of one table grow to seven gigabytes.
_INDEX_CACHE, _METADATA_CACHE = 16 << 20, 64 << 20
_CONFLICTS = ("commit conflict", "was preempted", "incompatible transaction", "contention", "too many concurrent writers")
_NETWORK = ("Generic S3 error", "Generic GCS error", "Generic MicrosoftAzure error", "error sending request", "timed out")
#: So many neighbours are read on; fewer are looked up one by one.
RANGE = 512
_FETCHES = 2
#: How long a call that meets other writers goes on; see `repeat`.
PATIENCE: dict[str, float] = {"seconds": 60.0, "pause": 0.02, "longest": 0.1}
_SCHEMES = ("s3", "gs", "az", "abfss")
_GUARD = ForkGuard("LanceDB")


def _lancedb(owner: str) -> Any:
    """The package, in a process that may use it.

    Raises:
        MissingDependencyError: it is not installed.
        ForkedStoreError: this process was forked from one that used it.
    """
    lancedb = need("lancedb", owner, "lance")
    _GUARD.check(owner)
    return lancedb


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns what Lance raises while it reads into errors of ours."""
    try:
        yield
    except LopdError:
        raise
    except BaseException as error:
        if not is_lance_error(error):
            raise
        said = first_line(error)
        if any(words in said for words in _NETWORK):
            raise StoreReadError(
                f"{what}: reading it failed with {said!r}, expected the storage to answer; check it and try again."
            ) from error
        raise CorruptStoreError(
            f"{what}: LanceDB cannot read it ({said!r}), expected whole files; restore them from a backup, or reopen the store "
            "if they are of a version that a compaction has removed."
        ) from error


def first_line(error: BaseException) -> str:
    """The gist of what Lance says; the rest is a stack of Rust."""
    return str(error).split("\n", 1)[0].split(", /", 1)[0][:300]


def is_lance_error(error: BaseException) -> bool:
    """Whether LanceDB may have raised it; a panic of its Rust code is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_conflict(error: BaseException) -> bool:
    """Whether a write failed because another one came first."""
    return any(word in str(error).lower() for word in _CONFLICTS)


@final
class Database:
    """The LanceDB database of one store.

    Args:
        files: of the store; LanceDB takes their place and their options, credentials among them.

    Raises:
        StorePathError: LanceDB cannot store there.
        MissingDependencyError: LanceDB is not installed.
    """

    def __init__(self, files: Files) -> None:
        """Connects at the first call: connecting makes a folder."""
        self.url, self.owner = files.url, f"Store {files.url}"
        scheme, separator, _ = self.url.partition("://")
        if separator and scheme not in _SCHEMES:
            raise StorePathError(
                f"{self.owner}: LanceDB cannot store there, expected a local path, or a URL of {', '.join(_SCHEMES)}; choose another place."
            )
        self._options = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in files.options.items()}
        self._connection: Any = None
        _lancedb(self.owner)

    @property
    def connection(self) -> Any:
        """LanceDB's own, for a process that may use it."""
        lancedb = _lancedb(self.owner)
        if self._connection is None:
            session = lancedb.Session(index_cache_size_bytes=_INDEX_CACHE, metadata_cache_size_bytes=_METADATA_CACHE)
            self._connection = lancedb.connect(self.url, storage_options={**self._options, **_FILE_FORMAT}, session=session)
        return self._connection

    def open(self, name: str, version: int | None = None) -> "LanceTable":
        """A table at this version, or as it is now."""
        with _reading(f"{self.owner}: table {name!r}"):
            return LanceTable(self, name, self.handle(name, version))

    def handle(self, name: str, version: int | None) -> Any:
        """LanceDB's own handle of a table; one that stands at a version takes no writes."""
        with _reading(f"{self.owner}: table {name!r}"):
            handle = self.connection.open_table(name)
            if version is not None:
                handle.checkout(version)
            return handle

    def create(self, name: str, data: Any) -> "LanceTable":
        """A new table.  The name must be nobody else's: LanceDB lets several creators of one table win."""
        return LanceTable(self, name, self.connection.create_table(name, data))

    def drop(self, name: str) -> None:
        """Remove a table that nobody else knows of, if the storage lets us: it is in nobody's way."""
        with suppress(Exception):
            self.connection.drop_table(name)


@final
class LanceTable:
    """One table at one version, which only `refresh`, `insert` and `compact` move.

    Args:
        database: that it is in.   name: in it.   handle: LanceDB's own.
    """

    def __init__(self, database: Database, name: str, handle: Any) -> None:
        """Reads how many rows there are."""
        self._database = database
        self.name = name
        self._handle = handle
        self._load()

    def _load(self) -> None:
        self.version, self.rows = int(self._handle.version), int(self._handle.count_rows())
        self.columns = frozenset(self._handle.schema.names)
        if not self.rows and not self.name.startswith(BEGAN_EMPTY):
            # It was made with rows in it, and none is ever removed: only damage to its manifest looks like this.
            raise CorruptStoreError(f"{self._named()}: it has no rows, expected at least 1; restore its files from a backup.")

    @property
    def _table(self) -> Any:
        _lancedb(self._database.owner)
        return self._handle

    def _named(self) -> str:
        return f"{self._database.owner}: table {self.name!r}"

    def refresh(self) -> None:
        """Move to the latest version."""
        with _reading(self._named()):
            self._table.checkout_latest()
            self._load()

    def is_behind(self) -> bool:
        """Whether there is a later version than the one that the last call found: what failed there may succeed now."""
        before = self.version
        self.refresh()
        return self.version > before

    def take(self, offsets: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """These columns of the rows at these places, which must be distinct and ascending, as an Arrow table in an order of Lance's choice.

        Columns of `LATER` that the table does not have are left out.
        """
        with _reading(self._named()):
            table, names = self._table, [name for name in columns if name in self.columns or name not in LATER]
            if offsets.size >= RANGE and offsets[-1] - offsets[0] == offsets.size - 1:
                # One batch: several would be copied to make one of them.
                query = table.search().select(names).offset(int(offsets[0])).limit(offsets.size)
                found = query.to_batches(offsets.size).read_all().combine_chunks()
            else:
                found = table.take_offsets(offsets.tolist()).select(names).to_arrow().combine_chunks()
            found.validate(full=True)
        if len(found) != offsets.size:
            raise CorruptStoreError(
                f"{self._named()}: {len(found)} rows were read, expected {offsets.size}; restore its files from a backup."
            )
        return found

    def insert(self, data: Any) -> bool:
        """Add rows of one commit, unless that number is taken: all or none of them.  Moves to the latest version either way.

        Columns that the table does not have yet are added first, empty.
        """
        table = self._table
        try:
            table.checkout_latest()
            new = [field for field in data.schema if field.name not in table.schema.names]
            if new:
                table.add_columns(data.select([field.name for field in new]).schema)
            return bool(table.merge_insert(COMMIT).when_not_matched_insert_all().execute(data).num_inserted_rows)
        finally:
            self._load()

    def take_back(self, count: int) -> int:
        """Remove the last rows of this version, whatever their files hold and whoever has written since; gives how many were removed.

        Moves to the latest version.
        """
        ids = self._row_ids()[-count:]
        try:
            # Row ids are computed: nothing of a broken file is read.
            return repeat(partial(self._delete, f"_rowid >= {ids.min()} AND _rowid <= {ids.max()}"), is_conflict, **PATIENCE)
        finally:
            self._load()

    def _delete(self, condition: str) -> int:
        self._table.checkout_latest()
        return int(self._table.delete(condition).num_deleted_rows)

    def _row_ids(self) -> NDArray[np.int64]:
        """(rows,): number of the fragment that holds each row, times 2**32, plus its place in there."""
        return self._table.search().select(["_rowid"]).limit(self.rows).to_arrow()["_rowid"].to_numpy().astype(np.int64)

    def compact(self, older_than: float) -> tuple[int, NDArray[np.int64]]:
        """Merge small files of the latest version, then drop versions older than this many seconds.

        Returns:
            The version before, and the places of those of its rows that are in other files now.
        """
        self.refresh()
        before, ids = self.version, self._row_ids()
        try:
            # Exactly 0 makes LanceDB warn of what our caller has said it wants.
            self._table.optimize(cleanup_older_than=timedelta(seconds=max(older_than, 0.001)))
        finally:
            self._load()
        return before, np.flatnonzero(~np.isin(self._row_ids()[: ids.size] >> 32, ids >> 32))

    def restore(self, version: int) -> bool:
        """Make the table what it was at a version, unless rows have come since; gives whether it was done."""
        rows = self._database.open(self.name, version).rows
        self.refresh()
        if self.rows != rows:
            return False
        self._table.checkout(version)
        self._table.restore()
        self.refresh()
        return True

    def with_commit(self, number: int, columns: Sequence[str]) -> Any:
        """These columns of the rows of one commit, wherever they are, as an Arrow table; reads the number of every row."""
        with _reading(self._named()):
            return self._table.search().where(f"{COMMIT} = {number}").limit(self.rows).select(list(columns)).to_arrow().combine_chunks()

    def stored_bytes(self) -> int:
        """Bytes of the data files of this version."""
        with _reading(self._named()):
            return int(self._table.stats()["total_bytes"])


def in_advance(calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each call gives, in order; while one answer is used, the next few are fetched."""
    if len(calls) < 2:
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(_FETCHES) as pool:
        left = iter(calls)
        running = deque(pool.submit(call) for call in islice(left, _FETCHES))
        while running:
            found = running.popleft().result()
            running.extend(pool.submit(call) for call in islice(left, 1))
            yield found
