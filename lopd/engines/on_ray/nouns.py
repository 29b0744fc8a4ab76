"""Engines on the machines of a Ray cluster: a RolloutSource and a TeacherScorer that have several workers, each with an engine of its own.

    with closing(RayScorer(lambda: VLLMScorer.from_folder("teacher"), workers=16, options={"num_gpus": 1})) as scorer:
        score_rollouts(store, scorer, rollouts_per_batch=4096, batches_at_once=2)

The verbs stay what they are: one process commits, in order, so any store will do, and what was killed is resumed by running it again.
A batch is dealt to the workers in equal parts.  Give batches that are as many times what one engine holds at once as there are workers, and
`batches_at_once=2`: workers then go on with the next batch while the slowest finishes this one, and no further, so results do not pile up.

A worker that dies is replaced, and its part goes to the next that is free; rollouts do not depend on who makes them, so the store is the same.
`ray.init` is yours; without it Ray starts on this machine alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

from attrs import define, field

from lopd.engines.on_ray.workers import Job, Workers
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records.checks import check_at_least, check_number
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import Prompt, Rollout, Scores


def _manifest(source: RolloutSource) -> Manifest:
    return source.manifest


def _provenance(scorer: TeacherScorer) -> Provenance:
    return scorer.provenance


def _sample(source: RolloutSource, prompts: Sequence[Prompt]) -> Sequence[Rollout]:
    return source.sample(prompts)


def _score(scorer: TeacherScorer, rollouts: Sequence[Rollout]) -> Sequence[Scores]:
    return scorer.score(rollouts)


@final
@define(eq=False, slots=False)
class RaySource:
    """Samples with the engines of several workers; `contextlib.closing` gives the machines back.

    Args:
        make: gives the source of one worker, in the worker's process; Ray sends it there, with what it refers to.
        workers: how many; each has an engine.
        options: Ray's options of each worker's actor, {"num_gpus": 1} say: a worker that asks for no GPU does not see any.
        attempts: how many workers may die over the same prompts before the call fails.
        patience_s: how long a worker may take to start and load its engine.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    make: Callable[[], RolloutSource]
    workers: int = 2
    options: Mapping[str, Any] = field(factory=dict)
    attempts: int = 3
    patience_s: float = 1800.0

    def __attrs_post_init__(self) -> None:
        _check("RaySource", self.workers, self.attempts, self.patience_s)

    @cached_property
    def _workers(self) -> Workers:
        job = Job("RaySource", self.make, _manifest, _sample, self.attempts, self.patience_s)
        return Workers(job, self.workers, self.options)

    @property
    def manifest(self) -> Manifest:
        """What a store of these rollouts must say; all workers say the same.  The first call starts them.

        Raises:
            EngineError: they do not agree, or one did not start.
        """
        manifest: Manifest = self._workers.identity
        return manifest

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """`samples_per_prompt` rollouts for each prompt, in their order; may be called from several threads.

        Raises:
            EngineError: no worker is left, or `attempts` of them died over the same prompts.
            LopdError: whatever an engine raised; the first, when all have come to an end.
        """
        return self._workers.spread(prompts, self.manifest.sampling.samples_per_prompt)

    def close(self) -> None:
        """End the workers; a later call starts them again."""
        _close(self)


@final
@define(eq=False, slots=False)
class RayScorer:
    """Reads rollouts with the engines of several workers; `contextlib.closing` gives the machines back.

    Args:
        make: gives the scorer of one worker, in the worker's process; Ray sends it there, with what it refers to.
        workers, options, attempts, patience_s: as those of `RaySource`.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    make: Callable[[], TeacherScorer]
    workers: int = 2
    options: Mapping[str, Any] = field(factory=dict)
    attempts: int = 3
    patience_s: float = 1800.0

    def __attrs_post_init__(self) -> None:
        _check("RayScorer", self.workers, self.attempts, self.patience_s)

    @cached_property
    def _workers(self) -> Workers:
        job = Job("RayScorer", self.make, _provenance, _score, self.attempts, self.patience_s)
        return Workers(job, self.workers, self.options)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are; all workers say the same.  The first call starts them.

        Raises:
            EngineError: they do not agree, or one did not start.
        """
        provenance: Provenance = self._workers.identity
        return provenance

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """(T_i,) log-probs, nats, of each rollout's response tokens, in the order given; may be called from several threads.

        Raises:
            EngineError: no worker is left, or `attempts` of them died over the same rollouts.
            LopdError: whatever an engine raised; the first, when all have come to an end.
        """
        return self._workers.spread(rollouts, 1)

    def close(self) -> None:
        """End the workers; a later call starts them again."""
        _close(self)


def _check(owner: str, workers: int, attempts: int, patience_s: float) -> None:
    check_at_least(owner, "workers", workers, 1)
    check_at_least(owner, "attempts", attempts, 1)
    check_number(owner, "patience_s", patience_s, patience_s > 0, "more than 0")


def _close(engines: RaySource | RayScorer) -> None:
    workers: Workers | None = engines.__dict__.pop("_workers", None)
    if workers is not None:
        workers.close()
