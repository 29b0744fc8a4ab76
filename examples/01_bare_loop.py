"""The whole method on one page of plain torch: sample, score, and follow the advantage; then the same gradient from lopd's parts."""

import torch
from tiny import QUESTIONS, model_folders
from transformers import AutoModelForCausalLM

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, Rollout, SamplingParams, batches, opd_steps, score_rollouts
from lopd.engines.hf import HFScorer, HFSource, load_tokenizer

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
torch.manual_seed(0)
tokenizer = load_tokenizer(student_dir)
model = AutoModelForCausalLM.from_pretrained(student_dir)
teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)


def response_logprobs(model: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Return (T,) log-probs of the tokens from `start` on, nats."""
    logprobs = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[start:, None]).squeeze(-1)


# 1. The student answers each question once.                                  lopd: collect_rollouts(source, prompts, store)
rollouts = []
for question in QUESTIONS:
    prompt = tokenizer(question, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=True, top_k=0)[0]
    rollouts.append((ids, prompt.input_ids.shape[1]))

# 2. The teacher reads the answers once, and is not needed again.             lopd: score_rollouts(store, scorer)
with torch.no_grad():
    teacher_logprobs = [response_logprobs(teacher, ids, start) for ids, start in rollouts]
del teacher

# 3. Every token is made more likely where the teacher finds it likelier than the student does, and less likely elsewhere.
for (ids, start), theirs in zip(rollouts, teacher_logprobs, strict=True):  #  lopd: for step in batches(store)
    ours = response_logprobs(model, ids, start)  #                            lopd: CausalLMStudent, which packs what is ragged
    advantages = (theirs - ours.detach()).clamp(-10, 10)  #                   lopd: FusedOPDLoss, which never holds all logits
    loss = -(advantages * ours).mean()
    (loss / len(rollouts)).backward()  #                                      lopd: opd_steps, which divides once
by_hand = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

# The same step with lopd, on the same rollouts.  A rate of 0 leaves the weights, and the gradients can be looked at.
store = MemoryStore(HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12)).manifest)
for number, (ids, start) in enumerate(rollouts):
    every = torch.ones(len(ids) - start, dtype=torch.bool)
    store.append([Rollout(f"question-{number}", ids[:start], ids[start:], loss_mask=every, finish_reason="length")])
score_rollouts(store, HFScorer.from_folder(teacher_dir))
student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
steps = batches(store, rollouts_per_step=len(rollouts))[:1]
(metrics,) = opd_steps(student, steps, FusedOPDLoss(clip=10.0), optimizer, max_grad_norm=None)

furthest = max(float((by_hand[name] - parameter.grad).abs().max()) for name, parameter in model.named_parameters())
torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, by_hand, atol=1e-5, rtol=1e-4)
print(f"{metrics.rollouts} rollouts, gap to the teacher {metrics.reverse_kl:.3f} nats a token, gradient norm {metrics.grad_norm:.3f}")
print(f"lopd's gradient and the one by hand differ by at most {furthest:.1e}")
