"""Flushing several files and folders at once."""

import errno
import gc
import os
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest

from lopd.records import flush as flush_module
from lopd.records.flush import flush


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Return files, and the folder that they stand in."""
    files = [tmp_path / str(i) for i in range(20)]
    for path in files:
        path.touch()
    return [*files, tmp_path]


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the inodes of what was flushed."""
    found: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: found.append(os.fstat(descriptor).st_ino))
    return found


def inodes(paths: list[Path]) -> list[int]:
    return sorted(path.stat().st_ino for path in paths)


def test_each_is_flushed_once_and_nothing_stays_open(paths: list[Path], flushed: list[int]) -> None:
    gc.collect()  # of files that earlier tests left open
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names)
    flush(*paths)
    assert sorted(flushed) == inodes(paths)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 (names)


def test_many_files_are_not_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, most = [tmp_path / str(i) for i in range(300)], list[int]()
    for path in paths:
        path.touch()

    def fsync(_: int) -> None:
        most.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 (names)

    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names)
    monkeypatch.setattr(os, "fsync", fsync)
    flush(*paths)
    assert len(most) == 300
    assert max(most) < before + 100


def test_a_process_that_may_start_no_thread_flushes_one_after_the_other(
    paths: list[Path], flushed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    flush(*paths)
    assert sorted(flushed) == inodes(paths)


def test_what_is_missing_is_an_error_unless_it_may_be(paths: list[Path], flushed: list[int]) -> None:
    missing = paths[0].with_name("gone")
    with pytest.raises(FileNotFoundError):
        flush(missing, *paths)
    assert flushed == []
    flush(missing, *paths, missing_ok=True)
    assert sorted(flushed) == inodes(paths)


def test_an_error_of_one_among_many_is_raised(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = paths[3].stat().st_ino

    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        flush(*paths)


@pytest.mark.parametrize(
    ("code", "of"), [(errno.EINVAL, "folder"), (errno.ENOTSUP, "folder"), (errno.EIO, "folder"), (errno.EINVAL, "file")]
)
def test_a_file_system_that_cannot_flush_folders_is_written_to(
    code: int, of: str, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    *files, folder = paths

    def fsync(descriptor: int) -> None:
        if os.path.sameopenfile(descriptor, refusing):
            raise OSError(code, "it cannot")

    refusing = os.open(folder if of == "folder" else files[0], os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if of == "folder" and code != errno.EIO else pytest.raises(OSError, match="it cannot"):
        flush(*paths)
    os.close(refusing)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_flushes_with_threads_of_its_own(paths: list[Path]) -> None:
    flush(*paths)
    child = os.fork()
    if not child:
        flush(*paths)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_refused_is_said_after_the_others_are_flushed(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[int]()

    def fsync(descriptor: int) -> None:
        if len(found) == 0:
            found.append(-1)
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.001)
        found.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        flush(*paths)
    assert len(found) == len(paths)


def test_nothing_is_flushed_after_an_interrupt(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    begun, done = list[int](), list[int]()

    def fsync(descriptor: int) -> None:
        begun.append(descriptor)
        time.sleep(0.01)
        done.append(descriptor)

    real, waits = flush_module.wait, list[int]()

    def wait(tasks: list[Future[None]]) -> object:
        waits.append(len(tasks))
        if len(waits) == 1:
            raise KeyboardInterrupt
        return real(tasks)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(flush_module, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        flush(*paths)
    seen = len(done)
    assert (len(begun), waits) == (seen, [len(paths)] * 2), "those that began are waited for"
    time.sleep(0.05)
    assert len(done) == seen < len(paths), "and no other begins"
