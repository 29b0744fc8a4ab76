"""What a record may hold: a text or messages, what stands beside them, and what the record is called without a name."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lopd.errors import PromptError
from lopd.records.arrays import Int32Array
from lopd.records.chat_template import Messages, text_of
from lopd.records.checks import a_kind
from lopd.records.plain import as_id, from_json
from lopd.records.rollouts import rollout_id

#: Keys of a record that are read beside its text.
KEYS = ("id", "answer", "tools", "chat_template_kwargs")


def several(owner: str, contents: Any, reader: str) -> Iterable[Any]:
    """Return the contents, if they are many: a list, rows of a table, or a dataset, whole or streamed.

    Args:
        owner: how messages name all of them.
        contents: what was passed for them.
        reader: what takes a file instead, for the message.

    Raises:
        PromptError: they are one text, one record, or of another kind.
    """
    # a dataset's splits and a frame's columns iterate as text, which would be taken for prompts
    if isinstance(contents, str | Mapping) or hasattr(contents, "columns") or not isinstance(contents, Iterable):
        what = f"the text {contents!r:.40}" if isinstance(contents, str) else a_kind(contents)
        raise PromptError(
            f"{owner}: they are {what}, expected a list; pass [text], one split of a dataset, rows of a table, or use {reader}."
        )
    return contents


def with_value(record: Mapping[str, Any]) -> str:
    """Return the keys of a record that are not null, for messages."""
    return ", ".join(repr(key) for key, value in record.items() if value is not None) or "not there"


def check_names(owner: str, template: str, **fields: str) -> None:
    """Check that the template has one place for a prompt, and that names of fields are text.

    Raises:
        PromptError: they are not.
    """
    for name, value in {**fields, "template": template}.items():
        if not isinstance(value, str):
            raise PromptError(f"{owner}: `{name}` is {value!r:.80}, expected text; pass a str.")
    if template.count("{prompt}") != 1:
        raise PromptError(f"{owner}: `template` is {template!r:.80}, expected '{{prompt}}' in it once; put it where the prompt goes.")


def in_template(template: str, content: str | Messages, where: str) -> str | Messages:
    """Return the prompt with the template around it.

    Raises:
        PromptError: it is messages.
    """
    if template == "{prompt}":
        return content
    if not isinstance(content, str):
        raise PromptError(f"{where}: it is a list of messages, expected text for `template`; set that to '{{prompt}}', which adds nothing.")
    return template.replace("{prompt}", content)


def checked(content: Any, field: str, where: str) -> str | Messages:
    """Return text that is not empty, or messages of text that end with one to be answered.

    Raises:
        PromptError: it is something else; it names the record.
    """
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
        check_message(message, f"{where}, message {i}")
    text = text_of(content[-1])
    if content[-1]["role"] == "assistant":
        raise PromptError(
            f"{where}: its last message is the assistant's ({text!r:.40}); drop the answer, which the policy would otherwise be given."
        )
    if content[-1]["role"] == "user" and not text:
        raise PromptError(f"{where}: its last message is empty, expected text; drop the record.")
    return content


def check_roles(messages: Iterable[Any], where: str) -> None:
    """Check that messages have roles, which those of ShareGPT have under another key.

    Raises:
        PromptError: one has none; it names the keys found.
    """
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and "role" not in message:
            raise PromptError(
                f"{where}: message {i} has the keys {with_value(message)}, expected 'role' and 'content'; rename them, and call the roles 'system', "
                "'user' and 'assistant'."
            )


def check_message(message: Mapping[str, Any], where: str) -> None:
    """Check that the content of a message is text, or parts that are text.

    Raises:
        PromptError: it is not; only an assistant that calls a tool may leave its text empty.
    """
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise PromptError(
                    f"{where}: a part is {part!r:.80}, expected {{'type': 'text', 'text': ...}}; only text can be sampled from."
                )
    elif not isinstance(content, str) and (content is not None or message["role"] != "assistant" or message.keys() == {"role"}):
        raise PromptError(f"{where}: its content is {content!r:.80}, expected text or parts that are text; write it as text.")


def as_served(message: Mapping[str, Any], where: str, *, values: bool) -> Mapping[str, Any]:
    """Return a message as vLLM and SGLang show it to a template: no content as "", and arguments of calls, JSON text for OpenAI, as values.

    Args:
        message: a message of any role.
        where: its name in messages.
        values: whether the template reads arguments as values; one that joins them to text gets them as they are.

    Raises:
        PromptError: the arguments are text that is not JSON.
    """
    shown = {**message, "content": message.get("content", "")}
    if values and isinstance(calls := message.get("tool_calls"), list):
        shown["tool_calls"] = [_with_arguments(call, where) for call in calls]
    return shown


def _with_arguments(call: Any, where: str) -> Any:
    """Return a call, or what stands under its "function", with the arguments as values."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], where)}
    if "arguments" not in call:
        return call
    given = call["arguments"].strip() if isinstance(call["arguments"], str) else call["arguments"]
    return {**call, "arguments": from_json(given or "{}", where, "arguments")}


class Names:
    """Ids of rollouts that were not sampled here: several of one prompt are its samples, and an id is of one prompt."""

    def __init__(self) -> None:
        self._prompts, self._samples = dict[str, bytes](), Counter[str]()

    def next(self, where: str, given: Any, prompt_ids: Sequence[int] | Int32Array) -> str:
        """Return the id of another rollout, from the id that its record gives or else from the tokens of the prompt.

        Raises:
            PromptError: the given id is not an id, or is that of another prompt.
        """
        name = as_id(given, where) or name_of(prompt_ids)
        tokens = np.array(prompt_ids, np.int32).tobytes()
        if self._prompts.setdefault(name, tokens) != tokens:
            raise PromptError(f"{where}: its id {name!r} is that of another prompt before it; leave ids out.")
        self._samples[name] += 1
        return rollout_id(name, self._samples[name] - 1, 0)


def name_of(token_ids: Sequence[int] | Int32Array) -> str:
    """Return the name of a prompt without one: it depends on the tokens and not on the place in the file."""
    return blake2b(np.array(token_ids, "<i4").tobytes(), digest_size=8).hexdigest()
