"""What the system cannot list or look up for once is not taken for missing, as pathlib takes it in some versions of Python."""

import errno
import os

import pytest
from conftest import TOKENIZER_ID
from small_runs import small  # noqa: F401

from lopd import CausalLMStudent, load_checkpoint, save_checkpoint
from lopd.backends.files.local import LocalFiles
from lopd.errors import CheckpointError, ConflictError, LopdError, StoreExistsError, StoreWriteError
from lopd.records import Lineage, ModelId, Ranks
from lopd.records.lineage import LINEAGE_FILE
from lopd.tools.phases import Run, digest, write_json

WRITTEN = Lineage(ModelId("writer", "1", "float32"))


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


@pytest.fixture
def stale(monkeypatch):
    """Return `stale(path)`, from which on it cannot be looked up; `Path.exists` answers as in Python 3.14."""

    def refuse(path):
        real = os.stat

        def stat(place, **options):
            if not isinstance(place, int) and os.fspath(place) == str(path):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return real(place, **options)

        monkeypatch.setattr(os, "stat", stat)
        monkeypatch.setattr("pathlib.Path.exists", os.path.exists)

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


@pytest.mark.parametrize("mine", [True, False])
def test_no_rank_waits_for_one_that_cannot_list_its_checkpoints(mine, small, unlisted, monkeypatch, tmp_path):
    run, told = tmp_path / "run", []
    save_checkpoint(run, *small, next_step=3, lineage=Lineage())

    def gather(_, answers):
        told.extend(answers)
        return [(run, []), *answers] if mine else [CheckpointError("Rank 0 cannot list it."), *answers]

    monkeypatch.setattr(Ranks, "current", lambda: Ranks(1, 2))
    monkeypatch.setattr(Ranks, "gather", gather)
    if mine:
        unlisted(run)
    for act in (lambda: load_checkpoint(run, *small), lambda: save_checkpoint(run, *small, next_step=4, lineage=Lineage())):
        with pytest.raises(LopdError, match=r"it cannot be listed \(.*Permission denied" if mine else "Rank 0 cannot list it"):
            act()
    assert [isinstance(answer, LopdError) for answer in told] == [mine] * 2


def test_a_checkpoint_that_stands_elsewhere_is_found_through_its_link(small, tmp_path):
    path = save_checkpoint(tmp_path / "run", *small, next_step=3, lineage=Lineage())
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    path.with_name("step-00000004.0").symlink_to(tmp_path / "nowhere")
    assert load_checkpoint(tmp_path / "run", *small) == load_checkpoint(path, *small) == 3


def test_an_export_does_not_lose_a_folder_that_cannot_be_listed(make_model, tokenizer, unlisted, monkeypatch, tmp_path):
    out, student = tmp_path / "out", CausalLMStudent(make_model("llama_tied", seed=7), TOKENIZER_ID)
    student.export(out, tokenizer, WRITTEN)
    (out / "logs").mkdir()
    (out / "logs/steps.bin").write_text("1 2 3")
    before = names(out)
    unlisted(out / "logs")
    with pytest.raises(StoreExistsError, match=r"Export .*out: .*Permission denied.*logs.* the student was written to .*out-export"):
        student.export(out, tokenizer, WRITTEN)
    monkeypatch.undo()
    assert names(out) == before
    assert names(out / "logs") == ["steps.bin"]
    assert Lineage.read(tmp_path / "out-export") == WRITTEN


def test_a_run_whose_phases_cannot_be_listed_is_not_claimed_as_unused(unlisted, tmp_path):
    run = Run(tmp_path)
    run.claim({"lr": 1}, {})
    write_json(tmp_path / "seed-0/phases/sft.attempts", 1)
    with pytest.raises(ConflictError, match=r"lr is 2 now, and was 1 when .*sft\.attempts was written"):
        run.claim({"lr": 2}, {})
    unlisted(tmp_path / "seed-0/phases")
    said = r"Run .*: it cannot be listed \(.*Permission denied.*\), expected what a run wrote; try again, .* or choose another folder"
    with pytest.raises(ConflictError, match=said):
        run.claim({"lr": 2}, {})


def test_what_cannot_be_listed_is_not_left_out_of_a_digest_or_an_age(unlisted, tmp_path):
    (tmp_path / "model/part").mkdir(parents=True)
    (tmp_path / "model/part/weights").write_bytes(b"1")
    (tmp_path / "model/linked").symlink_to("part")
    os.utime(tmp_path / "model", (0, 0))
    os.utime(tmp_path / "model/part", (0, 0))
    whole = digest(str(tmp_path / "model"))
    (tmp_path / "model/linked").unlink()
    assert digest(str(tmp_path / "model")) == whole, "what links lead to is not in the folder"
    assert LocalFiles(tmp_path).age("model") < 1e6
    unlisted(tmp_path / "model/part")
    for ask in (lambda: digest(str(tmp_path / "model")), lambda: LocalFiles(tmp_path).age("model")):
        with pytest.raises(PermissionError):
            ask()


def test_a_phase_that_cannot_be_looked_up_is_not_done_again_and_those_after_it_stay(stale, monkeypatch, tmp_path):
    done = []
    run, work = Run(tmp_path), {name: lambda name=name: done.append(name) or {} for name in ("sft", "opd")}
    run.phases(work)
    stale(tmp_path / "phases/sft.json")
    for ask in (lambda: run.phases(work), lambda: run.phase("sft", work["sft"])):
        with pytest.raises(OSError, match="Stale"):
            ask()
    monkeypatch.undo()
    run.phases(work)
    assert done == ["sft", "opd"]


def test_a_lineage_that_cannot_be_looked_up_is_neither_empty_nor_replaced(stale, tmp_path):
    WRITTEN.write(tmp_path)
    before = (tmp_path / LINEAGE_FILE).read_bytes()
    stale(tmp_path / LINEAGE_FILE)
    assert Lineage.read(tmp_path) == WRITTEN
    with pytest.raises(StoreWriteError, match="Stale"):
        Lineage().write(tmp_path)
    assert (tmp_path / LINEAGE_FILE).read_bytes() == before


def test_an_export_that_was_cut_short_and_cannot_be_looked_up_keeps_its_owners_files(make_model, tokenizer, stale, tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.old"
    student = CausalLMStudent(make_model("llama_tied", seed=7), TOKENIZER_ID)
    student.export(out, tokenizer, WRITTEN)
    (out / "notes.txt").write_text("mine")
    out.rename(old)  # as after a kill between two moves
    stale(old)
    with pytest.raises(StoreExistsError, match=r"Stale.*the student was written to .*/out-export"):
        student.export(out, tokenizer, WRITTEN)
    assert (old / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_looked_up_is_not_settled(stale, tmp_path):
    (tmp_path / "log").mkdir()
    stale(tmp_path / "log")
    with pytest.raises(StoreWriteError, match=r"Folder .*log: flushing it failed with .*Stale"):
        LocalFiles(tmp_path).settle("log")
