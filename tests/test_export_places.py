"""An export keeps who may enter its folder, and is not lost where that cannot be moved."""

import errno
import os
import shutil

import pytest
from conftest import TOKENIZER_ID, build_tokenizer

import lopd.engines.placing
import lopd.records.flush
from lopd import CausalLMStudent, ModelId
from lopd.engines.identity import folder_model_id, model_id
from lopd.errors import StoreExistsError, StoreWriteError
from lopd.records import Lineage

LINEAGE = Lineage(ModelId("writer", "1", "float32"))


@pytest.fixture
def student(make_model):
    return CausalLMStudent(make_model("llama_tied", seed=7), TOKENIZER_ID)


def modes(folder):
    return {name: (folder / name).stat().st_mode & 0o7777 for name in (".", "mine", "mine/logs")}


class _Watching:
    """A tokenizer that does something before it is saved: it notes the mode of the folder, for one."""

    def __init__(self, act=None):
        self._inner, self.seen = build_tokenizer(), []
        self._act = act or (lambda folder: self.seen.append(folder.stat().st_mode & 0o7777))

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def save_pretrained(self, folder):
        self._act(folder)
        self._inner.save_pretrained(folder)


@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o775])
def test_who_may_enter_a_folder_is_who_might_before(mode, student, tmp_path):
    out, watching = tmp_path / "out", _Watching()
    (out / "mine/logs").mkdir(parents=True)
    (out / "mine/logs/notes.txt").write_text("mine")
    if os.geteuid() == 0:
        os.chown(out, -1, 4321)
    for path, own in ((out, mode), (out / "mine", 0o711), (out / "mine/logs", mode)):
        path.chmod(own)
    before, group = modes(out), out.stat().st_gid
    for _ in range(2):
        student.export(out, watching, LINEAGE)
        assert modes(out) == before == {".": mode, "mine": 0o711, "mine/logs": mode}
        assert out.stat().st_gid == group
        assert (out / "mine/logs/notes.txt").read_text() == "mine"
        assert mode != 0o2770 or (out / "lopd.json").stat().st_gid == group
    assert watching.seen == [mode] * 2, "not open to others meanwhile"


@pytest.fixture(params=["mounted", "under a folder without write permission"])
def out(request, tmp_path, monkeypatch):
    """Make a folder that cannot be moved."""
    made = tmp_path / "out"
    made.mkdir()
    if request.param == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == made)
    else:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    return made


def assert_is(folder, student):
    assert folder_model_id(folder).revision == model_id(student.model).revision
    assert Lineage.read(folder) == LINEAGE
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_moved_is_filled(out, student, tmp_path, monkeypatch):
    (out / "checkpoints").mkdir()
    (out / "notes.txt").write_text("mine")
    monkeypatch.chdir(out)  # as a container that works in its volume
    student.export(out, build_tokenizer(), LINEAGE)
    assert_is(out, student)
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_what_a_folder_that_cannot_be_moved_holds_stays_and_the_next_export_is_in_it(out, student, make_model, tmp_path):
    student.export(out, build_tokenizer(), LINEAGE)
    for seed in (8, 9):
        later = CausalLMStudent(make_model("llama_tied", seed=seed), TOKENIZER_ID)
        with pytest.raises(
            StoreExistsError, match=rf"holds 'chat_template.jinja', and cannot be replaced .* written to {out}/out-export, move"
        ):
            later.export(out, build_tokenizer(), LINEAGE)
        assert_is(out / "out-export", later)
        assert_is(out, student)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_folder_that_cannot_be_moved_names_the_export_last_and_an_interrupt_leaves_nothing_of_it(out, student, monkeypatch):
    moves, replace = [], os.rename

    def rename(path, target):
        moves.append(os.path.basename(target))  # noqa: PTH119 (names of any kind)
        replace(path, target)
        if stops and path.parent != out and moves[-1] == "config.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    stops = True
    with pytest.raises(KeyboardInterrupt):
        student.export(out, build_tokenizer(), LINEAGE)
    assert [*out.iterdir()] == []
    stops = False
    student.export(out, build_tokenizer(), LINEAGE)
    assert moves[-1] == "lopd.json"
    assert {*moves[-4:-1]} == {"config.json", "generation_config.json", "tokenizer_config.json"}


