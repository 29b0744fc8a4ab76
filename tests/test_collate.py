"""From ragged records to a batch: what is aligned with what, and what it weighs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from attrs import evolve, fields
from helpers import make_rollout, make_store, random_records, scored
from hypothesis import given
from named_batches import PLAIN, POSITIONS, VOCAB, numbered_records, numbered_stream, quick, weightings
from torch import Tensor

from lopd import batches, collate
from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.records import Batch, LMHead, Rollout, ScoredRollout, Weighting, by_rollout, by_token
from lopd.testing import tiny_top_k


def named_scores(rollout: Rollout) -> list[float]:
    """Return scores that name the token of the rollout they belong to, exactly representable in float32."""
    start = rollout.prompt_ids.size
    return [-(16 * (start + t) + token) / 1024 for t, token in enumerate(rollout.response_ids.tolist())]


def named(value: float) -> tuple[int, int]:
    """Return the position and token that a score of `named_scores` names."""
    return divmod(round(-1024 * value), 16)


def position_table_PV() -> Tensor:
    """Return the log-probs of a model that knows nothing but where a token stands; no two positions are alike."""
    return torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


def position_scores(rollout: Rollout) -> list[float]:
    """Return that model's scores of the response tokens, counted from the start of the prompt."""
    start = rollout.prompt_ids.size
    return [float(position_table_PV()[start + t, token]) for t, token in enumerate(rollout.response_ids.tolist())]


def disagreement(batch: Batch) -> float:
    """Return the largest gradient of the plain loss where the model of the scores is also the student.

    It is 0 if all tokens meet their own score.
    """
    hidden_NP = torch.nn.functional.one_hot(batch.position_ids + 1, POSITIONS).double().requires_grad_()
    PLAIN(hidden_NP, LMHead(position_table_PV().T), batch).loss_sum.backward()
    assert hidden_NP.grad is not None
    return float(hidden_NP.grad.abs().max())


def records_scored_by(
    scorer: Callable[[Rollout], Sequence[float]], seed: int, count: int = 4, longest: int = 5, masked: float = 0.3
) -> list[ScoredRollout]:
    return [scored(r.rollout, {"teacher": scorer(r.rollout)}) for r in random_records(seed, count, VOCAB, longest, masked)]


@given(st.integers(0, 2**24), st.integers(1, 4), st.integers(1, 5))
@quick
def test_pain_02_each_score_stands_at_the_entry_that_predicts_its_token(seed: int, count: int, longest: int) -> None:
    batch = collate(records_scored_by(named_scores, seed, count, longest), by_token, teacher="teacher")
    assert batch.teacher_logprobs is not None
    rows = zip(batch.position_ids.tolist(), batch.targets.tolist(), batch.weight.tolist(), batch.teacher_logprobs.tolist(), strict=True)
    assert all(named(score) == (position + 1, target) for position, target, weight, score in rows if weight > 0)


@given(st.integers(0, 2**24), st.integers(1, 4), st.integers(1, 5))
@quick
def test_pain_02_a_student_that_is_the_teacher_finds_no_gap_at_any_token(seed: int, count: int, longest: int) -> None:
    assert disagreement(collate(records_scored_by(position_scores, seed, count, longest), by_token, teacher="teacher")) < 1e-6


def roll(values_N: Tensor | None, by: int) -> Tensor:
    assert values_N is not None
    return values_N.roll(by)


