"""What stored JSON must be before anything is made of it: the right keys, types and ranges, checked when read as when written.

A checksum notices damage, not malice: a forged document can carry one.  So nothing takes a value out of one before `read_as` has looked at it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from reprlib import Repr
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
    overload,
)

from attrs import NOTHING, fields, has

from lopd.errors import CorruptStoreError, LopdError

#: Larger JSON is refused before it is parsed, for it takes some thirty times the memory.
LARGEST_JSON = 64 << 20
_INT64 = range(-(1 << 63), 1 << 63)
#: A number of rows, tokens or bytes, or the number of a row or commit.  Numpy can hold sums of a few thousand of them.
Count = Annotated[int, range(1 << 50)]
#: A moment, in seconds since 1970; every library can make a date of it.
Seconds = Annotated[float, range(1 << 37)]
#: A name that becomes a folder or a part of a file's name: nothing in it leads elsewhere.
Name = Annotated[str, re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,255}")]

T = TypeVar("T")
_Reader = Callable[[Any], Any]
_LARGEST_FLOAT = 1e300
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class _Wrong(Exception):  # noqa: N818 (it never leaves this file)
    """A value that does not fit, and the keys that lead to it, innermost first."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.keys: list[str] = []


def parse(data: bytes | str, *, constants: bool = False) -> Any:
    """Parse JSON from a file that may be forged; with `constants` also NaN and infinities, as Python and zarr write them.

    >>> parse('{"a": NaN}')
    Traceback (most recent call last):
    ValueError: it holds NaN, which is not JSON
    >>> parse('{"a": NaN}', constants=True)
    {'a': nan}

    Raises:
        ValueError: it is not JSON, is larger than `LARGEST_JSON`, or is nested too deep.
    """
    if len(data) > LARGEST_JSON:
        raise ValueError(f"it has {len(data):,} bytes, more than {LARGEST_JSON:,}")
    try:
        return json.loads(data, parse_constant=None if constants else _no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not JSON")


@overload
def read_as(kind: type[T], value: Any, owner: str, refusal: type[LopdError] = ..., remedy: str = ...) -> T: ...
@overload
def read_as(kind: object, value: Any, owner: str, refusal: type[LopdError] = ..., remedy: str = ...) -> Any: ...
def read_as(
    kind: Any, value: Any, owner: str, refusal: type[LopdError] = CorruptStoreError, remedy: str = "restore the file from a backup"
) -> Any:
    """Make a typed value of parsed JSON.

    >>> read_as(tuple[Count, ...], [3, 4], "Store x")
    (3, 4)

    Args:
        kind: an attrs class or a `TypedDict`, whose fields are read by their types; or such a type: `str`, `bool`, `int` (64 bits), `float` (finite),
            `None`, `Any`, a literal, a union, `tuple[X, ...]`, `tuple[X, Y]`, `list[X]`, `Mapping[K, X]`, or one of them annotated with the
            `range` of a number or the pattern of a text.  An attrs class takes no other keys than its fields.
        value: what `parse` gave.
        owner: how messages name the file that it is from.
        refusal: class of the error.
        remedy: what messages advise to do.

    Raises:
        LopdError: an error of class `refusal`; it is something else, and the message names the key.
    """
    try:
        return _reader(kind)(value)
    except (_Wrong, RecursionError) as error:
        keys = ".".join(reversed(error.keys)) if isinstance(error, _Wrong) else ""
        what = str(error) if isinstance(error, _Wrong) else "is nested too deep"
        raise refusal(f"{owner}: {keys or 'it'} {what}; {remedy}.") from error.__cause__


@lru_cache(maxsize=256)
def _reader(kind: Any) -> _Reader:
    origin = get_origin(kind)
    if origin is not None:
        return _MAKERS[origin](*get_args(kind))
    return _record(kind) if has(kind) or is_typeddict(kind) else _LEAVES[kind]


def _plain(fits: Callable[[Any], bool], expected: str) -> _Reader:
    def read(value: Any) -> Any:
        if not fits(value):
            raise _Wrong(f"is {_SHORT.repr(value)}, expected {expected}")
        return value

    return read


_LEAVES: dict[Any, _Reader] = {
    Any: lambda value: value,
    str: _plain(lambda value: type(value) is str, "text"),
    bool: _plain(lambda value: type(value) is bool, "true or false"),
    int: _plain(lambda value: type(value) is int and value in _INT64, "a whole number of 64 bits"),
    float: _plain(lambda value: type(value) in (int, float) and -_LARGEST_FLOAT < value < _LARGEST_FLOAT, "a finite number"),
    type(None): _plain(lambda value: value is None, "null"),
}


def _one_of(*values: Any) -> _Reader:
    return _plain(lambda value: any(value == one and type(value) is type(one) for one in values), " or ".join(map(repr, values)))


def _within(kind: Any, limit: range | re.Pattern[str]) -> _Reader:
    if isinstance(limit, range):
        types, what = ((int, float), "number") if kind is float else ((int,), "whole number")
        return _plain(lambda value: type(value) in types and limit[0] <= value <= limit[-1], f"a {what} from {limit[0]} to {limit[-1]}")
    return _plain(lambda value: type(value) is kind and limit.fullmatch(value) is not None, f"text like {limit.pattern}")


def _any_of(*kinds: Any) -> _Reader:
    readers = list(map(_reader, kinds))

    def read(value: Any) -> Any:
        # what is wrong inside of an object is a better message than that it is not null
        wrongs = list[_Wrong]()
        for reader in readers:
            try:
                return reader(value)
            except _Wrong as wrong:
                wrongs.append(wrong)
        raise next((wrong for wrong in wrongs if wrong.keys), wrongs[0])

    return read


def _under(key: object, reader: _Reader, value: Any) -> Any:
    try:
        return reader(value)
    except _Wrong as wrong:
        wrong.keys.append(str(key) if isinstance(key, int) else _SHORT.repr(key)[1:-1])
        raise


def _many(make: type[list[Any] | tuple[Any, ...]], kind: Any) -> _Reader:
    reader = _reader(kind)
    check = _plain(lambda value: type(value) in (list, tuple), "a list")
    return lambda value: make(_under(i, reader, item) for i, item in enumerate(check(value)))


def _each(kinds: Sequence[Any]) -> _Reader:
    readers = list(map(_reader, kinds))
    check = _plain(lambda value: type(value) in (list, tuple) and len(value) == len(readers), f"a list of {len(readers)}")
    return lambda value: tuple(_under(i, reader, item) for i, (reader, item) in enumerate(zip(readers, check(value), strict=True)))


_object = _plain(lambda value: type(value) is dict, "an object")


def _pairs(key_kind: Any, kind: Any) -> _Reader:
    """Return the reader of a mapping: keys of JSON are text, and those that stand for numbers are written in one way only."""
    read_key, reader = _reader(key_kind), _reader(kind)
    own = _number if int in (key_kind, *get_args(key_kind)) else str
    return lambda value: {_under(key, read_key, own(key)): _under(key, reader, item) for key, item in _object(value).items()}


def _number(key: str) -> int | str:
    return int(key) if re.fullmatch("0|[1-9][0-9]{0,18}", key) else key


def _record(kind: Any) -> _Reader:
    readers = {name: _reader(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    if is_typeddict(kind):
        needed, strict = kind.__required_keys__, False
    else:
        needed, strict = {field.name for field in fields(kind) if field.default is NOTHING}, True

    def read(value: Any) -> Any:
        # first the key that is misspelt, then the one that is missing for it
        given = _object(value).keys()
        for name in sorted(given - readers.keys(), key=str) if strict else ():
            # "lr" for "learning_rate"
            initials = "".join(word[:1] for word in str(name).split("_"))
            near = get_close_matches(str(name), readers, 1) or [own for own in readers if own == initials]
            raise _Wrong(f"has {_SHORT.repr(name)}, which this version of lopd does not know{f' (is it {near[0]!r}?)' if near else ''}")
        for name in sorted(needed - given):
            raise _Wrong(f"lacks {name!r}")
        taken = {name: _under(name, readers[name], item) for name, item in value.items() if name in readers}
        try:
            return kind(**taken)
        except LopdError as error:
            raise _Wrong(f"does not fit: {str(error).rsplit(';', 1)[0]}") from error

    return read


_MAKERS: dict[Any, Callable[..., _Reader]] = {
    Annotated: _within,
    Literal: _one_of,
    Union: _any_of,
    UnionType: _any_of,
    NotRequired: _reader,
    tuple: lambda *kinds: _many(tuple, kinds[0]) if kinds[-1] is ... else _each(kinds),
    list: lambda kind: _many(list, kind),
    Mapping: _pairs,
}
