"""One bad row must not stop a month of work: finding the rows that an engine refuses, and going on with the others."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, ScorerError
from lopd.protocols import TeacherScorer
from lopd.records.rollouts import Rollout, Scores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def isolate(
    owner: str, call: Callable[[Sequence[_Item]], Sequence[_Result]], items: Sequence[_Item], most: int
) -> tuple[list[_Result], list[tuple[_Item, str]]]:
    """What `call` gives for all items but those that it refuses, in order, and why it refuses those.

    A refused call is tried again in halves, down to the items that are refused alone.  What our engines check before they compute (lengths,
    ids) is found at once; a NaN costs the halves that hold it again.

    Args:
        owner: how messages name the engine.
        call: raises ContextOverflowError or InvalidRecordError if it refuses an item; any other error goes through.
        items: for one call.
        most: refused items that may be.

    Raises:
        EngineError: more than `most` are refused; it gives the first reason.
    """
    results: list[_Result] = []
    refused: list[tuple[_Item, str]] = []
    waiting = [items] if items else []
    while waiting:
        part = waiting.pop()
        try:
            results += call(part)
        except (ContextOverflowError, InvalidRecordError) as error:
            middle = len(part) // 2
            if middle:
                waiting += [part[middle:], part[:middle]]
                continue
            refused.append((part[0], str(error)))
            check_refused(owner, [reason for _, reason in refused], most)
    return results, refused


def check_refused(owner: str, reasons: Sequence[str], most: int) -> None:
    """Refuse to go on where so much is refused that it must be the engine.

    Raises:
        EngineError: there are more than `most` reasons.
    """
    if len(reasons) > most:
        raise EngineError(
            f"{owner}: it refused {len(reasons)} rows, expected at most {most} (`max_refused`); the first reason is {reasons[0]!r}; set right what "
            "is wrong with them all, or allow more."
        )


def score_each(scorer: TeacherScorer, rollouts: Sequence[Rollout], most: int) -> tuple[list[Scores], dict[str, str]]:
    """Scores of the rollouts that are not refused, in order, and why the others are, by id.

    Raises:
        EngineError: more than `most` are refused.
        ScorerError: the scorer gave scores of other rollouts than it was asked for.
    """
    scores, refused = isolate(f"Scorer {scorer.provenance.model}", scorer.score, rollouts, most)
    reasons = {rollout.rollout_id: reason for rollout, reason in refused}
    wanted, got = [r.rollout_id for r in rollouts if r.rollout_id not in reasons], [s.rollout_id for s in scores]
    if wanted != got:
        lost = next((name for name in wanted if name not in got), wanted[0] if wanted else got[0])
        raise ScorerError(
            f"Rollout {lost!r}: the scorer gave {len(got)} scores for {len(wanted)} rollouts, expected one for each, in order; fix the scorer."
        )
    return scores, reasons
