"""Prompts from JSONL, parquet, Hugging Face datasets, messages or plain strings."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date as Date  # noqa: N812 -- `date` is an argument here
from hashlib import blake2b
from typing import Any

import numpy as np

from lopd.errors import ContextOverflowError, PromptError
from lopd.records.chat_template import Messages, text_of
from lopd.records.checks import a_kind, check_at_least
from lopd.records.optional import need
from lopd.records.paths import asked, open_regular, path_or_url, without_secrets
from lopd.records.plain import as_id, as_text, plain
from lopd.records.rendering import Rendering
from lopd.records.rollouts import Prompt

#: Bytes of one record of a file; a larger one is refused before it is parsed.
LARGEST_ROW = 64 << 20
_ROWS_AT_ONCE = 256
_KEYS = ("id", "answer", "tools", "chat_template_kwargs")


def read_prompts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    field: str = "prompt",
    template: str = "{prompt}",
    max_tokens: int | None = None,
    verbatim: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: Date | None = None,
) -> list[Prompt]:
    """Prompts from a file with one record, of at most 64 MiB, per line (`.jsonl`) or row (`.parquet`).

    See `make_prompts` for what a record may have, for the arguments, and for what draws a `PromptWarning`.

    Args:
        path: local, or any URL that fsspec opens.
        tokenizer: of the student.
        field: as in `make_prompts`, like all that follow.
        template: text around each prompt.
        max_tokens: longest prompt allowed.
        verbatim: texts are tokenised as they are.
        tools: for records without tools.
        chat_template_kwargs: for all records.
        date: what the chat template reads as today.

    Raises:
        PromptError: the file is empty, not a file or of another kind, or a record is too large or cannot be turned into a prompt; it names
            file and record.
        ContextOverflowError: a prompt is longer than `max_tokens`.
    """
    if not isinstance(path, str | os.PathLike):
        raise PromptError(f"Prompt file: the path is {a_kind(path)}, expected text or a path; pass records to `make_prompts`.")
    path = path_or_url("Prompt file", path, PromptError)
    owner = f"Prompt file {without_secrets(path)}"
    _check_names(owner, field, template)
    rendering = Rendering(owner, tokenizer, verbatim=verbatim, tools=tools, variables=chat_template_kwargs, day=date)
    records = _read_records(path)
    if not records:
        raise PromptError(f"{owner}: it has 0 records, expected at least 1; check that it was written.")
    return _make(records, rendering, f"{owner}, record", owner=owner, field=field, template=template, max_tokens=max_tokens)


def make_prompts(
    contents: Iterable[str | Messages | Mapping[str, Any]],
    tokenizer: Any,
    *,
    ids: Sequence[str | None] | None = None,
    answers: Sequence[str | None] | None = None,
    field: str = "prompt",
    template: str = "{prompt}",
    max_tokens: int | None = None,
    verbatim: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: Date | None = None,
) -> list[Prompt]:
    """Prompts from strings (one user message each), lists of messages, or records such as the rows of a Hugging Face dataset.

    A record is a mapping; `record[field]`, or else `record["messages"]`, is a string or a list of messages with "role" and "content".
    "id" and "answer" are taken over; without "id" a prompt is named after its tokens.  "tools" and "chat_template_kwargs" go to the chat
    template, and so does each key of a message.  Keys that are null count as missing, and whole floats as ints, at every depth, so that JSONL,
    parquet and datasets give the same ids.  A columnar file has one order of keys for all records, and a template writes tools in the order
    that they have.

    A chat template is applied with the generation prompt.  Without one, strings are tokenised as the tokenizer does by itself, with its BOS.
    A `PromptWarning` names what may be wrong: keys that nothing reads, special tokens in a text, a text that begins with BOS twice or ends with
    EOS, today's date in a template.

    Args:
        contents: any number of them, in their order.
        tokenizer: of the student.
        ids: one for each prompt, or None to take the record's, or its tokens'.
        answers: likewise, what a verifier compares a response with.
        field: key of the prompt in a record.
        template: text around each prompt that is a string; `{prompt}` stands for it, once.
        max_tokens: longest prompt allowed; None for no limit.
        verbatim: texts carry the chat template already, or want none: they are tokenised as they are, and nothing is added.
        tools: JSON schemas, or functions, for records without tools.
        chat_template_kwargs: variables of the chat template, for example `{"enable_thinking": False}`; those of a record override them.
        date: what the chat template reads as today, so that a run that is resumed tomorrow makes the same prompts.

    Raises:
        PromptError: a content cannot be turned into a prompt: it is not text or messages, it ends with an answer, it needs a chat template
            that the tokenizer does not have, or the template or the tokenizer raised an error.
        ContextOverflowError: a prompt is longer than `max_tokens`.
    """
    _check_names("Prompts", field, template)
    rendering = Rendering("Prompts", tokenizer, verbatim=verbatim, tools=tools, variables=chat_template_kwargs, day=date)
    records = [content if isinstance(content, Mapping) else {field: content} for content in _several(contents)]
    beside: dict[str, Sequence[Any] | None] = {"id": ids, "answer": answers}
    for key, values in beside.items():
        if values is not None:
            if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
                raise PromptError(f"Prompts: the {key}s are {a_kind(values)}, expected a list; pass one for each prompt, or None.")
            if len(values) != len(records):
                raise PromptError(f"Prompts: there are {len(values)} {key}s, expected {len(records)}; pass one for each prompt.")
            records = [record if value is None else {**record, key: value} for record, value in zip(records, values, strict=True)]
    return _make(records, rendering, "Prompt number", owner="Prompts", field=field, template=template, max_tokens=max_tokens)


def _several(contents: Any) -> list[Any]:
    # a dataset's splits and a frame's columns iterate as text, which would be taken for prompts
    if isinstance(contents, str | Mapping) or hasattr(contents, "columns") or not isinstance(contents, Iterable):
        what = f"the text {contents!r:.40}" if isinstance(contents, str) else a_kind(contents)
        raise PromptError(
            f"Prompts: they are {what}, expected a list; pass [text], one split of a dataset, rows of a table, or use `read_prompts`."
        )
    return list(contents)


def _make(
    records: Iterable[Any], rendering: Rendering, item: str, *, owner: str, field: str, template: str, max_tokens: int | None
) -> list[Prompt]:
    prompts, seen, unread = list[Prompt](), dict[str, int](), dict[str, None]()
    max_tokens = None if max_tokens is None else check_at_least(owner, "max_tokens", max_tokens, 1)
    for i, record in enumerate(records):
        where = f"{item} {i}"
        if not isinstance(record, Mapping):
            raise PromptError(f"{where}: it is {a_kind(record)}, expected a mapping; write one JSON object a line.")
        known = {key: plain(record.get(key), where) for key in (field, "messages", *_KEYS)}
        used = "messages" if known[field] is None else field
        unread.update({key: None for key, value in record.items() if value is not None and key not in {used, *_KEYS}})
        content = _in_template(template, _checked(known[used], field, where), where)
        if isinstance(content, str) and content.startswith("[{") and '"role"' in content:
            rendering.doubts.add(where, "it is a list of messages as JSON text, which is read as text; decode it for the chat template")
        ids = rendering.tokenise(where, content, known["tools"], known["chat_template_kwargs"])
        name = as_id(known["id"], where) or _name(ids, seen)
        if max_tokens is not None and len(ids) > max_tokens:
            raise ContextOverflowError(
                f"{where}: prompt {name!r} has {len(ids)} tokens, expected at most {max_tokens}; shorten it or drop it."
            )
        prompts.append(Prompt(name, ids, content if isinstance(content, str) else text_of(content[-1]), as_text(known["answer"])))
    if unread:
        rendering.doubts.add(
            owner, f"the keys {', '.join(map(repr, unread))} are not read; drop them, or name the prompt's key with `field`"
        )
    rendering.doubt_template()
    rendering.doubts.warn(stacklevel=3)
    return prompts


def _check_names(owner: str, field: str, template: str) -> None:
    for name, value in (("field", field), ("template", template)):
        if not isinstance(value, str):
            raise PromptError(f"{owner}: `{name}` is {value!r:.80}, expected text; pass a str.")
    if template.count("{prompt}") != 1:
        raise PromptError(f"{owner}: `template` is {template!r:.80}, expected '{{prompt}}' in it once; put it where the prompt goes.")


def _in_template(template: str, content: str | Messages, where: str) -> str | Messages:
    if template == "{prompt}":
        return content
    if not isinstance(content, str):
        raise PromptError(f"{where}: it is a list of messages, expected text for `template`; leave the template out.")
    return template.replace("{prompt}", content)


def _checked(content: Any, field: str, where: str) -> str | Messages:
    """Text that is not empty, or messages of text that end with one to be answered."""
    if content and isinstance(content, str):
        return content
    if (
        not content
        or not isinstance(content, list)
        or not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in content)
    ):
        raise PromptError(
            f"{where}: {field!r} is {content!r:.80}, expected text, or messages with a role and a content each; name the field with `field`."
        )
    for i, message in enumerate(content):
        _check_message(message, f"{where}, message {i}")
    text = text_of(content[-1])
    if content[-1]["role"] == "assistant":
        raise PromptError(
            f"{where}: its last message is the assistant's ({text!r:.40}), expected one to be answered; drop the answer, which the policy would "
            "otherwise be given."
        )
    if content[-1]["role"] == "user" and not text:
        raise PromptError(f"{where}: its last message is empty, expected text; drop the record.")
    return content


def _check_message(message: Mapping[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise PromptError(
                    f"{where}: a part is {part!r:.80}, expected {{'type': 'text', 'text': ...}}; only text can be sampled from."
                )
    # an assistant that calls a tool may say nothing beside
    elif not isinstance(content, str) and (content is not None or message["role"] != "assistant" or message.keys() == {"role"}):
        raise PromptError(f"{where}: its content is {content!r:.80}, expected text or parts that are text; write it as text.")


def _name(token_ids: Sequence[int], seen: dict[str, int]) -> str:
    """A name that depends on the tokens and not on the place in the file; equal prompts are numbered."""
    digest = blake2b(np.array(token_ids, "<i4").tobytes(), digest_size=8).hexdigest()
    seen[digest] = seen.get(digest, -1) + 1
    return digest if seen[digest] == 0 else f"{digest}-{seen[digest]}"


def _read_records(path: str) -> list[Any]:
    try:
        return asked(path, lambda: _records_of(path))
    except OSError as error:
        raise PromptError(
            f"Prompt file {without_secrets(path)}: it cannot be read ({error}), expected a .jsonl or .parquet file; check the path."
        ) from error


def _records_of(path: str) -> list[Any]:
    with _opened(path) as file:
        return list(_parquet_rows(path, file) if path.endswith(".parquet") else _json_lines(path, file))


def _opened(path: str) -> Any:
    local = path.removeprefix("file://")
    return need("fsspec", "Prompt files").open(path, "rb") if "://" in local else open_regular(local)


def _json_lines(path: str, file: Any) -> Iterator[Any]:
    for number, line in enumerate(iter(lambda: file.readline(LARGEST_ROW + 1), b""), 1):
        _check_row(f"{without_secrets(path)}, line {number}", len(line))
        if line.strip():
            yield _parse(path, number, line)


def _parquet_rows(path: str, file: Any) -> Iterator[Any]:
    table, first = need("pyarrow.parquet", "Prompt files").ParquetFile(file), 0
    for group in map(table.metadata.row_group, range(table.num_row_groups)):
        # a page of kilobytes may become gigabytes, and says so
        whole = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
        _check_row(f"{without_secrets(path)}, a record from {first} on", whole // max(group.num_rows, 1))
        first += group.num_rows
    first = 0
    for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
        for i in range(len(batch) if batch.nbytes > LARGEST_ROW else 0):
            _check_row(f"{without_secrets(path)}, record {first + i}", batch.slice(i, 1).nbytes)
        first += len(batch)
        yield from batch.to_pylist(maps_as_pydicts="strict")


def _check_row(row: str, size: int) -> None:
    if size > LARGEST_ROW:
        raise PromptError(f"Prompt file {row}: it has more than {LARGEST_ROW:,} bytes; drop it, no model reads so much.")


def _parse(path: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"Prompt file {without_secrets(path)}, line {number}: it is not JSON ({error}), expected one object a line; fix the line."
        ) from error
