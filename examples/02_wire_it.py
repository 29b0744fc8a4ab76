"""Five nouns and five verbs, wired in plain Python: Lightning OPD from the first rollout to the trained student, in memory."""

import torch
from tiny import HELD_OUT, QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    MemoryStore,
    SamplingParams,
    batches,
    collect_rollouts,
    evaluate_reverse_kl,
    opd_steps,
    score_rollouts,
    watch_drift,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts

student_dir, teacher_dir = model_folders()  # replace these and the questions by your own
model, tokenizer = load_model(student_dir, torch.float32)
sampling = SamplingParams(max_new_tokens=12, samples_per_prompt=4)

# The nouns: each can be another one with the same methods (`lopd.protocols`).
source = HFSource.from_folder(student_dir, sampling)  # RolloutSource: samples; VLLMSource, ServerSource, RaySource, ...
scorer = HFScorer.from_folder(teacher_dir)  # TeacherScorer: reads; VLLMScorer, ServerScorer, RayScorer, ...
store = MemoryStore(source.manifest)  # LogprobStore: keeps; ZarrStore, LanceStore, ...
student = CausalLMStudent(model, tokenizer)  # Student: is trained
loss = FusedOPDLoss(ratio_to_ref=True)  # OPDLoss: what a token costs

# The verbs.
held_out = make_prompts(HELD_OUT, tokenizer)
before = evaluate_reverse_kl(source, scorer, held_out)
collect_rollouts(source, make_prompts(QUESTIONS, tokenizer), store)
score_rollouts(store, scorer)
steps = batches(store, rollouts_per_step=32, ref="behavior")[:16]
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
for metrics in watch_drift(opd_steps(student, steps, loss, optimizer)):
    print(f"step {metrics.step:2d}  gap to the teacher {metrics.reverse_kl:+.3f}  ratio to the reference {metrics.drift.ratio_mean:.3f}")
after = evaluate_reverse_kl(HFSource(model, tokenizer, sampling), scorer, held_out)

print(f"held-out reverse KL, nats a token: {before.mean:.3f} ± {before.ci95:.3f} before, {after.mean:.3f} ± {after.ci95:.3f} after")
student.export("runs/02/student", tokenizer, steps.lineage)