MISTAKES: dict[str, Callable[[Batch], Batch]] = {
    "scores one too late": lambda b: evolve(b, teacher_logprobs=roll(b.teacher_logprobs, 1)),
    "scores one too early": lambda b: evolve(b, teacher_logprobs=roll(b.teacher_logprobs, -1)),
    "targets not shifted": lambda b: evolve(b, targets=b.inputs),
    "weights one too early": lambda b: evolve(b, weight=b.weight.roll(-1)),
    "positions run on over the rollouts": lambda b: evolve(b, position_ids=torch.arange(b.inputs.numel()) % (POSITIONS - 1)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_pain_02_the_check_sees_every_shift_by_one(mistake: Callable[[Batch], Batch]) -> None:
    batch = collate(records_scored_by(position_scores, seed=3), by_token, teacher="teacher")
    assert disagreement(mistake(batch)) > 0.1


def test_two_packed_rollouts_look_like_this() -> None:
    first = scored(make_rollout("a", [10, 11, 12], [13, 14], [True, False]), {"t": [-1.0, -2.0], "r": [-3.0, -4.0]})
    second = scored(make_rollout("b", [20], [21, 22, 23], [True, True, True]), {"t": [-5.0, -6.0, -7.0], "r": [-8.0, -9.0, 0.0]})
    batch = collate([first, second], by_token, teacher="t", ref="r")
    assert batch.inputs.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert batch.targets.tolist() == [11, 12, 13, 14, 21, 22, 23]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.segment_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.weight.tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert batch.teacher_logprobs is not None
    assert batch.teacher_logprobs.tolist() == [0, 0, -1, -2, -5, -6, -7]
    assert batch.ref_logprobs is not None
    assert batch.ref_logprobs.tolist() == [0, 0, -3, -4, -8, -9, 0]


def test_a_batch_has_int64_ids_and_float32_values() -> None:
    records = [
        evolve(
            r,
            rollout=evolve(r.rollout, sampler_logprobs=r.scores["ref"]),
            top_k=dict.fromkeys(("teacher", "ref"), tiny_top_k(r.rollout.response_ids.size, drawn=2)),
        )
        for r in random_records(0, 2)
    ]
    batch = collate(records, teacher="teacher", ref="ref", top_k="teacher", label="teacher", label_mean="ref")
    assert {f.name: str(getattr(getattr(batch, f.name), "dtype", None)).removeprefix("torch.") for f in fields(Batch)} == {
        **dict.fromkeys(["inputs", "targets", "position_ids", "segment_ids", "top_k_ids", "drawn_ids"], "int64"),
        **dict.fromkeys(["weight", "teacher_logprobs", "ref_logprobs", "sampler_logprobs", "top_k_logprobs", "top_k_tail"], "float32"),
        "behavior_logprobs": "None",
        **dict.fromkeys(["drawn_logprobs", "drawn_ref_logprobs", "label_values", "label_means"], "float32"),
    }


def test_pain_02_one_prompt_token_and_one_response_token_give_one_prediction() -> None:
    batch = collate([scored(make_rollout("a", [7], [9]), {"t": [-0.5]})], teacher="t")
    assert batch.teacher_logprobs is not None
    columns = (batch.inputs, batch.targets, batch.position_ids, batch.weight, batch.teacher_logprobs)
    assert [column.tolist() for column in columns] == [[7], [9], [0], [1.0], [-0.5]]


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]])
@pytest.mark.parametrize("mask", [[True, False, False, True, True], [False, True, False, True, False], [False, False, False, False, True]])
def test_pain_21_masked_tokens_inside_a_response_do_not_shift_scores(prompt: list[int], mask: list[bool]) -> None:
    rollout = make_rollout("multi-turn", prompt, [4, 0, 3, 1, 2], mask)
    batch = collate([scored(rollout, {"teacher": named_scores(rollout)})], by_token, teacher="teacher")
    assert batch.teacher_logprobs is not None
    counted = [named(score) for score, weight in zip(batch.teacher_logprobs.tolist(), batch.weight.tolist(), strict=True) if weight > 0]
    tokens = [*prompt, 4, 0, 3, 1, 2]
    assert counted == [(len(prompt) + t, tokens[len(prompt) + t]) for t, counts in enumerate(mask) if counts]


def test_pain_21_a_masked_token_is_still_read_as_context() -> None:
    batch = collate([scored(make_rollout("multi-turn", [1], [2, 3, 4], [True, False, True]), {})])
    assert batch.inputs.tolist() == [1, 2, 3]


def test_by_rollout_gives_each_rollout_weight_one_shared_by_its_counted_tokens() -> None:
    records = [scored(make_rollout("a", [1, 1], [2, 3, 4, 4], [True, False, True, False]), {}), scored(make_rollout("b", [1], [2]), {})]
    assert collate(records, by_rollout).weight.tolist() == [0, 0.5, 0, 0.5, 0, 1]


