"""The arithmetic: tokens over rates, phase by phase.

Rates are those of one GPU and are best measured: the progress lines of a short run show them, and so does a store's history.  Sampling and scoring
are taken to spread over GPUs without loss, for no rollout waits for another (`benchmarks/results/scale.json` has how nearly on one machine).
Training spreads as far as a step has micro-batches.
"""

import math

from attrs import evolve, frozen

from lopd.records.checks import check_at_least, check_number, own_numbers, to_real
from lopd.tools.plan.work import Work

_HOUR = 3600.0
# float32 weights, gradients and both moments of AdamW; weights of an engine in bfloat16
_TRAINED_BYTES, _SERVED_BYTES = 16, 2


@frozen(kw_only=True)
class GpuRates:
    """Tokens a second of one GPU, and of one process that writes.

    Args:
        sampling: response tokens that the student samples, with a full batch.
        scoring: read tokens of the teacher, prompts included.
        training: read tokens of the student, prompts included.
        append: tokens that one process commits to a store; `benchmarks/results/bench_store.json` has several times as many.

    Raises:
        InvalidRecordError: one is not finite and more than 0.
    """

    sampling: float
    scoring: float
    training: float
    append: float = 2e6

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "GpuRates")
        for name in ("sampling", "scoring", "training", "append"):
            value = getattr(self, name)
            check_number("GpuRates", name, value, 0 < value < math.inf, "finite and more than 0 tokens a second")


@frozen
class Phase:
    """A part of the work.

    Args:
        name: rollouts, scores or training.
        tokens: response tokens of rollouts, read tokens of scores and training.
        gpus: GPUs that have something to do.
        wall_hours: from its beginning to its end.
        limit: the bottleneck resource.
    """

    name: str
    tokens: float
    gpus: int
    wall_hours: float
    limit: str

    @property
    def gpu_hours(self) -> float:
        """Hours of the GPUs that are held while it lasts."""
        return self.gpus * self.wall_hours


@frozen
class Bill:
    """What a method takes.

    Args:
        method: name of the method.
        phases: one after the other.
        store_bytes: bytes that are kept on disk.
        memory_gb: 10^9 bytes of weights, gradients and moments that GPUs hold at the same time, at most.
    """

    method: str
    phases: tuple[Phase, ...]
    store_bytes: int
    memory_gb: float

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all phases."""
        return sum(phase.gpu_hours for phase in self.phases)

    @property
    def wall_hours(self) -> float:
        """Hours of all phases."""
        return sum(phase.wall_hours for phase in self.phases)

    @property
    def bottleneck(self) -> Phase:
        """The phase that takes longest."""
        return max(self.phases, key=lambda phase: phase.wall_hours)


def lightning(work: Work, rates: GpuRates, gpus: int) -> Bill:
    """Return the cost to sample once, score once, and train on what is stored; one model at a time on all GPUs.

    Args:
        work: what is to be done.
        rates: tokens a second of one GPU.
        gpus: number of GPUs.
    """
    check_at_least("Bill", "gpus", gpus, 1)
    phases = (
        _spread("rollouts", work.rollouts * work.response_tokens, rates.sampling, rates, gpus),
        _spread("scores", work.tokens * work.reads, rates.scoring, rates, gpus),
        _training(work, rates, gpus),
    )
    return Bill("Lightning OPD", phases, work.stored.total, max(trained_gb(work), _SERVED_BYTES * work.teacher_billions))


def online(work: Work, rates: GpuRates, gpus: int, lockstep: float = 1.0) -> Bill:
    """Return the cost to sample, score and train in turn at every step, all GPUs taking part in each; student, its engine and teacher stay in memory.

    Args:
        work: what is to be done.
        rates: tokens a second of one GPU.
        gpus: number of GPUs, which are held until the end.
        lockstep: how many times slower sampling and scoring are when they come in portions of one step, the next waiting for the slowest
            response; 1 is the least that it can be, and what table 2 implies is `lockstep_of`.
    """
    check_at_least("Bill", "gpus", gpus, 1)
    lockstep = to_real("Bill", "lockstep", lockstep)
    check_number("Bill", "lockstep", lockstep, 1 <= lockstep < math.inf, "finite and at least 1")
    responses = work.trained * work.response_tokens
    texts = work.trained * (work.prompt_tokens + work.response_tokens)
    training = _training(work, rates, gpus)
    why = "GPUs, and the slowest response of each step"
    phases = (
        Phase("rollouts", responses, gpus, responses * lockstep / rates.sampling / gpus / _HOUR, why),
        Phase("scores", texts, gpus, texts * lockstep / rates.scoring / gpus / _HOUR, why),
        # GPUs that have nothing to train on are held all the same
        evolve(training, gpus=gpus),
    )
    memory = trained_gb(work) + _SERVED_BYTES * work.student_billions + _SERVED_BYTES * work.teacher_billions
    return Bill("online OPD", phases, 0, memory)


def _spread(name: str, tokens: float, rate: float, rates: GpuRates, gpus: int) -> Phase:
    computed, committed = tokens / rate / gpus / _HOUR, tokens / rates.append / _HOUR
    if committed > computed:
        return Phase(name, tokens, gpus, committed, "the process that commits: let several, each with its own prompts")
    return Phase(name, tokens, gpus, computed, "GPUs")


def _training(work: Work, rates: GpuRates, gpus: int) -> Phase:
    length = work.prompt_tokens + work.response_tokens
    tokens = work.trained * length
    # a rollout is not split, also where a micro-batch has fewer tokens than it
    useful = max(min(gpus, int(work.rollouts_per_step // max(work.tokens_per_batch / length, 1))), 1)
    limit = (
        "GPUs"
        if useful == gpus
        else f"{work.all_steps:,} steps one after the other, each with work for {useful} GPUs: more rollouts a step"
    )
    return Phase("training", tokens, useful, tokens / rates.training / useful / _HOUR, limit)


def trained_gb(work: Work) -> float:
    """Return the gigabytes of the student's weights, gradients and moments in float32."""
    return _TRAINED_BYTES * work.student_billions
