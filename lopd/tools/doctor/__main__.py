"""The command line: `python -m lopd.tools.doctor info|verify|diff|report|run|compact URL`.

Exit code 0 if all is well, 1 for problems or differences, 2 if a store cannot be opened or read, or the call makes no sense.
"""

import math
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict

from lopd.errors import InvalidRecordError
from lopd.guards.consistency import verdict
from lopd.protocols import DurableStore
from lopd.protocols.reading import named
from lopd.records.lineage import Lineage
from lopd.records.optional import need
from lopd.tools.command_line import FINE, PROBLEMS, add_storage_option, opened, print_json, run, say, show
from lopd.tools.doctor.checking import check_store
from lopd.tools.doctor.comparing import compare_columns
from lopd.tools.doctor.contents import inspect_store
from lopd.tools.doctor.display import show_difference, show_info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    Args:
        arguments: words of the command line; those of this process if None.
    """
    return run(_parser(), arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m lopd.tools.doctor", description="Look after a store of rollouts and log-probs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, "info", "what is in a store", _info)
    info.add_argument("--sample", type=int, default=1000, metavar="N", help="most rollouts to read for statistics (1000)")

    _command(commands, "verify", "check every checksum and hash, and read every row with every column", _verify)

    diff = _command(commands, "diff", "compare two columns of one store, or one column of two stores", _diff)
    diff.add_argument("other", nargs="?", metavar="OTHER_URL", help="a second store; rollouts are matched by id")
    diff.add_argument("--columns", nargs="+", default=["teacher"], metavar="COLUMN", help="two, or one that is in both stores (teacher)")
    diff.add_argument("--tolerance", type=float, default=0.0, metavar="NATS", help="largest difference that is none (0)")
    for command in (info, diff):
        command.add_argument("--json", action="store_true", help="print JSON")

    tokens = _command(commands, "report", "rollouts token by token, as a page for a browser", _report)
    tokens.add_argument("--rows", type=int, nargs="+", default=[0], metavar="ROW", help="rollouts to show (0)")
    whole = _command(commands, "run", "a whole run as a page: training, cost, advantages, a few rollouts, who made what", _run_report)
    whole.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="of the training: JSON of its steps, an object with them as history, or JSON lines of a logger",
    )
    whole.add_argument("--student", type=Path, metavar="FOLDER", help="of the student that came out, for its lineage")
    whole.add_argument("--title", default="Run report", help="of the page")
    for page, out in ((tokens, "tokens.html"), (whole, "run.html")):
        page.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help="the page (%(default)s)")
        page.add_argument("--tokenizer", metavar="FOLDER", help="folder of a transformers tokenizer; ids are shown without one")
        page.add_argument(
            "--columns", nargs="+", default=["teacher", "behavior"], metavar="COLUMN", help="teacher, student, and a third to show"
        )
        page.add_argument("--clip", type=float, default=10.0, metavar="NATS", help="clip threshold of the advantage (10)")

    _command(commands, "compact", "merge many small appends into large ones", _compact)
    return parser


def _command(commands: Any, name: str, summary: str, call: Any) -> ArgumentParser:
    # abbreviations would let `--storage` through with a value that the message about another mistake repeats
    parser: ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=call)
    parser.add_argument("url", metavar="URL", help="a local path or a URL")
    add_storage_option(parser)
    return parser


def _info(options: Namespace) -> int:
    store = opened(options.url, options)
    info = inspect_store(store, sample=options.sample)
    if options.json:
        print_json({**asdict(info, value_serializer=_finite), "bytes_per_token": info.bytes_per_token})
    else:
        show(*show_info(store, info), *_verdicts(*((store, column) for column in store.columns)))
    return FINE


def _finite(_owner: object, _field: object, value: object) -> object:
    """The interval of a single draw is not a number of JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verify(options: Namespace) -> int:
    need("rich", "Progress")
    from lopd.tools.console import RichProgress

    store, problems = opened(options.url, options), 0
    for problem in check_store(store, progress=RichProgress()):
        problems += 1
        say(problem)
    say(f"{named(store)}: {problems:,} problems in {len(store):,} rollouts.")
    return PROBLEMS if problems else FINE


def _diff(options: Namespace) -> int:
    left_column, right_column = options.columns[0], options.columns[-1]
    if len(options.columns) > 2 or (options.other is None and left_column == right_column):
        raise InvalidRecordError(
            f"Diff: the columns are {options.columns}, expected two of one store, or one or two of two stores; name them with --columns."
        )
    left = opened(options.url, options)
    right = left if options.other is None else opened(options.other, options)
    difference = compare_columns(left, right, left_column, right_column)
    if options.json:
        print_json(asdict(difference))
    else:
        show(show_difference(f"{named(left)}: {left_column}", f"{named(right)}: {right_column}", difference))
        show(*_verdicts((left, left_column), (right, right_column)))
        if manifests := left.manifest.difference(right.manifest):
            show(f"The manifests differ: {manifests}.")
    return PROBLEMS if difference.exceeds(options.tolerance) else FINE


def _verdicts(*sides: tuple[DurableStore, str]) -> Iterator[str]:
    for store, column in sides:
        if column in store.columns:
            yield f"{named(store)}: {column}: {store.columns[column].model}: {verdict(store.manifest, store.columns[column])}."


def _report(options: Namespace) -> int:
    from lopd.tools.report import write_token_report

    store = opened(options.url, options)
    write_token_report(options.out, store, options.rows, report=_columns(options), decode=_decode(options.tokenizer))
    say(f"{options.out}: {len(options.rows)} rollouts; open it in a browser.")
    return FINE


def _run_report(options: Namespace) -> int:
    from lopd.tools.report import RunHistory, write_run_report

    history = RunHistory() if options.history is None else RunHistory.read(options.history)
    write_run_report(
        options.out,
        opened(options.url, options),
        history.steps,
        phases=history.phases,
        report=_columns(options),
        decode=_decode(options.tokenizer),
        lineage=None if options.student is None else Lineage.read(options.student),
        versions=history.versions,
        title=options.title,
    )
    say(f"{options.out}: {len(history.steps):,} steps; open it in a browser.")
    return FINE


def _columns(options: Namespace) -> Any:
    from lopd.tools.report import TokenReport

    if len(options.columns) not in {2, 3}:
        raise InvalidRecordError(
            f"Report: the columns are {options.columns}, expected teacher, student, and perhaps a third; pass --columns."
        )
    teacher, student, other = [*options.columns, None][:3]
    return TokenReport(teacher, student, other, options.clip)


def _decode(folder: str | None) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    from lopd.engines.identity import looking_for

    with looking_for(folder) as path:
        tokenizer = AutoTokenizer.from_pretrained(path)
    return lambda token: str(tokenizer.decode([token]))


def _compact(options: Namespace) -> int:
    store = opened(options.url, options)
    commits, size, start = len(store.history()), store.stored_bytes(), time.perf_counter()
    store.compact()
    seconds = time.perf_counter() - start
    say(
        f"{named(store)}: compacted in {seconds:.2f} s, from {commits:,} commits and {size:,} bytes "
        f"to {len(store.history()):,} commits and {store.stored_bytes():,} bytes."
    )
    return FINE


if __name__ == "__main__":
    sys.exit(main())
