"""The command `lopd`, also as `python -m lopd`: one word for each thing to do, over the same functions that a program calls.

`lopd --help` and `lopd --version` import no torch: what a word needs is imported when it is given.
"""

import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile

from lopd.errors import LopdError, printable
from lopd.tools.command_line import UNREAD, UNUSABLE, say

#: Word -> the module that declares its options and runs it, and what it does.
COMMANDS = {
    "run": ("phases", "do a whole run that one file describes, or go on with it"),
    "sample": ("phases", "sample a model's responses to prompts into a store"),
    "score": ("phases", "have a teacher score the rollouts of a store"),
    "info": ("stores", "show what is in a store, and who made it"),
    "verify": ("stores", "check every checksum and hash, and read every row with every column"),
    "diff": ("stores", "compare two columns of one store, or one column of two stores"),
    "compact": ("stores", "merge many small appends into large ones"),
    "report": ("stores", "draw a run, or rollouts token by token, as a page for a browser"),
    "plan": ("planning", "estimate what a run will cost, or what fits on a card"),
}
#: Arguments of the Python API that have another name here.
_ELSEWHERE = {"first_contact_s": "--wait", "api_key": "--key-variable", "max_model_len": "--context"}
_CODES = """\
examples:
  lopd run --example > run.yaml     a file to begin with
  lopd run run.yaml                 sample, score, train, evaluate; again to go on after a stop
  lopd info run.zarr                what is in a store
  lopd COMMAND --help               options, and more examples

exit codes: 0 all is well, 1 problems or differences were found, 2 the call or what it names cannot be used, 130 stopped by Ctrl-C,
141 stopped as the reader of its output was gone (`lopd ... | head`)
"""


def process() -> int:
    """Run the command line of this process; return the exit code, which is 1 for problems that were looked for alone."""
    # a warning is a sentence for a person, not a place in the code
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {printable(str(message))}\n"
    code = UNREAD
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # who reads has seen enough; what is left is not to be written at exit either.  A command that was through keeps its code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
        return UNUSABLE
    return code


def main(words: Sequence[str]) -> int:
    """Run one command; return the exit code.

    Args:
        words: those of the command line.
    """
    parser, command = _parser(words[:1])
    known = ["--help", *re.findall(r"--[a-z][a-z-]*", command.format_usage())]
    # one that is unknown may be followed by a secret; what is missing besides may be what it stands for
    given = [word.split("=")[0] for word in takewhile(lambda word: word != "--", words) if word.startswith("--")]
    if misspelt := [_nearest(word, known) for word in given if word not in known]:
        command.error(f"unknown arguments: {', '.join(misspelt)}")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(word.split('=')[0] for word in unknown if word.startswith('-')) or 'too many'}")
    try:
        return int(options.run(options))
    except LopdError as error:
        say(_in_options(str(error), known), aside=True)
        return UNUSABLE
    except RuntimeError as error:
        # torch is imported where it can have raised this
        if not isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
            raise
        say(
            f"The memory of the GPU is too small ({str(error).splitlines()[0]:.200}); lower `rows` where it samples, and `tokens_per_batch` where it "
            "trains, which change no result; where it scores, or has no room for the model, take vLLM, a dtype of 16 bits or another card; "
            "`lopd plan` shows what fits.",
            aside=True,
        )
        return UNUSABLE
    except KeyboardInterrupt:
        say("Stopped; what is committed stays, and the same command goes on from there.", aside=True)
        return 130


def _nearest(word: str, known: Sequence[str]) -> str:
    """Return a word that is not known, with the one that may be meant."""
    near = get_close_matches(word, known, 1, cutoff=0.7)
    return f"{word}{f' (is it {near[0]}?)' if near else ''}"


def _in_options(sentence: str, known: Sequence[str]) -> str:
    """Return a message of the Python API with its arguments as the options that they are here.

    >>> _in_options("pass `context=` that all servers have", ["--context"])
    'pass `--context` that all servers have'
    """
    named = {option[2:].replace("-", "_"): option for option in known}
    # the keys of a file are named as the options are
    named |= {old: new if new in known else new[2:].replace("-", "_") for old, new in _ELSEWHERE.items()}
    return re.sub(r"`(\w+)(?:=True|=)?`", lambda found: f"`{named.get(found[1]) or found[0][1:-1]}`", sentence)


def _parser(wanted: Sequence[str]) -> tuple[ArgumentParser, ArgumentParser]:
    """Return the whole command line, with the options of the word that is wanted, and that of this word."""
    if wanted and not wanted[0].startswith("-") and wanted[0] not in COMMANDS:
        ArgumentParser(prog="lopd").error(f"there is no command {_nearest(wanted[0], [*COMMANDS])}; `lopd --help` shows all")
    parser = ArgumentParser(
        prog="lopd",
        description="Offline on-policy distillation: sample once, score once, train with no teacher in memory.",
        epilog=_CODES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lopd {version('lopd')}")
    commands, found = parser.add_subparsers(required=True, metavar="COMMAND"), parser
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
            found = command
    return parser, found
