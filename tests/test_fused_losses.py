"""The fused losses against the plain ones, and every trap that fused losses of other projects fell into."""

from collections.abc import Callable, Sequence

import pytest
import suite_cases
import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.errors import GradientError, InvalidRecordError
from lopd.losses import chunking
from lopd.losses.chunked import ChunkedHead, selected_logprobs
from lopd.losses.chunking import Chunking
from lopd.losses.fused import FusedLoss, FusedOPDLoss, FusedSFTLoss
from lopd.losses.objective import OPDObjective, Signal
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.protocols import OPDLoss
from lopd.records import Batch, LMHead, LossOutput
from lopd.testing import LossCase, LossConformance, assert_at_least_as_exact, loss_case, loss_cases
from lopd.testing.losses import evaluate_case

SMALL = Chunking(chunk_bytes=1)  # the fewest rows a chunk can have, 16


class TestFusedOPDLoss(LossConformance):
    def make(self) -> OPDLoss:
        return FusedOPDLoss(chunking=SMALL)

    def reference(self) -> OPDLoss:
        return ReferenceOPDLoss()


class TestFusedOPDLossWithoutAClip(TestFusedOPDLoss):
    def make(self) -> OPDLoss:
        return FusedOPDLoss(clip=None)

    def reference(self) -> OPDLoss:
        return ReferenceOPDLoss(clip=None)


class TestFusedOPDLossWithRatio(TestFusedOPDLoss):
    def make(self) -> OPDLoss:
        return FusedOPDLoss(clip=1.0, ratio_to_ref=True, chunking=SMALL)

    def reference(self) -> OPDLoss:
        return ReferenceOPDLoss(clip=1.0, ratio_to_ref=True)


class TestFusedOPDLossAsOnCUDA(TestFusedOPDLoss):
    """Where the device would add products of bfloat16 up in float32; the products themselves are emulated."""

    @pytest.fixture(autouse=True)
    def _device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chunking, "multiplies", lambda *_: True)

    def rounds_operands(self) -> bool:
        return True


class TestFusedSFTLoss(LossConformance):
    def make(self) -> OPDLoss:
        return FusedSFTLoss(SMALL)

    def reference(self) -> OPDLoss:
        return SFTLoss()


def unmarked(signal: Signal) -> Signal:
    return evolve(signal, weight=2 * signal.weight)


class TestFusedOPDLossThatRecomputes(LossConformance):
    def make(self) -> OPDLoss:
        return FusedOPDLoss(transforms=(unmarked,), chunking=SMALL)

    def reference(self) -> OPDLoss:
        return ReferenceOPDLoss(transforms=(unmarked,))


class TestReferenceOPDLoss(LossConformance):
    def make(self) -> OPDLoss:
        return ReferenceOPDLoss()

    def reference(self) -> OPDLoss:
        return ReferenceOPDLoss()


# What fused losses of other projects got wrong, each as a test (the issues are named where there is one).


def log_probs(case: LossCase, ids: Tensor | None = None, chunking: Chunking = SMALL) -> Tensor:
    return selected_logprobs(case.hidden, case.head, case.batch.targets if ids is None else ids, chunking)


def plain_log_probs(case: LossCase, ids: Tensor | None = None) -> Tensor:
    ids_NK = (case.batch.targets if ids is None else ids).view(len(case.hidden), -1)
    return case.head.logits(case.hidden).log_softmax(-1).gather(-1, ids_NK).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_01_log_probs_are_never_above_zero_and_right_where_all_logits_are_far_below_it(dtype: torch.dtype) -> None:
    for case in loss_cases():
        rounded = case.rounded(dtype)
        logprobs_N = log_probs(rounded)
        assert (logprobs_N <= 0).all(), case.name
        assert_at_least_as_exact(case.name, logprobs_N, plain_log_probs(rounded), plain_log_probs(rounded.rounded(torch.float64)))


