"""transformers on a card beside the same on a processor: scores, sampled log-probs and gradients of tiny models."""

import copy
from typing import Any

import numpy as np
import tiny_models
from gpu_device import Device, Found, goal, worst

from lopd import CausalLMStudent, FusedOPDLoss, SamplingParams, by_token
from lopd.engines.hf import HFScorer, HFSource
from lopd.records import Batch, Prompt, ScoredRollout
from lopd.records.collate import collate

_FAMILIES = ("qwen3", "llama", "gemma2", "gpt2", "qwen3_next")
#: Nats, and relative size: float32 on both sides, sums in another order.
_NATS, _RELATIVE = 1e-3, 1e-3


def engines(device: Device) -> Found:
    """Return a row for each family."""
    rows = [_compared(family, device) for family in (_FAMILIES[:1] if device.tiny else _FAMILIES)]
    nats = worst([row[name] for row in rows for name in ("scores", "sampled")])
    gradients = worst([row["gradients"] for row in rows])
    return rows, [
        goal("log-probs on the device against the processor, nats, the largest gap", f"<= {_NATS:g}", nats, nats <= _NATS),
        goal("gradients likewise, relative, the largest gap", f"<= {_RELATIVE:g}", gradients, gradients <= _RELATIVE),
    ]


def _compared(family: str, device: Device) -> dict[str, Any]:
    here, tokenizer = tiny_models.build_model(family).eval(), tiny_models.build_tokenizer()
    there = copy.deepcopy(here).to(device.name)
    sampling, rng = SamplingParams(max_new_tokens=8), np.random.default_rng(0)
    prompts = [Prompt(f"p{i}", rng.integers(2, tiny_models.VOCAB, 3 + i)) for i in range(4)]
    sampled = HFSource(there, tokenizer, sampling).sample(prompts)
    scores = [HFScorer(model, tokenizer).score(sampled) for model in (here, there)]
    gap = worst([float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(*scores, strict=True)])
    own = worst([float(np.abs(r.behavior_logprobs - s.logprobs).max()) for r, s in zip(sampled, scores[0], strict=True)])
    return {"family": family, "scores": gap, "sampled": own, "gradients": _gradient_gap(here, there, tokenizer, sampled)}


def _gradient_gap(here: Any, there: Any, tokenizer: Any, sampled: Any) -> float:
    """Return the largest distance of a parameter's gradient over its norm, or over the mean norm where that is larger."""
    batch = _batch(sampled)
    found = []
    for model in (here, there):
        student = CausalLMStudent(model, tokenizer)
        student(batch, FusedOPDLoss()).loss_sum.backward()
        found.append([p.grad.cpu().double() for p in student.parameters() if p.grad is not None])
    least = float(np.mean([float(g.norm()) for g in found[0]]))
    return worst([float((a - b).norm() / max(float(a.norm()), least)) for a, b in zip(*found, strict=True)])


def _batch(sampled: Any) -> Batch:
    rows = [ScoredRollout(r, {"teacher": (r.behavior_logprobs - 0.3).astype(np.float32)}) for r in sampled]
    return collate(rows, by_token, teacher="teacher")
