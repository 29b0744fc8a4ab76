"""What the doctor found, as tables."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from rich.table import Table

from lopd.guards.consistency import verdict
from lopd.tools.console import table
from lopd.tools.doctor.comparing import Difference
from lopd.tools.doctor.contents import AdvantageInfo, StoreInfo
from lopd.tools.doctor.estimating import Cost, Plan
from lopd.tools.doctor.upkeep import Compaction

_COMMITS_SHOWN = 8
_REASONS_SHOWN = 8


def show_info(info: StoreInfo) -> Iterator[Table | str]:
    """Tables of one store, and the objections to its columns as teachers."""
    yield _facts(info)
    if info.columns:
        yield _columns(info)
    if info.advantages:
        yield _advantages(info.advantages, info.clip)
    yield table(
        f"History: the last {min(_COMMITS_SHOWN, len(info.history))} of {len(info.history)} commits",
        ("commit", "kind", "column", "rows", "tokens", "when (UTC)", "rounding (nats)"),
        [
            (str(c.number), c.kind, c.column or "", c.rows, c.tokens, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(c.when)), c.rounding)
            for c in info.history[-_COMMITS_SHOWN:]
        ],
    )
    for column in info.columns:
        for row, reason in islice(column.quarantined.items(), _REASONS_SHOWN):
            yield f"Column {column.name!r}, row {row} in quarantine: {reason}"
        if len(column.quarantined) > _REASONS_SHOWN:
            yield f"Column {column.name!r}: {len(column.quarantined) - _REASONS_SHOWN:,} more in quarantine"
        if column.objection and not column.of_policy:
            yield f"Column {column.name!r}: {column.objection}"


def _facts(info: StoreInfo) -> Table:
    manifest, sampling = info.manifest, info.manifest.sampling
    sample = f"(in {info.sampled:,} of {info.rollouts:,} rollouts, evenly spaced)"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(info.finish_reasons.items())) or "none"
    return table(
        info.store,
        ("what", "value"),
        [
            ("rollouts", info.rollouts),
            ("prompt tokens", info.prompt_tokens),
            ("response tokens", info.response_tokens),
            ("bytes", info.stored_bytes),
            ("bytes per token", info.bytes_per_token),
            *((f"policy of generation {number}", f"{policy} {policy.dtype}") for number, policy in info.generations.items()),
            ("SFT teacher", manifest.sft_teacher or "not recorded"),
            ("tokenizer", f"{manifest.tokenizer.vocab_hash[:12]}, {manifest.tokenizer.vocab_size:,} ids"),
            ("sampling", f"temperature {sampling.temperature}, top-p {sampling.top_p}, at most {sampling.max_new_tokens:,} tokens"),
            ("samples per prompt", sampling.samples_per_prompt),
            ("behavior log-probs", f"{info.behavior:,} of {info.rollouts:,} rollouts"),
            (f"finish reasons {sample}", reasons),
            (f"masked response tokens {sample}", f"{info.masked:.2%}"),
        ],
    )


def _columns(info: StoreInfo) -> Table:
    facts = [
        (
            column.provenance.model,
            column.provenance.model.dtype,
            column.provenance.engine,
            column.provenance.logprobs_mode,
            "the store's" if column.provenance.vocab_hash == info.manifest.tokenizer.vocab_hash else "ANOTHER",
            column.provenance.top_k,
            f"{column.scored:,} of {info.rollouts:,}",
            len(column.quarantined),
            "not measured"
            if column.provenance.parity is None
            else f"{column.provenance.parity.mean:.2g} (max {column.provenance.parity.max:.2g})",
            "the policy itself" if column.of_policy else verdict(info.manifest, column.provenance).partition(": ")[0],
        )
        for column in info.columns
    ]
    names = (
        "model",
        "dtype",
        "engine",
        "mode",
        "tokenizer",
        "top-k",
        "rollouts scored",
        "in quarantine",
        "parity, mean nats",
        "as teacher",
    )
    return table("Columns", ("what", *(column.name for column in info.columns)), list(zip(names, *facts, strict=True)))


def _advantages(pairs: Sequence[AdvantageInfo], clip: float) -> Table:
    facts = [
        (
            pair.rollouts,
            pair.tokens,
            pair.mean,
            "one rollout has none" if pair.ci95 is None else pair.ci95,
            pair.mean_abs,
            *pair.quantiles.values(),
            f"{pair.below_half_clip:.3%}",
            f"{pair.negative:.3%}",
        )
        for pair in pairs
    ]
    quantiles = (f"quantile {level:g}" for level in pairs[0].quantiles)
    shares = (f"share below {-clip / 2:g}", "share below 0")
    names = ("rollouts", "tokens", "mean", "its 95 % interval, +-", "mean of the absolute value", *quantiles, *shares)
    return table(
        "Advantage, nats (rollouts evenly spaced, tokens that count)",
        ("what", *(f"{pair.teacher} - {pair.student}" for pair in pairs)),
        list(zip(names, *facts, strict=True)),
    )


def show_difference(left: str, right: str, difference: Difference) -> Table:
    """One table; `left` and `right` name the columns."""
    worst = difference.worst
    return table(
        f"{left}  -  {right}",
        ("what", "value"),
        [
            ("rollouts compared", difference.rollouts),
            ("tokens compared", difference.tokens),
            ("rollouts only in the first", difference.only_left),
            ("rollouts only in the second", difference.only_right),
            ("rollouts with other content", difference.other_content),
            ("first of these", difference.first_other or ""),
            ("largest difference (nats)", difference.max),
            ("99 % quantile (nats)", difference.p99),
            ("mean difference (nats)", difference.mean),
            ("largest at", f"{worst.rollout_id!r}, response token {worst.position}: {worst.left:.7g}, {worst.right:.7g}" if worst else ""),
        ],
    )


def show_compaction(store: str, done: Compaction) -> Table:
    """One table."""
    return table(
        f"{store}: compacted in {done.seconds:.2f} s",
        ("what", "before", "after"),
        [("commits", done.commits_before, done.commits_after), ("bytes", done.bytes_before, done.bytes_after)],
    )


def show_cost(plan: Plan, cost: Cost) -> Table:
    """One table."""
    return table(
        f"{plan.rollouts:,} rollouts of {plan.prompt_tokens:,.4g} + {plan.response_tokens:,.4g} tokens, {len(plan.columns)} score columns",
        ("what", "cost"),
        [
            ("token ids", _size(cost.token_ids)),
            (f"log-probs ({plan.logprob_dtype})", _size(cost.logprobs)),
            ("top-k", _size(cost.top_k)),
            ("loss masks", _size(cost.masks)),
            ("rollouts and commits", _size(cost.overhead)),
            ("store", _size(cost.total)),
            ("bytes per token", cost.bytes_per_token),
            ("sampling", _duration(cost.sampling_seconds)),
            ("scoring", _duration(cost.scoring_seconds)),
        ],
    )


def _size(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.4g} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "no rate given or measured"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min {rest:02} s"
