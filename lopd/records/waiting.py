"""A message during a long wait, and calls whose waits overlap."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Timer
from typing import TypeVar

from lopd.errors import printable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_LOG = logging.getLogger("lopd")
#: Seconds of silence.
QUIET_S = 10.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Log a warning, once, if the block is not over after `QUIET_S` seconds.

    Args:
        what: is waited for, as a sentence without its full stop.
    """
    timer = Timer(QUIET_S, _LOG.warning, ["%s", printable(what)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def overlapped(call: Callable[[_Item], _Result], items: Iterable[_Item], at_once: int) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item and what `call` makes of it, in order; up to `at_once` calls are under way, in threads.

    The calls that follow a slow one go on, so an engine of several workers is not idle while its slowest finishes.
    Items are asked for one by one as calls come to an end, in the caller's thread: what is read for them does not pile up.
    The first error ends it when the calls under way have ended; with `at_once` 1 there are no threads.
    """
    if at_once == 1:
        yield from ((item, call(item)) for item in items)
        return
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    with ThreadPoolExecutor(at_once, "lopd-overlap") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(call, item)))
                if len(waiting) == at_once:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for last, future in waiting:
                yield last, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
