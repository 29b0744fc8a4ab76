"""Warnings: they point to the line of the user's program that led to them, however many frames of lopd lie between, and they can be noted."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from lopd.errors import LopdWarning


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the innermost frame that is not lopd's own; verbs call one another, a generator runs where it is asked for its next value, and torch
    calls modules.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("lopd.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def noting() -> Iterator[list[str]]:
    """Give a list of lopd's warnings while this goes on; they are shown as they come, too.

    Python shows a warning once in a process; here it is once while this goes on, for each seed has its own.
    """
    said, show = list[str](), warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, LopdWarning):
            said.append(f"{category.__name__}: {message}")
        show(message, category, *where)

    with warnings.catch_warnings():
        warnings.showwarning = cast("Any", note)
        yield said
