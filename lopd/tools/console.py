"""What a run looks like in a terminal: a progress bar for the verbs, and one table per phase.  Drawn by rich."""

from collections.abc import Sequence
from datetime import timedelta
from typing import final

from attrs import define, field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lopd.errors import printable


@final
@define(eq=False)
class RichProgress:
    """A `lopd.protocols.Progress` bar: rollouts done, tokens per second, rows refused, elapsed and remaining time.

    The remaining time is that of the tokens, where their number is known: the verbs go from short rollouts to long ones.

    Args:
        console: where to draw.
    """

    console: Console = field(factory=lambda: Console(stderr=True))
    _bar: Progress | None = field(default=None, init=False)
    _task: TaskID = field(default=TaskID(0), init=False)
    _tokens: int = field(default=0, init=False)
    _all_tokens: int | None = field(default=None, init=False)
    _refused: int = field(default=0, init=False)

    def begin(self, what: str, total: int, done: int, tokens: int | None, /) -> None:
        """Draw a bar for `total` rollouts, of which `done` are there, and the others have `tokens` tokens."""
        self._tokens, self._all_tokens, self._refused = 0, tokens, 0
        left, right = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
        remaining = TimeRemainingColumn() if tokens is None else TextColumn("{task.fields[remaining]}")
        self._bar = bar = Progress(left, BarColumn(), MofNCompleteColumn(), right, TimeElapsedColumn(), remaining, console=self.console)
        self._task = bar.add_task(printable(what), total=total, completed=done, rate="", remaining="")
        bar.start()

    def advance(self, rollouts: int, tokens: int, refused: int, /) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        self._tokens += tokens
        self._refused += refused
        elapsed = self._bar.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed:,.0f} tokens/s" if elapsed else ""
        remaining = ""
        if self._all_tokens is not None and self._tokens:
            seconds = round(elapsed * max(self._all_tokens - self._tokens, 0) / self._tokens)
            remaining = f"{timedelta(seconds=seconds)} left"
        noted = f"{rate}, {self._refused:,} refused" if self._refused else rate
        self._bar.update(self._task, advance=rollouts + refused, rate=noted, remaining=remaining)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A rich table; numbers to the right.  Texts are shown as they are: brackets are not markup, and controls are spelled out."""
    drawn = Table(title=_text(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(_text(column), justify="left" if i == 0 else "right")
    for row in rows:
        drawn.add_row(*(_cell(value) for value in row))
    return drawn


def _cell(value: object) -> Text:
    return _text(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))


def _text(value: str) -> Text:
    return Text(printable(value))
