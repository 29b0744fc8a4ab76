"""Paths and URLs: what is refused where it is passed, what is opened as a file, and what messages may show."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from lopd.errors import ArgumentError, InvalidRecordError, LopdError

T = TypeVar("T")
_OF_MODELS = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")
_TELLING = (FileNotFoundError, FileExistsError, NotADirectoryError, ConnectionError)


def path_text(owner: str, path: str | os.PathLike[str], refusal: type[LopdError] = ArgumentError) -> str:
    """Return a path or URL as text.

    Raises:
        LopdError: an error of class `refusal`; it is something else, for example bytes, or it is empty, or holds a zero byte.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        # what it holds may be a secret
        raise refusal(f"{owner}: the path is of type {type(path).__name__}, expected text or a Path; pass one.")
    if not text.strip() or "\0" in text:
        raise refusal(f"{owner}: the path is {text!r:.80}, expected the name of a file, a folder or a URL; pass one.")
    return text


def local_path(owner: str, path: str | os.PathLike[str], refusal: type[LopdError] = InvalidRecordError) -> Path:
    """Return a path of this machine, with `~` expanded.

    >>> local_path("Report", Path("s3://bucket/report"))
    Traceback (most recent call last):
    lopd.errors.InvalidRecordError: Report: the path is a URL without its second slash ('s3:/...'), which pathlib took; pass URLs as strings.

    Raises:
        ArgumentError: it is not a path.
        LopdError: an error of class `refusal`; it is a URL, also one that went through `Path`, or begins with `~` and an unknown user, or the
            system refuses it, as one that is too long.
    """
    text = os.path.expanduser(path_text(owner, path))  # noqa: PTH111 (`Path.expanduser` raises for an unknown user)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)", text):
        # the rest may hold a secret
        what = "a URL" if scheme[2] == "//" else "a URL without its second slash"
        where = (
            "expected one of this machine; write there, and copy it" if scheme[2] == "//" else "which pathlib took; pass URLs as strings"
        )
        raise refusal(f"{owner}: the path is {what} ('{scheme[0]}...'), {where}.")
    if text.startswith("~"):
        raise refusal(f"{owner}: the path is {text!r}, expected a user of this machine behind '~'; write the path in full.")
    try:
        is_there(text)
    except OSError as error:
        raise refusal(f"{owner}: the path is {text!r:.80}, which the system refuses ({error.strerror}); check the path.") from error
    return Path(text)


def path_or_url(owner: str, path: str | os.PathLike[str], refusal: type[LopdError] = InvalidRecordError) -> str:
    """Return a URL as it is, and a path of this machine as `local_path` does; raises as that does."""
    text = path_text(owner, path)
    return text if "://" in text else str(local_path(owner, text, refusal))


def names_path(name: str) -> bool:
    r"""Return whether what should be a name in a hub is a path, of this machine or of another.

    >>> [names_path(name) for name in ("org/base", "gpt2", "./base", "~bob/base", "file:///base", r"C:\base", "runs/tiny/base")]
    [False, False, True, True, True, True, True]
    """
    return bool(re.match(r"[.~/\\]|file:|[A-Za-z]:[/\\]", name)) or "\\" in name or name.count("/") > 1


def is_here(text: str) -> bool:
    """Return whether this text is an absolute path, the URL of a file, or a path under `~`, of something that is there.

    >>> is_here("/."), is_here("~")  # the second may be any text, a token for one
    (True, False)
    """
    place = os.path.expanduser(text.removeprefix("file://"))  # noqa: PTH111
    return min(len(text), len(place)) > 1 and os.path.isabs(place) and os.path.exists(place)  # noqa: PTH110, PTH117


def without_secrets(url: str) -> str:
    """Return a URL, or a chain of them, as messages show it: without passwords, users (a container of Azure stays) and what follows `?` or `#`.

    >>> without_secrets("ftp://user:pass/word@host/run?token=1"), without_secrets("abfss://container@account/run")
    ('ftp://host/run', 'abfss://container@account/run')
    """
    azure = url.lower().startswith(("abfs", "adl", "az", "wasb"))
    user = r"//[^/@:]*:.*@" if azure else r"//([^/@:]*:.*|[^/@]*)@"
    return re.sub(r"(?s)[?#].*", "", re.sub(f"(?s){user}", "//", url))


def said_without_secrets(text: str) -> str:
    """Return what somebody else's code said as messages show it: URLs in it, and paths with a query, as `without_secrets` has them.

    >>> said_without_secrets("Who? 400 for https://user:word@host/judge?key=1 (/judge?key=1)")
    'Who? 400 for https://host/judge (/judge'
    """
    # so much of it is never shown, and a word of many beginnings of URLs would be read again at each
    return re.sub(r"\S+", lambda word: without_secrets(word[0]) if "/" in word[0] else word[0], text[:10_000])


def asked(url: str, work: Callable[[], T], *, secret: bool = False, errors: type[Exception] = Exception) -> T:
    """Return what another package answers about a URL; its errors, and what they are raised from, do not contain secrets.

    Args:
        url: URL of what is asked for.
        work: asks.
        secret: whether the answer may repeat secrets that are not in the URL.
        errors: kind of errors that this is about.

    Raises:
        OSError: whatever the package raises, by its type alone where there are secrets; a FileNotFoundError, FileExistsError,
            NotADirectoryError or ConnectionError stays one.
        LopdError: as it is.
    """
    try:
        return work()
    except LopdError:
        raise
    except errors as error:
        secret = secret or without_secrets(url) != url
        name, said = type(error).__name__, str(error).split("\n", 1)[0][:300]
        kind = next((kind for kind in _TELLING if isinstance(error, kind)), OSError)
        refused = kind(name if secret or not said else said if isinstance(error, OSError) else f"{name}: {said}")
        cause = None if secret else error
    # Not in the block above, where Python would chain the error all the same.
    raise refused from cause


def is_there(path: str | os.PathLike[str]) -> bool:
    """Return whether a path leads to something.

    `Path.exists` hides that the system cannot tell, from Python 3.14 on.

    Raises:
        OSError: the system cannot tell.
    """
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listed(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return what is in a folder, and nothing of a folder that is missing.

    `Path.glob` hides that a folder cannot be listed, from Python 3.12 on.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def walked(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder and in those below it, but not in those that links lead to; raises as `listed` does for any of them."""
    for entry in listed(folder):
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from walked(entry)


def check_files(folder: Path) -> None:
    """Look at what has the name of a model's file in a folder, before a library opens it and waits; raises OSError where it is a device or a pipe."""
    for file in map(folder.joinpath, (entry.name for entry in listed(folder) if entry.name.endswith(_OF_MODELS))):
        if file.is_fifo() or file.is_char_device():
            raise OSError(errno.EINVAL, f"{file.name} is a device or a pipe, not a file")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, but not what only has the name of one: a device does not end, and a pipe may never begin.

    Raises:
        OSError: it is a device, a pipe, a socket or a folder, or a link to one; or it cannot be opened.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (`Path.open` has no opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "It is a device, a pipe or a socket, not a file", str(path))
    return file


def read_regular(path: str | os.PathLike[str], largest: int | None = None) -> bytes:
    """Read a whole file of at most so many bytes; raises as `open_regular`, and OSError where it is larger."""
    with open_regular(path) as file:
        data = file.read(-1 if largest is None else largest + 1)
    if largest is not None and len(data) > largest:
        raise OSError(errno.EFBIG, f"It has more than {largest:,} bytes", str(path))
    return data
