"""Only files are read as files: a device, a pipe, a socket or a folder in the place of one is an error, and never a wait."""

import copy
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENIZER_ID

from lopd import CausalLMStudent, load_checkpoint, save_checkpoint
from lopd.engines.hf import load_model
from lopd.engines.identity import folder_model_id, model_id
from lopd.errors import CheckpointError, CorruptStoreError, InvalidRecordError, LopdError, PromptError, StoreExistsError
from lopd.records import Lineage, read_prompts
from lopd.records.lineage import LINEAGE_FILE
from lopd.records.paths import open_regular, read_regular
from lopd.tools.report import RunHistory

KINDS = ("device", "pipe", "socket", "folder")


@pytest.fixture(params=KINDS)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield a link to what is not a file."""
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


def test_prompts_lineages_and_histories_are_files(odd: Path, tokenizer: Any, tmp_path: Path) -> None:
    for name in ("prompts.jsonl", "prompts.parquet", LINEAGE_FILE):
        (tmp_path / name).symlink_to(odd)
    for name in ("prompts.jsonl", "prompts.parquet"):
        for path in (tmp_path / name, f"file://{tmp_path / name}"):
            with pytest.raises(PromptError, match=rf"Prompt file .*{name}: it cannot be read .*; check the path"):
                read_prompts(path, tokenizer)
    with pytest.raises(CorruptStoreError, match=r"Lineage .*lopd.json: it cannot be read .*; restore or remove it"):
        Lineage.read(tmp_path)
    with pytest.raises(InvalidRecordError, match=r"History .*link: it cannot be read"):
        RunHistory.read(odd)


@pytest.mark.filterwarnings("ignore::lopd.errors.TrainingWarning")
def test_checkpoints_and_exports_are_files(odd: Path, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    optimizer = torch.optim.SGD(student.parameters())
    saved = save_checkpoint(tmp_path / "run", student, optimizer, next_step=1, lineage=Lineage())
    for name in ("state.json", "parameters.safetensors", "optimizer.safetensors"):
        (saved / name).rename(tmp_path / "aside")
        (saved / name).symlink_to(odd)
        with pytest.raises(CheckpointError, match=rf"Checkpoint file .*{name}: it cannot be read"):
            load_checkpoint(saved, student, optimizer)
        (tmp_path / "aside").replace(saved / name)
    export = tmp_path / "export"
    export.mkdir()
    (export / LINEAGE_FILE).symlink_to(odd)
    with pytest.raises(LopdError, match=r"Export .*export"):
        student.export(export, tokenizer, Lineage())
    (export / LINEAGE_FILE).unlink()
    os.mkfifo(export / "pipe")
    with pytest.raises(StoreExistsError, match=r"Export .*export: it cannot be replaced .*the student was written to .*/export-export"):
        student.export(export, tokenizer, Lineage())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_models_are_files(odd: Path, name: str, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for part in (llama, tokenizer):
        part.save_pretrained(folder)
    os.mkfifo(folder / "other")
    assert folder_model_id(folder).same_weights(model_id(llama)), "a pipe of another name is in nobody's way"
    (folder / name).unlink()
    (folder / name).symlink_to(odd)
    for load in (load_model, folder_model_id) if name != "tokenizer.json" else (load_model,):
        with pytest.raises(LopdError, match=rf"Model .*{folder}"):
            load(folder)


def test_files_are_read_whole_up_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link") == read_regular(tmp_path / "file", largest=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", largest=4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "other")
