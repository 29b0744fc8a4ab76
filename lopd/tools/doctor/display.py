"""What the doctor found, as tables and sentences."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from lopd.protocols import LogprobReader
from lopd.records.drift import LEVELS, TAIL
from lopd.tools.command_line import Table
from lopd.tools.doctor.comparing import Difference
from lopd.tools.doctor.contents import AdvantageInfo, StoreInfo
from lopd.tools.facts import origins, score_columns, start_rows

_COMMITS_SHOWN = 8
_REASONS_SHOWN = 8


def show_info(store: LogprobReader, info: StoreInfo) -> Iterator[Table | str]:
    """Return tables of one store, the reasons of its quarantine, and the objections to its columns as teachers."""
    yield _facts(store, info)
    (what, names), *rows = score_columns(store).items()
    yield "Columns", (what, *names), [(name, *cells) for name, cells in rows]
    for name, mean in info.labels.items():
        yield f"Column {name!r}: labels, their mean is {mean:.4g} (in at most {info.sampled:,} rollouts, evenly spaced)"
    if info.advantages:
        yield _advantages(info.advantages)
    for teacher, start in info.starts.items():
        what = f"Before the first step, {teacher}"
        yield f"{what}: not known: {start}" if isinstance(start, str) else (f"{what} - {start.ref}", ("what", "value"), start_rows(start))
    shown = info.history[-_COMMITS_SHOWN:]
    yield (
        f"History: the last {len(shown)} of {len(info.history)} commits",
        ("commit", "kind", "column", "rows", "tokens (read; of scores: response)", "when (UTC)", "rounding (nats)"),
        [
            (str(c.number), c.kind, c.column or "", c.rows, c.tokens, time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(c.when)), c.rounding)
            for c in shown
        ],
    )
    for column in info.columns:
        for row, reason in islice(column.quarantined.items(), _REASONS_SHOWN):
            yield f"Column {column.name!r}, row {row} in quarantine: {reason}"
        if len(column.quarantined) > _REASONS_SHOWN:
            yield f"Column {column.name!r}: {len(column.quarantined) - _REASONS_SHOWN:,} more in quarantine"
        if column.objection and not column.of_policy:
            yield f"Column {column.name!r}: {column.objection}"


def _facts(store: LogprobReader, info: StoreInfo) -> Table:
    sample = f"(in {info.sampled:,} of {info.rollouts:,} rollouts, evenly spaced)"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(info.finish_reasons.items())) or "none"
    return (
        info.store,
        ("what", "value"),
        [
            ("rollouts", info.rollouts),
            ("prompt tokens", info.prompt_tokens),
            ("response tokens", info.response_tokens),
            ("bytes", info.stored_bytes),
            ("bytes per token", info.bytes_per_token),
            *origins(store),
            (f"finish reasons {sample}", reasons),
            (f"masked response tokens {sample}", f"{info.masked:.2%}"),
        ],
    )


def _advantages(pairs: Sequence[AdvantageInfo]) -> Table:
    facts = [
        (
            pair.rollouts,
            pair.summary.tokens,
            str(pair.mean),
            pair.mean_abs,
            *pair.summary.quantiles,
            f"{pair.summary.tail:.3%}",
            f"{pair.summary.negative:.3%}",
        )
        for pair in pairs
    ]
    quantiles, shares = (f"quantile {level:g}" for level in LEVELS), (f"share below {TAIL:g}", "share below 0")
    names = ("rollouts", "response tokens", "mean", "mean of the absolute value", *quantiles, *shares)
    return (
        "Advantage, nats (rollouts evenly spaced, tokens that count)",
        ("what", *(f"{pair.teacher} - {pair.student}" for pair in pairs)),
        list(zip(names, *facts, strict=True)),
    )


def show_difference(left: str, right: str, difference: Difference) -> Table:
    """Return one table; `left` and `right` name the columns."""
    worst = difference.worst
    return (
        f"{left}  -  {right}",
        ("what", "value"),
        [
            ("rollouts compared", difference.rollouts),
            ("response tokens compared", difference.tokens),
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