def test_by_token_gives_each_counted_token_weight_one() -> None:
    records = [scored(make_rollout("a", [1, 1], [2, 3, 4, 4], [True, False, True, False]), {}), scored(make_rollout("b", [1], [2]), {})]
    assert collate(records, by_token).weight.tolist() == [0, 1, 0, 1, 0, 1]


@weightings
def test_rollouts_without_a_mask_are_weighed_at_once_as_one_by_one_bit_for_bit(
    weighting: Weighting, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [scored(make_rollout(f"r{length}", [1, 1], [2] * length), {}) for length in (1, 3, 49, 1000, 7)]
    apart = collate(records, partial(weighting)).weight
    monkeypatch.setattr("lopd.records.collate._weights", None)
    assert torch.equal(collate(records, weighting).weight, apart)


def test_rollouts_share_the_weight_alike_unless_told_otherwise() -> None:
    record = scored(make_rollout("a", [1], [2, 3]), {})
    assert collate([record]).weight.tolist() == [0.5, 0.5]
    assert batches(make_store([record]), teacher=None, rollouts_per_step=1).step(0).batches[0].weight.tolist() == [0.5, 0.5]


@weightings
def test_a_rollout_in_which_no_token_counts_weighs_nothing(weighting: Weighting) -> None:
    assert collate([scored(make_rollout("a", [1, 2], [3, 4], [False, False]), {})], weighting).weight.tolist() == [0, 0, 0]


def test_a_weighting_that_weighs_a_masked_token_is_refused_and_the_rollout_named() -> None:
    record = scored(make_rollout("agent", [1], [2, 3, 4], [True, False, True]), {})
    with pytest.raises(InvalidRecordError, match=r"'agent': its weights .* and 0 where the loss mask is False"):
        collate([record], lambda mask: np.full(len(mask), 1 / len(mask), np.float32))


def test_a_step_says_counts_and_not_thousands_of_numbers() -> None:
    step = numbered_stream(4, 4).step(0)
    (batch,) = step.batches
    counts = f"rollouts 4; read tokens {batch.inputs.numel()}; tokens that count {len(batch.counted)}"
    assert repr(step) == f"Step 0: micro-batches 1; {counts}\n  {counts}"
    assert repr(batch).startswith(f"Batch of 4 {counts[:8]}: {counts[12:]}; with teacher_logprobs")


def test_columns_that_were_not_asked_for_are_none() -> None:
    batch = collate(random_records(0, 2))
    assert batch.teacher_logprobs is None
    assert batch.ref_logprobs is None


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_batch_moves_to_a_device_that_is_named_as_tensors_take_it(device: str | torch.device) -> None:
    batch = collate(random_records(0, 2))
    moved = batch.to(device)
    assert {moved.inputs.device, moved.weight.device, moved.counted.device} == {torch.device("meta")}
    assert moved.counts == batch.counts


def test_no_records_make_no_batch() -> None:
    with pytest.raises(InvalidRecordError, match="0 rollouts"):
        collate([])
    with pytest.raises(InvalidRecordError, match="0 rollouts"):
        collate([], teacher="teacher", top_k="teacher")


@pytest.mark.parametrize("columns", [{"teacher": "big"}, {"ref": "big"}])
def test_a_record_without_the_column_is_named(columns: dict[str, Any]) -> None:
    records = [scored(make_rollout("has it", [1], [2]), {"big": [-1.0]}), scored(make_rollout("has it not", [1], [2]), {"small": [-1.0]})]
    with pytest.raises(MissingScoresError, match="'has it not': column 'big'"):
        collate(records, **columns)


def test_the_name_of_a_weighting_is_none() -> None:
    with pytest.raises(InvalidRecordError, match="weighting is 'by_token', expected a function"):
        batches(make_store(numbered_records(2), columns=("teacher",)), weighting="by_token")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"rollouts_per_step": 0}, {"seed": -1}, {"tokens_per_batch": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRecordError, match="expected at least"):
        batches(make_store(numbered_records(2), columns=("teacher",)), **wrong)
