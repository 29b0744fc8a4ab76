"""Prompt files and messages -> token ids; the chat template is applied exactly once."""

import copy
import json
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lopd import import_text
from lopd.errors import ArgumentError, ContextOverflowError, LopdError, MissingDependencyError, PromptError
from lopd.records import make_prompts, read_prompts


def write_jsonl(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def bare_tokenizer(tokenizer):
    """Return a tokenizer without a chat template."""
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    return bare


def wrapped(tokenizer, *contents):
    """Return what the chat template must give for user messages, written out token by token."""
    ids = []
    for text in contents:
        ids += [tokenizer.convert_tokens_to_ids("<|user|>"), *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return [*ids, tokenizer.convert_tokens_to_ids("<|assistant|>")]


def test_messages_that_end_with_an_answer_are_refused_and_one_text_is_no_list(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]
    for call in (
        lambda: make_prompts([chat], tokenizer),
        lambda: read_prompts(write_jsonl(tmp_path / "p.jsonl", [{"messages": chat}]), tokenizer),
    ):
        with pytest.raises(PromptError, match=r"its last message is the assistant's \('2'\); drop the answer"):
            call()
    with pytest.raises(PromptError, match=r"they are the text '12', expected a list; pass \[text\]"):
        make_prompts("12", tokenizer)


def test_a_string_becomes_one_user_message_with_the_generation_prompt(tokenizer):
    (prompt,) = make_prompts(["what is 1+1?"], tokenizer)
    assert prompt.token_ids.tolist() == wrapped(tokenizer, "what is 1+1?")
    assert prompt.text == "what is 1+1?"
    assert prompt.answer is None


def test_the_template_is_applied_once_and_adds_no_second_bos(tokenizer):
    with_bos = copy.deepcopy(tokenizer)
    with_bos.chat_template = "<|system|>" + tokenizer.chat_template
    with_bos._tokenizer.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 3)])
    assert with_bos("hi")["input_ids"][0] == 3, "tokenising text adds a BOS of its own, the trap of this test"
    (prompt,) = make_prompts(["hi"], with_bos)
    assert prompt.token_ids.tolist() == [3, *wrapped(tokenizer, "hi")]


def test_messages_keep_roles_and_order_and_the_text_is_the_last_message(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    (prompt,) = make_prompts([messages], tokenizer)
    expected = [3, *tokenizer("be brief")["input_ids"], 0, *wrapped(tokenizer, "one", "two")]
    assert prompt.token_ids.tolist() == expected
    assert prompt.text == "two"


def test_without_a_chat_template_strings_are_tokenised_as_they_are_and_messages_are_refused(bare_tokenizer):
    (prompt,) = make_prompts(["1+1="], bare_tokenizer)
    assert prompt.token_ids.tolist() == bare_tokenizer("1+1=")["input_ids"]
    with pytest.raises(PromptError, match=r"number 1.*chat template"):
        make_prompts(["fine", [{"role": "user", "content": "no"}]], bare_tokenizer)


RECORDS = [
    {"prompt": "one", "answer": 1, "id": "first"},
    {"prompt": [{"role": "user", "content": "two"}], "answer": "2", "id": 7},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}]},
]


def check_records(prompts, tokenizer):
    assert [p.token_ids.tolist() for p in prompts[:2]] == [wrapped(tokenizer, "one"), wrapped(tokenizer, "two")]
    assert prompts[2].token_ids.tolist() == [3, *tokenizer("s")["input_ids"], 0, *wrapped(tokenizer, "three")]
    assert [p.text for p in prompts] == ["one", "two", "three"]
    assert [p.answer for p in prompts] == ["1", "2", None]
    assert [p.prompt_id for p in prompts[:2]] == ["first", "7"]
    assert prompts[2].prompt_id not in {"", "None", "2"}


def test_jsonl_with_strings_messages_ids_and_answers(tokenizer, tmp_path):
    check_records(read_prompts(write_jsonl(tmp_path / "p.jsonl", RECORDS), tokenizer), tokenizer)


def test_blank_lines_and_windows_line_ends_are_no_records(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\r\n" + b"\r\n\n".join(json.dumps(record).encode() for record in RECORDS) + b"\r\n  \n")
    check_records(read_prompts(str(path), tokenizer), tokenizer)


def test_text_beyond_ascii_and_unicode_line_separators_stay_inside_their_record(bare_tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (prompt,) = read_prompts(str(path), bare_tokenizer)
    assert prompt.text == "a\u2028b\u0085c"


def test_parquet_with_strings_and_with_messages(tokenizer, tmp_path):
    strings = pa.table({"prompt": ["one", "two"], "answer": ["1", None], "id": ["a", None]})
    pq.write_table(strings, tmp_path / "strings.parquet")
    first, second = read_prompts(str(tmp_path / "strings.parquet"), tokenizer)
    assert (first.prompt_id, first.answer, first.token_ids.tolist()) == ("a", "1", wrapped(tokenizer, "one"))
    assert (second.answer, second.token_ids.tolist()) == (None, wrapped(tokenizer, "two"))
    assert second.prompt_id not in {"", "None"}
    messages = pa.table({"messages": [[{"role": "user", "content": "one"}]]})
    pq.write_table(messages, tmp_path / "messages.parquet")
    (only,) = read_prompts(str(tmp_path / "messages.parquet"), tokenizer)
    assert only.token_ids.tolist() == wrapped(tokenizer, "one")


def test_another_field_can_be_named_and_a_url_can_be_given(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"question": "one"}])
    (prompt,) = read_prompts(f"file://{path}", tokenizer, field="question")
    assert prompt.token_ids.tolist() == wrapped(tokenizer, "one")


