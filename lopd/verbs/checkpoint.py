"""Training state on disk: a run that is stopped and resumed equals the run that was not, bit for bit on the CPU.

Bit for bit needs the same threads, processor and versions (`docs/reliability.md`, "What bit for bit needs").

Layout: `FOLDER/step-00000012.0/{parameters,optimizer}.safetensors, state.json, lopd.json`.  A folder gets its name only when it is complete,
and no folder is removed before its successor has one, so at every moment the newest name is a whole checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lopd.errors import CheckpointError
from lopd.protocols import Student
from lopd.records.checks import local_path
from lopd.records.flush import flush
from lopd.records.manifest import Lineage
from lopd.records.ranks import Ranks, alike, inner, on_first

_RNG = "rng.cpu"
_STATE = "state.json"


def save_checkpoint(
    folder: str | Path, student: Student | DistributedDataParallel, optimizer: Optimizer, *, next_step: int, lineage: Lineage
) -> Path:
    """Write trained parameters, optimizer, random state, data position and lineage; then remove the other checkpoints in `folder`.

    Where several ranks train, each calls this; what is sharded is put together, tensor by tensor, and rank 0 writes.  The files are those of one
    process, so a run may be resumed on any number of ranks, sharded or not.

    Args:
        folder: of the run; each checkpoint is a folder in it.
        student: whose trained parameters are saved.
        optimizer: whose state is saved.
        next_step: the first step that is not in these weights; go on with `batches(...)[next_step:]` after loading.
        lineage: `steps.lineage` of what was trained on.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: the optimizer holds a parameter that the student does not have; nothing was written.
    """
    folder, ranks, own = local_path("Checkpoint", folder, CheckpointError), Ranks.current(), inner(student)
    trained = _labels(f"Checkpoint of step {next_step}", own, optimizer)
    parameters, (entries, plain) = on_first(_trained(own)), _flatten(optimizer)
    moments = on_first(entries)
    others = _checkpoints(folder)
    final = folder / f"step-{next_step:08d}.{1 + max((_order(p)[1] for p in others if _order(p)[0] == next_step), default=-1)}"
    ranks.wait()  # all have seen which checkpoints there are
    if ranks.rank == 0:
        state = {"next_step": next_step, "trained": trained, "optimizer": plain}
        tensors = {"parameters": parameters, "optimizer": {**moments, _RNG: torch.get_rng_state()}}
        _write(folder, final, tensors, state, lineage)
        for other in others:
            shutil.rmtree(other)
    ranks.wait()
    return final


def _write(folder: Path, final: Path, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any], lineage: Lineage) -> None:
    """All of a checkpoint, and then its name."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in tensors.items():
        save_file(values, partial / f"{name}.safetensors")
    (partial / _STATE).write_text(json.dumps(state, indent=1))
    lineage.write(partial)
    for path in [*partial.iterdir(), partial]:
        flush(path)
    partial.rename(final)
    flush(folder)


def load_checkpoint(folder: str | Path, student: Student | DistributedDataParallel, optimizer: Optimizer | None = None) -> int:
    """Put the newest checkpoint of `folder` into student and optimizer; gives the next step, 0 if there is no checkpoint.

    Args:
        folder: of the run, or one checkpoint in it (what `save_checkpoint` gave).
        student: built as it was for the run that is resumed.
        optimizer: likewise; None restores the weights only.

    Raises:
        CheckpointError: other parameters, shapes or optimizer than were saved, or a damaged file; nothing was changed.
    """
    folder, own = local_path("Checkpoint", folder, CheckpointError), inner(student)
    found = [folder] if (folder / _STATE).exists() else _checkpoints(folder)
    if not found:
        return 0
    path = max(found, key=_order)
    state = _read(path / _STATE, lambda path: json.loads(path.read_text()), "next_step", "optimizer", "trained")
    saved = _read(path / "parameters.safetensors", load_file)
    current = {name: p.detach() for name, p in _trained(own).items()}
    _check_parameters(path, saved, current)
    if optimizer is not None:
        _check_optimizer(path, own, optimizer, state)
        tensors = _read(path / "optimizer.safetensors", load_file, _RNG)
        torch.set_rng_state(tensors.pop(_RNG))
        _unflatten(optimizer, tensors, state["optimizer"])
    for name, tensor in saved.items():
        current[name].copy_(alike(tensor, current[name]))
    return int(state["next_step"])


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("step-*.*"))


