"""What looks wrong about prompts draws one warning for each kind; what cannot be rendered is one error with file and record."""

import datetime
import json
import warnings
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import CHATML, DATED, STRICT, byte_tokenizer, texts

import lopd.records.files as files_module
from lopd import make_prompts, read_prompts
from lopd.errors import MissingDependencyError, PromptError, PromptWarning

CLOSED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def doubts(call):
    """Return the result of a call, and the sentences that it warned with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert {warning.category for warning in caught} <= {PromptWarning}
    assert {warning.filename for warning in caught} <= {__file__}
    return result, [str(warning.message) for warning in caught]


def test_a_tokenizer_without_a_template_adds_its_own_bos_and_nothing_is_doubted():
    tokenizer = byte_tokenizer(None, before="<s>")
    prompts, sentences = doubts(lambda: make_prompts(["hi", "ho"], tokenizer))
    assert (texts(tokenizer, prompts), sentences) == (["<s>hi", "<s>ho"], [])
    prompts, sentences = doubts(lambda: make_prompts(["hi"], tokenizer, verbatim=True))
    assert (texts(tokenizer, prompts), sentences) == (["hi"], [])


def test_bos_twice_is_doubted_and_verbatim_text_has_it_once(tmp_path):
    tokenizer = byte_tokenizer(None, before="<s>")
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in ("hi", "<s>ho", "<s>hu")])
    prompts, sentences = doubts(lambda: read_prompts(path, tokenizer))
    assert texts(tokenizer, prompts)[1] == "<s><s>ho"
    (sentence,) = sentences
    assert sentence.startswith(f"Prompt file {path}, line 2 and 1 more: it begins with '<s>' twice; ")
    prompts, sentences = doubts(lambda: make_prompts(["<s>ho"], tokenizer, verbatim=True))
    assert (texts(tokenizer, prompts), sentences) == (["<s>ho"], [])


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_an_end_that_the_tokenizer_adds_is_doubted_whatever_its_eos_is(eos):
    tokenizer = byte_tokenizer(None, before="<s>", after="</s>", eos=eos)
    prompts, sentences = doubts(lambda: make_prompts(["hi", "ho"], tokenizer))
    assert texts(tokenizer, prompts) == ["<s>hi</s>", "<s>ho</s>"]
    (sentence,) = sentences
    assert sentence.startswith("Prompt number 0 and 1 more: it ends with '</s>', after which a response seldom goes on; ")
    prompts, sentences = doubts(lambda: make_prompts(["<s>hi"], tokenizer, verbatim=True))
    assert (texts(tokenizer, prompts), sentences) == (["<s>hi"], [])


def test_an_end_in_the_text_or_of_a_template_without_a_generation_prompt_is_doubted():
    for text, tokenizer in (("hi<|im_end|>", byte_tokenizer(None)), ("hi", byte_tokenizer(CLOSED))):
        _, sentences = doubts(lambda: make_prompts([text], tokenizer))  # noqa: B023
        (sentence,) = sentences
        assert sentence.startswith("Prompt number 0: it ends with '<|im_end|>'")
    assert doubts(lambda: make_prompts(["hi"], byte_tokenizer(STRICT)))[1] == [], "its generation prompt is the end of the user's turn"


@pytest.mark.parametrize("text", ["one <|im_end|> two", "<s>one<|im_end|> two </s> three\n"])
def test_a_special_token_inside_a_text_is_doubted_also_without_a_template(text):
    tokenizer = byte_tokenizer(None, eos="</s>")
    _, sentences = doubts(lambda: make_prompts(["hi", text, text, "<s>ho"], tokenizer))
    (sentence,) = sentences
    assert sentence.startswith(
        "Prompt number 1 and 1 more: its text contains '<|im_end|>', as if from a chat template; leave it if it is meant, "
    )
    assert doubts(lambda: make_prompts([text], tokenizer, verbatim=True))[1] == []
    (sentence,) = doubts(lambda: make_prompts(["one</s>\n"], tokenizer))[1]
    assert "it ends with '</s>'" in sentence


def test_text_without_special_tokens_is_tokenised_once(monkeypatch):
    tokenizer, asked = byte_tokenizer(None, before="<s>"), []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **how: asked.append(text) or encode(self, text, **how))
    make_prompts(["hi", "ho"], tokenizer)
    assert [asked.count(text) for text in ("hi", "ho")] == [1, 1]


def test_the_end_of_an_answer_is_doubted_also_where_it_is_not_eos():
    _, sentences = doubts(lambda: make_prompts(["hi"], byte_tokenizer(CLOSED, eos="</s>")))
    (sentence,) = sentences
    assert sentence.startswith("Prompt number 0: it ends with '<|im_end|>'")
    for template in (CHATML, DATED, STRICT):
        found = doubts(lambda: make_prompts(["hi"], byte_tokenizer(template, eos="<|pad|>"), date=datetime.date(2026, 1, 2)))[1]  # noqa: B023
        assert not [sentence for sentence in found if "ends with" in sentence]


@pytest.mark.parametrize(
    ("template", "mark", "text"),
    [
        (CHATML, "<|im_start|>", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (STRICT, "[/INST]", "[INST] hi [/INST]"),
        (STRICT, "<s>", "<s>[INST] hi [/INST]"),
    ],
)
def test_text_that_carries_the_template_already_is_doubted_and_verbatim_text_has_it_once(template, mark, text, tmp_path):
    tokenizer = byte_tokenizer(template)
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": text}, {"prompt": [{"role": "user", "content": text}]}])
    _, sentences = doubts(lambda: read_prompts(path, tokenizer))
    (sentence,) = sentences
    assert sentence.startswith(
        f"Prompt file {path}, line 2 and 1 more: its text contains '{mark}', as if it carried a chat template already"
    )
    prompts, sentences = doubts(lambda: make_prompts([text], tokenizer, verbatim=True))
    assert (texts(tokenizer, prompts), sentences) == ([text], [])


@pytest.mark.parametrize("write", [json.dumps, partial(json.dumps, indent=2), str])
def test_messages_as_text_are_doubted_and_read_where_they_are_json_under_their_own_key(write, tmp_path):
    text = write([{"role": "user", "content": "hi", "name": None}])
    if write is not str:
        (plain, *others), sentences = doubts(lambda: make_prompts(["hi", {"messages": text}, {"messages": "hi"}], byte_tokenizer()))
        assert (sentences, [other.token_ids.tolist() for other in others]) == ([], [plain.token_ids.tolist()] * 2)
        with pytest.raises(PromptError, match=r"Prompt number 0: its last message is the assistant's \('hi'\); drop the answer"):
            make_prompts([{"messages": text.replace("user", "assistant")}], byte_tokenizer())
    path = jsonl(tmp_path / "p.jsonl", [{"prompt" if write is not str else "messages": text}])
    prompts, sentences = doubts(lambda: read_prompts(path, byte_tokenizer()))
    assert prompts[0].text.startswith("[")
    assert sentences == [
        f"Prompt file {path}, line 1: it is a list of messages that was written as text, and is read as text; decode it for the chat template."
    ]


def test_messages_are_refused_where_text_is_verbatim():
    with pytest.raises(
        PromptError,
        match=r"Prompt number 0: it has a list of messages, which only a chat template reads, but `verbatim` text.*leave `verbatim` out",
    ):
        make_prompts([[{"role": "user", "content": "hi"}]], byte_tokenizer(), verbatim=True)


def test_todays_date_in_a_template_is_doubted_and_a_date_that_is_given_stays():
    tokenizer = byte_tokenizer(DATED)
    prompts, sentences = doubts(lambda: make_prompts(["hi", "ho"], tokenizer))
    assert datetime.datetime.now().strftime("Today Date: %d %b %Y") in texts(tokenizer, prompts)[0]
    (sentence,) = sentences
    assert sentence.startswith("Prompts: the chat template writes today's date, so that the same records give other prompts tomorrow; ")
    given = {"date": datetime.date(2024, 7, 26)}
    fixed, sentences = doubts(lambda: make_prompts(["hi", "ho"], tokenizer, **given))
    assert (sentences, "Today Date: 26 Jul 2024<|im_end|>" in texts(tokenizer, fixed)[0]) == ([], True)
    variable, sentences = doubts(lambda: make_prompts(["hi", "ho"], tokenizer, chat_template_kwargs={"date_string": "26 Jul 2024"}))
    assert (sentences, [p.prompt_id for p in variable]) == ([], [p.prompt_id for p in fixed])


def test_a_template_that_asks_for_the_date_of_some_prompts_only_is_doubted_for_those():
    tokenizer = byte_tokenizer("{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + CHATML)
    assert doubts(lambda: make_prompts(["hi"], tokenizer))[1] == []
    assert len(doubts(lambda: make_prompts(["hi"], tokenizer, tools=[{"name": "f"}]))[1]) == 1


def test_a_date_that_nothing_reads_is_named_and_one_of_another_kind_refused():
    day = datetime.date(2024, 7, 26)
    assert "`date` changes nothing" in doubts(lambda: make_prompts(["hi"], byte_tokenizer(), date=day))[1][0]
    with pytest.raises(
        PromptError,
        match=r"Prompts: it has `date`, which only a chat template reads, but the tokenizer has no chat template; .*tokenizer.chat_template",
    ):
        make_prompts(["hi"], byte_tokenizer(None), date=day)
    with pytest.raises(PromptError, match=r"Prompts: `date` is '2024-07-26', expected a datetime\.date; pass one"):
        make_prompts(["hi"], byte_tokenizer(DATED), date="2024-07-26")


TURNS = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (STRICT, {"messages": TURNS}, r"raised TemplateError \(Conversation roles must alternate"),
        ("{{ messages[0].content + none_such.x }}", {"prompt": "a"}, r"raised UndefinedError \('none_such' is undefined\)"),
        ("{{ messages[0].content + 1 }}", {"prompt": "a"}, r"raised TypeError"),
        ("{{ messages[1].content | tojson }}", {"prompt": "a"}, r"raised UndefinedError"),
        (CHATML, {"prompt": "a\ud800b"}, r"its text has the lone surrogate '\\ud800' at character 1"),
        (CHATML, {"prompt": "a", "answer": "\udc00"}, r"its text has the lone surrogate"),
        (None, {"prompt": "a\ud800b"}, r"its text has the lone surrogate"),
        (CHATML, {"messages": [{"role": "user", "content": ""}]}, r"its last message is empty, expected text; drop the record"),
        (CHATML, {"messages": [{"role": "user"}]}, r"message 0: its content is None, expected text"),
        (CHATML, {"messages": [{"role": "user", "content": 5}]}, r"message 0: its content is 5, expected text"),
        (CHATML, {"messages": [{"role": "user", "content": ["a"]}]}, r"message 0: a part is 'a', expected \{'type': 'text'"),
    ],
)
def test_what_cannot_be_rendered_is_one_error_with_file_and_record(template, record, message, tmp_path):
    tokenizer = byte_tokenizer(template)
    path = jsonl(tmp_path / "p.jsonl", [record])
    with pytest.raises(PromptError, match=rf"Prompt file .*p\.jsonl, line 1[:,] .*{message}") as caught:
        read_prompts(path, tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(PromptError, match=rf"Prompt number 0[:,] .*{message}"):
        make_prompts([record], tokenizer)


def test_a_template_that_is_not_jinja_is_refused_at_once():
    with pytest.raises(PromptError, match=r"Prompts: the chat template is not valid Jinja"):
        make_prompts(["a"], byte_tokenizer("{{ messages[ }}{% if"))


def test_a_tokenizer_that_raises_is_one_error_with_the_record():
    class Raising:
        chat_template = None

        def __call__(self, text, **options):
            if "b" in text:
                raise OverflowError("out of pieces")
            return {"input_ids": [1, 2]}

        def decode(self, ids):
            return str(ids)

    assert len(make_prompts(["a"], Raising())) == 1
    with pytest.raises(
        PromptError, match=r"Prompt number 1: the tokenizer or its chat template raised OverflowError \(out of pieces\); mend"
    ):
        make_prompts(["a", "b"], Raising())


def test_a_role_that_the_template_does_not_know_is_doubted():
    with pytest.warns(PromptWarning, match="the chat template does not read the role 'human'; drop"):
        make_prompts([[{"role": "human", "content": "hi"}]], byte_tokenizer())
    known = CHATML.replace("{{ m['role'] }}", "{{ 'user' if m['role'] == 'human' else m['role'] }}")
    make_prompts(
        [[{"role": "human", "content": "hi"}], [{"role": "tool", "content": "5"}, {"role": "user", "content": "hi"}]], byte_tokenizer(known)
    )


def test_a_processor_is_not_a_tokenizer():
    class Processor:
        chat_template = CHATML

        def apply_chat_template(self, conversation, tokenize=False, return_dict=False, **options):
            return {"input_ids": [[1, 2]]} if tokenize else "hi"

    with pytest.raises(
        PromptError, match=r"Prompt number 0: the tokenizer gave a list, expected token ids; pass the tokenizer of a processor"
    ):
        make_prompts(["hi"], Processor())


def test_text_that_gives_no_tokens_is_refused_with_its_record(tokenizer, tmp_path):
    bare = byte_tokenizer("{{ '' }}")
    with pytest.raises(PromptError, match=r"Prompt number 0: it has 0 tokens, expected at least 1"):
        make_prompts(["a"], bare)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"line 2: it is not JSON \('utf-8' codec"),
        (b'{"prompt": "a"}\n\n{"prompt": "a"\n', r"line 3: it is not JSON"),
        (b"[" * 100_000, r"line 1: it is not JSON"),
    ],
)
def test_lines_that_are_not_json_are_named(data, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(PromptError, match=rf"Prompt file .*p\.jsonl, {message}"):
        read_prompts(path, byte_tokenizer())


@pytest.mark.parametrize("path", ["no-such-protocol://p.jsonl", "*.jsonl", "s3://bucket/p.parquet"])
def test_a_place_that_cannot_be_opened_is_one_error_naming_it(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(PromptError, match=r"Prompt file .*p?\.(jsonl|parquet): it cannot be read"):
        read_prompts(path, byte_tokenizer())


def test_a_template_without_jinja_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="jinja2 is not installed"):
        make_prompts(["a"], byte_tokenizer())


def test_a_record_that_no_model_reads_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(None)
    monkeypatch.setattr(files_module, "LARGEST_ROW", 4000)
    small, large = {"prompt": "hi"}, {"prompt": "h" * 5000}
    jsonl(tmp_path / "p.jsonl", [small, large])
    with pytest.raises(PromptError, match=r"Prompt file .*p.jsonl, line 2: it has more than 4,000 bytes; drop it"):
        read_prompts(tmp_path / "p.jsonl", tokenizer)
    for name, rows in (("of 300", [small] * 299 + [large]), ("bomb", [{"prompt": "h" * 10**7}])):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
        with pytest.raises(PromptError, match=r"Prompt file .*parquet, (row 299|a row from 0 on): it has more than 4,000 bytes"):
            read_prompts(path, tokenizer)
    pq.write_table(pa.Table.from_pylist([{"prompt": f"h{i}"} for i in range(600)]), tmp_path / "q.parquet")
    assert [prompt.text for prompt in read_prompts(tmp_path / "q.parquet", tokenizer)] == [f"h{i}" for i in range(600)]


def test_a_record_that_is_nested_too_deep_is_named(tmp_path):
    for line in ("[" * 10**5, '{"prompt":' * 10**5, '{"prompt": "hi", "id": ' + "[" * 900 + "]" * 900 + "}"):
        (tmp_path / "p.jsonl").write_text(f'{{"prompt": "hi"}}\n{line}\n')
        with pytest.raises(PromptError, match=r"Prompt file .*p.jsonl, line 2: "):
            read_prompts(tmp_path / "p.jsonl", byte_tokenizer(None))
