"""Paths and URLs: what is refused where it is passed, and what messages may show."""

import os
import re
from pathlib import Path

from lopd.errors import ArgumentError, InvalidRecordError, LopdError


def local_path(owner: str, path: str | os.PathLike[str], refusal: type[LopdError] = InvalidRecordError) -> Path:
    """Return a path of this machine, with `~` expanded.

    >>> local_path("Report", Path("s3://bucket/report"))
    Traceback (most recent call last):
    lopd.errors.InvalidRecordError: Report: the path is a URL without its second slash ('s3:/...'), which pathlib took; pass URLs as strings.

    Raises:
        ArgumentError: it is not a path.
        LopdError: of the class `refusal`; it is a URL, also one that went through `Path`, or begins with `~` and an unknown user.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"{owner}: the path is {path!r:.80}, expected text or a Path; pass one.")
    text = os.path.expanduser(os.fspath(path))  # noqa: PTH111 (`Path.expanduser` raises for an unknown user)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)", text):
        # the rest may hold a secret
        what = "a URL" if scheme[2] == "//" else "a URL without its second slash"
        where = (
            "expected one of this machine; write there, and copy it" if scheme[2] == "//" else "which pathlib took; pass URLs as strings"
        )
        raise refusal(f"{owner}: the path is {what} ('{scheme[0]}...'), {where}.")
    if text.startswith("~"):
        raise refusal(f"{owner}: the path is {text!r}, expected a user of this machine behind '~'; write the path in full.")
    return Path(text)


def path_or_url(owner: str, path: str | os.PathLike[str], refusal: type[LopdError] = InvalidRecordError) -> str:
    """Return a URL as it is, and a path of this machine as `local_path` does; raises as that does."""
    text = os.fspath(path)
    return text if "://" in text else str(local_path(owner, text, refusal))


def without_secrets(url: str) -> str:
    """The URL as messages show it: user, password and query stay private.

    >>> without_secrets("ftp://user:pass/word@host/run?token=1"), without_secrets("abfss://container@account/run")
    ('ftp://host/run', 'abfss://container@account/run')
    """
    user = r"//[^/@:]*:.*@" if url.startswith(("abfs", "az")) else r"//([^/@:]*:.*|[^/@]*)@"
    return re.sub(r"[?#].*", "", re.sub(user, "//", url, count=1))


def said_of(url: str, error: Exception) -> str:
    """What an error says; only its type where the URL has secrets, which the error may repeat."""
    return str(error) if without_secrets(url) == url else type(error).__name__
