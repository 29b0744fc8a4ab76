"""The state of an optimizer and of random numbers as tensors and JSON, and back: each value comes back as what it was."""

from collections.abc import Mapping
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lopd.errors import CheckpointError, InvalidRecordError, TrainingWarning
from lopd.protocols import Student
from lopd.records.checks import a_kind
from lopd.records.ranks import Ranks, alike, bare
from lopd.records.warn import warn_user
from lopd.verbs.parameters import named

#: The state of rank 0, which is all that older checkpoints have; that of rank 3 has ".3" behind it.
RNG, _CUDA = "rng.cpu", "rng.cuda"
#: Settings of an optimizer by which its result is the same up to rounding.
_EQUAL = ("params", "foreach", "fused", "capturable", "differentiable")
_PREPARED = "AcceleratedOptimizer"
_PLAIN = (type(None), bool, int, float, str)


def parameter_labels(owner: str, student: Student, optimizer: Optimizer) -> list[list[str]]:
    """Return the student's name and the shape of each group's parameters: torch keeps their state by place, and a place is not an identity."""
    labels = {id(p): f"{name} {tuple(p.shape)}" for name, p in named(student)}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in labels:
                raise CheckpointError(
                    f"{owner}: parameter {place} of optimizer group {number} is not one of the student's, expected only the student's own; "
                    "make the optimizer over `student.named_parameters()`."
                )
    return [[labels[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def check_optimizer(path: Path, student: Student, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse an optimizer of another kind, or over other parameters, than a checkpoint's.

    Raises:
        CheckpointError: it is.
    """
    owner, kind, own = f"Checkpoint {path}", state["optimizer"]["class"], type(bare(optimizer)).__name__
    # older checkpoints have the name of accelerate's wrapper: what it wrapped is known by its settings alone
    if kind == _PREPARED and all(optimizer.defaults.keys() <= group.keys() for group in state["optimizer"]["groups"]):
        kind = own
    labels, saved = parameter_labels(owner, student, optimizer), state["trained"]
    sizes, saved_sizes = [len(group) for group in labels], [len(group) for group in saved]
    if kind != own or sizes != saved_sizes:
        raise CheckpointError(
            f"{owner}: its optimizer is {kind} over {saved_sizes} parameters, expected {own} over {sizes}; make the optimizer as it was."
        )
    for number, (theirs, ours) in enumerate(zip(saved, labels, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), None)
        if place is not None:
            raise CheckpointError(
                f"{owner}: parameter {place} of optimizer group {number} is {theirs[place]!r}, expected {ours[place]!r}; "
                "give the optimizer the parameters in the order in which it had them."
            )


def flatten(owner: str, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as named tensors, and what is left as JSON.

    Raises:
        InvalidRecordError: it holds a value that cannot be saved.
    """
    state = optimizer.state_dict()
    entries = {f"{i}.{name}": value for i, entry in state["state"].items() for name, value in entry.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    kind = type(bare(optimizer)).__name__
    others = {key: _pack(f"{owner}, {kind} {key}", value, tensors) for key, value in entries.items() if not isinstance(value, Tensor)}
    groups = [{k: _pack(f"{owner}, {kind} {k!r}", v, tensors) for k, v in group.items()} for group in state["param_groups"]]
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise InvalidRecordError(f"{owner}, {kind} {key}: it is a sparse tensor, expected a dense one; make it so.")
        # one that wraps others, as torchao's low-bit states do, has no memory of its own; of torch's sharded ones the part counts
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if hasattr(part, "__tensor_flatten__"):
            raise InvalidRecordError(
                f"{owner}, {kind} {key}: it is {a_kind(part)}, expected a plain tensor; use an optimizer that keeps such."
            )
    return tensors, {"class": kind, "groups": groups, "others": others}


def restore(path: Path, optimizer: Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put what `flatten` gave, or an older version of it, into the optimizer, each value as it was; warn of settings that this changes.

    Raises:
        CheckpointError: a tensor is missing; nothing was changed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole = {key: value for key, value in tensors.items() if key.split(".", 1)[0].isdigit()}
    try:
        saved = {**whole, **_unpack_all(plain["others"], tensors)}
        groups = [_unpack_all(group, tensors) for group in plain["groups"]]
    except KeyError as error:
        raise CheckpointError(
            f"Checkpoint {path}: tensor {error} of its optimizer is missing; restore it, or remove its folder."
        ) from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"Checkpoint {path}: the state of its optimizer cannot be read ({error}); restore it, or remove its folder."
        ) from error
    entries: dict[int, dict[str, Any]] = {}
    for key, value in saved.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        sharded = isinstance(value, Tensor) and value.shape == parameter.shape
        own = alike(value, parameter) if sharded else value
        # the file is mapped, and as long as something is left there, NFS does not let its folder be removed
        stays = own is value and isinstance(value, Tensor) and not (sharded and parameter.is_cuda)
        entries.setdefault(int(index), {})[name] = value.clone() if stays else own
    # older checkpoints wrote tuples as lists: the live groups (betas) show which were tuples
    live = optimizer.state_dict()["param_groups"]
    groups = [{k: _like(v, g.get(k)) for k, v in s.items()} for s, g in zip(groups, live, strict=True)]
    if replaced := _replaced(bare(optimizer), groups, live):
        warn_user(
            f"Checkpoint {path}: its optimizer goes on with {', '.join(replaced)}; take another folder for another run, or set these in "
            "`optimizer.param_groups` after loading.",
            TrainingWarning,
        )
    taken = {i: {k: v for k, v in entry.items() if _carried(v)} for i, entry in entries.items()}
    optimizer.load_state_dict({"state": taken, "param_groups": groups})
    # torch casts what it is given to the dtype of the weights, and calls the type of what it can iterate over: put those as they were
    for place, entry in entries.items():
        parameter, state = parameters[place], optimizer.state[parameters[place]]
        for label, value in entry.items():
            there = state.get(label)
            if label not in taken[place] or isinstance(there, dict):  # bitsandbytes wraps its states in one, and takes them out again
                state[label] = _moved(value, parameter.device)
            elif isinstance(there, Tensor) and there.dtype != value.dtype:
                state[label] = value.to(there.device)


def _replaced(optimizer: Optimizer, groups: list[dict[str, Any]], live: list[dict[str, Any]]) -> list[str]:
    """Return which arguments of an optimizer a checkpoint replaces by others, and by which; a rate that a scheduler changes by its first one."""
    found = list[str]()
    for saved, group in zip(groups, live, strict=True):
        # what is not an argument, such as a count, is the optimizer's own; schedulers of torch that move momentum write down how far
        moved = ("betas", "momentum") if "max_momentum" in saved else ()
        for name in signature(type(optimizer)).parameters:
            if name in saved and name in group and name not in (*_EQUAL, *moved):
                key = "initial_lr" if name == "lr" else name
                before, now = (_shown(one.get(key, one[name])) for one in (saved, group))
                found += [f"{name} {before} and not {now}"] if before != now else []
    return [*dict.fromkeys(found)]


def _shown(value: Any) -> str:
    """Return a setting as text, to six digits, the same for a number of Python, numpy and torch; of anything else its type."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}"
    return str(value) if isinstance(value, _PLAIN) else type(value).__name__


def _carried(value: Any) -> bool:
    """Return whether `load_state_dict` of torch leaves this what it is, its dtype apart."""
    return all(map(_carried, value.values())) if isinstance(value, dict) else isinstance(value, Tensor | bool | int | float | None)


def _like(value: Any, live: Any) -> Any:
    """Return a setting of a group on the device of the one that it replaces, and as a tuple if that is one."""
    if isinstance(live, Tensor):
        return _moved(value, live.device)
    return tuple(value) if isinstance(live, tuple) else value


def _pack(owner: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return JSON of a value; its tensors are added to `tensors`, and named in the JSON.

    >>> _pack("Optimizer", {"betas": (0.9, np.float32(0.5))}, {})
    {'dict': [['betas', {'tuple': [0.9, {'numpy': 'float32', 'value': 0.5}]}]]}

    Raises:
        InvalidRecordError: it holds something that is neither a number, text, tensor, array, dtype, None, nor a list, tuple or dict of such.
    """
    if isinstance(value, _PLAIN) and not isinstance(value, np.number):
        return value
    if (leaf := _pack_leaf(owner, value, tensors)) is not None:
        return leaf
    if isinstance(value, list | tuple):
        packed = [_pack(owner, item, tensors) for item in value]
        return packed if isinstance(value, list) else {"tuple": packed}
    if isinstance(value, Mapping):
        return {"dict": [[_pack(owner, part, tensors) for part in pair] for pair in value.items()]}
    raise InvalidRecordError(
        f"{owner}: it holds {a_kind(value)}, expected numbers, text, tensors, and lists or dicts of them; take it out."
    )


def _pack_leaf(owner: str, value: Any, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Return what JSON has no word for; None for anything else."""
    if isinstance(value, Tensor):
        name = f"nested.{len(tensors)}"
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    # JSON has no more digits than 64 bits
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc" and value.dtype.char not in "gG":
        shape = {"shape": value.shape} if isinstance(value, np.ndarray) else {}
        return {"numpy": value.dtype.name, "value": _pack(owner, value.tolist(), tensors), **shape}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"complex": [value.real, value.imag]} if isinstance(value, complex) else None


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the inverse of `_pack`; JSON that it did not write stays as it is.

    Raises:
        KeyError: a tensor is missing.
        ValueError, TypeError: JSON that `_pack` did not write, which looks like what it writes.
    """
    match packed:
        case [*items]:
            made: Any = [_unpack(item, tensors) for item in items]
        case {"tensor": name}:
            made = tensors[name]
        case {"numpy": dtype, "value": value, "shape": shape}:
            made = np.array(_unpack(value, tensors), dtype).reshape(shape)
        case {"numpy": dtype, "value": value}:  # a scalar; older checkpoints have arrays so, too
            made = np.array(_unpack(value, tensors), dtype)[()]
        case {"dtype": name}:
            made = getattr(torch, str(name), None)
            if not isinstance(made, torch.dtype):
                raise TypeError(f"dtype {name!r:.80} is not one of torch")
        case {"complex": [real, imaginary]}:
            made = complex(real, imaginary)
        case {"tuple": [*items]}:
            made = tuple(_unpack(items, tensors))
        case {"dict": [*pairs]}:
            made = dict(_unpack(pairs, tensors))
        case _:
            made = packed
    return made


def _unpack_all(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return each of these unpacked, by its name."""
    return {name: _unpack(value, tensors) for name, value in packed.items()}


def _moved(value: Any, device: torch.device) -> Any:
    """Return the same with its tensors on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, dict) else value


def random_states(student: Student) -> dict[str, Tensor]:
    """Return the states of all ranks by name, of the CPU and of the GPUs that hold parameters; every rank must call."""
    cards = _cards(student)
    mine = {RNG: torch.get_rng_state()} | ({_CUDA: torch.stack([torch.cuda.get_rng_state(card) for card in cards])} if cards else {})
    return {_of(name, rank): state for rank, states in enumerate(Ranks.current().gather([mine])) for name, state in states.items()}


def restore_random(student: Student, saved: Mapping[str, Tensor]) -> None:
    """Draw on from this rank's state; what has none there, as of another number of ranks, is seeded by that of rank 0."""
    ranks, cards = Ranks.current(), _cards(student)
    torch.manual_seed(int(sha256(saved[RNG].numpy().tobytes() + str(ranks.rank).encode()).hexdigest()[:15], 16))
    if ranks.rank > 0 and sum(name.startswith(RNG) for name in saved) != ranks.size:
        return
    torch.set_rng_state(saved[_of(RNG, ranks.rank)])
    for card, state in zip(cards, saved.get(_of(_CUDA, ranks.rank), ()), strict=False):
        torch.cuda.set_rng_state(state, card)


def _of(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _cards(student: Student) -> list[torch.device]:
    return [*dict.fromkeys(p.device for _, p in student.named_parameters() if p.is_cuda)]
