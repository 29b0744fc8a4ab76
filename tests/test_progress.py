"""What a verb shows of how far it has come: on a terminal, in a notebook and in a file."""

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lopd.tools.console import RichProgress
from lopd.verbs import asking, showing
from lopd.verbs.showing import Pace, Showing


class Screen(io.StringIO):
    """A stderr that is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, screen: Screen) -> Iterator[Screen]:
    """Draw all the time, wherever the screen is."""
    monkeypatch.setattr(showing, "WATCHED_S", 0.001)
    monkeypatch.setattr(showing, "UNWATCHED_S", 0.001)
    monkeypatch.setattr(sys, "stderr", screen)
    yield screen
    monkeypatch.undo()


def work(shown: Any, drawn: Any, what: str = "sampling") -> None:
    with asking.shown(shown, what, 8, 2, None, counted="response tokens") as advance:
        advance(2, 60, 1)
        until = time.monotonic() + 20
        while not drawn() and time.monotonic() < until:
            time.sleep(0.001)


def test_the_default_is_a_bar_that_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with watched(monkeypatch, Screen(terminal=True)) as screen:
        work(None, screen.getvalue)
        said = screen.getvalue()
    last = said.split("\r")[-1]
    assert last.startswith("[######....] sampling: 5 of 8 rollouts, 0:00:00 left, ")
    assert re.search(r"\d response tokens/s, 1 refused, 0:00:00 passed +\n$", last)
    assert {len(line.rstrip("\n")) for line in said.split("\r")[1:]} == {199}


def test_the_default_is_a_line_a_minute_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert showing.UNWATCHED_S == 60
    with watched(monkeypatch, Screen(terminal=False)) as screen:
        work(None, screen.getvalue, what="sampling \x1b[31m")
        lines = screen.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith(r"sampling \x1b[31m: ") for line in lines)
    assert "5 of 8 rollouts" in lines[-1]


def test_what_is_over_at_once_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        with watched(monkeypatch, Screen(terminal)) as screen:
            monkeypatch.setattr(showing, "WATCHED_S", 60.0)
            monkeypatch.setattr(showing, "UNWATCHED_S", 60.0)
            work(None, lambda: True)
            assert not screen.getvalue()


class Kernel:
    """What a notebook offers without widgets: `display` makes a place, and `update` changes what is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        package, module = ModuleType("IPython"), ModuleType("IPython.display")
        package.__path__ = []
        package.get_ipython = lambda: SimpleNamespace(kernel=self)
        module.display = self.display
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, thing: Any, *, display_id: bool) -> "Kernel":
        assert display_id
        assert not self.shown
        self.update(thing)
        return self

    def update(self, thing: Any) -> None:
        self.shown.append(thing._repr_html_())


def test_a_notebook_without_widgets_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    with watched(monkeypatch, Screen(terminal=False)) as screen:
        work(None, lambda: kernel.shown, what="scoring <script>")
        assert not screen.getvalue()
    assert len(kernel.shown) >= 2
    assert kernel.shown[-1].startswith('<progress value="5" max="8"></progress> scoring &lt;script&gt;: 5 of 8 rollouts, ')


def test_a_rich_console_in_a_notebook_needs_no_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    with watched(monkeypatch, Screen(terminal=False)):
        work(RichProgress(Console(force_jupyter=True)), lambda: kernel.shown)
    assert "5 of 8 rollouts" in kernel.shown[-1]


def test_a_rich_console_that_is_a_file_gets_lines_and_one_at_the_end_and_a_quiet_one_none() -> None:
    for quiet, lines in ((False, 1), (True, 0)):
        file = io.StringIO()
        work(RichProgress(Console(file=file, quiet=quiet)), lambda: True)
        assert file.getvalue().count("sampling: 5 of 8 rollouts") == lines


def test_a_rich_terminal_has_a_bar_with_rates_and_refused_rollouts() -> None:
    file = io.StringIO()
    work(RichProgress(Console(file=file, force_terminal=True, width=200)), lambda: True)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "5/8" in said
    assert "response tokens/s, 1 refused" in said


def test_the_remaining_time_is_that_of_the_tokens_where_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(showing, "monotonic", lambda: now[0])
    pace = Pace("scoring teacher", 10, 0, 1000, "read tokens")
    pace._began = 100.0  # the factory holds the clock that was there when the class was made
    now[0] = 110.0
    pace.advance(5, 100, 0)
    assert str(pace) == "scoring teacher: 5 of 10 rollouts, 0:01:30 left, 10 read tokens/s, 0:00:10 passed"


def test_a_closed_stderr_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, Screen(terminal=False)) as screen:
        shown = Showing()
        shown.begin("sampling", 2, 0, None, "response tokens")
        screen.close()
        time.sleep(0.01)
        shown.end()


@pytest.mark.parametrize("stderr", [None, object()], ids=["none", "not a file"])
def test_a_program_without_a_stderr_works_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stderr: object) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    shown = Showing()
    shown.begin("sampling", 2, 0, None, "response tokens")
    shown._show(over=True)
    shown.end()
    monkeypatch.undo()
    assert capsys.readouterr().out == ""
