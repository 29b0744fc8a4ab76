"""What the command lines share: the stores that they open, the tables that they print, and their exit codes."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from lopd.backends.opening import open_store
from lopd.errors import LopdError, printable
from lopd.protocols import DurableStore
from lopd.records.optional import need

FINE, PROBLEMS, UNUSABLE = 0, 1, 2
#: Title, names of the columns, rows: the arguments of `lopd.tools.console.table`.
Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]


def run(parser: ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Call what the parser sets as `run` with the options; return the exit code.

    Args:
        parser: the command line.
        arguments: words of the command line; those of this process if None.
    """
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # a misspelt option may be followed by a secret
        parser.error(f"unknown arguments: {' '.join(word.split('=')[0] for word in unknown if word.startswith('-')) or 'too many'}")
    try:
        return int(options.run(options))
    except LopdError as error:
        say(str(error), aside=True)
        return UNUSABLE


def add_storage_option(parser: ArgumentParser) -> None:
    """Let the user say how to reach the storage of the URLs."""
    parser.add_argument(
        "--storage-option",
        action="append",
        type=_key_and_value,
        default=[],
        metavar="KEY=VALUE",
        help="how to reach the storage of all URLs, may be repeated; credentials are better left in the environment",
    )


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentTypeError("expected KEY=VALUE")
    return key, value


def opened(url: str, options: Namespace) -> DurableStore:
    """Return the store at this URL, opened with the storage options of the command line."""
    return open_store(url, dict(options.storage_option) or None)


def show(*things: Table | str) -> None:
    """Print tables and sentences.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    # names and sentences may hold brackets, which are not markup
    console = need("rich.console", "Tables (--json prints none)").Console(markup=False, highlight=False)
    from lopd.tools.console import table

    for thing in things:
        if isinstance(thing, str):
            console.print(printable(thing), soft_wrap=True)
        else:
            console.print(table(*thing))


def say(text: str, *, aside: bool = False) -> None:
    """Print a sentence at once; `aside` is where errors go."""
    print(printable(text), file=sys.stderr if aside else sys.stdout, flush=True)


def print_json(values: Any) -> None:
    """Print records of plain values as JSON."""
    print(json.dumps(values, indent=1, allow_nan=False))
