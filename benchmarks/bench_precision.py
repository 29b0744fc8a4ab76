"""What the dtype of the head's products costs in accuracy: log-probs and gradients on real hidden states against float64.

    python benchmarks/bench_precision.py            # writes benchmarks/results/precision.json; about three minutes on one core
    python benchmarks/bench_precision.py --quick    # one seed and few tokens, into runs/precision-quick

SmolLM2-135M-Instruct reads the questions of TruthfulQA.  A seed draws questions, places in them, one target at each from the model's own distribution
there, and a teacher's log-prob one standard normal nat away from the model's.  Each way to the loss has the hidden states, weights and targets of the
float64 one.  Beside them stands what bfloat16 layers below the head change already: the float64 head on their hidden states and on float32 ones.
A CPU cannot add products of bfloat16 up in float32 by itself: there `Chunking(matmul_dtype=torch.bfloat16)` rounds the same operands and multiplies
them in float32, which gives what CUDA gives up to the order of sums.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import smollm2
import torch
from attrs import frozen
from record import ROOT, describe_machine, result_file
from torch import Tensor

from lopd import Chunking, FusedOPDLoss
from lopd.engines.causal_lm import lm_head, packed_hidden_states
from lopd.engines.hf import load_model
from lopd.records import Batch, LMHead, make_prompts
from lopd.records.estimates import mean

CLIP, PREFIX, QUESTIONS = 10.0, 24, 80  # tokens that all questions share come first
ARMS = {
    "float32 operands": torch.float32,
    "bfloat16 operands, float32 logits": torch.bfloat16,
}
ROUNDED = "bfloat16 operands, bfloat16 logits"
NOISE = "bfloat16 layers, float64 head"


@frozen(eq=False)
class Problem:
    """Hidden states as a training step has them, the same from float32 layers, and a head; targets and a teacher's log-probs."""

    hidden: Tensor
    exact_hidden: Tensor
    weight: Tensor
    targets: Tensor
    teacher: Tensor


@frozen(eq=False)
class Found:
    """(M,) log-probs, and gradients by hidden states and weight."""

    logprobs: Tensor
    hidden: Tensor
    weight: Tensor


def plain(problem: Problem, hidden: Tensor, dtype: torch.dtype, rounded: torch.dtype | None = None) -> Found:
    """Compute the loss by hand, in `dtype`; with `rounded`, operands, logits and gradients by them are rounded to that."""

    def narrow(values: Tensor) -> Tensor:
        return values.to(dtype) if rounded is None else values.to(rounded).to(dtype)

    weight_VD = narrow(problem.weight)
    made: list[tuple[Tensor, Tensor]] = []
    total_VD = torch.zeros_like(weight_VD)
    for rows in torch.arange(len(hidden)).split(128):
        hidden_CD, targets_C1 = narrow(hidden[rows]), problem.targets[rows][:, None]
        logprobs_CV = narrow(hidden_CD @ weight_VD.T).log_softmax(-1)
        logprobs_C = logprobs_CV.gather(-1, targets_C1)[:, 0]
        advantages_C = (problem.teacher[rows].to(dtype) - logprobs_C).clamp(-CLIP, CLIP)
        # of -A log p: A (p - onehot)
        gradient_CV = logprobs_CV.exp_()
        gradient_CV.scatter_add_(-1, targets_C1, -torch.ones_like(targets_C1, dtype=dtype))
        gradient_CV = narrow(gradient_CV.mul_(advantages_C[:, None]))
        made.append((logprobs_C, gradient_CV @ weight_VD))
        total_VD.addmm_(gradient_CV.T, hidden_CD)
    logprobs, by_hidden = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Found(logprobs, by_hidden, total_VD)


def fused(problem: Problem, operands: torch.dtype) -> Found:
    """Compute lopd's loss with these operands."""
    hidden, weight = (values.detach().float().requires_grad_() for values in (problem.hidden, problem.weight))
    ones, places = torch.ones(len(hidden)), torch.arange(len(hidden))
    batch = Batch(problem.targets, problem.targets, places, torch.zeros_like(places), ones, teacher_logprobs=problem.teacher.float())
    output = FusedOPDLoss(clip=CLIP, chunking=Chunking(matmul_dtype=operands))(hidden, LMHead(weight), batch)
    return Found(cast("Tensor", output.logprobs), *torch.autograd.grad(output.loss_sum, (hidden, weight)))


def errors(found: Found, truth: Found) -> dict[str, Any]:
    """Return the absolute errors of log-probs in nats, and the relative ones of gradients."""
    gaps = (found.logprobs.double() - truth.logprobs).abs()
    pairs = ((found.hidden, truth.hidden), (found.weight, truth.weight))
    hidden, weight = (float((mine.double() - exact).norm() / exact.norm()) for mine, exact in pairs)
    return {"gaps": gaps.tolist(), "hidden": hidden, "weight": weight}


