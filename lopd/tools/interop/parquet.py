"""A store as one parquet file, and back, on a local disk or wherever fsspec reaches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from attrs import frozen

from lopd.backends.files import StorageOptions, StorePath
from lopd.errors import (
    MissingDependencyError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreReadError,
    StoreWriteError,
)
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import rows_at_once
from lopd.records.checks import check_at_least
from lopd.records.manifest import Manifest
from lopd.records.optional import need
from lopd.records.paths import asked, path_or_url, without_secrets
from lopd.tools.interop.arrow_table import reading, sound, store_tables, tables
from lopd.tools.interop.description import Description

_KEY = b"lopd"
T = TypeVar("T")


def export_parquet(
    reader: LogprobReader, path: StorePath, *, rows_per_group: int = 1024, storage_options: StorageOptions | None = None
) -> None:
    """Write all rollouts with all their scores into a new parquet file, row group by row group.

    Everything that a reader gives is in it, so `import_parquet` makes an equal store; the count of floored log-probs, which no read gives,
    is not.  See `lopd.tools.interop.arrow_table` for the columns.  Pages, rows and description have checksums.

    Args:
        reader: any store.
        path: local, or any URL that fsspec opens.
        rows_per_group: rollouts in a row group, or fewer where they are very long; bounds memory.
        storage_options: options of fsspec.

    Raises:
        ArgumentError: the store is something else.
        StoreExistsError: a file is there.
        StoreWriteError: the write failed; what was written of the file is removed.
        StoreReadError: the storage does not report whether a file is there.
        StorePathError: fsspec knows no such kind of URL.
        InvalidRecordError: a rollout id is not text that parquet can hold, or `rows_per_group` is less than 1.
        MissingDependencyError: pyarrow or fsspec is not installed.
    """
    check_noun(reader, LogprobReader)
    pq, place = need("pyarrow.parquet", "Parquet"), _Place.of(path, storage_options)
    if place.ask(place.system.exists, place.name):
        raise StoreExistsError(f"{place.owner}: it is there already, expected nothing; remove it, or choose another name.")
    check_at_least("Export", "rows_per_group", rows_per_group, 1)
    description = Description.of(reader)
    schema = description.schema().with_metadata({_KEY: description.to_json().encode()})

    def write(opened: Any) -> None:
        with opened as file, pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in tables(reader, description, rows_per_group):
                writer.write_table(table)

    try:
        opened = asked(place.url, partial(place.system.open, place.name, "wb"), secret=place.secret)
        # what else the reader raises is not the file's
        asked(place.url, partial(write, opened), secret=place.secret, errors=OSError)
    except BaseException as error:
        # a file without its last row groups would still be a parquet file
        with suppress(Exception):
            place.system.rm(place.name)
        if isinstance(error, OSError) and not isinstance(error, StoreReadError):
            raise StoreWriteError(f"{place.owner}: the write failed with {error}; free space or fix permissions, and repeat it.") from error
        raise


def import_parquet(
    path: StorePath, store: LogprobStore, *, rows_per_commit: int = 1024, storage_options: StorageOptions | None = None
) -> None:
    """Append what `export_parquet` wrote; run it again to resume.

    Verifies the checksum of every page and every row, and that no row is missing.  Where one is damaged or refused, those before it may be in
    the store.  Warns of a file without checksums, as lopd 0.2 and other programs write them; it has the same columns and description, without
    `checksum`.

    Args:
        path: local, or any URL that fsspec opens.
        store: created with `parquet_manifest(path)`.
        rows_per_commit: rollouts appended together, or fewer where those of a row group are very long on average; bounds memory.
        storage_options: options of fsspec.

    Raises:
        ArgumentError: the store is something else.
        StoreNotFoundError: the file is not there.
        StorePathError: it is a pipe or a device.
        StoreReadError: the storage fails, also midway.
        CorruptStoreError: it is damaged, no export of lopd, a row does not match its checksum or hash, or rows are missing.
        InvalidRecordError: a row breaks the contract of a rollout or of scores, or `rows_per_commit` is less than 1.
        ManifestMismatchError: the store has another manifest.
        ConflictError: other content or values are under an id, another model under a column, or another policy under a round, of the store.
        MissingDependencyError: pyarrow or fsspec is not installed.
    """
    check_noun(store, LogprobStore)
    with open_parquet(path, storage_options) as (file, owner):
        store_tables(store, _describe(file, owner), read_batches(file, rows_per_commit, owner), owner, rows=file.metadata.num_rows)


def parquet_manifest(path: StorePath, *, storage_options: StorageOptions | None = None) -> Manifest:
    """Return the manifest of the store that was exported.

    Raises:
        StoreNotFoundError: the file is not there.
        StoreReadError: the storage fails.
        CorruptStoreError: it is damaged, or no export of lopd.
    """
    with open_parquet(path, storage_options) as (file, owner):
        return _describe(file, owner).manifest


def _describe(file: Any, owner: str) -> Description:
    return Description.from_json((file.schema_arrow.metadata or {}).get(_KEY), owner, file.schema_arrow.names)


@contextmanager
def open_parquet(path: StorePath, storage_options: StorageOptions | None) -> Iterator[tuple[Any, str]]:
    """Give an open parquet file, and its name in messages."""
    pq, place = need("pyarrow.parquet", "Parquet"), _Place.of(path, storage_options)
    raw = place.ask(place.opened)
    with raw:
        with reading(place.owner):
            file = pq.ParquetFile(_Reading(raw, place), page_checksum_verification=True)
            # names that are not text raise here, and not later
            _ = file.schema_arrow.names
        yield file, place.owner


def read_batches(file: Any, rows: int, owner: str) -> Iterator[Any]:
    """Return tables of so many rows, or fewer where a row group has very many values for each of its rows.

    Raises:
        InvalidRecordError: that number is less than 1.
        StoreReadError: the storage fails.
        CorruptStoreError: a part of the file is damaged.
    """
    pa = need("pyarrow", "Parquet")
    check_at_least("Import", "rows_per_commit", rows, 1)
    with reading(owner):
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        widths = [sum(group.column(i).num_values for i in range(group.num_columns)) / max(group.num_rows, 1) for group in groups]
    batches = file.iter_batches(batch_size=rows_at_once(rows, widths))
    return sound((pa.Table.from_batches([batch]) for batch in batches), owner)


@frozen
class _Place:
    """A file on a file system of fsspec.

    Args:
        system, name: file system and path of fsspec.
        url: as the user wrote it.
        secret: whether options hold how to reach it.
    """

    system: Any
    name: str
    url: str
    secret: bool

    @classmethod
    def of(cls, path: StorePath, storage_options: StorageOptions | None) -> "_Place":
        core, url, options = need("fsspec.core", "Parquet"), path_or_url("Parquet", path, StorePathError), storage_options or {}
        try:
            system, name = asked(url, partial(core.url_to_fs, url, **options), secret=bool(options))
        except OSError as error:
            scheme = url.split("://", maxsplit=1)[0]
            if str(error).startswith(("ImportError", "ModuleNotFoundError")):
                raise MissingDependencyError(f"Parquet: the package for {scheme}:// is not installed ({error}); install it.") from error
            raise StorePathError(
                f"Parquet: the path begins with {scheme!r}, which fsspec cannot open ({error}); correct the path and its options."
            ) from error
        return cls(system, name, url, bool(options))

    @property
    def owner(self) -> str:
        """How messages name it."""
        return f"Parquet file {without_secrets(self.url if '://' in self.url else self.name)}"

    def ask(self, work: Callable[..., T], *arguments: Any, doing: str = "opening") -> T:
        """Return what the file system does with these arguments."""
        try:
            return asked(self.url, partial(work, *arguments), secret=self.secret)
        except FileNotFoundError as error:
            raise StoreNotFoundError(f"{self.owner}: there is nothing, expected a parquet file; check the path.") from error
        except OSError as error:
            raise StoreReadError(
                f"{self.owner}: {doing} it failed with {error}, expected a parquet file; check path, network and permissions, and repeat it."
            ) from error

    def opened(self) -> Any:
        """Open it for reading."""
        if self.system.info(self.name)["type"] == "other":
            raise StorePathError(f"{self.owner}: it is a pipe or a device, expected a regular file; correct the path.")
        return self.system.open(self.name, "rb")


@frozen
class _Reading:
    """An open file as pyarrow gets it: what its file system raises while it reads is not damage, and may hold secrets."""

    file: Any
    place: _Place

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.file, name)
        return partial(self.place.ask, found, doing="reading") if callable(found) else found
