"""LanceDB behind one door: its import, its forks, small caches, and its errors in our words.

A row of a table carries the number of the commit that added it, and that column is declared the table's key.  So adding rows is a race for
a number, which Lance decides: of two writers that add commit 7 at once, one adds all of its rows and the other none.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.backends.files import Files, bucket_url
from lopd.backends.fork import check_fork
from lopd.backends.lance.failures import is_gone, reading
from lopd.backends.lance.versions import TABLE_SUFFIX, check_version, identity, put_back, versions_of
from lopd.backends.ragged import LogprobDtype
from lopd.errors import CorruptStoreError, StorePathError, StoreWriteError
from lopd.records.optional import need

#: The column that names the commit that added a row, and what makes Lance let only one writer have a number.
COMMIT = "commit"
#: How tables of columns are named in which nothing was scored when they were made.
BEGAN_EMPTY = "unscored."
#: Columns that a table of rollouts gets when the first rollout with `sampler_logprobs` comes; other rows have nulls in them.
HAS_SAMPLER = "has_sampler"
LATER = (HAS_SAMPLER, "sampler_logprobs")
KEY_METADATA = {"lance-schema:unenforced-primary-key": "true"}

# Lance 2.0 files are read nearly twice as fast as those of its default format, and take 1.15 times the space.
_FILE_FORMAT = {"new_table_data_storage_version": "2.0", "new_table_enable_v2_manifest_paths": "true"}
# Left alone, a table's caches reach seven gigabytes; with 64 MB of metadata a writer takes twice as much as with 16, and reads 650 files as fast.
_INDEX_CACHE, _METADATA_CACHE = 16 << 20, 16 << 20
#: So many neighbours are read on; fewer are looked up one by one.
RANGE = 512
#: By name of a table: a version of it, how many rows it had then, and its identity (see `versions`).
Seen = Mapping[str, tuple[int, int, str]]
#: How long a call that meets other writers goes on; see `repeat`.
PATIENCE: dict[str, Any] = {"seconds": 60.0, "pause": 0.02, "longest": 0.1}
_SCHEMES = ("s3", "gs", "az", "abfss")


def _lancedb(owner: str) -> Any:
    """Return the package, in a process that may use it, and that has Lance's own beside it.

    Raises:
        MissingDependencyError: one is not installed.
        ForkedStoreError: this process was forked from one that used it.
    """
    lancedb, _ = (need(name, owner, "lance") for name in ("lancedb", "lance"))
    check_fork("LanceDB", owner)
    return lancedb


@final
class Database:
    """The LanceDB database of one store.

    Args:
        files: the store's files; LanceDB takes their place and their options, credentials among them.   lasting: whether tables are kept open.

    Raises:
        StorePathError: LanceDB cannot store there.
        MissingDependencyError: LanceDB is not installed.
    """

    def __init__(self, files: Files, *, lasting: bool = True) -> None:
        """Keep the arguments; the first call connects, as connecting makes a folder."""
        self.url, self.owner = files.url, f"Store {files.url}"
        # LanceDB does not know every way to write the URL
        self._place = bucket_url(self.url)
        scheme, separator, _ = self._place.partition("://")
        if separator and scheme not in _SCHEMES:
            raise StorePathError(
                f"{self.owner}: LanceDB cannot store there, expected a local path, or a URL of {', '.join(_SCHEMES)}; choose another place."
            )
        self._options = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in files.options.items()}
        self.files, self.lasting = files, lasting
        self._connection: Any = None
        self._session: Any = None
        _lancedb(self.owner)

    @property
    def connection(self) -> Any:
        """LanceDB's own, for a process that may use it."""
        lancedb = _lancedb(self.owner)
        if self._connection is None:
            session = lancedb.Session(index_cache_size_bytes=_INDEX_CACHE, metadata_cache_size_bytes=_METADATA_CACHE)
            self._connection = lancedb.connect(self._place, storage_options={**self._options, **_FILE_FORMAT}, session=session)
        return self._connection

    def view(self, name: str, version: int) -> Any:
        """Return Lance's own view of a table at a version; LanceDB gives none where a path has a question mark in it."""
        lance = need("lance", self.owner, "lance")
        self._session = self._session or lance.Session(_INDEX_CACHE, _METADATA_CACHE)
        place = f"{self._place}/{name}{TABLE_SUFFIX}"
        return lance.dataset(place, version=version, storage_options=self._options, session=self._session)

    def open(self, name: str, seen: tuple[int, int, str] | None = None) -> "LanceTable":
        """Return a table as it is now, or with the rows that it had when this was seen."""
        with reading(f"{self.owner}: table {name!r}"):
            handle = self.connection.open_table(name)
            try:
                handle.checkout(handle.version if seen is None else seen[0])
            except Exception as error:
                if not is_gone(error):
                    raise
            return LanceTable(self, name, handle, seen)

    def handle(self, name: str, version: int | None) -> Any:
        """Return LanceDB's own handle of a table; one that stands at a version does not take writes."""
        with reading(f"{self.owner}: table {name!r}"):
            handle = self.connection.open_table(name)
            if version is not None:
                handle.checkout(version)
            return handle

    def create(self, name: str, data: Any) -> "LanceTable":
        """Create a table.  Its name must be unique: LanceDB reports success to more than one of several concurrent creators."""
        return LanceTable(self, name, self.connection.create_table(name, data))

    def drop(self, name: str) -> None:
        """Remove a table that no other process knows, if the storage allows it: what stays does no harm."""
        with suppress(Exception):
            self.connection.drop_table(name)


