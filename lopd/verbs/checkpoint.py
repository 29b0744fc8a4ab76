"""Training state on disk: a run that is stopped and resumed equals the run that was not, bit for bit on the CPU.

Bit for bit needs the same threads, processor and versions (`docs/reliability.md`, "What bit for bit needs").

Layout: `FOLDER/step-00000012.0/{parameters,optimizer}.safetensors, state.json, lopd.json`.  A folder has its name only when it is complete.
Later ones, of a run that went back, lose theirs before that and earlier ones after it: the newest name is always a whole checkpoint of this run.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lopd.errors import CheckpointError, LopdError, StoreWriteError, TrainingWarning
from lopd.protocols import Student
from lopd.protocols.doors import check_noun
from lopd.records.checks import check_at_least, check_kind, several
from lopd.records.flush import flush, share_mode
from lopd.records.lineage import Lineage
from lopd.records.paths import listed, local_path, open_regular
from lopd.records.ranks import Ranks, alike, inner, on_first
from lopd.records.stored import Count, read_as
from lopd.records.unfinished import set_aside, unfinished
from lopd.records.warn import warn_user
from lopd.verbs.parameters import check_parameters, check_untrained, trained_parameters, untrained_types, untrained_values
from lopd.verbs.training_state import RNG, check_optimizer, flatten, parameter_labels, random_states, restore, restore_random

_STATE = "state.json"
_OTHERS = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY}
_NAME = re.compile(r"step-(\d{8,})\.(\d+)")

_Optimizer = TypedDict("_Optimizer", {"class": str, "groups": list[Mapping[str, Any]], "others": Mapping[str, Any]})


class _State(TypedDict):
    """The content of `state.json`; checkpoints of an older lopd lack settings of steps, or values of what is not trained."""

    next_step: Count
    trained: list[list[str]]
    optimizer: _Optimizer
    steps: NotRequired[Mapping[str, Any] | None]
    untrained: NotRequired[Mapping[str, list[float]]]
    untrained_types: NotRequired[Mapping[str, str]]


class Described(Protocol):
    """Steps that describe their settings, as those of `lopd.batches` do."""

    @property
    def lineage(self) -> Lineage:
        """What is trained on."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides which rollouts a step has, and what they count: plain JSON, the same on every rank."""
        ...


def save_checkpoint(
    folder: str | Path,
    student: Student | DistributedDataParallel,
    optimizer: Optimizer,
    *,
    next_step: int,
    lineage: Lineage | None = None,
    steps: Described | None = None,
    keep: int | None = 1,
) -> Path:
    """Write trained parameters, optimizer, random states, data position and lineage; then remove older checkpoints in `folder`.

    Where several ranks train, each calls this; what is sharded is put together, tensor by tensor, and rank 0 writes.  The files are those of one
    process, so a run may be resumed on any number of ranks, sharded or not; with another number, all but rank 0 then drop other values.

    Args:
        folder: the run's folder; each checkpoint is a folder in it.
        student: whose trained parameters are saved.
        optimizer: whose state is saved.
        next_step: the first step that is not in these weights; go on with `batches(...)[next_step:]` after loading.
        lineage: who wrote what was trained on; None takes that of `steps`.
        steps: what was trained on (`lopd.batches`), whose settings are saved, so that `load_checkpoint` can compare them.
        keep: so many checkpoints stay, this one included; None keeps all.  One of a later step than this is of a run that went back, and goes.
            Folders with other names than lopd's are left alone.

    Returns:
        The folder of this checkpoint.

    Warns:
        TrainingWarning: `keep` is None, and a checkpoint of a later step stays, which `load_checkpoint` would take for the newest.

    Raises:
        ArgumentError: an argument is something else, such as the student in place of the optimizer.
        InvalidRecordError: `next_step` is less than 0, `keep` less than 1, or the optimizer holds more than numbers, text and plain tensors.
        CheckpointError: the optimizer holds a parameter that the student does not have, or there is neither lineage nor steps; nothing was written.
        StoreWriteError: the disk refused, or another process saves into this folder; the checkpoints before this one are as this call found them.
    """
    ranks, own = Ranks.current(), inner(student)
    folder, others = ranks.each(lambda: _look(folder, student, optimizer, steps, StoreWriteError))[ranks.rank]
    next_step = check_at_least("Checkpoint", "next_step", next_step, 0)
    keep = None if keep is None else check_at_least("Checkpoint", "keep", keep, 1)
    owner = f"Checkpoint of step {next_step}"
    if lineage is not None:
        check_kind("Lineage", lineage, Lineage, "pass `steps.lineage`")
    elif steps is not None:
        lineage = steps.lineage
    if lineage is None:
        raise CheckpointError(f"{owner}: there is no lineage; pass `steps=`, what it was trained on, or `lineage=`.")
    trained = parameter_labels(owner, own, optimizer)
    parameters, (entries, plain) = on_first(trained_parameters(own)), flatten(owner, optimizer)
    final = folder / f"step-{next_step:08d}.{1 + max((_order(p)[1] for p in others if _order(p)[0] == next_step), default=-1)}"
    settings = None if steps is None else dict(steps.settings)
    untrained = {"untrained": untrained_values(own), "untrained_types": untrained_types(own)}
    state = {"next_step": next_step, "trained": trained, "optimizer": plain, "steps": settings, **untrained}
    tensors = {"parameters": parameters, "optimizer": {**on_first(entries), **random_states(own)}}
    ranks.first(lambda: _write(final, tensors, state, lineage, _superseded(others, final, keep)))
    return final


