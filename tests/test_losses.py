"""Each loss against its equation written a second time, in torch's own functions or by hand."""

import math
from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from attrs import evolve
from helpers import random_batch, random_head, random_hidden, to_dtype
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss, mse_loss

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses import functional
from lopd.losses.chunking import Chunking
from lopd.losses.fused import FusedOPDLoss, FusedSFTLoss
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss, WeightedLoss
from lopd.losses.variants import importance_ratio
from lopd.protocols import OPDLoss
from lopd.records import Batch, LMHead

PLAIN = ReferenceOPDLoss(clip=None)
LOSSES: dict[str, OPDLoss] = {
    "lightning": ReferenceOPDLoss(),
    "plain": PLAIN,
    "ratio": ReferenceOPDLoss(ratio_to_ref=True),
    "sft": SFTLoss(),
    "weighted": WeightedLoss([(1.0, ReferenceOPDLoss(clip=1.0)), (0.5, SFTLoss())]),
    "fused lightning": FusedOPDLoss(chunking=Chunking(chunk_bytes=1)),
    "fused plain": FusedOPDLoss(clip=None),
    "fused ratio": FusedOPDLoss(ratio_to_ref=True),
    "fused sft": FusedSFTLoss(),
    "fused weighted": WeightedLoss([(1.0, FusedOPDLoss(clip=1.0)), (0.5, FusedSFTLoss())]),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
every_head = pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.7)])

Gradients = tuple[Tensor, ...]


def gradients(value: Tensor, hidden_ND: Tensor, head: LMHead) -> Gradients:
    """Return the gradients with respect to hidden states, head weight and head bias."""
    assert head.bias is not None
    return torch.autograd.grad(value, (hidden_ND, head.weight, head.bias))


def gradients_of(loss: OPDLoss, hidden_ND: Tensor, head: LMHead, batch: Batch) -> Gradients:
    return gradients(loss(hidden_ND, head, batch).loss_sum, hidden_ND, head)


def weighted_sum(per_token: Callable[[Tensor], Tensor], hidden_ND: Tensor, head: LMHead, batch: Batch) -> Tensor:
    """Return the sum of weight times a function of the student's log-probs, by plain torch over all tokens."""
    assert head.bias is not None
    logits_NV = head.scale * (hidden_ND @ head.weight.T + head.bias)
    if head.softcap is not None:
        logits_NV = head.softcap * (logits_NV / head.softcap).tanh()
    return (batch.weight * per_token(-cross_entropy(logits_NV, batch.targets, reduction="none"))).sum()


def one_state(logits_V: Tensor, batch: Batch) -> tuple[Tensor, LMHead]:
    """Make hidden states and a head that give every token the same logits."""
    zeros_ND = torch.zeros(batch.inputs.numel(), 1, dtype=logits_V.dtype)
    return zeros_ND, LMHead(torch.zeros(logits_V.numel(), 1, dtype=logits_V.dtype), logits_V)


def per_token_losses(loss: OPDLoss, hidden_ND: Tensor, head: LMHead, batch: Batch) -> Tensor:
    """Return (N,) losses: a weighted sum of losses is linear in the weights, so its derivative by a weight is that token's loss."""
    weight_N = batch.weight.clone().requires_grad_()
    return torch.autograd.grad(loss(hidden_ND, head, evolve(batch, weight=weight_N)).loss_sum, weight_N)[0]


def hand_made_batch(targets: list[int], weight: list[float], teacher: list[float]) -> Batch:
    ids = torch.tensor(targets)
    columns = {"weight": torch.tensor(weight, dtype=torch.float64), "teacher_logprobs": torch.tensor(teacher, dtype=torch.float64)}
    return Batch(inputs=ids, targets=ids, position_ids=torch.arange(len(ids)), segment_ids=torch.zeros_like(ids), **columns)


