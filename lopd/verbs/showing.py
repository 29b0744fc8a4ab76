"""How far a verb has come, for a person: a bar on a terminal, a bar in a notebook, and a line a minute anywhere else.

The lines go to stderr.  Nothing is shown of what is over within a second, or within a minute where it is not watched.
"""

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from time import monotonic
from typing import Any, final

from attrs import Factory, define, field

from lopd.errors import printable
from lopd.protocols import Counted
from lopd.records.glance import escaped
from lopd.records.optional import need

#: Seconds from one drawing to the next, where a person watches and elsewhere.
WATCHED_S, UNWATCHED_S = 1.0, 60.0
_BAR = 10


@define(repr=False)
class Pace:
    """How far it has come, and how fast.

    Args:
        what, total, done, tokens, counted: as in `lopd.protocols.Progress.begin`; `done` grows.
        worked: tokens since it began.
        refused: rollouts since it began.
    """

    what: str
    total: int
    done: int
    tokens: int | None
    counted: Counted
    worked: int = 0
    refused: int = 0
    _before: int = field(init=False, default=Factory(lambda self: self.done, takes_self=True))
    _began: float = field(init=False, factory=monotonic)

    def advance(self, rollouts: int, tokens: int, refused: int, /) -> None:
        """Count what was done."""
        self.done += rollouts + refused
        self.worked += tokens
        self.refused += refused

    @property
    def speed(self) -> str:
        """Tokens a second, and how many rollouts were refused."""
        rate = f"{self.worked / max(monotonic() - self._began, 1e-9):,.0f} {self.counted}/s" if self.worked else ""
        refused = f"{self.refused:,} refused" if self.refused else ""
        return ", ".join(filter(None, (rate, refused)))

    @property
    def left(self) -> str:
        """The remaining time: that of the tokens where their number is known, since verbs go from short rollouts to long ones."""
        by_rollouts = self.total - self.done, self.done - self._before
        ahead, behind = by_rollouts if self.tokens is None else (max(self.tokens - self.worked, 0), self.worked)
        return f"{timedelta(seconds=round((monotonic() - self._began) * ahead / behind))} left" if ahead and behind else ""

    def __repr__(self) -> str:
        passed = timedelta(seconds=int(monotonic() - self._began))
        said = (f"{self.done:,} of {self.total:,} rollouts", self.left, self.speed, f"{passed} passed")
        return printable(f"{self.what}: {', '.join(filter(None, said))}")

    def _repr_html_(self) -> str:
        return f'<progress value="{self.done}" max="{max(self.total, 1)}"></progress> {escaped(str(self))}'


Draw = Callable[[Pace, bool], None]


@final
class Showing:
    """The `lopd.protocols.Progress` of a call that passes none: it draws from a thread, so that a long batch does not look like a halt.

    Args:
        draw: is called with how far it has come, and whether it is over; None for what stderr is.
        period: seconds between two calls.
        always: draw the end of what was over before the first drawing too.
    """

    def __init__(self, draw: Draw | None = None, period: float | None = None, *, always: bool = False) -> None:
        self._given, self._period, self._always = draw, period, always

    def begin(self, what: str, total: int, done: int, tokens: int | None, counted: Counted, /) -> None:
        """Start to watch."""
        draw, period = (self._given, UNWATCHED_S) if self._given else _way()
        self._draw, self._drawn = draw, False
        self._pace, self._over = Pace(what, total, done, tokens, counted), Event()
        self._thread = Thread(target=self._watch, args=(self._period or period,), name="lopd-progress", daemon=True)
        self._thread.start()

    def _watch(self, period: float) -> None:
        while not self._over.wait(period):
            self._drawn = True
            self._show(over=False)

    def _show(self, *, over: bool) -> None:
        # whatever goes wrong with a display stops no work
        with suppress(Exception):
            self._draw(self._pace, over)

    def advance(self, rollouts: int, tokens: int, refused: int, /) -> None:
        """Count what was done."""
        self._pace.advance(rollouts, tokens, refused)

    def end(self) -> None:
        """Draw how it ended, if anything was drawn."""
        self._over.set()
        self._thread.join()
        if self._drawn or self._always:
            self._show(over=True)


def _way() -> tuple[Draw, float]:
    """Return how to draw, and how often."""
    with suppress(AttributeError, ValueError):  # a program may have closed it, or have none
        if sys.stderr.isatty():
            return _on_terminal, WATCHED_S
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return (_notebook(), WATCHED_S) if hasattr(shell, "kernel") else (_on_a_line, UNWATCHED_S)


def _on_terminal(pace: Pace, over: bool) -> None:
    width = shutil.get_terminal_size().columns - 1
    filled = _BAR * pace.done // max(pace.total, 1)
    line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {pace}"[:width]
    print(f"\r{line:{width}}", end="\n" if over else "", file=sys.stderr, flush=True)


def _on_a_line(pace: Pace, _over: bool) -> None:
    if sys.stderr is not None:  # `print` would take the output for it
        print(pace, file=sys.stderr, flush=True)


def _notebook() -> Draw:
    """Draw in one place below the cell, with a bar that every browser has: no widgets."""
    handles: list[Any] = []

    def draw(pace: Pace, _over: bool) -> None:
        if handles:
            handles[0].update(pace)
        else:
            handles.append(need("IPython.display", "Progress").display(pace, display_id=True))

    return draw
