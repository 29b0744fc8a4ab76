"""`lopd run`, `lopd sample` and `lopd score`: a whole run, and the two phases that cost money, each a process on a machine of its own."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from datetime import date
from importlib.resources import files

from attrs import asdict

import lopd
from lopd.errors import ArgumentError
from lopd.tools.command.models import add_model, model_of, running
from lopd.tools.command_line import FINE, PROBLEMS, declare, opened, print_json, progress, say

_SAMPLING = (
    ("max-new-tokens", int, "cap on a response: the length that is trained on"),
    ("samples-per-prompt", int, "responses to each prompt"),
    ("temperature", float, "of the sampling distribution"),
    ("top-p", float, "keep the most likely tokens that hold this much probability"),
    ("seed", int, "of the random streams; a text for SFT needs another one than the rollouts of the student that was trained on it"),
    ("candidates", int, "most likely tokens that are kept beside each response token"),
    ("drawn", int, "tokens that are drawn and kept beside it"),
)


def add_run(parser: ArgumentParser) -> None:
    """Declare the options of `lopd run`."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="YAML; every key is checked before anything is done")
    parser.add_argument("--example", action="store_true", help="print a file that shows every key, and stop")
    declare(
        parser,
        _run,
        "lopd run --example > run.yaml     then put your own models and prompts there",
        "lopd run run.yaml                 SFT, rollouts, scores, OPD, evaluation, and a page; again to go on after a stop",
        "lopd run run.yaml --json | jq .seeds",
        "",
        "Exit code 1 if prompts were refused or rollouts are in quarantine.",
        storage=False,
    )


def add_sample(parser: ArgumentParser) -> None:
    """Declare the options of `lopd sample`."""
    parser.add_argument("url", metavar="URL", help="the store, a local path or a URL; a new one that ends with .lance is LanceDB tables")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines or parquet, local or a URL")
    parser.add_argument("--field", default="prompt", help="key of the prompt in a record (prompt)")
    parser.add_argument("--template", default="{prompt}", help="text around each prompt that is a string")
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help='variables of the chat template, as {"enable_thinking": false}; those of a record override them',
    )
    for name, kind, what in _SAMPLING:
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"{what} (as `lopd.SamplingParams` has it)")
    parser.add_argument(
        "--stop-id", type=int, action="append", metavar="ID", help="ends a response, in place of the model's own; may be repeated"
    )
    parser.add_argument(
        "--rows", type=int, default=64, metavar="N", help="responses that transformers samples side by side: bounds memory (64)"
    )
    parser.add_argument(
        "--prompts-per-batch",
        type=int,
        metavar="N",
        help="sampled and committed together (64 with transformers, 1024 with servers, those of 1024 responses with vLLM)",
    )
    parser.add_argument("--date", type=day, metavar="YYYY-MM-DD", help="what a chat template that asks for it reads as today (today)")
    add_model(parser, "student")
    declare(
        parser,
        _sample,
        "lopd sample run.zarr --student sft-student --prompts prompts.jsonl --max-new-tokens 4096",
        "lopd sample s3://bucket/run.zarr --student sft-student --prompts prompts.jsonl --engine vllm --dtype bfloat16",
        "lopd sample run.zarr --student sft-student --prompts prompts.jsonl --engine http://gpu1:8000 --engine http://gpu2:8000",
        "",
        "The same command again goes on.  Exit code 1 if prompts were refused.",
    )


def add_score(parser: ArgumentParser) -> None:
    """Declare the options of `lopd score`."""
    parser.add_argument("url", metavar="URL", help="a store with rollouts, a local path or a URL")
    parser.add_argument("--column", default="teacher", help="where the scores go (teacher)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="keep so many of its most likely tokens, and the mass of all others (0)"
    )
    parser.add_argument("--candidates", type=int, default=0, metavar="N", help="score so many of the policy's most likely tokens (0)")
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="score so many of its drawn tokens (0)")
    parser.add_argument("--rollouts-per-batch", type=int, default=256, metavar="N", help="scored and committed together (256)")
    parser.add_argument("--retry-quarantined", action="store_true", help="try those again that were refused before")
    parser.add_argument(
        "--share",
        type=share,
        default="0/1",
        metavar="I/N",
        help="every Nth rollout from the Ith on, from 0: N commands share a store (0/1)",
    )
    add_model(parser, "teacher")
    declare(
        parser,
        _score,
        "lopd score run.zarr --teacher Qwen/Qwen3-32B --engine vllm --top-k 20",
        "lopd score run.zarr --teacher teacher-folder --engine http://gpu1:8000 --engine http://gpu2:8000",
        'lopd score run.zarr --teacher teacher-folder --share "$SLURM_ARRAY_TASK_ID/16"     with --array=0-15',
        "lopd score run.zarr --teacher Qwen/Qwen3-32B --engine https://host --speaks openai --revision COMMIT --dtype bfloat16",
        "",
        "The same command again goes on, also with what came meanwhile.  Exit code 1 if rollouts of the column are in quarantine.",
    )


