"""Text that stands beside recorded ids: an answer that was cut and a history that was rewritten are no other text, and other text is refused."""

import json

import numpy as np
import pytest
from chat_tokenizers import byte_tokenizer
from test_trajectories import imported, rollouts_of

from lopd.errors import PromptError

TOKENIZER = byte_tokenizer()
OTHER = "the text that stands beside them"


def ids(text):
    return TOKENIZER(text)["input_ids"]


def said(*texts):
    """Return messages: the policy and others take turns."""
    return [{"role": role, "content": text} for role, text in zip(["assistant", "tool"] * len(texts), texts, strict=False)]


def step(prompt, drawn, *, cut=False):
    tokens = {"prompt_ids": prompt, "completion_ids": drawn, "completion_mask": [1] * len(drawn), "is_truncated": cut}
    return {"tokens": tokens}


ASKED, CALLED, TOLD, ANSWERED = ids("2+3?"), ids("I add.<|im_end|>"), ids("5"), ids("It is fünf.<|im_end|>")
READ = ASKED + CALLED + TOLD
SAID = said("I add.", "5", "It is fünf.")


def cut(kept, *, stated=True):
    return {"trajectory": [step(ASKED, CALLED), step(READ, ANSWERED[:kept], cut=stated)]}


@pytest.mark.parametrize("kept", [0, 5, len(ids("It is f")) + 1])  # the last ends within a character
def test_an_answer_that_was_cut_may_stand_whole_beside_its_ids(kept):
    for beside in ({"completion": SAID}, {"messages": [{"role": "user", "content": "2+3?"}, *SAID]}):
        (rollout,) = rollouts_of(imported([{**cut(kept), **beside}], TOKENIZER))
        assert rollout.response_ids.tolist() == CALLED + (TOLD + ANSWERED[:kept] if kept else [])
        assert rollout.finish_reason == ("length" if kept else "stop")
        with pytest.raises(PromptError, match=f"{OTHER}; .* or state the finish_reason 'length' of one that was cut"):
            imported([{**cut(kept, stated=False), **beside}], TOKENIZER)
    whole = {"prompt_ids": READ, "response_ids": ANSWERED[:kept], "response_mask": [1] * kept, "output": "It is fünf."}
    if kept:
        assert len(imported([whole], TOKENIZER)) == 1


def test_an_answer_that_was_cut_may_have_padding_behind_it():
    record = cut(5)
    record["trajectory"][-1]["tokens"] |= {"completion_ids": ANSWERED[:5] + ids("<|im_end|>") * 2, "completion_mask": [1] * 5 + [0] * 2}
    (rollout,) = rollouts_of(imported([{**record, "completion": SAID}], TOKENIZER))
    assert (rollout.response_ids.tolist(), rollout.finish_reason) == (CALLED + TOLD + ANSWERED[:5], "length")
    with pytest.raises(PromptError, match=OTHER):
        imported([{**record, "completion": said("I add.", "5", "It was fünf.")}], TOKENIZER)


def test_other_text_is_refused_also_where_an_answer_was_cut():
    for other in (said("I ask.", "5", "It is fünf."), said("I add.", "5", "It was fünf.")):
        with pytest.raises(PromptError, match=OTHER):
            imported([{**cut(5), "completion": other}], TOKENIZER)


def test_all_steps_behind_the_first_cut_may_have_drawn_less_than_they_say():
    steps = [*cut(5)["trajectory"], step(READ + ANSWERED[:5], [], cut=True)]
    (rollout,) = rollouts_of(imported([{"trajectory": steps, "completion": [*SAID, *said("Sure.")]}], TOKENIZER))
    assert (rollout.response_ids.tolist(), rollout.finish_reason) == (CALLED + TOLD + ANSWERED[:5], "length")


def test_an_answer_that_was_cut_within_its_thoughts_is_not_compared():
    record = {"trajectory": [step(ASKED, ids("<think>2 + 3 i"), cut=True)]}
    answer = {"role": "assistant", "content": "5"}
    assert len(imported([{**record, "completion": [{**answer, "reasoning_content": "2 + 3 is 5"}]}], TOKENIZER)) == 1
    with pytest.raises(PromptError, match=OTHER):
        imported([{**record, "completion": [answer]}], TOKENIZER)


def test_a_last_answer_that_does_not_count_is_compared_all_the_same():
    mask = [1] * len(CALLED) + [0] * len(TOLD + ANSWERED)
    record = {"prompt_ids": ASKED, "completion_ids": CALLED + TOLD + ANSWERED, "completion_mask": mask}
    for key in ("completion", "messages"):
        (rollout,) = rollouts_of(imported([{**record, key: SAID}], TOKENIZER))
        assert rollout.response_ids.tolist() == CALLED
        with pytest.raises(PromptError, match=OTHER):
            imported([{**record, key: said("I add.", "5", "It was fünf.")}], TOKENIZER)


