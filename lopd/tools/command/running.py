"""`lopd run`: what `whole_run` does, from a shell."""

import sys
from argparse import ArgumentParser, Namespace
from importlib.resources import files

from lopd.errors import ArgumentError
from lopd.tools.command_line import FINE, PROBLEMS, add_json, give_examples, print_json, progress


def add_run(parser: ArgumentParser) -> None:
    """Declare the options of `lopd run`."""
    parser.set_defaults(run=_run)
    parser.add_argument("file", nargs="?", metavar="FILE", help="YAML; every key is checked before anything is done")
    parser.add_argument("--example", action="store_true", help="print a file that shows every key, and stop")
    add_json(parser)
    give_examples(
        parser,
        "lopd run --example > run.yaml     then put your own models and prompts there",
        "lopd run run.yaml                 SFT, rollouts, scores, OPD, evaluation, and a page; again to go on after a stop",
        "lopd run run.yaml --json | jq .seeds",
        "",
        "Exit code 1 if prompts were refused or rollouts are in quarantine.",
    )


def _run(options: Namespace) -> int:
    if options.example:
        sys.stdout.write(files("lopd.tools.command").joinpath("example.yaml").read_text("utf-8"))
        return FINE
    if options.file is None:
        raise ArgumentError("Run: the file is missing, expected its path; `lopd run --example` prints one.")
    progress("Run", "transformers", "fsspec", "jinja2")
    from lopd.tools.command.settings import read_settings
    from lopd.tools.command.whole_run import run_all
    from lopd.tools.phases import console

    settings = read_settings(options.file)
    # standard output is for the data
    console.stderr = options.json
    found = run_all(settings)
    if options.json:
        print_json(found)
    return PROBLEMS if found["refused"] else FINE
