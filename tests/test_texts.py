"""Text that somebody wrote -> rollouts for SFT: one template, one end, no prompt among the targets, and a writer who is named."""

import json
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_tokenizers import CHATML, CONCLUDED, PARTS, SPECIAL, STRICT, TWICE_ENDED, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lopd import CausalLMStudent, FusedSFTLoss, Lineage, ModelId, ZarrStore, batches, import_text, make_prompts, opd_steps, rows_of
from lopd.engines.hf import folder_model_id
from lopd.errors import (
    ArgumentError,
    ConflictError,
    ContextOverflowError,
    EngineError,
    InvalidRecordError,
    PromptError,
    PromptWarning,
    TeacherConsistencyWarning,
)
from lopd.records import fingerprint_tokenizer, mixture_id

WRITER = ModelId("writer", "7", "bfloat16")
PAIRS = [("what is 2 + 3?", "5"), ("what is 4 + 4?", "8")]
MESSAGES = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": response}] for prompt, response in PAIRS]
RECORDS = [{"prompt": prompt, "response": response} for prompt, response in PAIRS]


def rollouts_of(store):
    return [record.rollout for record in store.read(range(len(store)))]


def texts_of(tokenizer, store):
    """Return (prompt, response) of each rollout, as text."""
    return [(tokenizer.decode(r.prompt_ids.tolist()), tokenizer.decode(r.response_ids.tolist())) for r in rollouts_of(store)]


def test_pairs_messages_records_files_and_datasets_give_the_same_rollouts(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in MESSAGES))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "t.parquet")
    dataset = datasets.Dataset.from_list([{"messages": messages} for messages in MESSAGES])
    kept = [{"messages": json.dumps(messages)} for messages in MESSAGES]
    completions = [{"prompt": messages[:1], "response": messages[1:]} for messages in MESSAGES]
    forms = [
        PAIRS,
        MESSAGES,
        RECORDS,
        kept,
        completions,
        iter(RECORDS),
        tmp_path / "t.jsonl",
        str(tmp_path / "m.jsonl"),
        tmp_path / "t.parquet",
        dataset,
        dataset.to_iterable_dataset(),
    ]
    prompts = make_prompts([prompt for prompt, _ in PAIRS], tokenizer)
    for form in forms:
        made = rollouts_of(import_text(form, tokenizer, teacher=WRITER))
        assert [r.rollout_id for r in made] == [f"{prompt.prompt_id}/s0/g0" for prompt in prompts]
        assert [r.prompt_ids.tolist() for r in made] == [prompt.token_ids.tolist() for prompt in prompts]
        assert [r.response_ids.tolist() for r in made] == [[*tokenizer(response)["input_ids"], 0] for _, response in PAIRS]
        assert all(r.loss_mask.all() and r.finish_reason == "stop" for r in made)


def test_a_student_is_trained_and_remembers_who_wrote(tokenizer, make_model, tmp_path):
    make_model("llama_tied", seed=1).save_pretrained(tmp_path / "teacher")
    store = import_text(PAIRS, tokenizer, teacher=tmp_path / "teacher")
    assert store.manifest.policy == folder_model_id(tmp_path / "teacher") == Lineage.of(tmp_path / "teacher").sft_teacher
    student = CausalLMStudent(make_model("llama_tied", seed=2), tokenizer)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    steps = batches(store, teacher=None)[:4]
    curve = [metrics.loss for metrics in opd_steps(student, steps, FusedSFTLoss(), optimizer)]
    assert curve[-1] < curve[0]
    assert steps.lineage == Lineage(sft_teacher=store.manifest.policy)


