"""Records refuse what breaks their contract, with one sentence that names which record, which field and which entry."""

import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attrs import fields

from lopd.errors import InvalidRecordError
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import ModelId, Prompt, Provenance, Rollout, SamplingParams, Scores, TopK, floor_logprobs
from lopd.testing import assert_same_rollout, tiny_rollout

NAN, INF = float("nan"), float("inf")


# --- token ids --------------------------------------------------------------------------------------------------------------------------

WRONG_IDS = {
    "floats": ([1.0, 2.0], "dtype float64 and shape (2,), expected a vector of integers"),
    "text": (["a"], "dtype <U1"),
    "bools": ([True, False], "dtype bool"),
    "a matrix": ([[1, 2]], "shape (1, 2), expected a vector"),
    "a number": (7, "shape (), expected a vector"),
    "a padding marker": ([5, -100], "range is [-100, 5], expected 0 to 2**31 - 1"),
    "more than int32 holds": ([2**31], "range is [2147483648, 2147483648]"),
    "a ragged list": ([1, [2]], "numpy cannot read a list"),
    "more than int64 holds": (np.array([2**63], np.uint64), "range is [9223372036854775808"),
}
wrong_ids = pytest.mark.parametrize(("ids", "message"), WRONG_IDS.values(), ids=WRONG_IDS.keys())


def refused(message: str) -> Any:
    """Return the error whose message has this text in it."""
    return pytest.raises(InvalidRecordError, match=re.escape(message))


@wrong_ids
def test_ids_that_are_no_token_ids_are_refused_wherever_they_are_passed(ids: Any, message: str) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: Prompt("p", ids),
        lambda: Rollout("r", ids, [1], [True], "stop"),
        lambda: Rollout("r", [1], ids, [True], "stop"),
    ]
    for make in makers:
        with refused("Token ids: ") as caught:
            make()
        assert message in str(caught.value)


@pytest.mark.parametrize("ids", [[1, 2], [[1.0]]])
def test_candidates_that_are_no_matrix_of_ids_are_refused(ids: Any) -> None:
    with refused("expected a matrix of integers"):
        TopK(ids, [[-1.0]], [0.5])


def test_the_largest_and_the_smallest_id_are_kept_as_int32() -> None:
    prompt = Prompt("p", np.array([0, 2**31 - 1], np.uint64))
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist() == [0, 2**31 - 1]


def test_an_empty_prompt_is_refused_by_name() -> None:
    with refused("Prompt 'p7': it has 0 tokens, expected at least 1"):
        Prompt("p7", [])


# --- rollouts ---------------------------------------------------------------------------------------------------------------------------

WRONG_ROLLOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt_ids": []}, "prompt_ids has 0 tokens, expected at least 1"),
    "no response": ({"response": [], "loss_mask": []}, "response_ids has 0 tokens, expected at least 1"),
    "a mask that is too short": ({"loss_mask": [True, False]}, "loss_mask has shape (2,), but response_ids has shape (3,)"),
    "a mask that is too long": ({"loss_mask": [1, 1, 0, 1]}, "loss_mask has shape (4,), but response_ids has shape (3,)"),
    "a mask that is a matrix": ({"loss_mask": [[1, 1, 0]]}, "loss_mask has shape (1, 3), but response_ids has shape (3,)"),
    "an engine's word": ({"finish_reason": "eos"}, "finish_reason is 'eos', expected 'stop' or 'length'"),
    "no word": ({"finish_reason": None}, "finish_reason is None"),
    "a round before the first": ({"generation": -1}, "generation is -1, expected at least 0"),
    "a log-prob too few": ({"behavior_logprobs": [-1.0, -1.0]}, "behavior_logprobs has shape (2,), expected (3,)"),
    "a positive log-prob": (
        {"behavior_logprobs": [-1.0, 0.25, -1.0]},
        "behavior_logprobs[1] is 0.25, expected a finite log-prob of at most 0",
    ),
    "a missing log-prob": ({"behavior_logprobs": [-1.0, -1.0, NAN]}, "behavior_logprobs[2] is nan"),
    "an impossible token": ({"behavior_logprobs": [-INF, -1.0, -1.0]}, "behavior_logprobs[0] is -inf"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG_ROLLOUTS.values(), ids=WRONG_ROLLOUTS.keys())
def test_a_rollout_with_a_field_that_does_not_fit_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with refused(f"Rollout 'p1/s0/g0': {message}"):
        tiny_rollout("p1/s0/g0", **fields)


WRONG_MASKS = {
    "labels": ([1, -100, 1], "entry 1 is -100, expected True, False, 1 or 0"),
    "counts": ([1, 2, 0], "entry 1 is 2"),
    "floats": ([1.0, 0.0, 1.0], "dtype float64 and shape (3,), expected bools, or integers that are 0 or 1"),
    "text": (["True", "False", ""], "dtype <U5"),
    "nothing": ([None, True, True], "dtype object"),
    "a ragged list": ([[True], True, True], "numpy cannot read a list"),
}


