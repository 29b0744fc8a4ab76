"""Share a student with its card, and its rollouts as a dataset: private, on the hub, under names that you choose.

`python examples/20_share.py me/student me/rollouts` pushes both, with the token of `hf auth login`, and reads the rollouts back.
Without names nothing leaves this machine: the two cards are written beside the student.
"""

import sys

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
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts
from lopd.tools.share import About, dataset_card, model_card, pull_store, push_store, push_student

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
sampling = SamplingParams(max_new_tokens=12, samples_per_prompt=2)
source, scorer = HFSource.from_folder(student_dir, sampling), HFScorer.from_folder(teacher_dir)
store = MemoryStore(source.manifest)
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
score_rollouts(store, scorer)

model, tokenizer = load_model(student_dir, torch.float32)
student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
steps = batches(store, rollouts_per_step=16, ref="behavior")[:8]
metrics = list(opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer))
student.export("runs/20/student", tokenizer, steps.lineage)
after = evaluate_reverse_kl(HFSource(model.eval(), tokenizer, sampling), scorer, make_prompts(HELD_OUT, tokenizer))

# What no file records.  Who taught the student, and whose rollouts they were, is looked up.
about = About(
    licence="apache-2.0",
    training={"steps": len(metrics), "rollouts a step": 16, "learning rate": 3e-3, "loss": "FusedOPDLoss(ratio_to_ref=True)"},
    metrics={"held-out questions": {"reverse KL to the teacher, nats a token": after}},
    notes="It has some 26,000 parameters, and can do nothing.",
)
if len(sys.argv) == 3:
    commit = push_student("runs/20/student", sys.argv[1], about, store=store)
    print(f"the student is commit {commit[:8]} of {sys.argv[1]}")
    commit = push_store(store, sys.argv[2], about)
    again = pull_store(sys.argv[2], revision=commit)
    print(f"{len(again)} rollouts came back from commit {commit[:8]} of {sys.argv[2]}")
else:
    model_card("runs/20/student", about, store).save("runs/20/student.md")
    dataset_card(store, "rollouts", about).save("runs/20/rollouts.md")
    print("wrote runs/20/student.md and runs/20/rollouts.md, and pushed nothing: name two repositories, OWNER/NAME")
