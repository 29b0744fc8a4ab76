"""Divergences, transforms and objectives of one's own, and those that stand in a wrong place, are refused by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from test_fused_losses import broken_clauses
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lopd.errors import ArgumentError, InvalidRecordError
from lopd.losses.beside import EntropyBonus, WindowRatio
from lopd.losses.chunked import selected_logprobs
from lopd.losses.chunking import Chunking
from lopd.losses.divergences import Divergence, jensen_shannon, reverse_kl
from lopd.losses.fused import FusedLoss, FusedOPDLoss
from lopd.losses.objective import (
    Objective,
    OPDObjective,
    Signal,
    TokenLosses,
    Tokens,
    Transform,
    baselined,
    per_token,
    replacing,
    uncorrected,
    with_entropy,
    with_ratio,
)
from lopd.losses.reference import ReferenceLoss, ReferenceOPDLoss, WeightedLoss
from lopd.losses.top_k import TopKObjective
from lopd.losses.variants import add_labels, entropy_advantage, extrapolate, importance_ratio, log_compress, power, ppo_clip, window_ratio
from lopd.protocols import OPDLoss
from lopd.protocols.doors import check_noun
from lopd.records.steps import Batch, LMHead, LossOutput
from lopd.testing import loss_case
from lopd.testing.loss_cases import STORED

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
    """An objective in which one of the parts, if it is named, has another shape."""

    wants_entropy = False

    def __init__(self, part: str, per_token: bool) -> None:
        self.part, self.per_token = part, per_token

    def ids(self, tokens: Tokens, /) -> Tensor:
        return tokens.targets[:, None]

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        gap_M = tokens.weight * (logprobs_MK[:, 0] - tokens.teacher())
        right = TokenLosses(gap_M**2, gap_M.detach(), torch.zeros_like(gap_M.detach()), logprobs_MK[:, 0].detach())
        return evolve(right, **{self.part: getattr(right, self.part)[:, None]}) if self.part else right


@both_paths
@pytest.mark.parametrize("beside", [lambda objective: objective, EntropyBonus, WindowRatio], ids=["alone", "bonus", "window"])
@pytest.mark.parametrize("part", ["loss", "reverse_kl", "clipped", "logprobs"])
def test_an_objective_of_another_shape_than_the_tokens_is_refused(path: Any, beside: Any, part: str) -> None:
    for per_token_alone in (True, False):
        refused(path, beside(Gap(part, per_token_alone)), rf"Objective Gap: {part} is of shape \(15, 1\), expected shape \(15,\)")


@both_paths
@pytest.mark.parametrize("beside", [lambda objective: objective, EntropyBonus, WindowRatio], ids=["alone", "bonus", "window"])
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (lambda tokens: tokens.targets[:1, None], r"of shape \(1, 1\)"),
        (lambda tokens: tokens.targets[1:, None], r"of shape \(14, 1\)"),
        (lambda tokens: tokens.targets, r"of shape \(15,\)"),
        (lambda tokens: tokens.targets[:, None].tolist(), "a list"),
    ],
)
def test_ids_that_are_not_a_row_for_each_token_are_refused(path: Any, beside: Any, ids: Any, said: str) -> None:
    for per_token_alone in (True, False):
        own = Gap("loss", per_token_alone)
        own.ids = ids  # type: ignore[method-assign]
        refused(path, beside(own), rf"Loss: ids are {said}, expected shape \(15, K\); pass a row of ids for each hidden state")


@pytest.mark.parametrize("shape", [(14,), (16,), (1,), (1, 2), (16, 2), (15, 1, 1), ()], ids=str)
def test_log_probs_of_ids_that_are_not_of_each_hidden_state_are_refused(shape: tuple[int, ...]) -> None:
    case = loss_case("shift", counted=1.0)
    with pytest.raises(InvalidRecordError, match=r"Loss: ids are of shape .*, expected shape \(15, K\); pass a row"):
        selected_logprobs(case.hidden, case.head, torch.zeros(shape, dtype=torch.int64))


class _OldTorch(TorchDispatchMode):
    """Gathers and scatters with int64 alone, as torch 2.7 does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not ("gather" in str(func) or "scatter" in str(func)) or args[2].dtype == torch.int64
        return func(*args, **(kwargs or {}))


@both_paths
@pytest.mark.parametrize("alone", [True, False])
def test_narrow_ids_are_taken_by_any_torch(path: Any, alone: bool) -> None:
    own, case = Gap("", alone), loss_case("narrow")
    expected = path(own)(*case.leaves(), case.batch).loss_sum
    own.ids = lambda tokens: tokens.targets[:, None].int()  # type: ignore[method-assign]
    with _OldTorch():
        found = path(own)(*case.leaves(), case.batch).loss_sum
        found.backward()
    assert found == expected


