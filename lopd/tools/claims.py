"""Whether a folder may be taken for a run: it holds none yet, or the same one."""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lopd.errors import ConflictError, LopdError
from lopd.records.paths import listed, read_regular
from lopd.records.stored import read_as

_SETTINGS, _DIGESTS = Mapping[str, Any], Mapping[str, str]


def check_claim(
    folder: Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    fixed_by: Callable[[str], str],
    decisive: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Refuse a folder with another run, or with files of these names that no run wrote; for the arguments see `Run.claim`.

    Raises:
        ConflictError: it is one.
    """
    was, had = read_kept(folder / "settings.json", _SETTINGS), read_kept(folder / "inputs.json", _DIGESTS)
    if was is not None and had is None:
        raise ConflictError(
            f"Run {folder}: it has a settings.json without the inputs.json of a run, expected a folder of its own; choose another folder."
        )
    pairs = [(decisive(settings), decisive(settings if was is None else was)), (inputs, inputs if had is None else had)]
    for ours, theirs in pairs:
        # also what is in one of them alone: a section that was dropped is another run
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs or ours[name] != theirs[name]:
                _check_unused(folder, name, ours.get(name), theirs.get(name), fixed_by(name))


def read_kept(path: Path, kind: object, remedy: str = "choose another folder", *, needed: bool = False) -> Any:
    """Return what a run keeps in this file; None where it is not there, unless it is needed.

    Raises:
        ConflictError: it cannot be read, or holds something else; the message ends with the remedy.
    """
    try:
        return read_as(kind, json.loads(read_regular(path)), f"File {path}", ConflictError, remedy)
    except (OSError, ValueError) as error:
        if isinstance(error, LopdError):
            raise
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not needed:
            return None
        raise ConflictError(f"File {path}: it cannot be read ({error}), expected what a run wrote; {remedy}.") from error


def _check_unused(folder: Path, name: str, ours: object, theirs: object, fixed_by: str) -> None:
    try:
        found = [entry for run in (folder, *listed(folder)) for entry in listed(Path(run, "phases")) if fnmatchcase(entry.name, fixed_by)]
        used = [entry.path for entry in sorted(found, key=lambda entry: entry.stat().st_mtime_ns)]
    except OSError as error:
        remedy = "try again, mend its permissions, or choose another folder"  # the folder of a disk has a lost+found
        raise ConflictError(f"Run {folder}: it cannot be listed ({error}), expected what a run wrote; {remedy}.") from error
    if used:
        ways = ["go back to that", "choose another folder"]
        if "*" not in fixed_by:
            ways.append(f"remove {' and '.join(used)} to do that phase and those after it again")
        raise ConflictError(
            f"Run {folder}: {name} is {ours!r:.80} now, and was {theirs!r:.80} when {used[0]} was written; {', or '.join(ways)}."
        )
