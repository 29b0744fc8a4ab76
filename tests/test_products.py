"""The head's matrix products: what a device is asked for, and what it does that cannot do it."""

import logging
from collections.abc import Iterator

import pytest
import torch
from attrs import evolve
from torch import Tensor

from lopd.losses import chunking, products
from lopd.losses.chunking import Chunking
from lopd.losses.fused import FusedOPDLoss
from lopd.testing import loss_case
from lopd.testing.losses import evaluate_case


def test_what_cuda_is_asked_for_is_a_call_that_torch_knows_and_a_cpu_refuses() -> None:
    ones = torch.ones(2, 2, dtype=torch.bfloat16)
    # torch 2.7 does not know it yet
    with pytest.raises((NotImplementedError, TypeError), match=r"addmm\.dtype_out|out_dtype"):
        products._add_product(torch.zeros(2, 2), ones, ones)
    assert not products.multiplies(torch.device("cpu"), torch.bfloat16, torch.float32)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Yield a card whose numbers are on the CPU, and of which nothing is known yet."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    products.multiplies.cache_clear()
    yield torch.device("cuda", 3)
    products.multiplies.cache_clear()


def test_a_card_that_is_full_is_tried_again(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Tensor, **__: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(products, "_add_product", full)
    with pytest.raises(torch.OutOfMemoryError):
        products.multiplies(card, torch.bfloat16, torch.float32)
    monkeypatch.setattr(products, "_add_product", lambda total, *_: total.fill_(9))
    assert products.multiplies(card, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("sums", "level"), [(9, logging.INFO), (8, logging.WARNING)])
def test_the_log_says_once_a_card_what_it_multiplies(
    card: torch.device, sums: int, level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(products, "_add_product", lambda total, *_: total.fill_(sums))
    with caplog.at_level(logging.INFO, "lopd"):
        found = {products.multiplies(card, torch.bfloat16, torch.float32) for _ in range(2)}
    assert found == {sums == 9}
    assert [(record.levelno, "Head on cuda:3: products " in record.message) for record in caplog.records] == [(level, True)]


def test_operands_that_the_device_multiplies_are_given_to_it_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, beta: int, alpha: float, out: Tensor) -> Tensor:
        given.append((left.dtype, right.dtype))
        assert out is total
        assert out.dtype == out_dtype == torch.float32
        return out.addmm_(left.float(), right.float(), beta=beta, alpha=alpha)

    case = loss_case("as they are", [30], vocab=2500, seed=29, bias=True, scale=0.7)
    for dtype in (torch.bfloat16, torch.float32):
        loss, rounded = FusedOPDLoss(chunking=Chunking(1, torch.bfloat16)), case.rounded(dtype)
        expected = evaluate_case(loss, rounded)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "addmm", addmm)
            patch.setattr(products, "multiplies", lambda *_: True)
            output, gradients = evaluate_case(loss, rounded)
        torch.testing.assert_close(output.loss_sum, expected[0].loss_sum)
        for mine, other in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(mine, other)
    assert set(given) == {(torch.bfloat16, torch.bfloat16)}


def test_float32_weights_of_a_student_that_computes_in_bfloat16_are_rounded_for_all_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "multiplies", lambda *_: True)  # as on CUDA
    case = loss_case("float32 weights", [30, 20], vocab=2500, bias=True, seed=30).rounded(torch.float32)
    case = evolve(case, head=evolve(case.head, compute_dtype=torch.bfloat16))
    # the bias is added in float32
    before = evolve(case, hidden=case.hidden.bfloat16().float(), head=evolve(case.head, weight=case.head.weight.bfloat16().float()))
    (output, gradients), (expected, others) = (evaluate_case(FusedOPDLoss(chunking=Chunking(1)), each) for each in (case, before))
    assert torch.equal(output.loss_sum, expected.loss_sum)
    for mine, other in zip(gradients, others, strict=True):
        # what a row counts is multiplied into its hidden state before that is rounded
        torch.testing.assert_close(mine, other, rtol=2**-8, atol=2**-8 * float(other.abs().max()))
    assert not torch.equal(output.loss_sum, evaluate_case(FusedOPDLoss(chunking=Chunking(1, torch.float32)), case)[0].loss_sum)
