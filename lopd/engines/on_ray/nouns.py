"""Engines on the machines of a Ray cluster: a RolloutSource and a TeacherScorer that have several workers, each with an engine of its own.

    with closing(RayScorer(lambda: VLLMScorer.from_folder("teacher"), workers=16, options={"num_gpus": 1})) as scorer:
        score_rollouts(store, scorer, rollouts_per_batch=4096, batches_at_once=2)

The verbs stay what they are: one process commits, in order, so any store will do, and what was killed is resumed by running it again.
`ray.init` is yours; without it Ray starts on this machine alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, final

import ray
from attrs import define, field
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from lopd.engines.hosted import GOODBYE_S, DiedError, Engine, Host, Hosted, HostedScorer, HostedSource, LateError
from lopd.errors import EngineError, InvalidRecordError
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records.paths import asked

_DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


@define(eq=False, slots=False)
class _OnRay(Hosted[Engine]):
    options: Mapping[str, Any] = field(factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._check_make(ray.cloudpickle.dumps, "make within it what cannot be pickled")

    def _process(self, place: int) -> "_Actor":  # noqa: ARG002
        return _Actor(self.make, self.options)


@final
@define(eq=False, slots=False)
class RaySource(HostedSource, _OnRay[RolloutSource]):
    """Samples with the engines of several workers; `contextlib.closing` gives the machines back.

    Args:
        make: gives the source of one worker, in the worker's process; Ray sends it there, with what it refers to.
        workers: how many; each has an engine.
        options: Ray's options of each worker's actor, for example {"num_gpus": 1}: a worker that asks for no GPU does not see any.
        attempts: how many workers may fail over the same prompts before the call does; those over which so many died are tried in halves first, so
            that the error names the one that kills.
        patience_s: how long a worker may take to start and load its engine.

    Raises:
        InvalidRecordError: a number makes no sense, or `make` cannot be pickled.
    """


@final
@define(eq=False, slots=False)
class RayScorer(HostedScorer, _OnRay[TeacherScorer]):
    """Reads rollouts with the engines of several workers; `contextlib.closing` gives the machines back.

    Args:
        make: gives the scorer of one worker, in the worker's process; Ray sends it there, with what it refers to.
        workers, options, attempts, patience_s: as those of `RaySource`.

    Raises:
        InvalidRecordError: a number makes no sense, or `make` cannot be pickled.
    """


@final
class _Actor:
    """An actor of Ray.

    It is not Ray that tries again: an actor that cannot be placed any more (its machine is gone) would keep its part of a batch from the others,
    who could make it.
    """

    log = "Ray's logs"

    def __init__(self, make: Callable[[], Any], options: Mapping[str, Any]) -> None:
        if not ray.is_initialized():
            ray.init()
        self._make, self._actor = make, None
        try:
            self._new: Any = asked(
                "",
                lambda: ray.remote(Host).options(**options, max_restarts=0, max_task_retries=0),
                secret="runtime_env" in options,  # Ray repeats its variables
            )
        except OSError as error:
            raise InvalidRecordError(f"Ray workers: Ray refuses options {sorted(options)} ({error}); pass those of an actor.") from error

    def start(self, identity: str, patience_s: float) -> Any:
        if not ray.is_initialized():  # Ray would start another cluster, on this machine alone
            raise EngineError(
                "Ray workers: Ray was shut down, expected the cluster that they were made for; make them again after `ray.init`."
            )
        self.stop(idle=False)  # it may be that only its network is down
        with _understood():
            self._actor = actor = self._new.remote(self._make)
            started = actor.start.remote(identity)
            if not ray.wait([started], timeout=patience_s)[0]:
                raise LateError(f"the cluster has {ray.available_resources()} left to give: ask for fewer workers or other `options`")
            return ray.get(started)

    def work(self, method: str, items: Sequence[Any]) -> list[Any]:
        actor: Any = self._actor
        with _understood():
            results: list[Any] = ray.get(actor.work.remote(method, items))
        return results

    def stop(self, *, idle: bool) -> None:
        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            with suppress(RayError):
                if idle:
                    ray.wait([actor.stop.remote()], timeout=GOODBYE_S)
                ray.kill(actor)


@contextmanager
def _understood() -> Iterator[None]:
    """Raise what an engine raised as it is, the death of an actor as that, and whatever else Ray raises in words of ours."""
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayError):
            raise cause from error
        # of an error that cannot be pickled Ray gives a text, which ends with the error
        words = str(cause).strip().rpartition("\n")[2].strip()
        if isinstance(cause, _DEATHS):
            raise DiedError(words) from error
        raise EngineError(f"Engine: {type(cause).__name__} ({words}); see {_Actor.log}.") from error
