"""The switch of the CPU matrix library: on for a block, only where it is exact, and never afterwards."""

import pytest
import torch

from lopd.losses import cpu
from lopd.losses.cpu import fast_matmul, products_are_float32


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_the_setting_is_what_it_was_after_the_block_and_after_an_error_in_it() -> None:
    before = precision()
    with fast_matmul() as on:
        assert precision() == ("bf16" if on else before)
    assert precision() == before
    with pytest.raises(KeyError), fast_matmul():
        raise KeyError
    assert precision() == before


def test_importing_and_using_a_fused_loss_leaves_the_setting_alone() -> None:
    import lopd.losses.fused  # noqa: F401

    assert precision() == "none"


def test_where_the_products_would_not_be_float32_nothing_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "products_are_float32", lambda: False)
    before = precision()
    with fast_matmul() as on:
        assert not on
        assert precision() == before


def test_the_check_tells_bfloat16_products_from_float32_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_are_float32()
    plain = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return plain(left, right) if left.dtype == torch.float64 else plain(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products_are_float32()


def test_a_torch_without_the_setting_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_setting", lambda: None)
    with fast_matmul() as on:
        assert not on
