"""Packages that only some parts need."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lopd.errors import MissingDependencyError


def need(package: str, owner: str, extra: str = "hf") -> Any:
    """Import an optional package, or a module of it, and return it.

    Args:
        package: for example "pyarrow" or "pyarrow.parquet".
        owner: how the message names what needs it.
        extra: the extra of lopd that brings it.

    Raises:
        MissingDependencyError: it is not installed, or its import fails.
    """
    with needing(package, owner, extra):
        return import_module(package)


@contextmanager
def needing(package: str, owner: str, extra: str = "hf") -> Iterator[None]:
    """Raise the error of `need`, whose arguments these are, where an import within fails: for a module that is of no use without the package.

    Raises:
        MissingDependencyError: it is not installed, or its import fails.
    """
    try:
        yield
    except ImportError as error:
        lacking = (error.name or package).partition(".")[0]
        state, advice = "is not installed", f"pip install 'lopd[{extra}]'"
        if sys.modules.get(lacking) or find_spec(lacking):
            # the first cause: transformers calls all that fails a missing module, and a module of lopd may have come here before
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            state, advice = f"cannot be imported ({cause!s:.200})", f"mend that, or {advice} in a new environment"
        raise MissingDependencyError(f"{owner}: {lacking} {state}; {advice}.", name=lacking) from error
