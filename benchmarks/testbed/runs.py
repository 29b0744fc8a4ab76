"""The OPD stage on a testbed, offline and online: same prompts, samples, temperature, length, batch, rate, steps, loss and loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from attrs import define, evolve, field, frozen

from lopd import (
    CausalLMStudent,
    ConsistencyPolicy,
    MemoryStore,
    batches,
    collect_rollouts,
    evaluate,
    opd_steps,
    refresh_every,
    sample_round,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.protocols import OPDLoss, RolloutSource, TeacherScorer
from lopd.records import (
    Estimate,
    Lineage,
    Manifest,
    ModelId,
    Prompt,
    Provenance,
    Rollout,
    SamplingParams,
    Scores,
    StepMetrics,
    fingerprint_tokenizer,
    policy_column,
)
from testbed.models import TOKENS_PER_BATCH, Testbed, source_of
from testbed.task import verify

_Result = TypeVar("_Result")


@frozen
class Support:
    """What is kept of a response token beside its own log-probs.

    Args:
        candidates: tokens that the policy finds most likely.
        top_k: those that the teacher finds most likely, outside of the candidates.
        drawn: tokens that are drawn from the policy.
    """

    candidates: int = 0
    top_k: int = 0
    drawn: int = 0

    @property
    def width(self) -> int:
        """Of all together."""
        return self.candidates + self.top_k + self.drawn

    def sampling(self, plain: SamplingParams) -> SamplingParams:
        """Return the same sampling, with what the policy keeps."""
        return evolve(plain, candidates=self.candidates, drawn=self.drawn)

    def scorer(self, teacher: Path) -> HFScorer:
        """Return a teacher that scores the whole support."""
        return HFScorer.from_folder(teacher, candidates=self.candidates, top_k=self.top_k, drawn=self.drawn)

    def ref(self, generation: int = 0) -> str:
        """Return the reference column: the policy's own where it holds more than the rollouts do."""
        return policy_column(generation) if self.drawn else "behavior"


#: Nothing.
ALONE = Support()


