"""What a run looks like in a terminal: a progress bar for the verbs, and one table per phase.  Drawn by rich."""

from collections.abc import Sequence
from contextlib import suppress
from signal import SIGPIPE
from typing import final

from attrs import define, field

from lopd.errors import printable
from lopd.protocols import Counted
from lopd.records.optional import needing
from lopd.verbs.showing import Pace, Showing

with needing("rich", __name__):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text


class PlainConsole(Console):
    """A console that prints texts as they are, without markup, and exits as a process that a pipe without a reader ends: rich exits with 1.

    Args:
        stderr: whether it prints to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Let rich see to it that nothing is written at exit."""
        with suppress(SystemExit):
            super().on_broken_pipe()
        raise SystemExit(128 + SIGPIPE)


@final
@define(eq=False)
class RichProgress:
    """A `lopd.protocols.Progress` bar: rollouts done, tokens a second, rows refused, elapsed and remaining time.

    Where the console is not a terminal, it prints a line a minute and one at the end; in a notebook it is a bar.

    Args:
        console: where to draw; `Console(quiet=True)` shows nothing.
    """

    console: Console = field(factory=lambda: PlainConsole(stderr=True))
    _bar: Progress | None = field(default=None, init=False)
    _pace: Pace | None = field(default=None, init=False)
    _other: Showing | None = field(default=None, init=False)

    def begin(self, what: str, total: int, done: int, tokens: int | None, counted: Counted, /) -> None:
        """Draw a bar for `total` rollouts, of which `done` are there, and the others have `tokens` tokens."""
        if not self.console.is_terminal:
            self._other = Showing(None if self.console.is_jupyter else self._print, always=True)
            self._other.begin(what, total, done, tokens, counted)
            return
        self._pace = Pace(what, total, done, tokens, counted)
        left, speed, remaining = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[speed]", "fields[left]"))
        self._bar = bar = Progress(left, BarColumn(), MofNCompleteColumn(), speed, TimeElapsedColumn(), remaining, console=self.console)
        bar.add_task(printable(what), total=total, completed=done, speed="", left="")
        bar.start()

    def _print(self, pace: Pace, _over: bool) -> None:
        self.console.print(str(pace), markup=False, highlight=False, soft_wrap=True)

    def advance(self, rollouts: int, tokens: int, refused: int, /) -> None:
        """Move the bar."""
        if self._other is not None:
            self._other.advance(rollouts, tokens, refused)
        elif self._bar is not None and self._pace is not None:
            self._pace.advance(rollouts, tokens, refused)
            self._bar.update(TaskID(0), completed=self._pace.done, speed=self._pace.speed, left=self._pace.left)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._other is not None:
            self._other.end()
        if self._bar is not None:
            self._bar.stop()
        self._other = self._bar = None


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a rich table; numbers to the right, and on several lines where there is no room.

    Texts are shown as they are: brackets are not markup, and controls are spelled out.
    """
    drawn = Table(title=_text(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        # without its last digits a number is another one
        drawn.add_column(_text(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(_cell(value) for value in row))
    return drawn


def _cell(value: object) -> Text:
    return _text(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))


def _text(value: str) -> Text:
    return Text(printable(value))
