"""Packages that only some parts need."""

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
        MissingDependencyError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        lacking = getattr(error, "name", None) or package
        raise MissingDependencyError(f"{owner}: {lacking.partition('.')[0]} is not installed; pip install 'lopd[{extra}]'.") from error
