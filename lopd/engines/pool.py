"""Like workers that share the items of a call: HTTP servers, processes of this machine, actors of a Ray cluster.

A worker that fails is started again, with growing pauses where it has time to recover, and what it had to do goes to another.
Workers block, so each item that is under way has a thread.  The threads are daemons: an interrupt does not wait for them,
and where a verb has several calls under way it ends each (`own_call`).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Condition, Thread
from time import monotonic
from typing import Any, Generic, final

from attrs import define, field

from lopd.engines.workers import Down, Request, T, Worker, backoff
from lopd.errors import EngineError, LopdError, printable
from lopd.records.waiting import QUIET_S, own_call

_LOG = logging.getLogger(__name__)
_FIRST_LOOK_S, _LAST_WAIT_S = 1.0, 1.0


@define(eq=False)
class _Place:
    """What the pool knows of a worker: requests under way, whether it was started at least once, is up, was given up, and why it is not up."""

    worker: Worker
    busy: int = 0
    tried: bool = False
    up: bool = False
    lost: bool = False
    why: str = "it has not answered yet"


@define(eq=False)
class _Call(Generic[T]):
    todo: Iterator[tuple[int, Request[T]]]
    results: dict[int, Sequence[T]] = field(factory=dict)
    error: BaseException | None = None
    over: bool = False


@final
class Pool:
    """Workers, from their start until `close`; `run` may be called from several threads.

    Args:
        owner: its name in messages.
        workers: that are alike.
        attempts: how many workers may fail over the same request.
        slots: requests at a time to each worker.
        patience_s: how long a worker that does not start is tried again; after that it is given up, and when all are, every call ends.
        expected: what the engines are, if that is known.
    """

    def __init__(
        self, owner: str, workers: Sequence[Worker], attempts: int, *, slots: int = 1, patience_s: float = 0.0, expected: Any = None
    ) -> None:
        self._owner, self._attempts, self._slots, self._patience_s = owner, attempts, slots, patience_s
        self._identity, self._whose = expected, "the others"
        self._places = [_Place(worker) for worker in workers]
        self._changed, self._closed = Condition(), False
        self._error: BaseException | None = None
        self._threads: list[Thread] = []
        for place in self._places:
            self._begin(self._bring_up, place, 0.0)

    def identify(self) -> Any:
        """Return what the engines are, as soon as each worker was tried and one is up.

        Raises:
            EngineError: they are not alike, or none started.
        """
        with self._changed:
            self._wait(lambda: self._all_tried() and self._identity is not None and any(place.up for place in self._places))
        return self._identity

    def run(self, requests: Sequence[Request[T]]) -> list[T]:
        """Return the results of the requests, in their order.  The first error ends the call; what is under way is left to its worker.

        Raises:
            EngineError: `attempts` workers failed over the same request, no worker is left, or the pool was closed.
        """
        call: _Call[T] = _Call(iter(enumerate(requests)))
        own_call().add_done_callback(lambda _: self._fail(call, InterruptedError()))
        with self._changed:  # a moment for all to start: else the first would get everything
            self._changed.wait_for(lambda: self._all_tried() or self.over, _FIRST_LOOK_S)
        for _ in range(min(self._slots * len(self._places), len(requests))):
            self._begin(self._serve, call)
        try:
            with self._changed:
                self._wait(lambda: call.error is not None or len(call.results) == len(requests))
        finally:
            with self._changed:
                call.over = True
                self._changed.notify_all()
        if call.error is not None:
            raise call.error
        return [result for i in range(len(requests)) for result in call.results[i]]

    @property
    def over(self) -> bool:
        """Whether it was closed, or an error has ended it for good."""
        return self._closed or self._error is not None

    def close(self) -> None:
        """Stop all workers, and end the calls that are under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with ThreadPoolExecutor(len(self._places)) as goodbyes:
            list(goodbyes.map(lambda place: place.worker.stop(), self._places))
        last = monotonic() + _LAST_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, last - monotonic()))

    # --- in the caller's thread

    def _wait(self, fits: Callable[[], bool]) -> None:
        ends = lambda: self.over or fits()  # noqa: E731
        if not self._changed.wait_for(ends, QUIET_S):
            self._say_what_it_waits_for()
            self._changed.wait_for(ends)
        if self._error is not None:
            raise self._error
        if self._closed:
            raise EngineError(f"{self._owner}: it was closed during a call; call again to resume.")

    def _say_what_it_waits_for(self) -> None:
        if not any(place.up for place in self._places):
            place = self._places[0]
            _LOG.warning("%s: waiting for %d to start; %s: %s", self._owner, len(self._places), place.worker.name, printable(place.why))

    def _all_tried(self) -> bool:
        return all(place.tried for place in self._places)

    def _begin(self, work: Callable[..., None], *args: Any) -> None:
        thread = Thread(target=work, args=args, name=f"lopd-{self._owner}", daemon=True)
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]
        thread.start()

    # --- in a thread that starts a worker

    def _bring_up(self, place: _Place, pause: float) -> None:
        """Start a worker, until it is up or has failed for too long."""
        self._sleep(min(pause, self._patience_s))
        began = monotonic()
        for attempt in count():
            try:
                self._start(place)
                break
            except Down as down:
                self._missed(place, down, lost=down.final or monotonic() - began >= self._patience_s)
                pause = max(backoff(attempt), min(down.pause, self._patience_s))
            except BaseException as error:  # whoever waits for a worker has to hear of it
                self._end(error)
                break
            if self.over or place.lost:
                break
            self._sleep(pause)
        if self._closed:  # while it started
            place.worker.stop()

    def _start(self, place: _Place) -> None:
        identity = place.worker.start()
        with self._changed:
            if self._identity is None:
                self._identity, self._whose = identity, place.worker.name
            if identity != self._identity:
                raise place.worker.unlike(identity, self._identity, self._whose)
            place.tried = place.up = True
            self._changed.notify_all()

    def _missed(self, place: _Place, down: Down, *, lost: bool) -> None:
        with self._changed:
            place.tried, place.lost, place.why = True, lost, str(down)
            self._changed.notify_all()
        if lost and not self._closed:
            _LOG.warning("%s is given up: %s", place.worker.name, printable(str(down)))
            if all(other.lost for other in self._places):
                down.error.__cause__ = down.__cause__
                self._end(down.error)

    def _end(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.over, seconds)

    # --- in a thread of a request

    def _serve(self, call: _Call[T]) -> None:
        """Do one request after the other, as long as there are any."""
        try:
            while True:
                with self._changed:
                    i, request = next(call.todo, (-1, None))
                if request is None:
                    return
                results = self._results(call, request)
                with self._changed:
                    call.results[i] = results
                    self._changed.notify_all()
        except BaseException as error:  # it is the caller's
            self._fail(call, error)

    def _fail(self, call: _Call[Any], error: BaseException) -> None:
        with self._changed:
            call.error, call.over = call.error or error, True
            self._changed.notify_all()

    def _results(self, call: _Call[T], request: Request[T]) -> Sequence[T]:
        """Return all results together or, if there is something wrong with one of them, those of each part."""
        try:
            return self._persist(call, request)
        except LopdError as error:
            if not request.parts or not request.divides(error):
                raise
            _LOG.warning("%s  It is tried in parts.", printable(str(error)))
        return [result for part in request.parts for result in self._results(call, part)]

    def _persist(self, call: _Call[T], request: Request[T]) -> Sequence[T]:
        """Ask whichever worker is free; ask another if that one fails.  That a worker is busy is not a failure until patience is over."""
        failed, began, missed = 0, monotonic(), list[_Place]()
        for attempt in count():
            # the last try is of a worker that has not failed: one that fails soon is free before the others are
            place = self._take(call, missed if failed == self._attempts - 1 else ())
            try:
                results = place.worker.work(request)
            except Down as down:
                missed.append(place)
                failed += not (down.busy and monotonic() - began < self._patience_s)
                if failed == self._attempts:
                    self._release(place, down)
                    raise down.error from down.__cause__
                if not self._release(place, down):
                    self._sleep(backoff(attempt))
            except BaseException:
                self._release(place)
                raise
            else:
                self._release(place)
                return results
        raise AssertionError

    def _take(self, call: _Call[Any], missed: Sequence[_Place]) -> _Place:
        """Return the least busy worker, as soon as one is up and has room; one of `missed` only while no other is up."""
        with self._changed:
            self._changed.wait_for(lambda: call.over or self.over or bool(self._free(missed)))
            if call.over or self.over:
                raise InterruptedError  # the results are not waited for any more
            place = min(self._free(missed), key=lambda place: place.busy)
            place.busy += 1
            return place

    def _free(self, missed: Sequence[_Place]) -> list[_Place]:
        up = [place for place in self._places if place.up]
        others = [place for place in up if place not in missed]
        return [place for place in others or up if place.busy < self._slots]

    def _release(self, place: _Place, down: Down | None = None) -> bool:
        """Say that a request is over; a worker that failed is started again.  Return whether any is up."""
        with self._changed:
            place.busy -= 1
            failed, place.up = down is not None and place.up and not self._closed, place.up and down is None
            self._changed.notify_all()
            left = any(other.up for other in self._places)
        if failed and down is not None:
            place.why = str(down)
            _LOG.warning("%s is left alone for now: %s", place.worker.name, printable(str(down)))
            self._begin(self._rest if down.busy else self._bring_up, place, down.pause)
        return left

    def _rest(self, place: _Place, pause: float) -> None:
        """Leave a busy worker alone, and use it again as it is."""
        self._sleep(min(max(pause, backoff(0)), self._patience_s))
        with self._changed:
            place.up = True
            self._changed.notify_all()
