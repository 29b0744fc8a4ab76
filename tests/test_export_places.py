"""An export keeps who may enter its folder."""

import os

import pytest
from conftest import TOKENIZER_ID, build_tokenizer

from lopd import CausalLMStudent, ModelId
from lopd.records import Lineage

LINEAGE = Lineage(ModelId("writer", "1", "float32"))


@pytest.fixture
def student(make_model):
    return CausalLMStudent(make_model("llama_tied", seed=7), TOKENIZER_ID)


def modes(folder):
    return {name: (folder / name).stat().st_mode & 0o7777 for name in (".", "mine", "mine/logs")}


class _Watching:
    """A tokenizer that notes the mode of the folder that it is saved in."""

    def __init__(self):
        self._inner, self.seen = build_tokenizer(), []

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def save_pretrained(self, folder):
        self.seen.append(folder.stat().st_mode & 0o7777)
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
