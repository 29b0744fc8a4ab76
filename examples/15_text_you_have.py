"""SFT on text that you have: pairs in, a student out that remembers who wrote them.

The same call takes messages, records of a dataset, a `.jsonl` or a `.parquet`.  The loss is on the responses alone.
"""

import torch
from tiny import QUESTIONS, model_folders

from lopd import CausalLMStudent, FusedSFTLoss, Lineage, ZarrStore, batches, import_text, opd_steps
from lopd.engines.hf import load_model

# Replace these by your own: a model before SFT, the folder of the teacher, and prompts with what the teacher wrote.
base_dir, teacher_dir = model_folders()
pairs = [(question, str(int(question[8]) + int(question[12]))) for question in QUESTIONS]  # "what is 2 + 3?", "5"

model, tokenizer = load_model(base_dir, torch.float32)
# `teacher=None` means that the writer is not known.  A store in memory is enough for a short text: leave `store` out.
text = import_text(pairs, tokenizer, teacher=teacher_dir, store=lambda manifest: ZarrStore.open_or_create("runs/15/text.zarr", manifest))
print(f"{len(text)} texts by {text.manifest.policy.name}, {text.lengths()[:, 1].sum()} tokens to learn")

student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
steps = batches(text, teacher=None, rollouts_per_step=8)[:24]
for metrics in opd_steps(student, steps, FusedSFTLoss(), optimizer):
    if metrics.step % 4 == 3:
        print(f"step {metrics.step:2d}  loss {metrics.loss:.3f}")
student.export("runs/15/student", tokenizer, steps.lineage)

# The teacher was read for its identity alone, a few weights at a time.  It may score the rollouts of this student.
print(f"the student remembers its teacher: {Lineage.read('runs/15/student') == Lineage.of(teacher_dir)}")