@define
class Clock:
    """Where the CPU time of a run of one thread goes: sampling, scoring, and training, which is the rest.

    On a core of its own that thread takes as long; on a shared one the time of others is not counted.
    """

    seconds: dict[str, float] = field(factory=lambda: {"sampling": 0.0, "scoring": 0.0, "evaluation": 0.0})
    begun: float = field(factory=time.process_time)

    def run(self, name: str, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call, and count the time."""
        begun = time.process_time()
        try:
            return call(*arguments)
        finally:
            self.seconds[name] += time.process_time() - begun

    def total(self) -> float:
        """Return the seconds since the beginning, without evaluation."""
        return time.process_time() - self.begun - self.seconds["evaluation"]

    def split(self) -> dict[str, float]:
        """Return the seconds by what they were spent on, and of all together."""
        counted, total = {name: self.seconds[name] for name in ("sampling", "scoring")}, self.total()
        return {**counted, "training": total - sum(counted.values()), "all": total}


@frozen(eq=False)
class TimedSource:
    """A source whose sampling is counted."""

    source: RolloutSource
    clock: Clock

    @property
    def manifest(self) -> Manifest:
        """The source's."""
        return self.source.manifest

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """Sample from the source, on the clock."""
        return self.clock.run("sampling", self.source.sample, prompts)


@frozen(eq=False)
class TimedScorer:
    """A teacher whose scoring is counted."""

    scorer: TeacherScorer
    clock: Clock

    @property
    def provenance(self) -> Provenance:
        """The scorer's."""
        return self.scorer.provenance

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Score with the scorer, on the clock."""
        return self.clock.run("scoring", self.scorer.score, rollouts)


@frozen(eq=False)
class Training:
    """A student on its way."""

    student: CausalLMStudent
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    lineage: Lineage

    @classmethod
    def of(cls, folder: Path, lr: float) -> "Training":
        """Load this start, with an optimizer at a constant rate."""
        model, tokenizer = load_model(folder, torch.float32)
        student = CausalLMStudent(model, fingerprint_tokenizer(tokenizer))
        optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
        return cls(student, tokenizer, optimizer, Lineage.read(folder))

    def source(self, sampling: SamplingParams, *, identity: ModelId | None = None, generation: int = 0) -> HFSource:
        """Return the student as it is, as a source of rollouts."""
        model, known = self.student.model, {"identity": identity, "generation": generation, "rows_per_batch": 1024}
        return HFSource(model, self.tokenizer, sampling, self.lineage, **known)

    def accuracy(self, bed: Testbed, *, temperature: float = 1.0, samples: int = 4) -> Estimate:
        """Measure the accuracy on the held-out prompts."""
        sampling = bed.sampling(samples if temperature else 1, temperature)
        return evaluate(self.source(sampling), bed.held_out, verify).avg_at_n

    def measure(self, bed: Testbed, teacher: Path | None = None) -> dict[str, float]:
        """Measure a row's results on the held-out prompts: accuracy, sampled and greedy.

        Beside a teacher also the reverse KL to it on fresh responses, over the whole vocabulary, in nats a token.
        """
        found = {"accuracy": self.accuracy(bed).mean, "greedy": self.accuracy(bed, temperature=0.0).mean}
        if teacher is None:
            return found
        source = self.source(bed.sampling())
        kl = exact_reverse_kl(source, HFScorer.from_folder(teacher), source.sample(bed.held_out))
        return {**found, "kl": kl.per_token().mean}

    def start(self, bed: Testbed, teacher: Path) -> dict[str, float]:
        """Measure the same before the first step, under names of their own."""
        found = self.measure(bed, teacher)
        return {"start": found["accuracy"], "start_greedy": found["greedy"], "start_kl": found["kl"]}


def scored_rollouts(
    bed: Testbed, sft: str, opd: str, *, samples: int = 1, support: Support = ALONE, clock: Clock | None = None
) -> MemoryStore:
    """Return rollouts of the SFT student for every prompt, scored by the teacher of style `opd`: what offline OPD trains on."""
    clock = clock or Clock()
    source = TimedSource(source_of(bed.students[sft], support.sampling(bed.sampling(samples))), clock)
    store = MemoryStore(source.manifest)
    collect_rollouts(source, bed.opd_prompts, store, prompts_per_batch=2048)
    score_rollouts(store, TimedScorer(support.scorer(bed.teachers[opd]), clock), rollouts_per_batch=2048)
    return store


def offline(
    bed: Testbed,
    store: MemoryStore,
    training: Training,
    loss: OPDLoss,
    *,
    teacher: str = "teacher",
    consistency: ConsistencyPolicy = ConsistencyPolicy.ERROR,
    support: Support = ALONE,
) -> Iterator[StepMetrics]:
    """Train with Lightning OPD on these rollouts."""
    setting = bed.setting
    stream = batches(
        store,
        rollouts_per_step=setting.batch,
        tokens_per_batch=TOKENS_PER_BATCH,
        seed=bed.seed,
        teacher=teacher,
        ref=support.ref(),
        top_k=support.width > 0,
        consistency=consistency,
    )[: setting.opd_steps]
    return opd_steps(training.student, stream, loss, training.optimizer)


def online(
    bed: Testbed,
    training: Training,
    loss: OPDLoss,
    opd: str,
    *,
    every: int = 1,
    support: Support = ALONE,
    clock: Clock | None = None,
) -> Iterator[StepMetrics]:
    """Train on rollouts that are sampled again every few steps.

    With `every=1` this is online OPD.  Any teacher will do: online OPD does not need a consistent one.
    """
    setting, clock = bed.setting, clock or Clock()
    teacher = TimedScorer(support.scorer(bed.teachers[opd]), clock)

    def make_round(generation: int, start: int) -> Iterator[StepMetrics]:
        named = ModelId("online", f"step-{start}", "as trained")  # a hash of all weights at each step would be paid as training
        source = TimedSource(training.source(support.sampling(bed.sampling()), identity=named, generation=generation), clock)
        store = MemoryStore(source.manifest)
        count = min(every * setting.batch, len(bed.opd_prompts))
        prompts = [bed.opd_prompts[(start * setting.batch + i) % len(bed.opd_prompts)] for i in range(count)]
        rows = sample_round(source, teacher, prompts, store)
        stream = batches(
            store,
            rollouts_per_step=setting.batch,
            tokens_per_batch=TOKENS_PER_BATCH,
            seed=bed.seed,
            rows=rows,
            ref=support.ref(generation),
            top_k=support.width > 0,
            consistency=ConsistencyPolicy.WARN,
        )[start:]
        return opd_steps(training.student, stream, loss, training.optimizer)

    return refresh_every(every, make_round, stop=setting.opd_steps)
