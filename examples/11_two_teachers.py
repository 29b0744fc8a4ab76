"""Two teachers, two columns: each rollout learns from the teacher of its prompt, in one run with one student."""

import torch
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    MemoryStore,
    SamplingParams,
    batches,
    collect_rollouts,
    opd_steps,
    score_rollouts,
    stored_advantages,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.protocols.reading import rows_of
from lopd.records import make_prompts

# Replace these by your own.
student_dir, math_teacher, code_teacher = model_folders(teachers=2)
model, tokenizer = load_model(student_dir, torch.float32)
math = make_prompts(QUESTIONS, tokenizer)
code = make_prompts([f"write a program that prints {i}." for i in range(16)], tokenizer)

source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
store = MemoryStore(source.manifest)
collect_rollouts(source, [*math, *code], store)
# Each teacher reads the rollouts of its own prompts only.
score_rollouts(store, HFScorer.from_folder(math_teacher), column="math", rows=rows_of(store, math))
score_rollouts(store, HFScorer.from_folder(code_teacher), column="code", rows=rows_of(store, code))


def mean_advantages() -> str:
    """Return each teacher's mean advantage on the rollouts that learn from it, against the policy that sampled."""
    means = {column: stored_advantages(store, teacher=column, rows=rows_of(store, own)).mean for column, own in teachers.items()}
    return ", ".join(f"{column} {mean:+.3f}" for column, mean in means.items())


teachers = {"math": math, "code": code}
print(f"mean advantages before training, nats: {mean_advantages()}")

# The student's folder records that its SFT text was written by both, each in its own field: `Lineage.of(math_teacher, code_teacher)`.
steps = batches(store, teacher=teachers, rollouts_per_step=16, ref="behavior")[:8]
student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer):
    print(f"step {metrics.step}: gap to the teacher {metrics.reverse_kl:+.3f}")
student.export("runs/11/student", tokenizer, steps.lineage)
print(f"the student remembers both: {steps.lineage.opd_teacher.name}")
