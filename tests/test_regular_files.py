"""Only files are read as files: a device, a pipe, a socket or a folder in the place of one is an error, and never a wait."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lopd.records.paths import open_regular, read_regular

KINDS = ("device", "pipe", "socket", "folder")


@pytest.fixture(params=KINDS)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A link to what is not a file."""
    target, opened = tmp_path / "target", None
    if request.param == "device":
        target = Path("/dev/zero")
    elif request.param == "pipe":
        os.mkfifo(target)
    elif request.param == "folder":
        target.mkdir()
    else:
        opened = socket.socket(socket.AF_UNIX)
        opened.bind(str(target))
    (tmp_path / "link").symlink_to(target)
    yield tmp_path / "link"
    if opened is not None:
        opened.close()


def test_what_is_not_a_file_is_refused_at_once(odd: Path) -> None:
    with pytest.raises(OSError, match=r"link"):
        open_regular(odd)


def test_files_are_read_whole_up_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link") == read_regular(tmp_path / "file", largest=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", largest=4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "other")
