"""Trajectories of an agent: import what a framework recorded, score it, train on what the policy drew and not on what a tool wrote.

The loop below stands in for verl, prime-rl or agent-lightning: it draws, calls a tool, draws on, and writes down ids, a mask and log-probs.
"""

import numpy as np
import torch
from tiny import QUESTIONS, model_folders

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    Lineage,
    Prompt,
    SamplingParams,
    ZarrStore,
    batches,
    import_trajectories,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model

# Replace these by your own, and the loop by the records of your framework.
student_dir, teacher_dir = model_folders()
source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=6))
tokenizer = source.tokenizer


def answered(names: list[str], asked: list[list[int]]) -> list[dict[str, list]]:
    """Sample what the policy draws after each prompt."""
    drawn = source.sample([Prompt(name, ids) for name, ids in zip(names, asked, strict=True)])
    return [{"ids": rollout.response_ids.tolist(), "logprobs": rollout.behavior_logprobs.tolist()} for rollout in drawn]


# Two turns of the policy, with a calculator in between.
asked = [tokenizer(question)["input_ids"] for question in QUESTIONS]
results = [tokenizer(f" tool: {int(question[8]) + int(question[12])}. ")["input_ids"] for question in QUESTIONS]  # 5 to "what is 2 + 3?"
first = answered([f"{question} call" for question in QUESTIONS], asked)
read = [ids + call["ids"] + result for ids, call, result in zip(asked, first, results, strict=True)]
second = answered([f"{question} answer" for question in QUESTIONS], read)
records = [
    {
        "id": question,
        "prompt_ids": ids,
        "response_ids": call["ids"] + result + answer["ids"],
        "response_mask": [1] * len(call["ids"]) + [0] * len(result) + [1] * len(answer["ids"]),
        "response_logprobs": call["logprobs"] + [0.0] * len(result) + answer["logprobs"],
    }
    for question, ids, call, result, answer in zip(QUESTIONS, asked, first, results, second, strict=True)
]

# One rollout for each record.  The policy is named by its folder, which also records who wrote its SFT text.
store = import_trajectories(
    records,
    tokenizer,
    policy=student_dir,
    sampling=source.sampling,
    store=lambda manifest: ZarrStore.open_or_create("runs/17/store.zarr", manifest),
)
counted = [record.rollout.loss_mask for record in store.read(range(len(store)))]
print(f"{len(store)} trajectories: the policy drew {sum(map(np.sum, counted))} of {sum(map(len, counted))} tokens")

# Every token is scored.  The student's own scores are what the loop recorded, token by token: nothing was shifted.
score_rollouts(store, HFScorer.from_folder(teacher_dir))
score_rollouts(store, HFScorer.from_folder(student_dir), column="again")
rows = store.read(range(len(store)), columns=("behavior", "again"))
gap = max(np.abs(row.scores["behavior"] - row.scores["again"])[row.rollout.loss_mask].max() for row in rows)
print(f"recorded and recomputed log-probs differ by at most {gap:.1e} nats")

student = CausalLMStudent(*load_model(student_dir, torch.float32))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
steps = batches(store, rollouts_per_step=16, ref="behavior")[:16]
for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer):
    print(f"step {metrics.step:2d}  gap to the teacher {metrics.reverse_kl:+.3f}")
student.export("runs/17/student", tokenizer, steps.lineage)

# Prefix replay: only the last turn of each, after the whole conversation before it.
last = import_trajectories(records, tokenizer, policy=student_dir, sampling=source.sampling, turns=[-1])
print(f"the last turns alone: {last.lengths()[:, 1].sum()} response tokens after prompts of {last.lengths()[:, 0].mean():.0f}")
print(f"the student remembers its teacher: {Lineage.read('runs/17/student').opd_teacher == Lineage.of(teacher_dir).sft_teacher}")
