"""Fetching ahead of what is decoded."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from lopd.backends.files import T

_FETCHES = 2


def in_advance(calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Yield what each call gives, in order; while one answer is used, the next few are fetched."""
    if len(calls) < 2:
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(_FETCHES) as pool:
        left = iter(calls)
        running = deque(pool.submit(call) for call in islice(left, _FETCHES))
        while running:
            found = running.popleft().result()
            running.extend(pool.submit(call) for call in islice(left, 1))
            yield found
