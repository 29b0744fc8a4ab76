"""Rollouts token by token, as one HTML page: where the teacher and the student disagree."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from lopd.errors import InvalidRecordError, printable
from lopd.protocols import LogprobReader
from lopd.protocols.reading import evenly, named
from lopd.records.checks import check_number, own_numbers
from lopd.records.drift import LEVELS, TAIL
from lopd.records.rollouts import BEHAVIOR_COLUMN, ScoredRollout
from lopd.tools.advantages import SampledAdvantages, check_columns, sample_advantages, scored_rows
from lopd.tools.report.charts import Chart, curves, histogram, write_page

Decode = Callable[[int], str]


@frozen
class TokenReport:
    """What a page shows.

    Args:
        teacher: column of the teacher.
        student: column that is subtracted: of the policy that sampled, or any other.
        ref: a third column to show beside them, or None.
        clip: nats at which colours are full, and at which advantages are clipped in training.
        sample: rollouts, evenly spaced, behind histogram and curves, beside those that are shown.
        bins: number of bins over the position in the response.
        tokens: largest number of tokens shown of a prompt, and of a response.  A longer one is shown in three parts: its beginning, the tokens around
            the advantage of largest size, and its end.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    teacher: str = "teacher"
    student: str = BEHAVIOR_COLUMN
    ref: str | None = None
    clip: float = 10.0
    sample: int = 256
    bins: int = 20
    tokens: int = 4096

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Token report")
        check_number("Token report", "clip", self.clip, 0 < self.clip < np.inf, "finite and more than 0 nats")
        check_number("Token report", "sample", self.sample, self.sample >= 0, "at least 0")
        check_number("Token report", "bins", self.bins, self.bins >= 1, "at least 1")
        check_number("Token report", "tokens", self.tokens, self.tokens >= 3, "at least 3")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns to read."""
        return tuple(dict.fromkeys(_named(self).values()))


def write_token_report(
    path: str | Path, store: LogprobReader, rows: Sequence[int], *, report: TokenReport | None = None, decode: Decode | None = None
) -> None:
    """Write a page with these rollouts token by token, and the advantages of more of them by size, position and round.

    Memory is that of the rollouts shown and of one number for each token of the sample.

    Args:
        path: where the page goes.
        store: with the columns.
        rows: rollouts to show.
        report: which columns, and how they are shown.
        decode: token id -> text, `decoder_of(tokenizer)`; ids are shown without one.

    Raises:
        MissingScoresError: a column is not there, or a row has no scores in it.
        NoSuchRowError: a row is not in the store.
        InvalidRecordError: `rows` is empty.
    """
    report = report or TokenReport()
    if not len(rows):
        raise InvalidRecordError("Token report: it was given 0 rows, expected at least 1; choose some rollouts.")
    check_columns(store, report.columns)
    shown = store.read(list(rows), columns=report.columns)
    chosen = evenly(scored_rows(store, report.columns), report.sample) if report.sample else rows
    sampled = sample_advantages(store, report.teacher, report.student, chosen)
    parts = {"facts": _facts(store, report, len(sampled.rows)), "rollouts": [show_rollout(record, report, decode) for record in shown]}
    write_page(path, "tokens.html", {**parts, **advantage_parts(report, sampled), "named": decode is not None})


def decoder_of(tokenizer: Any) -> Decode:
    """Return token id -> its text, as it reads behind another token.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def read(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    # those of SentencePiece leave out the first space of a text: alone, a token would lose its own
    before = tokenizer.encode("a", add_special_tokens=False)
    start = len(read(before))
    return lambda token: read([*before, token])[start:]


def advantage_parts(report: TokenReport, sampled: SampledAdvantages) -> dict[str, Any]:
    """Return what both pages show of the advantages."""
    summary = sampled.summary
    charts = advantage_charts(report, sampled) if summary else []
    return {"report": report, "summary": summary, "levels": LEVELS, "tail": TAIL, "charts": charts}


def advantage_charts(report: TokenReport, sampled: SampledAdvantages) -> list[Chart]:
    """Return the advantages by size, by position, and by round of sampling if there are several; of one token at least."""
    charts = [
        histogram("Advantages", "nats, clipped", np.clip(sampled.gap, -report.clip, report.clip), report.clip),
        curves("By position in the response", {"all": (sampled.place, sampled.gap)}, report.bins, band=True),
    ]
    inside = {number: sampled.rounds[sampled.segments] == number for number in np.unique(sampled.rounds).tolist()}
    if len(inside) > 1:
        rounds = {f"round {number}": (sampled.place[on_M], sampled.gap[on_M]) for number, on_M in inside.items()}
        charts.append(curves("By round of sampling", rounds, report.bins, band=False))
    return charts


def _facts(store: LogprobReader, report: TokenReport, sampled: int) -> list[tuple[str, str]]:
    facts = [
        ("store", named(store)),
        ("policy", str(store.manifest.policy)),
        ("rollouts", f"{len(store):,}, {sampled:,} of them in the charts"),
    ]
    for name, column in _named(report).items():
        made = store.columns.get(column)
        by = "what the policies reported while they sampled" if made is None else f"{made.model} in {made.model.dtype} by {made.engine}"
        facts.append((name, f"column {column}: {by}"))
    return facts


def show_rollout(record: ScoredRollout, report: TokenReport, decode: Decode | None, note: str = "") -> dict[str, Any]:
    """Return what the template `parts.html` shows of a rollout; ids in place of text without `decode`."""
    decode = decode or str
    rollout, gap_T = record.rollout, record.scores[report.teacher].astype(np.float64) - record.scores[report.student]
    columns = {name: record.scores[column] for name, column in _named(report).items()}
    tokens, size_T = [], np.where(rollout.loss_mask, np.abs(gap_T), -1.0)
    for t, left_out in _shown(len(gap_T), report.tokens, int(size_T.argmax())):
        token, on = int(rollout.response_ids[t]), bool(rollout.loss_mask[t])
        text = decode(token)
        strength = min(abs(gap_T[t]) / report.clip, 1.0) ** 0.5 if on else 0.0  # the root: a tenth of the clip can still be seen
        facts = {"position": str(t), "id": str(token), **{name: f"{column[t]:.4f}" for name, column in columns.items()}}
        side = "up" if gap_T[t] > 0 else "down"
        made = {"text": visible(text), "newline": "\n" in text, "side": side, "strength": f"{strength:.3f}", "on": on, "left_out": left_out}
        tokens.append({**made, "facts": facts, "advantage": f"{gap_T[t]:+.4f}"})
    counted = gap_T[rollout.loss_mask]
    mean = f"{counted.mean():+.3f}" if counted.size else "none counted"
    prompt = [
        (visible(text := decode(int(rollout.prompt_ids[t]))), "\n" in text, left_out)
        for t, left_out in _shown(rollout.prompt_ids.size, report.tokens, 0)
    ]
    return {
        "id": visible(rollout.rollout_id),
        "prompt": prompt,
        "tokens": tokens,
        "length": len(gap_T),
        "mean": mean,
        "finish": rollout.finish_reason,
        "round": rollout.generation,
        "note": note,
    }


def _shown(size: int, most: int, peak: int) -> Iterator[tuple[int, int]]:
    """Yield the places of so many that are shown, each with how many before it are left out: where there are more than `most`, a third each of the
    first, those around the peak and the last.
    """
    third, end = most // 3, 0
    middle = min(max(peak - third // 2, third), size - 2 * third)
    runs = (range(third), range(middle, middle + third), range(size - third, size)) if size > most else (range(size),)
    for place in chain(*runs):
        yield place, place - end
        end = place + 1


def _named(report: TokenReport) -> dict[str, str]:
    named = {"teacher": report.teacher, "student": report.student, "ref": report.ref}
    return {name: column for name, column in named.items() if column is not None}


def visible(text: str) -> str:
    r"""Return text in which white space, control and direction marks, and halves of surrogate pairs can be seen.

    >>> visible(" a\n\u202e")
    '·a↵\\u202e'
    """
    return "".join(_SPACES.get(c) or printable(c) for c in text) or "∅"


_SPACES = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
