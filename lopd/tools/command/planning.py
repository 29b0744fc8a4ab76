"""`lopd plan`: GPU-hours, wall time and bytes of Lightning OPD, and of online OPD for comparison; or what fits on a card (`--card`).

Give rates that you measured, or a store to be like (its lengths and columns, and how fast it was filled); else rates are guessed from the
sizes of the models and the GPU-hours of the paper.  Exit code 0, 1 if a phase does not fit on the card, or 2 if the call makes no sense or a
store or a configuration cannot be read.
"""

import math
import re
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Container, Iterator
from typing import Any

import torch
from attrs import asdict, evolve, fields

from lopd.errors import ArgumentError
from lopd.records.checks import check_at_least, check_number
from lopd.records.optional import need
from lopd.tools.command_line import FINE, PROBLEMS, Table, declare, opened, print_json, show
from lopd.tools.plan.bill import Bill, GpuRates, lightning, online
from lopd.tools.plan.fit import Fit, fits
from lopd.tools.plan.like import measured_rates, work_like
from lopd.tools.plan.memory import Use
from lopd.tools.plan.paper import H100_FLOPS, PAPER_LOCKSTEP, guessed_for, rates_like
from lopd.tools.plan.work import LOGPROB_BYTES, StoreSize, Work

_SIZES = (1e6, 1e9, 1e12)
_TERA, _GIGA = 1e12, 1e9
#: Lightning, online at bulk rates, online in lockstep.
_Bills = tuple[Bill, Bill, Bill]
#: Phase -> the rate that its hours are of, and whose size that rate is guessed by.
_RATES = {"rollouts": ("sampling", "student"), "scores": ("scoring", "teacher"), "training": ("training", "student")}
#: What is read with `--card`, and what of that the bill does not depend on.
_WITH_CARD = {"card", "json", "student", "teacher", *(f.name for f in fields(Use))}
_OF_CARD = _WITH_CARD - {"card", "json", "gpus", *(f.name for f in fields(Work))}


