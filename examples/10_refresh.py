"""Rollouts that are sampled again: every so many steps, or when the student has moved too far from the policy that sampled them.

Lightning OPD is one round that never ends, online OPD a round for every step (`online_opd.py`); this is what lies between.
"""

from collections.abc import Iterable

import torch
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    Lineage,
    MemoryStore,
    SamplingParams,
    batches,
    opd_steps,
    refresh_every,
    refresh_when,
    sample_round,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import StepMetrics, make_prompts

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
model, tokenizer = load_model(student_dir, torch.float32)
prompts, sampling, lineage = make_prompts(QUESTIONS, tokenizer), SamplingParams(max_new_tokens=12), Lineage.read(student_dir)
teacher = HFScorer.from_folder(teacher_dir)  # stays alive, as every round is scored

student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
loss = FusedOPDLoss(ratio_to_ref=True)
store = MemoryStore(HFSource(model, tokenizer, sampling, lineage).manifest)


def make_round(generation: int, start: int) -> Iterable[StepMetrics]:
    """Sample with the student as it is, score, and train on that; all rounds go into one store, each with the policy that sampled it."""
    source = HFSource(model, tokenizer, sampling, lineage, generation=generation)  # a new one: it identifies the weights of this moment
    rows = sample_round(source, teacher, prompts, store)
    print(f"round {generation} from step {start}: {len(rows)} rollouts of {source.manifest.policy}")
    # a run that resumes within a round passes the step with which the round began: `first=3 * generation` for `refresh_every(3, ...)`
    steps = batches(store, rows=rows, first=start, rollouts_per_step=16, ref="behavior")[start:]
    return opd_steps(student, steps, loss, optimizer)


def show(metrics: StepMetrics) -> None:
    print(f"  step {metrics.step}: gap to the teacher {metrics.reverse_kl:+.3f}, KL from the policy that sampled {metrics.drift.kl:+.4f}")


# A new round every three steps.
for metrics in refresh_every(3, make_round, stop=6):
    show(metrics)

# A new round when it is time, however many steps that takes.
for metrics in refresh_when(lambda m: m.drift.kl > 0.02, make_round, start=6, stop=12, generation=2):
    show(metrics)

print(f"{len(store)} rollouts of {len(store.generations)} policies")
