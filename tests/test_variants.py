"""Each variant against its equation written a second time; and in the fused losses as in the plain ones."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from test_fused_losses import SMALL, broken_clauses
from torch import Tensor

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses.fused import FusedOPDLoss
from lopd.losses.objective import OPDObjective, Signal, Tokens, with_entropy
from lopd.losses.reference import ReferenceOPDLoss
from lopd.losses.variants import (
    add_labels,
    drift_gate,
    entropy_advantage,
    extrapolate,
    importance_ratio,
    log_compress,
    lowest_logprobs,
    position_weights,
    power,
    ppo_clip,
    prefix_fraction,
    weigh_labels,
    window_ratio,
)
from lopd.testing import loss_case, loss_cases, separated_loss_cases

STUDENT, TEACHER, REF = (-0.1, -2.0, -7.0, -1.0, -0.5), (-0.2, -1.0, -9.0, -1.0, -3.0), (-0.9, -1.0, -7.1, -1.0, -0.4)
SEGMENTS, WEIGHT = (0, 0, 0, 1, 1), (0.5, 1.0, 2.0, 1.0, 3.0)


def tokens(**columns: Tensor | None) -> Tokens:
    values = {"teacher_logprobs": torch.tensor(TEACHER).double(), "ref_logprobs": torch.tensor(REF).double()} | columns
    return Tokens(torch.zeros(5, dtype=torch.int64), torch.tensor(WEIGHT).double(), torch.tensor(SEGMENTS), **values)


def signal() -> Signal:
    student, teacher = torch.tensor(STUDENT).double(), torch.tensor(TEACHER).double()
    return Signal(teacher - student, torch.tensor(WEIGHT).double(), student, tokens())


def factors(changed: Signal) -> list[float]:
    """Return the factors by which the weights were multiplied."""
    return (changed.weight / signal().weight).tolist()


def gradient_of(transform: Callable[[Signal], Signal]) -> Tensor:
    """Return d loss / d log-prob of each token, by the objective with this one variant."""
    student = torch.tensor(STUDENT).double().requires_grad_()
    losses = OPDObjective(clip=None, transforms=(transform,))(student[:, None], tokens()).loss
    return torch.autograd.grad(losses.sum(), student)[0]


def gradient_by_hand(per_token: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Return the same of a loss written in (log-prob, teacher's, ref's)."""
    student = torch.tensor(STUDENT).double().requires_grad_()
    losses = per_token(student, torch.tensor(TEACHER).double(), torch.tensor(REF).double())
    return torch.autograd.grad((torch.tensor(WEIGHT).double() * losses).sum(), student)[0]


@pytest.mark.parametrize("cap", [None, 0.5, 1.2, 100.0])
def test_the_truncated_ratio_has_the_gradient_of_advantage_times_ratio_up_to_the_cap(cap: float | None) -> None:
    def truncated(s: Tensor, t: Tensor, r: Tensor) -> Tensor:
        ratio = (s - r).exp().detach()
        return -(t - s).detach() * (ratio if cap is None else ratio.clamp(max=cap)) * s

    torch.testing.assert_close(gradient_of(partial(importance_ratio, cap=cap)), gradient_by_hand(truncated))


def test_the_ratio_without_a_cap_has_the_gradient_of_the_loss_with_ratio_to_ref() -> None:
    torch.testing.assert_close(gradient_of(importance_ratio), gradient_by_hand(lambda s, t, r: -(t - s).detach() * (s - r).exp()))


