"""Numbers that make no sense, refused where they are passed.  One function, so that all of them are refused with the same sentence."""

from numbers import Integral

from lopd.errors import InvalidRecordError


def check_number(owner: str, name: str, value: object, fits: bool, expected: str) -> None:
    """Refuse a value that does not fit.

    >>> check_number("Sampling", "top_p", 0.9, 0 < 0.9 <= 1, "more than 0 and at most 1")

    Raises:
        InvalidRecordError: it does not.
    """
    if not fits:
        raise InvalidRecordError(f"{owner}: {name} is {value!r}, expected {expected}; pass such a number.")


def check_at_least(owner: str, name: str, value: int, least: int) -> None:
    """Refuse a count below the least that makes sense, or that is no whole number.

    Raises:
        InvalidRecordError: it is.
    """
    whole = isinstance(value, Integral)
    check_number(owner, name, value, whole and value >= least, f"at least {least}" if whole else "a whole number")
