"""Several calls of an engine at the same time, and their results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def overlapped(call: Callable[[_Item], _Result], items: Iterable[_Item], at_once: int) -> Iterator[tuple[_Item, _Result]]:
    """Each item and what `call` makes of it, in order; up to `at_once` calls are under way, in threads.

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
