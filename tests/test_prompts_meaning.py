"""A record means the same from JSONL, parquet and Hugging Face datasets, and reaches the chat template whole."""

import datetime
import json
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import CHATML, PARTS, THINKING, byte_tokenizer, texts

from lopd import make_prompts, read_prompts
from lopd.errors import PromptError, PromptWarning
from lopd.records import chat_template

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}}


def ask(text):
    return [{"role": "user", "content": text}]


CONVERSATION = [
    *ask("weather in Bern?"),
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "ask",
        "tool_calls": [{"name": "weather", "arguments": {"city": "Bern", "days": 2}}],
    },
    {"role": "tool", "content": "sun", "name": "weather"},
    *ask("and now?"),
]
RECORDS = [
    {"id": 1, "prompt": ask("hi"), "answer": 4},
    {"prompt": CONVERSATION, "tools": [WEATHER, CLOCK], "chat_template_kwargs": {"enable_thinking": False}},
    {"id": 3, "prompt": [{"role": "user", "content": "what time?", "name": "Ann"}], "answer": 6, "tools": [CLOCK]},
]
EXPECTED = [
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    f"""<|im_start|>system
{json.dumps(WEATHER)}
{json.dumps(CLOCK)}
<|im_end|>
<|im_start|>user
weather in Bern?<|im_end|>
<|im_start|>assistant
<think>ask</think><call>{{"name": "weather", "arguments": {{"city": "Bern", "days": 2}}}}</call><|im_end|>
<|im_start|>tool
sun(weather)<|im_end|>
<|im_start|>user
and now?<|im_end|>
<|im_start|>assistant
<think>

</think>

""",
    f"<|im_start|>system\n{json.dumps(CLOCK)}\n<|im_end|>\n<|im_start|>user\nwhat time?(Ann)<|im_end|>\n<|im_start|>assistant\n",
]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def every_reader(folder, records, tokenizer, **options):
    """Return the prompts of the same records, from each place that records come from."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    filled = [{key: record.get(key) for key in columns} for record in records]
    dataset = datasets.Dataset.from_list(filled)
    dataset.to_parquet(folder / "datasets.parquet")
    return {
        "jsonl": read_prompts(jsonl(folder / "p.jsonl", records), tokenizer, **options),
        "records": make_prompts(records, tokenizer, **options),
        "parquet": read_prompts(parquet(folder / "p.parquet", filled), tokenizer, **options),
        "datasets": make_prompts(dataset, tokenizer, **options),
        "parquet of datasets": read_prompts(folder / "datasets.parquet", tokenizer, **options),
    }


def test_records_give_the_same_prompts_from_jsonl_parquet_and_datasets(tmp_path):
    tokenizer = byte_tokenizer(THINKING)
    read = every_reader(tmp_path, RECORDS, tokenizer)
    named = [prompt.prompt_id for prompt in read["jsonl"]]
    assert (named[0], named[2]) == ("1", "3")
    for reader, prompts in read.items():
        assert texts(tokenizer, prompts) == EXPECTED, reader
        assert [prompt.prompt_id for prompt in prompts] == named, reader
        assert [prompt.answer for prompt in prompts] == ["4", None, "6"], reader
        assert [prompt.text for prompt in prompts] == ["hi", "and now?", "what time?"], reader


def only(contents, tokenizer, **options):
    """Return the text of a single prompt."""
    return texts(tokenizer, make_prompts([contents], tokenizer, **options))[0]


def test_null_keys_are_left_out_at_every_depth():
    tokenizer = byte_tokenizer(THINKING)
    full = {"role": "user", "content": "hi", "name": None, "tool_calls": None, "reasoning_content": None}
    assert only([full], tokenizer) == only("hi", tokenizer)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "id": None, "arguments": {"a": 1, "b": None}}]}
    assert '<call>{"name": "f", "arguments": {"a": 1}}</call>' in only([*ask("x"), call, *ask("y")], tokenizer)
    assert '{"type": "function", "function": {"name": "g"}}\n' in only(
        "hi", tokenizer, tools=[{"type": "function", "function": {"name": "g", "x": None}}]
    )


def test_templates_are_shown_calls_as_servers_show_them():
    tokenizer = byte_tokenizer(THINKING)
    arguments = {"city": "Bern", "days": 2.5}
    for wrap in (lambda call: call, lambda call: {"function": call}):
        written = {
            only([*ask("x"), {"role": "assistant", "tool_calls": [wrap({"name": "f", "arguments": given})]}, *ask("y")], tokenizer)
            for given in (arguments, json.dumps(arguments))
        }
        assert len(written) == 1
        assert '"arguments": {"city": "Bern", "days": 2.5}' in written.pop()
    each = "{% for call in m.tool_calls or [] %}{{ call.name + call.arguments }}{% endfor %}"
    joining = byte_tokenizer(CHATML.replace("m['content'] }}", "m.content }}" + each))
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a":1}'}]}
    assert 'assistant\nf{"a":1}<|im_end|>' in only([*ask("x"), call, *ask("y")], joining), "as text where a template joins it"
    strict = byte_tokenizer(
        CHATML.replace("m['content'] }}", "m.content.strip() }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}")
    )
    empty = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": " "}]}
    assert 'assistant\n[{"name": "f", "arguments": {}}]' in only([*ask("x"), empty, *ask("y")], strict)


def test_the_key_messages_is_read_where_the_key_of_the_prompt_is_null(tmp_path):
    records = [{"prompt": "one", "messages": None}, {"prompt": None, "messages": ask("two")}]
    tokenizer = byte_tokenizer()
    assert [prompt.text for prompt in read_prompts(parquet(tmp_path / "p.parquet", records), tokenizer)] == ["one", "two"]


def test_tools_and_variables_of_all_records_are_overridden_by_those_of_one():
    tokenizer = byte_tokenizer(THINKING)
    records = [
        {"prompt": "a"},
        {"prompt": "b", "tools": [CLOCK], "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": "c", "tools": []},
    ]
    first, second, third = texts(
        tokenizer, make_prompts(records, tokenizer, tools=[WEATHER], chat_template_kwargs={"enable_thinking": np.False_})
    )
    assert (json.dumps(WEATHER) in first, first.endswith("</think>\n\n")) == (True, True)
    assert (json.dumps(CLOCK) in second, json.dumps(WEATHER) in second, second.endswith("assistant\n")) == (True, False, True)
    assert third == "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_tools_are_also_functions_or_json_text():
    def weather(city: str) -> str:
        """Look up the weather.

        Args:
            city: where.
        """
        return city

    tokenizer = byte_tokenizer(THINKING)
    assert '"name": "weather", "description": "Look up the weather."' in only("hi", tokenizer, tools=[weather])
    assert only({"prompt": "hi", "tools": json.dumps([CLOCK])}, tokenizer) == only("hi", tokenizer, tools=[CLOCK])
    blank = {"prompt": "hi", "tools": "", "chat_template_kwargs": " "}
    assert only(blank, tokenizer, tools=[CLOCK]) == only("hi", tokenizer, tools=[CLOCK]), "as CSV has what is not there"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tools": "not JSON"}, r"Prompt number 1: 'tools' is text that is not JSON"),
        ({"tools": {"name": "f"}}, r"Prompt number 1: `tools` is .* expected a list of mappings"),
        ({"tools": ["f"]}, r"Prompt number 1: `tools` is .* expected a list of mappings"),
        ({"chat_template_kwargs": [1]}, r"Prompt number 1: `chat_template_kwargs` is \[1\], expected a mapping"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            r"Prompt number 1: `chat_template_kwargs` .* the template's own variables",
        ),
    ],
)
def test_tools_and_variables_of_another_kind_are_refused(record, message):
    with pytest.raises(PromptError, match=message):
        make_prompts(["fine", {"prompt": "hi", **record}], byte_tokenizer(THINKING))


@pytest.mark.parametrize("record", [{"tools": [CLOCK]}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_what_only_a_chat_template_reads_is_refused_by_name_without_one(record, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": "hi", **record}])
    (name,) = record
    with pytest.raises(PromptError, match=rf"p\.jsonl, line 2: it has `{name}`.*the tokenizer has no chat template"):
        read_prompts(path, byte_tokenizer(None))
    with pytest.raises(PromptError, match=rf"Prompts: it has `{name}`"):
        make_prompts(["hi"], byte_tokenizer(None), **record)
    with pytest.raises(PromptError, match=rf"Prompts: it has `{name}`.*`verbatim` text"):
        make_prompts(["hi"], byte_tokenizer(THINKING), verbatim=True, **record)


def test_what_the_chat_template_does_not_read_is_named_in_one_warning(tmp_path):
    records = [
        {"prompt": [{"role": "user", "content": "a", "name": "Ann"}], "tools": [CLOCK]},
        {"prompt": [{"role": "user", "content": "b", "name": "Bob"}], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    path = parquet(tmp_path / "p.parquet", [{"tools": None, "chat_template_kwargs": None, **record} for record in records])
    with pytest.warns(PromptWarning) as caught:
        read_prompts(path, byte_tokenizer(CHATML))
    (warning,) = caught
    assert f"{path}: the chat template does not read `tools`, 'name' of messages, 'enable_thinking' of `chat_template_kwargs`;" in str(
        warning.message
    )
    assert warning.filename == __file__


def test_keys_that_nothing_reads_are_named_in_one_warning(tmp_path):
    records = [
        {"prompt": "a", "level": 3, "void": None},
        {"prompt": "b", "level": 4, "source": "book"},
        {"prompt": "c", "messages": ask("d")},
    ]
    with pytest.warns(PromptWarning, match=r"p\.jsonl: the keys 'level', 'source', 'messages' are not read; ") as caught:
        read_prompts(jsonl(tmp_path / "p.jsonl", records), byte_tokenizer())
    assert len(caught) == 1
    with pytest.warns(PromptWarning, match=r"Prompts: the keys 'level' are not read"):
        make_prompts(records[:1], byte_tokenizer())


def test_a_column_of_ints_with_a_gap_gives_ints(tmp_path):
    table = pa.table({"prompt": ["a", "b", "c"], "id": pa.array([1.0, None, 3.0]), "answer": pa.array([None, 2.5, 12.0])})
    pq.write_table(table, tmp_path / "p.parquet")
    tokenizer = byte_tokenizer()
    frame = table.to_pandas()
    rows = [
        frame.to_dict("records"),
        frame.convert_dtypes().to_dict("records"),
        frame.assign(tools=np.datetime64("NaT")).to_dict("records"),
    ]
    for prompts in (read_prompts(tmp_path / "p.parquet", tokenizer), *(make_prompts(some, tokenizer) for some in rows)):
        assert (prompts[0].prompt_id, prompts[2].prompt_id, len(prompts[1].prompt_id)) == ("1", "3", 16)
        assert [prompt.answer for prompt in prompts] == [None, "2.5", "12"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12, "12"),
        (12.0, "12"),
        (np.int64(12), "12"),
        (np.float32(0.5), "0.5"),
        (Decimal("12.00"), "12"),
        (Decimal("1.50"), "1.5"),
        (Decimal("1" * 36), "1" * 36),
        (Decimal(f"-0.{'1' * 35}0"), f"-0.{'1' * 35}"),
        (Decimal("2E+30"), f"2{'0' * 30}"),
        (True, "true"),
        (np.False_, "false"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
        (np.datetime64("2026-01-02T03:04", "ns"), "2026-01-02T03:04:00"),
        (["a", 1.0], '["a", 1]'),
        (np.array([1.0, 2.0]), "[1, 2]"),
        (np.datetime64("NaT"), None),
        (float("nan"), None),
        ("1.0", "1.0"),
    ],
)
def test_an_answer_is_text_as_its_file_means_it(value, text):
    (prompt,) = make_prompts([{"prompt": "a", "answer": value}], byte_tokenizer())
    assert prompt.answer == text


def test_typed_columns_of_parquet_are_text_as_json_has_it(tmp_path):
    columns = {
        "prompt": ["a"],
        "id": pa.array([Decimal("7.00")], pa.decimal128(10, 2)),
        "answer": pa.array([datetime.date(2026, 1, 2)]),
        "chat_template_kwargs": pa.array([[("enable_thinking", False)]], pa.map_(pa.string(), pa.bool_())),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    tokenizer = byte_tokenizer(THINKING)
    (prompt,) = read_prompts(tmp_path / "p.parquet", tokenizer)
    assert (prompt.prompt_id, prompt.answer) == ("7", "2026-01-02")
    assert texts(tokenizer, [prompt])[0].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("value", ["", ["a"], {"a": 1}, True, float(2**60), b"a"])
def test_an_id_that_is_not_text_or_a_number_is_refused(value):
    with pytest.raises(PromptError, match=r"Prompt number 1: it(s id is| holds a bytes)"):
        make_prompts(["fine", {"prompt": "a", "id": value}], byte_tokenizer())


def test_an_id_of_36_digits_keeps_all_of_them():
    digits = "123456789" * 4
    (prompt,) = make_prompts([{"prompt": "a", "id": Decimal(digits)}], byte_tokenizer())
    assert prompt.prompt_id == digits


def test_ids_and_answers_beside_contents_are_text_and_one_for_each():
    prompts = make_prompts(["a", "b"], byte_tokenizer(), ids=np.array([4, 5]), answers=[1.0, None])
    assert [(prompt.prompt_id, prompt.answer) for prompt in prompts] == [("4", "1"), ("5", None)]
    for values in ({"ids": ["a"]}, {"answers": ["1", "2", "3"]}):
        with pytest.raises(PromptError, match=r"Prompts: there are [13] (id|answer)s, expected 2; pass one for each prompt"):
            make_prompts(["a", "b"], byte_tokenizer(), **values)


PARTED = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]


def test_text_in_parts_is_text_whether_the_template_reads_parts_or_not(tmp_path):
    assert only(PARTED, byte_tokenizer(CHATML)) == only("one two", byte_tokenizer(CHATML))
    assert only(PARTED, byte_tokenizer(PARTS)) == "<|im_start|>user\nonetwo<|im_end|>\n<|im_start|>assistant\n", "the template trims each"
    assert only("one two", byte_tokenizer(PARTS)) == only("one two", byte_tokenizer(CHATML)), "its text is not lost"
    both = PARTS.replace("{% for part in", "{% if m.content is string %}{{ m.content }}{% else %}{% for part in").replace(
        "{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>"
    )
    assert only("one two", byte_tokenizer(both)) == only("one two", byte_tokenizer(CHATML))
    assert only(PARTED, byte_tokenizer(both)) == only(PARTED, byte_tokenizer(PARTS))
    (prompt,) = make_prompts([PARTED], byte_tokenizer(CHATML))
    assert prompt.text == "one two"
    image = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image", "url": "a.png"}]}
    path = parquet(tmp_path / "p.parquet", [{"messages": PARTED}, {"messages": [image]}])
    with pytest.raises(
        PromptError, match=r"p\.parquet, row 1, message 0: a part is \{'type': 'image', 'url': 'a\.png'\}, expected \{'type': 'text'"
    ):
        read_prompts(path, byte_tokenizer(CHATML))


def test_a_role_whose_text_the_template_leaves_out_is_doubted():
    with pytest.warns(PromptWarning, match=r"Prompt number 0: the chat template leaves out the text of the role 'user'"):
        make_prompts(["hi"], byte_tokenizer("<|im_start|>assistant\n"))
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.warns(PromptWarning, match=r"Prompt number 1: the chat template leaves out the text of the role 'system'") as caught:
        make_prompts(["hi", [{"role": "system", "content": "Be brief."}, *ask("hi")], ask("ho")], byte_tokenizer(silent))
    assert len(caught) == 1
    rewritten = byte_tokenizer(CHATML.replace("m['content']", "m['content'] | trim | upper"))
    make_prompts([[{"role": "system", "content": " Be brief.\n"}, *ask("hi ")]], rewritten)
    make_prompts([CONVERSATION], byte_tokenizer(THINKING))


def test_the_text_that_a_template_writes_is_folded_once(monkeypatch):
    folded = []
    monkeypatch.setattr(chat_template, "folded", lambda text: folded.append(text) or text)
    make_prompts([[*ask("x"), *ask("y"), *ask("z")]], byte_tokenizer())
    assert sorted(folded)[1:] == ["x", "y", "z"]


def test_an_answer_or_a_result_of_a_tool_that_changes_nothing_is_doubted():
    """Phi 3 knows three roles, and writes nothing of others."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    asked = [*ask("hi"), call, {"role": "tool", "content": [{"type": "text", "text": "5"}]}, *ask("and?")]
    strips = "{{ (m.content | string).split('</think>')[-1] | trim | tojson }}{{ m.tool_calls }}"
    for without, kept in (("tool", "assistant"), ("assistant", "tool")):
        template = CHATML.replace("%}<|im_start|>", f" if m.role != '{without}' %}}<|im_start|>", 1).replace("{{ m['content'] }}", strips)
        said = [*asked, {"role": "assistant", "content": "<think>so</think> 6"}, *ask("so?")]
        with pytest.warns(
            PromptWarning, match=rf"Prompt number 1: the chat template leaves out the text of the role '{without}'"
        ) as caught:
            make_prompts([[message for message in said if message["role"] != without], said, said], byte_tokenizer(template))
        assert len(caught) == 1
        make_prompts([[message for message in said if message["role"] in ("user", kept)]], byte_tokenizer(template))
    refusing = CHATML.replace(
        "<|im_start|>", "{% if 'lopd' in m.content and m.role == 'tool' %}{{ raise_exception('') }}{% endif %}<|im_start|>", 1
    )
    make_prompts([[*ask("hi"), {"role": "tool", "content": "5"}]], byte_tokenizer(refusing))
    make_prompts([asked], byte_tokenizer(THINKING))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a"}])}),
            r"they are a DatasetDict, expected a list; .*one split",
        ),
        (pa.table({"prompt": ["a"]}).to_pandas(), r"they are a DataFrame, expected a list; .*rows of a table"),
        (pa.table({"prompt": ["a"]}), r"they are a Table, expected a list"),
        (5, r"they are an int, expected a list"),
        (ask("a"), r"Prompt number 0: its keys with a value are 'role', 'content', expected 'prompt'"),
    ],
)
def test_what_iterates_as_something_else_is_refused(contents, message):
    with pytest.raises(PromptError, match=message):
        make_prompts(contents, byte_tokenizer())


