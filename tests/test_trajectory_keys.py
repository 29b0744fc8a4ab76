"""Keys of records: what is missing may be any null."""

import pandas as pd
import pytest
from test_trajectories import FORMS, LOGPROBS, LOOP, PRIME, VERL, imported, rollouts_of

from lopd.errors import PromptError

NULLS = [None, float("nan"), pd.NA, pd.NaT, pd.Series([float("nan")], dtype="float32")[0]]


@pytest.mark.parametrize("null", NULLS)
def test_a_key_whose_value_is_null_is_one_that_is_missing(null, tokenizer):
    missing = dict.fromkeys(["attention_mask", "prompt_mask", "messages", "output", "tools", "finish_reason", "trajectory", "prompts", "id"], null)
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