def test_the_default_clip_is_the_ten_nats_of_the_paper() -> None:
    assert ReferenceOPDLoss() == ReferenceOPDLoss(clip=10.0, ratio_to_ref=False)


@every_head
@pytest.mark.parametrize("clip", [0.1, 1.0, 3.0, 100.0])
def test_the_clipped_gradient_is_that_of_a_huber_loss_with_delta_tau(clip: float, softcap: float | None, scale: float) -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head(softcap=softcap, scale=scale)
    teacher_N = batch.teacher_logprobs
    assert teacher_N is not None
    huber = weighted_sum(lambda lp_N: huber_loss(lp_N, teacher_N, reduction="none", delta=clip), hidden_ND, head, batch)
    torch.testing.assert_close(gradients_of(ReferenceOPDLoss(clip), hidden_ND, head, batch), gradients(huber, hidden_ND, head))


@every_head
def test_the_unclipped_gradient_is_that_of_half_the_squared_gap(softcap: float | None, scale: float) -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head(softcap=softcap, scale=scale)
    teacher_N = batch.teacher_logprobs
    assert teacher_N is not None
    half = weighted_sum(lambda lp_N: mse_loss(lp_N, teacher_N, reduction="none") / 2, hidden_ND, head, batch)
    torch.testing.assert_close(gradients_of(PLAIN, hidden_ND, head, batch), gradients(half, hidden_ND, head))


@pytest.mark.parametrize("clip", [0.5, 10.0])
def test_the_value_of_the_lightning_loss_is_minus_clipped_advantage_times_log_prob(clip: float) -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head()
    teacher_N = batch.teacher_logprobs
    assert teacher_N is not None
    expected = weighted_sum(lambda lp_N: -(teacher_N - lp_N).clamp(-clip, clip) * lp_N, hidden_ND, head, batch)
    torch.testing.assert_close(ReferenceOPDLoss(clip)(hidden_ND, head, batch).loss_sum, expected)


def test_the_ratio_loss_has_the_advantage_weighted_gradient_of_the_ratio() -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head()
    teacher_N, ref_N = batch.teacher_logprobs, batch.ref_logprobs
    assert teacher_N is not None
    assert ref_N is not None
    expected = weighted_sum(lambda lp_N: -(teacher_N - lp_N).detach().clamp(-1, 1) * lp_N.exp() / ref_N.exp(), hidden_ND, head, batch)
    output = ReferenceOPDLoss(clip=1.0, ratio_to_ref=True)(hidden_ND, head, batch)
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(gradients(output.loss_sum, hidden_ND, head), gradients(expected, hidden_ND, head))


@every_head
def test_the_sft_loss_is_torch_cross_entropy(softcap: float | None, scale: float) -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head(softcap=softcap, scale=scale)
    expected = weighted_sum(lambda lp_N: -lp_N, hidden_ND, head, batch)
    output = SFTLoss()(hidden_ND, head, batch)
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(gradients(output.loss_sum, hidden_ND, head), gradients(expected, hidden_ND, head))


def test_the_sft_loss_needs_no_scores_and_reports_no_reverse_kl() -> None:
    batch = random_batch()
    output = SFTLoss()(random_hidden(batch), random_head(), evolve(batch, teacher_logprobs=None, ref_logprobs=None))
    assert (float(output.reverse_kl_sum), float(output.clipped_sum)) == (0.0, 0.0)


def test_the_gradient_of_a_weighted_loss_is_the_weighted_sum_of_gradients() -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head()
    terms: list[tuple[float, OPDLoss]] = [(2.0, ReferenceOPDLoss(clip=1.0)), (-0.5, SFTLoss())]
    parts = [gradients_of(loss, hidden_ND, head, batch) for _, loss in terms]
    expected = tuple(2.0 * first - 0.5 * second for first, second in zip(*parts, strict=True))
    torch.testing.assert_close(gradients_of(WeightedLoss(terms), hidden_ND, head, batch), expected)


