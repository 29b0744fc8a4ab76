"""Divergences, transforms and objectives of one's own, and those that stand in a wrong place, are refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from lopd.errors import InvalidRecordError
from lopd.losses.beside import EntropyBonus, WindowRatio
from lopd.losses.divergences import Divergence, reverse_kl
from lopd.losses.fused import FusedLoss
from lopd.losses.objective import Objective, OPDObjective, Signal, TokenLosses, Tokens, Transform, per_token
from lopd.losses.reference import ReferenceLoss
from lopd.losses.top_k import TopKObjective
from lopd.testing import loss_case

both_paths = pytest.mark.parametrize("path", [ReferenceLoss, FusedLoss])


def refused(path: Callable[[Objective], Any], objective: Objective, message: str) -> None:
    case = loss_case("own", counted=1.0)
    with pytest.raises(InvalidRecordError, match=message):
        path(objective)(*case.leaves(), case.batch)


def column(student: Tensor, teacher: Tensor, tail: Tensor) -> Tensor:
    return reverse_kl(student, teacher, tail)[:, None]


def mean(student: Tensor, teacher: Tensor, tail: Tensor, times: float = 1.0) -> Tensor:
    return times * reverse_kl(student, teacher, tail).mean()


@both_paths
@pytest.mark.parametrize(
    ("divergence", "said"),
    [(column, r"column: its result is of shape \(15, 1\)"), (partial(mean, times=2.0), r"mean: its result is of shape \(\)")],
)
def test_a_divergence_of_another_shape_than_the_tokens_is_refused(path: Any, divergence: Divergence, said: str) -> None:
    refused(path, TopKObjective(divergence), rf"Divergence {said}, expected shape \(15,\); return one value for each token")


@per_token
def weighs_by_column(signal: Signal) -> Signal:
    return evolve(signal, weight=signal.weight[:, None])


def means(signal: Signal, times: float) -> Signal:
    return evolve(signal, advantages=times * signal.advantages.mean())


@per_token
def forgets(signal: Signal) -> None:
    evolve(signal, weight=2 * signal.weight)


@both_paths
@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (weighs_by_column, r"weighs_by_column: weight is of shape \(15, 1\)"),
        (partial(means, times=2.0), r"means: advantages is of shape \(\)"),
        (forgets, "forgets: advantages is None"),
    ],
)
def test_a_transform_of_another_shape_than_the_tokens_is_refused(path: Any, transform: Transform, said: str) -> None:
    refused(path, OPDObjective(transforms=(per_token(lambda signal: signal), transform)), rf"Transform {said}, expected shape \(15,\)")


class Gap:
    """An objective in which one of the parts has another shape."""

    wants_entropy = False

    def __init__(self, part: str, per_token: bool) -> None:
        self.part, self.per_token = part, per_token

    def ids(self, tokens: Tokens, /) -> Tensor:
        return tokens.targets[:, None]

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        gap_M = tokens.weight * (logprobs_MK[:, 0] - tokens.teacher())
        right = TokenLosses(gap_M**2, gap_M.detach(), torch.zeros_like(gap_M.detach()), logprobs_MK[:, 0].detach())
        return evolve(right, **{self.part: getattr(right, self.part)[:, None]})


@both_paths
@pytest.mark.parametrize("beside", [lambda objective: objective, EntropyBonus, WindowRatio], ids=["alone", "bonus", "window"])
@pytest.mark.parametrize("part", ["loss", "reverse_kl", "clipped", "logprobs"])
def test_an_objective_of_another_shape_than_the_tokens_is_refused(path: Any, beside: Any, part: str) -> None:
    for per_token_alone in (True, False):
        refused(path, beside(Gap(part, per_token_alone)), rf"Objective Gap: {part} is of shape \(15, 1\), expected shape \(15,\)")
