r"""The contract of an `OPDLoss`, one test a clause: a path that saves memory or time must be as exact as the plain one.

Each value and gradient is judged against the plain loss in float64, on the very same inputs: per element,
\(\lvert x - x_{64}\rvert \le \lvert x_{plain} - x_{64}\rvert + \epsilon\), where \(\epsilon\) is a few roundings of float32, and one of the
gradient's own dtype.

Shape suffixes: N tokens of a batch, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import evolve, fields, frozen
from torch import Tensor

from lopd.protocols import OPDLoss
from lopd.records.steps import Batch, LMHead, LossOutput

_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_STORED = ("teacher_logprobs", "ref_logprobs", "top_k_logprobs", "top_k_tail")
_ROUNDINGS = 16
_SUMS = ("loss_sum", "reverse_kl_sum", "clipped_sum")

#: By hidden states, head weight and, if there is one, head bias.
Gradients = Sequence[Tensor]


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
        """With hidden states and head in this dtype, and stored columns in float32, as a store has them (float64 for float64)."""
        stored = torch.promote_types(dtype, torch.float32)
        batch = _map_batch(self.batch, ("weight", *_STORED), lambda column: column.to(stored))
        return LossCase(self.name, self.hidden.to(dtype), _map_head(self.head, lambda tensor: tensor.to(dtype)), batch)

    def part(self, rows: slice) -> "LossCase":
        """With these tokens of the batch only."""
        batch = _map_batch(self.batch, [f.name for f in fields(Batch)], lambda column: column[rows])
        return evolve(self, hidden=self.hidden[rows], batch=batch)

    def leaves(self) -> tuple[Tensor, LMHead]:
        """Hidden states and head as leaves that require a gradient."""
        return self.hidden.clone().requires_grad_(), _map_head(self.head, lambda tensor: tensor.clone().requires_grad_())


def _map_head(head: LMHead, change: Callable[[Tensor], Tensor]) -> LMHead:
    return evolve(head, weight=change(head.weight), bias=None if head.bias is None else change(head.bias))


def _map_batch(batch: Batch, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Batch:
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
) -> LossCase:
    """A random micro-batch.

    Args:
        name: what is special about it.
        lengths: tokens of each rollout.
        vocab: V.
        dim: D.
        seed: of everything.
        counted: share of tokens whose weight is not 0.
        size: standard deviation of the logits before scale and cap.
        bias: whether the head has one.
        shift: added to the bias.
        softcap: of the head.
        scale: of the head.
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
    weight_N = torch.rand(count, generator=random, dtype=torch.float64) + 0.05
    weight_N *= torch.rand(count, generator=random, dtype=torch.float64) < counted
    segments_N = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    top_NK, ids_NK = (own_NV + normal(count, vocab)).log_softmax(-1).topk(min(3, vocab))
    columns |= {"top_k_logprobs": top_NK.float().double(), "top_k_ids": ids_NK}
    columns["top_k_tail"] = (1 - top_NK.exp().sum(-1)).clamp(min=0).float().double()
    batch = Batch(inputs_N, targets_N, positions_N, segments_N, weight_N.float().double(), **columns)
    return LossCase(name, hidden_ND, head, batch)