@pytest.mark.parametrize(("mask", "message"), WRONG_MASKS.values(), ids=WRONG_MASKS.keys())
def test_a_loss_mask_of_anything_but_bools_or_zeros_and_ones_is_refused(mask: Any, message: str) -> None:
    with refused("Loss mask: ") as caught:
        tiny_rollout("r", loss_mask=mask)
    assert message in str(caught.value)


@pytest.mark.parametrize("mask", [[True, False, True], [1, 0, 1], np.array([1, 0, 1], np.uint8), np.array([True, False, True])])
def test_a_loss_mask_of_bools_or_of_zeros_and_ones_is_taken(mask: Any) -> None:
    rollout = tiny_rollout("r", loss_mask=mask)
    assert rollout.loss_mask.dtype == np.bool_
    assert rollout.loss_mask.tolist() == [True, False, True]


def test_the_arrays_of_a_rollout_are_copies_that_nobody_can_write_to() -> None:
    mine = np.array([5, 6, 1])
    rollout = tiny_rollout("r", mine, behavior_logprobs=[-1.0, 0.0, -2.0])
    mine[0] = 99
    assert rollout.response_ids.tolist() == [5, 6, 1]
    for array in (rollout.prompt_ids, rollout.response_ids, rollout.loss_mask, rollout.behavior_logprobs):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("logprobs", [None, [-1.0, 0.0, -2.5]])
def test_a_rollout_from_a_store_equals_the_one_that_was_checked(logprobs: Any) -> None:
    reported = {"behavior_logprobs": logprobs, "sampler_logprobs": logprobs}
    checked = tiny_rollout("p1/s0/g3", loss_mask=[True, False, True], generation=3, **reported)
    unchecked = Rollout.from_store(**{field.name: getattr(checked, field.name) for field in fields(Rollout)})
    assert_same_rollout(unchecked, checked)
    assert_same_rollout(pickle.loads(pickle.dumps(unchecked)), checked)  # noqa: S301
    assert len(unchecked) == len(checked)
    assert repr(unchecked) == repr(checked)


def test_the_content_hash_knows_where_the_response_begins_and_what_counts() -> None:
    hashes = {
        tiny_rollout("r", [5, 6, 1]).content_hash,
        tiny_rollout("r", [6, 1], prompt_ids=[4, 5]).content_hash,
        tiny_rollout("r", [5, 6, 1], loss_mask=[1, 1, 0]).content_hash,
        tiny_rollout("r", [5, 6, 2]).content_hash,
    }
    assert len(hashes) == 4
    reported = {"behavior_logprobs": [-1.0] * 3, "sampler_logprobs": [-0.5] * 3}
    assert tiny_rollout("another name", [5, 6, 1], generation=2, **reported).content_hash in hashes


# --- scores -----------------------------------------------------------------------------------------------------------------------------

WRONG_SCORES: dict[str, tuple[list[float], str]] = {
    "one too few": ([-1.0, -1.0], "logprobs has shape (2,), expected (3,)"),
    "positive": ([-1.0, 1e-6, -1.0], "logprobs[1] is 9.999999974752427e-07, expected a finite log-prob"),
    "missing": ([NAN, -1.0, -1.0], "logprobs[0] is nan"),
    "impossible": ([-1.0, -1.0, -INF], "logprobs[2] is -inf"),
    "infinite": ([-1.0, INF, -1.0], "logprobs[1] is inf"),
}


@pytest.mark.parametrize(("logprobs", "message"), WRONG_SCORES.values(), ids=WRONG_SCORES.keys())
def test_scores_that_are_no_log_probs_of_the_rollout_are_refused_by_its_name(logprobs: list[float], message: str) -> None:
    with refused(f"Rollout 'r7': {message}"):
        Scores.of(tiny_rollout("r7"), logprobs)


@pytest.mark.parametrize("values", [["a"], [[-1.0], -1.0], torch.zeros(3, requires_grad=True), torch.zeros(3, dtype=torch.bfloat16)])
def test_scores_that_numpy_cannot_read_are_refused(values: Any) -> None:
    with refused("Log-probs: numpy cannot read a "):
        Scores.of(tiny_rollout("r7"), values)


@pytest.mark.parametrize("value", [0.5, NAN, -INF])
def test_scores_made_without_their_rollout_are_refused_by_its_name_too(value: float) -> None:
    with refused(f"Scores of rollout 'r7': logprobs[1] is {value}"):
        Scores("r7", b"hash", [-1.0, value])


def test_an_impossible_token_can_be_scored_with_a_floor_that_is_counted() -> None:
    scores = Scores.of(tiny_rollout("r"), *floor_logprobs([-1.0, -INF, -INF], floor=-50.0))
    assert (scores.logprobs.tolist(), scores.floored) == ([-1.0, -50.0, -50.0], 2)
    with refused("logprobs[1] is nan"):
        Scores.of(tiny_rollout("r"), *floor_logprobs([-1.0, NAN, -1.0]))


