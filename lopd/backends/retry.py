"""How a store repeats what failed for a reason that passes."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from lopd.errors import printable
from lopd.records.waiting import QUIET_S

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
#: Processes that seed `random` alike would wait alike, and draw other numbers themselves after a pause.
_RANDOM = random.SystemRandom()


def repeat(
    work: Callable[[], T], passes: Callable[[Exception], bool], *, seconds: float, times: int | None = None, pause: float, longest: float
) -> T:
    """Call `work` until it succeeds, or fails for a reason that does not pass; gives what it gave.

    Args:
        work: what is done; safe to repeat.
        passes: whether an error is worth another call.
        seconds: an error that comes later than this after the first call is raised.
        times: cap on repetitions; None for no cap.
        pause: seconds before the first repetition, doubled for each further one; a random part of it is waited, which spreads writers that
            were refused at the same moment.
        longest: cap on the pause, seconds.
    """
    began, failures, silent = time.monotonic(), 0, True
    while True:
        try:
            return work()
        except Exception as error:
            elapsed = time.monotonic() - began
            if not passes(error) or elapsed > seconds or failures == times:
                raise
            if silent and elapsed > QUIET_S:
                silent = False
                _LOG.warning("Storage: trying again, for up to %.0f s: %s", seconds, printable(str(error)))
        time.sleep(min(pause * 2**failures, longest) * _RANDOM.random())
        failures += 1
