"""Files of records, one a line of JSON or a row of parquet, on a disk or wherever fsspec reaches."""

import json
import os
from collections.abc import Iterator
from typing import Any

from lopd.errors import PromptError
from lopd.records.optional import need
from lopd.records.paths import asked, open_regular, path_or_url, without_secrets

#: Bytes of one record of a file; a larger one is refused before it is parsed.
LARGEST_ROW = 64 << 20
_ROWS_AT_ONCE = 256


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


def read_records(owner: str, path: str) -> list[Any]:
    """Return all records of a file.

    Raises:
        PromptError: the file is empty, cannot be read or is of another kind, or a record is too large; it names the place.
    """
    try:
        records = asked(path, lambda: _records_of(owner, path))
    except OSError as error:
        raise PromptError(f"{owner}: it cannot be read ({error}), expected a .jsonl or .parquet file; check the path.") from error
    if not records:
        raise PromptError(f"{owner}: it has 0 records, expected at least 1; check that it was written.")
    return records


def _records_of(owner: str, path: str) -> list[Any]:
    with _opened(path) as file:
        return list(_parquet_rows(owner, file) if path.endswith(".parquet") else _json_lines(owner, file))


def _opened(path: str) -> Any:
    local = path.removeprefix("file://")
    return need("fsspec", "Prompt files").open(path, "rb") if "://" in local else open_regular(local)


def _json_lines(owner: str, file: Any) -> Iterator[Any]:
    for number, line in enumerate(iter(lambda: file.readline(LARGEST_ROW + 1), b""), 1):
        _check_row(f"{owner}, line {number}", len(line))
        if line.strip():
            yield _parse(f"{owner}, line {number}", line)


def _parquet_rows(owner: str, file: Any) -> Iterator[Any]:
    table, first = need("pyarrow.parquet", "Prompt files").ParquetFile(file), 0
    for group in map(table.metadata.row_group, range(table.num_row_groups)):
        # a page of kilobytes may become gigabytes, and declares its size
        whole = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
        _check_row(f"{owner}, a record from {first} on", whole // max(group.num_rows, 1))
        first += group.num_rows
    first = 0
    for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
        for i in range(len(batch) if batch.nbytes > LARGEST_ROW else 0):
            _check_row(f"{owner}, record {first + i}", batch.slice(i, 1).nbytes)
        first += len(batch)
        yield from batch.to_pylist(maps_as_pydicts="strict")


def _check_row(row: str, size: int) -> None:
    if size > LARGEST_ROW:
        raise PromptError(f"{row}: it has more than {LARGEST_ROW:,} bytes; drop it, no model reads so much.")


def _parse(where: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: it is not JSON ({error}); fix the line.") from error
