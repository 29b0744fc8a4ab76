"""What a store, a model or a server wrote reaches a terminal, a log or a page as text, and not as its controls."""

import inspect
import io
import logging
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve
from rich.console import Console

from lopd import errors
from lopd.backends.memory_store import MemoryStore
from lopd.backends.retry import repeat
from lopd.errors import LopdError, LopdWarning, printable
from lopd.records import ModelId, Parity
from lopd.records.waiting import waiting
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.command.whole_run import summary
from lopd.tools.console import RichProgress, table
from lopd.tools.report import write_run_report, write_token_report

# an escape sequence, its one-byte form, a title, a mark of direction, half of a pair, a return and markup of rich
EVIL = "\x1b[31m\x9b32m\x1b]0;t\x07\u202e\ud800\r[red][link=http://x]a[/link]"
CONTROLS = ("\x1b", "\x9b", "\x07", "\u202e", "\ud800", "\r")
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, LopdError | LopdWarning)]


def assert_harmless(said: str) -> None:
    assert not [control for control in CONTROLS if control in said]
    assert "[link=http://x]a[/link]" in said.replace("\n", "").replace(" ", "")


def test_text_keeps_its_lines_and_letters() -> None:
    assert printable("Größe 字 🙂\nb") == "Größe 字 🙂\nb"
    assert printable(printable(EVIL)) == printable(EVIL)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_and_warnings_quote_no_controls(kind: type[Exception]) -> None:
    for made in (kind(f"Rollout {EVIL}: it is odd."), pickle.loads(pickle.dumps(kind(f"Rollout {EVIL}")))):  # noqa: S301
        assert_harmless(str(made))
    assert issubclass(kind, LopdWarning) == issubclass(kind, UserWarning)


def test_a_warning_is_shown_without_controls() -> None:
    with pytest.warns(errors.QuarantineWarning) as caught:
        warnings.warn(f"Column {EVIL}", errors.QuarantineWarning, stacklevel=1)
    assert_harmless(warnings.formatwarning(caught[0].message, caught[0].category, "f", 1, ""))


def test_identities_and_what_is_logged_are_shown_without_controls(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_harmless(str(ModelId(EVIL, "rev", "float32")))
    assert_harmless(str(Parity(EVIL, "transformers", 1, 1, 0.0, 0.0, 0.0, 0.0)))
    monkeypatch.setattr("lopd.records.waiting.QUIET_S", 0.0)
    monkeypatch.setattr("lopd.backends.retry.QUIET_S", -1.0)
    failures = [OSError(EVIL)]

    def work() -> None:
        if failures:
            raise failures.pop()

    with caplog.at_level(logging.WARNING), waiting(EVIL):
        repeat(work, lambda _: True, seconds=9.0, pause=0.0, longest=0.0)
        while len(caplog.messages) < 2:
            pass
    for message in caplog.messages:
        assert_harmless(message)


@pytest.mark.parametrize("markup", [True, False])
def test_tables_and_bars_show_texts_as_they_are(markup: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=400, force_terminal=False, markup=markup)
    console.print(table(EVIL, [EVIL, "b"], [[EVIL, 1], ["x", EVIL]]))
    for line in out.getvalue().splitlines():
        if "link" in line:
            assert_harmless(line)
    assert out.getvalue().count("[link=http://x]a[/link]") == 4
    out.truncate(0)
    progress = RichProgress(console)
    progress.begin(EVIL, 1, 0, None, "response tokens")
    progress.advance(1, 1, 0)
    progress.end()
    assert_harmless(out.getvalue())


def test_a_narrow_table_has_every_digit() -> None:
    out = io.StringIO()
    values = [1.234e-05, 123_456_789, -9.876e-05, 12_345_678_901, 0.1234, -1.235e-10]
    Console(file=out, width=60).print(table("", [f"column {i}" for i in range(7)], [["x", *values]]))
    cells = [line.split("│")[1:-1] for line in out.getvalue().splitlines() if line.startswith("│")]
    shown = ["".join(map(str.strip, column)) for column in zip(*cells, strict=True)]
    assert shown == ["x", "1.234e-05", "123,456,789", "-9.876e-05", "12,345,678,901", "0.1234", "-1.235e-10"]


def test_a_summary_names_the_folder_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    summary(SimpleNamespace(out="runs/[exp1]/:x:"), {})
    assert "Students, metrics and pages: runs/[exp1]/:x:/seed-*/opd," in capsys.readouterr().out


def test_pages_show_texts_as_they_are(tmp_path: Path) -> None:
    evil = f"<script>{EVIL}</script>"
    store = MemoryStore(evolve(tiny_manifest(), policy=ModelId(evil, "rev", evil)))
    rollout = tiny_rollout(evil, behavior_logprobs=[-0.5] * 3)
    store.append([rollout])
    store.append_scores("teacher", evolve(tiny_provenance(), model=ModelId(evil, "r", evil), engine=evil), [tiny_scores(rollout)])
    write_token_report(tmp_path / "tokens.html", store, [0], decode=lambda _: evil)
    write_run_report(tmp_path / "run.html", store, (), versions={evil: evil}, title=evil)
    for name in ("tokens.html", "run.html"):
        page = (tmp_path / name).read_text()
        assert not [control for control in CONTROLS if control in page]
        assert "<script>\\x1b" not in page
        assert "&lt;script&gt;\\x1b[31m" in page
