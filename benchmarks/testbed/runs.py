"""The OPD stage on a testbed, offline and online: same prompts, samples, temperature, length, batch, rate, steps, loss and loop."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from attrs import frozen

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
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.manifest import Lineage
from lopd.metrics import Estimate
from lopd.protocols import OPDLoss
from lopd.types import StepMetrics
from testbed.models import TOKENIZER, TOKENIZER_ID, Testbed, source_of
from testbed.task import verify


@frozen(eq=False)
class Training:
    """A student on its way."""

    student: CausalLMStudent
    optimizer: torch.optim.Optimizer
    lineage: Lineage

    @classmethod
    def of(cls, folder: Path, lr: float) -> "Training":
        """From this start, at a constant rate."""
        model, _ = load_model(folder, torch.float32)
        student = CausalLMStudent(model, TOKENIZER_ID)
        return cls(student, torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1), Lineage.read(folder))

    def source(self, bed: Testbed, *, samples: int = 1, temperature: float = 1.0, generation: int = 0) -> HFSource:
        """The student as it is, as a source of rollouts."""
        sampling = bed.sampling(samples, temperature)
        return HFSource(self.student.model, TOKENIZER, sampling, self.lineage, generation=generation, rows_per_batch=1024)

    def accuracy(self, bed: Testbed, *, temperature: float = 1.0, samples: int = 4) -> Estimate:
        """On the held-out prompts."""
        samples = samples if temperature else 1
        return evaluate(self.source(bed, samples=samples, temperature=temperature), bed.held_out, verify).avg_at_n


def scored_rollouts(bed: Testbed, sft: str, opd: str) -> MemoryStore:
    """One rollout of the SFT student for every prompt, scored by the teacher of style `opd`: what offline OPD trains on."""
    source = source_of(bed.students[sft], bed.sampling())
    store = MemoryStore(source.manifest)
    collect_rollouts(source, bed.opd_prompts, store, prompts_per_batch=2048)
    score_rollouts(store, HFScorer.from_folder(bed.teachers[opd]), rollouts_per_batch=2048)
    return store


def offline(
    bed: Testbed,
    store: MemoryStore,
    training: Training,
    loss: OPDLoss,
    *,
    teacher: str = "teacher",
    consistency: ConsistencyPolicy = ConsistencyPolicy.ERROR,
) -> Iterator[StepMetrics]:
    """Lightning OPD on these rollouts."""
    setting = bed.setting
    stream = batches(
        store,
        rollouts_per_step=setting.batch,
        tokens_per_batch=768,
        seed=bed.seed,
        stop=setting.opd_steps,
        teacher=teacher,
        ref="behavior",
        consistency=consistency,
    )
    return opd_steps(training.student, stream, loss, training.optimizer)


def online(bed: Testbed, training: Training, loss: OPDLoss, opd: str, every: int = 1) -> Iterator[StepMetrics]:
    """OPD on rollouts that are sampled anew every few steps; 1 is online OPD.  Of whatever teacher: consistency is not its condition."""
    setting, teacher = bed.setting, HFScorer.from_folder(bed.teachers[opd])

    def make_round(generation: int, start: int) -> Iterator[StepMetrics]:
        source = training.source(bed, generation=generation)
        store = MemoryStore(source.manifest)
        prompts = [bed.opd_prompts[(start * setting.batch + i) % len(bed.opd_prompts)] for i in range(every * setting.batch)]
        rows = sample_round(source, teacher, prompts, store)
        stream = batches(
            store,
            rollouts_per_step=setting.batch,
            tokens_per_batch=768,
            seed=bed.seed,
            start=start,
            rows=rows,
            ref="behavior",
            consistency=ConsistencyPolicy.WARN,
        )
        return opd_steps(training.student, stream, loss, training.optimizer)

    return islice(refresh_every(every, make_round), setting.opd_steps)