def test_a_weighted_loss_reports_what_its_first_term_reports() -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head()
    first = ReferenceOPDLoss(clip=0.1)
    output = WeightedLoss([(3.0, first), (1.0, SFTLoss())])(hidden_ND, head, batch)
    alone = first(hidden_ND, head, batch)
    assert float(alone.clipped_sum) > 0
    torch.testing.assert_close((output.reverse_kl_sum, output.clipped_sum), (alone.reverse_kl_sum, alone.clipped_sum))


def test_a_weighted_loss_without_terms_is_refused() -> None:
    with pytest.raises(InvalidRecordError, match="0 terms"):
        WeightedLoss([])


@every_loss
@pytest.mark.parametrize("junk", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pain_06_tokens_that_do_not_count_may_hold_anything_and_change_nothing(loss: OPDLoss, junk: float, dtype: torch.dtype) -> None:
    batch = random_batch(dtype=dtype)
    off_N = batch.weight == 0
    assert off_N.any()
    hidden_ND, head = random_hidden(batch, dtype=dtype), random_head(dtype=dtype)
    dirty_ND = hidden_ND.detach().clone()
    dirty_ND[off_N] = torch.tensor([1e30, -1e30, junk], dtype=dtype)
    dirty_ND.requires_grad_()
    columns = {name: getattr(batch, name).masked_fill(off_N, junk) for name in ("teacher_logprobs", "ref_logprobs")}

    clean, dirty = loss(hidden_ND, head, batch), loss(dirty_ND, head, evolve(batch, **columns))
    for name in ("loss_sum", "reverse_kl_sum", "clipped_sum"):
        assert torch.equal(getattr(dirty, name), getattr(clean, name)), name
    expected, got = gradients(clean.loss_sum, hidden_ND, head), gradients(dirty.loss_sum, dirty_ND, head)
    assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True))
    assert not got[0][off_N].any()


@every_loss
def test_a_batch_in_which_no_token_counts_has_loss_zero_and_gradient_zero(loss: OPDLoss) -> None:
    batch = random_batch()
    batch = evolve(batch, weight=torch.zeros_like(batch.weight))
    hidden_ND, head = random_hidden(batch), random_head()
    output = loss(hidden_ND, head, batch)
    assert [float(value.detach()) for value in (output.loss_sum, output.reverse_kl_sum, output.clipped_sum)] == [0.0, 0.0, 0.0]
    assert not any(gradient.any() for gradient in gradients(output.loss_sum, hidden_ND, head))


def test_pain_07_a_teacher_log_prob_of_exactly_zero_counts_like_any_other() -> None:
    batch = hand_made_batch([0, 1], [1.0, 1.0], [0.0, math.log(0.5)])
    hidden_ND, head = one_state(torch.tensor([0.0, 0.0], dtype=torch.float64), batch)
    half = math.log(0.5)
    torch.testing.assert_close(per_token_losses(PLAIN, hidden_ND, head, batch), torch.tensor([half * half, 0.0], dtype=torch.float64))
    assert float(PLAIN(hidden_ND, head, batch).reverse_kl_sum) == pytest.approx(half)


@pytest.mark.parametrize("loss", [ReferenceOPDLoss(), WeightedLoss([(1.0, SFTLoss()), (1.0, PLAIN)])])
def test_a_batch_without_the_teacher_column_is_refused(loss: OPDLoss) -> None:
    batch = evolve(random_batch(), teacher_logprobs=None)
    with pytest.raises(MissingScoresError, match=r"teacher_logprobs is None.*batches\(teacher="):
        loss(random_hidden(batch), random_head(), batch)


def test_a_batch_without_the_ref_column_is_refused_where_the_ratio_is_asked_for() -> None:
    batch = evolve(random_batch(), ref_logprobs=None)
    PLAIN(random_hidden(batch), random_head(), batch)
    with pytest.raises(MissingScoresError, match=r'ref_logprobs is None.*batches\(ref="behavior"\)'):
        LOSSES["ratio"](random_hidden(batch), random_head(), batch)


