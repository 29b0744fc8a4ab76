"""What is written stands in a folder of one writer until it is whole; those of killed writers go, and those of writers at work never."""

import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lopd.records.unfinished import unfinished


def test_a_folder_has_one_writer_and_goes_with_it(tmp_path: Path) -> None:
    place = tmp_path / "parent/.out.partial"
    with unfinished(place) as first, unfinished(place) as second, unfinished(place):
        assert first != second
        assert {first.is_dir(), second.is_dir()} == {True}
    assert list(place.parent.iterdir()) == []


def test_of_a_killed_writer_the_folder_goes_at_once_and_of_one_at_work_it_stays(tmp_path: Path) -> None:
    place = tmp_path / ".out.partial"
    code = (
        "import sys, time; from pathlib import Path; from lopd.records.unfinished import unfinished\n"
        "with unfinished(Path(sys.argv[1])) as made: (made / 'weights').touch(); print(made, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        made = Path(writer.stdout.readline().strip())
        long_ago = time.time() - 0.9 * 3600
        os.utime(made / "weights", (long_ago, long_ago))
        with unfinished(place):
            assert (made / "weights").exists()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with unfinished(place):
        assert not made.exists()


@pytest.mark.parametrize("hours", [0.9, 1.1])
@pytest.mark.parametrize("made_by", ["another machine", "an older lopd", "a disk without locks"])
def test_where_no_lock_shows_who_is_at_work_an_hour_without_a_write_decides(
    hours: float, made_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ".out.partial"
    with unfinished(place) as mine:
        pass
    left = {"another machine": tmp_path / ".out.partial.0123abcd-0123abcd", "an older lopd": place}.get(made_by, mine)
    if left == mine:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("there are no locks")))
    left.mkdir()
    (left / "weights").touch()
    at = time.time() - hours * 3600
    for path in (left / "weights", left):
        os.utime(path, (at, at))
    with unfinished(place):
        assert left.exists() is (hours < 1)


def test_what_has_another_name_stays(tmp_path: Path) -> None:
    names = [".out.partial.mine", ".out.partials", "..out.partial", ".xout.partial", "out"]
    for name in names:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    with unfinished(tmp_path / ".out.partial"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_writer_whose_folder_another_took_for_one_that_is_left_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, lock, swept = tmp_path / ".out.partial", fcntl.flock, list[int]()

    def late(folder: int, how: int) -> None:
        if not swept:  # between the making of the folder and its lock
            swept.append(1)
            with unfinished(place):
                pass
        lock(folder, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with unfinished(place) as made:
        assert made.is_dir()
        monkeypatch.undo()
        with unfinished(place):
            assert made.is_dir()


def test_a_name_of_a_machine_is_no_part_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "a/b\0" + 300 * "c")
    with unfinished(tmp_path / ".out.partial") as made:
        assert made.parent == tmp_path