def loss_cases() -> list[LossCase]:
    """Awkward shapes and heads."""
    return [
        loss_case("some of everything"),
        loss_case("one token", [1], counted=1.0),
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
    """Those of `loss_cases` in which tokens of one rollout differ by more than rounding: in log-prob, in entropy and in advantage.

    For a loss that ranks tokens or divides by their range.  Where values are equal up to rounding, two exact paths rank them differently.
    """
    return [case for case in loss_cases() if all(_is_separated(case.rounded(dtype).rounded(torch.float64)) for dtype in _DTYPES)]


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
    rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * largest
    return all(bool(((value_M[:, None] - value_M).abs()[pairs_MM] > rounding).all()) for value_M in values)


def evaluate_case(loss: OPDLoss, case: LossCase, upstream: float = 1.0) -> tuple[LossOutput, Gradients]:
    """What the loss says of the case, and the gradients of `upstream` times its sum."""
    hidden_ND, head = case.leaves()
    output = loss(hidden_ND, head, case.batch)
    wanted = [hidden_ND, head.weight] if head.bias is None else [hidden_ND, head.weight, head.bias]
    return output, torch.autograd.grad(upstream * output.loss_sum, wanted)


def assert_at_least_as_exact(name: str, mine: Tensor, plain: Tensor, truth: Tensor, largest: float | None = None) -> None:
    """Per element no further from the truth than the plain path, up to a few roundings; the worst element is named.

    Args:
        name: what is compared.
        mine: what is judged, in its own dtype.
        plain: the plain path, in the same.
        truth: in float64.
        largest: of what was added up, where sums may cancel; the largest element of the truth if None.
    """
    assert mine.dtype == plain.dtype, f"{name}: dtype {mine.dtype}, expected {plain.dtype}"
    assert mine.shape == truth.shape, f"{name}: shape {tuple(mine.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    # float64 is its own truth, and an importance ratio multiplies the rounding of a log-prob by the log-prob
    unit = max(torch.finfo(torch.promote_types(mine.dtype, torch.float32)).eps, 1e-13)
    rounding = unit * (float(truth.abs().max()) if largest is None else largest)
    allowed = (plain.double() - truth).abs() + torch.finfo(mine.dtype).eps * truth.abs() + _ROUNDINGS * rounding + 1e-300
    excess = ((mine.double() - truth).abs() / allowed).flatten()
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    values = [float(t.flatten()[worst]) for t in (mine, truth, plain)]
    assert excess[worst] <= 1, f"{name}: element {worst} is {values[0]:.8g}, expected {values[1]:.8g} (plain: {values[2]:.8g})"


class LossConformance:
    """Every clause of the `OPDLoss` contract, as one test each.  Subclass it, and supply `make` and `reference`."""

    def make(self) -> OPDLoss:
        """The loss under test, with as little memory as it can do with, so that small cases take several chunks."""
        raise NotImplementedError

    def reference(self) -> OPDLoss:
        """The same equation in plain torch, in whatever dtype it is given."""
        raise NotImplementedError

    def cases(self) -> Sequence[LossCase]:
        """What it is tried on: add your own, or return `separated_loss_cases` for a loss that ranks tokens."""
        return loss_cases()

    def _judge(self, case: LossCase, dtype: torch.dtype, upstream: float = 1.0) -> None:
        rounded = case.rounded(dtype)
        mine, mine_gradients = evaluate_case(self.make(), rounded, upstream)
        plain, plain_gradients = evaluate_case(self.reference(), rounded, upstream)
        truth, true_gradients = evaluate_case(self.reference(), rounded.rounded(torch.float64), upstream)
        label = f"{case.name}, {dtype}"
        largest = _absolute_sum(self.reference(), rounded.rounded(torch.float64))
        for name in _SUMS:
            got, expected, exact = (getattr(output, name).detach() for output in (mine, plain, truth))
            assert_at_least_as_exact(f"{label}, {name}", got, expected, exact, largest)
        for name, got, expected, exact in zip(("hidden", "weight", "bias"), mine_gradients, plain_gradients, true_gradients, strict=False):
            assert_at_least_as_exact(f"{label}, gradient by {name}", got, expected, exact)

    def test_sums_and_gradients_are_as_exact_as_the_plain_ones_in_every_dtype(self) -> None:
        for dtype in _DTYPES:
            for case in self.cases():
                self._judge(case, dtype)

    def test_gradients_are_those_of_the_sum_times_whatever_comes_from_above(self) -> None:
        for case in self.cases():
            self._judge(case, torch.float32, upstream=-0.37)

    def test_gradients_summed_over_many_chunks_are_not_rounded_in_between(self) -> None:
        # one rounding of bfloat16 for each of 25 chunks would show; with this seed the case is a separated one
        self._judge(loss_case("many chunks", [200, 200], vocab=30, counted=1.0, seed=5), torch.bfloat16)

    def test_weights_that_differ_from_token_to_token_scale_each_token_alone(self) -> None:
        case = loss_case("one heavy token", [20, 20], counted=1.0, seed=12)
        weight_N = torch.full_like(case.batch.weight, 1e-3)
        weight_N[17] = 50.0
        self._judge(evolve(case, batch=evolve(case.batch, weight=weight_N)), torch.float32)

    def test_a_student_that_has_no_choice_gets_no_gradient(self) -> None:
        case = loss_case("one token in the vocabulary", vocab=1, dim=3, bias=True).rounded(torch.float32)
        assert not any(gradient.any() for gradient in evaluate_case(self.make(), case)[1])

    def test_tokens_that_do_not_count_may_hold_anything(self) -> None:
        case = loss_case("junk", [20, 20], counted=0.5, seed=13).rounded(torch.float32)
        off = (case.batch.weight == 0).nonzero()[:, 0]
        batch = _map_batch(case.batch, _STORED, lambda column: column.index_fill(0, off, torch.nan))
        dirty = evolve(case, hidden=case.hidden.index_fill(0, off, torch.nan), batch=batch)
        for mine, clean in zip(self._flat(dirty), self._flat(case), strict=True):
            assert torch.equal(mine, clean)
        assert not evaluate_case(self.make(), dirty)[1][0][off].any()

    def _flat(self, case: LossCase) -> list[Tensor]:
        output, gradients = evaluate_case(self.make(), case)
        return [*(getattr(output, name) for name in _SUMS), *gradients]

    def test_frozen_hidden_states_or_a_frozen_head_get_no_gradient_and_the_other_gets_its_own(self) -> None:
        case = loss_case("frozen", bias=True, seed=14).rounded(torch.float32)
        _, (expected_ND, expected_VD, _) = evaluate_case(self.make(), case)
        hidden_ND, head = case.leaves()
        self.make()(hidden_ND, case.head, case.batch).loss_sum.backward()
        self.make()(case.hidden, head, case.batch).loss_sum.backward()
        assert case.head.weight.grad is None
        for mine, expected in ((hidden_ND.grad, expected_ND), (head.weight.grad, expected_VD)):
            assert mine is not None
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)

    def test_a_head_that_is_part_of_a_padded_weight_gives_padding_no_gradient(self) -> None:
        case = loss_case("padded", seed=16).rounded(torch.float32)
        padded_VD = torch.cat([case.head.weight, torch.full((3, case.head.weight.shape[1]), torch.nan)]).requires_grad_()
        self.make()(case.hidden, LMHead(padded_VD[:-3]), case.batch).loss_sum.backward()
        assert padded_VD.grad is not None
        assert not padded_VD.grad[-3:].any()
        torch.testing.assert_close(padded_VD.grad[:-3], evaluate_case(self.make(), case)[1][1], rtol=0, atol=0)

    def test_tied_embeddings_get_the_gradients_of_both_uses(self) -> None:
        case = loss_case("tied", seed=17).rounded(torch.float64)

        def tied_gradient(loss: OPDLoss) -> Tensor:
            weight_VD = case.head.weight.clone().requires_grad_()
            hidden_ND = torch.nn.functional.embedding(case.batch.inputs, weight_VD).sin()
            return torch.autograd.grad(loss(hidden_ND, LMHead(weight_VD), case.batch).loss_sum, weight_VD)[0]

        torch.testing.assert_close(tied_gradient(self.make()), tied_gradient(self.reference()))

    def test_without_gradients_it_says_the_same_and_asks_for_none(self) -> None:
        case = loss_case("no gradient", [30, 9], bias=True, seed=18).rounded(torch.float64)
        trained, _ = evaluate_case(self.make(), case)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                hidden_ND, head = case.leaves()
                output = self.make()(hidden_ND, head, case.batch)
            assert not output.loss_sum.requires_grad
            for name in _SUMS:
                torch.testing.assert_close(getattr(output, name), getattr(trained, name).detach())

    def test_the_sums_of_two_micro_batches_are_those_of_both_in_one(self) -> None:
        case = loss_case("split", [20, 5, 30], seed=19).rounded(torch.float64)
        parts = [evaluate_case(self.make(), case.part(rows)) for rows in (slice(0, 25), slice(25, None))]
        whole, gradients = evaluate_case(self.make(), case)
        torch.testing.assert_close(parts[0][1][1] + parts[1][1][1], gradients[1])
        torch.testing.assert_close(torch.cat([parts[0][1][0], parts[1][1][0]]), gradients[0])
        for name in _SUMS:
            torch.testing.assert_close(sum(getattr(part, name) for part, _ in parts), getattr(whole, name))

    def test_what_is_reported_beside_the_loss_carries_no_gradient(self) -> None:
        output, _ = evaluate_case(self.make(), loss_case("reported").rounded(torch.float32))
        assert output.loss_sum.requires_grad
        assert not any(getattr(output, name).requires_grad for name in _SUMS[1:])


def _absolute_sum(loss: OPDLoss, case: LossCase) -> float:
    """The sum of absolute values over tokens: a weighted sum of losses is linear in the weights, so its derivatives are those losses."""
    weight_N = case.batch.weight.clone().requires_grad_()
    total = loss(case.hidden, case.head, evolve(case.batch, weight=weight_N)).loss_sum
    (losses_N,) = torch.autograd.grad(total, weight_N, materialize_grads=True, allow_unused=True)
    scores_N = sum(column.abs() for column in (case.batch.teacher_logprobs, case.batch.ref_logprobs) if column is not None)
    return float((weight_N * (losses_N.abs() + scores_N + 1)).sum().detach())
