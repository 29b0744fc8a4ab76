"""The command `lopd`, also as `python -m lopd`: one word for each thing to do, over the same functions that a program calls.

`lopd --help` and `lopd --version` import no torch: what a word needs is imported when it is given.
"""

import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from lopd.errors import LopdError, printable
from lopd.tools.command_line import FINE, UNUSABLE, say

#: Word -> the module that declares its options and runs it, and what it does.
COMMANDS = {
    "run": ("running", "do a whole run that one file describes, or go on with it"),
    "sample": ("phases", "sample a model's responses to prompts into a store"),
    "score": ("phases", "have a teacher score the rollouts of a store"),
    "info": ("stores", "show what is in a store, and who made it"),
    "verify": ("stores", "check every checksum and hash, and read every row with every column"),
    "diff": ("stores", "compare two columns of one store, or one column of two stores"),
    "compact": ("stores", "merge many small appends into large ones"),
    "report": ("pages", "draw a run, or rollouts token by token, as a page for a browser"),
    "plan": ("planning", "estimate what a run will cost, or what fits on a card"),
}
_CODES = """\
examples:
  lopd run --example > run.yaml     a file to begin with
  lopd run run.yaml                 sample, score, train, evaluate; again to go on after a stop
  lopd info run.zarr                what is in a store
  lopd COMMAND --help               options, and more examples

exit codes: 0 all is well, 1 problems or differences were found, 2 the call or what it names cannot be used, 130 stopped by Ctrl-C
"""


def process() -> int:
    """Run the command line of this process; return the exit code, which is 1 for problems that were looked for alone."""
    # a warning is a sentence for a person, not a place in the code
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {printable(str(message))}\n"
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # who reads has seen enough; what is left is not to be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except Exception:
        traceback.print_exc()
        return UNUSABLE
    return code


def main(words: Sequence[str]) -> int:
    """Run one command; return the exit code.

    Args:
        words: those of the command line.
    """
    parser = _parser(words[:1])
    options, unknown = parser.parse_known_args(words)
    if unknown:
        # a misspelt option may be followed by a secret
        parser.error(f"unknown arguments: {' '.join(word.split('=')[0] for word in unknown if word.startswith('-')) or 'too many'}")
    try:
        return int(options.run(options))
    except LopdError as error:
        say(str(error), aside=True)
        return UNUSABLE
    except KeyboardInterrupt:
        say("Stopped; what is committed stays, and the same command goes on from there.", aside=True)
        return 130


def _parser(wanted: Sequence[str]) -> ArgumentParser:
    """Return the whole command line, with the options of the word that is wanted."""
    parser = ArgumentParser(
        prog="lopd",
        description="Offline on-policy distillation: sample once, score once, train with no teacher in memory.",
        epilog=_CODES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lopd {version('lopd')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        # abbreviations would let `--storage` through with a value that the message about another mistake repeats
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in wanted:
            getattr(import_module(f"lopd.tools.command.{module}"), f"add_{name}")(command)
    return parser
