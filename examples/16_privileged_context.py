"""Self-distillation: the teacher is the student itself, told the answer.

A privileged prompt stands before the very tokens that the student drew, so no teacher is larger than the student, and nothing is sampled again.
"""

import torch
from attrs import evolve
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    ConsistencyPolicy,
    FusedOPDLoss,
    MemoryStore,
    PrivilegedScorer,
    SamplingParams,
    batches,
    collect_rollouts,
    evaluate_reverse_kl,
    make_prompts,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model

student_dir, _ = model_folders()  # replace these and the questions, with their answers, by your own
answers = [str(int(question[8]) + int(question[12])) for question in QUESTIONS]  # "5" to "what is 2 + 3?"
model, tokenizer = load_model(student_dir, torch.float32)
sampling = SamplingParams(max_new_tokens=12, samples_per_prompt=32)
fresh = evolve(sampling, seed=1)  # an evaluation on the prompts of the training, with its random numbers, would draw its rollouts again

# What the student reads, and what its teacher reads in the place of each: any function of the prompt, or of your records.
prompts = make_prompts(QUESTIONS, tokenizer, answers=answers)
told = make_prompts([f"the answer is {prompt.answer}. {prompt.text}" for prompt in prompts], tokenizer)

source = HFSource.from_folder(student_dir, sampling)
scorer = PrivilegedScorer(HFScorer.from_folder(student_dir), prompts, told)  # or around any other scorer
store = MemoryStore(source.manifest)
collect_rollouts(source, prompts, store)
score_rollouts(store, scorer)
print(f"the column is the student's, {store.columns['teacher'].logprobs_mode[:19]}...")

before = evaluate_reverse_kl(HFSource(model, tokenizer, fresh), scorer, prompts)
# Teacher consistency compares models that read the same; state that this is meant.
steps = batches(store, rollouts_per_step=64, ref="behavior", consistency=ConsistencyPolicy.PRIVILEGED)[:24]
student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer):
    print(f"step {metrics.step:2d}  gap to the teacher {metrics.reverse_kl:+.3f}")
after = evaluate_reverse_kl(HFSource(model, tokenizer, fresh), scorer, prompts)
print(
    f"reverse KL to the student that is told, nats a token: {before.mean:.3f} ± {before.ci95:.3f} before, {after.mean:.3f} ± {after.ci95:.3f} after"
)
student.export("runs/16/student", tokenizer, steps.lineage)
print(f"its teacher was {steps.lineage.opd_teacher.name}")
