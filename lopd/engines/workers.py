"""What a pool asks of its workers, and what they ask of it."""

from collections.abc import Callable, Sequence
from random import random
from typing import Any, Generic, Protocol, TypeVar, final

from attrs import frozen

from lopd.errors import EngineError, LopdError

T = TypeVar("T")


def backoff(attempt: int) -> float:
    """Return seconds to wait after this many failures before the last one."""
    return min(0.25 * 2.0 ** min(attempt, 10), 15.0) + 0.25 * random()  # noqa: S311


class Down(Exception):  # noqa: N818  # never leaves the engine: at most its `error` does
    """A worker that failed for a reason of its own: another may do what it was to do.

    Args:
        what: happened, for the log.
        error: ends the call if no other worker and no attempt is left.
        pause: seconds for which the worker asks to be left alone.
        busy: whether it works, and takes what it is asked for later.
        final: whether a worker that does not start would fail again in the same way, so that it is given up at once.
    """

    def __init__(self, what: str, error: LopdError, pause: float = 0.0, *, busy: bool = False, final: bool = False) -> None:
        super().__init__(what)
        self.error, self.pause, self.busy, self.final = error, pause, busy, final


@final
@frozen(eq=False)
class Request(Generic[T]):
    """What one worker is asked for at a time.

    Args:
        owner: how an error names it.
        body: what the worker is given.
        read: makes results of the worker's answer; its errors end the call.
        parts: the same, one by one or in halves of halves, to be asked for if they cannot be had together: an error then names the one at fault.
        divides: whether this error is a reason to ask for them.
    """

    owner: str
    body: Any
    read: Callable[[Any], Sequence[T]]
    parts: "Sequence[Request[T]]" = ()
    divides: Callable[[LopdError], bool] = lambda _: True


class Worker(Protocol):
    """One of several that are alike.  What `start` and `work` raise other than `Down` ends the call."""

    @property
    def name(self) -> str:
        """How the log names it."""
        ...

    def start(self) -> Any:
        """Bring it up, or up again, and return what its engine is; all workers must return the same."""
        ...

    def unlike(self, identity: Any, expected: Any, whose: str) -> EngineError:
        """Return the error of a worker whose engine is another than that of `whose`."""
        ...

    def work(self, request: Request[T], /) -> Sequence[T]:
        """Return the results of one request."""
        ...

    def stop(self) -> None:
        """End it, and what it is doing; called again, do nothing."""
        ...
