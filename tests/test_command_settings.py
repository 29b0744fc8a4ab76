"""The file of `lopd run`: values that are refused, and what is kept of it."""

import pytest
from test_command_run import example, here, models, written  # noqa: F401

from lopd.errors import InvalidRecordError
from lopd.tools.command import main, settings
from lopd.tools.command.models import Model
from lopd.tools.command.settings import read_settings


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"top_p": 3.0}},
        {"sampling": {"max_new_tokens": -5}},
        {"opd__tokens_per_batch": 0},
        {"loss": {"clip": -1.0}},
        {"evaluation__samples_per_prompt": 0},
        {"teacher": {"model": "runs/tiny/teacher", "context": 3}},
        {"teacher": {"model": "runs/tiny/teacher", "served_as": "zzz"}},
    ],
    ids=str,
)
def test_values_that_make_no_sense_and_keys_that_nothing_reads_are_refused_at_once(here, tmp_path, capsys, changes):
    assert main(["run", written(here, example(**changes, out=str(tmp_path / "run")))]) == 2
    assert "lopd run --example" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_urls_of_several_servers_are_kept_without_their_secrets():
    found = settings.RunSettings(
        "out", Model("a"), Model("b", engine=["https://u:hunter2@h1", "https://h2"]), ["x"], settings.Training(1, 1e-3)
    ).flat()
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("scalar", ["2024-13-45", "0b_", "!!int foo", "!!timestamp foo"])
def test_a_scalar_that_yaml_cannot_make_is_one_sentence(scalar, tmp_path):
    with pytest.raises(InvalidRecordError, match="it cannot be read"):
        read_settings(written(tmp_path, f"out: {scalar}\n"))
