"""Micro-batches of awkward shapes and heads, on which losses are compared.

Shape suffixes: N tokens of a batch, M those that count, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import evolve, fields, frozen
from torch import Tensor

from lopd.records.steps import Batch, LMHead

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROUNDINGS = 16
STORED = (
    *("teacher_logprobs", "ref_logprobs", "sampler_logprobs", "top_k_logprobs", "top_k_tail", "drawn_logprobs", "drawn_ref_logprobs"),
    *("label_values", "label_means"),
)


@frozen(eq=False)
class LossCase:
    """One micro-batch, in float64.

    Args:
        name: what is special about it.
        hidden: (N, D).
        head: the last layer.
        batch: several rollouts, prompts included.
    """

    name: str
    hidden: Tensor
    head: LMHead
    batch: Batch

    def rounded(self, dtype: torch.dtype) -> "LossCase":
        """Return the case with hidden states and head in this dtype, and stored columns in float32, as a store has them (float64 for float64)."""
        stored = torch.promote_types(dtype, torch.float32)
        batch = map_batch(self.batch, ("weight", *STORED), lambda column: column.to(stored))
        return LossCase(self.name, self.hidden.to(dtype), _map_head(self.head, lambda tensor: tensor.to(dtype)), batch)

    def to(self, device: torch.device | str | int) -> "LossCase":
        """Return the same case on another device."""
        return LossCase(self.name, self.hidden.to(device), _map_head(self.head, lambda tensor: tensor.to(device)), self.batch.to(device))

    def part(self, rows: slice) -> "LossCase":
        """Return the case with these tokens of the batch only; its rollouts are numbered from 0, as in any batch."""
        batch = map_batch(self.batch, [f.name for f in fields(Batch)], lambda column: column[rows])
        segments = batch.segment_ids.unique_consecutive(return_inverse=True)[1]
        return evolve(self, hidden=self.hidden[rows], batch=evolve(batch, segment_ids=segments))

    def leaves(self) -> tuple[Tensor, LMHead]:
        """Return hidden states and head as leaves that require a gradient."""
        return self.hidden.clone().requires_grad_(), _map_head(self.head, lambda tensor: tensor.clone().requires_grad_())


def _map_head(head: LMHead, change: Callable[[Tensor], Tensor]) -> LMHead:
    return evolve(head, weight=change(head.weight), bias=None if head.bias is None else change(head.bias))


def map_batch(batch: Batch, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with some of its columns changed, where they are there."""
    columns: dict[str, Any] = {name: getattr(batch, name) for name in names}
    return evolve(batch, **{name: change(column) for name, column in columns.items() if column is not None})


