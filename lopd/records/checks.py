"""Arguments that make no sense, refused where they are passed.  One place, so that all of them are refused with the same sentences."""

import math
from collections.abc import Iterable
from functools import partial
from inspect import signature
from numbers import Integral, Real
from re import sub
from typing import Any

from attrs import fields

from lopd.errors import ArgumentError, InvalidRecordError


def check_number(owner: str, name: str, value: object, fits: bool, expected: str) -> None:
    """Refuse a value that does not fit.

    >>> check_number("Sampling", "top_p", 0.9, 0 < 0.9 <= 1, "more than 0 and at most 1")

    Raises:
        InvalidRecordError: it does not.
    """
    if not fits:
        raise InvalidRecordError(f"{owner}: {name} is {value!r}, expected {expected}; pass such a number.")


def check_at_least(owner: str, name: str, value: Any, least: int) -> int:
    """Refuse a count below the least that makes sense, or that is not a whole number; return it as Python's own.

    Raises:
        InvalidRecordError: it is.
    """
    whole = to_whole(owner, name, value)
    check_number(owner, name, whole, whole >= least, f"at least {least}")
    return whole


def to_whole(owner: str, name: str, value: Any) -> int:
    """Return a whole number as Python's own, also from numpy or a tensor of one value.

    >>> import numpy as np
    >>> to_whole("Sampling", "max_new_tokens", np.int64(4))
    4

    Raises:
        InvalidRecordError: it is not one; True and False are not.
    """
    own = _scalar(value)
    check_number(owner, name, value, isinstance(own, Integral) and not isinstance(own, bool), "a whole number")
    return int(own)


def to_real(owner: str, name: str, value: Any) -> float:
    """Return a number as Python's own, also from numpy or a tensor of one value.

    Raises:
        InvalidRecordError: it is not one; text that looks like one is not.
    """
    own = _scalar(value)
    check_number(owner, name, value, isinstance(own, Real) and not isinstance(own, bool), "a number")
    return value if type(value) in (int, float) else float(own)


def to_finite(owner: str, name: str, value: Any) -> float:
    """Return a finite number as Python's own, also from numpy or a tensor of one value.

    Raises:
        InvalidRecordError: it is not one.
    """
    real = to_real(owner, name, value)
    check_number(owner, name, real, math.isfinite(real), "finite")
    return real


def own_numbers(record: Any, owner: str, /, **least: int) -> None:
    """Make every number of settings Python's own, before they are compared, hashed or written.

    Args:
        record: an attrs object that is being made; its fields of type int or float, or either of these or None, are looked at.
        owner: its name in messages.
        least: the least that makes sense, of counts by their names; a count may be None if its field may.

    Raises:
        InvalidRecordError: a field does not hold a number, or a count is less.
    """
    for field in fields(type(record)):
        value, optional = getattr(record, field.name), field.type in (int | None, float | None)
        convert = to_whole if field.type in (int, int | None) else to_real if field.type in (float, float | None) else None
        if convert is not None and not (optional and value is None):
            object.__setattr__(record, field.name, convert(owner, field.name, value))
    for name, number in least.items():
        if getattr(record, name) is not None:
            check_at_least(owner, name, getattr(record, name), number)


def check_bound(record: Any, attribute: Any, bound: Any) -> None:
    """Refuse, by an InvalidRecordError, a bound that is neither None nor finite and more than 0; for attrs, as a validator."""
    owner, nats = type(record).__name__, " nats" * (attribute.name == "clip")
    own_numbers(record, owner)
    check_number(owner, attribute.name, bound, bound is None or 0 < bound < math.inf, f"None, or finite and more than 0{nats}")


def own_texts(record: Any, owner: str) -> None:
    """Refuse a field of type str that holds something else, which no store could read again.

    Raises:
        InvalidRecordError: it does.
    """
    for field in fields(type(record)):
        if field.type is str and not isinstance(value := getattr(record, field.name), str):
            raise InvalidRecordError(f"{owner}: {field.name} is {value!r:.80}, expected text; pass a str.")