@every_loss
def test_what_is_reported_beside_the_loss_carries_no_gradient(loss: OPDLoss) -> None:
    batch = random_batch()
    output = loss(random_hidden(batch), random_head(), batch)
    assert output.loss_sum.requires_grad
    assert not output.reverse_kl_sum.requires_grad
    assert not output.clipped_sum.requires_grad


@pytest.mark.parametrize("loss", [ReferenceOPDLoss(), ReferenceOPDLoss(ratio_to_ref=True)])
def test_no_gradient_flows_into_the_advantage(loss: OPDLoss) -> None:
    batch = random_batch()
    assert batch.teacher_logprobs is not None
    teacher_N = batch.teacher_logprobs.clone().requires_grad_()
    output = loss(random_hidden(batch), random_head(), evolve(batch, teacher_logprobs=teacher_N))
    (gradient,) = torch.autograd.grad(output.loss_sum, teacher_N, allow_unused=True)
    assert gradient is None


def test_the_reverse_kl_sum_is_the_weighted_gap_before_clipping() -> None:
    batch = hand_made_batch([0, 1, 2], [0.5, 2.0, 0.0], [-1.0, -20.0, -3.0])
    hidden_ND, head = one_state(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log(), batch)
    expected = 0.5 * (math.log(0.5) + 1.0) + 2.0 * (math.log(0.25) + 20.0)
    assert float(ReferenceOPDLoss(clip=1.0)(hidden_ND, head, batch).reverse_kl_sum) == pytest.approx(expected)


@pytest.mark.parametrize(("clip", "expected"), [(0.2, 6.5), (0.8, 6.0), (10.0, 2.0), (100.0, 0.0), (None, 0.0)])
def test_the_clipped_sum_is_the_weight_of_the_tokens_whose_gap_is_beyond_the_clip_on_either_side(
    clip: float | None, expected: float
) -> None:
    batch = hand_made_batch([0, 1, 2, 2], [0.5, 2.0, 0.0, 4.0], [-1.0, -20.0, -30.0, -0.1])
    hidden_ND, head = one_state(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log(), batch)
    assert float(ReferenceOPDLoss(clip)(hidden_ND, head, batch).clipped_sum) == expected


FLOORED = [ReferenceOPDLoss(ratio_to_ref=True), FusedOPDLoss(ratio_to_ref=True), FusedOPDLoss(transforms=(importance_ratio,)), PLAIN]


@pytest.mark.parametrize("loss", FLOORED)
@pytest.mark.parametrize("teacher", [math.log(1 / 3), -2.0, -100.0])
def test_a_reference_log_prob_at_the_floor_leaves_loss_report_and_gradient_finite(loss: OPDLoss, teacher: float) -> None:
    ids, floor = torch.zeros(1, dtype=torch.int64), torch.tensor([-100.0])
    hidden, head = torch.ones(1, 2, requires_grad=True), LMHead(torch.zeros(3, 2, requires_grad=True))
    output = loss(hidden, head, Batch(ids, ids, ids, ids, torch.ones(1), torch.tensor([teacher]), floor))
    output.loss_sum.backward()
    assert head.weight.grad is not None
    assert all(bool(value.isfinite().all()) for value in (output.loss_sum, output.reverse_kl_sum, head.weight.grad))
    assert bool(head.weight.grad.any()) or teacher == math.log(1 / 3), "the gradient goes on beyond the bound"


@pytest.mark.parametrize("cap", [None, 1e-3, 1.0, 4.0, math.inf])
def test_a_ratio_is_itself_up_to_its_cap_and_keeps_the_gradient_of_a_capped_weight_beyond(cap: float | None) -> None:
    logs = torch.linspace(-120, 120, 97, dtype=torch.float64).requires_grad_()
    most = min(math.inf if cap is None else cap, math.exp(functional.MAX_LOG_RATIO))
    made = functional.bounded_ratio(logs, cap)
    expected = logs.detach().exp().clamp(max=most)
    torch.testing.assert_close(made.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(made.sum(), logs)[0], expected)


