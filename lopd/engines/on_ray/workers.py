"""Workers of a Ray cluster that hold one engine each, and are replaced when they die.

It is not Ray that tries again: a worker that cannot be placed any more (its machine is gone) would keep its part of a batch from the others, who
could make it.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from attrs import frozen

from lopd.errors import EngineError, MissingDependencyError

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:
    raise MissingDependencyError(
        f"Ray workers: {error.name} is not installed, expected it for engines on several machines; pip install 'lopd[ray]'."
    ) from error

_GOODBYE_S = 30.0


@frozen(eq=False)
class Job:
    """What workers do.

    Args:
        owner: how messages name them.
        make: gives an engine.
        identify: engine -> what it is; all must be the same.
        work: engine, items -> their results.
        attempts: how many workers may die over the same items.
        patience_s: how long a worker may take to start.
    """

    owner: str
    make: Callable[[], Any]
    identify: Callable[[Any], Any]
    work: Callable[[Any, Sequence[Any]], Sequence[Any]]
    attempts: int
    patience_s: float


class _Worker:
    """Lives in a process of its own, and holds one engine."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def start(self) -> Any:
        """Make the engine, and say what it is."""
        self._engine = self._job.make()
        return self._job.identify(self._engine)

    def work(self, items: Sequence[Any]) -> list[Any]:
        """The engine's answer."""
        return list(self._job.work(self._engine, items))

    def stop(self) -> None:
        """Let the engine end what it has started, processes of its own say."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()


class Workers:
    """Workers whose engines are alike."""

    def __init__(self, job: Job, count: int, options: Mapping[str, Any]) -> None:
        self._job, self._count, self._living, self._closed, self._lock = job, count, count, False, threading.Lock()
        self._actor: Any = ray.remote(_Worker).options(**options, max_restarts=0, max_task_retries=0)
        # workers that are free, and the reasons of those that could not be replaced
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # a thread for each call that is under way; more would only wait
        self._threads = ThreadPoolExecutor(count, "lopd-ray")
        self._workers = {worker: worker.start.remote() for worker in [self._actor.remote(job) for _ in range(count)]}
        try:
            self.identity = self._wait_for_all()
        except BaseException:
            self.close()
            raise

    def _wait_for_all(self) -> Any:
        late = ray.wait(list(self._workers.values()), num_returns=self._count, timeout=self._job.patience_s)[1]
        if late:
            raise EngineError(
                f"{self._job.owner}: {len(late)} of {self._count} workers did not start within {self._job.patience_s:g} s, expected all; the cluster "
                f"has {ray.available_resources()} left to give: ask for fewer workers or other `options`, or wait for longer (`patience_s`)."
            )
        try:
            found = [_result(started) for started in self._workers.values()]
        except RayActorError as error:
            raise EngineError(
                f"{self._job.owner}: a worker died while it started ({str(error).strip().splitlines()[-1].strip()}), expected all {self._count} to "
                "live; look whether memory is enough for all that share a machine, and whether `make` can be imported there."
            ) from error
        for identity in found:
            self._check_alike(identity, found[0])
        for worker in self._workers:
            self._free.put(worker)
        return found[0]

    def _check_alike(self, identity: Any, expected: Any) -> None:
        if identity != expected:
            raise EngineError(
                f"{self._job.owner}: a worker's engine is {identity}, expected {expected} as another's is; give all of them the same weights and "
                "settings."
            )

    def spread(self, items: Sequence[Any], results_per_item: int) -> list[Any]:
        """What the engines make of the items, in order.

        Parts are dealt like cards: of a batch that is sorted by length, all are alike.
        """
        parts = [range(first, len(items), self._count) for first in range(min(self._count, len(items)))]
        calls = [self._threads.submit(self._call, [items[i] for i in part], results_per_item) for part in parts]
        # all must have ended before an error is raised, or who tries again would find the workers busy
        errors = [error for call in calls if (error := call.exception()) is not None]
        if errors:
            raise errors[0]
        made = [iter(call.result()) for call in calls]
        return [next(made[i % self._count]) for i in range(len(items)) for _ in range(results_per_item)]

    def _call(self, items: Sequence[Any], results_per_item: int) -> Sequence[Any]:
        """By any worker that is free; by another if it dies."""
        died: BaseException | None = None
        for _ in range(self._job.attempts):
            worker = self._take()
            try:
                results = _result(worker.work.remote(items))
            except RayActorError as error:
                died = error
                self._replace(worker)
                continue
            except BaseException:
                self._free.put(worker)
                raise
            self._free.put(worker)
            if len(results) != results_per_item * len(items):
                raise EngineError(
                    f"{self._job.owner}: an engine gave {len(results)} results for {len(items)} items, expected {results_per_item} for each; fix it."
                )
            return cast("Sequence[Any]", results)
        raise EngineError(
            f"{self._job.owner}: {self._job.attempts} workers died over the same {len(items)} items, expected one to get through; see Ray's logs, "
            "and give fewer at a time if memory was short."
        ) from died

    def _take(self) -> Any:
        while True:
            found = self._free.get()
            if self._closed:
                self._free.put(found)  # for those who wait beside this one, here and below
                raise EngineError(f"{self._job.owner}: it was closed during a call, expected to be closed after it; call again to resume.")
            if not isinstance(found, BaseException):
                return found
            with self._lock:
                self._living -= 1
                left = self._living
            if left <= 0:
                self._free.put(found)
                raise EngineError(
                    f"{self._job.owner}: all {self._count} workers died and none could be started again, expected one to be left; see Ray's logs, "
                    "and call again to resume."
                ) from found

    def _replace(self, dead: Any) -> None:
        """Start another, who is free as soon as it has an engine."""
        if self._closed:
            return
        del self._workers[dead]
        ray.kill(dead)  # it may be that only its network is down
        worker = self._actor.remote(self._job)
        self._workers[worker] = started = worker.start.remote()

        def begin(future: Future[Any]) -> None:
            try:
                self._check_alike(future.result(), self.identity)
            except BaseException as error:  # whoever waits for a worker has to hear of it
                self._free.put(error)
            else:
                self._free.put(worker)

        started.future().add_done_callback(begin)

    def close(self) -> None:
        """End all workers, and the calls that are under way."""
        self._closed = True
        self._free.put(None)
        self._threads.shutdown(wait=False, cancel_futures=True)
        if ray.is_initialized():
            workers = dict(self._workers)  # a call that sees its worker die changes them
            begun = [worker for worker, started in workers.items() if ray.wait([started], timeout=0)[0]]
            if begun:
                ray.wait([worker.stop.remote() for worker in begun], num_returns=len(begun), timeout=_GOODBYE_S)
            for worker in workers:
                ray.kill(worker)


def _result(reference: Any) -> Any:
    """What a worker gave, or the error that it met, as its engine raised it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