def _scalar(value: Any) -> Any:
    """Return the Python number in a numpy scalar, or in an array or tensor without dimensions; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def a_kind(value: object) -> str:
    """Return the type of a value with its article.

    >>> a_kind(3), a_kind("x"), a_kind(None)
    ('an int', 'a str', 'None')
    """
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeiou' or name == 'ndarray' else 'a'} {name}"


def unwrapped(function: object) -> list[object]:
    """Return a function, and what is inside it where it is a `functools.partial`, the innermost last: one with attributes keeps another inside."""
    return [function, *(unwrapped(function.func) if isinstance(function, partial) else [])]


def name_of(function: object) -> str:
    """Return the name of a function, also inside a `functools.partial`."""
    inside = unwrapped(function)[-1]
    return str(getattr(inside, "__name__", type(inside).__name__))


def call_of(function: object) -> str:
    """Return the qualified name of a function, and of a `functools.partial` what it passes too: the same text in every process, unless a set is
    within another value.

    >>> call_of(partial(max, {"b", "a", "c"}, default=2))
    "max(['a', 'b', 'c'], default=2)"
    """
    if not isinstance(function, partial):
        return str(getattr(function, "__qualname__", type(function).__qualname__))
    passed = [*map(_repr, function.args), *(f"{name}={_repr(value)}" for name, value in sorted(function.keywords.items()))]
    # the address of a function among them is another in each process
    return sub(r" at 0x\w+", "", f"{call_of(function.func)}({', '.join(passed)})")


def _repr(value: object) -> str:
    """Return the repr of a value; that of a set, whose order is another in each process, in the order of its texts."""
    return f"[{', '.join(sorted(map(repr, value)))}]" if isinstance(value, set | frozenset) else repr(value)


def check_kind(owner: str, value: object, kind: type, remedy: str) -> None:
    """Refuse an argument that lacks a public name of `kind`, or cannot be called though `kind` can.

    Args:
        owner: how messages name the argument.
        value: what was passed.
        kind: a protocol or a class, for its names.
        remedy: what to pass in its place.

    Raises:
        ArgumentError: it does, or it is a class in place of an object.
    """
    if type(value) is kind:
        return
    if isinstance(value, type):
        raise ArgumentError(f"{owner}: it is the class {value.__name__}, expected an object; call it: {value.__name__}().")
    names = [name for name in dir(kind) if not name.startswith("_")]
    # of the class first: a property may ask a server
    lacking = next((name for name in names if not hasattr(type(value), name) and not hasattr(value, name)), None)
    if lacking is None and "__call__" in vars(kind) and not callable(value):
        lacking = "__call__"
    if lacking is not None:
        raise ArgumentError(f"{owner}: it is {a_kind(value)}, which has no `{lacking}`; {remedy}.")


def check_list(owner: str, values: object) -> None:
    """Refuse what cannot be indexed.

    Raises:
        ArgumentError: it is a generator, or a single item.
    """
    if not hasattr(values, "__getitem__"):
        raise ArgumentError(f"{owner}: it is {a_kind(values)}, expected a list; pass `list(...)` or `[...]`.")


def texts_of(owner: str, values: Any) -> list[str]:
    """Return several texts as a list.

    Raises:
        ArgumentError: they are something else.
    """
    wrong = [value for value in values if not isinstance(value, str)] if isinstance(values, Iterable) else [values]
    if wrong:
        raise ArgumentError(f"{owner}: it is {a_kind(wrong[0])}, expected text; pass a str, or several.")
    return list(values)


def several(owner: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Return several texts, each of which a generator gives once; a single text would be taken for its letters.

    Raises:
        ArgumentError: they are one text, or cannot be gone through.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ArgumentError(f"{owner}: it was given {a_kind(texts)} ({texts!r:.60}), expected a list of texts; pass `[...]`.")
    return tuple(texts)


def check_call(owner: str, value: object, arguments: str) -> None:
    """Refuse what cannot be called with these arguments (names, separated by commas); one whose signature is not known passes.

    Raises:
        ArgumentError: it is not a function, or takes other arguments.
    """
    takes = a_kind(value)
    try:
        if callable(value):
            takes = f"a function of {signature(value)}"
            signature(value).bind(*filter(None, arguments.split(",")))
            return
    except ValueError:
        return
    except TypeError:
        pass
    raise ArgumentError(f"{owner}: it is {takes}, expected a function of ({arguments}); write one.")