def test_a_teacher_with_another_tokenizer_is_said_when_its_text_is_imported(tokenizer, swapped_tokenizer, make_model, tmp_path):
    make_model("llama_tied", seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    import_text(PAIRS, tokenizer, teacher=tmp_path)
    with pytest.warns(
        TeacherConsistencyWarning, match=r"its tokenizer has 96 ids, expected the 96 of the student's, with the same"
    ) as caught:
        assert len(import_text(PAIRS, swapped_tokenizer, teacher=str(tmp_path))) == 2
    assert [warning.filename for warning in caught] == [__file__]


def test_a_teacher_whose_tokenizer_cannot_be_loaded_may_have_written_the_text(tokenizer, make_model, tmp_path):
    make_model("llama_tied", seed=1).save_pretrained(tmp_path)
    # such as one of a class of its own, in code beside it
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert import_text(PAIRS, tokenizer, teacher=tmp_path).manifest.policy == folder_model_id(tmp_path)


def test_a_writer_who_is_not_known_is_not_a_teacher(tokenizer):
    assert batches(import_text(PAIRS, tokenizer, teacher=None), teacher=None).lineage == Lineage()


def test_a_lineage_is_of_folders_identities_and_several(tmp_path):
    other = ModelId("other", "8", "bfloat16")
    assert Lineage.of(WRITER) == Lineage(sft_teacher=WRITER)
    assert Lineage.of(WRITER, other).sft_teacher == mixture_id([WRITER, other])
    with pytest.raises(EngineError, match="cannot be loaded"):
        Lineage.of(tmp_path / "nothing")
    with pytest.raises(InvalidRecordError, match="of 0 models"):
        Lineage.of()


def test_a_writer_that_only_a_host_has_is_to_be_stated(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says = r"^Model 'a-model': .*; check the path.*; of a model that only a host has, state `ModelId\(name, version, dtype\)`\.$"
    for ask in (lambda: Lineage.of("a-model"), lambda: import_text(PAIRS, tokenizer, teacher="a-model")):
        with pytest.raises(EngineError, match=says):
            ask()


def test_the_same_call_again_adds_nothing_and_another_text_under_an_id_is_refused(tokenizer, tmp_path):
    def again(texts):
        return import_text(texts, tokenizer, teacher=WRITER, store=lambda m: ZarrStore.open_or_create(tmp_path / "t.zarr", m))

    assert len(again(PAIRS)) == len(again(PAIRS)) == 2
    with pytest.raises(
        ConflictError, match=r"with other response_ids, .*; import into .*, and texts .* of several files in one call, as one list"
    ):
        again([(PAIRS[0][0], "9")])
    assert len(import_text([*PAIRS, (PAIRS[0][0], "9")], tokenizer, teacher=WRITER)) == 3


def test_responses_to_one_prompt_are_its_samples_and_an_id_is_of_one_prompt(tokenizer):
    made = rollouts_of(import_text([("a", "b"), ("c", "d"), ("a", "e")], tokenizer, teacher=WRITER))
    name = made[0].rollout_id.partition("/")[0]
    assert made[2].rollout_id == f"{name}/s1/g0"
    records = [{"id": "x", "prompt": prompt, "response": "e"} for prompt in "ab"]
    with pytest.raises(PromptError, match="Text number 1: its id 'x' is that of another prompt"):
        import_text(records, tokenizer, teacher=WRITER)


def test_earlier_turns_are_read_and_the_last_answer_is_trained(tokenizer):
    chat = [{"role": "system", "content": "s"}, *MESSAGES[0], *MESSAGES[1]]
    ((prompt, response),) = texts_of(tokenizer, import_text([chat], tokenizer, teacher=WRITER))
    assert prompt == "<|system|>s<|eos|><|user|>what is 2 + 3?<|eos|><|assistant|>5<|eos|><|user|>what is 4 + 4?<|eos|><|assistant|>"
    assert response == "8<|eos|>"


@pytest.mark.parametrize("response", ["5", "5<|im_end|>", "5<|im_end|>\n"])
def test_a_response_ends_once_as_the_template_ends_it(response):
    tokenizer = byte_tokenizer(CHATML)
    assert texts_of(tokenizer, import_text([("q", response)], tokenizer, teacher=WRITER)) == [
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>")
    ]


def test_an_end_that_is_not_eos_draws_a_warning():
    tokenizer = byte_tokenizer(CHATML, eos="</s>")
    with pytest.warns(PromptWarning, match="responses end with '<|im_end|>', .* EOS is '</s>'; see that sampling stops at both"):
        store = import_text([("q", "a"), ("r", "b")], tokenizer, teacher=WRITER)
    assert [response for _, response in texts_of(tokenizer, store)] == ["a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize("template", [CONCLUDED, CONCLUDED.replace("<|im_end|>", "<|im_end|>\n"), PARTS])
def test_eos_behind_a_conversation_is_not_what_ends_an_answer(template):
    tokenizer = byte_tokenizer(template, eos="</s>")
    with pytest.warns(PromptWarning, match=r"responses end with '<\|im_end\|>', .* EOS is '</s>'; see that sampling stops at both"):
        store = import_text([("q", "a"), ("r", "b<|im_end|>"), ("s", "c</s>")], tokenizer, teacher=WRITER)
    assert [response for _, response in texts_of(tokenizer, store)] == ["a<|im_end|>", "b<|im_end|>", "c</s>"]


@pytest.mark.parametrize("response", ["5", "5</s>", "5<|im_end|></s>\n"])
def test_a_response_gets_all_tokens_with_which_the_template_ends_an_answer(response):
    tokenizer = byte_tokenizer(TWICE_ENDED, eos="</s>")
    records = [("q", response), {"prompt": "r", "response": "5", "finish_reason": "length"}]
    store = import_text(records, tokenizer, teacher=WRITER)
    assert [response for _, response in texts_of(tokenizer, store)] == ["5<|im_end|></s>", "5"]


def test_a_response_that_was_cut_has_no_end(tokenizer):
    records = [{**RECORDS[0], "finish_reason": reason} for reason in ("length", "stop", None)]
    made = rollouts_of(import_text(records, tokenizer, teacher=WRITER))
    assert [(r.finish_reason, r.response_ids[-1] == 0) for r in made] == [("length", False), ("stop", True), ("stop", True)]


def test_verbatim_text_gets_nothing_but_an_end():
    tokenizer = byte_tokenizer(CHATML, before="<s>")
    pairs = [("<s>q: ", "a"), ("<s>r: ", "b<|im_end|>")]
    store = import_text(pairs, tokenizer, teacher=WRITER, verbatim=True)
    assert texts_of(tokenizer, store) == [("<s>q: ", "a<|im_end|>"), ("<s>r: ", "b<|im_end|>")]
    plain = byte_tokenizer(None, before="<s>")
    assert texts_of(plain, import_text([("q: ", "a")], plain, teacher=WRITER)) == [("<s>q: ", "a<|im_end|>")]


def test_an_unknown_character_is_no_special_token_of_a_text():
    named = {"unk_token": "<unk>", "eos_token": "<eos>"}
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "<eos>": 3}, unk_token=named["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.warns(PromptWarning, match=r"^Text number 0: its response begins .*<unk>") as caught:
        import_text([("a z b", "a z b")], PreTrainedTokenizerFast(tokenizer_object=backend, **named), teacher=WRITER)
    assert len(caught) == 1


@pytest.mark.parametrize("write", [json.dumps, str])
def test_messages_that_were_written_as_text_are_named(write):
    tokenizer, (prompt, response) = byte_tokenizer(CHATML), (write(messages) for messages in (MESSAGES[0][:1], MESSAGES[0][1:]))
    with pytest.warns(PromptWarning, match="^Text number 0: it is a list of messages that was written as text"):
        import_text([(prompt, "5")], tokenizer, teacher=WRITER)
    with pytest.warns(PromptWarning, match="^Text number 0: its response is a list of messages that was written as text"):
        import_text([("q", response)], tokenizer, teacher=WRITER)


def test_a_template_around_a_template_and_a_response_of_one_draw_warnings():
    tokenizer = byte_tokenizer(CHATML)
    with pytest.warns(PromptWarning, match="as if it carried a chat template already"):
        import_text([("<|im_start|>user\nq<|im_end|>\n", "a")], tokenizer, teacher=WRITER)
    with pytest.warns(PromptWarning, match=r"its response contains '<\|im_start\|>', as if a chat template had written it"):
        import_text([("q", "<|im_start|>assistant\na")], tokenizer, teacher=WRITER)


def test_marks_that_the_model_itself_writes_are_not_ordered_out_of_a_response():
    """As of gpt-oss, whose template refuses them in an answer; how it writes its prompt is then not known."""
    refused = "{% if m['role'] == 'assistant' %}{{ raise_exception('channels') }}{% endif %}{{ m['content'] }}"
    tokenizer = byte_tokenizer(CHATML.replace("{{ m['content'] }}", refused), special=(*SPECIAL, "<|channel|>"))
    with pytest.warns(PromptWarning, match=r"contains '<\|channel\|>', .*; leave it if the model itself writes it .*, or else") as caught:
        (rollout,) = rollouts_of(import_text([("q", "<|channel|>final 4")], tokenizer, teacher=WRITER))
    assert len(caught) == 1
    assert tokenizer.decode(rollout.response_ids.tolist()) == "<|channel|>final 4<|im_end|>"


def test_a_response_that_the_template_would_write_otherwise_draws_one_warning():
    tokenizer = byte_tokenizer(STRICT, eos="</s>")
    with pytest.warns(PromptWarning, match=r"Text number 0: its response begins 'a', expected ' a</s>'") as caught:
        import_text([("q", "a"), ("q", "b")], tokenizer, teacher=WRITER)
    assert [warning.filename for warning in caught] == [__file__]
    thinking = CHATML.replace("{% endif %}", "<think>\n{% endif %}")
    with pytest.warns(PromptWarning, match="the chat template writes its prompt otherwise where an answer follows"):
        import_text([("q", "a")], byte_tokenizer(thinking), teacher=WRITER)


def test_a_thought_that_prompt_and_response_both_open_is_named():
    """As with DeepSeek-R1 and its distilled models, whose template opens it where an answer is asked for."""
    opened, doubled = (
        CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        "its prompt ends with '<think>', and its response",
    )
    for response, said in (("<think>\nhm</think>5", True), ("\n<think>hm</think>5", True), ("hm</think>5", False), ("<b>5</b>", False)):
        with pytest.warns(PromptWarning) as caught:
            import_text([("q", response), ("r", response)], byte_tokenizer(opened), teacher=WRITER)
        assert [str(warning.message).startswith(f"Text number 0 and 1 more: {doubled}") for warning in caught].count(True) == said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_text([("q", "<think>hm</think>5")], byte_tokenizer(CHATML), teacher=WRITER)


@pytest.mark.parametrize(
    "other", [{"response": " ok"}, {"response": "ok\n"}, {"response": "<think>hm</think>ok"}, {"tools": [{"name": "f"}]}]
)
def test_a_response_of_another_kind_is_compared_too(other):
    """Trimmed, without what was thought, and behind what only prompts with tools have, as templates write answers."""
    answer = "{{ '#' if tools else '' }}{{ m['content'].split('</think>')[-1] | trim }}"
    written = "{% if m['role'] == 'assistant' %}" + answer + "{% else %}{{ m['content'] }}{% endif %}"
    tokenizer = byte_tokenizer(CHATML.replace("{{ m['content'] }}", written))
    records = [{"prompt": "q", "response": "ok"}, {"prompt": "q", "response": "ok", **other}]
    with pytest.warns(PromptWarning, match=r"^Text number 1: its response begins '.*', expected '#?ok<\|im_end\|>") as caught:
        import_text([*records, *records], tokenizer, teacher=WRITER)
    assert len(caught) == 1


@pytest.mark.parametrize(("off", "on"), [(False, True), ("none", "high"), (0, 1), ([], ["long " * 20])])
def test_what_a_template_does_with_a_switch_is_compared_for_each_of_its_settings(off, on):
    thinking = CHATML.replace("{% endif %}", "{% if mode and mode != 'none' %}<think>\n{% endif %}{% endif %}")
    records = [{"prompt": "q", "response": "a", "chat_template_kwargs": {"mode": mode}} for mode in (off, on, on)]
    with pytest.warns(PromptWarning, match="^Text number 1: the chat template writes its prompt otherwise where an answer follows"):
        import_text(records, byte_tokenizer(thinking), teacher=WRITER)


@pytest.mark.parametrize("write", [dict, json.dumps])
def test_variables_that_each_record_has_of_its_own_are_one_kind(write):
    tokenizer = byte_tokenizer(CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}{% if documents %}{% endif %}"))
    records = [{"prompt": "q", "response": f" {i}", "chat_template_kwargs": write({"documents": [{"text": str(i)}]})} for i in range(50)]
    with pytest.warns(PromptWarning, match="^Text number 0: its response begins ' 0', expected '0") as caught:
        import_text(records, tokenizer, teacher=WRITER)
    assert len(caught) == 1


@pytest.mark.parametrize("write", [dict, json.dumps])
def test_a_switch_behind_long_variables_is_compared_for_each_of_its_settings(write):
    thinking = CHATML.replace("{% endif %}", "{% if documents and enable_thinking %}<think>\n{% endif %}{% endif %}")
    given = [{"documents": [{"text": "long " * 20}], "enable_thinking": on} for on in (False, True, True)]
    records = [{"prompt": "q", "response": "a", "chat_template_kwargs": write(variables)} for variables in given]
    with pytest.warns(PromptWarning, match="^Text number 1: the chat template writes its prompt otherwise where an answer follows"):
        import_text(records, byte_tokenizer(thinking), teacher=WRITER)


def test_long_texts_are_counted_and_refused_left_out_or_cut(tokenizer):
    pairs = [("q", "xyz"), ("q", "xyzxyz"), ("q", "xyzxyzxyz")]
    (short, _, long) = (len(r) for r in rollouts_of(import_text(pairs, tokenizer, teacher=WRITER)))
    with pytest.raises(ContextOverflowError, match=rf"Texts: 2 of 3 texts have more than {short} tokens, the longest {long} "):
        import_text(pairs, tokenizer, teacher=WRITER, max_tokens=short)
    with pytest.warns(PromptWarning, match="2 of 3 .* were left out"):
        assert len(import_text(pairs, tokenizer, teacher=WRITER, max_tokens=short, too_long="drop")) == 1
    with pytest.warns(PromptWarning, match="2 of 3 .* were cut"):
        made = rollouts_of(import_text(pairs, tokenizer, teacher=WRITER, max_tokens=short, too_long="cut"))
    assert [(len(r), r.finish_reason) for r in made] == [(short, "stop"), (short, "length"), (short, "length")]
    with pytest.raises(ContextOverflowError, match="the prompts of 1 leave no room"):
        import_text([("q" * 50, "a")], tokenizer, teacher=WRITER, max_tokens=short, too_long="cut")
    with pytest.raises(InvalidRecordError, match="too_long is 'trim', expected 'refuse', 'drop' or 'cut'"):
        import_text(pairs, tokenizer, teacher=WRITER, too_long="trim")


@pytest.mark.filterwarnings("ignore:.*were left out")
@pytest.mark.parametrize("long", [0, 1])
def test_texts_that_are_left_out_leave_no_gap_among_the_samples_of_their_prompt(long, tokenizer, tmp_path):
    responses = ["a", "b"]
    responses.insert(long, "xyz" * 9)
    for _ in range(2):
        store = import_text(
            [("q", response) for response in responses],
            tokenizer,
            teacher=WRITER,
            store=lambda m: ZarrStore.open_or_create(tmp_path / "t.zarr", m),
            max_tokens=20,
            too_long="drop",
        )
        assert rows_of(store, make_prompts(["q"], tokenizer)).tolist() == [0, 1]
        assert [response for _, response in texts_of(tokenizer, store)] == ["a<|eos|>", "b<|eos|>"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([("q", "")], "Text number 0: its response is ''"),
        ([("q", "a"), ("q", 7)], "Text number 1: its response is 7"),
        (["q"], "Text number 0: it is a str, expected a prompt and its response"),
        (
            [{"prompt": "q", "completion": "a"}],
            "its keys with a value are 'prompt', 'completion', expected 'prompt' and 'response', or 'messages'; name",
        ),
        ([MESSAGES[0][:1]], "its last message has the role 'user', expected 'assistant'"),
        ([[{"role": "assistant", "content": "a"}]], r"'prompt' is \[\]"),
        (
            [{"prompt": MESSAGES[0][:1], "completion": MESSAGES[0][1:]}],
            "role 'user', expected 'assistant', and its keys with a value are 'prompt', 'completion'; name the response's key with `response`.$",
        ),
        ([{"prompt": MESSAGES[0][:1], "answer": "5"}], "'prompt', 'answer'; name the response's key"),
        (
            [{"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
            "^Text number 0: message 0 has the keys 'from', 'value', expected 'role' and 'content'; rename them, and call the roles",
        ),
        ([{"prompt": "q", "response": {"from": "gpt", "value": "a"}}], "its response: message 0 has the keys 'from', 'value', expected"),
        ([[MESSAGES[0][0], {**MESSAGES[0][1], "reasoning_content": "hm"}]], "its answer has 'reasoning_content', expected text alone"),
        ([{**RECORDS[0], "finish_reason": "tool_calls"}], "its finish_reason is 'tool_calls'"),
        ([{"prompt": "q", "response": "a<|eos|>", "finish_reason": "length"}], r"ends with '<\|eos\|>', and its finish_reason is 'length'"),
        ("nothing.jsonl", "Text file nothing.jsonl: it cannot be read"),
        ({"train": []}, "Texts: they are a dict, expected a list"),
        ([{"messages": str(MESSAGES[0])}], "Text number 0: 'messages' is text that is not JSON"),
        ([], "Texts: there are 0, expected at least 1"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tokenizer, texts, message):
    with pytest.raises(PromptError, match=message):
        import_text(texts, tokenizer, teacher=WRITER)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (5, "its content is 5"),
        (["a"], "a part is 'a'"),
        ({"content_type": "text", "parts": ["a"]}, "its content is {'content_type'"),
        ([{"type": "image", "url": "x"}], "a part is {'type': 'image'"),
        ([{"type": "text", "content": "x"}], "a part is {'type': 'text', 'content'"),
    ],
)
def test_an_answer_that_is_not_text_is_refused_by_name(tokenizer, content, found):
    with pytest.raises(PromptError, match=f"^Text number 0, its answer: {found}.*, expected "):
        import_text([[MESSAGES[0][0], {"role": "assistant", "content": content}]], tokenizer, teacher=WRITER)


def test_keys_that_nothing_reads_are_named_and_what_makes_no_store_or_end_is_refused():
    tokenizer = byte_tokenizer(None)
    with pytest.warns(PromptWarning, match="the keys 'level' are not read"):
        store = import_text(
            [{"q": "1", "a": "2", "level": 3}], tokenizer, teacher=WRITER, field="q", response="a", template="Q: {prompt}\n"
        )
    assert texts_of(tokenizer, store) == [("Q: 1\n", "2<|im_end|>")]
    assert store.manifest.tokenizer == fingerprint_tokenizer(tokenizer)
    with pytest.raises(ArgumentError, match="Texts: store is a str; pass `lambda manifest"):
        import_text(PAIRS, tokenizer, teacher=WRITER, store="text.zarr")
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="the tokenizer has no EOS token"):
        import_text(PAIRS, tokenizer, teacher=WRITER)
