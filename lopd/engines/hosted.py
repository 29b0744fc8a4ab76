"""Engines in processes of their own, one in each: what the workers of one machine and those of a Ray cluster have in common.

A batch is dealt to the workers in equal parts.  Give batches that are as many times what one engine holds at once as there are workers, and
`batches_at_once=2`: workers then go on with the next batch while the slowest finishes this one, and no further, so results do not pile up.

A worker that dies, or whose engine fails, is replaced, and its part goes to the next that is free; rollouts do not depend on who makes them, so
the store is the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar, final

from attrs import define, field

from lopd.engines.inputs import in_order
from lopd.engines.pool import Pool
from lopd.engines.workers import Down, Request
from lopd.errors import ArgumentError, EngineError, InvalidRecordError
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records.checks import a_kind, check_number, name_of, own_numbers
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import Prompt, Rollout, Scores

T = TypeVar("T")
Engine = TypeVar("Engine", RolloutSource, TeacherScorer)
GOODBYE_S = 30.0


class DiedError(Exception):
    """The process of a worker is gone; it becomes an EngineError, or another process."""


class LateError(Exception):
    """A worker did not start in time; the message is what may help, as a clause."""


@final
class Host:
    """Lives in the process of a worker, and holds the engine that `make` gives."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._engine = make, None

    def start(self, identity: str) -> Any:
        """Make the engine, and return what it is: its property of this name."""
        self._engine = self._make()
        return getattr(self._engine, identity)

    def work(self, method: str, items: Sequence[Any]) -> list[Any]:
        """Return what this method of the engine answers."""
        return list(getattr(self._engine, method)(items))

    def stop(self) -> None:
        """Let the engine end what it has started, for example processes of its own."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()


class Process(Protocol):
    """Where a `Host` lives.

    `start` and `work` are those of the `Host`, and raise what its engine raises, or DiedError where the process is gone.
    """

    #: Where its output is.
    log: str

    def start(self, identity: str, patience_s: float, /) -> Any:
        """Begin a process, in place of one that was begun before.

        Raises:
            LateError: it took longer than `patience_s`.
        """
        ...

    def work(self, method: str, items: Sequence[Any], /) -> list[Any]:
        """Return the engine's answer."""
        ...

    def stop(self, *, idle: bool) -> None:
        """End the process: an idle one may end its engine first, a busy one is killed."""
        ...


@final
@define(eq=False)
class _Worker:
    """A worker of the pool, whose engine lives in a process."""

    engines: "Hosted[Any]"
    process: Process
    begun: bool = False
    idle: bool = False

    @property
    def name(self) -> str:
        return f"{self.engines._name}: a worker"

    def start(self) -> Any:
        self.idle = False
        try:
            identity = self._start()
        except Exception as error:
            if not self.begun:
                raise
            raise Down(
                f"it cannot be replaced ({error})",
                EngineError(
                    f"{self.engines._name}: all {self.engines.workers} workers failed, and none could be started again ({error}); "
                    f"see {self.process.log}, and call again to resume."
                ),
            ) from error
        self.begun = self.idle = True
        return identity

    def _start(self) -> Any:
        name, wanted, patience_s = self.engines._name, self.engines.workers, self.engines.patience_s
        try:
            return self.process.start(self.engines._identity, patience_s)
        except LateError as late:
            raise EngineError(
                f"{name}: a worker did not start within {patience_s:g} s, expected all {wanted}; {late}, or wait for longer (`patience_s`)."
            ) from None
        except DiedError as died:
            raise EngineError(
                f"{name}: a worker died while it started ({died}), expected all {wanted} to live; look whether memory is enough for all that share "
                "a machine, and whether `make` can be imported there."
            ) from died.__cause__

    def unlike(self, identity: Any, expected: Any, whose: str) -> EngineError:  # noqa: ARG002
        return EngineError(
            f"{self.engines._name}: a worker's engine is {identity}, expected {expected} as another's is; give all of them the same weights and "
            "settings."
        )

    def work(self, request: Request[T]) -> Sequence[T]:
        self.idle = False
        try:
            answer = self.process.work(self.engines._method, request.body)
        except DiedError as died:
            raise Down(
                f"it died ({died})",
                EngineError(
                    f"{self.engines._name}: {self.engines.attempts} workers died over {request.owner}; see {self.process.log}, and leave that "
                    "out, or give each worker more memory."
                ),
            ) from died
        except BaseException as error:
            self.idle = True  # it has answered, with an error
            if isinstance(error, EngineError):  # of the engine, and not of what it was asked
                raise Down(f"its engine failed ({error})", error) from error.__cause__
            raise
        self.idle = True
        return request.read(answer)

    def stop(self) -> None:
        self.process.stop(idle=self.idle)


