"""Names of score columns: a column becomes a folder in some stores."""

import re
from collections.abc import Collection
from typing import Annotated

from lopd.errors import InvalidRecordError
from lopd.records.rollouts import BEHAVIOR_COLUMN

# No separators, no leading dot, no name that Zarr keeps for itself.
_COLUMN_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}", re.IGNORECASE)
#: How stored names of columns are read.
ColumnName = Annotated[str, _COLUMN_NAME]


def is_column_name(name: object) -> bool:
    """Return whether a column can have this name."""
    return isinstance(name, str) and _COLUMN_NAME.fullmatch(name) is not None


def check_column(owner: str, column: str, known: Collection[str] = ()) -> None:
    """Refuse a column name that cannot be written to; `known` are those of the columns that are there.

    Raises:
        InvalidRecordError: other characters than letters, digits, `_`, `-`, `.`; a leading dot; `zarr.json`; the reserved `behavior`; or a new
            name that is another one in capitals.
    """
    if not is_column_name(column):
        wanted = "1 to 128 letters, digits, '_', '-' or '.', no '.' in front, and not 'zarr.json'"
        raise InvalidRecordError(f"{owner}: the column name is {column!r}, expected {wanted}; rename it.")
    if column == BEHAVIOR_COLUMN:
        raise InvalidRecordError(
            f"{owner}: the column name is {column!r}, expected any other, because it stands for the rollouts' own behavior_logprobs; "
            "append rollouts that carry them, or choose another name."
        )
    alike = None if column in known else next((name for name in known if name.casefold() == column.casefold()), None)
    if alike is not None:
        raise InvalidRecordError(
            f"{owner}: the column name is {column!r}, and {alike!r} is there, which differs in capitals alone: some file systems keep both in one "
            "folder; choose another name."
        )
