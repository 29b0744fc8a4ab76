"""What the system cannot list for once is not taken for missing, as pathlib takes it in some versions of Python."""

import errno
import os

import pytest
from small_runs import small  # noqa: F401

from lopd import load_checkpoint, save_checkpoint
from lopd.errors import CheckpointError, StoreWriteError
from lopd.records import Lineage


@pytest.fixture
def unlisted(monkeypatch):
    """Return `unlisted(folder)`, from which on it cannot be listed; `Path.glob` of Python 3.11 passes over this error, later ones over any."""

    def refuse(folder):
        real = os.scandir

        def scandir(path="."):
            if not isinstance(path, int) and os.fspath(path) == str(folder):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return refuse


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_cannot_be_listed_is_not_one_without_checkpoints(small, unlisted, monkeypatch, tmp_path):
    run = tmp_path / "run"
    for step in (3, 12):
        save_checkpoint(run, *small, next_step=step, lineage=Lineage(), keep=None)
    unlisted(run)
    with pytest.raises(CheckpointError, match=r"Checkpoint .*run: it cannot be listed \(.*Permission denied.*\), and .*; try again"):
        load_checkpoint(run, *small)
    with pytest.raises(StoreWriteError, match=r"Checkpoint .*run: it cannot be listed"):
        save_checkpoint(run, *small, next_step=1, lineage=Lineage())
    monkeypatch.undo()
    assert names(run) == ["step-00000003.0", "step-00000012.0"]
    assert load_checkpoint(run, *small) == 12


def test_a_checkpoint_that_stands_elsewhere_is_found_through_its_link(small, tmp_path):
    path = save_checkpoint(tmp_path / "run", *small, next_step=3, lineage=Lineage())
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    path.with_name("step-00000004.0").symlink_to(tmp_path / "nowhere")
    assert load_checkpoint(tmp_path / "run", *small) == load_checkpoint(path, *small) == 3