def test_within_the_bound_a_ratio_is_the_exponential_to_the_last_bit() -> None:
    logs = torch.linspace(-90, functional.MAX_LOG_RATIO, 1001)
    with pytest.raises(InvalidRecordError, match="cap is 0"):
        functional.bounded_ratio(logs, 0.0)
    assert torch.equal(functional.bounded_ratio(logs), logs.exp())


@pytest.mark.parametrize("loss", [ReferenceOPDLoss, FusedOPDLoss])
def test_a_cap_of_the_ratio_has_the_gradient_of_the_truncated_ratio_as_a_variant(loss: Callable[..., OPDLoss]) -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head()
    as_setting, as_variant = loss(ratio_to_ref=True, ratio_cap=1.1), loss(transforms=(partial(importance_ratio, cap=1.1),))
    capped = gradients_of(as_setting, hidden_ND, head, batch)
    torch.testing.assert_close(capped, gradients_of(as_variant, hidden_ND, head, batch))
    assert not torch.equal(capped[0], gradients_of(loss(ratio_to_ref=True), hidden_ND, head, batch)[0])


@pytest.mark.parametrize("loss", [ReferenceOPDLoss, FusedOPDLoss])
def test_a_cap_of_the_ratio_that_is_none_or_caps_nothing_is_refused(loss: Callable[..., OPDLoss]) -> None:
    for cap in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidRecordError, match=r"ratio_cap is .*, expected None, or more than 0"):
            loss(ratio_to_ref=True, ratio_cap=cap)
    with pytest.raises(InvalidRecordError, match=r"ratio_cap is 2.0, expected None without an importance ratio; pass `ratio_to_ref=True`"):
        loss(ratio_cap=2.0)


def test_lspd_without_its_bonus_is_twice_lightning_with_a_clip_of_five_nats() -> None:
    batch = random_batch()
    hidden_ND, head = random_hidden(batch), random_head()
    teacher_N = batch.teacher_logprobs
    assert teacher_N is not None

    def squared_then_linear(logprobs_N: Tensor) -> Tensor:
        gap_N = logprobs_N - 8 * teacher_N
        return torch.where(gap_N.abs() <= 5, gap_N.square(), 10 * gap_N.abs() - 25)

    expected = gradients(weighted_sum(squared_then_linear, hidden_ND, head, batch), hidden_ND, head)
    far = evolve(batch, teacher_logprobs=8 * teacher_N)
    torch.testing.assert_close(gradients_of(WeightedLoss([(2.0, FusedOPDLoss(clip=5.0))]), hidden_ND, head, far), expected)


def test_advantages_far_above_the_clip_are_cut_like_those_far_below() -> None:
    teacher_M, student_M = torch.tensor([-1.0, -9.0, -1.5]), torch.tensor([-9.0, -1.0, -1.0])
    assert functional.advantages(teacher_M, student_M, 2.0).tolist() == [2.0, -2.0, -0.5]
    assert functional.advantages(teacher_M, student_M, None).tolist() == [8.0, -8.0, -0.5]


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.25), (3.0, 1.0), (3.0, 0.25)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_logits_are_cap_times_tanh_of_scaled_affine_over_cap(softcap: float | None, scale: float, with_bias: bool) -> None:
    weight, bias, hidden = [[1.0, -2.0], [0.5, 4.0], [3.0, 0.0]], [0.1, -0.2, 5.0], [[2.0, 1.0], [-1.0, 0.5]]
    head = LMHead(torch.tensor(weight), torch.tensor(bias) if with_bias else None, softcap, scale)
    affine = [
        [scale * (sum(w * h for w, h in zip(row, state, strict=True)) + with_bias * b) for row, b in zip(weight, bias, strict=True)]
        for state in hidden
    ]
    expected = affine if softcap is None else [[softcap * math.tanh(z / softcap) for z in state] for state in affine]
    torch.testing.assert_close(head.logits(torch.tensor(hidden)), torch.tensor(expected))