def _look(
    folder: str | Path, student: object, optimizer: object, steps: object, refusal: type[LopdError], *, itself: str = ""
) -> tuple[Path, list[Path]]:
    """Check arguments; return the folder, and checkpoints in it that lopd named, the newest last, or itself where it holds the file `itself`.

    Other files beside them are the user's.
    """
    path = local_path("Checkpoint", folder, CheckpointError)
    check_noun(student, Student)
    if optimizer is not None:
        check_noun(optimizer, Optimizer)
    if steps is not None:
        check_kind("Steps", steps, Described, "pass what `lopd.batches` gave, or a slice of it")
    try:
        found = [path / one.name for one in listed(path) if one.name == itself or (_NAME.fullmatch(one.name) and one.is_dir())]
    except OSError as error:
        raise refusal(f"Checkpoint {path}: it cannot be listed ({error}), and nothing was changed; try again.") from error
    return path, [path] if path / itself in found else sorted(found, key=_order)


def _superseded(others: Collection[Path], final: Path, keep: int | None) -> list[Path]:
    """Return which checkpoints go once this one is there, oldest first."""
    later = [path for path in others if _order(path) > _order(final)]
    earlier = [path for path in others if path not in later]
    if keep is not None:
        return [*later, *earlier[: max(len(earlier) + 1 - keep, 0)]]
    for path in later[:1]:
        warn_user(
            f"Checkpoint {final}: {path.name} is of a later step and stays, so `load_checkpoint` takes it for the newest; move it away, or load by "
            "the folder of a checkpoint.",
            TrainingWarning,
        )
    return []


