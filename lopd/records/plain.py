"""Values of records, as their file means them: the same from JSON lines, from Arrow and from numpy."""

import datetime
import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from lopd.errors import PromptError
from lopd.records.checks import a_kind

# floats hold every whole number below it
_EXACT = 2**53


def plain(value: Any, owner: str) -> Any:
    """Return a value as JSON has it: keys that are null are dropped, whole numbers are ints, dates are ISO text, arrays are lists.

    Columnar formats fill keys that a record lacks with null, and read a column of ints with a gap as floats.  NaN is null, as in pandas.

    >>> plain({"role": "user", "name": None, "n": 2.0}, "Record 0")
    {'role': 'user', 'n': 2}

    Raises:
        PromptError: a value is of another type, text that UTF-8 cannot hold, or nested too deep.
    """
    try:
        return _plain(value, owner)
    except RecursionError as error:
        raise PromptError(f"{owner}: it holds values that are nested too deep, or hold themselves; flatten them.") from error


def _plain(value: Any, owner: str) -> Any:
    if isinstance(value, Mapping):
        items = ((key, _plain(item, owner)) for key, item in value.items())
        return {key: item for key, item in items if item is not None}
    if isinstance(value, np.ndarray | np.generic):
        # finer times have no Python type
        return _plain((value.astype("M8[us]") if value.dtype.kind == "M" else value).tolist(), owner)
    if isinstance(value, list | tuple):
        return [_plain(item, owner) for item in value]
    return _plain_leaf(value, owner)


def _plain_leaf(value: Any, owner: str) -> Any:
    if value is None or isinstance(value, int) or callable(value):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"{owner}: its text has the lone surrogate {value[error.start]!r} at character {error.start}, which is half of a character; "
                "decode the file again, or drop it."
            ) from error
        return value
    if is_null(value):
        return None
    if isinstance(value, float | Decimal):
        return int(value) if abs(float(value)) < _EXACT and value == int(value) else value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise PromptError(f"{owner}: it holds {a_kind(value)} ({value!r:.40}); convert it to text.")


def is_null(value: Any) -> bool:
    """Return whether a value is None or a null of pandas, which has one for each kind of column: NaN, NaT and NA."""
    value = value.item() if isinstance(value, np.generic) else value
    unequal = isinstance(value, float | Decimal | datetime.date) and value != value  # noqa: PLR0124
    return value is None or type(value).__name__ == "NAType" or unequal


def present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without the keys whose value is null, each other value as it is."""
    return {key: value for key, value in record.items() if not is_null(value)}


def from_json(value: Any, owner: str, key: str) -> Any:
    """Return what a value that may be JSON text stands for: nested values are often kept as text in columns; None for blank text.

    Raises:
        PromptError: it is text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{owner}: {key!r} is text that is not JSON ({error}); write the value itself.") from error


def as_text(value: Any) -> str | None:
    """Return a plain value as text: text as it is, everything else as JSON writes it.

    >>> as_text(True), as_text(7), as_text(["a", "b"])
    ('true', '7', '["a", "b"]')
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        # `normalize` would round to the context's 28 digits
        digits = f"{value:f}"
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    return json.dumps(value, ensure_ascii=False, default=as_text)


def as_id(value: Any, owner: str) -> str | None:
    """Return the id of a record as text.

    Raises:
        PromptError: it is not text or a number, is empty, or is a float that was rounded.
    """
    rounded = isinstance(value, float) and abs(value) >= _EXACT
    if value == "" or rounded or isinstance(value, bool | list | Mapping):
        why = "which is rounded" if rounded else "expected text or a number"
        raise PromptError(f"{owner}: its id is {value!r:.80}, {why}; leave it out to name the prompt after its tokens.")
    return as_text(value)
