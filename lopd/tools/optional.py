"""Packages that only some tools need."""

from importlib import import_module
from typing import Any

from lopd.errors import MissingDependencyError


def need(package: str, use: str) -> Any:
    """Return an optional package, or a module of it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{use}: {package.partition('.')[0]} is not installed, expected it; pip install 'lopd[hf]'."
        ) from error