@pytest.mark.parametrize("floor", [NAN, -INF, -1e39, 0.5, "low"])
def test_a_floor_that_is_no_log_prob_is_refused(floor: Any) -> None:
    with refused(f"Log-probs: floor is {floor!r}, expected"):
        floor_logprobs([-1.0, -2.0], floor)


@pytest.mark.parametrize("tensor", [torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, requires_grad=True)])
def test_log_probs_that_numpy_cannot_read_are_refused_before_they_are_floored(tensor: torch.Tensor) -> None:
    with refused("Log-probs: numpy cannot read a Tensor"):
        floor_logprobs(tensor)


WRONG_TOP_K: dict[str, tuple[Any, Any, Any, str]] = {
    "log-probs of another shape": ([[1, 2]], [[-1.0]], [0.5], "logprobs has shape (1, 1), expected (1, 2)"),
    "a tail of another length": ([[1]], [[np.log(0.5)]], [0.5, 0.5], "tail has shape (2,), expected (1,)"),
    "a positive log-prob": ([[1]], [[0.5]], [0.0], "logprobs[0, 0] is 0.5"),
    "a sum below 1": ([[1], [2]], np.log([[0.5], [0.5]]), [0.5, 0.4], "token 1 has tail 0.4"),
    "a sum above 1": ([[1, 2]], np.log([[0.5, 0.4]]), [0.2], "sums to 1.1000"),
    "a tail below 0": ([[1, 2]], np.log([[0.6, 0.6]]), [-0.2], "token 0 has tail -0.2"),
    "a tail that is missing": ([[1]], [[-1.0]], [NAN], "token 0 has tail nan"),
}


@pytest.mark.parametrize(("ids", "logprobs", "tail", "message"), WRONG_TOP_K.values(), ids=WRONG_TOP_K.keys())
def test_a_top_k_support_that_is_no_distribution_is_refused(ids: Any, logprobs: Any, tail: Any, message: str) -> None:
    with refused("Top-k: ") as caught:
        TopK(ids, logprobs, tail)
    assert message in str(caught.value)


def test_scores_with_a_top_k_of_another_length_are_refused_by_the_name_of_their_rollout() -> None:
    support = TopK([[1], [2]], np.log([[0.5], [0.5]]), [0.5, 0.5])
    with refused("Scores of rollout 'r7': top_k has 2 tokens, expected 3"):
        Scores.of(tiny_rollout("r7"), [-1.0] * 3, top_k=support)


# --- numbers that make no sense ---------------------------------------------------------------------------------------------------------

WRONG_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
    ({"temperature": -0.1}, "temperature is -0.1, expected finite and at least 0"),
    ({"temperature": INF}, "temperature is inf"),
    ({"temperature": NAN}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": NAN}, "top_p is nan"),
    ({"samples_per_prompt": 0}, "samples_per_prompt is 0, expected at least 1"),
    ({"seed": -1}, "seed is -1, expected at least 0"),
    ({"stop_ids": (2, -1)}, "smallest of stop_ids is -1, expected at least 0"),
    ({"candidates": -1}, "candidates is -1, expected at least 0"),
    ({"drawn": -1}, "drawn is -1, expected at least 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_SAMPLING)
def test_sampling_with_a_number_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with refused(f"Sampling: {message}"):
        SamplingParams(**fields)


def test_the_extremes_of_sampling_that_make_sense_are_taken() -> None:
    SamplingParams(max_new_tokens=1, temperature=0.0, top_p=1e-9, stop_ids=(0,))


@pytest.mark.parametrize("name", ["top_k", "candidates", "drawn"])
def test_a_provenance_with_less_than_nothing_is_refused_by_its_model(name: str) -> None:
    def made(value: int) -> Provenance:
        numbers: dict[str, Any] = {name: value}
        return Provenance(ModelId("teacher", "main", "float32"), "hash", "engine", **numbers)

    assert getattr(made(0), name) == 0
    with refused(f"Provenance of teacher@main: {name} is -1, expected at least 0"):
        made(-1)


@pytest.mark.parametrize("clip", [0.0, -10.0, INF, NAN])
def test_a_loss_with_a_clip_that_clips_everything_or_nothing_is_refused(clip: float) -> None:
    with refused(f"ReferenceOPDLoss: clip is {clip}, expected None, or finite and more than 0"):
        ReferenceOPDLoss(clip=clip)


def test_a_support_counts_each_of_its_distinct_tokens_once():
    half = [np.log(0.25), np.log(0.25)]
    with pytest.raises(InvalidRecordError, match=r"Top-k: token 1 has id 7 twice, which counts it twice; pass each id once"):
        TopK([[5, 7], [7, 7]], [half, half], [0.5, 0.5])
    assert TopK([[5, 7, 7]], [[*half, half[0]]], [0.5], drawn=1).distinct == 2
    with pytest.raises(InvalidRecordError, match="number of candidates"):
        TopK([[5, 7]], [half], [0.5], drawn=3)