@pytest.mark.parametrize("of", [ReferenceLoss, FusedLoss, EntropyBonus, WindowRatio])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (reverse_kl, "a function, which has no `ids`"),
        (FusedOPDLoss(), "a FusedOPDLoss, which has no `ids`"),
        (TopKObjective, r"the class TopKObjective.*call it: TopKObjective\(\)"),
    ],
)
def test_what_stands_on_an_objective_refuses_anything_else(of: Any, wrong: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=f"{of.__name__}: objective: it is {said}"):
        of(wrong)


@pytest.mark.parametrize("objective", [TopKObjective(reverse_kl), EntropyBonus(OPDObjective())])
def test_an_objective_is_refused_where_a_loss_is_wanted(objective: Any) -> None:
    message = rf"Loss: it is an? {type(objective).__name__}, which is an objective; pass a loss on it: `FusedLoss\(...\)`"
    with pytest.raises(ArgumentError, match=message):
        check_noun(objective, OPDLoss)
    with pytest.raises(ArgumentError, match=message):
        WeightedLoss([(1.0, FusedOPDLoss()), (0.5, objective)])


def test_a_loss_of_ones_own_may_have_a_name_of_an_objective() -> None:
    class Own:
        wants_entropy = True

        def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
            return FusedOPDLoss()(hidden_ND, head, batch)

    check_noun(Own(), OPDLoss)


@pytest.mark.parametrize("wrong", ["reverse_kl", None, lambda student, teacher: student])
def test_a_divergence_is_a_function_of_three(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match=r"TopKObjective: divergence: it is .*, expected a function of \(student,teacher,tail\)"):
        TopKObjective(wrong)
    assert TopKObjective(partial(jensen_shannon, beta=0.1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((FusedOPDLoss(), 1.0), "WeightedLoss: coefficient is FusedOPDLoss.*, expected a number"),
        ((float("nan"), FusedOPDLoss()), "WeightedLoss: coefficient is nan, expected finite"),
        ((1.0, "sft"), "Loss: it is a str"),
    ],
)
def test_a_weighted_loss_refuses_pairs_that_are_not_a_number_and_a_loss(wrong: Any, message: str) -> None:
    with pytest.raises(InvalidRecordError, match=message):
        WeightedLoss([(1.0, FusedOPDLoss()), wrong])


@pytest.mark.parametrize("terms", [[FusedOPDLoss(), FusedOPDLoss()], FusedOPDLoss(), [(1.0,)], (1.0, FusedOPDLoss())])
def test_a_weighted_loss_refuses_what_is_not_pairs(terms: Any) -> None:
    with pytest.raises(ArgumentError, match=r"WeightedLoss: its terms are .*, expected .*pairs; pass"):
        WeightedLoss(terms)


@pytest.mark.parametrize("kind", [OPDObjective, ReferenceOPDLoss, FusedOPDLoss])
@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (importance_ratio, "Transforms: it is a function, expected several"),
        (partial(extrapolate, scale=1.5), "Transforms: it is a partial, expected several"),
        ((importance_ratio, extrapolate), r"Transform: it is a function of .*scale.*, expected a function of \(signal\)"),
        (["power"], r"Transform: it is a str, expected a function of \(signal\)"),
    ],
)
def test_transforms_are_several_functions_of_a_signal(kind: Any, transforms: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        kind(transforms=transforms)


@pytest.mark.parametrize("kind", [OPDObjective, ReferenceOPDLoss, FusedOPDLoss])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio_to_ref": True, "transforms": [ppo_clip]}, "ratio_to_ref and ppo_clip, .* the ratio would count twice; leave one out"),
        ({"ratio_to_ref": True, "transforms": [log_compress, partial(importance_ratio, cap=2.0)]}, "ratio_to_ref and importance_ratio, "),
        ({"transforms": [importance_ratio, ppo_clip]}, "importance_ratio and ppo_clip, "),
        (
            {"kl_baseline": True, "transforms": [partial(extrapolate, scale=1.5)]},
            "kl_baseline and extrapolate, .* the last replaces the advantage",
        ),
        ({"kl_baseline": True, "transforms": [partial(power, alpha=0.5)]}, "kl_baseline and power, "),
        ({"kl_baseline": True, "transforms": [entropy_advantage]}, "kl_baseline and entropy_advantage, "),
        ({"transforms": [partial(extrapolate, scale=1.5), entropy_advantage]}, "extrapolate and entropy_advantage, "),
    ],
)
def test_parts_of_which_one_alone_is_meant_are_refused_together(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRecordError, match=f"{kind.__name__}: it has {message}"):
        kind(**settings)


