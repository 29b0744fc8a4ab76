"""The loggers of examples/14_loggers.py themselves: each wrote what the page wrote as JSON lines, by its own reader.

`make test-loggers` installs them all.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import frozen

ROOT = Path(__file__).parents[1]
STEPS = 8


def needs(logger: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(logger) is None, reason=f"{logger} is not installed: run `make test-loggers`")


@frozen
class Page:
    """What a run of the page left behind.

    Args:
        folder: where it ran.
        environment: it ran in; a logger that reads is told the same folders.
        out: what it printed.
        err: what it said on the error stream.
    """

    folder: Path
    environment: dict[str, str]
    out: str
    err: str

    def rows(self) -> dict[int, dict[str, float]]:
        """Return step -> numbers, as in the JSON lines."""
        rows = [json.loads(line) for line in (self.folder / "runs/14/metrics.jsonl").read_text().splitlines()]
        return {row.pop("step"): row for row in rows}

    def tell(self, *command: str) -> str:
        """Return what a program printed."""
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Run the page in a process of its own, as a user does; nothing of it goes to the user's own folders, or to anybody."""
    folder = tmp_path_factory.mktemp("loggers")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    environment |= {f"WANDB_{kind}_DIR": str(folder / f"wandb-{kind.lower()}") for kind in ("CACHE", "CONFIG", "DATA")}
    environment |= {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples/14_loggers.py")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return Page(folder, environment, done.stdout, done.stderr)


def in_tensorboard(page: Page) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(page.folder / "runs/14"))
    events.Reload()
    rows: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in rows.setdefault(event.step, {})
            rows[event.step][name] = event.value
    return rows


def in_trackio(page: Page) -> dict[int, dict[str, float]]:
    query = ("query", "project", "--project", "lopd", "--sql", "SELECT step, metrics FROM metrics ORDER BY id", "--json")
    rows = json.loads(page.tell("trackio.cli", *query))["rows"]
    assert len(rows) == STEPS
    return {row["step"]: json.loads(row["metrics"]) for row in rows}


def in_wandb(page: Page) -> dict[int, dict[str, float]]:
    (folder,) = (page.folder / "runs/14/wandb").glob("offline-run-*")
    records: list[dict[str, Any]] = [json.loads(line) for line in page.tell("wandb", "leet", "inspect", "--json", str(folder)).splitlines()]
    assert [record["exit"].get("exit_code", 0) for record in records if record["type"] == "exit"] == [0]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert len(items) == STEPS
    return {item["_step"]: {name: value for name, value in item.items() if not name.startswith("_")} for item in items}


@pytest.mark.parametrize(
    ("read", "precision"),
    [
        pytest.param(in_tensorboard, 1e-6, marks=needs("tensorboard"), id="tensorboard"),  # float32
        pytest.param(in_trackio, 1e-12, marks=needs("trackio"), id="trackio"),
        pytest.param(in_wandb, 1e-12, marks=needs("wandb"), id="wandb"),
    ],
)
def test_a_logger_has_every_number_of_every_step(read: Callable[[Page], dict[int, dict[str, float]]], precision: float, page: Page) -> None:
    expected, got = page.rows(), read(page)
    assert list(expected) == list(got) == list(range(STEPS))
    for step, row in expected.items():
        assert got[step].keys() == row.keys()
        np.testing.assert_allclose([got[step][name] for name in row], list(row.values()), rtol=precision, atol=1e-30)


@pytest.mark.parametrize("logger", [pytest.param(name, marks=needs(name)) for name in ("tensorboard", "trackio", "wandb")])
def test_a_logger_takes_the_names_as_they_are_and_says_nothing_against_them(logger: str, page: Page) -> None:
    assert re.search(rf"numbers a step to JSON lines.*\b{logger}\b.*: loss, reverse_kl", page.out)
    assert "Warning" not in page.err
    assert "Reserved" not in page.err
