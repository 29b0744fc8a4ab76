"""Packages that only some parts need."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lopd.errors import MissingDependencyError


def need(package: str, owner: str, extra: str = "hf") -> Any:
    """Import an optional package, or a module of it, and return it.

    Args:
        package: for example "pyarrow" or "pyarrow.parquet".
        owner: how the message names what needs it.
        extra: the extra of lopd that brings it.

    Raises:
        MissingDependencyError: it is not installed, or lacks what other versions have.
    """
    with needing(package, owner, extra):
        return import_module(package)


@contextmanager
def needing(package: str, owner: str, extra: str = "hf") -> Iterator[None]:
    """Raise the error of `need`, whose arguments these are, where an import within fails: for a module that is of no use without the package.

    Raises:
        MissingDependencyError: it is not installed, or lacks what other versions have.
    """
    try:
        yield
    except ImportError as error:
        lacking = (error.name or package).partition(".")[0]
        state = "there in another version" if sys.modules.get(lacking) else "not installed"
        raise MissingDependencyError(f"{owner}: {lacking} is {state}; pip install 'lopd[{extra}]'.", name=lacking) from error