@pytest.mark.parametrize("count", [None, 1, 3])
def test_trap_02_selected_log_probs_take_another_upstream_gradient_for_each_token_and_id(count: int | None) -> None:
    for case in loss_cases():
        shape = (len(case.hidden),) if count is None else (len(case.hidden), count)
        ids, upstream = torch.randint(0, len(case.head.weight), shape), torch.randn(shape, dtype=torch.float64)
        gradients = []
        for dtype, function in ((torch.float32, log_probs), (torch.float32, plain_log_probs), (torch.float64, plain_log_probs)):
            rounded = case.rounded(torch.float32).rounded(dtype)
            hidden_ND, head = rounded.leaves()
            logprobs = function(evolve(rounded, hidden=hidden_ND, head=head), ids).view(shape)
            wanted = [hidden_ND, head.weight] if head.bias is None else [hidden_ND, head.weight, head.bias]
            gradients.append(torch.autograd.grad((logprobs * upstream.to(dtype)).sum(), wanted))
        largest = float(upstream.abs().sum() * max(case.hidden.abs().max(), case.head.weight.abs().max(), 1)) if upstream.numel() else 0.0
        for mine, plain, truth in zip(*gradients, strict=True):
            assert_at_least_as_exact(case.name, mine, plain, truth, largest / 4)


def test_trap_02_upstream_gradients_that_add_up_to_zero_in_each_row_are_not_lost() -> None:
    case = loss_case("zero sum", [20, 20], seed=20)
    ids = torch.randint(0, 67, (40, 2))
    gradients = []
    for function in (log_probs, plain_log_probs):
        hidden_ND, head = case.leaves()
        first, second = function(evolve(case, hidden=hidden_ND, head=head), ids).unbind(-1)
        gradients.append(torch.autograd.grad((first - second).sum(), (hidden_ND, head.weight)))
    torch.testing.assert_close(*gradients)


def test_trap_02_the_same_id_twice_in_a_row_gets_both_gradients() -> None:
    case = loss_case("twice", [5], seed=21)
    hidden_ND, head = case.leaves()
    ids = case.batch.targets[:, None].expand(-1, 2)
    twice = selected_logprobs(hidden_ND, head, ids, SMALL).sum()
    once = selected_logprobs(hidden_ND, head, ids[:, 0], SMALL).sum()
    mine, expected = (torch.autograd.grad(value, (hidden_ND, head.weight)) for value in (twice, 2 * once))
    torch.testing.assert_close(mine, expected)


def test_trap_03_gradients_of_a_bfloat16_head_are_rounded_once_however_many_chunks_there_are() -> None:
    case = loss_case("many chunks", [200, 200], vocab=30, counted=1.0, seed=11).rounded(torch.bfloat16)
    few, many = (
        evaluate_case(FusedOPDLoss(chunking=chunking), case.rounded(torch.bfloat16))[1]
        for chunking in (Chunking(), Chunking(chunk_bytes=1))
    )
    exact = evaluate_case(ReferenceOPDLoss(), case.rounded(torch.float64))[1]
    for gradients in (few, many):
        for mine, truth in zip(gradients, exact, strict=True):
            error = (mine.double() - truth).abs()
            assert (error <= 2**-8 * truth.abs() + 1e-5 * truth.abs().max()).all()


def test_trap_04_log_probs_of_a_bfloat16_model_are_those_of_float32_logits_whatever_is_multiplied() -> None:
    case = loss_case("bfloat16", [50], vocab=500, dim=64, size=4.0, seed=22, scale=0.3, bias=True).rounded(torch.bfloat16)
    exact_N = plain_log_probs(case.rounded(torch.float64))
    for dtype in (None, torch.bfloat16, torch.float32):
        logprobs_N = log_probs(case, chunking=Chunking(matmul_dtype=dtype))
        assert logprobs_N.dtype == torch.float32
        assert (logprobs_N - exact_N).abs().max() < 1e-5