def loss_case(
    name: str,
    lengths: Sequence[int] = (5, 1, 9),
    vocab: int = 67,
    dim: int = 12,
    *,
    seed: int = 0,
    counted: float = 0.7,
    size: float = 1.0,
    bias: bool = False,
    shift: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    heated: bool = False,
    drawn: int = 0,
) -> LossCase:
    """Return a random micro-batch.

    Args:
        name: what is special about it.
        lengths: tokens of each rollout.
        vocab: V.
        dim: D.
        seed: seed of everything random.
        counted: share of tokens whose weight is not 0.
        size: standard deviation of the logits before scale and cap.
        bias: whether the head has one.
        shift: added to the bias.
        softcap: the head's soft-cap.
        scale: the head's scale.
        heated: whether another distribution than the reference policy drew the tokens.
        drawn: how many tokens the reference policy drew besides.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    count = sum(lengths)
    hidden_ND, weight_VD = normal(count, dim), normal(vocab, dim) * size / dim**0.5
    head = LMHead(weight_VD, normal(vocab) + shift if bias else None, softcap, scale)
    targets_N, inputs_N = (torch.randint(0, vocab, (count,), generator=random) for _ in range(2))
    own_NV = head.logits(hidden_ND).log_softmax(-1)
    own_N = own_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    # float32 values, so that a float64 run sees the very same; near the student's own, as after SFT
    columns = {f"{model}_logprobs": (own_N + 2 * normal(count)).clamp(-90, 0).float().double() for model in ("teacher", "ref")}
    if heated:
        columns["sampler_logprobs"] = (0.8 * columns["ref_logprobs"]).float().double()
    weight_N = torch.rand(count, generator=random, dtype=torch.float64) + 0.05
    weight_N *= torch.rand(count, generator=random, dtype=torch.float64) < counted
    segments_N = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    top_NK, ids_NK = (own_NV + normal(count, vocab)).log_softmax(-1).topk(min(3, vocab))
    columns |= {"top_k_logprobs": top_NK.float().double(), "top_k_ids": ids_NK}
    columns["top_k_tail"] = (1 - top_NK.exp().sum(-1)).clamp(min=0).float().double()
    if drawn:
        ids_ND = own_NV.exp().multinomial(drawn, replacement=True, generator=random)
        for model in ("", "ref_"):
            logprobs_ND = own_NV.gather(-1, ids_ND) + normal(count, drawn)
            columns[f"drawn_{model}logprobs"] = logprobs_ND.clamp(-90, 0).float().double()
        columns["drawn_ids"] = ids_ND
    columns |= {name: normal(count).float().double() for name in ("label_values", "label_means")}
    batch = Batch(inputs_N, targets_N, positions_N, segments_N, weight_N.float().double(), **columns)
    return LossCase(name, hidden_ND, head, batch)


def loss_cases() -> list[LossCase]:
    """Return awkward shapes and heads."""
    return [
        loss_case("some of everything"),
        loss_case("one token", [1], counted=1.0),
        loss_case("drawn at another temperature", [9, 4], heated=True, seed=11),
        loss_case("candidates that the policy drew", [9, 30], counted=1.0, drawn=5, seed=17),
        loss_case("candidates that the policy drew, of a rollout at another temperature", heated=True, drawn=2, seed=18),
        loss_case("one token in the vocabulary", vocab=1, dim=3),
        loss_case("one dimension", vocab=5, dim=1),
        loss_case("no token counts", counted=0.0),
        loss_case("several chunks, the last one short", [30, 1, 40], counted=1.0, seed=20),
        loss_case("exactly two chunks", [16, 16], counted=1.0, seed=2),
        loss_case("more ids than a tile", [7, 11], vocab=2500, dim=7, seed=3),
        loss_case("logits of a thousand", [9, 9], size=1000.0, seed=4),
        loss_case("nearly certain", [9, 9], size=30.0, seed=5),
        loss_case("flat", [9, 9], size=1e-3, seed=6),
        loss_case("bias, cap and scale", [40, 3], bias=True, softcap=2.0, scale=0.6, seed=7),
        loss_case("bias", [8], bias=True, seed=8),
        loss_case("cap", [20, 4], softcap=1.5, size=3.0, seed=9),
        loss_case("all logits very negative", [8], bias=True, seed=10, shift=-900.0),
    ]


def separated_loss_cases() -> list[LossCase]:
    """Return those of `loss_cases` in which tokens of one rollout differ by more than rounding: in log-prob, in entropy and in advantage.

    For a loss that ranks tokens or divides by their range.  Where values are equal up to rounding, two exact paths rank them differently.
    """
    return [case for case in loss_cases() if all(_is_separated(case.rounded(dtype).rounded(torch.float64)) for dtype in DTYPES)]


def _is_separated(case: LossCase) -> bool:
    on_N, logits_NV = case.batch.weight > 0, case.head.logits(case.hidden)
    logprobs_MV = logits_NV[on_N].log_softmax(-1)
    own_M = logprobs_MV.gather(-1, case.batch.targets[on_N][:, None]).squeeze(-1)
    values = [own_M, torch.special.entr(logprobs_MV.exp()).sum(-1)]
    if case.batch.teacher_logprobs is not None:
        values.append(case.batch.teacher_logprobs[on_N] - own_M)
    segments_M = case.batch.segment_ids[on_N]
    pairs_MM = (segments_M[:, None] == segments_M).triu(1)
    largest = float(torch.cat([logits_NV, logits_NV.log_softmax(-1)]).abs().max())
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps * largest
    return all(bool(((value_M[:, None] - value_M).abs()[pairs_MM] > rounding).all()) for value_M in values)
