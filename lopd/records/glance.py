"""What a person sees of a thing: a line where `repr` is printed, a table in a notebook.

Both are made here alone, so that texts are cut, controls spelled out and HTML escaped in one place.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from attrs import field, frozen

from lopd.errors import printable

#: Characters of a text's beginning and of its end, ids of a response, and rows of a table that are shown.
_HEAD, _TAIL, _IDS, ROWS = 50, 30, 8, 5


@frozen(repr=False)
class Glance:
    """What is worth knowing of one thing; `print` and notebooks show it.

    Args:
        title: kind and name.
        facts: name -> value.
        columns: names of the columns of `rows`.
        rows: cells of each of its first parts.
    """

    title: str
    facts: Mapping[str, object] = field(factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()

    def __repr__(self) -> str:
        """Return a line, and another for each row."""
        facts = "; ".join(f"{name} {_said(value)}" for name, value in self.facts.items())
        cells = ("; ".join(f"{name} {_said(cell)}" for name, cell in zip(self.columns, row, strict=True)) for row in self.rows)
        return printable("\n  ".join([f"{self.title}: {facts}" if facts else self.title, *cells]))

    def _repr_html_(self) -> str:
        """Return a table of the facts, and one of the rows."""
        facts = "".join(f"<tr>{_cell('th', name)}{_cell('td', value)}</tr>" for name, value in self.facts.items())
        head = f"<tr>{''.join(_cell('th', name) for name in self.columns)}</tr>" if self.rows else ""
        rows = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in self.rows)
        tables = (f"<table>{body}</table>" for body in (facts, head + rows) if body)
        return f"<div><b>{escaped(self.title)}</b>{''.join(tables)}</div>"


class Glanced:
    """Shows a thing as its `_glance`; a class of attrs sets `repr=False`."""

    __slots__ = ()

    def _glance(self) -> Glance:
        raise NotImplementedError

    def __repr__(self) -> str:
        return repr(self._glance())

    def _repr_html_(self) -> str:
        return self._glance()._repr_html_()


def _said(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


def _cell(tag: str, value: object) -> str:
    return f'<{tag} style="text-align:left">{escaped(_said(value))}</{tag}>'


def escaped(text: str) -> str:
    """Return text as HTML may have it."""
    return escape(printable(text))


def quoted(text: str) -> str:
    r"""Return a text in quotes, with its controls spelled out; of a long one the beginning and the end.

    >>> quoted("a\n"), len(quoted(100 * "b"))
    ("'a\\n'", 83)
    """
    return repr(text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]}…{text[-_TAIL:]}")


def first_ids(ids: Any) -> str:
    """Return the first of some token ids.

    >>> first_ids([5, 6, 1]), first_ids(range(9))
    ('5 6 1', '0 1 2 3 4 5 6 7 …')
    """
    return " ".join([*(str(int(token)) for token in ids[:_IDS]), *["…"] * (len(ids) > _IDS)])
