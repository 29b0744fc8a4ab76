r"""The contract of an `OPDLoss`, one test a clause: a path that saves memory or time must be as exact as the plain one.

Each value and gradient is judged against the plain loss in float64, on the very same inputs: per element,
\(\lvert x - x_{64}\rvert \le \lvert x_{plain} - x_{64}\rvert + \epsilon\), where \(\epsilon\) is a few roundings of float32, and one of the
gradient's own dtype.  A gradient may also be off by what follows from rounding, once each, both factors of its products (`operand_roundings`) to
float32, or on CUDA to bfloat16 if the student computes in that; log-probs and sums may not, as weights and hidden states here need no rounding.

Shape suffixes: N tokens of a batch, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from attrs import evolve
from torch import Tensor

from lopd.losses import chunked
from lopd.protocols import OPDLoss
from lopd.records.steps import Batch, LMHead, LossOutput
from lopd.testing.loss_cases import DTYPES, ROUNDINGS, STORED, LossCase, loss_case, loss_cases, map_batch

_NOTHING = 1e-13  # what float64 itself leaves of terms of order 1 that cancel
_SUMS = ("loss_sum", "reverse_kl_sum", "clipped_sum")

#: By hidden states, head weight and, if there is one, head bias.
Gradients = Sequence[Tensor]


def evaluate_case(loss: OPDLoss, case: LossCase, upstream: float = 1.0) -> tuple[LossOutput, Gradients]:
    """Return the result of the loss on the case, and the gradients of `upstream` times its sum."""
    hidden_ND, head = case.leaves()
    output = loss(hidden_ND, head, case.batch)
    wanted = [hidden_ND, head.weight] if head.bias is None else [hidden_ND, head.weight, head.bias]
    return output, torch.autograd.grad(upstream * output.loss_sum, wanted)


def assert_at_least_as_exact(
    name: str, mine: Tensor, plain: Tensor, truth: Tensor, largest: float | None = None, *, slack: Tensor | float = 0.0
) -> None:
    """Check that each element is at most as far from the truth as the plain path, up to a few roundings; name the worst.

    Args:
        name: what is compared.
        mine: what is judged, in its own dtype.
        plain: the plain path, in the same.
        truth: in float64.
        largest: largest summand, where sums may cancel; the largest element of the truth if None.
        slack: how much further each element may be.
    """
    assert mine.dtype == plain.dtype, f"{name}: dtype {mine.dtype}, expected {plain.dtype}"
    assert mine.shape == truth.shape, f"{name}: shape {tuple(mine.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    # float64 is its own truth, and an importance ratio multiplies the rounding of a log-prob by the log-prob
    unit = max(torch.finfo(torch.promote_types(mine.dtype, torch.float32)).eps, 1e-13)
    rounding = unit * (float(truth.abs().max()) if largest is None else largest)
    allowed = (plain.double() - truth).abs() + torch.finfo(mine.dtype).eps * truth.abs() + ROUNDINGS * rounding + _NOTHING + slack
    excess = ((mine.double() - truth).abs() / allowed).flatten()
    worst = int(excess.nan_to_num(nan=torch.inf).argmax())
    values = [float(t.flatten()[worst]) for t in (mine, truth, plain)]
    assert excess[worst] <= 1, f"{name}: element {worst} is {values[0]:.8g}, expected {values[1]:.8g} (plain: {values[2]:.8g})"


def operand_roundings(loss: OPDLoss, case: LossCase, dtype: torch.dtype) -> Gradients:
    """Return how far each element of the gradients may move where the factors of its products are rounded to a dtype: at most one unit of their size.

    Args:
        loss: the plain one.
        case: in float64.
        dtype: type of the factors: gradients by the logits, hidden states times the coefficient of a row, and weights.
    """
    # logits as hidden states, before an identity, have the gradient by the logits
    logits_NV = (case.hidden @ case.head.weight.T).requires_grad_()
    identity = evolve(case.head, weight=torch.eye(len(case.head.weight), dtype=logits_NV.dtype, device=logits_NV.device))
    (gradient_NV,) = torch.autograd.grad(loss(logits_NV, identity, case.batch).loss_sum, logits_NV)
    sizes_NV = gradient_NV.abs() * torch.finfo(dtype).eps
    return sizes_NV @ case.head.weight.abs(), sizes_NV.T @ case.hidden.abs(), sizes_NV.sum(0)


class LossConformance:
    """Every clause of the `OPDLoss` contract, as one test each.  Subclass it, and supply `make` and `reference`."""

    #: Where it is tried.
    device = torch.device("cpu")

    def rounds_operands(self) -> bool:
        """Return whether products by the gradient may round their factors to bfloat16 where the student computes in it: on CUDA."""
        return self.device.type == "cuda"

    def make(self) -> OPDLoss:
        """Return the loss under test, with as little memory as it can do with, so that small cases take several chunks.

        lopd's own chunks have at most 16 rows in a forward pass, whatever the `Chunking`.
        """
        raise NotImplementedError

    def reference(self) -> OPDLoss:
        """Return the same equation in plain torch, in whatever dtype it is given."""
        raise NotImplementedError

    def cases(self) -> Sequence[LossCase]:
        """Return what it is tried on: add your own, or return `separated_loss_cases` for a loss that ranks tokens."""
        return loss_cases()

    def _made(self) -> OPDLoss:
        made = self.make()

        def loss(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
            with patch.object(chunked, "chunk_rows", lambda _, count, *_rest: max(min(count, 16), 1)):
                return made(hidden_ND, head, batch)

        return loss

    def _case(self, *arguments: Any, **options: Any) -> LossCase:
        return loss_case(*arguments, **options).to(self.device)

    def _cases(self) -> list[LossCase]:
        return [case.to(self.device) for case in self.cases()]

    def _judge(self, case: LossCase, dtype: torch.dtype, upstream: float = 1.0) -> None:
        rounded = case.rounded(dtype)
        mine, mine_gradients = evaluate_case(self._made(), rounded, upstream)
        plain, plain_gradients = evaluate_case(self.reference(), rounded, upstream)
        truth, true_gradients = evaluate_case(self.reference(), rounded.rounded(torch.float64), upstream)
        label = f"{case.name}, {dtype}"
        computes = case.head.compute_dtype or dtype
        coarse = self.rounds_operands() and computes == torch.bfloat16
        factors = computes if coarse else torch.promote_types(dtype, torch.float32)
        slack = operand_roundings(self.reference(), rounded.rounded(torch.float64), factors)
        largest = _absolute_sum(self.reference(), rounded.rounded(torch.float64))
        for name in _SUMS:
            got, expected, exact = (getattr(output, name).detach() for output in (mine, plain, truth))
            assert_at_least_as_exact(f"{label}, {name}", got, expected, exact, largest)
        if mine.logprobs is not None:
            expected_M, exact_M = (_own_logprobs(each) for each in (rounded, rounded.rounded(torch.float64)))
            logit = float(rounded.head.logits(rounded.hidden).abs().max())
            assert_at_least_as_exact(f"{label}, logprobs", mine.logprobs.detach().to(expected_M.dtype), expected_M, exact_M, logit)
        gradients = zip(("hidden", "weight", "bias"), mine_gradients, plain_gradients, true_gradients, slack, strict=False)
        for name, got, expected, exact, more in gradients:
            assert_at_least_as_exact(f"{label}, gradient by {name}", got, expected, exact, slack=abs(upstream) * more)

    def test_sums_and_gradients_are_as_exact_as_the_plain_ones_in_every_dtype(self) -> None:
        for dtype in DTYPES:
            for case in self._cases():
                self._judge(case, dtype)

    def test_float32_weights_of_a_student_that_computes_in_bfloat16_are_as_exact(self) -> None:
        for case in self._cases():
            held = case.rounded(torch.bfloat16).rounded(torch.float64)  # values that bfloat16 has too
            self._judge(evolve(held, head=evolve(held.head, compute_dtype=torch.bfloat16)), torch.float32)

    def test_gradients_are_those_of_the_sum_times_whatever_comes_from_above(self) -> None:
        for case in self._cases():
            self._judge(case, torch.float32, upstream=-0.37)

    def test_gradients_summed_over_many_chunks_are_not_rounded_in_between(self) -> None:
        # in one direction, so that terms do not cancel: the roundings of 50 chunks then exceed those of all operands; with this seed it is separated
        case = self._case("many chunks", [50] * 16, vocab=30, counted=1.0, seed=7)
        batch = evolve(case.batch, targets=torch.zeros_like(case.batch.targets), teacher_logprobs=torch.zeros_like(case.batch.weight))
        self._judge(evolve(case, hidden=case.hidden.abs(), batch=batch), torch.bfloat16)

    def test_weights_that_differ_from_token_to_token_scale_each_token_alone(self) -> None:
        case = self._case("one heavy token", [20, 20], counted=1.0, seed=12)
        weight_N = torch.full_like(case.batch.weight, 1e-3)
        weight_N[17] = 50.0
        self._judge(evolve(case, batch=evolve(case.batch, weight=weight_N)), torch.float32)

    def test_a_student_that_has_no_choice_gets_no_gradient(self) -> None:
        case = self._case("one token in the vocabulary", vocab=1, dim=3, bias=True).rounded(torch.float32)
        assert not any(gradient.any() for gradient in evaluate_case(self._made(), case)[1])

    def test_tokens_that_do_not_count_may_hold_anything(self) -> None:
        case = self._case("junk", [20, 20], counted=0.5, seed=13, heated=True, drawn=2).rounded(torch.float32)
        assert not [name for name in STORED if getattr(case.batch, name) is None]
        off = (case.batch.weight == 0).nonzero()[:, 0]
        batch = map_batch(case.batch, STORED, lambda column: column.index_fill(0, off, torch.nan))
        dirty = evolve(case, hidden=case.hidden.index_fill(0, off, torch.nan), batch=batch)
        for mine, clean in zip(self._flat(dirty), self._flat(case), strict=True):
            assert torch.equal(mine, clean)
        assert not evaluate_case(self._made(), dirty)[1][0][off].any()

    def _flat(self, case: LossCase) -> list[Tensor]:
        output, gradients = evaluate_case(self._made(), case)
        return [*(getattr(output, name) for name in _SUMS), *gradients]

    def test_frozen_hidden_states_or_a_frozen_head_get_no_gradient_and_the_other_gets_its_own(self) -> None:
        case = self._case("frozen", bias=True, seed=14).rounded(torch.float32)
        _, (expected_ND, expected_VD, _) = evaluate_case(self._made(), case)
        hidden_ND, head = case.leaves()
        self._made()(hidden_ND, case.head, case.batch).loss_sum.backward()
        self._made()(case.hidden, head, case.batch).loss_sum.backward()
        assert case.head.weight.grad is None
        for mine, expected in ((hidden_ND.grad, expected_ND), (head.weight.grad, expected_VD)):
            assert mine is not None
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)

    def test_a_head_that_is_part_of_a_padded_weight_gives_padding_no_gradient(self) -> None:
        case = self._case("padded", seed=16).rounded(torch.float32)
        padded_VD = torch.cat([case.head.weight, case.head.weight.new_full((3, case.head.weight.shape[1]), torch.nan)]).requires_grad_()
        self._made()(case.hidden, LMHead(padded_VD[:-3]), case.batch).loss_sum.backward()
        assert padded_VD.grad is not None
        assert not padded_VD.grad[-3:].any()
        torch.testing.assert_close(padded_VD.grad[:-3], evaluate_case(self._made(), case)[1][1], rtol=0, atol=0)

    def test_tied_embeddings_get_the_gradients_of_both_uses(self) -> None:
        case = self._case("tied", seed=17).rounded(torch.float64)

        def tied_gradient(loss: OPDLoss) -> Tensor:
            weight_VD = case.head.weight.clone().requires_grad_()
            hidden_ND = torch.nn.functional.embedding(case.batch.inputs, weight_VD).sin()
            return torch.autograd.grad(loss(hidden_ND, LMHead(weight_VD), case.batch).loss_sum, weight_VD)[0]

        torch.testing.assert_close(tied_gradient(self._made()), tied_gradient(self.reference()))

    def test_without_gradients_it_says_the_same_and_asks_for_none(self) -> None:
        case = self._case("no gradient", [30, 9], bias=True, seed=18).rounded(torch.float64)
        trained, _ = evaluate_case(self._made(), case)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                hidden_ND, head = case.leaves()
                output = self._made()(hidden_ND, head, case.batch)
            assert not output.loss_sum.requires_grad
            for name in _SUMS:
                torch.testing.assert_close(getattr(output, name), getattr(trained, name).detach())

    def test_the_sums_of_two_micro_batches_are_those_of_both_in_one(self) -> None:
        case = self._case("split", [20, 5, 30], seed=19).rounded(torch.float64)
        parts = [evaluate_case(self._made(), case.part(rows)) for rows in (slice(0, 25), slice(25, None))]
        whole, gradients = evaluate_case(self._made(), case)
        torch.testing.assert_close(parts[0][1][1] + parts[1][1][1], gradients[1])
        torch.testing.assert_close(torch.cat([parts[0][1][0], parts[1][1][0]]), gradients[0])
        for name in _SUMS:
            torch.testing.assert_close(sum(getattr(part, name) for part, _ in parts), getattr(whole, name))

    def test_twice_the_weights_of_one_rollout_give_twice_its_part_and_change_no_other(self) -> None:
        case = self._case("weights", [20, 5, 30], seed=21).rounded(torch.float64)
        times_N = torch.where(case.batch.segment_ids == 2, 2.0, 1.0)
        (more, more_gradients), (once, gradients), (part, _) = (
            evaluate_case(self._made(), each)
            for each in (evolve(case, batch=evolve(case.batch, weight=times_N * case.batch.weight)), case, case.part(slice(25, None)))
        )
        for name in _SUMS:
            torch.testing.assert_close(
                getattr(more, name), getattr(once, name) + getattr(part, name), msg=f"{name} is not linear in the weights"
            )
        torch.testing.assert_close(more_gradients[0], times_N[:, None] * gradients[0])

    def test_what_is_reported_beside_the_loss_carries_no_gradient(self) -> None:
        output, _ = evaluate_case(self._made(), self._case("reported").rounded(torch.float32))
        assert output.loss_sum.requires_grad
        assert not any(getattr(output, name).requires_grad for name in _SUMS[1:])
        assert output.logprobs is None or not output.logprobs.requires_grad


def _own_logprobs(case: LossCase) -> Tensor:
    """Return (M,): the student's log-probs of the targets that count."""
    logprobs_MV = case.head.logits(case.hidden[case.batch.counted]).log_softmax(-1)
    return logprobs_MV.gather(-1, case.batch.targets[case.batch.counted, None]).squeeze(-1)


def _absolute_sum(loss: OPDLoss, case: LossCase) -> float:
    """Return the sum of absolute values over tokens: a weighted sum of losses is linear in the weights, so its derivatives are those losses."""
    weight_N = case.batch.weight.clone().requires_grad_()
    total = loss(case.hidden, case.head, evolve(case.batch, weight=weight_N)).loss_sum
    total = total + 0 * weight_N.sum()  # a loss may forget the weights
    (losses_N,) = torch.autograd.grad(total, weight_N)
    scores_N = sum(column.abs() for column in (case.batch.teacher_logprobs, case.batch.ref_logprobs) if column is not None)
    return float((weight_N * (losses_N.abs() + scores_N + 1)).sum().detach())