def _order(path: Path) -> tuple[int, int]:
    """(next step, how often it was saved before)."""
    step, again = path.name.removeprefix("step-").split(".")
    return int(step), int(again)


def _trained(student: Student) -> dict[str, Tensor]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def _labels(owner: str, student: Student, optimizer: Optimizer) -> list[list[str]]:
    """The student's name and the shape of each group's parameters: torch keeps their state by place, and a place is no identity."""
    labels = {id(p): f"{name} {tuple(p.shape)}" for name, p in student.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in labels:
                raise CheckpointError(
                    f"{owner}: parameter {place} of optimizer group {number} is none of the student's, expected only the student's own; "
                    "make the optimizer over `student.named_parameters()`."
                )
    return [[labels[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _read(path: Path, load: Callable[[Path], Mapping[str, Any]], *needed: str) -> dict[str, Any]:
    """Return what a file of a checkpoint holds; refuse one that cannot be read, or lacks a name."""
    cause: Exception | None = None
    try:
        found = dict(load(path))
        reason = next((f"it lacks {name!r}" for name in needed if name not in found), "")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        found, reason, cause = {}, str(error) or type(error).__name__, error
    if reason:
        raise CheckpointError(
            f"Checkpoint file {path}: it cannot be read ({reason}), expected what lopd wrote; restore it, or remove its folder."
        ) from cause
    return found


def _check_parameters(path: Path, saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    for name in sorted(saved.keys() ^ current.keys()):
        where = "the checkpoint only" if name in saved else "the student only"
        raise CheckpointError(
            f"Checkpoint {path}: parameter {name!r} is in {where}, expected the same trained parameters; rebuild the student."
        )
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape or tensor.dtype != current[name].dtype:
            raise CheckpointError(
                f"Checkpoint {path}: parameter {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{current[name].dtype} {tuple(current[name].shape)}; rebuild the student as it was."
            )


def _check_optimizer(path: Path, student: Student, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    owner, kind = f"Checkpoint {path}", state["optimizer"]["class"]
    labels, saved = _labels(owner, student, optimizer), state["trained"]
    sizes, saved_sizes = [len(group) for group in labels], [len(group) for group in saved]
    if kind != type(optimizer).__name__ or sizes != saved_sizes:
        raise CheckpointError(
            f"{owner}: its optimizer is {kind} over {saved_sizes} parameters, expected {type(optimizer).__name__} over {sizes}; "
            "make the optimizer as it was."
        )
    for number, (theirs, ours) in enumerate(zip(saved, labels, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), None)
        if place is not None:
            raise CheckpointError(
                f"{owner}: parameter {place} of optimizer group {number} is {theirs[place]!r}, expected {ours[place]!r}; "
                "give the optimizer the parameters in the order in which it had them."
            )


def _flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and what is left as JSON."""
    state = optimizer.state_dict()
    entries = {f"{i}.{name}": value for i, entry in state["state"].items() for name, value in entry.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
    return tensors, {"class": type(optimizer).__name__, "groups": state["param_groups"], "others": others}


def _unflatten(optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    entries: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in {**tensors, **plain["others"]}.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        sharded = isinstance(value, Tensor) and value.shape == parameter.shape
        entries.setdefault(int(index), {})[name] = alike(value, parameter) if sharded else value
    # JSON has no tuples: those of the live groups (betas) say which lists were tuples
    live = optimizer.state_dict()["param_groups"]
    groups = [{k: tuple(v) if isinstance(g.get(k), tuple) else v for k, v in s.items()} for s, g in zip(plain["groups"], live, strict=True)]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