def test_answers_that_later_turns_read_rewritten_may_stand_whole_beside_them():
    drawn = [ids("<think>greet</think>hi<|im_end|>"), ids("so long<|im_end|>")]
    steps = [step(ids("hello"), drawn[0]), step(ids("hello") + ids("hi<|im_end|>bye"), drawn[1])]
    record = {"trajectory": steps, "messages": said("<think>greet</think>hi", "bye", "so long")}
    made = rollouts_of(imported([record], TOKENIZER, turns="each"))
    assert [rollout.response_ids.tolist() for rollout in made] == drawn
    with pytest.raises(PromptError, match=r'the history was rewritten .*so pass `turns="each"`'):
        imported([record], TOKENIZER)
    for other in (said("<think>greet</think>ho", "bye", "so long"), said("<think>greet</think>hi", "bye", "good day")):
        with pytest.raises(PromptError, match=OTHER):
            imported([{**record, "messages": other}], TOKENIZER, turns="each")


def as_array(messages):
    """Return messages as pandas has them, also within others."""
    made = np.empty(len(messages), object)
    made[:] = messages
    return made


@pytest.mark.parametrize("form", [json.dumps, as_array])
def test_text_beside_ids_is_compared_in_whatever_form_it_stands(form):
    response = CALLED + TOLD + ANSWERED
    record = {"prompt_ids": ASKED, "response_ids": response, "response_mask": [1] * len(response)}
    for right, wrong in ((SAID, said("I add.", "5", "It was fünf.")), ([{"content": "It is fünf."}], [{"content": "It was fünf."}])):
        for key in ("messages", "completion"):
            assert len(imported([{**record, key: form(right)}], TOKENIZER)) == 1
            with pytest.raises(PromptError, match=OTHER):
                imported([{**record, key: form(wrong)}], TOKENIZER)
    unnamed = (([{"content": "I add."}], True), ([{"content": "I ask."}], False))
    for answer, fits in ((said("I add."), True), (said("I ask."), False), *unnamed):
        parts = [{**answer[0], "content": form([{"text": answer[0]["content"]}])}] if form is as_array else answer
        triplets = [{"prompt": {"token_ids": ASKED}, "response": {"token_ids": CALLED, "raw_content": form(parts)}}]
        if fits:
            assert len(imported([triplets], TOKENIZER)) == 1
        else:
            with pytest.raises(PromptError, match=OTHER):
                imported([triplets], TOKENIZER)


def test_a_completion_of_text_is_compared_with_what_was_drawn_or_all_that_followed():
    response, mask = CALLED + TOLD + ids("[5] is it<|im_end|>"), [1] * len(CALLED) + [0] * len(TOLD) + [1] * len(ids("[5] is it<|im_end|>"))
    record = {"prompt_ids": ASKED, "completion_ids": response, "completion_mask": mask}
    for text in ("I add.[5] is it", "I add.5[5] is it", "[5] is it", "I add.5[5] is it, or so"):
        assert len(imported([{**record, "completion": text}], TOKENIZER)) == 1, "stripped of thoughts, or longer than ids that were cut"
    for text in ("I ask.[5] is it", "[5] is not it", "[5]!", "[6]"):
        with pytest.raises(PromptError, match=OTHER):
            imported([{**record, "completion": text}], TOKENIZER)


@pytest.mark.parametrize(
    ("drawn", "other"),
    [
        ('[{"content": "a\\nb"}]', '[{"content": "a\\nc"}]'),
        ('[{"name": "add", "arguments": {}}]', '[{"name": "sub", "arguments": {}}]'),
        ('[{"role": "assistant", "content": "a \\"b\\""}]', '[{"role": "assistant", "content": "so long"}]'),
        ("[1]", "[]"),
    ],
)
def test_an_answer_that_is_json_itself_is_compared_as_the_text_that_it_is(drawn, other):
    for before in ([], CALLED + TOLD):
        answer = ids(f"{drawn}<|im_end|>")
        mask = [1] * len(CALLED) * bool(before) + [0] * len(TOLD) * bool(before) + [1] * len(answer)
        record = {"prompt_ids": ASKED, "completion_ids": before + answer, "completion_mask": mask}
        assert len(imported([{**record, "completion": drawn}], TOKENIZER)) == 1
        with pytest.raises(PromptError, match=OTHER):
            imported([{**record, "completion": other}], TOKENIZER)