def test_a_student_is_not_lost_where_the_system_refuses_to_move_a_folder(student, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", lopd.engines.placing._replace
    for folder in (out, tmp_path / "out-export"):
        student.export(folder, build_tokenizer(), LINEAGE)
        (folder / "notes.txt").write_text(folder.name)

    def busy(folder, *rest):
        if folder == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(folder, *rest)

    monkeypatch.setattr(lopd.engines.placing, "_replace", busy)
    with pytest.raises(StoreExistsError, match=r"cannot be replaced \(.*busy\); the student was written to .*/out-export, move it"):
        student.export(out, build_tokenizer(), LINEAGE)
    for folder in (out, tmp_path / "out-export"):
        assert_is(folder, student)
        assert (folder / "notes.txt").read_text() == folder.name


def test_a_student_is_not_lost_where_a_folder_cannot_be_listed(student, tmp_path, monkeypatch):
    (tmp_path / "out/lost+found").mkdir(parents=True)
    walk = lopd.engines.placing.walked

    def walked(folder):
        if folder == tmp_path / "out":
            raise PermissionError(errno.EACCES, "Permission denied", "lost+found")
        return walk(folder)

    monkeypatch.setattr(lopd.engines.placing, "walked", walked)
    with pytest.raises(StoreExistsError, match=r"cannot be looked through \(.*lost\+found'\); the student was written to .*/out-export"):
        student.export(tmp_path / "out", build_tokenizer(), LINEAGE)
    assert_is(tmp_path / "out-export", student)


@pytest.mark.parametrize("refused", ["a file that another user alone reads", "a flush", "what a kill left"])
def test_a_student_is_not_lost_where_its_place_cannot_be_prepared(refused, student, tmp_path, monkeypatch):
    out = tmp_path / "out"
    student.export(out, build_tokenizer(), LINEAGE)
    (out / "notes.txt").write_text("mine")

    def refuse(*_paths, follow_symlinks=False):
        raise PermissionError(errno.EACCES, "Permission denied")

    flush, rename = lopd.engines.placing.flush, os.rename
    if refused.startswith("a file"):
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(shutil, "copy2", refuse)
    elif refused == "a flush":
        monkeypatch.setattr(
            lopd.engines.placing, "flush", lambda *paths: refuse() if any("notes" in str(path) for path in paths) else flush(*paths)
        )
    else:
        out.rename(tmp_path / ".out.old")
        monkeypatch.setattr(os, "rename", lambda path, *to: refuse() if path.name == ".out.old" else rename(path, *to))
    with pytest.raises(StoreExistsError, match=r"cannot be .*Permission denied.*; the student was written to .*/out-export, move it"):
        student.export(out, build_tokenizer(), LINEAGE)
    folder_of_old = tmp_path / ".out.old" if refused.startswith("what") else out
    assert (folder_of_old / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out-export/notes.txt").exists()
    assert folder_model_id(tmp_path / "out-export").revision == model_id(student.model).revision


@pytest.mark.parametrize("there", [True, False])
def test_an_export_whose_own_files_the_disk_refuses_is_not_kept(there, student, make_model, tmp_path, monkeypatch):
    if there:
        student.export(tmp_path / "out", build_tokenizer(), LINEAGE)
    sync = lopd.records.flush._sync

    def refuse(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):  # noqa: PTH115 (no file of a path)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(lopd.records.flush, "_sync", refuse)
    other = CausalLMStudent(make_model("llama_tied", seed=9), TOKENIZER_ID)
    with pytest.raises(StoreWriteError, match=r"it cannot be written \(.*No space left on device\); what was there is as it was"):
        other.export(tmp_path / "out", build_tokenizer(), LINEAGE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there
    if there:
        assert_is(tmp_path / "out", student)


def test_a_student_is_not_lost_where_no_folder_can_be_moved(student, tmp_path, monkeypatch):
    rename = os.rename

    def files_only(path, *to):
        if os.path.isdir(path):  # noqa: PTH112 (names of any kind)
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        rename(path, *to)

    monkeypatch.setattr(os, "rename", files_only)
    for times in (1, 2):
        with pytest.raises(StoreWriteError, match=rf"cannot be moved to {tmp_path}/out \(.*Too many.*; it stands in {tmp_path}/out-kept\."):
            student.export(tmp_path / "out", build_tokenizer(), LINEAGE)
        kept = [*tmp_path.iterdir()]
        assert len(kept) == times
        for folder in kept:
            assert_is(folder, student)


@pytest.mark.parametrize("there", [True, False])
def test_of_two_exports_under_one_name_at_once_the_one_that_ends_last_stands_there_whole(there, student, make_model, tmp_path):
    out, other = tmp_path / "out", CausalLMStudent(make_model("llama_tied", seed=9), TOKENIZER_ID)
    if there:
        student.export(out, build_tokenizer(), LINEAGE)

    def between(_):
        other.export(out, build_tokenizer(), LINEAGE)
        assert folder_model_id(out).revision == model_id(other.model).revision

    student.export(out, _Watching(between), LINEAGE)
    assert_is(out, student)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_another_precedes_by_a_moment_replaces_it_whole(there, student, make_model, monkeypatch, tmp_path):
    out, other, ours = (
        tmp_path / "out",
        CausalLMStudent(make_model("llama_tied", seed=9), TOKENIZER_ID),
        lopd.engines.placing.exported_files,
    )
    if there:
        student.export(out, build_tokenizer(), LINEAGE)
    asked = []

    def late(folder):
        asked.append(folder)
        found = ours(folder)
        if len(asked) == 1 + there:  # once what is there has been judged
            other.export(out, build_tokenizer(), LINEAGE)
            (out / "notes.txt").touch()
        return found

    monkeypatch.setattr(lopd.engines.placing, "exported_files", late)
    student.export(out, build_tokenizer(), LINEAGE)
    assert_is(out, student)
    assert (out / "notes.txt").exists() is (len(asked) > there)


def test_an_export_whose_files_somebody_removed_does_not_take_the_place_of_a_whole_one(student, make_model, tmp_path):
    student.export(tmp_path / "out", build_tokenizer(), LINEAGE)
    gone = _Watching(lambda folder: [path.unlink() for path in folder.iterdir()])
    with pytest.raises(StoreWriteError, match=r"config\.json has gone .*out is as it was; export again\.$"):
        CausalLMStudent(make_model("llama_tied", seed=9), TOKENIZER_ID).export(tmp_path / "out", gone, LINEAGE)
    assert_is(tmp_path / "out", student)