def test_trap_04_a_float32_model_that_is_multiplied_in_bfloat16_has_the_log_probs_of_its_rounded_weights() -> None:
    case = loss_case("float32", [50], vocab=500, dim=64, size=4.0, seed=22).rounded(torch.float32)
    rounded = case.rounded(torch.bfloat16).rounded(torch.float64)
    torch.testing.assert_close(
        log_probs(case, chunking=Chunking(matmul_dtype=torch.bfloat16)).double(), plain_log_probs(rounded), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_04_bfloat16_products_change_gradients_by_no_more_than_a_few_of_their_roundings(dtype: torch.dtype) -> None:
    case = loss_case("bfloat16", [50], vocab=500, dim=64, counted=1.0, seed=23).rounded(dtype)
    fast = evaluate_case(FusedOPDLoss(chunking=Chunking(matmul_dtype=torch.bfloat16)), case)[1]
    exact = evaluate_case(ReferenceOPDLoss(), case.rounded(torch.float64))[1]
    for mine, truth in zip(fast, exact, strict=True):
        assert mine.dtype == dtype
        assert 1e-4 < float((mine.double() - truth).norm() / truth.norm()) < 0.01


def test_the_dtype_of_operands_is_what_the_student_computes_in_where_the_device_adds_its_products_up_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = loss_case("dtypes").rounded(torch.float32)

    def operands(weight: torch.dtype, computes: torch.dtype | None = None, wanted: torch.dtype | None = None) -> torch.dtype:
        head = evolve(case.head, weight=case.head.weight.to(weight), compute_dtype=computes)
        return chunking.dtypes_of(Chunking(matmul_dtype=wanted), case.hidden.to(weight), head)[0]

    assert operands(torch.bfloat16) == operands(torch.float32, torch.bfloat16) == torch.float32
    monkeypatch.setattr(chunking, "multiplies", lambda *_: True)
    assert operands(torch.bfloat16) == operands(torch.float32, torch.bfloat16) == torch.bfloat16
    assert operands(torch.float32) == operands(torch.bfloat16, wanted=torch.float32) == torch.float32
    # float16 cannot hold small gradients, and float64 loses nothing
    assert operands(torch.float16) == operands(torch.float32, torch.float16) == torch.float32
    assert operands(torch.float64) == operands(torch.float64, torch.bfloat16) == torch.float64


def test_a_chunk_on_cuda_takes_its_size_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    row, gpu = 4 * 151_936, torch.device("cuda")
    for free, rows in ((80 << 30, 4096), (6 << 30, 2048), (2 << 30, 1024), (1 << 30, 512), (0, 16)):
        monkeypatch.setattr(chunking, "free_bytes", lambda _, free=free: free)
        assert chunking.chunk_rows(Chunking(), 10**9, row, gpu) == rows
    assert chunking.chunk_rows(Chunking(chunk_bytes=100 * row), 10**9, row, gpu) == 96
    assert chunking.chunk_rows(Chunking(), 10**9, row, torch.device("cpu")) == 240


@pytest.mark.parametrize("dim", [8, 256])
def test_trap_05_rows_of_a_chunk_follow_from_bytes_and_not_from_the_hidden_size(dim: int, products: "Recorded") -> None:
    case = loss_case("bytes", [100], vocab=1000, dim=dim, counted=1.0).rounded(torch.float32)
    FusedOPDLoss(chunking=Chunking(chunk_bytes=33 * 1000 * 4))(*case.leaves(), case.batch)
    assert [len(out) for out in products.logits] == [32, 32, 32, 4]


def test_trap_05_a_cap_on_the_logits_needs_a_second_buffer_and_so_takes_half_the_rows(products: "Recorded") -> None:
    case = loss_case("bytes", [40], vocab=1000, counted=1.0, softcap=3.0).rounded(torch.float32)
    FusedOPDLoss(chunking=Chunking(chunk_bytes=32 * 1000 * 4))(*case.leaves(), case.batch)
    assert [len(out) for out in products.logits] == [16, 16, 8]


class Recorded:
    """What went through the matrix products."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.hidden_gradients = self.weight_gradients = 0


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    from lopd.losses.products import Products

    recorded, plain = Recorded(), {name: getattr(Products, name) for name in ("logits", "hidden_gradient", "weight_gradient")}

    def logits(self: Products, hidden_CD: Tensor, bias_V: Tensor | None, out_CV: Tensor) -> None:
        recorded.logits.append(out_CV)
        plain["logits"](self, hidden_CD, bias_V, out_CV)

    def hidden_gradient(self: Products, *arguments: Tensor) -> None:
        recorded.hidden_gradients += 1
        plain["hidden_gradient"](self, *arguments)

    def weight_gradient(self: Products, *arguments: Tensor, first: bool) -> None:
        recorded.weight_gradients += 1
        plain["weight_gradient"](self, *arguments, first=first)

    for function in (logits, hidden_gradient, weight_gradient):
        monkeypatch.setattr(Products, function.__name__, function)
    return recorded


def test_trap_06_tokens_that_do_not_count_never_meet_the_head(products: Recorded) -> None:
    case = loss_case("prompts", [200], counted=0.1, seed=24).rounded(torch.float32)
    FusedOPDLoss(chunking=SMALL)(*case.leaves(), case.batch)
    assert sum(len(out) for out in products.logits) == int((case.batch.weight > 0).sum()) < 50


def test_trap_07_a_frozen_head_costs_no_product_for_its_gradient(products: Recorded) -> None:
    case = loss_case("frozen", [20], seed=25).rounded(torch.float32)
    FusedOPDLoss()(case.hidden.clone().requires_grad_(), case.head, case.batch)
    assert (products.hidden_gradients, products.weight_gradients) == (1, 0)


def test_trap_07_a_loss_of_which_no_gradient_is_wanted_costs_one_product(products: Recorded) -> None:
    case = loss_case("evaluation", [20], seed=26).rounded(torch.float32)
    FusedOPDLoss()(case.hidden, case.head, case.batch)
    with torch.no_grad():
        FusedOPDLoss()(*case.leaves(), case.batch)
    assert (len(products.logits), products.hidden_gradients, products.weight_gradients) == (2, 0, 0)


def test_the_gradient_is_made_in_the_forward_pass_with_three_products_a_chunk_and_recomputed_with_four(products: Recorded) -> None:
    case = loss_case("products", [40], counted=1.0, seed=27).rounded(torch.float32)
    for transforms, logits in (((), 3), ((unmarked,), 6)):
        products.__init__()
        FusedOPDLoss(transforms=transforms, chunking=SMALL)(*case.leaves(), case.batch).loss_sum.backward()
        assert (len(products.logits), products.hidden_gradients, products.weight_gradients) == (logits, 3, 3)
    # one buffer of 16 rows, whatever the number of tokens
    assert {out.untyped_storage().nbytes() for out in products.logits} == {16 * 67 * 4}


@pytest.mark.parametrize("shape", [(15, 67), (1, 15, 12), (12,)])
def test_trap_09_logits_in_the_place_of_hidden_states_are_refused(shape: tuple[int, ...]) -> None:
    case = loss_case("confusion")
    with pytest.raises(InvalidRecordError, match=r"hidden states have shape .*expected \(tokens, 12\).*not logits"):
        selected_logprobs(torch.zeros(shape, dtype=torch.float64), case.head, case.batch.targets)


def test_trap_10_log_probs_are_those_of_scaled_logits() -> None:
    case = loss_case("scale", scale=0.25)
    flat = evolve(case, head=evolve(case.head, scale=1.0, weight=0.25 * case.head.weight))
    torch.testing.assert_close(log_probs(case), log_probs(flat))


def test_finite_differences_agree_with_selected_log_probs_through_bias_cap_and_scale() -> None:
    case = loss_case("finite", [3], vocab=7, dim=4, bias=True, softcap=2.0, scale=0.7)
    ids = torch.randint(0, 7, (3, 2))

    def function(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return selected_logprobs(hidden_ND, LMHead(weight_VD, bias_V, 2.0, 0.7), ids)

    hidden_ND, head = case.leaves()
    assert head.bias is not None
    assert torch.autograd.gradcheck(function, (hidden_ND, head.weight, head.bias))


@pytest.mark.parametrize("transforms", [(), (unmarked,)], ids=["three products", "four products"])
def test_a_gradient_of_the_gradient_is_refused(transforms: tuple[Callable[[Signal], Signal], ...]) -> None:
    case = loss_case("second order")
    hidden_ND, head = case.leaves()
    output = FusedOPDLoss(transforms=transforms)(hidden_ND, head, case.batch)
    with pytest.raises(GradientError, match="create_graph"):
        torch.autograd.grad(output.loss_sum, hidden_ND, create_graph=True)


def test_a_second_backward_pass_is_refused() -> None:
    case = loss_case("twice")
    hidden_ND, head = case.leaves()
    output = FusedOPDLoss()(hidden_ND, head, case.batch)
    output.loss_sum.backward(retain_graph=True)
    with pytest.raises(GradientError, match="second time"):
        output.loss_sum.backward()


def test_a_chunking_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidRecordError, match="chunk_bytes is 0"):
        Chunking(chunk_bytes=0)
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(InvalidRecordError, match="matmul_dtype is"):
            Chunking(matmul_dtype=dtype)


def test_autocast_around_the_loss_changes_nothing() -> None:
    case = loss_case("autocast", [20], bias=True, seed=28).rounded(torch.float32)
    _, plain = evaluate_case(FusedOPDLoss(), case)
    hidden_ND, head = case.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = FusedOPDLoss()(hidden_ND, head, case.batch)
    assert head.bias is not None
    for mine, expected in zip(torch.autograd.grad(output.loss_sum, (hidden_ND, head.weight, head.bias)), plain, strict=True):
        assert torch.equal(mine, expected)


# The suite must catch what is wrong.


@frozen(eq=False)
class Mutant:
    """A loss as somebody might get it wrong: `per_token` takes (M, V) logits, targets and the teacher's log-probs of the counted tokens."""

    name: str
    per_token: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        on_N = batch.weight > 0
        assert batch.teacher_logprobs is not None
        expected = ReferenceOPDLoss(clip=None)(
            hidden_ND.detach(), evolve(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach()), batch
        )
        losses_M = self.per_token(head.logits(hidden_ND[on_N]), batch.targets[on_N][:, None], batch.teacher_logprobs[on_N])
        return LossOutput((batch.weight[on_N] * losses_M).sum(), expected.reverse_kl_sum, expected.clipped_sum)


def own(logits_MV: Tensor, targets_M1: Tensor) -> Tensor:
    return logits_MV.log_softmax(-1).gather(-1, targets_M1)[:, 0]


def right(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    student_M = own(logits_MV, targets_M1)
    return -(teacher_M - student_M).detach() * student_M


def wrong_sign(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    return -right(logits_MV, targets_M1, teacher_M)


def missing_detach(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    student_M = own(logits_MV, targets_M1)
    return -(teacher_M - student_M) * student_M


def rounded_logits(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    return right(logits_MV.bfloat16().to(logits_MV.dtype), targets_M1, teacher_M)


def largest_starts_at_zero(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    largest_M1 = logits_MV.amax(-1, keepdim=True).clamp(min=0)
    student_M = (logits_MV - largest_M1 - (logits_MV - largest_M1).exp().sum(-1, keepdim=True).log()).gather(-1, targets_M1)[:, 0]
    return -(teacher_M - student_M).detach() * student_M


def upstream_of_the_first_token(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    student_M = own(logits_MV, targets_M1)
    advantages_M = (teacher_M - student_M).detach()
    return -advantages_M * student_M.detach() - advantages_M[:1] * (student_M - student_M.detach())


def half_the_gradient(logits_MV: Tensor, targets_M1: Tensor, teacher_M: Tensor) -> Tensor:
    losses_M = right(logits_MV, targets_M1, teacher_M)
    return losses_M / 2 + losses_M.detach() / 2


PLAIN = ReferenceOPDLoss(clip=None)


def broken_clauses(
    loss: OPDLoss, reference: OPDLoss = PLAIN, cases: Callable[[], Sequence[LossCase]] = loss_cases, *, rounding: bool = False
) -> list[str]:
    """Return the clauses of the suite that this loss fails on these cases, `rounding` as on CUDA."""

    class Suite(LossConformance):
        def rounds_operands(self) -> bool:
            return rounding

        def make(self) -> OPDLoss:
            return loss

        def reference(self) -> OPDLoss:
            return reference

        def cases(self) -> Sequence[LossCase]:
            return cases()

    return suite_cases.broken_clauses(Suite())


def test_the_suite_accepts_the_right_equation_written_by_hand() -> None:
    assert broken_clauses(Mutant("right", right)) == []


@pytest.mark.parametrize(
    "mutant",
    [wrong_sign, missing_detach, rounded_logits, largest_starts_at_zero, upstream_of_the_first_token, half_the_gradient],
    ids=lambda mutant: mutant.__name__,
)
def test_the_suite_rejects_a_loss_that_is_wrong(mutant: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert "test_sums_and_gradients_are_as_exact_as_the_plain_ones_in_every_dtype" in broken_clauses(Mutant(mutant.__name__, mutant))


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (lambda logprobs_M, hidden_ND: logprobs_M.flip(0), "test_sums_and_gradients_are_as_exact_as_the_plain_ones_in_every_dtype"),
        (lambda logprobs_M, hidden_ND: logprobs_M + 0 * hidden_ND.sum(), "test_what_is_reported_beside_the_loss_carries_no_gradient"),
    ],
    ids=["of other tokens", "with a gradient"],
)
def test_the_suite_rejects_log_probs_that_are_wrong(change: Callable[[Tensor, Tensor], Tensor], clause: str) -> None:
    def loss(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        output = PLAIN(hidden_ND, head, batch)
        assert output.logprobs is not None
        return evolve(output, logprobs=change(output.logprobs, hidden_ND))

    assert clause in broken_clauses(loss, cases=lambda: [loss_case("some of everything")])


def test_a_part_of_a_case_numbers_its_rollouts_as_a_batch_does() -> None:
    batch = loss_case("split", [20, 5, 30], counted=1.0).part(slice(25, None)).batch
    assert (batch.lengths, batch.counts, batch.segment_ids.tolist()) == ((30,), (30,), [0] * 30)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_suite_rejects_logits_in_the_dtype_that_a_student_of_float32_weights_computes_in(on_cuda: bool) -> None:
    def loss(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        return Mutant("", rounded_logits if head.compute_dtype == torch.bfloat16 else right)(hidden_ND, head, batch)

    broken = broken_clauses(loss, rounding=on_cuda)
    assert broken == ["test_float32_weights_of_a_student_that_computes_in_bfloat16_are_as_exact"]


@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_suite_rejects_a_weight_gradient_that_is_added_up_in_bfloat16(on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ChunkedHead._add_gradients

    def rounding(self: ChunkedHead, rows: slice | Tensor, scale_C: Tensor) -> None:
        plain(self, rows, scale_C)
        if (weight := self.sums[1]) is not None:
            weight.copy_(weight.bfloat16())

    monkeypatch.setattr(ChunkedHead, "_add_gradients", rounding)
    monkeypatch.setattr(chunking, "multiplies", lambda *_: on_cuda)
    broken = broken_clauses(FusedOPDLoss(clip=None, chunking=SMALL), rounding=on_cuda)
    assert "test_gradients_summed_over_many_chunks_are_not_rounded_in_between" in broken


def test_a_fused_loss_with_the_wrong_sign_is_rejected_too() -> None:
    flipped = OPDObjective(clip=None, transforms=(lambda signal: evolve(signal, advantages=-signal.advantages),))
    assert broken_clauses(FusedLoss(flipped))