@pytest.mark.parametrize("kind", [OPDObjective, ReferenceOPDLoss, FusedOPDLoss])
@pytest.mark.parametrize("first", [log_compress, partial(add_labels, scale=2.0)])
def test_what_replaces_the_advantage_comes_before_what_changes_it(kind: Any, first: Any) -> None:
    last = partial(power, alpha=0.5)
    name = getattr(first, "func", first).__name__
    with pytest.raises(
        InvalidRecordError, match=f"{kind.__name__}: power is behind {name}, and replaces the advantage that it makes; change their order"
    ):
        kind(transforms=(first, importance_ratio, last))
    assert kind(transforms=(last, importance_ratio, first)).transforms[-1] is first


def test_a_ratio_of_the_tokens_before_and_a_baseline_stand_beside_a_ratio() -> None:
    assert FusedOPDLoss(ratio_to_ref=True, kl_baseline=True, transforms=(partial(window_ratio, window=3), log_compress))
    assert FusedOPDLoss(kl_baseline=True, transforms=(ppo_clip,))


@pytest.mark.parametrize("name", STORED)
def test_the_suite_rejects_a_loss_that_reads_what_is_stored_of_tokens_that_do_not_count(name: str) -> None:
    def loss(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        output, stored = ReferenceOPDLoss(clip=None)(hidden_ND, head, batch), getattr(batch, name)
        return output if stored is None else evolve(output, clipped_sum=output.clipped_sum + 0 * stored.sum())

    assert broken_clauses(loss, cases=list) == ["test_tokens_that_do_not_count_may_hold_anything"]


@pytest.mark.parametrize("counted", [0.7, 0.0])
@pytest.mark.parametrize("where", ["divergence", "transform"])
def test_a_parameter_in_an_objective_gets_the_same_gradient_from_both_paths(where: str, counted: float) -> None:
    scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    @per_token
    def scaled(signal: Signal) -> Signal:
        return evolve(signal, weight=signal.weight * scale.exp())

    def learnt(student: Tensor, teacher: Tensor, tail: Tensor) -> Tensor:
        return scale.exp() * reverse_kl(student, teacher, tail)

    objective = TopKObjective(learnt) if where == "divergence" else OPDObjective(transforms=(scaled,))
    case, found = loss_case("learnt", [20, 20], counted=counted), list[list[Tensor]]()
    for loss in (ReferenceLoss(objective), FusedLoss(objective, Chunking(1)), FusedLoss(objective)):
        hidden_ND, head = case.leaves()
        total = loss(hidden_ND, head, case.batch).loss_sum
        found.append([total.detach(), *torch.autograd.grad(total, [scale, hidden_ND, head.weight])])
    for mine in found[1:]:
        torch.testing.assert_close(mine, found[0])
    assert (found[0][1] != 0) == (counted > 0)


def test_losses_that_are_a_parameter_themselves_keep_its_gradient() -> None:
    case = loss_case("bare", counted=1.0)
    own_M = torch.ones(15, dtype=torch.float64, requires_grad=True)

    class Bare(Gap):
        def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
            return evolve(super().__call__(logprobs_MK, tokens), loss=own_M)

    loss = FusedLoss(Bare("", True))(*case.leaves(), case.batch).loss_sum
    assert torch.autograd.grad(loss, own_M)[0].eq(1).all()


@both_paths
def test_an_objective_without_a_gradient_gives_a_sum_that_has_none(path: Any) -> None:
    class Constant(Gap):
        def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
            return super().__call__(logprobs_MK.detach(), tokens)

    case = loss_case("constant", [20, 20])
    assert not path(Constant("", True))(*case.leaves(), case.batch).loss_sum.requires_grad
    both = WeightedLoss([(1.0, path(Constant("", True))), (0.5, FusedOPDLoss())])(*case.leaves(), case.batch)
    assert both.loss_sum.requires_grad


class Centred(Gap):
    """Lightning with the mean advantage of each rollout taken off, wrongly marked `per_token`; it reads segments itself."""

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        gap_M = (logprobs_MK[:, 0] - tokens.teacher()).detach()
        sums_S, counts_S = (gap_M.new_zeros(1 + max(tokens.segment_ids.tolist(), default=0)) for _ in range(2))
        sums_S.index_add_(0, tokens.segment_ids, gap_M)
        counts_S.index_add_(0, tokens.segment_ids, torch.ones_like(gap_M))
        centred_M = gap_M - (sums_S / counts_S)[tokens.segment_ids]
        return evolve(super().__call__(logprobs_MK, tokens), loss=tokens.weight * centred_M * logprobs_MK[:, 0])


@pytest.mark.parametrize("chunk_bytes", [None, 144 << 20])
def test_the_suite_rejects_a_wrong_mark_whatever_the_size_of_chunks(chunk_bytes: int | None) -> None:
    broken = broken_clauses(FusedLoss(Centred("", True), Chunking(chunk_bytes)), ReferenceLoss(Centred("", True)))
    assert "test_sums_and_gradients_are_as_exact_as_the_plain_ones_in_every_dtype" in broken
    assert broken_clauses(FusedLoss(Centred("", False)), ReferenceLoss(Centred("", False))) == []


def test_tokens_of_a_chunk_are_not_split_into_rollouts() -> None:
    def centred(signal: Signal) -> Signal:
        return evolve(signal, advantages=torch.cat([part - part.mean() for part in signal.tokens.split(signal.advantages)]))

    case = loss_case("split", counted=1.0)
    assert FusedOPDLoss(transforms=(centred,))(*case.leaves(), case.batch)
    with pytest.raises(
        InvalidRecordError, match=r"they are those of a chunk, .* expected whole rollouts to split; leave the mark `per_token` out"
    ):
        FusedOPDLoss(transforms=(per_token(centred),))(*case.leaves(), case.batch)


@pytest.mark.parametrize(
    "weigh", [torch.ones_like, torch.square, lambda weight_M: weight_M / weight_M.sum()], ids=["forgotten", "squared", "share"]
)
def test_the_suite_rejects_a_loss_that_is_not_linear_in_the_weights(weigh: Callable[[Tensor], Tensor]) -> None:
    class Own(Gap):
        def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
            loss_M = weigh(tokens.weight) * (logprobs_MK[:, 0] - tokens.teacher()) ** 2
            return evolve(super().__call__(logprobs_MK, tokens), loss=loss_M)

    loss = ReferenceLoss(Own("", False))
    assert "test_twice_the_weights_of_one_rollout_give_twice_its_part_and_change_no_other" in broken_clauses(loss, loss)


def own_ratio(signal: Signal, cap: float = 2.0) -> Signal:
    return evolve(signal, weight=signal.weight * (signal.student_logprobs - signal.tokens.sampler()).exp().clamp(max=cap))


class Own:
    """A transform that is a method, or an instance that takes no attributes."""

    __slots__ = ()

    def by_ratio(self, signal: Signal) -> Signal:
        return own_ratio(signal)

    __call__ = by_ratio


@pytest.mark.parametrize("make", [lambda: partial(own_ratio, cap=3.0), Own, lambda: Own().by_ratio], ids=["partial", "instance", "method"])
def test_whatever_is_a_transform_takes_marks(make: Callable[[], Transform]) -> None:
    def marked(mark: Callable[[Transform], Transform]) -> OPDObjective:
        return OPDObjective(transforms=(mark(make()),))

    assert not marked(lambda transform: transform).per_token
    assert marked(per_token).per_token
    assert marked(with_entropy).wants_entropy
    assert marked(baselined).baselined
    assert marked(uncorrected).uncorrected
    with pytest.raises(InvalidRecordError, match="the ratio would count twice"):
        OPDObjective(ratio_to_ref=True, transforms=(with_ratio(make()),))
    with pytest.raises(InvalidRecordError, match="the last replaces the advantage"):
        OPDObjective(kl_baseline=True, transforms=(partial(replacing(make())),))


def test_a_partial_has_the_marks_of_its_function_and_its_own() -> None:
    @with_ratio
    def corrected(signal: Signal, cap: float) -> Signal:
        return own_ratio(signal, cap)

    twice = partial(per_token(partial(corrected, cap=2.0)))
    assert OPDObjective(transforms=(twice,)).per_token
    with pytest.raises(InvalidRecordError, match=r"it has ratio_to_ref and corrected, .* the ratio would count twice"):
        OPDObjective(ratio_to_ref=True, transforms=(twice,))


@pytest.mark.parametrize("transform", [log_compress, own_ratio, add_labels], ids=["of lopd", "own", "labels"])
def test_labels_are_read_or_not_however_many_partials_are_around_a_transform(transform: Transform) -> None:
    objectives = [OPDObjective(transforms=(each,)) for each in (transform, partial(per_token(partial(transform))))]
    assert [objective.ignores_labels for objective in objectives] == [transform is log_compress] * 2


@both_paths
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids + 67, r"Loss: ids are from \d+ to \d+, expected from 0 to 66, the rows of the head's weight"),
        (lambda ids: -1 - ids, r"Loss: ids are from -\d+ to -\d+, expected from 0 to 66"),
        (lambda ids: ids.double(), r"Loss: ids are of dtype torch.float64, expected torch.int64; convert them"),
        (lambda ids: ids > 0, r"Loss: ids are of dtype torch.bool, expected torch.int64"),
    ],
    ids=["beyond", "below", "numbers", "bool"],
)
def test_ids_without_a_row_in_the_head_are_refused(path: Any, change: Callable[[Tensor], Tensor], message: str) -> None:
    for per_token_alone in (True, False):
        own = Gap("", per_token_alone)
        own.ids = lambda tokens: change(tokens.targets[:, None])  # type: ignore[method-assign]
        refused(path, own, message)