@final
class LanceTable:
    """One table at one version, which only `refresh`, `insert` and `compact` move.

    Rows are only added, and merges keep their order.  So where a version is removed, its rows are read from the newest.

    Args:
        database: that it is in.   name: in it.   handle: LanceDB's own.   seen: what to show; None for all that it has.
    """

    def __init__(self, database: Database, name: str, handle: Any, seen: tuple[int, int, str] | None = None) -> None:
        """Read the number of rows."""
        self._database, self.name, self._handle = database, name, handle
        self._view: Any = None
        self.version, self._identity = 0, ""
        self._load(seen)
        if seen is not None and not self.check():
            self._latest(False)

    def _load(self, seen: tuple[int, int, str] | None = None) -> None:
        there, now, known = int(self._handle.count_rows()), int(self._handle.version), self._identity
        if seen is None and now != self.version and self._database.lasting:
            known = identity(self._database.files, self.name, now)
        version, rows, known = (*seen, known)[:3] if seen else (now, there, known)  # an older lopd pickled no identity
        if there < rows:
            raise CorruptStoreError(f"{self._named()}: it has {there} rows, expected at least {rows}; restore it from a backup.")
        self._columns = frozenset(self._handle.schema.names)
        if self._view is not None and self._view.version != self._handle.version:
            self._view = None
        # last: after an interrupt, what is read of later rows is not to come from the columns or the view of before
        self.version, self.rows, self._identity = version, rows, known
        if not self.rows and not self.name.startswith(BEGAN_EMPTY):
            # It was made with rows in it, and none is ever removed: only damage to its manifest looks like this.
            raise CorruptStoreError(f"{self._named()}: it has no rows, expected at least 1; restore its files from a backup.")

    @property
    def _table(self) -> Any:
        _lancedb(self._database.owner)
        return self._handle

    def _named(self) -> str:
        return f"{self._database.owner}: table {self.name!r}"

    def logprob_dtype(self) -> LogprobDtype:
        """Return the type of the values of a column's table."""
        return "float16" if self._handle.schema.field("logprobs").type.value_type.bit_width == 16 else "float32"

    @property
    def seen(self) -> tuple[int, int, str]:
        """What a copy is to show."""
        return self.version, self.rows, self._identity

    def check(self) -> bool:
        """Return whether this version is still there; refuse another one of its number."""
        return check_version(self._database.files, self.name, self.version, self._identity)

    def _latest(self, there: bool) -> None:
        """Move the handle, and refuse a version that is not there any more though none followed."""
        self._table.checkout_latest()
        if not there and self._handle.version <= self.version:
            raise put_back(self._database.files, self.name, self.version)

    def refresh(self, there: bool | None = None) -> None:
        """Move to the latest version; `there` is what `check` gave, if it was called a moment ago."""
        with reading(self._named()):
            self._latest(self.check() if there is None else there)
            self._load()

    def is_behind(self) -> bool:
        """Return whether there is a later version than the one that the last call found: what failed there may succeed now."""
        before = self.version
        self.refresh()
        return self.version > before

    def take(self, offsets: NDArray[np.int64], columns: Sequence[str]) -> Any:
        """Return these columns of the rows at these places, which must be distinct and ascending, as an Arrow table in this order.

        Columns of `LATER` that the table does not have are left out.
        """
        with reading(self._named()):
            table, names = self._table, [name for name in columns if name in self._columns or name not in LATER]
            version = table.version if self._view is None else self._view.version
            try:
                if self._view is None:
                    self.check()
                    self._view = self._database.view(self.name, version)  # in half the time of LanceDB's queries
                found = _taken(self._view, offsets, names)
            except Exception as error:
                if not is_gone(error):
                    raise
                self._latest(self.check())
                self._view = self._database.view(self.name, self._handle.version)
                if self._view.version <= version:
                    raise
                found = _taken(self._view, offsets, names)
            found.validate(full=True)
        if len(found) != offsets.size:
            raise CorruptStoreError(f"{self._named()}: {len(found)} rows were read, expected {offsets.size}; restore it from a backup.")
        return found

    def insert(self, data: Any, version: int) -> bool:
        """Add rows of one commit, unless this version is not the latest or that number is taken: all or none of them.

        Moves to the latest version, unless the write fails.  Columns that the table does not have yet are added first, empty.

        Raises:
            StoreWriteError: another tool has added a column that may not be empty.
            CorruptStoreError: the store was put back to an older state, and gone on with.
        """
        table = self._table
        table.checkout_latest()
        # the rows that these were to follow may have been taken back, or the store put back, also to as many versions
        if int(table.version) != version or not self.check():
            self.refresh()
            return False
        there = table.schema
        for field in there:
            if not (field.nullable or field.name in data.schema.names):
                raise StoreWriteError(
                    f"{self._named()}: it has a column {field.name!r} of another tool that may not be empty, expected only lopd's own; "
                    "drop it (`drop_columns`), or make it nullable (`alter_columns`)."
                )
        new = [field for field in data.schema if field.name not in there.names]
        if new:
            table.add_columns(data.select([field.name for field in new]).schema)
        base = int(table.version)
        # with an index of another tool on the numbers, Lance would not look for this one in what others commit meanwhile
        made = table.merge_insert(COMMIT).use_index(False).when_not_matched_insert_all().execute(data).num_inserted_rows
        added = bool(made) and self._once(data, base)
        self._load()  # not where a write failed: what is there then may be another store's
        return added

    def _once(self, data: Any, base: int) -> bool:
        """Return whether rows that were just added to this version are there once; they are removed where their number was another's.

        Lance looks for the number in versions that others have committed meanwhile, and passes over those that are removed by then.
        Nor does it see then that what was before them was taken back.
        """
        there = versions_of(self._database.files, self.name)
        if there.issuperset(range(base, max(there, default=base) + 1)):
            return True
        latest, number = self._database.handle(self.name, None), f"{COMMIT} = {data[COMMIT][0].as_py()}"
        before = latest.count_rows(number.replace("=", "<"))
        mine = f"{number} AND committed_at = {data['committed_at'][0].as_py()!r}"
        if before == self.rows and latest.count_rows(number) == latest.count_rows(mine) == len(data):
            return True
        latest.delete(mine)
        return False

    def dataset(self) -> Any:
        """Return Lance's own view of the newest version, for what LanceDB has no word for."""
        self._table.checkout_latest()
        return self._database.view(self.name, self._handle.version)

    def commit(self, view: Any, operation: str, *parts: Any, retries: int) -> None:
        """Commit one of Lance's operations behind a version; None is this one."""
        view = self._database.view(self.name, self.version) if view is None else view
        lance = need("lance", self._database.owner, "lance")
        lance.LanceDataset.commit(view, getattr(lance.LanceOperation, operation)(*parts), read_version=view.version, max_retries=retries)

    def stored_bytes(self) -> int:
        """Return bytes of the data files of this version."""
        with reading(self._named()):
            return int(self._table.stats()["total_bytes"])


def _taken(view: Any, offsets: NDArray[np.int64], names: Sequence[str]) -> Any:
    if offsets.size >= RANGE and offsets[-1] - offsets[0] == offsets.size - 1:
        # One batch: several would be copied to make one of them.
        query = view.scanner(columns=names, offset=int(offsets[0]), limit=offsets.size, batch_size=offsets.size)
        return query.to_table().combine_chunks()
    return view.take(offsets.tolist(), columns=names).combine_chunks()
