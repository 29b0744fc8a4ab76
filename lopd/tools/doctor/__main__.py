"""The command line: `python -m lopd.tools.doctor info|verify|diff|report|run|compact|estimate URL`.

Exit code 0 if all is well, 1 for problems or differences, 2 if a store cannot be opened or read, or the call makes no sense.
"""

import json
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, evolve

from lopd.backends.opening import open_store
from lopd.errors import InvalidRecordError, LopdError, MissingDependencyError
from lopd.guards.consistency import verdict
from lopd.protocols import DurableStore
from lopd.records.manifest import Lineage
from lopd.tools.doctor.comparing import compare_columns
from lopd.tools.doctor.contents import inspect_store
from lopd.tools.doctor.estimating import LOGPROB_BYTES, Plan, Rates, estimate, measure_rates, plan_like
from lopd.tools.doctor.upkeep import check_store, compact_store

FINE, PROBLEMS, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code.

    Args:
        arguments: of the command line; those of this process if None.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # a misspelt option may be followed by a secret
        parser.error(f"unknown arguments: {' '.join(word.split('=')[0] for word in unknown if word.startswith('-')) or 'too many'}")
    try:
        return int(options.run(options))
    except LopdError as error:
        print(error, file=sys.stderr)
        return UNUSABLE


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m lopd.tools.doctor", description="Look after a store of rollouts and log-probs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, "info", "what is in a store", _info, json=True)
    info.add_argument("--sample", type=_count, default=1000, metavar="N", help="most rollouts to read for statistics (1000)")
    info.add_argument("--clip", type=_positive, default=10.0, metavar="NATS", help="clip threshold of the advantage (10)")

    _command(commands, "verify", "check every checksum and hash, and read every row with every column", _verify)

    diff = _command(commands, "diff", "compare two columns of one store, or one column of two stores", _diff, json=True)
    diff.add_argument("other", nargs="?", metavar="OTHER_URL", help="a second store; rollouts are matched by id")
    diff.add_argument("--columns", nargs="+", default=["teacher"], metavar="COLUMN", help="two, or one that is in both stores (teacher)")
    diff.add_argument("--tolerance", type=float, default=0.0, metavar="NATS", help="largest difference that is none (0)")

    _pages(commands)

    _command(commands, "compact", "merge many small appends into large ones", _compact)

    cost = _command(commands, "estimate", "bytes and hours of N prompts; what is not given is measured in the store", _estimate, json=True)
    cost.add_argument("--prompts", type=_count, required=True, metavar="N")
    cost.add_argument("--samples", type=_count, metavar="N", help="of each prompt (those of the store, or 1)")
    cost.add_argument("--prompt-tokens", type=_positive, metavar="N", help="on average")
    cost.add_argument("--response-tokens", type=_positive, metavar="N", help="on average")
    cost.add_argument("--vocab-size", type=_count, metavar="V")
    cost.add_argument("--columns", type=_whole, metavar="N", help="score columns (those of the store, or 2)")
    cost.add_argument("--top-k", type=_whole, metavar="K", help="of the first column (that of the store, or 0)")
    cost.add_argument("--behavior", action="store_true", help="the sampling engine's log-probs are kept, too")
    cost.add_argument("--logprob-dtype", choices=sorted(LOGPROB_BYTES), default="float32", help="of the store (float32)")
    cost.add_argument("--sampling-rate", type=_positive, metavar="TOKENS/S", help="response tokens sampled (measured in the store)")
    cost.add_argument("--scoring-rate", type=_positive, metavar="TOKENS/S", help="prompt and response tokens read by a scorer (measured)")
    return parser


def _pages(commands: Any) -> None:
    report = _command(commands, "report", "rollouts token by token, as a page for a browser", _report)
    report.add_argument("--rows", type=_whole, nargs="+", default=[0], metavar="ROW", help="rollouts to show (0)")
    run = _command(commands, "run", "a whole run as a page: training, cost, advantages, a few rollouts, who made what", _run_report)
    run.add_argument("--history", type=Path, metavar="FILE", help="JSON of the training: its steps, or an object with them as history")
    run.add_argument("--student", type=Path, metavar="FOLDER", help="of the student that came out, for its lineage")
    run.add_argument("--title", default="Run report", help="of the page")
    for page in (report, run):
        page.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (report.html)")
        page.add_argument("--tokenizer", metavar="FOLDER", help="folder of a transformers tokenizer; ids are shown without one")
        page.add_argument(
            "--columns", nargs="+", default=["teacher", "behavior"], metavar="COLUMN", help="teacher, student, and a third to show"
        )
        page.add_argument("--clip", type=_positive, default=10.0, metavar="NATS", help="clip threshold of the advantage (10)")


