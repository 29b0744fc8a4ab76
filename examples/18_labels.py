"""Rewards beside a teacher: a verifier labels stored rollouts once, and training filters, weighs or mixes its labels with the advantage.

Still offline: no teacher and no verifier is at hand while the student trains.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    FusedSFTLoss,
    SamplingParams,
    ZarrStore,
    batches,
    by_token,
    collect_rollouts,
    evaluate,
    import_text,
    label_rollouts,
    labels_of,
    make_prompts,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.losses.variants import add_labels, weigh_labels
from lopd.records import Prompt, Rollout

base_dir, _ = model_folders()
answers = [str(int(question[8]) + int(question[12])) for question in QUESTIONS]  # "5" to "what is 2 + 3?"


def learn_sums(folder: str, steps: int, teacher: str | None) -> None:
    """Fine-tune the tiny base model on sums."""
    model, tokenizer = load_model(base_dir, torch.float32)
    student = CausalLMStudent(model, tokenizer)
    text = batches(import_text(list(zip(QUESTIONS, answers, strict=True)), tokenizer, teacher=teacher), teacher=None, rollouts_per_step=8)
    list(opd_steps(student, text[:steps], FusedSFTLoss(), torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)))
    student.export(folder, tokenizer, text.lineage)


# Replace these two folders, the questions and their answers by your own.
if not Path("runs/18/student").exists():
    learn_sums("runs/18/teacher", 48, teacher=None)
    learn_sums("runs/18/student", 16, teacher="runs/18/teacher")
model, tokenizer = load_model("runs/18/student", torch.float32)
prompts = make_prompts(QUESTIONS, tokenizer, answers=answers)
sampling = SamplingParams(max_new_tokens=4, samples_per_prompt=8)


def is_right(prompt: Prompt, rollout: Rollout) -> float:
    """Return 1.0 if the response is the sum: a verifier as `evaluate` takes it."""
    return float(tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip() == prompt.answer)


# Sample once, score once, label once.  Each is resumed by the same line again, and a verifier that fails on a rollout stops no other.
source = HFSource.from_folder("runs/18/student", sampling)
store = ZarrStore.open_or_create("runs/18/rollouts.zarr", source.manifest)
collect_rollouts(source, prompts, store)
score_rollouts(store, HFScorer.from_folder("runs/18/teacher"))
report = label_rollouts(store, is_right, prompts)
labels = labels_of(store)
print(f"{report.rollouts} rollouts labelled in this run; {labels.mean():.0%} of {len(store)} are right")

# A filter is plain numpy: rows for `batches`.
right = np.flatnonzero(labels == 1)
# A gate, and a mix: transforms of the loss, given the labels by `batches(label=...)`.
mix = partial(add_labels, scale=8.0)  # nats: what a right answer adds over a wrong one of the same prompt
gate = partial(weigh_labels, by=lambda label: label == 1)
ways = {
    "OPD alone": (None, FusedOPDLoss(ratio_to_ref=True)),
    "OPD plus reward": (None, FusedOPDLoss(ratio_to_ref=True, transforms=(mix,))),
    "OPD where the response is right": (None, FusedOPDLoss(ratio_to_ref=True, transforms=(gate,))),
    "SFT on the right ones": (right, FusedSFTLoss()),
}
accuracy = {"student after SFT": evaluate(source, prompts, is_right).avg_at_n}
for name, (rows, loss) in ways.items():
    model, _ = load_model("runs/18/student", torch.float32)
    student = CausalLMStudent(model, tokenizer)
    teacher = None if rows is not None else "teacher"
    label = "label" if name in ("OPD plus reward", "OPD where the response is right") else None  # lopd warns of labels that nothing reads
    steps = batches(store, rollouts_per_step=32, teacher=teacher, ref="behavior", label=label, rows=rows, weighting=by_token)[:16]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    list(opd_steps(student, steps, loss, optimizer))
    fresh = SamplingParams(max_new_tokens=4, samples_per_prompt=8, seed=1)
    accuracy[name] = evaluate(HFSource(model, tokenizer, fresh), prompts, is_right).avg_at_n
# The same 16 questions are trained and tested: this shows that the parts work, not which way is best.
for name, found in accuracy.items():
    print(f"{name:32s} {found.mean:5.1%} right, from {found.low:.1%} to {found.high:.1%}")