def day(text: str) -> date:
    """Return the day that an option states; argparse names this function where it is not one."""
    return date.fromisoformat(text)


def share(text: str) -> slice:
    """Return which of all rollouts an option states."""
    first, _, every = text.partition("/")
    if not (first.isdecimal() and every.isdecimal() and int(first) < int(every)):
        raise ArgumentTypeError(f"it is {text!r}, expected I/N with I from 0 to N - 1, as 0/16")
    return slice(int(first), None, int(every))


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
    try:
        found = run_all(settings)
    finally:
        console.stderr = False
    if options.json:
        print_json(found)
    return PROBLEMS if found["refused"] else FINE


def _sample(options: Namespace) -> int:
    from lopd.protocols.reading import named

    bar = progress("Sample", "transformers")
    names = [name.replace("-", "_") for name, _, _ in _SAMPLING]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    sampling = lopd.SamplingParams(**given, stop_ids=options.stop_id or ())
    model = model_of(options)
    how = {name: getattr(options, name) for name in ("field", "template", "chat_template_kwargs", "date")}
    prompts = lopd.read_prompts(options.prompts, model.tokenizer(), **how)
    kind = lopd.LanceStore if options.url.rstrip("/").endswith(".lance") else lopd.ZarrStore
    longest = max((prompt.token_ids.size for prompt in prompts), default=0) + sampling.max_new_tokens
    together = model.together(sampling.samples_per_prompt) if options.prompts_per_batch is None else options.prompts_per_batch
    with running(model.fitted(longest).source(sampling, options.rows)) as source:
        store = kind.open_or_create(options.url, source.manifest, storage_options=dict(options.storage_option) or None)
        report = lopd.collect_rollouts(source, prompts, store, prompts_per_batch=together, progress=bar)
    if options.json:
        print_json({"in_store": len(store), **asdict(report)})
    else:
        say(
            f"{named(store)}: {report.rollouts:,} rollouts sampled, {report.skipped:,} were there, {len(report.refused):,} prompts refused."
        )
    return PROBLEMS if report.refused else FINE


def _score(options: Namespace) -> int:
    from lopd.protocols.reading import chosen, named
    from lopd.verbs import ScoringReport

    bar = progress("Score", "transformers")
    store = opened(options.url, options)
    rows = chosen(store, None)  # while a model is loaded others may sample longer ones, for which vLLM has no room then
    before, rows = len(rows), rows[options.share]
    report, costs = ScoringReport(), None
    if len(rows):  # a share of few rollouts may be empty, which needs no model
        model = model_of(options).fitted(int(store.lengths().sum(axis=1).max()))
        with running(model.scorer(options.top_k, options.candidates, options.drawn)) as scorer:
            report = lopd.score_rollouts(
                store,
                scorer,
                column=options.column,
                rows=rows,
                rollouts_per_batch=options.rollouts_per_batch,
                retry_quarantined=options.retry_quarantined,
                progress=bar,
            )
            costs = getattr(getattr(scorer, "servers", None), "costs", None)
    scored, quarantined = int(store.scored(options.column).sum()), len(store.quarantined(options.column))
    if options.json:
        print_json({"in_store": len(store), "in_column": scored, "in_quarantine": quarantined, **asdict(report)})
    else:
        say(
            f"{named(store)}: {report.rollouts:,} rollouts scored, {scored:,} of {len(store):,} are in {options.column!r}, {quarantined:,} in "
            f"quarantine; {report.floored:,} log-probs were -inf."
        )
        if came := len(store) - before:
            say(f"{came:,} rollouts came meanwhile, and are for the next call.")
        if costs is not None:
            say(str(costs))
    return PROBLEMS if quarantined else FINE