@pytest.mark.parametrize(
    ("window", "cap", "expected"),
    [
        (1, None, [1.0, math.exp(0.8), math.exp(-1.0), 1.0, 1.0]),
        (2, None, [1.0, math.exp(0.8), math.exp(-0.2), 1.0, 1.0]),
        (99, None, [1.0, math.exp(0.8), math.exp(-0.2), 1.0, 1.0]),
        (1, 1.5, [1.0, 1.5, math.exp(-1.0), 1.0, 1.0]),
        (2, 0.5, [0.5, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_a_window_weighs_a_token_by_the_ratios_of_those_before_it_in_its_rollout(window: int, cap: float, expected: list[float]) -> None:
    # log-ratios: 0.8, -1, 0.1 of the first rollout; 0, -0.1 of the second
    assert factors(partial(window_ratio, window=window, cap=cap)(signal())) == pytest.approx(expected)


def test_a_window_uses_the_sampler_and_stays_finite_at_the_floor() -> None:
    heated = evolve(signal(), tokens=tokens(sampler_logprobs=torch.full((5,), -100.0).double()))
    assert factors(partial(window_ratio, window=1, cap=None)(heated)) == pytest.approx([1.0] + 2 * [math.exp(20)] + [1.0, math.exp(20)])


@pytest.mark.parametrize("variant", [importance_ratio, window_ratio])
@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_that_is_none_is_refused(variant: Callable[..., Signal], cap: float) -> None:
    with pytest.raises(InvalidRecordError, match="cap is"):
        variant(signal(), cap=cap)


@pytest.mark.parametrize("window", [0, -1, 1.5])
def test_a_window_that_is_none_is_refused(window: int) -> None:
    with pytest.raises(InvalidRecordError, match="window is"):
        window_ratio(signal(), window=window)


def test_a_window_alone_says_that_it_is_not_the_ratio_of_a_token() -> None:
    assert OPDObjective(transforms=(window_ratio,)).uncorrected
    assert not OPDObjective(ratio_to_ref=True, transforms=(window_ratio,)).uncorrected


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.05, 0.5), (0.9, 9.0)])
def test_the_ppo_variant_has_the_gradient_of_the_clipped_objective(low: float, high: float) -> None:
    def clipped(s: Tensor, t: Tensor, r: Tensor) -> Tensor:
        ratio, advantage = (s - r).exp(), (t - s).detach()
        return torch.maximum(-ratio * advantage, -ratio.clamp(1 - low, 1 + high) * advantage)

    torch.testing.assert_close(gradient_of(partial(ppo_clip, low=low, high=high)), gradient_by_hand(clipped))


def test_the_ppo_variant_stops_a_token_only_where_it_has_moved_with_its_advantage() -> None:
    # ratio, advantage: 2.2, -0.1 / 0.37, +1 / 1.1, -2 / 1, 0 / 0.9, -2.5
    assert factors(partial(ppo_clip, low=0.05, high=0.2)(signal())) == pytest.approx(
        [math.exp(0.8), math.exp(-1.0), math.exp(0.1), 1.0, 0.0]
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.25])
def test_extrapolation_weighs_the_step_from_ref_to_teacher(scale: float) -> None:
    expected = [scale * (t - r) - (s - r) for s, t, r in zip(STUDENT, TEACHER, REF, strict=True)]
    assert partial(extrapolate, scale=scale)(signal()).advantages.tolist() == pytest.approx(expected)


def test_extrapolation_by_one_is_the_plain_advantage() -> None:
    torch.testing.assert_close(partial(extrapolate, scale=1.0)(signal()).advantages, signal().advantages)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0])
def test_power_is_a_difference_of_powers_of_probabilities_over_alpha(alpha: float) -> None:
    expected = [(math.exp(t) ** alpha - math.exp(s) ** alpha) / alpha for s, t in zip(STUDENT, TEACHER, strict=True)]
    made = partial(power, alpha=alpha)(signal()).advantages
    assert made.tolist() == pytest.approx(expected)
    assert (made.abs() <= 1 / alpha).all()


def test_power_becomes_the_log_ratio_as_alpha_falls() -> None:
    torch.testing.assert_close(partial(power, alpha=1e-7)(signal()).advantages, signal().advantages, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        (partial(ppo_clip, low="0.2"), "low is '0.2', expected a number"),
        (partial(ppo_clip, high=math.nan), r"\(low, high\) is \(0.2, nan\), expected at least 0 each"),
        (partial(ppo_clip, low=-0.2), r"\(low, high\) is \(-0.2, 0.2\), expected at least 0 each"),
        (partial(position_weights, gamma=math.nan), "gamma is nan, expected finite"),
        (partial(extrapolate, scale=math.inf), "scale is inf, expected finite"),
    ],
)
def test_a_bound_or_a_factor_that_is_none_is_refused(variant: Callable[[Signal], Signal], said: str) -> None:
    with pytest.raises(InvalidRecordError, match=said):
        variant(signal())


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_a_power_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(InvalidRecordError, match="alpha is"):
        power(signal(), alpha)


def test_log_compression_keeps_signs_and_the_slope_at_zero() -> None:
    values = torch.tensor([-20.0, -1e-6, 0.0, 1e-6, math.e - 1]).double()
    made = log_compress(evolve(signal(), advantages=values)).advantages
    assert made.tolist() == pytest.approx([-math.log(21.0), -1e-6, 0.0, 1e-6, 1.0])


def test_position_weights_fall_with_the_share_of_advantage_already_spent_in_the_rollout() -> None:
    # |A|: 0.1, 1, 2 of the first rollout; 0, 2.5 of the second
    expected = [1.5, 1 + 0.5 * (1 - 0.1 / 3.1), 1 + 0.5 * (1 - 1.1 / 3.1), 1.5, 1.5]
    assert factors(position_weights(signal())) == pytest.approx(expected)
    assert factors(partial(position_weights, gamma=0.0)(signal())) == [1.0] * 5