def _command(commands: Any, name: str, summary: str, run: Any, *, json: bool = False) -> ArgumentParser:
    # abbreviations would let `--storage` through with a value that the message about another mistake repeats
    parser: ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("url", metavar="URL", help="a local path or a URL", nargs="?" if name == "estimate" else None)
    parser.add_argument(
        "--storage-option",
        action="append",
        type=_key_and_value,
        default=[],
        metavar="KEY=VALUE",
        help="of the storage of all URLs, may be repeated; credentials are better left in the environment",
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentTypeError("expected KEY=VALUE")
    return key, value


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not 0, 1, 2, ...")
    return int(text)


def _count(text: str) -> int:
    if _whole(text) == 0:
        raise ArgumentTypeError("0 is too little")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no number") from error
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not above 0")
    return value


def _open(url: str, options: Namespace) -> DurableStore:
    return open_store(url, dict(options.storage_option) or None)


def _info(options: Namespace) -> int:
    store = _open(options.url, options)
    info = inspect_store(store, sample=options.sample, clip=options.clip)
    if options.json:
        return _print_json({**asdict(info), "bytes_per_token": info.bytes_per_token})
    return _show(*_display().show_info(info), *_verdicts(*((store, column) for column in store.columns)))


def _verify(options: Namespace) -> int:
    _display()
    from lopd.tools.console import RichProgress

    store, problems = _open(options.url, options), 0
    for problem in check_store(store, progress=RichProgress()):
        problems += 1
        print(problem, flush=True)
    print(f"{store!r}: {problems:,} problems in {len(store):,} rollouts.")
    return PROBLEMS if problems else FINE


def _diff(options: Namespace) -> int:
    left_column, right_column = options.columns[0], options.columns[-1]
    if len(options.columns) > 2 or (options.other is None and left_column == right_column):
        raise InvalidRecordError(
            f"Diff: the columns are {options.columns}, expected two of one store, or one or two of two stores; name them with --columns."
        )
    left = _open(options.url, options)
    right = left if options.other is None else _open(options.other, options)
    difference = compare_columns(left, right, left_column, right_column)
    exit_code = PROBLEMS if difference.exceeds(options.tolerance) else FINE
    if options.json:
        _print_json(asdict(difference))
        return exit_code
    _show(_display().show_difference(f"{left!r}: {left_column}", f"{right!r}: {right_column}", difference))
    _show(*_verdicts((left, left_column), (right, right_column)))
    if manifests := left.manifest.difference(right.manifest):
        _show(f"The manifests differ: {manifests}.")
    return exit_code


def _verdicts(*sides: tuple[DurableStore, str]) -> Iterator[str]:
    for store, column in sides:
        if column in store.columns:
            yield f"{store!r}: {column}: {store.columns[column].model}: {verdict(store.manifest, store.columns[column])}."


def _report(options: Namespace) -> int:
    from lopd.tools.report import write_token_report

    store, report = _open(options.url, options), _columns(options)
    write_token_report(options.out, store, options.rows, report=report, decode=_decode(options.tokenizer))
    print(f"{options.out}: {len(options.rows)} rollouts; open it in a browser.")
    return FINE


def _run_report(options: Namespace) -> int:
    from lopd.tools.report import RunHistory, write_run_report

    history = RunHistory() if options.history is None else RunHistory.read(options.history)
    write_run_report(
        options.out,
        _open(options.url, options),
        history.steps,
        phases=history.phases,
        report=_columns(options),
        decode=_decode(options.tokenizer),
        lineage=None if options.student is None else Lineage.read(options.student),
        versions=history.versions,
        title=options.title,
    )
    print(f"{options.out}: {len(history.steps):,} steps; open it in a browser.")
    return FINE


def _columns(options: Namespace) -> Any:
    from lopd.tools.report import TokenReport

    if len(options.columns) not in {2, 3}:
        raise InvalidRecordError(
            f"Report: the columns are {options.columns}, expected teacher, student, and perhaps a third; pass --columns."
        )
    teacher, student, *others = options.columns
    return TokenReport(teacher, student, others[0] if others else None, options.clip)


def _decode(folder: str | None) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    from lopd.engines.identity import looking_for

    with looking_for(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda token: str(tokenizer.decode([token]))


def _compact(options: Namespace) -> int:
    display, store = _display(), _open(options.url, options)
    return _show(display.show_compaction(repr(store), compact_store(store)))


def _estimate(options: Namespace) -> int:
    plan, rates = _plan(options)
    cost = estimate(plan, rates)
    if options.json:
        return _print_json({**asdict(cost), "total": cost.total, "bytes_per_token": cost.bytes_per_token, "plan": asdict(plan)})
    return _show(_display().show_cost(plan, cost))


def _plan(options: Namespace) -> tuple[Plan, Rates]:
    given = {name: getattr(options, name) for name in ("prompt_tokens", "response_tokens", "vocab_size")}
    given = {name: value for name, value in given.items() if value is not None}
    rates, samples = Rates(), 1
    if options.url is not None:
        store = _open(options.url, options)
        plan, rates, samples = plan_like(store, options.logprob_dtype), measure_rates(store), store.manifest.sampling.samples_per_prompt
    elif len(given) < 3:
        missing = next(name for name in ("prompt_tokens", "response_tokens", "vocab_size") if name not in given)
        raise InvalidRecordError(
            f"Estimate: --{missing.replace('_', '-')} is absent, expected a number; pass it, or the URL of a store to measure it in."
        )
    else:
        plan = Plan(rollouts=0, logprob_dtype=options.logprob_dtype, **given)
    columns = list(plan.columns) if options.columns is None else [*plan.columns, *[0] * options.columns][: options.columns]
    if columns and options.top_k is not None:
        columns[0] = options.top_k
    rollouts = options.prompts * (options.samples or samples)
    plan = evolve(plan, rollouts=rollouts, columns=tuple(columns), behavior=plan.behavior or options.behavior, **given)
    return plan, Rates(options.sampling_rate or rates.sampling, options.scoring_rate or rates.scoring)


def _display() -> Any:
    try:
        from lopd.tools.doctor import display
    except ImportError as error:
        raise MissingDependencyError(
            "Doctor: rich is not installed, expected it for tables and progress; pip install 'lopd[hf]', or ask for --json."
        ) from error
    return display


def _show(*things: Any) -> int:
    from rich.console import Console

    # names and sentences may hold brackets, which are no markup
    console = Console(markup=False, highlight=False)
    for thing in things:
        console.print(thing)
    return FINE


def _print_json(values: Mapping[str, Any]) -> int:
    print(json.dumps(values, indent=1, allow_nan=False))
    return FINE


if __name__ == "__main__":
    sys.exit(main())
