"""A store in a folder, which outlives the process: run this twice, and the second run samples and scores nothing and trains on."""

from itertools import islice

import torch
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    SamplingParams,
    ZarrStore,
    batches,
    collect_rollouts,
    load_checkpoint,
    opd_steps,
    save_checkpoint,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
model, tokenizer = load_model(student_dir, torch.float32)

source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
store = ZarrStore.open_or_create("runs/03/store.zarr", source.manifest)
# Smaller batches are committed more often, so a run that is stopped loses less; compact() merges them once all are there.
collected = collect_rollouts(source, make_prompts(QUESTIONS, tokenizer), store, prompts_per_batch=4)
scored = score_rollouts(store, HFScorer.from_folder(teacher_dir), rollouts_per_batch=4)
store.compact()
print(f"sampled {collected.rollouts} and scored {scored.rollouts} of {len(store)} rollouts, {store.stored_bytes():,} bytes")

student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
steps = batches(store, rollouts_per_step=8, ref="behavior")
# Step k depends on the seed and on k alone, so `start` is all that a resumed run needs; settings that are not those of before are refused.
start = load_checkpoint("runs/03/checkpoints", student, optimizer, steps=steps)
for metrics in islice(opd_steps(student, steps[start:], FusedOPDLoss(ratio_to_ref=True), optimizer), 4):
    print(f"step {metrics.step}: gap to the teacher {metrics.reverse_kl:+.3f}")
save_checkpoint("runs/03/checkpoints", student, optimizer, next_step=metrics.step + 1, steps=steps)
