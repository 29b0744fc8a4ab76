"""A message during a long wait, and calls whose waits overlap."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Thread, Timer
from typing import Any, TypeVar

from lopd.errors import printable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_LOG = logging.getLogger("lopd")
#: Seconds of silence.
QUIET_S = 10.0
_OWN: ContextVar[Future[Any]] = ContextVar("_OWN")


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


def own_call() -> Future[Any]:
    """Return the call of `overlapped` that this thread does, which is cancelled when the loop is left; elsewhere one that never is."""
    return _OWN.get(Future())


def overlapped(
    call: Callable[[_Item], _Result], items: Iterable[_Item], at_once: int, *, leave: bool = False
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item and what `call` makes of it, in order; up to `at_once` calls are under way, in threads.

    The calls that follow a slow one go on, so an engine of several workers is not idle while its slowest finishes.
    Items are asked for one by one as calls come to an end, in the caller's thread: what is read for them does not pile up.
    The first error ends it when the calls under way have ended; with `at_once` 1 there are no threads.

    Args:
        call: what takes long in it may look at `own_call`.
        items: one for each call.
        at_once: calls under way.
        leave: an interrupt, and a loop that is left, do not wait for the calls under way; what they give is dropped.  The end of the program does:
            what a call holds, such as a sandbox, is given back.
    """
    if at_once == 1:
        yield from ((item, call(item)) for item in items)
        return
    calls = deque[tuple[_Item, Future[_Result], Thread]]()
    try:
        for item in items:
            future = Future[_Result]()
            thread = Thread(target=_do, args=(future, call, item), name="lopd-overlap")
            thread.start()
            calls.append((item, future, thread))
            if len(calls) == at_once:
                yield calls[0][0], calls[0][1].result()
                calls.popleft()
        for last, future, _ in calls:
            yield last, future.result()
    finally:
        for _, future, _ in calls:
            future.cancel()
        if not leave or isinstance(sys.exception(), Exception):
            for _, _, thread in calls:
                thread.join()


def _do(future: Future[_Result], call: Callable[[_Item], _Result], item: _Item) -> None:
    _OWN.set(future)
    with suppress(InvalidStateError):  # it was cancelled
        try:
            result = call(item)
        except BaseException as error:  # it is the caller's
            future.set_exception(error)
        else:
            future.set_result(result)