@define(eq=False, slots=False)
class Hosted(ABC, Generic[Engine]):
    """What a source and a scorer in several processes have in common; `make`, `workers`, `attempts` and `patience_s` are documented there."""

    #: Names of the engine's property that identifies it, of its method, and of an item.
    _identity: ClassVar[str]
    _method: ClassVar[str]
    _item: ClassVar[str]

    make: Callable[[], Engine] = field(repr=name_of)  # what it passes may be a key
    workers: int = 2
    attempts: int = field(default=3, kw_only=True)
    patience_s: float = field(default=1800.0, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not callable(self.make):
            raise ArgumentError(
                f"{self._name}: make is {a_kind(self.make)}, expected a function without arguments that returns an engine; pass one."
            )
        own_numbers(self, self._name, workers=1, attempts=1)
        check_number(self._name, "patience_s", self.patience_s, self.patience_s > 0, "more than 0")

    def _check_make(self, dumps: Callable[[Any], bytes], remedy: str) -> None:
        try:
            dumps(self.make)
        except Exception as error:  # whatever the parts of `make` raise
            raise InvalidRecordError(f"{self._name}: make cannot be sent to another process ({error}); {remedy}.") from error

    @property
    def _name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def _process(self, place: int) -> Process:
        """Return where the engine of this worker lives."""

    @cached_property
    def _pool(self) -> Pool:
        workers = [_Worker(self, self._process(place)) for place in range(self.workers)]
        return Pool(self._name, workers, self.attempts)

    def _identify(self) -> Any:
        try:
            return self._pool.identify()
        except BaseException:
            self.close()
            raise

    def _spread(self, items: Sequence[Any], results_per_item: int) -> list[Any]:
        """Return what the engines make of the items.  Parts are dealt like cards: of a batch that is sorted by length, all are alike."""
        if not items:
            return []
        places = [range(first, len(items), self.workers) for first in range(min(self.workers, len(items)))]
        pool = self._pool
        try:
            made = pool.run([self._request([items[i] for i in part], results_per_item) for part in places])
        except BaseException:
            if pool.over:  # a later call starts the workers again
                self.close()
            raise
        return in_order([i for part in places for i in part], made, results_per_item)

    def _request(self, items: Sequence[Any], results_per_item: int) -> Request[Any]:
        def read(results: list[Any]) -> list[Any]:
            if len(results) != results_per_item * len(items):
                raise EngineError(
                    f"{self._name}: an engine gave {len(results)} results for {len(items)} items, expected {results_per_item} for each; fix it."
                )
            return results

        middle = len(items) // 2
        parts = [self._request(half, results_per_item) for half in (items[:middle], items[middle:])] if middle else []
        owner = f"the same {len(items)} {self._item}s" if middle else f"{self._item} {getattr(items[0], self._item + '_id')!r}"
        return Request(owner, items, read, parts, lambda error: isinstance(error.__cause__, DiedError))

    def close(self) -> None:
        """End the workers; a later call starts them again."""
        pool: Pool | None = vars(self).pop("_pool", None)
        if pool is not None:
            pool.close()


@define(eq=False, slots=False)
class HostedSource(Hosted[RolloutSource]):
    """A RolloutSource in several processes."""

    _identity, _method, _item = "manifest", "sample", "prompt"

    @property
    def manifest(self) -> Manifest:
        """The manifest of a store of these rollouts; the same for all workers.  The first call starts them.

        Raises:
            EngineError: they do not agree, or one did not start.
        """
        manifest: Manifest = self._identify()
        return manifest

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """Return `samples_per_prompt` rollouts for each prompt, in their order; may be called from several threads.

        Raises:
            EngineError: no worker is left, or `attempts` of them failed over the same prompts, or died over one, which it names.
            LopdError: whatever else an engine raised first.
        """
        return self._spread(prompts, self.manifest.sampling.samples_per_prompt)


@define(eq=False, slots=False)
class HostedScorer(Hosted[TeacherScorer]):
    """A TeacherScorer in several processes."""

    _identity, _method, _item = "provenance", "score", "rollout"

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are; the same for all workers.  The first call starts them.

        Raises:
            EngineError: they do not agree, or one did not start.
        """
        provenance: Provenance = self._identify()
        return provenance

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Return (T_i,) log-probs, nats, of each rollout's response tokens, in the order given; may be called from several threads.

        Raises:
            EngineError: no worker is left, or `attempts` of them failed over the same rollouts, or died over one, which it names.
            LopdError: whatever else an engine raised first.
        """
        return self._spread(rollouts, 1)
