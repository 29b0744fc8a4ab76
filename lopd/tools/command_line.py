"""What the commands share: the stores that they open, the tables that they print, and their exit codes.  Importing it imports no torch."""

import json
import math
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from signal import SIGPIPE
from typing import TYPE_CHECKING, Any

from lopd.errors import printable

if TYPE_CHECKING:
    from lopd.protocols import DurableStore, Progress

#: The last is that of a process that a pipe without a reader ends.
FINE, PROBLEMS, UNUSABLE, UNREAD = 0, 1, 2, 128 + SIGPIPE
#: Title, names of the columns, rows: the arguments of `lopd.tools.console.table`.
Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]


def declare(parser: ArgumentParser, run: Callable[[Namespace], int], *examples: str, storage: bool = True, json: bool = True) -> None:
    """Declare what runs a command, the options that commands share, and the examples that end its help.

    Args:
        parser: that of the command, with its own options.
        run: does what was asked for; returns the exit code.
        examples: lines.
        storage: the command opens URLs, whose storage may have settings.
        json: the command can print data.
    """
    parser.set_defaults(run=run)
    parser.epilog = "\n  ".join(("examples:", *examples))
    if storage:
        parser.add_argument(
            "--storage-option",
            action="append",
            type=_key_and_value,
            default=[],
            metavar="KEY=VALUE",
            help="how to reach the storage of all URLs, may be repeated; credentials are read from the environment",
        )
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentTypeError("expected KEY=VALUE")
    if re.search("secret|token|password|account_key|sas", key, re.IGNORECASE):
        # other users of the machine see the command line, and a shell keeps it
        raise ArgumentTypeError("this one is a secret; pass it in the environment (AWS_SECRET_ACCESS_KEY, for example)")
    return key, value


def opened(url: str, options: Namespace) -> "DurableStore":
    """Return the store at this URL, opened with the storage options of the command line."""
    from lopd.backends.opening import open_store

    return open_store(url, dict(options.storage_option) or None)


def progress(owner: str, *needed: str) -> "Progress":
    """Return a progress bar, once rich and the packages that the command needs besides are there.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    from lopd.records.optional import need

    for package in ("rich", *needed):
        need(package, owner)
    from lopd.tools.console import RichProgress

    return RichProgress()


def show(*things: Table | str) -> None:
    """Print tables and sentences.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    from lopd.records.optional import need

    need("rich.console", "Tables (--json prints none)")
    from lopd.tools.console import PlainConsole, table

    console = PlainConsole()
    for thing in things:
        if isinstance(thing, str):
            console.print(printable(thing), soft_wrap=True)
        else:
            console.print(table(*thing))


def say(text: str, *, aside: bool = False) -> None:
    """Print a sentence at once; `aside` is where errors go."""
    print(printable(text), file=sys.stderr if aside else sys.stdout, flush=True)


def print_json(values: Any) -> None:
    """Print records of plain values as JSON; what is infinite, as the interval of a single draw, or no number is null."""
    print(json.dumps(_finite(values), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
