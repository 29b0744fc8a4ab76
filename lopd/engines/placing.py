"""What an export wrote takes the place of an earlier one in one move, or stands beside what it must not replace.

A folder that cannot be moved, as a mount point, is filled instead, and what it must not replace has the export inside.
"""

import ctypes
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from lopd.errors import CorruptStoreError, StoreExistsError, StoreWriteError
from lopd.records.flush import flush
from lopd.records.lineage import LINEAGE_FILE, Lineage
from lopd.records.paths import is_there, read_regular, walked
from lopd.records.stored import LARGEST_JSON, parse
from lopd.records.unfinished import unfinished

#: Endings of files that some library takes for weights, or for a list of the weights to load.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".index.json", "adapter_config.json")
_FILES = "files"
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def files_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder and below it, in order."""
    return sorted(Path(entry).relative_to(folder).as_posix() for entry in walked(folder) if not entry.is_dir(follow_symlinks=False))


def name_files(folder: Path, written: list[str]) -> None:
    """Add to the lineage which files are the export's."""
    path = folder / LINEAGE_FILE
    path.write_text(json.dumps({**parse(read_regular(path)), _FILES: written}, indent=1) + "\n")


def exported_files(folder: Path) -> set[str]:
    """Return the names of the files that the export in a folder wrote, `lopd.json` not among them; none where no export is recorded."""
    try:
        listed = parse(read_regular(folder / LINEAGE_FILE, LARGEST_JSON)).get(_FILES, ())
        return {name for name in listed if isinstance(name, str)}
    except (OSError, ValueError, TypeError, AttributeError):
        return set()


@contextmanager
def begin(folder: Path) -> Iterator[Path]:
    """Yield the folder that an export is written in: beside its place, or inside where that is mounted or nothing can be written beside."""
    inside = folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK))
    with unfinished((folder if inside else folder.parent) / f".{folder.name}.partial") as fresh:
        _make_like(fresh, folder)
        yield fresh


def _make_like(made: Path, there: Path) -> None:
    """Make a folder, with the group and mode of another if that is there, so that what is private, or a group's, stays it; its owner may write."""
    made.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # of a file system without modes
        if there.is_dir():
            held = there.stat()
            with suppress(OSError):  # of a group that is not its owner's
                os.chown(made, -1, held.st_gid)
            made.chmod(stat.S_IMODE(held.st_mode) | stat.S_IRWXU)


def place(owner: str, model: Any, fresh: Path, written: list[str], folder: Path) -> None:
    """Give a whole export its name; where that would replace what no export wrote, give it another name, and raise an error that states it.

    It has another name too where the system refuses: a whole export is not lost.

    Raises:
        OSError: the disk refuses what the export wrote, which is not whole then.
    """
    flush(*(entry for entry in walked(fresh) if not entry.is_symlink()), fresh)
    old = folder.parent / f".{folder.name}.old"
    there = is_there(folder)
    try:
        if not there and is_there(old):  # an exchange by two moves was cut short between them
            old.rename(folder)
            there = True
        objection = _objection(model, fresh, folder, written) if there else None
    except OSError as error:  # as that of lost+found, which only root lists
        objection = f"it cannot be looked through ({error})"
    if objection is None:
        try:
            if not there:
                fresh.rename(folder)  # which is refused where something has come since
            else:
                if fresh.parent != folder:
                    _carry(folder, fresh)
                _replace(folder, fresh, old)
        except OSError as error:
            if not there and is_there(folder):  # another export has taken the name since
                place(owner, model, fresh, written, folder)
                return
            # as that of a mount which looks like a plain folder, or of a file that only another user reads
            for name in {*files_in(fresh)} - {*written, LINEAGE_FILE}:  # they are its owner's, who has them there
                (fresh / name).unlink()
            if not there:
                # under a name that no export removes, by a copy where folders cannot be moved
                kept = shutil.move(fresh, fresh.with_name(f"{folder.name}-kept.{uuid4().hex[:8]}"))
                raise StoreWriteError(
                    f"{owner}: the student was written, and cannot be moved to {folder} ({error}); it stands in {kept}, move or copy it from there."
                ) from error
            objection = f"it cannot be replaced ({error})"
    if objection is not None:
        aside = fresh.parent / f"{folder.name}-export"
        place(owner, model, fresh, written, aside)
        raise StoreExistsError(f"{owner}: {objection}; the student was written to {aside}, move it, or move away what is there.")
    flush(fresh.parent)
    shutil.rmtree(old, ignore_errors=True)


