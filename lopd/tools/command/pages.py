"""`lopd report`: a run, or rollouts token by token, as a page for a browser."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lopd.errors import InvalidRecordError
from lopd.tools.command.models import Model
from lopd.tools.command_line import FINE, add_storage_option, give_examples, opened, say


def add_report(parser: ArgumentParser) -> None:
    """Declare the options of `lopd report`."""
    parser.set_defaults(run=_report)
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
    add_storage_option(parser)
    give_examples(
        parser,
        "lopd report run.zarr --history metrics.json      who made what, curves, costs, advantages, a few rollouts",
        "lopd report run.zarr --rows 0 1 2 --tokenizer teacher      where teacher and student disagree",
    )


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