def test_names_without_an_id_depend_on_the_tokens_and_not_on_the_place_in_the_file(tokenizer):
    forwards = {p.text: p.prompt_id for p in make_prompts(["one", "two", "three"], tokenizer)}
    backwards = {p.text: p.prompt_id for p in make_prompts(["three", "four", "two", "one"], tokenizer)}
    assert all(forwards[text] == backwards[text] for text in forwards)
    assert len(set(backwards.values())) == 4


def test_equal_prompts_are_numbered(tokenizer):
    prompts = make_prompts(["one", "two", "one", "one"], tokenizer)
    name = prompts[0].prompt_id
    assert [p.prompt_id for p in prompts] == [name, prompts[1].prompt_id, f"{name}-1", f"{name}-2"]


def test_the_longest_prompt_allowed_passes_and_the_next_is_refused_by_name(tokenizer):
    length = len(wrapped(tokenizer, "xyz"))
    assert len(make_prompts(["xyz"], tokenizer, max_tokens=length)) == 1
    with pytest.raises(ContextOverflowError, match=rf"Prompt number 1: prompt 'long'.*{length + 1} tokens.*at most {length}"):
        make_prompts(["xyz", "wxyz"], tokenizer, ids=[None, "long"], max_tokens=length)


def test_an_over_long_prompt_of_a_file_is_refused_with_file_and_record(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "x" * 50}])
    with pytest.raises(ContextOverflowError) as caught:
        read_prompts(path, tokenizer, max_tokens=20)
    assert path in str(caught.value)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 records"),
        ("\n \n", "0 records"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2.*not JSON"),
        ('{"prompt": "a"}\n["b"]\n', "line 2.*list"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: its keys with a value are 'text', expected 'prompt' or 'messages'"),
        ('{"prompt": ""}\n', "line 1.*'prompt' is ''"),
        ('{"prompt": []}\n', "line 1.*'prompt' is"),
        ('{"prompt": "a"}\n{"prompt": 5}\n', "line 2"),
        ('{"prompt": "a"}\n{"prompt": ["b"]}\n', "line 2"),
        ('{"prompt": "a"}\n{"prompt": {"role": "user", "content": "b"}}\n', "line 2"),
        ('{"prompt": "a"}\n{"prompt": [{"content": "b"}]}\n', "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_gives_one_typed_error_naming_file_and_record(text, message, tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(str(path), tokenizer)
    assert str(path) in str(caught.value)


def test_a_missing_file_gives_one_typed_error_naming_it(tokenizer, tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(PromptError, match=name):
            read_prompts(str(tmp_path / name), tokenizer)


@pytest.mark.parametrize("data", [b"", b"not parquet at all"])
def test_a_damaged_parquet_file_gives_one_typed_error_naming_it(data, tokenizer, tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(data)
    with pytest.raises(PromptError, match=r"p\.parquet"):
        read_prompts(str(path), tokenizer)


def test_a_file_of_another_kind_gives_one_typed_error_naming_it(tokenizer, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\none\n")
    with pytest.raises(PromptError, match=r"p\.csv"):
        read_prompts(str(path), tokenizer)
    with pytest.raises(PromptError):
        read_prompts(str(tmp_path), tokenizer)


def test_ids_of_a_file_are_taken_as_they_are_also_twice(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}])
    assert [p.prompt_id for p in read_prompts(path, tokenizer)] == ["x", "x"], "collect_rollouts names the duplicate"


def test_a_template_is_said_around_every_prompt(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1", "answer": 2}, {"prompt": "{prompt}"}])
    first, second = read_prompts(path, tokenizer, template="what is {prompt}? in {braces}")
    assert first.text == "what is 1+1? in {braces}"
    assert first.token_ids.tolist() == wrapped(tokenizer, "what is 1+1? in {braces}")
    assert (first.answer, second.text) == ("2", "what is {prompt}? in {braces}")


@pytest.mark.parametrize("template", ["what is it?", "{prompt} and {prompt}", ""])
def test_a_template_without_one_place_for_the_prompt_is_refused(tokenizer, tmp_path, template):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1"}])
    with pytest.raises(PromptError, match=r"`template` is .* once; put it where the prompt goes"):
        read_prompts(path, tokenizer, template=template)


def test_messages_do_not_go_into_a_template(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1"}, {"messages": [{"role": "user", "content": "1+1"}]}])
    with pytest.raises(PromptError, match="line 2: it is a list of messages, expected text for `template`"):
        read_prompts(path, tokenizer, template="say {prompt}")
    assert len(read_prompts(path, tokenizer)) == 2


WRONG_FILES = {
    "c.csv": (b"prompt,answer\na,b\n", r"line 1: it is not JSON \(Expecting value at character 0\); write one JSON object a line \(CSV"),
    "list.json": (b'[\n{"prompt": "a"}\n]\n', "line 1: .*lists of JSON are not read.*or pass its records in memory"),
    "pretty.json": (b'{\n"prompt": "a"\n}\n', "line 1: .*write one JSON object a line"),
    "broken.jsonl": (b'{"prompt": "a"\n', "line 1: .*; fix the line"),
    "utf16.jsonl": ('{"prompt": "a"}\n'.encode("utf-16"), "line 1: it is not JSON .*save the file as UTF-8"),
    "latin.jsonl": ('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"), "line 2: it is not JSON .*save the file as UTF-8"),
    "packed.jsonl.gz": (b"\x1f\x8b\x08\x00", "line 1: it is not JSON .*without compression"),
    "blank.jsonl": (b'{"prompt": "a"}\n\n{"promt": "b"}\n', "line 3: its keys with a value are 'promt', expected 'prompt' or 'messages'"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_of_another_kind_is_named_with_the_line_and_what_is_read(name, tokenizer, tmp_path):
    data, said = WRONG_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError, match=f"Prompt file {tmp_path}/{name}, {said}"):
        read_prompts(tmp_path / name, tokenizer)


def test_texts_of_a_file_are_named_by_their_lines(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text('\n{"prompt": "a"}\n')
    with pytest.raises(PromptError, match=r"Text file .*t.jsonl, line 2: its keys with a value are 'prompt', expected 'prompt' and"):
        import_text(tmp_path / "t.jsonl", tokenizer, teacher=None)


def test_parquet_is_read_whatever_the_name_of_the_file(tokenizer, tmp_path):
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "p.jsonl")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl", tokenizer)] == ["a"]


@pytest.mark.parametrize("wrong", ["sft-student", None, Path("sft-student"), PreTrainedTokenizerFast])
def test_a_tokenizer_that_is_not_loaded_is_said(wrong, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    for read in (lambda: read_prompts(path, wrong), lambda: make_prompts(["a"], wrong)):
        with pytest.raises(ArgumentError, match=r"Prompt.*: the tokenizer is .*, which cannot tokenise; `load_model` gives one"):
            read()


class RemoteFile(AbstractBufferedFile):
    """Its `readline` takes no length, as that of s3fs and of http does not."""

    def _fetch_range(self, start, end):
        return LINES[start:end]


class Remote(AbstractFileSystem):
    cachable = False

    def _open(self, path, mode="rb", **_):
        return RemoteFile(self, path, mode, size=len(LINES))


LINES = b'{"prompt": "a"}\n{"prompt": "b"}\n'


def test_files_that_only_fsspec_reaches_are_read_line_by_line(tokenizer):
    fsspec.register_implementation("remote", Remote, clobber=True)
    assert [prompt.text for prompt in read_prompts("remote://host/p.jsonl", tokenizer)] == ["a", "b"]


def test_a_package_that_a_url_needs_is_named(tokenizer, monkeypatch):
    fsspec.register_implementation("lacking", "no_such_package.FileSystem", clobber=True, errtxt="Install nosuch to access it")
    with pytest.raises(
        MissingDependencyError, match=r"^Prompt file lacking://a/p.jsonl: Install nosuch to access it; install that, or copy"
    ):
        read_prompts("lacking://a/p.jsonl", tokenizer)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingDependencyError, match=r"obstore is not installed; pip install 'lopd\[zarr\]'"):
        read_prompts("s3://a/p.jsonl", tokenizer)


@pytest.mark.s3
def test_prompts_in_a_bucket_are_read_as_stores_are(s3, tokenizer, monkeypatch):
    for name, value in s3.storage_options.items():
        monkeypatch.setenv(name.upper() if name.startswith("aws_") else f"AWS_{name.upper()}", value)
    s3.write("data/p.jsonl", LINES)
    assert [prompt.text for prompt in read_prompts(s3.url("data/p.jsonl"), tokenizer)] == ["a", "b"]
    s3.write("data/t=00%3A00/a?b#c/p.jsonl", LINES)
    assert len(read_prompts(s3.url("data/t=00%3A00/a?b#c/p.jsonl"), tokenizer)) == 2
    with pytest.raises(PromptError, match=r"p.jsonl: it cannot be read \(.*empty path segment"):
        read_prompts(s3.url("data//p.jsonl"), tokenizer)
    with pytest.raises(PromptError, match=rf"Prompt file {s3.url('data/q.jsonl')}: it cannot be read \(.*\), expected a .jsonl"):
        read_prompts(s3.url("data/q.jsonl"), tokenizer)
    with pytest.raises(LopdError, match="there is no such bucket; create it, or check its name"):
        read_prompts("s3://nobodys/p.jsonl", tokenizer)
