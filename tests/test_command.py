"""The command `lopd`: what its words share, and that asking for help waits for nothing."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lopd import ZarrStore
from lopd.errors import EngineError
from lopd.testing import tiny_manifest, tiny_rollout
from lopd.tools.command import COMMANDS, main, process

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "transformers", "rich", "pyarrow", "yaml"}


def started(*words: str) -> tuple[set[str], str]:
    """Run `python -m lopd` with these words; return the heavy packages that it imports, and what it prints."""
    script = (
        "import json, runpy, sys\n"
        f"sys.argv = ['lopd', *{words!r}]\n"
        "try:\n    runpy.run_module('lopd', run_name='__main__')\n"
        "finally:\n    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1])), done.stdout


#: The planner has the constants of its model as defaults.
LIGHT = sorted(COMMANDS.keys() - {"plan"})


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--example"], *([name, "--help"] for name in LIGHT)])
def test_help_and_the_version_import_nothing_heavy(words):
    heavy, printed = started(*words)
    assert heavy == set()
    assert printed


def test_the_help_has_every_word_examples_and_exit_codes(capsys):
    for words in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as leaving:
            main([*words, "--help"])
        shown = capsys.readouterr().out
        assert leaving.value.code == 0
        assert f"examples:\n  lopd {' '.join(words)}" in shown
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"    {name} " not in shown] == []
    assert "exit codes: 0 all is well, 1 problems" in shown


def test_the_command_is_installed_under_its_name():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"lopd": f"{process.__module__}:{process.__name__}"}


def test_a_defect_is_not_taken_for_problems_in_a_store(monkeypatch, capsys, tmp_path):
    def fail(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("lopd.backends.opening.open_store", fail)
    monkeypatch.setattr("warnings.formatwarning", None)
    monkeypatch.setattr("sys.argv", ["lopd", "verify", str(tmp_path)])
    assert process() == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it_without_a_word():
    command = f"{sys.executable} -m lopd run --example | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("word", ["verify", "info"])
def test_what_nobody_reads_to_its_end_is_not_said_to_be_well(word, tmp_path):
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    store.append([tiny_rollout("a")])
    command = f"{sys.executable} -m lopd {word} {tmp_path}/run.zarr | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("scroe a", "lopd: error: there is no command scroe (is it score?); `lopd --help` shows all"),
        ("warp", "lopd: error: there is no command warp; `lopd --help` shows all"),
        ("--verison", "lopd: error: unknown arguments: --verison (is it --version?)"),
        ("verify a --jsno", "lopd verify: error: unknown arguments: --jsno (is it --json?)"),
        # and not that --prompts is missing
        ("sample s --promts f --student a", "lopd sample: error: unknown arguments: --promts (is it --prompts?)"),
        (
            "score s --teacher a --share 3/3",
            "lopd score: error: argument --share: it is '3/3', expected I/N with I from 0 to N - 1, as 0/16",
        ),
        ("score s --teacher a --api-key=sesame", "lopd score: error: unknown arguments: --api-key"),
        ("verify a b", "lopd: error: unknown arguments: too many"),
    ],
)
def test_a_typing_error_is_answered_with_what_may_be_meant(words, says, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(words.split())
    assert leaving.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == says


def test_what_follows_two_dashes_is_not_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "--", "--odd"]) == 2
    assert "--odd: there is no folder with anything in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sentence", "shown"),
    [
        ("pass `context=` that all servers have", "pass `--context` that all servers have"),
        ("pass `retry_quarantined=True` to try them again", "pass `--retry-quarantined` to try them again"),
        ("or wait for longer (`first_contact_s`)", "or wait for longer (`--wait`)"),
        ("pass `api_key=` or set VLLM_API_KEY", "pass `--key-variable` or set VLLM_API_KEY"),
        ("pass `identity=model_id(model)` or `recheck=0`", "pass `identity=model_id(model)` or `recheck=0`"),
    ],
)
def test_an_error_names_the_options_of_the_command(sentence, shown, monkeypatch, capsys):
    def fail(*_arguments):
        raise EngineError(sentence)

    monkeypatch.setattr("lopd.backends.opening.open_store", fail)
    assert main(["score", "a", "--teacher", "b"]) == 2
    assert capsys.readouterr().err == f"{shown}\n"


def test_ctrl_c_is_one_sentence(monkeypatch, capsys, tmp_path):
    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lopd.backends.opening.open_store", stop)
    assert main(["verify", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "Stopped; what is committed stays, and the same command goes on from there.\n"