def test_position_weights_of_a_rollout_without_advantages_are_all_alike() -> None:
    same = evolve(signal(), advantages=torch.zeros(5).double())
    assert factors(position_weights(same)) == [1.5] * 5


def test_the_drift_gate_is_one_on_average_and_lowest_where_the_student_has_moved_most() -> None:
    gates = [math.exp(-abs((0.8 - 1.0) / 2)), math.exp(-0.1)]
    mean = (2 * gates[0] + gates[1]) / 3
    second = math.exp(-0.05)
    expected = [gates[0] / mean, gates[0] / mean, gates[1] / mean, second / second, second / second]
    assert factors(partial(drift_gate, block=2)(signal())) == pytest.approx(expected)
    made = factors(partial(drift_gate, block=1)(signal()))
    assert sum(made[:3]) == pytest.approx(3.0)
    assert min(made[:3]) == made[1]


def test_without_drift_every_gate_is_one() -> None:
    still = evolve(signal(), tokens=tokens(ref_logprobs=signal().student_logprobs))
    assert factors(drift_gate(still)) == [1.0] * 5


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, [1, 0, 0, 1, 0]), (0.5, [1, 1, 0, 1, 0]), (1.0, [1, 1, 1, 1, 1])])
def test_a_prefix_keeps_the_first_tokens_of_each_rollout(fraction: float, expected: list[float]) -> None:
    assert factors(partial(prefix_fraction, fraction=fraction)(signal())) == expected


@pytest.mark.parametrize(("fraction", "expected"), [(0.2, [0, 0, 1, 1, 0]), (0.6, [0, 1, 1, 1, 1]), (1.0, [1, 1, 1, 1, 1])])
def test_the_lowest_log_probs_of_each_rollout_are_kept(fraction: float, expected: list[float]) -> None:
    assert factors(partial(lowest_logprobs, fraction=fraction)(signal())) == expected


@pytest.mark.parametrize("variant", [prefix_fraction, lowest_logprobs])
@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_that_is_none_is_refused(variant: Callable[..., Signal], fraction: float) -> None:
    with pytest.raises(InvalidRecordError, match="fraction is"):
        variant(signal(), fraction=fraction)


def test_the_placebo_pushes_down_what_is_already_unlikely_and_needs_no_teacher() -> None:
    student = torch.tensor(STUDENT).double().requires_grad_()
    placebo = OPDObjective(advantage=-0.5, transforms=(lowest_logprobs,))
    losses = placebo(student[:, None], tokens(teacher_logprobs=None, ref_logprobs=None))
    assert torch.autograd.grad(losses.loss.sum(), student)[0].tolist() == [0.0, 0.0, 0.5 * 2.0, 0.5 * 1.0, 0.0]
    assert losses.reverse_kl.tolist() == [0.0] * 5


def test_the_dynamic_placebo_pushes_harder_where_the_student_is_less_sure() -> None:
    entropies = torch.tensor([0.5, 2.0, 1.0, 3.0, 3.0]).double()
    changed = entropy_advantage(evolve(signal(), tokens=tokens(student_entropies=entropies)))
    # the first rollout ranges from 0.5 to 2; the second has no range
    assert changed.advantages.tolist() == pytest.approx([-0.5, -1.0, -0.5 - 0.5 / 3, -0.5, -0.5])
    with pytest.raises(MissingScoresError, match=r"student_entropies is None.*with_entropy"):
        entropy_advantage(signal())


@pytest.mark.parametrize("loss", [ReferenceOPDLoss, partial(FusedOPDLoss, chunking=SMALL)])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 0.5)])
def test_an_objective_is_told_the_entropy_of_the_whole_distribution_if_it_asks(loss: Any, softcap: float | None, scale: float) -> None:
    seen: list[Tensor] = []

    @with_entropy
    def look(s: Signal) -> Signal:
        seen.append(s.tokens.entropies())
        return s

    case = loss_case("entropy", [20, 5], seed=3).rounded(torch.float32)
    head = evolve(case.head, softcap=softcap, scale=scale)
    hidden = case.hidden.clone().requires_grad_()
    loss(transforms=(look,))(hidden, head, case.batch).loss_sum.backward()
    logprobs = head.logits(case.hidden[case.batch.weight > 0].double()).log_softmax(-1)
    torch.testing.assert_close(seen[0].double(), -(logprobs.exp() * logprobs).sum(-1), rtol=1e-5, atol=1e-5)
    assert not seen[0].requires_grad