def arms_of(problem: Problem) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each way by its name, with its errors."""
    truth = plain(problem, problem.hidden, torch.float64)
    for name, operands in ARMS.items():
        yield name, errors(fused(problem, operands), truth)
    yield ROUNDED, errors(plain(problem, problem.hidden, torch.float32, torch.bfloat16), truth)
    yield NOISE, errors(truth, plain(problem, problem.exact_hidden, torch.float64))


@torch.no_grad()
def make_problem(models: tuple[Any, Any], tokenizer: Any, seed: int, tokens: int) -> Problem:
    """Draw questions and places in them by the seed, and read them with two models: the first in bfloat16; the head is the first one's."""
    model, exact = models
    random = torch.Generator().manual_seed(seed)
    asked = smollm2.questions()
    chosen = [smollm2.chat(asked[i]) for i in torch.randperm(len(asked), generator=random)[:QUESTIONS].tolist()]
    texts = [torch.tensor(prompt.token_ids).long() for prompt in make_prompts(chosen, tokenizer)]
    lengths = [len(text) for text in texts]
    inputs, positions = torch.cat(texts), torch.cat([torch.arange(length) for length in lengths])
    places = (positions >= PREFIX).nonzero()[:, 0]
    places = places[torch.randperm(len(places), generator=random)[:tokens]]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = packed_hidden_states(model, inputs, positions, lengths)[places]
    exact_hidden = packed_hidden_states(exact, inputs, positions, lengths)[places]
    weight = lm_head(model, len(tokenizer)).weight.detach()
    own_NV = torch.cat([part.double() @ weight.double().T for part in hidden.split(128)]).log_softmax(-1)
    targets = own_NV.exp().multinomial(1, generator=random)
    teacher = own_NV.gather(-1, targets) + torch.randn(len(targets), 1, generator=random)
    return Problem(hidden, exact_hidden, weight, targets[:, 0], teacher[:, 0].clamp(max=0))


def measure(seeds: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """Return a row for each kind of weights and each way."""
    with tempfile.TemporaryDirectory() as folder:
        smollm2.save_teacher(Path(folder))
        full, tokenizer = load_model(folder, torch.float32)
        narrow, _ = load_model(folder, torch.bfloat16)
        same, _ = load_model(folder, torch.bfloat16)
    # float32 layers on the weights that bfloat16 has
    kinds = {"bfloat16": (narrow, same.float()), "float32, layers in bfloat16": (full, full)}
    rows = []
    for weights, models in kinds.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in seeds:
            for name, one in arms_of(make_problem(models, tokenizer, seed, tokens)):
                found.setdefault(name, []).append(one)
                print(weights, seed, name, f"{max(one['gaps']):.2g} nats, gradients {one['hidden']:.2g} {one['weight']:.2g}", flush=True)
        rows += [{"weights": weights, "products": name, **summary(runs)} for name, runs in found.items()]
    return rows


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """Return means over seeds with their 95 % intervals, and the quantile and maximum over all tokens."""
    gaps = torch.tensor([run["gaps"] for run in runs], dtype=torch.float64)
    parts = {"nats": gaps.mean(-1).tolist(), "by_hidden": [run["hidden"] for run in runs], "by_weight": [run["weight"] for run in runs]}
    known: dict[str, float | int] = {"seeds": len(runs), "tokens": gaps.numel()}
    for name, values in parts.items():
        estimate = mean(values)
        known |= {name: estimate.mean, f"{name}_ci95": estimate.ci95}
    return known | {"nats_p99": float(gaps.flatten().quantile(0.99)), "nats_max": float(gaps.max())}


def find_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge the default on CUDA; the limits were set before anything was measured."""
    by_name = {(row["weights"], row["products"]): row for row in rows}
    goals: list[dict[str, Any]] = []

    def add(name: str, limit: float, measured: float) -> None:
        goals.append({"name": name, "goal": f"<= {limit:g}", "measured": measured, "met": measured <= limit})

    for weights in dict.fromkeys(row["weights"] for row in rows):
        mine, noise = (by_name[weights, name] for name in (list(ARMS)[1], NOISE))
        key, limit = ("nats_max", 1e-4) if weights == "bfloat16" else ("nats", 1e-2)
        add(
            f"{'largest' if key == 'nats_max' else 'mean'} error of a log-prob, nats, bfloat16 operands, weights {weights}",
            limit,
            mine[key],
        )
        add(
            f"error of the gradient by the weight over that of bfloat16 layers, weights {weights}",
            0.5,
            mine["by_weight"] / noise["by_weight"],
        )
    return goals


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and 64 tokens")
    options = parser.parse_args()
    rows = measure(range(1 if options.quick else 5), 64 if options.quick else 256)
    goals = find_goals(rows)
    for row in (*rows, *goals):
        print(row)
    home = [ROOT / "runs" / "precision-quick"] if options.quick else []
    result_file("precision", describe_machine(), rows, goals, *home)


if __name__ == "__main__":
    main()
