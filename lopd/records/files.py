"""Files of records, one a line of JSON or a row of parquet, on a disk or wherever fsspec reaches."""

import json
import os
from collections.abc import Iterator
from io import BufferedReader, BytesIO
from typing import Any

from lopd.errors import MissingDependencyError, PromptError
from lopd.records.optional import need
from lopd.records.paths import asked, open_regular, path_or_url, without_secrets

#: Bytes of one record of a file; a larger one is refused before it is parsed.
LARGEST_ROW = 64 << 20
_ROWS_AT_ONCE = 256
#: How URLs begin that obstore opens.
IN_BUCKETS = ("s3://", "gs://", "az://", "abfss://")


def named_file(kind: str, path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the path or URL, and how messages name the file.

    Args:
        kind: kind of file, for example "Prompt file".
        path: the file's path.

    Raises:
        PromptError: it only looks like a path of this machine.
    """
    found = path_or_url(kind, path, PromptError)
    return found, f"{kind} {without_secrets(found)}"


def read_records(owner: str, path: str) -> tuple[str, list[tuple[int, Any]]]:
    """Return how messages name one record, before its number, and all records with their numbers: lines from 1 on, or rows of parquet from 0 on.

    Raises:
        PromptError: the file is empty, cannot be read or is of another kind, or a record is too large; it names the place.
        MissingDependencyError: a package for this kind of file or URL is not installed.
    """
    try:
        item, records = asked(path, lambda: _records_of(owner, path))
    except OSError as error:
        way = "copy it to this machine, or try again" if isinstance(error, ConnectionError) else "check the path"
        raise PromptError(f"{owner}: it cannot be read ({error}), expected a .jsonl or .parquet file; {way}.") from error
    if not records:
        raise PromptError(f"{owner}: it has 0 records, expected at least 1; check that it was written.")
    return item, records


def _records_of(owner: str, path: str) -> tuple[str, list[tuple[int, Any]]]:
    with open_anywhere(owner, path) as file:
        begin = file.read(4)
        file.seek(0)
        if begin == b"PAR1" or path.endswith(".parquet"):
            return f"{owner}, row", list(enumerate(_parquet_rows(owner, file)))
        return f"{owner}, line", list(_json_lines(owner, file))


def open_anywhere(owner: str, path: str) -> Any:
    """Open a file on this machine, in a bucket as stores are read, or behind another URL that fsspec opens.

    Raises:
        MissingDependencyError: a package for this kind of URL is not installed.
        OSError: it cannot be opened.
    """
    local = path.removeprefix("file://")
    if "://" not in local:
        return open_regular(local)
    if path.startswith(IN_BUCKETS):
        # the bucket alone: obstore takes a folder in its URL for percent-encoded, and a key as it is
        *bucket, key = path.split("/", 3)
        return BytesIO(need("lopd.backends.files", owner).open_files("/".join(bucket)).read(key))
    fsspec = need("fsspec", owner)
    try:
        # files of fsspec do not read lines up to a length
        return BufferedReader(fsspec.open(path, "rb").open())
    except ImportError as error:
        raise MissingDependencyError(f"{owner}: {str(error).rstrip('.')}; install that, or copy the file to this machine.") from error


def _json_lines(owner: str, file: Any) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(iter(lambda: file.readline(LARGEST_ROW + 1), b""), 1):
        _check_row(f"{owner}, line {number}", len(line))
        if line.strip():
            yield number, _parse(f"{owner}, line {number}", line, first=number == 1)


def _parquet_rows(owner: str, file: Any) -> Iterator[Any]:
    table, first = need("pyarrow.parquet", "Prompt files").ParquetFile(file), 0
    for group in map(table.metadata.row_group, range(table.num_row_groups)):
        # a page of kilobytes may become gigabytes, and declares its size
        whole = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
        _check_row(f"{owner}, a row from {first} on", whole // max(group.num_rows, 1))
        first += group.num_rows
    first = 0
    for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
        for i in range(len(batch) if batch.nbytes > LARGEST_ROW else 0):
            _check_row(f"{owner}, row {first + i}", batch.slice(i, 1).nbytes)
        first += len(batch)
        yield from batch.to_pylist(maps_as_pydicts="strict")


def _check_row(row: str, size: int) -> None:
    if size > LARGEST_ROW:
        raise PromptError(f"{row}: it has more than {LARGEST_ROW:,} bytes; drop it, no model reads so much.")


def _parse(where: str, line: bytes, *, first: bool) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        remedy = "fix the line"
        if isinstance(error, UnicodeDecodeError):
            remedy = "save the file as UTF-8, without compression"
        elif first and (not line.lstrip().startswith(b"{") or line.strip() == b"{"):
            remedy = "write one JSON object a line (CSV, text and lists of JSON are not read), or pass its records in memory"
        raise PromptError(f"{where}: it is not JSON ({why}); {remedy}.") from error
