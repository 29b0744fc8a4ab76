"""The key that opens a server: from the environment or passed, and never in a message."""

import os
import re

from attrs import field, frozen

from lopd.errors import InvalidRecordError
from lopd.records.checks import texts_of


def variable(name: str | None) -> str | None:
    """Return the name of a variable of the environment.

    Raises:
        InvalidRecordError: it is not one; a key that is passed in its place would be shown.
    """
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise InvalidRecordError("Servers: key_variable is not the name of a variable in capitals; pass keys as `api_key=`.")
    return name


def key_in(asked: str | None, usual: str) -> str | None:
    """Return the key in the variable that was asked for, or in the usual one.

    Raises:
        InvalidRecordError: the variable that was asked for is not set.
    """
    key = os.environ.get(asked or usual)
    if asked is not None and not key:
        raise InvalidRecordError(f"Servers: {asked} is not set in the environment, expected the key; set it.")
    return key


@frozen
class Key:
    """What a server is shown.

    Args:
        variable: the environment variable that may hold it.
        value: the key; None or "" for no key.

    Raises:
        ArgumentError: it is not text.
        InvalidRecordError: it cannot be the value of a header.
    """

    variable: str = "VLLM_API_KEY"
    value: str | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        key = texts_of("Servers: api_key", [self.value or ""])[0]
        if not (key.isascii() and key.isprintable() and key.strip() == key):
            raise InvalidRecordError("Servers: api_key has spaces or unprintable characters, expected a header's value; strip it.")

    @property
    def refused(self) -> str:
        """The remedy where a server refuses the key."""
        if not self.value:
            return f"it needs a key, and the request had none; pass `api_key=` or set {self.variable}"
        if self.value == os.environ.get(self.variable):
            return f"the key in {self.variable} was refused; set another, or pass `api_key=`"
        return f"the key in `api_key=` was refused; pass another, or set {self.variable}"