@pytest.mark.parametrize(
    ("given_dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_logits_are_computed_in_float32_or_better(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    hidden_ND, weight_VD = torch.full((1, 64), 1.01, dtype=given_dtype), torch.full((2, 64), 1.01, dtype=given_dtype)
    logits_NV = LMHead(weight_VD).logits(hidden_ND)
    assert logits_NV.dtype == expected
    torch.testing.assert_close(logits_NV, (hidden_ND.double() @ weight_VD.double().T).to(expected), rtol=1e-6, atol=0.0)


logit = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-50, 50, width=32) | st.sampled_from([-1e4, 0.0, 1e4, 88.0, -104.0])


@given(st.lists(logit, min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_float32_log_probs_are_never_above_zero_nor_nan(logits: list[float]) -> None:
    targets = list(range(len(logits)))
    batch = to_dtype(hand_made_batch(targets, [1.0] * len(targets), [0.0] * len(targets)), torch.float32)
    hidden_ND, head = one_state(torch.tensor(logits, dtype=torch.float32), batch)
    losses_N = per_token_losses(SFTLoss(), hidden_ND, head, batch)
    assert losses_N.dtype == torch.float32
    assert (losses_N >= 0).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_vocabulary_of_one_token_gives_log_prob_zero(rows: int) -> None:
    batch = hand_made_batch([0] * rows, [1.0] * rows, [-1.0] * rows)
    hidden_ND, head = one_state(torch.tensor([7.0], dtype=torch.float64), batch)
    assert float(PLAIN(hidden_ND, head, batch).reverse_kl_sum) == rows


def test_finite_differences_agree_with_the_sft_loss_through_the_soft_cap() -> None:
    batch = random_batch(count=2)
    hidden_ND, head = random_hidden(batch), random_head(softcap=2.0, scale=0.7)
    assert head.bias is not None

    def loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return SFTLoss()(hidden, LMHead(weight, bias, 2.0, 0.7), batch).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (hidden_ND, head.weight, head.bias))


def test_finite_differences_agree_with_the_functional_losses() -> None:
    student_M = torch.tensor([-0.1, -2.0, -7.0], dtype=torch.float64, requires_grad=True)
    ref_M, advantages_M = torch.tensor([-0.3, -1.0, -9.0]).double(), torch.tensor([0.5, -10.0, 3.0]).double()
    for loss in (
        lambda s: functional.lightning(s, advantages_M),
        lambda s: functional.lightning_with_ratio(s, advantages_M, ref_M),
        lambda s: functional.lightning(s, torch.ones_like(s)),
    ):
        assert torch.autograd.gradcheck(loss, (student_M,))


@pytest.mark.parametrize("clip", [0.7, 10.0])
def test_finite_differences_of_the_huber_objective_agree_with_the_lightning_gradient(clip: float) -> None:
    batch = random_batch(count=2)
    hidden_ND, head = random_hidden(batch), random_head()
    teacher_N, step = batch.teacher_logprobs, 1e-6
    assert teacher_N is not None

    def objective(hidden: Tensor) -> float:
        return weighted_sum(lambda lp_N: huber_loss(lp_N, teacher_N, reduction="none", delta=clip), hidden, head, batch).item()

    shifts = step * torch.eye(hidden_ND.numel(), dtype=torch.float64).view(-1, *hidden_ND.shape)
    numeric = torch.tensor([(objective(hidden_ND + s) - objective(hidden_ND - s)) / (2 * step) for s in shifts], dtype=torch.float64)
    analytic = gradients_of(ReferenceOPDLoss(clip), hidden_ND, head, batch)[0]
    torch.testing.assert_close(analytic, numeric.view_as(analytic), rtol=1e-5, atol=1e-8)
