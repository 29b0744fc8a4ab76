"""Prompts from JSONL, parquet, Hugging Face datasets, messages or plain strings."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date as Date  # noqa: N812 -- `date` is an argument here
from typing import Any

from lopd.errors import ContextOverflowError, PromptError
from lopd.records.chat_template import Messages, text_of
from lopd.records.checks import a_kind, check_at_least
from lopd.records.contents import KEYS, check_names, checked, in_template, name_of, several, with_value
from lopd.records.files import named_file, read_records
from lopd.records.plain import as_id, as_text, from_json, plain
from lopd.records.rendering import MESSAGES, Rendering
from lopd.records.rollouts import Prompt


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
    """Return prompts from a file with one record, of at most 64 MiB, per line (`.jsonl`) or row (`.parquet`).

    See `make_prompts` for what a record may have, for the arguments, and for what draws a `PromptWarning`.

    Args:
        path: local, in a bucket (`s3://`, `gs://`, `az://`, `abfss://`), or any other URL that fsspec opens.
        tokenizer: the student's tokenizer.
        field: as in `make_prompts`, like all that follow.
        template: text around each prompt.
        max_tokens: longest prompt allowed.
        verbatim: texts are tokenised as they are.
        tools: for records without tools.
        chat_template_kwargs: for all records.
        date: what the chat template reads as today.

    Raises:
        PromptError: the file is empty, not a file or of another kind, or a record is too large or cannot be turned into a prompt; it names
            file and line, or row.
        MissingDependencyError: a package for this kind of file or URL is not installed.
        ContextOverflowError: a prompt is longer than `max_tokens`.
    """
    if not isinstance(path, str | os.PathLike):
        raise PromptError(f"Prompt file: the path is {a_kind(path)}, expected text or a path; pass records to `make_prompts`.")
    path, owner = named_file("Prompt file", path)
    check_names(owner, template, field=field)
    rendering = Rendering(owner, tokenizer, verbatim=verbatim, tools=tools, variables=chat_template_kwargs, day=date)
    item, records = read_records(owner, path)
    return _make(records, rendering, item, owner=owner, field=field, template=template, max_tokens=max_tokens)


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
    """Return prompts from strings (one user message each), lists of messages, or records such as the rows of a Hugging Face dataset.

    A record is a mapping; `record[field]`, or else `record["messages"]`, is a string or a list of messages with "role" and "content";
    the second may be JSON text, as tables keep lists.
    "id" and "answer" are taken over; without "id" a prompt is named after its tokens.  "tools" and "chat_template_kwargs" go to the chat
    template, and so does each key of a message.  Keys that are null count as missing, and whole floats as ints, at every depth, so that JSONL,
    parquet and datasets give the same ids.  A columnar file has one order of keys for all records, and a template writes tools in the order
    that they have.

    A chat template is applied with the generation prompt.  Without one, strings are tokenised as the tokenizer does by itself, with its BOS.
    A `PromptWarning` names what may be wrong: keys that nothing reads, special tokens in a text, a text that begins with BOS twice or ends with
    EOS, today's date in a template.

    Args:
        contents: any number of them, in their order.
        tokenizer: the student's tokenizer.
        ids: one for each prompt, or None to take the record's, or its tokens'.
        answers: what a verifier compares a response with, one for each prompt; or None to take the record's.
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
    check_names("Prompts", template, field=field)
    rendering = Rendering("Prompts", tokenizer, verbatim=verbatim, tools=tools, variables=chat_template_kwargs, day=date)
    records = [content if isinstance(content, Mapping) else {field: content} for content in several("Prompts", contents, "`read_prompts`")]
    beside: dict[str, Sequence[Any] | None] = {"id": ids, "answer": answers}
    for key, values in beside.items():
        if values is not None:
            if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
                raise PromptError(f"Prompts: the {key}s are {a_kind(values)}, expected a list; pass one for each prompt, or None.")
            if len(values) != len(records):
                raise PromptError(f"Prompts: there are {len(values)} {key}s, expected {len(records)}; pass one for each prompt.")
            records = [record if value is None else {**record, key: value} for record, value in zip(records, values, strict=True)]
    return _make(enumerate(records), rendering, "Prompt number", owner="Prompts", field=field, template=template, max_tokens=max_tokens)


def _make(
    records: Iterable[tuple[int, Any]], rendering: Rendering, item: str, *, owner: str, field: str, template: str, max_tokens: int | None
) -> list[Prompt]:
    prompts, seen, unread = list[Prompt](), dict[str, int](), dict[str, None]()
    max_tokens = None if max_tokens is None else check_at_least(owner, "max_tokens", max_tokens, 1)
    for i, record in records:
        where = f"{item} {i}"
        if not isinstance(record, Mapping):
            raise PromptError(f"{where}: it is {a_kind(record)}, expected a mapping; write one JSON object a line.")
        known = {key: plain(record.get(key), where) for key in (field, "messages", *KEYS)}
        used = "messages" if known[field] is None else field
        if known[used] is None:
            raise PromptError(
                f"{where}: its keys with a value are {with_value(record)}, expected {field!r} or 'messages'; name the prompt's with `field`."
            )
        unread.update({key: None for key, value in record.items() if value is not None and key not in {used, *KEYS}})
        given = _decoded(known[used], where) if used == "messages" else known[used]
        content = in_template(template, checked(given, field, where), where)
        ids = rendering.tokenise(where, content, known["tools"], known["chat_template_kwargs"])
        name = as_id(known["id"], where) or _name(ids, seen)
        if max_tokens is not None and len(ids) > max_tokens:
            raise ContextOverflowError(
                f"{where}: prompt {name!r} has {len(ids)} tokens, expected at most {max_tokens}; shorten it or drop it."
            )
        prompts.append(Prompt(name, ids, content if isinstance(content, str) else text_of(content[-1]), as_text(known["answer"])))
    if unread:
        rendering.doubt(owner, f"the keys {', '.join(map(repr, unread))} are not read; drop them, or name the prompt's key with `field`")
    rendering.warn()
    return prompts


def _decoded(value: Any, where: str) -> Any:
    """Return messages that are JSON text, as tables keep them, as messages; other text is a prompt itself."""
    if not isinstance(value, str) or not MESSAGES.match(value):
        return value
    with suppress(PromptError):  # as pandas writes them, which is doubted
        value = from_json(value, where, "messages")
    return plain(value, where)


def _name(token_ids: Sequence[int], seen: dict[str, int]) -> str:
    """Return a name that depends on the tokens and not on the place in the file; equal prompts are numbered."""
    name = name_of(token_ids)
    seen[name] = seen.get(name, -1) + 1
    return name if seen[name] == 0 else f"{name}-{seen[name]}"
