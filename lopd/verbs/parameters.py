"""The parameters of a checkpoint: those that are trained are in it, and of the others a few values, since a run is resumed on the same ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lopd.errors import CheckpointError
from lopd.protocols import Student
from lopd.records.values import few_values

_VALUES = 8
#: As a share of their norm: what adapters leave in the weights under them that were merged and taken out again is below it, by the type of weights.
_LEFT = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}


def trained_parameters(student: Student | DistributedDataParallel) -> dict[str, Tensor]:
    """Return those that are trained, by name."""
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def untrained_values(student: Student) -> dict[str, list[float]]:
    """Return up to 8 values of each parameter that is not trained, evenly spaced; sharded, quantised, absent and infinite ones are left out."""
    chosen = few_values(((name, parameter) for name, parameter in student.named_parameters() if not parameter.requires_grad), _VALUES)
    return {name: values.tolist() for name, values in chosen.items() if values.isfinite().all()}


def check_untrained(path: Path, saved: Mapping[str, Sequence[float]], current: Mapping[str, Sequence[float]]) -> None:
    """Refuse parameters that are not trained and have other values than were saved, whatever 16 bits they are in; names of both are compared."""
    for name in (name for name in current if name in saved):
        if not _alike(name, *(torch.tensor(values, dtype=torch.float32, device="cpu") for values in (saved[name], current[name]))):
            raise CheckpointError(
                f"Checkpoint {path}: parameter {name!r}, which is not trained, has other values than when it was saved; rebuild the student as it "
                "was, on the same base, and with the same seed where a part of its adapters is frozen; or pass `changed=['untrained']` if others "
                "are meant."
            )


def _alike(name: str, before: Tensor, now: Tensor) -> bool:
    """Return whether one has the values of the other, or of a cast of it; under adapters also up to what they leave."""
    if before.shape != now.shape:
        return False
    casts = {dtype: (before.to(dtype).float(), now.to(dtype).float()) for dtype in _LEFT}
    if any(torch.equal(then, now) or torch.equal(before, cast) for then, cast in casts.values()):
        return True
    held = next(dtype for dtype, (then, cast) in casts.items() if torch.equal(before, then) or torch.equal(now, cast))
    return ".base_layer." in name and bool((now - before).norm() <= _LEFT[held] * before.norm())


def check_parameters(path: Path, saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Refuse parameters to train other than those that were saved, by name, type and shape."""
    for name in sorted(saved.keys() ^ current.keys()):
        where = "the checkpoint only" if name in saved else "the student only"
        raise CheckpointError(f"Checkpoint {path}: parameter {name!r} is in {where}; rebuild the student.")
    for name, tensor in saved.items():
        if tensor.shape != current[name].shape or tensor.dtype != current[name].dtype:
            raise CheckpointError(
                f"Checkpoint {path}: parameter {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{current[name].dtype} {tuple(current[name].shape)}; rebuild the student as it was."
            )
