"""`lopd info|verify|diff|compact|report`: look after a store, and at it."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import asdict

from lopd.errors import InvalidRecordError
from lopd.tools.command.models import Model
from lopd.tools.command_line import FINE, PROBLEMS, declare, opened, print_json, progress, say, show

if TYPE_CHECKING:
    from lopd.protocols import DurableStore


def add_info(parser: ArgumentParser) -> None:
    """Declare the options of `lopd info`."""
    parser.add_argument("url", metavar="URL", help="a local path or a URL")
    parser.add_argument("--sample", type=int, default=1000, metavar="N", help="most rollouts to read for statistics (1000)")
    declare(parser, _info, "lopd info run.zarr", "lopd info s3://bucket/run.zarr --json | jq .rollouts")


def add_verify(parser: ArgumentParser) -> None:
    """Declare the options of `lopd verify`."""
    parser.add_argument("url", metavar="URL", help="a local path or a URL")
    declare(parser, _verify, "lopd verify run.zarr && echo sound")


def add_diff(parser: ArgumentParser) -> None:
    """Declare the options of `lopd diff`."""
    parser.add_argument("url", metavar="URL", help="a local path or a URL")
    parser.add_argument("other", nargs="?", metavar="OTHER_URL", help="a second store; rollouts are matched by id")
    parser.add_argument("--columns", nargs="+", default=["teacher"], metavar="COLUMN", help="two, or one that is in both stores (teacher)")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="NATS", help="largest difference that is accepted (0)")
    declare(parser, _diff, "lopd diff run.zarr --columns teacher ref", "lopd diff run.zarr again.zarr --tolerance 0.001")


def add_compact(parser: ArgumentParser) -> None:
    """Declare the options of `lopd compact`."""
    parser.add_argument("url", metavar="URL", help="a local path or a URL")
    declare(parser, _compact, "lopd compact run.zarr")


def add_report(parser: ArgumentParser) -> None:
    """Declare the options of `lopd report`."""
    parser.add_argument("url", metavar="URL", help="a local path or a URL of the store")
    parser.add_argument("--rows", type=int, nargs="+", metavar="ROW", help="draw these rollouts token by token, and nothing else")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="of the training: JSON of its steps, an object with them as history, or JSON lines of a logger",
    )
    parser.add_argument("--student", type=Path, metavar="FOLDER", help="of the student that came out, for its lineage")
    parser.add_argument("--title", default="Run report", help="of the page of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (run.html, or tokens.html with --rows)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="folder of a transformers tokenizer; ids are shown without one")
    parser.add_argument(
        "--columns", nargs="+", default=["teacher", "behavior"], metavar="COLUMN", help="teacher, student, and a third to show"
    )
    parser.add_argument("--clip", type=float, default=10.0, metavar="NATS", help="clip threshold of the advantage (10)")
    declare(
        parser,
        _report,
        "lopd report run.zarr --history metrics.json      who made what, curves, costs, advantages, a few rollouts",
        "lopd report run.zarr --rows 0 1 2 --tokenizer teacher      where teacher and student disagree",
        json=False,
    )


def _info(options: Namespace) -> int:
    from lopd.tools.doctor import inspect_store
    from lopd.tools.doctor.display import show_info

    store = opened(options.url, options)
    info = inspect_store(store, sample=options.sample)
    if options.json:
        print_json({**asdict(info), "bytes_per_token": info.bytes_per_token})
    else:
        show(*show_info(store, info), *_verdicts(*((store, column) for column in store.columns)))
    return FINE


def _verify(options: Namespace) -> int:
    from lopd.protocols.reading import named
    from lopd.tools.doctor import check_store

    bar = progress("Verify")
    store, problems = opened(options.url, options), list[str]()
    for problem in check_store(store, progress=bar):
        problems.append(problem)
        if not options.json:
            say(problem)
    if options.json:
        print_json({"rollouts": len(store), "problems": problems})
    else:
        say(f"{named(store)}: {len(problems):,} problems in {len(store):,} rollouts.")
    return PROBLEMS if problems else FINE


def _diff(options: Namespace) -> int:
    from lopd.protocols.reading import named
    from lopd.tools.doctor import compare_columns
    from lopd.tools.doctor.display import show_difference

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


def _verdicts(*sides: tuple["DurableStore", str]) -> Iterator[str]:
    from lopd.guards.consistency import manifest_of_model, verdict
    from lopd.protocols.reading import named

    for store, column in sides:
        if scored := store.columns.get(column):
            yield f"{named(store)}: {column}: {scored.model}: {verdict(manifest_of_model(store, scored), scored)}."


def _compact(options: Namespace) -> int:
    from lopd.protocols.reading import named

    store = opened(options.url, options)
    commits, size, start = len(store.history()), store.stored_bytes(), time.perf_counter()
    store.compact()
    seconds, commits_after, size_after = time.perf_counter() - start, len(store.history()), store.stored_bytes()
    if options.json:
        print_json({"commits": [commits, commits_after], "bytes": [size, size_after]})
    else:
        say(
            f"{named(store)}: compacted in {seconds:.2f} s, from {commits:,} commits and {size:,} bytes "
            f"to {commits_after:,} commits and {size_after:,} bytes."
        )
    return FINE


def _report(options: Namespace) -> int:
    from lopd.records.lineage import Lineage
    from lopd.tools.report import RunHistory, TokenReport, decoder_of, write_run_report, write_token_report

    if len(options.columns) not in {2, 3}:
        raise InvalidRecordError(
            f"Report: the columns are {options.columns}, expected teacher, student, and perhaps a third; pass --columns."
        )
    teacher, student, other = [*options.columns, None][:3]
    report, store = TokenReport(teacher, student, other, options.clip), opened(options.url, options)
    decode = None if options.tokenizer is None else decoder_of(Model(options.tokenizer).tokenizer())
    if options.rows is not None:
        out = options.out or Path("tokens.html")
        write_token_report(out, store, options.rows, report=report, decode=decode)
        say(f"{out}: {len(options.rows)} rollouts; open it in a browser.")
        return FINE
    out, history = options.out or Path("run.html"), RunHistory() if options.history is None else RunHistory.read(options.history)
    lineage = None if options.student is None else Lineage.read(options.student)
    write_run_report(
        out,
        store,
        history.steps,
        phases=history.phases,
        report=report,
        decode=decode,
        lineage=lineage,
        versions=history.versions,
        title=options.title,
    )
    say(f"{out}: {len(history.steps):,} steps; open it in a browser.")
    return FINE
