"""A store as one parquet file, and back, on a local disk or wherever fsspec reaches."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

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
from lopd.records.checks import check_at_least
from lopd.records.manifest import Manifest
from lopd.records.optional import need
from lopd.records.paths import path_or_url, said_of, without_secrets
from lopd.tools.interop.arrow_table import reading, sound, store_tables, tables
from lopd.tools.interop.description import Description

_KEY = b"lopd"


def export_parquet(
    reader: LogprobReader, path: StorePath, *, rows_per_group: int = 1024, storage_options: StorageOptions | None = None
) -> None:
    """Write all rollouts with all their scores into a new parquet file, row group by row group.

    Everything that a reader gives is in it, so `import_parquet` makes an equal store; the count of floored log-probs, which no read gives,
    is not.  See `lopd.tools.interop.arrow_table` for the columns.  Pages, rows and description have checksums.

    Args:
        reader: any store.
        path: local, or any URL that fsspec opens.
        rows_per_group: rollouts in a row group; bounds memory.
        storage_options: of fsspec.

    Raises:
        StoreExistsError: a file is there.
        StoreWriteError: the write failed; what was written of the file is removed.
        StorePathError: fsspec knows no such kind of URL.
        InvalidRecordError: a rollout id is not text that parquet can hold, or `rows_per_group` is less than 1.
        MissingDependencyError: pyarrow or fsspec is not installed.
    """
    pq, files, name = need("pyarrow.parquet", "Parquet"), *_filesystem(path, storage_options)
    if files.exists(name):
        raise StoreExistsError(
            f"Parquet file {without_secrets(name)}: it is there already, expected nothing; remove it, or choose another name."
        )
    check_at_least("Export", "rows_per_group", rows_per_group, 1)
    description = Description.of(reader)
    schema = description.schema().with_metadata({_KEY: description.to_json().encode()})
    try:
        with files.open(name, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in tables(reader, description, rows_per_group):
                writer.write_table(table)
    except BaseException as error:
        # a file without its last row groups would still be a parquet file
        with suppress(OSError):
            files.rm(name)
        if isinstance(error, OSError) and not isinstance(error, StoreReadError):
            raise StoreWriteError(
                f"Parquet file {without_secrets(name)}: the write failed with {said_of(name, error)}, expected it to succeed; "
                "free space or fix permissions, and repeat it."
            ) from error
        raise


def import_parquet(
    path: StorePath, store: LogprobStore, *, rows_per_commit: int = 1024, storage_options: StorageOptions | None = None
) -> None:
    """Append what `export_parquet` wrote; run it again to resume.

    Verifies the checksum of every page and every row, and that no row is missing.  Where one is damaged, those before it may be in the store.
    Warns of a file without checksums, as lopd 0.2 and other programs write them; it has the same columns and description, without `checksum`.

    Args:
        path: local, or any URL that fsspec opens.
        store: created with `parquet_manifest(path)`.
        rows_per_commit: rollouts appended together; bounds memory.
        storage_options: of fsspec.

    Raises:
        StoreNotFoundError: no file is there.
        StorePathError: it is a pipe or a device.
        CorruptStoreError: it is damaged, no export of lopd, a row does not match its checksum or hash, or rows are missing.
        InvalidRecordError: a row breaks the contract of a rollout or of scores, or `rows_per_commit` is less than 1.
        ManifestMismatchError: the store has another manifest.
        ConflictError: other content is under an id, or another model under a column, of the store.
        MissingDependencyError: pyarrow or fsspec is not installed.
    """
    with open_parquet(path, storage_options) as (file, owner):
        store_tables(store, _describe(file, owner), read_batches(file, rows_per_commit, owner), owner, whole=True)


def parquet_manifest(path: StorePath, *, storage_options: StorageOptions | None = None) -> Manifest:
    """The manifest of the store that was exported.

    Raises:
        StoreNotFoundError: no file is there.
        CorruptStoreError: it is damaged, or no export of lopd.
    """
    with open_parquet(path, storage_options) as (file, owner):
        return _describe(file, owner).manifest


def _describe(file: Any, owner: str) -> Description:
    return Description.from_json((file.schema_arrow.metadata or {}).get(_KEY), owner)


@contextmanager
def open_parquet(path: StorePath, storage_options: StorageOptions | None) -> Iterator[tuple[Any, str]]:
    """An open parquet file, and how messages name it."""
    pq = need("pyarrow.parquet", "Parquet")
    files, name = _filesystem(path, storage_options)
    owner = f"Parquet file {without_secrets(name)}"
    try:
        if files.info(name)["type"] == "other":
            raise StorePathError(f"{owner}: it is a pipe or a device, expected a regular file; correct the path.")
        raw = files.open(name, "rb")
    except FileNotFoundError as error:
        raise StoreNotFoundError(f"{owner}: there is nothing, expected a parquet file; check the path.") from error
    except OSError as error:
        raise StoreReadError(
            f"{owner}: opening it failed with {said_of(name, error)}, expected a parquet file; check the path and permissions."
        ) from error
    with raw:
        with reading(owner):
            file = pq.ParquetFile(raw, page_checksum_verification=True)
            # names that are not text raise here, and not later
            _ = file.schema_arrow.names
        yield file, owner


def read_batches(file: Any, rows: int, owner: str) -> Iterator[Any]:
    """Tables of so many rows.

    Raises:
        InvalidRecordError: that number is less than 1.
        CorruptStoreError: a part of the file is damaged.
    """
    pa = need("pyarrow", "Parquet")
    check_at_least("Import", "rows_per_commit", rows, 1)
    return sound((pa.Table.from_batches([batch]) for batch in file.iter_batches(batch_size=rows)), owner)


def _filesystem(path: StorePath, storage_options: StorageOptions | None) -> tuple[Any, str]:
    core, text = need("fsspec.core", "Parquet"), path_or_url("Parquet", path, StorePathError)
    name: str
    try:
        files, name = core.url_to_fs(text, **(storage_options or {}))
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet: the package for {text.split('://')[0]}:// is not installed ({error}); install it."
        ) from error
    except ValueError as error:
        raise StorePathError(f"Parquet: the path begins with {text.split('://')[0]!r}, expected what fsspec knows; correct it.") from error
    return files, name
