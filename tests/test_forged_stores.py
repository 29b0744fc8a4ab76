"""Stores that somebody made to do harm: every file of theirs gives its content, or one error of ours; never a hang, a bomb or a stray file."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from forger import build, copied, examine

from lopd import ZarrStore
from lopd.backends.lance.decode import read_lines
from lopd.backends.lance.encode import LINE_CHECKSUM, ROLLOUT_LINE, encode_rollouts, line_checksums
from lopd.backends.sealing import checksum, seal, unseal
from lopd.backends.zarr.columns import ROLLOUT_FIELDS, SCORE_FIELDS
from lopd.backends.zarr.format import decode_zstd
from lopd.backends.zarr.segment import _line_checksums
from lopd.errors import CorruptStoreError, LopdError
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

FORGER = Path(__file__).with_name("forger.py")
COUNT = "3000" if "LOPD_KILLS" in os.environ else "40"

# Forged JSON


@pytest.mark.parametrize("kind", ["zarr", "lance"])
def test_forged_json_gives_what_it_says_or_one_error_of_ours(kind: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FORGER.parents[1]), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, FORGER, kind, tmp_path, COUNT], capture_output=True, text=True, check=False, env=environment)
    said = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"ended in {said[-1:]}: {run.stderr[-2000:]}"
    assert [one for one in said if one.get("found")] == []
    assert len(said) == 2 * int(COUNT)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Make a store of two commits."""
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for name in ("a", "b"):
        store.append([tiny_rollout(name)])
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["99999999999999999999", "9999999999", "0000000002", "-000000001", "000000000x", "٠٠٠٠٠٠٠٠٠١"])
@pytest.mark.parametrize("folder", ["commits", "checkpoints", "head"])
def test_files_with_names_of_other_numbers_are_no_hang(filled: Path, folder: str, name: str) -> None:
    (filled / folder).mkdir(exist_ok=True)
    shutil.copy(filled / "commits/0000000001.json", filled / folder / (name if folder == "head" else f"{name}.json"))
    with suppress(LopdError):
        assert len(ZarrStore.open(filled)) == 2
    with suppress(LopdError):
        list(ZarrStore.open(filled).verify())


def test_a_checkpoint_cannot_have_live_segments_removed(tmp_path: Path) -> None:
    build("zarr", tmp_path / "run")
    path = max((tmp_path / "run/checkpoints").iterdir())
    state = unseal(path.read_bytes())
    live = state["segments"][0]["path"]
    path.write_bytes(seal({**state, "replaced": {live: 1}}))
    with pytest.raises(CorruptStoreError, match=rf"segment {live} both live and replaced"):
        ZarrStore.open(tmp_path / "run")


def test_json_that_can_be_read_but_not_written_again_is_damaged() -> None:
    for depth in range(900, 1000):
        assert unseal(b'{"a":' + b"[" * depth + b"]" * depth + b"}") is None


# What only has the name of a file


@pytest.fixture
def odd_places(tmp_path: Path) -> Iterator[list[Path]]:
    """Make a device, a pipe, a socket and a folder."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
        yield [Path("/dev/zero"), tmp_path / "pipe", tmp_path / "socket", tmp_path / "folder"]


@pytest.mark.parametrize("kind", ["zarr", "lance"])
def test_links_in_the_place_of_files_are_errors(kind: str, tmp_path: Path, odd_places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    build(kind, tmp_path / "whole")
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file() and ".lance" not in str(path.relative_to(tmp_path))]
    one_of_each = {re.sub(r"[0-9a-f]{32}|\d{10}", "*", str(path.relative_to(tmp_path / "whole"))): path for path in files}
    assert len(one_of_each) > 5
    for path, odd in zip(one_of_each.values(), cycle(odd_places), strict=False):
        copied(tmp_path / "whole", tmp_path / "work")
        place = tmp_path / "work" / path.relative_to(tmp_path / "whole")
        place.unlink()
        place.symlink_to(odd)
        assert examine(kind, tmp_path / "work") == [], place
        shutil.rmtree(tmp_path / "work")


# Compressed arrays


@pytest.mark.parametrize("sized", [True, False])
def test_what_is_decompressed_has_the_size_that_was_recorded(sized: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=sized).compress(bytes(1 << 26))
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match="it holds more bytes than 4096"):
        decode_zstd(bomb, 4096)
    small = zstandard.ZstdCompressor(write_content_size=sized).compress(b"1234")
    assert decode_zstd(small, 4).tobytes() == b"1234"


# Lines


@pytest.mark.parametrize(
    ("number", "field", "value"),
    [
        *(
            (1, name, value)
            for name in ROLLOUT_FIELDS[:6]
            for value in (-8, 1 << 40, 1 << 62)
            if (name, value) != ("response_start", 1 << 40)
        ),
        *(
            (1, name, value)
            for name, value in (("finish_reason", 99), ("finish_reason", -1), ("generation", -1), ("masked", 2), ("masked", 1))
        ),
        *((1, "has_behavior", value) for value in (1, 2, 4)),
        *((2, name, value) for name in ("length", "start") for value in (-8, 1 << 40, 1 << 62)),
        *((2, name, -1) for name in ("row", "floored")),
    ],
)
def test_forged_lines_are_damage_that_verify_finds(number: int, field: str, value: int, filled: Path) -> None:
    if number == 2:
        ZarrStore.open(filled).append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("b"))])
    path = filled / f"commits/{number:010}.json"
    record = unseal(path.read_bytes())
    assert record is not None
    segment = record["segment"]
    file = filled / segment["path"] / "lines/c.0.0"
    lines = np.fromfile(file, "<i8").reshape(segment["arrays"]["lines"]["shape"])
    lines[0, (ROLLOUT_FIELDS if number == 1 else SCORE_FIELDS).index(field)] = value
    lines[:, -1] = _line_checksums(lines)
    segment["arrays"]["lines"]["checksum"] = checksum(lines.tobytes())
    file.write_bytes(lines.tobytes())
    path.write_bytes(seal(record))
    store = ZarrStore.open(filled)
    with pytest.raises(CorruptStoreError, match="line 0 is not what a writer makes"):
        store.read([1], ["teacher"][: number - 1])
    assert any("line 0 is not what a writer makes" in problem for problem in store.verify())
    assert examine("zarr", filled) == []


@pytest.mark.parametrize("field", ["prompt_length", "response_length", "generation", "row"])
def test_forged_lines_of_lance_are_damage(field: str) -> None:
    sampled = encode_rollouts([tiny_rollout("a")], 0, 100, "float32", commit=0, when=1.0, seed=0)
    lines = read_lines("Store", sampled, ROLLOUT_LINE, 0)
    lines[field] = -8
    for name, values in ((field, lines[field]), (LINE_CHECKSUM, line_checksums(lines, 0))):
        place = sampled.schema.get_field_index(name)
        sampled = sampled.set_column(place, sampled.schema.field(name), pa.array(values, sampled.schema.field(name).type))
    with pytest.raises(CorruptStoreError, match=rf"rollout 'a': the {field} of its line is -8, expected 0 or more"):
        read_lines("Store", sampled, ROLLOUT_LINE, 0)
