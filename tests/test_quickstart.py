"""The quickstart script on tiny models: it finishes, a second call changes nothing, and killing it changes nothing either."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
SIZES = [
    "--sft-prompts",
    "12",
    "--opd-prompts",
    "12",
    "--held-out-prompts",
    "6",
    "--max-new-tokens",
    "8",
    "--sft-steps",
    "12",
    "--opd-steps",
    "12",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_model: Callable[..., Any]) -> Callable[[Path], list[str]]:
    """The command line that runs the script into a folder."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("teacher", 1), ("student", 2)):
        make_model("llama_tied", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"what is {i} + {i}?"}) for i in range(30)))
    models = ["--teacher", str(folder / "teacher"), "--student", str(folder / "student"), "--prompts", str(folder / "prompts.jsonl")]
    return lambda out: [sys.executable, str(SCRIPT), *models, *SIZES, "--out", str(out)]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def unbroken(command: Callable[[Path], list[str]], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    subprocess.run([*command(out), "--online"], check=True, env=environment, capture_output=True, timeout=200)
    return out


def results(out: Path) -> list[dict[str, Any]]:
    """The phases without what differs from run to run: times, and online OPD, which only one run does."""
    phases = json.loads((out / "metrics.json").read_text())["phases"]
    return [{k: v for k, v in p.items() if k not in ("wall_s", "peak_rss_gib")} for p in phases if "online" not in p["name"]]


def histories(out: Path) -> list[list[dict[str, Any]]]:
    rows = [json.loads((out / "phases" / f"{name}.json").read_text())["history"] for name in ("sft", "lightning-opd")]
    return [[{k: v for k, v in step.items() if k != "seconds"} for step in history] for history in rows]


def test_it_measures_every_phase_and_writes_what_it_promises(unbroken: Path) -> None:
    report = json.loads((unbroken / "metrics.json").read_text())
    by_name = {p["name"]: p for p in report["phases"]}
    for name in ("evaluate before SFT", "evaluate after SFT", "evaluate after OPD", "evaluate after online OPD"):
        assert by_name[name]["held_out_reverse_kl"] > 0
        assert by_name[name]["ci95"] > 0
    assert all(p["wall_s"] > 0 and p["tokens"] > 0 for p in report["phases"])
    assert (unbroken / "curves.png").stat().st_size > 10_000
    assert (unbroken / "store.zarr" / "zarr.json").exists()


def test_a_second_call_finds_everything_done(unbroken: Path, command: Callable[[Path], list[str]], environment: dict[str, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file() and path.parent != unbroken}
    report = json.loads((unbroken / "metrics.json").read_text())
    subprocess.run([*command(unbroken), "--online"], check=True, env=environment, capture_output=True, timeout=200)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((unbroken / "metrics.json").read_text()) == report


def test_other_settings_in_the_same_folder_are_refused(
    unbroken: Path, command: Callable[[Path], list[str]], environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [*command(unbroken), "--opd-lr", "1.0"], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    assert "opd_lr" in done.stderr


def test_a_run_that_is_killed_again_and_again_equals_the_run_that_was_not(
    unbroken: Path, command: Callable[[Path], list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for moment in ("teacher writes", "step  11/12", "teacher scores", "step  11/12"):
        process = subprocess.Popen(command(out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        seen = any(line.startswith(moment) for line in process.stdout)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert seen
        assert not (out / "metrics.json").exists()
    subprocess.run(command(out), check=True, env=environment, capture_output=True, timeout=200)
    assert results(out) == results(unbroken)
    assert histories(out) == histories(unbroken)
