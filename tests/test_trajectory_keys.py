"""Keys of records: what is missing may be any null, and what a framework keeps under a key of another is not left out silently."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_trajectories import BRANCH, DRAWN, FORMS, LOGPROBS, LOOP, PRIME, VERL, imported, rollouts_of

from lopd.errors import InvalidRecordError, PromptError

NULLS = [None, float("nan"), pd.NA, pd.NaT, pd.Series([float("nan")], dtype="float32")[0]]


@pytest.mark.parametrize("null", NULLS)
def test_a_key_whose_value_is_null_is_one_that_is_missing(null, tokenizer):
    missing = dict.fromkeys(
        ["attention_mask", "prompt_mask", "messages", "output", "tools", "finish_reason", "trajectory", "prompts", "id"], null
    )
    step = {**FORMS["verifiers"]["trajectory"][0]["tokens"], "prompt_mask": null, "completion_logprobs": null}
    for record in ({**missing, **LOOP, "response_logprobs": null}, {**missing, "trajectory": [{"tokens": step}]}):
        (rollout,) = rollouts_of(imported([record], tokenizer))
        assert rollout.behavior_logprobs is None
    with pytest.raises(PromptError, match="under 'responses', but not 'response_mask'"):
        imported([{**VERL, "response_mask": null}], tokenizer)


def test_records_of_several_forms_come_through_pandas(tokenizer):
    records = [VERL, LOOP, PRIME, *(FORMS[name] for name in ("branch", "verifiers", "agent-lightning"))]
    made = rollouts_of(imported(pd.DataFrame(records).to_dict("records"), tokenizer))
    assert len({rollout.content_hash for rollout in made}) == 1
    assert all(rollout.behavior_logprobs.tolist() == LOGPROBS for rollout in made)


def by_place(values):
    return {str(place): value for place, value in enumerate(values)}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize("made", [list, np.array, torch.tensor, lambda values: {"content": values}, by_place])
@pytest.mark.parametrize(
    ("form", "key", "own"),
    [
        (VERL, "response_logprobs", "rollout_log_probs"),
        (LOOP, "rollout_log_probs", "response_logprobs"),
        (PRIME, "logprobs", "completion_logprobs"),
        (PRIME, "sampling_per_token_logps", "completion_logprobs"),
        (BRANCH, "completion_logprobs", "logprobs"),
    ],
)
def test_log_probs_under_the_key_of_another_form_are_refused_by_name(form, key, own, made, tokenizer):
    record = {**without(form, own), key: made(LOGPROBS)}
    with pytest.raises(PromptError, match=f"^Trajectory number 0: it has log-probs under '{key}', .* does not read; rename it to '{own}'"):
        imported([record], tokenizer)
    (rollout,) = rollouts_of(imported([{**record, own: form[own]}], tokenizer))
    assert rollout.behavior_logprobs.tolist() == LOGPROBS


@pytest.mark.parametrize("key", ["tool_mask", "env_mask", "response_mask", "mask"])
def test_a_second_mask_is_refused_where_it_leaves_tokens_out(key, tokenizer):
    prompt = PRIME["prompt_ids"]
    for first, second in (([1] * 7, DRAWN), ([1] * 7, [0] * len(prompt) + DRAWN)):
        with pytest.raises(PromptError, match=f"it has a second mask under '{key}', .* lacks tokens of 'completion_mask'; multiply it"):
            imported([{**PRIME, "completion_mask": first, key: second}], tokenizer)
    with pytest.raises(PromptError, match=rf"its second mask '{key}' has shape \(5,\), expected \(7,\), one for each token"):
        imported([{**PRIME, key: DRAWN[:5]}], tokenizer)
    with pytest.raises(PromptError, match="'completion_mask' has 5 entries, expected 7"):
        imported([{**PRIME, "completion_mask": DRAWN[:5], key: DRAWN}], tokenizer)
    for unreadable in (
        [None] * 7,
        ["a"] * 7,
        [{"tool": 0}] * 7,
        {0: 1},
        by_place(DRAWN),
        {"content": DRAWN},
        {"tools": {"content": np.array(DRAWN)}},
    ):
        with pytest.raises(InvalidRecordError, match=rf"^Trajectory number 0: '{key}' is not a mask \(Loss mask: .*pass True"):
            imported([{**PRIME, key: unreadable}], tokenizer)
    nothing = ([], "text", True, {}, {"kind": "tools", "on": True, "names": []})
    for same in (DRAWN, [1] * 7, [0] * len(prompt) + DRAWN, [1] * (len(prompt) + 7), *nothing):
        (rollout,) = rollouts_of(imported([{**PRIME, key: same}], tokenizer))
        assert rollout.loss_mask.tolist() == list(map(bool, DRAWN))


def test_flags_under_the_key_of_log_probs_are_not_read(tokenizer):
    for flag in (True, 5, "top", [], np.array(1.0), torch.tensor(1.0), {"mean": -0.5}):
        assert len(imported([{**without(PRIME, "completion_logprobs"), "logprobs": flag}], tokenizer)) == 1


def test_keys_of_steps_are_looked_at_too(tokenizer):
    tokens = FORMS["verifiers"]["trajectory"][0]["tokens"]
    with pytest.raises(PromptError, match="step 0: it has a second mask under 'tool_mask'"):
        imported([{"trajectory": [{"tokens": {**tokens, "tool_mask": [0, 1]}}]}], tokenizer)


def test_a_mask_of_the_padding_of_a_prompt_is_named(tokenizer):
    with pytest.raises(PromptError, match=r"its prompt_mask has a 1, .*, or leave out a mask of padding, and the padding"):
        imported([{**PRIME, "prompt_mask": [1, 1]}], tokenizer)
