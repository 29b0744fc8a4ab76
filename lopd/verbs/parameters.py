"""The parameters of a checkpoint: those that are trained are in it, and of the others a few values, since a run is resumed on the same ones."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lopd.errors import CheckpointError
from lopd.protocols import Student
from lopd.records.values import few_values

_VALUES = 8
#: As a share of their norm, at least and by the step of their type: what adapters leave in the weights under them that were merged and taken out
#: again, be they as large as those.
_LEFT, _STEPS_LEFT = 1e-4, 1.3
_HALVES = (torch.bfloat16, torch.float16)
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_HALVES, torch.float32, torch.float64)}


def named(student: Student | DistributedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter after its name, which is the same where torch.compile is around a part of the student, or around all of it."""
    return ((name.replace("_orig_mod.", ""), parameter) for name, parameter in student.named_parameters())


def trained_parameters(student: Student | DistributedDataParallel) -> dict[str, Tensor]:
    """Return those that are trained, by name."""
    return {name: p for name, p in named(student) if p.requires_grad}


def untrained_values(student: Student) -> dict[str, list[float]]:
    """Return up to 8 values of each parameter that is not trained, evenly spaced; sharded, quantised, absent and infinite ones are left out."""
    chosen = few_values(((name, parameter) for name, parameter in named(student) if not parameter.requires_grad), _VALUES)
    return {name: values.tolist() for name, values in chosen.items() if values.isfinite().all()}


def untrained_types(student: Student) -> dict[str, str]:
    """Return the type of each parameter that is not trained, as "bfloat16"."""
    return {name: str(p.dtype).removeprefix("torch.") for name, p in named(student) if not p.requires_grad}


def check_untrained(path: Path, saved: Mapping[str, Sequence[float]], types: Mapping[str, str], student: Student) -> None:
    """Refuse parameters that are not trained and have other values than were saved, whatever 16 bits they are in; names of both are compared.

    Types that were not saved are the narrowest ones that hold the values.
    """
    current, now = untrained_values(student), untrained_types(student)
    for name in (name for name in current if name in saved):
        before, values = (torch.tensor(values, dtype=torch.float32, device="cpu") for values in (saved[name], current[name]))
        fits = next((dtype for dtype in _HALVES if torch.equal(before, before.to(dtype).float())), torch.float32)
        if not _alike(name, before, values, _TYPES.get(types.get(name, ""), fits), getattr(torch, now[name])):
            raise CheckpointError(
                f"Checkpoint {path}: parameter {name!r}, which is not trained, has other values than when it was saved; rebuild the student as it "
                "was, on the same base, and with the same seed where a part of its adapters is frozen; or, if others are meant, pass "
                "`changed=['untrained']` to `load_checkpoint` (with `lopd run`: begin in another output folder)."
            )


def _alike(name: str, before: Tensor, now: Tensor, *types: torch.dtype) -> bool:
    """Return whether one has the values of the other, or of a cast of it, or both of casts; under adapters also up to what they leave."""
    if before.shape != now.shape:
        return False
    # adapters in 32 bits may have been drawn in 16
    if any(torch.equal(before.to(dtype).float(), now) or torch.equal(before, now.to(dtype).float()) for dtype in _TYPES.values()):
        return True
    step = max(torch.finfo(dtype).eps for dtype in types)
    # each may be half a step beside the value, or half the smallest of float16
    if {*types} == {*_HALVES} and torch.allclose(before, now, rtol=0.6 * step, atol=2**-24):
        return True
    return ".base_layer." in name and bool((now - before).norm() <= max(_LEFT, _STEPS_LEFT * step) * before.norm())


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