def _objection(model: Any, fresh: Path, folder: Path, written: list[str]) -> str | None:
    """Return why an export of these files must not replace this folder, in a clause."""
    if not folder.is_dir():
        return "it is a file, expected a folder"
    inside = fresh.parent == folder
    if not inside and _holds_this_process(folder):
        return "it is the working directory, or holds it, and programs that run in it would lose it"
    bases = [config.base_model_name_or_path for config in getattr(model, "peft_config", {}).values()]
    if any(base and Path(base).expanduser().resolve() == folder for base in bases):
        return "it holds the model that the adapters are for"
    ours = exported_files(folder)
    foreign = [name for name in files_in(folder) if name not in ours and (name in written or ("/" not in name and name.endswith(WEIGHTS)))]
    if foreign:
        return f"it holds {foreign[0]!r}, which no export is recorded to have written"
    root = folder / LINEAGE_FILE
    if is_there(folder / "zarr.json") or (is_there(root) and b"opd_teacher" not in read_regular(root, LARGEST_JSON)):
        return "it is a store"
    taken = next((path.name for path in sorted(fresh.iterdir()) if inside and is_there(folder / path.name)), None)
    stays = f"it holds {taken!r}, and cannot be replaced as a whole, as it is mounted or in a folder without write permission"
    return _other_student(folder, Lineage.read(fresh)) or (stays if taken else None)


def _other_student(folder: Path, lineage: Lineage) -> str | None:
    """Return what the folder holds, in a clause, unless no teacher of it is recorded, or its teachers are those of the new export."""
    try:
        held = Lineage.read(folder)
    except CorruptStoreError:
        return f"its {LINEAGE_FILE} cannot be read"
    if held in (Lineage(), lineage):
        return None
    return f"it holds a student of other teachers ({_teachers(held)}) than this one ({_teachers(lineage)})"


def _teachers(lineage: Lineage) -> str:
    """Name both teachers with their dtypes: one model in two of them is two teachers."""
    both = {"SFT": lineage.sft_teacher, "OPD": lineage.opd_teacher}
    return ", ".join(f"{name} {teacher and f'{teacher} in {teacher.dtype}'}" for name, teacher in both.items())


def _holds_this_process(folder: Path) -> bool:
    with suppress(OSError):  # where the working directory is gone already
        return Path.cwd().is_relative_to(folder)
    return False


def _carry(folder: Path, fresh: Path) -> None:
    """Link the files that are not of the earlier export into the new one, and flush them; copy them where links are not possible."""
    ours = {*exported_files(folder), LINEAGE_FILE}
    # what stands in the new one is its own, also where yet another export has just come
    others = [name for name in files_in(folder) if name not in ours and not is_there(fresh / name)]
    for name in others:
        for inner in [*Path(name).parents][-2::-1]:
            if not (fresh / inner).exists():
                _make_like(fresh / inner, folder / inner)
        try:
            os.link(folder / name, fresh / name, follow_symlinks=False)
        except OSError:
            shutil.copy2(folder / name, fresh / name, follow_symlinks=False)
    made = {fresh / part for name in others for part in (Path(name), *Path(name).parents)}
    flush(*(path for path in made if not path.is_symlink()))


def _fill(folder: Path, fresh: Path) -> None:
    """Move what is in the new folder up into the one that it is in, by which programs know a whole model last."""
    names = sorted((path.name for path in fresh.iterdir()), key=lambda name: (name == LINEAGE_FILE, name.endswith("config.json")))
    try:
        for name in names:
            (fresh / name).rename(folder / name)
    except BaseException:  # an interrupt too, since the caller removes what is fresh
        for name in names:
            if not is_there(fresh / name):
                (folder / name).rename(fresh / name)
        raise


def _replace(folder: Path, fresh: Path, old: Path) -> None:
    """Put the new folder in the place of the old one: in one move, or in two where the system has no exchange; one that is inside fills it."""
    if fresh.parent == folder:
        _fill(folder, fresh)
    elif not _exchange(fresh, folder):
        _free(old)
        try:
            folder.rename(old)
            fresh.rename(folder)
        except BaseException:  # an interrupt too, since the caller removes what is fresh
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise


def _free(old: Path) -> None:
    """Free the name that the folder in use has between the two moves, under which the next export finds it after a kill; what is left of a replaced
    one may still have it.
    """
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():  # it holds what cannot be removed, such as a file that somebody reads over NFS
        old.rename(old.with_name(f"{old.name}.{uuid4().hex}"))


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one move, if the system can."""
    move = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return move is not None and move(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0
