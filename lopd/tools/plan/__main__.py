"""The command line: `python -m lopd.tools.plan --tokens 1e6 1e9 1e12 --gpus 64`.

Give rates that you measured, or a store that was filled with these models (its history says how fast); else they are guessed from the sizes of the
models and the GPU-hours of the paper.  Exit code 0, or 2 if the call makes no sense or a store cannot be read.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import asdict, evolve, fields

from lopd.backends.opening import open_store
from lopd.errors import LopdError, MissingDependencyError
from lopd.tools.doctor.estimating import measure_rates, plan_like
from lopd.tools.plan.bill import Bill, GpuRates, Work, lightning, online
from lopd.tools.plan.paper import H100_FLOPS, PAPER_LOCKSTEP, rates_like

_SIZES = (1e6, 1e9, 1e12)
_TERA, _GIGA = 1e12, 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the bills; gives the exit code.

    Args:
        arguments: of the command line; those of this process if None.
    """
    options = _parser().parse_args(arguments)
    try:
        works = _works(options)
        plans = [(work, rates := _rates(work, options), _bills(work, rates, options)) for work in works]
        if options.json:
            print(json.dumps([_as_json(*plan) for plan in plans], indent=1))
        else:
            _show(plans, options)
    except LopdError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m lopd.tools.plan", description="GPU-hours, wall time and bytes of Lightning OPD, and of online OPD beside it."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prompts", type=int, nargs="+", metavar="N")
    size.add_argument("--tokens", type=float, nargs="+", default=_SIZES, metavar="N", help="response tokens that are stored (1e6 1e9 1e12)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="(8)")
    for name, kind, what in (
        ("samples", int, "of each prompt (1)"),
        ("prompt-tokens", float, "of a rollout, on average (200)"),
        ("response-tokens", float, "of a rollout, on average (3072)"),
        ("steps", int, "of training (as many as pass 2.2 times over the rollouts)"),
        ("rollouts-per-step", int, "(256)"),
        ("tokens-per-batch", int, "of a micro-batch (8192)"),
        ("student-billions", float, "parameters (8.2)"),
        ("teacher-billions", float, "parameters (32.8)"),
        ("student-active", float, "parameters that a token meets, billions (all)"),
        ("teacher-active", float, "parameters that a token meets, billions (all)"),
        ("vocab-size", int, "(151936)"),
        ("top-k", int, "most likely tokens that are stored (0)"),
        ("columns", int, "of scores (1)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=what)
    for name, what in (
        ("sampling", "response tokens"),
        ("scoring", "prompt and response tokens"),
        ("training", "prompt and response tokens"),
    ):
        parser.add_argument(f"--{name}-rate", type=float, metavar="TOKENS/S", help=f"{what} a second of one GPU, measured")
    parser.add_argument("--like", metavar="URL", help="a store: its lengths, and how fast it was filled")
    parser.add_argument("--like-gpus", type=int, default=1, metavar="N", help="GPUs that filled it (1)")
    parser.add_argument("--tflops", type=float, default=H100_FLOPS / _TERA, metavar="N", help="of one GPU, where rates are guessed (989)")
    parser.add_argument(
        "--lockstep", type=float, default=PAPER_LOCKSTEP, metavar="X", help="see `lopd.tools.plan.online` (%(default).2f, the paper's)"
    )
    parser.add_argument("--gpu-price", type=float, metavar="X", help="of a GPU-hour")
    parser.add_argument("--storage-price", type=float, metavar="X", help="of 10^9 bytes for a month")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _works(options: Namespace) -> list[Work]:
    given = {f.name: value for f in fields(Work) if f.name != "prompts" and (value := getattr(options, f.name)) is not None}
    if options.like:
        there = plan_like(open_store(options.like))
        given = {"prompt_tokens": there.prompt_tokens, "response_tokens": there.response_tokens, "vocab_size": there.vocab_size, **given}
    work = Work(prompts=1, **given)
    sizes = options.prompts or [max(round(tokens / work.response_tokens / work.samples), 1) for tokens in options.tokens]
    return [evolve(work, prompts=size) for size in sizes]


def _rates(work: Work, options: Namespace) -> GpuRates:
    guessed = rates_like(work, options.tflops * _TERA)
    measured: dict[str, float] = {}
    if options.like:
        found = measure_rates(open_store(options.like))
        measured = {name: rate / options.like_gpus for name in ("sampling", "scoring") if (rate := getattr(found, name)) is not None}
    given = {name: rate for name in ("sampling", "scoring", "training") if (rate := getattr(options, f"{name}_rate")) is not None}
    return evolve(guessed, **{**measured, **given})


def _bills(work: Work, rates: GpuRates, options: Namespace) -> tuple[Bill, Bill, Bill]:
    gpus = options.gpus
    return lightning(work, rates, gpus), online(work, rates, gpus), online(work, rates, gpus, options.lockstep)


def _as_json(work: Work, rates: GpuRates, bills: tuple[Bill, ...]) -> dict[str, Any]:
    names = ("lightning", "online_at_least", "online_in_lockstep")
    described = [{**asdict(bill), "gpu_hours": bill.gpu_hours, "wall_hours": bill.wall_hours} for bill in bills]
    for bill, made in zip(described, bills, strict=True):
        bill["bottleneck"] = made.bottleneck.name
    return {"work": asdict(work), "rollouts": work.rollouts, "rates": asdict(rates), **dict(zip(names, described, strict=True))}


def _show(plans: Sequence[tuple[Work, GpuRates, tuple[Bill, Bill, Bill]]], options: Namespace) -> None:
    try:
        from rich.console import Console

        from lopd.tools.console import table
    except ImportError as error:
        raise MissingDependencyError(
            "Plan: rich is not installed, expected it for tables; pip install 'lopd[hf]', or ask for --json."
        ) from error
    console = Console(markup=False, highlight=False)
    for work, rates, bills in plans:
        columns = ("", "tokens", "GPU-hours", "wall", *(("price",) if options.gpu_price else ()))
        console.print(table(_title(work, bills[0], options), columns, list(_rows(bills, options.gpu_price))))
        for line in _sentences(rates, bills):
            console.print(line, soft_wrap=True)
        console.print()


def _title(work: Work, bill: Bill, options: Namespace) -> str:
    price = f", {bill.store_bytes / _GIGA * options.storage_price:,.2f} a month" if options.storage_price else ""
    return (
        f"{work.rollouts:,} rollouts, {work.rollouts * work.response_tokens:.3g} response tokens, {_size(bill.store_bytes)}{price}; "
        f"{work.all_steps:,} steps; {options.gpus} GPUs"
    )


def _rows(bills: tuple[Bill, Bill, Bill], price: float | None) -> Iterator[tuple[str, ...]]:
    def row(name: str, tokens: str, gpu_hours: float, wall: float) -> tuple[str, ...]:
        hours = f"{gpu_hours:.3g}" if gpu_hours < 1000 else f"{gpu_hours:,.0f}"
        return (name, tokens, hours, _hours(wall), *((f"{gpu_hours * price:,.0f}",) if price else ()))

    offline, at_least, lockstep = bills
    for phase in offline.phases:
        yield row(phase.name, f"{phase.tokens:.3g}", phase.gpu_hours, phase.wall_hours)
    yield row("Lightning OPD", "", offline.gpu_hours, offline.wall_hours)
    yield row("online OPD, at least", "", at_least.gpu_hours, at_least.wall_hours)
    yield row("online OPD, in lockstep", "", lockstep.gpu_hours, lockstep.wall_hours)


def _sentences(rates: GpuRates, bills: tuple[Bill, Bill, Bill]) -> Iterator[str]:
    offline, at_least, lockstep = bills
    slow = offline.bottleneck
    share = slow.wall_hours / offline.wall_hours
    yield f"Longest: {slow.name}, {share:.0%} of the wall time.  It is limited by {slow.limit}."
    low, high = at_least.gpu_hours / offline.gpu_hours, lockstep.gpu_hours / offline.gpu_hours
    yield f"Online OPD takes {low:.1f} to {high:.1f} times the GPU-hours."
    yield f"Memory of weights, gradients and moments at the same time: {offline.memory_gb:,.0f} GB, online {lockstep.memory_gb:,.0f} GB."
    yield f"Tokens a second of a GPU: {rates.sampling:,.0f} sampled, {rates.scoring:,.0f} scored, {rates.training:,.0f} trained on."


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} min"
    if hours < 100:
        return f"{hours:.1f} h"
    return f"{hours / 24:,.0f} d"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


if __name__ == "__main__":
    sys.exit(main())
