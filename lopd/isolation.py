"""One bad row must not stop a month of work: finding the rows that an engine refuses, and going on with the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, ScorerError
from lopd.protocols import TeacherScorer
from lopd.types import Rollout, Scores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def isolate(call: Callable[[Sequence[_Item]], Sequence[_Result]], items: Sequence[_Item]) -> tuple[list[_Result], list[tuple[_Item, str]]]:
    """What `call` gives for all items but those that it refuses, in order, and why it refuses those.

    A refused call is tried again in halves, down to the items that are refused alone.  Our engines check all items before they compute
    anything, so looking for the bad ones costs little.  Only errors about an item count; an engine that fails, fails.
    """
    try:
        return list(call(items)), []
    except (ContextOverflowError, InvalidRecordError) as error:
        if len(items) == 1:
            return [], [(items[0], str(error))]
    middle = len(items) // 2
    (left, refused), (right, more) = isolate(call, items[:middle]), isolate(call, items[middle:])
    return [*left, *right], [*refused, *more]


def score_each(scorer: TeacherScorer, rollouts: Sequence[Rollout]) -> tuple[list[Scores], dict[str, str]]:
    """Scores of the rollouts that are not refused, in order, and why the others are, by id.

    Raises:
        ScorerError: the scorer gave scores of other rollouts than it was asked for.
    """
    scores, refused = isolate(scorer.score, rollouts) if rollouts else ([], [])
    reasons = {rollout.rollout_id: reason for rollout, reason in refused}
    wanted, got = [r.rollout_id for r in rollouts if r.rollout_id not in reasons], [s.rollout_id for s in scores]
    if wanted != got:
        lost = next((name for name in wanted if name not in got), wanted[0] if wanted else got[0])
        raise ScorerError(
            f"Rollout {lost!r}: the scorer gave {len(got)} scores for {len(wanted)} rollouts, expected one for each, in order; fix the scorer."
        )
    return scores, reasons


def check_few(owner: str, refused: Mapping[str, str], *, most: int, accepted: int) -> None:
    """Stop when so many rows are refused that it must be the engine: more than `most`, or all so far.

    Raises:
        EngineError: it gives the first reason.
    """
    if len(refused) > most or (refused and not accepted):
        first, reason = next(iter(refused.items()))
        raise EngineError(
            f"{owner}: it refused {len(refused)} rows and accepted {accepted}, expected at least one accepted and at most {most} refused; the "
            f"first is {first!r} ({reason}); set right what is wrong with them all, or allow more."
        )