@pytest.mark.parametrize("variant", [importance_ratio, window_ratio, ppo_clip, partial(extrapolate, scale=1.5), drift_gate])
def test_a_variant_that_needs_the_ref_column_says_so(variant: Callable[[Signal], Signal]) -> None:
    with pytest.raises(MissingScoresError, match=r'ref_logprobs is None.*batches\(ref="behavior"\)'):
        variant(evolve(signal(), tokens=tokens(ref_logprobs=None)))


def test_transforms_apply_in_their_order_and_the_clip_comes_last() -> None:
    def plus_three(s: Signal) -> Signal:
        return evolve(s, advantages=s.advantages + 3)

    def twice(s: Signal) -> Signal:
        return evolve(s, advantages=2 * s.advantages)

    student = torch.tensor(STUDENT).double().requires_grad_()
    losses = OPDObjective(clip=4.0, transforms=(plus_three, twice))(student[:, None], tokens())
    doubled = [2 * (t - s + 3) for s, t in zip(STUDENT, TEACHER, strict=True)]
    expected = [-w * max(min(a, 4.0), -4.0) for w, a in zip(WEIGHT, doubled, strict=True)]
    assert torch.autograd.grad(losses.loss.sum(), student)[0].tolist() == pytest.approx(expected)
    assert losses.clipped.tolist() == [w * (abs(a) > 4) for w, a in zip(WEIGHT, doubled, strict=True)]


VARIANTS: dict[str, dict[str, object]] = {
    "truncated ratio": {"transforms": (partial(importance_ratio, cap=1.5),)},
    "capped ratio": {"ratio_to_ref": True, "ratio_cap": 1.5},
    "window": {"ratio_to_ref": True, "transforms": (partial(window_ratio, window=3),)},
    "ppo": {"transforms": (ppo_clip,)},
    "extrapolated": {"transforms": (partial(extrapolate, scale=1.25),)},
    "power": {"transforms": (partial(power, alpha=0.5),)},
    "compressed": {"transforms": (log_compress,)},
    "position": {"transforms": (position_weights,)},
    "gate": {"transforms": (partial(drift_gate, block=4),)},
    "prefix": {"transforms": (partial(prefix_fraction, fraction=0.3),)},
    "placebo": {"advantage": -0.5, "transforms": (lowest_logprobs,)},
    "dynamic placebo": {"advantage": -0.5, "transforms": (entropy_advantage, lowest_logprobs)},
    "labels beside a teacher": {"ratio_to_ref": True, "transforms": (partial(add_labels, scale=0.5),)},
    "labels alone, gated": {"advantage": 0.0, "transforms": (add_labels, partial(weigh_labels, by=lambda labels: labels > 0))},
    "four at once": {"clip": 2.0, "transforms": (partial(extrapolate, scale=1.1), log_compress, importance_ratio, position_weights)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_means_the_same_to_the_fused_loss_as_to_the_plain_one(name: str) -> None:
    # a range of entropies that is rounding alone would be blown up to advantages
    cases = separated_loss_cases if name == "dynamic placebo" else loss_cases
    assert broken_clauses(FusedOPDLoss(**VARIANTS[name], chunking=SMALL), ReferenceOPDLoss(**VARIANTS[name]), cases) == []


def test_a_loss_that_ranks_tokens_by_entropy_is_judged_on_cases_in_which_rounding_cannot_exchange_them() -> None:
    @with_entropy
    def least_sure(s: Signal) -> Signal:
        together = s.tokens.segment_ids[:, None] == s.tokens.segment_ids
        ranks = (together & (s.tokens.entropies()[:, None] > s.tokens.entropies())).sum(-1)
        return evolve(s, weight=s.weight * (1 + ranks))

    def loss(kind: Callable[..., Any], **options: object) -> Any:
        return kind(advantage=-0.5, transforms=(least_sure,), **options)

    names = {case.name for case in separated_loss_cases()}
    assert {"some of everything", "several chunks, the last one short", "all logits very negative"} < names
    assert names.isdisjoint({"flat", "nearly certain", "logits of a thousand"})
    assert broken_clauses(loss(FusedOPDLoss, chunking=SMALL), loss(ReferenceOPDLoss), separated_loss_cases) == []


def test_only_variants_that_look_at_whole_rollouts_cost_a_fourth_product() -> None:
    cheap = {name for name, arguments in VARIANTS.items() if OPDObjective(**arguments).per_token}
    assert cheap == {
        "truncated ratio",
        "capped ratio",
        "ppo",
        "extrapolated",
        "power",
        "compressed",
        *(name for name in VARIANTS if "labels" in name),
    }
