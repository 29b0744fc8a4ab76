"""Stored JSON becomes typed values or one clear error, whoever wrote it."""

import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
from attrs import frozen

from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.records.stored import LARGEST_JSON, Count, Name, Seconds, parse, read_as

Color = Literal["red", "blue"]


@frozen
class Part:
    name: Name
    shape: tuple[Count, ...]
    color: Color = "red"

    def __attrs_post_init__(self) -> None:
        if len(self.shape) > 2:
            raise InvalidRecordError(f"Part {self.name}: it has {len(self.shape)} dimensions, expected at most 2; reshape it.")


@frozen
class Whole:
    rows: Count
    parts: Mapping[Annotated[str, re.compile("[a-z]+")], Part]
    share: float
    column: str | None = None
    more: Part | None = None


class Note(TypedDict):
    kind: Literal["note"]
    reasons: Mapping[Count, str]
    when: NotRequired[Seconds]


PART = {"name": "a", "shape": [2, 3]}
GOOD = {"rows": 3, "parts": {"x": PART}, "share": 0.5, "column": "c"}


def test_a_document_that_fits_is_typed() -> None:
    assert read_as(Whole, GOOD, "Store x") == Whole(3, {"x": Part("a", (2, 3))}, 0.5, "c")
    assert read_as(Whole, {**GOOD, "share": 1, "column": None, "more": PART}, "Store x").more == Part("a", (2, 3))
    assert read_as(list[int], [-1], "x") == [-1]
    assert read_as(tuple[int, str], [1, "a"], "x") == (1, "a")
    for odd in ([1], [1, "a", 2], ["a", 1], "1a"):
        with pytest.raises(CorruptStoreError, match=r"^x: "):
            read_as(tuple[int, str], odd, "x")
    note = read_as(Note, {"kind": "note", "reasons": {"0": "a", "12": "b"}, "new": [1]}, "x")
    assert note == {"kind": "note", "reasons": {0: "a", 12: "b"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": -1}, "rows is -1, expected a whole number from 0 to 1125899906842623"),
        ({"rows": True}, "rows is True"),
        ({"rows": 3.0}, "rows is 3.0"),
        ({"rows": "3"}, "rows is '3'"),
        ({"rows": 10**30}, "rows is 1000000000000000000000000000000,"),
        ({"share": "0.5"}, "share is '0.5', expected a finite number"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": float("inf")}, "share is inf"),
        ({"share": 10**400}, "share is 1000"),
        ({"share": False}, "share is False"),
        ({"column": 3}, "column is 3, expected text"),
        ({"parts": []}, r"parts is \[\], expected an object"),
        ({"parts": {"X": PART}}, r"parts.X is 'X', expected text like \[a-z\]\+"),
        ({"parts": {"x": {**PART, "shape": {}}}}, r"parts.x.shape is \{\}, expected a list"),
        ({"parts": {"x": {**PART, "shape": [1, -2]}}}, r"parts.x.shape.1 is -2, expected a whole number"),
        ({"parts": {"x": {**PART, "shape": [1] * 3}}}, r"parts.x does not fit: Part a: it has 3 dimensions, expected at most 2"),
        ({"parts": {"x": {**PART, "name": "../x"}}}, r"parts.x.name is '../x', expected text like"),
        ({"parts": {"x": {**PART, "name": "a\n"}}}, r"parts.x.name is 'a\\n'"),
        ({"parts": {"x": {**PART, "color": "green"}}}, "parts.x.color is 'green', expected 'red' or 'blue'"),
        ({"parts": {"x": {"name": "a"}}}, "parts.x lacks 'shape'"),
        ({"more": {**PART, "shape": None}}, "more.shape is None, expected a list"),
        ({"odd": 1}, "it has 'odd', which this version of lopd does not know"),
    ],
)
def test_what_does_not_fit_is_said_with_its_keys(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptStoreError, match=rf"^Store x, commits/7\.json: {said}.*; restore the file from a backup\.$"):
        read_as(Whole, {**GOOD, **change}, "Store x, commits/7.json")


@pytest.mark.parametrize("key", ["-1", "01", "1.0", "٣", "", "9" * 19, "x" * 10**6, "1\n"])
def test_a_key_that_stands_for_a_number_is_one(key: str) -> None:
    with pytest.raises(CorruptStoreError, match=r"reasons\..* is .*, expected a whole number") as caught:
        read_as(Note, {"kind": "note", "reasons": {key: "a"}}, "x")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("when", [-1, 1e12, 10**400, True, "1", None])
def test_a_moment_is_one_that_has_a_date(when: object) -> None:
    assert time.gmtime(read_as(Note, {"kind": "note", "reasons": {}, "when": 1.5e9}, "x")["when"]).tm_year == 2017
    with pytest.raises(CorruptStoreError, match=r"when is .*, expected a number from 0 to 137438953471"):
        read_as(Note, {"kind": "note", "reasons": {}, "when": when}, "x")


@pytest.mark.parametrize(
    "value", [None, [], "x" * 10**6, {"kind": "note"}, {"kind": 1, "reasons": {}}, {"kind": "note", "reasons": {"1": 2}}]
)
def test_another_shape_of_document_is_refused(value: object) -> None:
    with pytest.raises(CorruptStoreError) as caught:
        read_as(Note, value, "x")
    assert len(str(caught.value)) < 400


def test_json_is_bounded_before_it_is_parsed() -> None:
    assert parse(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    for data, said in (
        (b"[" * 10**6, "nested too deep"),
        (b'{"a":' * 10**5, "nested too deep"),
        (b"[NaN]", "holds NaN"),
        (b"-Infinity", "holds -Infinity"),
        (b"\xff", "decode"),
        (b"1" * 5000, "digits"),
        (b" " * (LARGEST_JSON + 1), "more than 67,108,864"),
    ):
        with pytest.raises(ValueError, match=said):
            parse(data)


def test_a_value_that_is_nested_too_deep_is_said() -> None:
    deep: Any = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(CorruptStoreError, match=r"x: it is .*, expected text"):
        read_as(str, deep, "x")
    while deep:  # taking it apart at once would be a recursion of its own
        deep = deep[0]
