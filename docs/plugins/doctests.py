"""Doctests of docstrings as blocks of code: Markdown takes `>>>` for a quotation."""

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fences paragraphs that begin with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for everything it finds."""
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = fence(obj.docstring.value)


def fence(docstring: str) -> str:
    """The same with fences around doctests."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(f"```pycon\n{text}\n```" if text.lstrip().startswith(">>>") else text for text in paragraphs)