def test_columns_and_splits_of_a_dataset_are_prompts():
    dataset, tokenizer = datasets.Dataset.from_list([{"question": "a"}, {"question": "b"}]), byte_tokenizer()
    expected = [prompt.prompt_id for prompt in make_prompts(["a", "b"], tokenizer)]
    for contents, field in (
        (dataset["question"], "prompt"),
        (dataset, "question"),
        (dataset.with_format("numpy"), "question"),
        (dataset.to_iterable_dataset(), "question"),
    ):
        assert [prompt.prompt_id for prompt in make_prompts(contents, tokenizer, field=field)] == expected
    with pytest.raises(PromptError, match=r"Prompt file: the path is a Dataset, expected text or a path; pass records to `make_prompts`"):
        read_prompts(dataset, tokenizer)


class InCode:
    """Like the tokenizers of mistral-common: the chat template is code, and some of what others have is missing."""

    chat_template = None

    def __init__(self):
        inner = byte_tokenizer(None, before="<s>")
        self.encode, self.decode, self.all_special_ids, self.all_special_tokens = inner, inner.decode, [1, 2], ["<s>", "</s>"]

    def __call__(self, text, **options):
        return self.encode(text, **options)

    def added_tokens_decoder(self):
        raise NotImplementedError

    def apply_chat_template(self, conversation, tools=None, add_generation_prompt=False, tokenize=True, return_dict=True):
        assert tokenize, "text of it is unsafe"
        said = "".join(f"[{message['role']}]{message['content']}" for message in conversation)
        return self.encode(f"<s>{tools or ''}{said}[/]", add_special_tokens=False)


def test_a_chat_template_in_code_is_applied_too():
    tokenizer = InCode()
    prompts = make_prompts(["hi", PARTED, {"prompt": "hi", "tools": [{"name": "f"}]}], tokenizer)
    assert texts(tokenizer, prompts) == ["<s>[user]hi[/]", "<s>[user]one two[/]", "<s>[{'name': 'f'}][user]hi[/]"]
    with pytest.raises(PromptError, match=r"Prompt number 0: the tokenizer or its chat template raised TypeError .*'enable_thinking'"):
        make_prompts(["hi"], tokenizer, chat_template_kwargs={"enable_thinking": True})