def add_plan(parser: ArgumentParser) -> None:
    """Declare the options of `lopd plan`."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--prompts", type=int, nargs="+", metavar="N")
    size.add_argument("--tokens", type=float, nargs="+", default=_SIZES, metavar="N", help="response tokens that are stored (1e6 1e9 1e12)")
    parser.add_argument("--gpus", type=int, metavar="N", help="(8)")
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
        ("top-k", int, "most likely tokens that the first column stores (0)"),
        ("columns", int, "of scores (1)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=what)
    parser.add_argument("--behavior", action=BooleanOptionalAction, help="whether the sampling engine's log-probs are stored (they are)")
    parser.add_argument("--sampler", action=BooleanOptionalAction, help="whether those after temperature and top-p are too (they are not)")
    parser.add_argument("--logprob-dtype", choices=sorted(LOGPROB_BYTES), default="float32", help="of the store (float32)")
    for name, what in (
        ("sampling", "response tokens"),
        ("scoring", "read tokens, prompts included,"),
        ("training", "read tokens, prompts included,"),
    ):
        parser.add_argument(f"--{name}-rate", type=float, metavar="TOKENS/S", help=f"{what} a second of one GPU, measured")
    parser.add_argument(
        "--like", metavar="URL", help="a store: its lengths and columns, and how fast commits in a row filled it, where nothing is given"
    )
    parser.add_argument("--like-gpus", type=int, default=1, metavar="N", help="GPUs that filled it (1)")
    parser.add_argument("--tflops", type=float, default=H100_FLOPS / _TERA, metavar="N", help="of one GPU, where rates are guessed (989)")
    parser.add_argument(
        "--lockstep", type=float, default=PAPER_LOCKSTEP, metavar="X", help="see `lopd.tools.plan.online` (%(default).2f, the paper's)"
    )
    parser.add_argument("--gpu-price", type=float, metavar="X", help="of a GPU-hour")
    parser.add_argument("--storage-price", type=float, metavar="X", help="of 10^9 bytes for a month")
    _add_card(parser)
    declare(
        parser,
        _plan,
        "lopd plan --tokens 1e6 1e9 1e12 --gpus 64",
        "lopd plan --like run.zarr --prompts 1000000",
        "lopd plan --card 24 --student DIR --teacher DIR",
    )
    parser.set_defaults(unset=vars(parser.parse_args([])))


def _add_card(parser: ArgumentParser) -> None:
    card = parser.add_argument_group(
        "whether it fits", "With --card, lengths are those of the longest rollout, and --gpus (1) share the student that is trained."
    )
    card.add_argument("--card", type=float, metavar="GB", help="memory of a card, 10^9 bytes")
    card.add_argument("--student", metavar="DIR", help="folder with its configuration, or hub name")
    card.add_argument("--teacher", metavar="DIR", help="folder of the teacher; leave it out if something else scores")
    card.add_argument("--rows", type=int, metavar="N", help="responses that are sampled side by side (64)")
    card.add_argument("--lora-rank", type=int, metavar="N", help="of adapters; 0 trains all weights (0)")
    card.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the student's weights (float32)")
    card.add_argument("--autocast", choices=("float32", "bfloat16"), help="what layers compute in (bfloat16); float32: as the weights are")
    card.add_argument("--gradient-checkpointing", action="store_true", help="activations are computed again")
    card.add_argument("--packed", action="store_true", help="FlashAttention or FlexAttention reads packed batches")


def _fit(options: Namespace) -> int:
    if options.student is None:
        raise ArgumentError("Plan: --student is missing, expected the folder or hub name of the student; pass it beside --card.")
    finding = need("lopd.engines.finding", "Plan")
    configs = [finding.described(folder) for folder in (options.student, options.teacher) if folder]
    given = {f.name: value for f in fields(Use) if (value := getattr(options, f.name, None)) is not None}
    # lengths on average may be fractions, and those of the longest rollout are counts
    given |= {name: int(given[name]) for name in ("prompt_tokens", "response_tokens") if given.get(name, 0.5).is_integer()}
    given |= {name: getattr(torch, given[name]) for name in ("dtype", "autocast") if name in given}
    if given.get("autocast") == torch.float32:
        given["autocast"] = None
    found = fits(configs[0], Use(**given), card_gb=options.card, teacher=configs[1] if options.teacher else None)
    found = evolve(found, advice=tuple(map(_in_options, found.advice)))
    if options.json:
        print_json({**asdict(found), "fits": found.fits})
    else:
        show(_fit_table(found), *found.advice)
    return FINE if found.fits else PROBLEMS


def _in_options(sentence: str) -> str:
    """Return advice on a `Use` as the options that it is here.

    >>> _in_options("training: dtype=torch.bfloat16, autocast=None fits with tokens_per_batch=8192")
    'training: --dtype bfloat16 --autocast float32 fits with --tokens-per-batch 8192'
    """

    def option(found: re.Match[str]) -> str:
        name, value = f"--{found[1].replace('_', '-')}", "float32" if found[2] == "None" else found[2]
        return name if value == "True" else f"{name} {value}"

    return re.sub(r"(\w+)=(?:torch\.)?(\w+),?", option, sentence)


def _fit_table(found: Fit) -> Table:
    rows = [
        (
            phase.name,
            f"{phase.gb:.1f}",
            "fits" if phase.fits else "does not fit",
            f"{phase.unit} {phase.most:,}",
            ", ".join(f"{part} {size:.1f}" for part, size in phase.parts.items()),
        )
        for phase in found.phases
    ]
    return f"One model at a time, of {found.room_gb:.1f} GB", ("phase", "GB", "", "at most", "when most is needed"), rows


def _plan(options: Namespace) -> int:
    for name in (name for name, unset in options.unset.items() if getattr(options, name) != unset):
        if name in _OF_CARD if options.card is None else name not in _WITH_CARD:
            why = (
                "without --card, expected both; pass --card GB to see what fits, or leave it out and pass --student-billions and "
                "--teacher-billions for the bill"
                if options.card is None
                else "beside --card, expected one of them; leave it out, or leave out --card for the bill"
            )
            raise ArgumentError(f"Plan: --{name.replace('_', '-')} is given {why}.")
    if options.card is not None:
        return _fit(options)
    gpus = options.gpus = 8 if options.gpus is None else options.gpus
    check_at_least("Plan", "like_gpus", options.like_gpus, 1)
    like, known = Work(prompts=1, logprob_dtype=options.logprob_dtype), dict[str, float]()
    if options.like:
        store = opened(options.like, options)
        like = work_like(store, options.logprob_dtype)
        known = {name: rate / options.like_gpus for name, rate in measured_rates(store).items()}
    known |= {name: rate for name, _ in _RATES.values() if (rate := getattr(options, f"{name}_rate")) is not None}
    plans = list[tuple[Work, GpuRates, _Bills]]()
    for work in _works(like, options):
        rates = evolve(rates_like(work, options.tflops * _TERA), **known)
        plans.append((work, rates, (lightning(work, rates, gpus), online(work, rates, gpus), online(work, rates, gpus, options.lockstep))))
    if options.json:
        print_json([_as_json(*plan, known) for plan in plans])
    else:
        show(*(thing for plan in plans for thing in _shown(*plan, options, known)))
    return FINE


def _works(like: Work, options: Namespace) -> list[Work]:
    """Return `like` with the options put in, once for each size."""
    names = {f.name for f in fields(Work)} - {"prompts", "columns"}
    work = evolve(like, **{name: value for name in names if (value := getattr(options, name, None)) is not None})
    columns = [*work.columns, *[0] * (options.columns or 0)][: len(work.columns) if options.columns is None else max(options.columns, 0)]
    if columns and options.top_k is not None:
        columns[0] = options.top_k
    for tokens in options.tokens:
        check_number("Plan", "tokens", tokens, 0 < tokens < math.inf, "finite and more than 0")
    sizes = options.prompts or [max(round(tokens / work.response_tokens / work.samples), 1) for tokens in options.tokens]
    scored = work.scored if options.columns is None else None
    return [evolve(work, columns=tuple(columns), scored=scored, prompts=size) for size in sizes]


def _as_json(work: Work, rates: GpuRates, bills: _Bills, known: Container[str]) -> dict[str, Any]:
    guessed = {phase: rate for phase, (rate, _) in _RATES.items() if rate not in known}
    described = [
        {
            **asdict(bill),
            "phases": [{**asdict(phase), "guessed": phase.name in guessed} for phase in bill.phases],
            "gpu_hours": bill.gpu_hours,
            "wall_hours": bill.wall_hours,
            "bottleneck": bill.bottleneck.name,
            "guessed": bool(guessed),
        }
        for bill in bills
    ]
    return {
        "work": asdict(work),
        "rollouts": work.rollouts,
        "rates": asdict(rates),
        "guessed_rates": [*guessed.values()],
        "guessed_for_response_tokens": guessed_for(work) if guessed else None,
        "store": {**asdict(work.stored), "total": work.stored.total, "bytes_per_token": work.stored.bytes_per_token},
        **dict(zip(("lightning", "online_at_least", "online_in_lockstep"), described, strict=True)),
    }


def _shown(work: Work, rates: GpuRates, bills: _Bills, options: Namespace, known: Container[str]) -> Iterator[Table | str]:
    size = work.stored.total
    price = f", {size / _GIGA * options.storage_price:,.2f} a month" if options.storage_price else ""
    title = (
        f"{work.rollouts:,} rollouts, {work.rollouts * work.response_tokens:.3g} response tokens, {_size(size)}{price}; "
        f"{work.all_steps:,} steps; {options.gpus} GPUs"
    )
    columns = ("", "tokens", "GPU-hours", "wall", *(("price",) if options.gpu_price else ()))
    yield title, columns, list(_rows(bills, options.gpu_price))
    yield from _sentences(rates, bills, known)
    if (shorter := guessed_for(work)) and any(rate not in known for rate, _ in _RATES.values()):
        yield f"Rates are guessed for responses of {shorter:,} tokens.  In longer ones attention and the cache make each token dearer: measure them."
    card = "an H100" if options.tflops * _TERA == H100_FLOPS else f"a GPU of {options.tflops:g} TFLOPS"
    for rate, role in _RATES.values():
        if options.like and rate not in known:
            active, size = (getattr(options, f"{role}_{of}") for of in ("active", "billions"))
            guessed = f"{rate.capitalize()} is guessed for {active or getattr(work, f'{role}_billions'):g} billion parameters on {card}"
            yield f"{guessed}; pass {'' if active or size else f'--{role}-billions, or '}--{rate}-rate."
    yield f"{_store_sentence(work, work.stored)}\n"


def _rows(bills: _Bills, price: float | None) -> Iterator[tuple[str, ...]]:
    def row(name: str, tokens: str, gpu_hours: float, wall: float) -> tuple[str, ...]:
        hours = f"{gpu_hours:.3g}" if gpu_hours < 1000 else f"{gpu_hours:,.0f}"
        return (name, tokens, hours, _hours(wall), *((f"{gpu_hours * price:,.0f}",) if price else ()))

    for phase in bills[0].phases:
        yield row(
            phase.name + (" (response tokens)" if phase.name == "rollouts" else " (read tokens)"),
            f"{phase.tokens:.3g}",
            phase.gpu_hours,
            phase.wall_hours,
        )
    for name, bill in zip(("Lightning OPD", "online OPD, at least", "online OPD, in lockstep"), bills, strict=True):
        yield row(name, "", bill.gpu_hours, bill.wall_hours)


def _sentences(rates: GpuRates, bills: _Bills, known: Container[str]) -> Iterator[str]:
    offline, at_least, lockstep = bills
    slow = offline.bottleneck
    yield f"Longest: {slow.name}, {slow.wall_hours / offline.wall_hours:.0%} of the wall time.  It is limited by {slow.limit}."
    low, high = at_least.gpu_hours / offline.gpu_hours, lockstep.gpu_hours / offline.gpu_hours
    yield f"Online OPD takes {low:.1f} to {high:.1f} times the GPU-hours."
    yield f"Memory of weights, gradients and moments at the same time: {offline.memory_gb:,.0f} GB, online {lockstep.memory_gb:,.0f} GB."
    units = {"sampling": "response tokens sampled", "scoring": "read tokens scored", "training": "trained"}
    paces = (f"{getattr(rates, name):,.0f} {unit}{' (guessed)' * (name not in known)}" for name, unit in units.items())
    yield f"A second of a GPU: {', '.join(paces)}."


def _store_sentence(work: Work, size: StoreSize) -> str:
    columns = f"{len(work.columns)} score column{'s' * (len(work.columns) > 1)}{', behavior' * work.behavior}{', sampler' * work.sampler}"
    parts = {
        "token ids": size.token_ids,
        f"log-probs ({work.logprob_dtype}; {columns})": size.logprobs,
        "top-k": size.top_k,
        "labels": size.labels,
        "loss masks": size.masks,
        "rollouts and commits": size.overhead,
    }
    return (
        f"Store, {size.bytes_per_token:.4g} bytes a token: {', '.join(f'{name} {_size(count)}' for name, count in parts.items() if count)}."
    )


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.0f} d"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
