"""What is known of a run before its first step, as rows of text: what the doctor and the run report show."""

from typing import Any

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.guards.start import CLIP, OVERLAPS, SIZE_LEVELS, StartReport, measure_start
from lopd.protocols import LogprobReader
from lopd.records.drift import TAIL
from lopd.records.estimates import Estimate


def find_start(store: LogprobReader, **options: Any) -> StartReport | str:
    """Return what `measure_start` finds, or why it finds nothing."""
    try:
        return measure_start(store, **options)
    except (InvalidRecordError, MissingScoresError) as error:
        return str(error)


def start_rows(start: StartReport) -> list[tuple[str, str]]:
    """Return name and value of each number, the verdict first; what could not be measured is stated, with what it needs."""
    quantiles = ", ".join(f"{level:.1%} {size:.3g}" for level, size in zip(SIZE_LEVELS, start.sizes, strict=True))
    outside = None
    if start.outside is not None:
        least, most = start.outside
        outside = f"{least.mean:.4f} to {most.mean:.4f} (95 %: {least.low:.4f} to {most.high:.4f})"
    return [
        ("verdict", f"{start.verdict}: {start.reason}"),
        (
            "rollouts that were read",
            f"{start.rollouts:,} of {start.available:,}, evenly spaced; {start.tokens:,} response tokens that count",
        ),
        ("reverse KL as the sampled tokens estimate it, nats a token", _or_missing(start, "reverse_kl", start.reverse_kl, also=True)),
        ("reverse KL of the buckets that both know, a lower bound", _or_missing(start, "bucket_kl", start.bucket_kl)),
        *((f"overlap@{k}", _or_missing(start, "overlap", start.overlap.get(k))) for k in OVERLAPS),
        ("student's mass outside the teacher's support", _or_missing(start, "outside", outside)),
        ("sampled tokens outside it", _or_missing(start, "sampled_outside", start.sampled_outside)),
        ("size of the advantage, quantiles, nats", quantiles),
        (f"beyond {-TAIL:g} nats, and beyond {CLIP:g}", f"{start.beyond_tail:.3%}, {start.beyond_clip:.3%}"),
        ("share of all size in 1 % of the tokens", f"{start.heaviest:.1%}"),
        ("floored tokens", f"{start.floored:,}"),
    ]


def _or_missing(start: StartReport, name: str, shown: Estimate | str | None, *, also: bool = False) -> str:
    why = start.missing.get(name, "")
    if shown is None:
        return f"not measured: {why}"
    return f"{shown}; {why}" if also and why else str(shown)
