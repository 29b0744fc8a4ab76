"""Prompts from JSONL, parquet, messages or plain strings.  The chat template is applied here, once; from here on there are only ids."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lopd.errors import ContextOverflowError, PromptError
from lopd.records.checks import path_or_url
from lopd.records.optional import need
from lopd.records.rollouts import Prompt

Messages = Sequence[Mapping[str, str]]


def read_prompts(
    path: str | os.PathLike[str], tokenizer: Any, *, field: str = "prompt", template: str = "{prompt}", max_tokens: int | None = None
) -> list[Prompt]:
    """Prompts from a file with one record per line (`.jsonl`) or row (`.parquet`).

    A record is a mapping; `record[field]` is a string (one user message) or a list of messages with "role" and "content".  Where `field` is
    missing, "messages" is looked for.  "id" and "answer" are taken over if they are there; without "id" a prompt is named after its tokens.

    Args:
        path: local, or any URL that fsspec opens.
        tokenizer: of the student.
        field: where the prompt is.
        template: what is said around a prompt that is a string; `{prompt}` stands for it, once.
        max_tokens: longest prompt allowed; None for no limit.

    Raises:
        PromptError: the file is empty, of another kind, or a record cannot be read; it names file and record.  Or the template has no place
            for the prompt, or a record is messages, around which nothing can be said.
        ContextOverflowError: a prompt is longer than `max_tokens`.
    """
    path = path_or_url("Prompt file", path, PromptError)
    if template.count("{prompt}") != 1:
        raise PromptError(
            f"Prompt file {path}: `template` is {template!r:.80}, expected '{{prompt}}' in it once; put it where the prompt goes."
        )
    records = _read_records(path)
    if not records:
        raise PromptError(f"Prompt file {path}: it has 0 records, expected at least 1; check that it was written.")
    contents: list[str | Messages] = []
    for i, record in enumerate(records):
        where = f"Prompt file {path}, record {i}"
        if not isinstance(record, Mapping):
            raise PromptError(f"{where}: it is a {type(record).__name__}, expected a mapping; write one JSON object a line.")
        content = record.get(field, record.get("messages"))
        if not _is_content(content):
            raise PromptError(
                f"{where}: {field!r} is {content!r:.80}, expected text, or messages with a role and a content each; name the field with `field`."
            )
        contents.append(_in_template(template, content, where))
    ids = [None if record.get("id") is None else str(record["id"]) for record in records]
    answers = [None if record.get("answer") is None else str(record["answer"]) for record in records]
    prompts = make_prompts(contents, tokenizer, ids=ids, answers=answers)
    _check_lengths(prompts, max_tokens, f"Prompt file {path}, record")
    return prompts


def _in_template(template: str, content: str | Messages, where: str) -> str | Messages:
    if template == "{prompt}":
        return content
    if not isinstance(content, str):
        raise PromptError(f"{where}: it is a list of messages, expected text for `template`; leave the template out.")
    return template.replace("{prompt}", content)


def _is_content(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content)
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content)
    )


def make_prompts(
    contents: Iterable[str | Messages],
    tokenizer: Any,
    *,
    ids: Sequence[str | None] | None = None,
    answers: Sequence[str | None] | None = None,
    max_tokens: int | None = None,
) -> list[Prompt]:
    """Prompts from strings (one user message each) or lists of messages.

    With a chat template, it is applied with the generation prompt; without one, strings are tokenised as they are.

    Raises:
        PromptError: messages for a tokenizer without a chat template, messages that end with an answer, or one string in place of several.
        ContextOverflowError: a prompt is longer than `max_tokens`.
    """
    if isinstance(contents, str):
        raise PromptError(f"Prompts: they are the text {contents!r:.40}, expected a list; pass [text], or read a file with `read_prompts`.")
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for i, content in enumerate(contents):
        text, token_ids = _tokenise(i, content, tokenizer)
        name = (ids[i] if ids else None) or _name(token_ids, seen)
        prompts.append(Prompt(name, token_ids, text, answers[i] if answers else None))
    _check_lengths(prompts, max_tokens, "Prompt number")
    return prompts


def _check_lengths(prompts: Sequence[Prompt], max_tokens: int | None, where: str) -> None:
    for i, prompt in enumerate(prompts):
        if max_tokens is not None and prompt.token_ids.size > max_tokens:
            raise ContextOverflowError(
                f"{where} {i}: prompt {prompt.prompt_id!r} has {prompt.token_ids.size} tokens, expected at most {max_tokens}; "
                "shorten it or drop it."
            )


def _tokenise(number: int, content: str | Messages, tokenizer: Any) -> tuple[str, list[int]]:
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
    text = str(messages[-1].get("content", ""))
    if messages[-1].get("role") == "assistant":
        raise PromptError(
            f"Prompt number {number}: its last message is the assistant's ({text!r:.40}), expected one to be answered; drop the answer, which the "
            "policy would otherwise be given."
        )
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return text, list(encoded["input_ids"])
    if not isinstance(content, str):
        raise PromptError(
            f"Prompt number {number}: it is a list of messages, but the tokenizer has no chat template; pass strings or set one."
        )
    return text, list(tokenizer(content)["input_ids"])


def _name(token_ids: Sequence[int], seen: dict[str, int]) -> str:
    """A name that depends on the tokens and not on the place in the file; equal prompts are numbered."""
    digest = blake2b(np.array(token_ids, "<i4").tobytes(), digest_size=8).hexdigest()
    seen[digest] = seen.get(digest, -1) + 1
    return digest if seen[digest] == 0 else f"{digest}-{seen[digest]}"


def _read_records(path: str) -> list[Any]:
    fsspec = need("fsspec", "Prompt files")
    try:
        with fsspec.open(path, "rb") as file:
            if path.endswith(".parquet"):
                return _read_parquet(file)
            return [_parse(path, i, line) for i, line in enumerate(file.read().split(b"\n")) if line.strip()]
    except OSError as error:
        raise PromptError(
            f"Prompt file {path}: it cannot be read ({error}), expected a .jsonl or .parquet file; check the path."
        ) from error


def _read_parquet(file: Any) -> list[Any]:
    pa, pq = need("pyarrow", "Prompt files"), need("pyarrow.parquet", "Prompt files")
    try:
        rows: list[Any] = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise OSError(f"not parquet: {error}") from error
    return rows


def _parse(path: str, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise PromptError(
            f"Prompt file {path}, line {number + 1}: it is not JSON ({error}), expected one object a line; fix the line."
        ) from error