def _write(
    final: Path, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any], lineage: Lineage, superseded: list[Path]
) -> None:
    """Write all of a checkpoint, take their names from later ones, give it its own; then remove those before it."""
    folder = final.parent
    try:
        with unfinished(folder / ".partial") as partial:
            for name, values in tensors.items():
                save_file(_apart(values), partial / f"{name}.safetensors")
            (partial / _STATE).write_text(json.dumps(state, indent=1))
            lineage.write(partial)
            share_mode(partial / _STATE)
            flush(*partial.iterdir(), partial)
            with set_aside([path for path in superseded if _order(path) > _order(final)], folder / ".gone"):
                partial.rename(final)
                flush(folder)
            for path in superseded:  # those that somebody reads over NFS stay, and are older
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = f"the disk refused ({error}); free space or mend permissions, or save elsewhere"
        if isinstance(error, OSError) and error.errno in _OTHERS and folder.is_dir():
            reason = f"another process writes or removes files in this folder ({error}); give each run a folder of its own"
        raise StoreWriteError(f"Checkpoint {final}: {reason}.") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same, each with memory of its own: the file format refuses to store shared memory twice."""
    seen, made = set[int](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return made


def load_checkpoint(
    folder: str | Path,
    student: Student | DistributedDataParallel,
    optimizer: Optimizer | None = None,
    *,
    steps: Described | None = None,
    changed: Collection[str] = (),
) -> int:
    """Put the newest checkpoint of `folder` into student and optimizer; gives the next step, 0 if there is no checkpoint.

    Args:
        folder: the run's folder, or one checkpoint in it (what `save_checkpoint` gave).
        student: built as it was for the run that is resumed.
        optimizer: built as it was for that run; None restores the weights only.
        steps: what the run goes on with; its settings must be those that were saved, or steps would be repeated and others left out.
        changed: names of settings that are meant to be others from here on, such as `["seed"]`; "untrained" for values of what is not trained.

    Warns:
        TrainingWarning: an optimizer is restored, and the settings that were saved are compared with nothing, for `steps` is None; or it was made
            with others, such as another rate, and goes on with those that were saved; or no step is left.

    Raises:
        ArgumentError: an argument is something else, such as the student in place of the optimizer.
        CheckpointError: other parameters, shapes, optimizer or settings of the steps than were saved, other values of what is not trained, a damaged
            file, ranks that find different checkpoints, a folder that cannot be listed, or one checkpoint was named that is not there; nothing was
            changed.
    """
    ranks, own, changed = Ranks.current(), inner(student), list(several("Checkpoint: changed", changed))
    looks = ranks.each(lambda: _look(folder, student, optimizer, steps, CheckpointError, itself=_STATE))
    (folder, found), names = looks[ranks.rank], [there[-1].name if there else "none" for _, there in looks]
    if differing := [(rank, name) for rank, name in enumerate(names) if name != names[0]]:
        raise CheckpointError(
            f"Checkpoint {folder}: the newest that rank {differing[0][0]} finds there is {differing[0][1]}, expected {names[0]} as on rank 0; use a "
            "folder that all machines share, or copy it to each."
        )
    if not found and _NAME.fullmatch(folder.name) and not folder.exists():
        raise CheckpointError(f"Checkpoint {folder}: there is no such folder; check the path, or pass the run's folder.")
    if not found:
        return 0
    path = found[-1]
    # older ones have names of torch.compile among those of parameters
    state = _read(path / _STATE, lambda path: read_as(_State, json.loads(path.read_bytes().replace(b"_orig_mod.", b"")), "its content"))
    if optimizer is not None:
        _check_settings(path, state.get("steps"), steps, changed)
    saved = {name.replace("_orig_mod.", ""): value for name, value in _read(path / "parameters.safetensors", load_file).items()}
    current = {name: p.detach() for name, p in trained_parameters(own).items()}
    check_parameters(path, saved, current)
    if "untrained" not in changed:
        check_untrained(path, state.get("untrained", {}), state.get("untrained_types", {}), own)
    if optimizer is not None:
        check_optimizer(path, own, optimizer, state)
        tensors = _read(path / "optimizer.safetensors", load_file, RNG)
        restore(path, optimizer, tensors, state["optimizer"])
        restore_random(own, tensors)
    for name, tensor in saved.items():
        current[name].copy_(alike(tensor, current[name]))
    stop, next_step = getattr(steps, "stop", None), int(state["next_step"])
    if optimizer is not None and isinstance(stop, int) and next_step >= stop:
        warn_user(
            f"Checkpoint {path}: its run is over, as the steps to go on with end before step {stop}, so nothing is left to train; take another "
            "folder for another run, or more steps.",
            TrainingWarning,
        )
    return next_step


def _order(path: Path) -> tuple[int, int]:
    """Return (next step, how often it was saved before)."""
    step, again = path.name.removeprefix("step-").split(".")
    return int(step), int(again)


def _check_settings(path: Path, saved: Mapping[str, Any] | None, steps: Described | None, changed: Collection[str]) -> None:
    """Refuse steps that were made otherwise than those of the checkpoint; one from before settings were saved has none to compare."""
    if saved is None:
        return
    if steps is None:
        warn_user(
            f"Checkpoint {path}: the settings of its steps are compared with nothing; pass `steps=`, what the run goes on with.",
            TrainingWarning,
        )
        return
    for name, mine in json.loads(json.dumps(dict(steps.settings))).items():
        if name not in changed and name in saved and saved[name] != mine:
            raise CheckpointError(
                f"Checkpoint {path}: {name} of its steps is {saved[name]!r}, expected {mine!r} as in those to go on with; pass the arguments of "
                f"the run that is resumed, or `changed=[{name!r}]` if other steps are meant."
            )


def _read(path: Path, load: Callable[[Path], Mapping[str, Any]], *needed: str) -> dict[str, Any]:
    """Return what a file of a checkpoint holds; refuse one that cannot be read, or lacks a name."""
    cause: Exception | None = None
    try:
        open_regular(path).close()
        found = dict(load(path))
        reason = next((f"it lacks {name!r}" for name in needed if name not in found), "")
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        found, reason, cause = {}, str(error) or type(error).__name__, error
    if reason:
        raise CheckpointError(f"Checkpoint file {path}: it cannot be read ({reason}); restore it, or remove its folder.") from cause
    return found
