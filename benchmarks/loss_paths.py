"""The paths that `bench_loss.py` compares: ours, torch's own, and those of other libraries that run on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd import FusedOPDLoss, ReferenceOPDLoss
from lopd.losses.objective import OPDObjective, Signal, Tokens
from lopd.records import Batch, LMHead


@frozen(eq=False)
class Problem:
    """One micro-batch whose tokens all count, and the head it meets."""

    hidden: Tensor
    weight: Tensor
    batch: Batch

    @property
    def head(self) -> LMHead:
        """Without bias, cap and scale, which not every library has."""
        return LMHead(self.weight)

    def double(self) -> "Problem":
        """Return the very same numbers in float64."""
        hidden, weight = (t.detach().double().requires_grad_() for t in (self.hidden, self.weight))
        return evolve(self, hidden=hidden, weight=weight)


def make_problem(
    tokens: int, vocabulary: int, size: int, dtype: torch.dtype, *, weight: Tensor | None = None, device: str = "cpu"
) -> Problem:
    """Make random numbers with logits of a few nats, as those of a language model; a weight may be used again."""
    where: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden_ND = torch.randn(tokens, size, **where).to(dtype).requires_grad_()
    if weight is None:
        weight = (3 * torch.randn(vocabulary, size, **where) / size**0.5).to(dtype).requires_grad_()
    targets_N = torch.randint(0, vocabulary, (tokens,), **where)
    columns = {"weight": torch.rand(tokens, **where) + 0.1, "teacher_logprobs": -20 * torch.rand(tokens, **where)}
    batch = Batch(targets_N, targets_N, torch.arange(tokens, device=device), torch.zeros_like(targets_N), **columns)
    return Problem(hidden_ND, weight, batch)


def rollout_problem(folder: Path, tokens: int = 4096) -> Problem:
    """Return the hidden states of the student of a quickstart run on its own stored rollouts, with the teacher's stored log-probs."""
    from lopd import ZarrStore, batches
    from lopd.engines.causal_lm import lm_head, packed_hidden_states
    from lopd.engines.hf import load_model

    model, tokenizer = load_model(str(folder / "sft"), torch.float32)
    store = ZarrStore.open(folder / "store.zarr")
    step = batches(store, rollouts_per_step=len(store), tokens_per_batch=tokens).step(0)
    batch = step.batches[0]
    with torch.no_grad():
        hidden_ND = packed_hidden_states(model, batch.inputs, batch.position_ids, batch.lengths)
    weight = lm_head(model, len(tokenizer)).weight.detach().clone()
    on_N = batch.weight > 0
    columns = {
        name: getattr(batch, name)[on_N] for name in ("inputs", "targets", "position_ids", "segment_ids", "weight", "teacher_logprobs")
    }
    return Problem(hidden_ND[on_N].clone().requires_grad_(), weight.requires_grad_(), Batch(**columns))


@frozen(eq=False)
class LossPath:
    """One way to the loss.

    Args:
        run: problem -> scalar loss, to be differentiated.
        package: what must be installed for it.
        bounded: whether its memory does not grow with tokens times vocabulary.
        only: the kind of device that it is for; None for all.
    """

    run: Callable[[Problem], Tensor]
    package: str | None = None
    bounded: bool = True
    only: str | None = None

    def __call__(self, problem: Problem) -> Tensor:
        """Compute the loss."""
        return self.run(problem)


def downstream(problem: Problem, logprobs_N: Tensor) -> Tensor:
    """Compute Lightning OPD on log-probs from elsewhere."""
    tokens = Tokens.counted(problem.batch)
    return OPDObjective()(logprobs_N[:, None], tokens).loss.sum()


def whole_rollouts(signal: Signal) -> Signal:
    """Change nothing, and do not declare that each token is looked at alone."""
    return signal


def _torch_op(chunk: int | None) -> Callable[[Problem], Tensor]:
    def run(problem: Problem) -> Tensor:
        from torch.nn.functional import linear_cross_entropy
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        chosen = {} if chunk is None else {"batch_chunk_size": chunk, "chunking_method": None}
        options = LinearCrossEntropyOptions(**chosen)
        nll_N = linear_cross_entropy(problem.hidden, problem.weight, problem.batch.targets, reduction="none", options=options)
        return downstream(problem, -nll_N.float())

    return run


def _cut_cross_entropy(impl: str) -> Callable[[Problem], Tensor]:
    def run(problem: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        nll_N = linear_cross_entropy(problem.hidden, problem.weight, problem.batch.targets, reduction="none", impl=impl)
        return downstream(problem, -nll_N.float())

    return run


def _liger(problem: Problem) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Liger

    answer = Liger.apply(problem.hidden, problem.weight, problem.batch.targets)
    nll_N = answer[0] if isinstance(answer, tuple) else answer
    return downstream(problem, -nll_N.float())


def _ours(loss: FusedOPDLoss | ReferenceOPDLoss) -> Callable[[Problem], Tensor]:
    return lambda problem: loss(problem.hidden, problem.head, problem.batch).loss_sum


PATHS = {
    "fused": LossPath(_ours(FusedOPDLoss())),
    "recomputed": LossPath(_ours(FusedOPDLoss(transforms=(whole_rollouts,)))),
    "full logits": LossPath(_ours(ReferenceOPDLoss()), bounded=False),
    "torch linear_cross_entropy, chunk 512": LossPath(_torch_op(512)),
    "cut-cross-entropy, torch.compile": LossPath(_cut_cross_entropy("torch_compile"), "cut_cross_entropy", bounded=False, only="cpu"),
    "cut-cross-entropy": LossPath(_cut_cross_entropy("cce"), "cut_cross_entropy", only="cuda"),
    "Liger's fallback without a GPU": LossPath(_liger, "liger_kernel", only="cpu"),
    "Liger, scaled cross-entropy": LossPath(_liger, "liger_kernel", only="cuda"),
}


def paths_on(device: str) -> dict[str, LossPath]:
    """Return the paths that are for this kind of device: some libraries have their kernels for a GPU alone, and another way elsewhere."""
    return {name: path for name, path in PATHS.items() if path.only in (None, device)}
