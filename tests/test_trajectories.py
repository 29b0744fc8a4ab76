"""Trajectories of agents -> rollouts: ids as they were recorded or proven, each token once, and no word of a tool is learnt."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_tokenizers import CHATML, byte_tokenizer

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    LanceStore,
    Lineage,
    MemoryStore,
    ModelId,
    SamplingParams,
    ZarrStore,
    batches,
    import_trajectories,
    make_prompts,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer
from lopd.errors import ArgumentError, ConflictError, EngineError, InvalidRecordError, PromptError, PromptWarning

POLICY, TEACHER = ModelId("policy", "1", "float32"), ModelId("teacher", "1", "float32")
SAMPLING = SamplingParams(max_new_tokens=64)
#: Asks, is answered by a tool, and answers: the prompt, and which of the tokens behind it were drawn.
PROMPT, RESPONSE, DRAWN = [10, 11], [12, 13, 20, 21, 22, 14, 0], [1, 1, 0, 0, 0, 1, 1]
LOGPROBS = [-0.5, -1.0, 0.0, 0.0, 0.0, -0.25, -2.0]
# the same conversation in the words of each framework
VERL = {"prompts": PROMPT, "responses": RESPONSE, "response_mask": DRAWN, "rollout_log_probs": LOGPROBS}
LOOP = {"prompt_ids": PROMPT, "response_ids": RESPONSE, "response_mask": DRAWN, "response_logprobs": LOGPROBS}
PRIME = {"prompt_ids": PROMPT, "prompt_mask": [0, 0], "completion_ids": RESPONSE, "completion_mask": DRAWN, "completion_logprobs": LOGPROBS}
BRANCH = {"token_ids": PROMPT + RESPONSE, "mask": [0, 0, *DRAWN], "logprobs": [0.0, 0.0, *LOGPROBS]}
CALLS = [(PROMPT, RESPONSE[:2], LOGPROBS[:2]), (PROMPT + RESPONSE[:5], RESPONSE[5:], LOGPROBS[5:])]
STEPS = {
    "trajectory": [
        {
            "tokens": {
                "prompt_ids": prompt,
                "prompt_mask": [0] * len(prompt),
                "completion_ids": drawn,
                "completion_mask": [1] * len(drawn),
                "completion_logprobs": logprobs,
                "is_truncated": False,
            }
        }
        for prompt, drawn, logprobs in CALLS
    ]
}
TRIPLETS = {
    "triplets": [
        {
            "prompt": {"token_ids": prompt},
            "response": {"token_ids": drawn, "logprobs": [{"token": "?", "logprob": value} for value in logprobs]},
        }
        for prompt, drawn, logprobs in CALLS
    ]
}
FORMS = {"verl": VERL, "agent loop": LOOP, "prime-rl": PRIME, "branch": BRANCH, "verifiers": STEPS, "agent-lightning": TRIPLETS}
#: As in Qwen: tools in front, calls and what tools said in tags, and what it thought before the last question left out.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set asked = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > asked.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
AGENT = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi", "reasoning_content": "greet"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def imported(records, tokenizer, **given):
    return import_trajectories(records, tokenizer, **{"policy": POLICY, "sampling": SAMPLING, **given})


def rollouts_of(store):
    return [record.rollout for record in store.read(range(len(store)))]


def shown(tokenizer, rollout):
    """Return the prompt, and the response with what was drawn in brackets, as text."""
    text, inside = "", False
    for token, drawn in zip(rollout.response_ids.tolist(), rollout.loss_mask.tolist(), strict=True):
        text += ("[" if drawn else "]") * (drawn != inside) + tokenizer.decode([token])
        inside = drawn
    return tokenizer.decode(rollout.prompt_ids.tolist()), text + "]" * inside


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rollout(form, tokenizer):
    (rollout,) = rollouts_of(imported([FORMS[form]], tokenizer))
    assert (rollout.prompt_ids.tolist(), rollout.response_ids.tolist()) == (PROMPT, RESPONSE)
    assert rollout.loss_mask.tolist() == list(map(bool, DRAWN))
    assert rollout.behavior_logprobs.tolist() == LOGPROBS
    assert (rollout.finish_reason, rollout.sampler_logprobs) == ("stop", None)


@pytest.mark.parametrize("form", FORMS)
def test_each_turn_is_a_rollout_whose_prompt_is_all_before_it(form, tokenizer):
    made = rollouts_of(imported([FORMS[form]], tokenizer, turns="each"))
    for rollout, (prompt, drawn, logprobs) in zip(made, CALLS, strict=True):
        assert (rollout.prompt_ids.tolist(), rollout.response_ids.tolist()) == (prompt, drawn)
        assert rollout.loss_mask.all()
        assert rollout.behavior_logprobs.tolist() == logprobs
    # of one prompt, so that an interval counts them as one draw
    assert [rollout.rollout_id.partition("/")[2] for rollout in made] == ["s0/g0", "s1/g0"]
    assert [rollout.finish_reason for rollout in made] == ["length", "stop"]


@pytest.mark.parametrize(("turns", "kept"), [([0], [0]), ([-1], [1]), ([1, 0, -1], [0, 1]), (range(1), [0])])
def test_chosen_turns_alone_are_replayed(turns, kept, tokenizer):
    made = rollouts_of(imported([VERL], tokenizer, turns=turns))
    assert [rollout.response_ids.tolist() for rollout in made] == [CALLS[t][1] for t in kept]


def test_a_conversation_without_the_chosen_turns_is_left_out_and_counted(tokenizer):
    short = {**VERL, "response_mask": [1, 1, 0, 0, 0, 0, 0]}
    with pytest.warns(PromptWarning, match=r"Trajectories: 1 have none of the turns \[1\], and were left out"):
        assert len(imported([VERL, short], tokenizer, turns=[1])) == 1
    with pytest.raises(PromptError, match="Trajectories: there are 0 rollouts in them"):
        imported([short], tokenizer, turns=[1])


def test_rows_of_a_padded_batch_lose_their_padding(tokenizer):
    padded = {
        "prompts": torch.tensor([0, 0, *PROMPT]),
        "responses": torch.tensor([*RESPONSE, 0, 0]),
        "response_mask": torch.tensor([*DRAWN, 0, 0]),
        "rollout_log_probs": torch.tensor([*LOGPROBS, 0.0, 0.0]),
    }
    whole = {**padded, "attention_mask": torch.tensor([0, 0, *[1] * 9, 0, 0])}
    assert rollouts_of(imported([whole], tokenizer))[0].content_hash == rollouts_of(imported([VERL], tokenizer))[0].content_hash
    with pytest.raises(PromptError, match=r"Trajectory number 0: its prompt begins with padding tokens; .* `attention_mask`"):
        imported([padded], tokenizer)


def test_what_a_tool_said_last_is_left_out_and_masked_log_probs_are_not_read(tokenizer):
    ends = {**VERL, "response_mask": [1, 1, 0, 0, 0, 0, 0], "rollout_log_probs": [-0.5, -1.0, *[float("nan")] * 5]}
    noise = {**VERL, "rollout_log_probs": [-0.5, -1.0, float("nan"), 7.0, None, -0.25, float("-inf")]}
    first, second = rollouts_of(imported([ends, noise], tokenizer))
    assert first.response_ids.tolist() == RESPONSE[:2]
    assert second.behavior_logprobs.tolist() == [*LOGPROBS[:-1], -100.0]


def test_files_and_triplets_without_a_record_are_read_alike(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(STEPS) + "\n")
    pq.write_table(pa.Table.from_pylist([STEPS]), tmp_path / "t.parquet")
    (wanted,) = rollouts_of(imported([STEPS], tokenizer))
    for form in (tmp_path / "t.jsonl", str(tmp_path / "t.parquet"), iter([STEPS]), [TRIPLETS["triplets"]]):
        assert rollouts_of(imported(form, tokenizer))[0].content_hash == wanted.content_hash


def test_log_probs_of_a_changed_distribution_go_where_the_caller_says(tokenizer):
    warm = SamplingParams(temperature=0.7)
    with pytest.raises(PromptError, match=r"drawn at temperature 0.7 and top-p 1; say what of"):
        imported([VERL], tokenizer, sampling=warm)
    for name in ("behavior", "sampler"):
        (rollout,) = rollouts_of(imported([VERL], tokenizer, sampling=warm, logprobs=name))
        other = {"behavior": "sampler", "sampler": "behavior"}[name]
        assert getattr(rollout, f"{name}_logprobs").tolist() == LOGPROBS
        assert getattr(rollout, f"{other}_logprobs") is None
    without = {key: value for key, value in VERL.items() if key != "rollout_log_probs"}
    assert rollouts_of(imported([without], tokenizer, sampling=warm))[0].behavior_logprobs is None


def test_a_turn_that_reads_a_rewritten_history_is_refused_by_name_and_split(tokenizer):
    steps = [{"prompt": {"token_ids": [10, 11, 77, 20]}, "response": {"token_ids": [14, 0]}}]
    record = [{"prompt": {"token_ids": PROMPT}, "response": {"token_ids": [12, 13]}}, *steps]
    with pytest.raises(PromptError, match=r"Trajectory number 0, turn 1: from token 2 on it reads .*so pass `turns=\"each\"`"):
        imported([record], tokenizer)
    made = rollouts_of(imported([record], tokenizer, turns="each"))
    assert [rollout.prompt_ids.tolist() for rollout in made] == [PROMPT, [10, 11, 77, 20]]
    shorter = [record[0], {"prompt": {"token_ids": [10, 11, 12]}, "response": {"token_ids": [14]}}]
    with pytest.raises(PromptError, match="turn 1: from token 3 on it reads ''"):
        imported([shorter], tokenizer)


def test_the_text_beside_the_ids_is_compared_with_them(tokenizer):
    ids = tokenizer("ask tool answer")["input_ids"]
    drawn = [int(i < 3 or i > 7) for i in range(len(ids))]
    record = {"prompts": PROMPT, "responses": ids, "response_mask": drawn}
    said = [
        {"role": "assistant", "content": "ask"},
        {"role": "tool", "content": "?"},
        {"role": "assistant", "content": [{"text": "answer"}]},
    ]
    told = [{"role": "assistant", "content": "tool"}]  # an example before the question, for what the ids can tell
    for beside in ({"output": "ask tool answer"}, {"completion": said, "messages": said}, {"messages": told}):
        assert len(imported([{**record, **beside}], tokenizer)) == 1
    for beside in ({"output": "ask fool answer"}, {"completion": said[::-1]}, {"completion": told}, {"messages": said[::-1]}):
        with pytest.raises(PromptError, match=r"Trajectory number 0: its tokens read '.*the text that stands beside them"):
            imported([{**record, **beside}], tokenizer)
    triplet = {"prompt": {"token_ids": PROMPT}, "response": {"token_ids": ids, "raw_content": [{"content": "fool"}]}}
    with pytest.raises(PromptError, match="expected 'fool'"):
        imported([[triplet]], tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_how_a_policy_ended_may_stand_in_the_record_alone(form, tokenizer):
    record = {key: [without_endings(step) for step in value] if key == "trajectory" else value for key, value in FORMS[form].items()}
    for said, ended in (
        ({"finish_reason": "length"}, "length"),
        ({"is_truncated": True}, "length"),
        ({"is_truncated": float("nan")}, "stop"),
    ):
        made = rollouts_of(imported([{**record, **said}], tokenizer, turns=[-1]))
        assert [rollout.finish_reason for rollout in made] == [ended]
    with pytest.raises(PromptError, match="its finish_reason is 'tired'"):
        imported([{**record, "finish_reason": "tired"}], tokenizer)


def without_endings(step):
    return {"tokens": {key: value for key, value in step["tokens"].items() if key != "is_truncated"}}


def test_what_a_step_says_of_its_end_counts_more_than_what_the_record_says(tokenizer):
    (rollout,) = rollouts_of(imported([{**STEPS, "is_truncated": True}], tokenizer))
    assert rollout.finish_reason == "stop"


@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_numpy_are_read_as_lists_are(form, tokenizer):
    (rollout,) = rollouts_of(imported([as_arrays(FORMS[form])], tokenizer))
    assert (rollout.prompt_ids.tolist(), rollout.response_ids.tolist()) == (PROMPT, RESPONSE)
    assert rollout.behavior_logprobs.tolist() == LOGPROBS


@pytest.mark.parametrize("record", [STEPS, TRIPLETS])
def test_steps_may_be_json_text_as_tables_have_them(record, tokenizer):
    ((key, steps),) = record.items()
    (rollout,) = rollouts_of(imported([{key: json.dumps(steps)}], tokenizer))
    assert rollout.response_ids.tolist() == RESPONSE


def as_arrays(value):
    """Return the same as pandas reads it from a parquet file."""
    if isinstance(value, dict):
        return {key: as_arrays(item) for key, item in value.items()}
    if isinstance(value, list) and isinstance(value[0], dict):
        made = np.empty(len(value), object)
        made[:] = [as_arrays(item) for item in value]
        return made
    return np.array(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt_ids": ["a"], "completion_ids": ["b"]}, "it has the keys 'prompt_ids', 'completion_ids', which fit no form"),
        ({**LOOP, "response_mask": None, "messages": AGENT}, "it has recorded ids under 'response_ids', but not 'response_mask'; add what"),
        (
            {"token_ids": PROMPT, "loss_mask": [0, 1], "messages": AGENT},
            "under 'token_ids', but not 'mask'; add what is missing, or leave the ids",
        ),
        ({"completion_ids": RESPONSE}, "under 'completion_ids', but not 'prompt_ids' and 'completion_mask'; add"),
        ({**VERL, "response_mask": [1]}, "'response_mask' has 1 entries, expected 7, one for each token"),
        ({**VERL, "rollout_log_probs": [-1.0]}, "'rollout_log_probs' has 1 entries, expected 7"),
        ({**VERL, "attention_mask": [1]}, "'attention_mask' has 1 entries, expected 9"),
        ({**VERL, "response_mask": [0] * 7}, "its policy drew 0 tokens"),
        ({**PRIME, "prompt_mask": [0, 1]}, "its prompt_mask has a 1"),
        ({**VERL, "finish_reason": "tired"}, "its finish_reason is 'tired'"),
        ({"trajectory": [{"tokens": None}]}, "step 0: its 'tokens' is None, expected a mapping with token ids"),
        ({"triplets": [{"prompt": "text", "response": {}}]}, "step 0: its 'prompt' is 'text'"),
        ({"triplets": {}}, "its 'triplets' is {}, expected a list of steps"),
        ({"trajectory": "[{"}, "'trajectory' is text that is not JSON"),
        ({**VERL, "id": True}, "its id is True"),
        ("text", "it is a str, expected a mapping, messages or triplets"),
        ({"messages": "{"}, "'messages' is text that is not JSON"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "it has 0 answers of the assistant"),
        (
            {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ": message 0 has the keys 'from', 'value', expected 'role' and 'content'; rename them, and call the roles",
        ),
        ({"messages": [AGENT[0], {"role": "assistant", "content": 3}]}, "turn 0: its content is 3, expected text"),
    ],
)
def test_a_record_that_does_not_fit_together_is_refused_by_its_number(record, message, tokenizer):
    with pytest.raises(PromptError, match=f"^Trajectory number 1.*{message}"):
        imported([VERL, record], tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**VERL, "responses": ["a"] * 7}, "Trajectory number 0: Token ids"),
        ({**VERL, "response_mask": [2] * 7}, "Trajectory number 0: 'response_mask' is not a mask"),
        ({**VERL, "rollout_log_probs": [0.5] * 7}, r"Trajectory number 0: Rollout .*behavior_logprobs\[0\] is 0.5"),
        ({"triplets": [{"prompt": {"token_ids": PROMPT}, "response": {"token_ids": 3}}]}, "Trajectory number 0, step 0: Token ids"),
        ({**VERL, "prompts": []}, "Trajectory number 0: Rollout .*prompt_ids has 0 tokens"),
        ({**VERL, "prompts": [5, 96]}, r"prompt_ids\[1\] is 96, expected an id below 96"),
    ],
)
def test_values_that_are_not_ids_masks_or_log_probs_are_refused(record, message, tokenizer):
    with pytest.raises(InvalidRecordError, match=message):
        imported([record], tokenizer)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"turns": "last"}, InvalidRecordError, "turns is 'last', expected 'together', 'each' or numbers"),
        ({"turns": 1}, InvalidRecordError, "turns is None, expected a whole number"),
        ({"turns": [0.5]}, InvalidRecordError, "turns is 0.5, expected a whole number"),
        ({"logprobs": "raw"}, InvalidRecordError, "logprobs is 'raw', expected 'behavior' or 'sampler'"),
        ({"sampling": None}, ArgumentError, "Trajectories: sampling: it is None"),
        ({"lineage": TEACHER}, ArgumentError, "Trajectories: lineage: it is a ModelId"),
        ({"store": MemoryStore}, None, None),
        ({"store": 3}, ArgumentError, "Trajectories: store is an int"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, error, message, tokenizer):
    if error is None:
        assert len(imported([VERL], tokenizer, **given)) == 1
        return
    with pytest.raises(error, match=message):
        imported([VERL], tokenizer, **given)


def test_the_same_call_adds_nothing_and_other_turns_under_the_ids_are_refused(tokenizer, tmp_path):
    def again(**given):
        return imported([VERL, LOOP], tokenizer, store=lambda m: ZarrStore.open_or_create(tmp_path / "t.zarr", m), **given)

    assert len(again()) == len(again()) == 2
    assert {rollout.rollout_id.partition("/")[2] for rollout in rollouts_of(again())} == {"s0/g0", "s1/g0"}
    with pytest.raises(ConflictError):
        again(turns="each")


ROUNDED = {**VERL, "rollout_log_probs": [-0.3, -1.1, 0.0, 0.0, 0.0, -0.7, -2.3]}
BARE = {key: value for key, value in VERL.items() if key != "rollout_log_probs"}


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (BARE, ROUNDED, "without behavior_logprobs"),
        (ROUNDED, BARE, "with behavior_logprobs"),
        (ROUNDED, {**ROUNDED, "rollout_log_probs": [*ROUNDED["rollout_log_probs"][1:], 0.0]}, "with other behavior_logprobs"),
        (ROUNDED, {**ROUNDED, "finish_reason": "length"}, "with other finish_reason"),
    ],
)
def test_mended_records_are_not_taken_for_those_that_are_there(first, then, said, tokenizer, tmp_path):
    def again(*records):
        maker = lambda m: ZarrStore.open_or_create(tmp_path / "t.zarr", m, logprob_dtype="float16")  # noqa: E731
        return imported(records, tokenizer, store=maker)

    again(first)
    with pytest.raises(ConflictError, match=f"is there {said}, and an import replaces nothing; import into a new store"):
        again({**VERL, "prompts": [10, 12]}, then)
    assert len(again(first)) == 1


@pytest.mark.parametrize("kind", [MemoryStore, ZarrStore, LanceStore])
def test_every_store_keeps_a_trajectory(kind, tokenizer, tmp_path):
    store = imported([VERL], tokenizer, store=kind if kind is MemoryStore else lambda m: kind.open_or_create(tmp_path / "t", m))
    assert rollouts_of(store)[0].content_hash == rollouts_of(imported([STEPS], tokenizer))[0].content_hash


drawn_as_written = pytest.mark.filterwarnings("ignore:.*its answer is more than text:lopd.errors.PromptWarning")


def test_calls_and_thoughts_as_a_template_writes_them_draw_one_warning():
    message = r"^Trajectory number 0, turn 0 and 1 more: its answer is more than text, and is as the chat template writes it"
    with pytest.warns(PromptWarning, match=message) as caught:
        imported([AGENT, CHAT[:2]], byte_tokenizer(TOOLS))
    assert len(caught) == 1


@drawn_as_written
def test_messages_are_rendered_turn_by_turn_and_only_the_policy_is_learnt():
    tokenizer = byte_tokenizer(TOOLS)
    (rollout,) = rollouts_of(imported([{"messages": AGENT, "tools": ADD}], tokenizer))
    prompt, response = shown(tokenizer, rollout)
    (first,) = make_prompts([{"messages": AGENT[:1], "tools": ADD}], tokenizer)
    assert prompt == tokenizer.decode(first.token_ids.tolist())
    assert response == (
        '[<call>add {"a": 2, "b": 3}</call><|im_end|>]\n<|im_start|>user\n<result>5</result><|im_end|>\n<|im_start|>assistant\n[It is 5.<|im_end|>]'
    )
    assert (rollout.finish_reason, rollout.behavior_logprobs) == ("stop", None)


@drawn_as_written
def test_empty_keys_of_an_answer_change_nothing():
    tokenizer, empty = byte_tokenizer(TOOLS), {"annotations": [], "refusal": "", "provider": {"id": None}}
    (plain,) = rollouts_of(imported([AGENT], tokenizer))
    (rollout,) = rollouts_of(imported([[{**message, **empty} for message in AGENT]], tokenizer))
    assert (rollout.content_hash, rollout.rollout_id) == (plain.content_hash, plain.rollout_id)


@drawn_as_written
def test_each_turn_of_messages_reads_what_make_prompts_makes_of_all_before_it():
    tokenizer = byte_tokenizer(TOOLS)
    made = rollouts_of(imported([AGENT], tokenizer, tools=ADD, turns="each"))
    prompts = make_prompts([{"messages": AGENT[:i], "tools": ADD} for i in (1, 3)], tokenizer)
    assert [rollout.prompt_ids.tolist() for rollout in made] == [prompt.token_ids.tolist() for prompt in prompts]


@drawn_as_written
def test_a_template_that_drops_old_thoughts_is_refused_by_name_and_split_into_turns():
    tokenizer = byte_tokenizer(TOOLS)
    with pytest.raises(PromptError, match=r"number 0, turn 1: from token 24 on it reads 'hi<\|im_end\|>.*expected '<think>greet</think>hi"):
        imported([CHAT], tokenizer)
    first, second = (shown(tokenizer, rollout) for rollout in rollouts_of(imported([CHAT], tokenizer, turns="each")))
    assert first[1] == "[<think>greet</think>hi<|im_end|>]"
    assert "greet" not in second[0]
    assert second[1] == "[so long<|im_end|>]"


@drawn_as_written
def test_an_answer_that_was_cut_has_no_end():
    tokenizer = byte_tokenizer(TOOLS)
    for messages in (AGENT, AGENT[:2]):
        (rollout,) = rollouts_of(imported([{"messages": messages, "finish_reason": "length"}], tokenizer))
        assert rollout.finish_reason == "length"
        assert rollout.response_ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "message", "fault"),
    [
        (CHATML, {"reasoning_content": "greet"}, "does not read 'reasoning_content' of messages"),
        (TOOLS.replace("{% endif %}{{ m.content }}", "{% endif %}"), {"content": "lost", "tool_calls": [CALL]}, "leaves its text out"),
        (TOOLS.replace("endfor %}<|im_end|>\n{% endif", "endfor %}\n{% endif"), {"tool_calls": [CALL]}, "does not end it"),
        (TOOLS + "<think>", {"tool_calls": [CALL]}, "writes what stands before it otherwise"),
        (None, {"tool_calls": [CALL]}, "it has a list of messages, which only a chat template reads"),
        (TOOLS, {"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}, "'arguments' is text that is not JSON"),
    ],
)
def test_an_answer_whose_tokens_cannot_be_known_is_refused(template, message, fault):
    tokenizer = byte_tokenizer(template)
    messages = [AGENT[0], {"role": "assistant", "content": "", **message}]
    with pytest.raises(PromptError, match=f"Trajectory number 0, turn 0: .*{fault}"):
        imported([messages], tokenizer)


def test_the_policy_is_a_folder_and_its_lineage_is_read_there(tokenizer, make_model, tmp_path):
    make_model("llama_tied", seed=1).save_pretrained(tmp_path / "policy")
    Lineage.of(TEACHER).write(tmp_path / "policy")
    manifest = imported([VERL], tokenizer, policy=tmp_path / "policy").manifest
    assert (manifest.policy, manifest.sft_teacher) == (Lineage.of(tmp_path / "policy").sft_teacher, TEACHER)
    assert imported([VERL], tokenizer).manifest.sft_teacher is None
    assert imported([VERL], tokenizer, lineage=Lineage.of(TEACHER)).manifest.sft_teacher == TEACHER
    with pytest.raises(EngineError):  # before any record is looked at
        imported([{}], tokenizer, policy=tmp_path / "none")


@pytest.mark.filterwarnings("ignore:.*it is not the policy that sampled:lopd.errors.DriftWarning")  # another model than that of the record
def test_tokens_of_tools_are_scored_and_nothing_learns_from_them(tokenizer, make_model):
    model, teacher = make_model("llama_tied", seed=2), make_model("llama_tied", seed=3)
    together = imported([VERL], tokenizer, lineage=Lineage.of(TEACHER))
    each = imported([VERL], tokenizer, lineage=Lineage.of(TEACHER), turns="each")
    gradients = []
    for store in (together, each):
        score_rollouts(store, HFScorer(teacher, tokenizer, identity=TEACHER))
        student = CausalLMStudent(model, tokenizer)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        loss, optimizer = FusedOPDLoss(ratio_to_ref=True), torch.optim.SGD(model.parameters(), lr=1.0)
        steps = batches(store, ref="behavior", weighting=lambda mask: mask.astype(np.float32))[:1]
        list(opd_steps(student, steps, loss, optimizer))
        gradients.append({name: before[name] - value for name, value in model.named_parameters()})
        model.load_state_dict({**model.state_dict(), **before})
    scores = together.read([0], columns=("teacher",))[0].scores["teacher"]
    assert scores.shape == (7,)
    assert (scores < 0).all(), "what a tool said has scores, too"
    # the same tokens after the same context: one rollout with a mask trains as its turns do
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
