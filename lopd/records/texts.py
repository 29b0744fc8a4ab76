"""Prompts with written responses -> rollouts, for SFT: the same records and rules as for prompts, and a response beside each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from attrs import evolve, frozen

from lopd.errors import ContextOverflowError, PromptError
from lopd.records.arrays import Int32Array, to_ids
from lopd.records.chat_template import Messages, text_of
from lopd.records.checks import a_kind
from lopd.records.contents import KEYS, Names, check_message, check_roles, checked, in_template, with_value
from lopd.records.plain import from_json, plain
from lopd.records.rendering import Rendering
from lopd.records.rollouts import FinishReason, Rollout

#: What becomes of a text that is too long.
TooLong = Literal["refuse", "drop", "cut"]
_KEYS = (*KEYS, "finish_reason")


@frozen
class Fields:
    """Where a record has its texts.

    Args:
        prompt: key of the prompt, text or messages.
        response: key of the response, text or one message of the assistant; a record without it has messages, here or in
            "messages", and the last is the response.
        template: text around a prompt that is a string.
    """

    prompt: str
    response: str
    template: str


@frozen(eq=False)
class _Text:
    """A text in tokens, without a name: samples of a prompt are numbered when it is known which are kept."""

    where: str
    given: Any
    prompt_ids: Int32Array
    response_ids: Int32Array
    reason: FinishReason

    def __len__(self) -> int:
        return self.prompt_ids.size + self.response_ids.size

    def named(self, names: Names) -> Rollout:
        """Return it as the next rollout of its prompt."""
        name = names.next(self.where, self.given, self.prompt_ids)
        return Rollout(name, self.prompt_ids, self.response_ids, np.ones(self.response_ids.size, np.bool_), self.reason)


def make_texts(
    called: tuple[str, str], texts: Iterable[tuple[int, Any]], rendering: Rendering, fields: Fields, *, most: int | None, too_long: TooLong
) -> list[Rollout]:
    """Return one rollout for each text, all tokens of the response counting; several responses to a prompt are its samples.

    Args:
        called: how messages name all texts, and one, before its number.
        texts: pairs, lists of messages, or records, with their numbers.
        rendering: the tokenizer, and what its template is given.
        fields: where a record has its texts.
        most: tokens that one may have, prompt and response; None for any number.
        too_long: what becomes of a longer one.

    Raises:
        PromptError: a content is not a prompt with its response, or two prompts share an id.
        ContextOverflowError: texts are too long, and shall be neither dropped nor cut.
    """
    owner, item = called
    unread, names, made = dict[str, None](), Names(), list[_Text]()
    for i, content in texts:
        where = f"{item} {i}"
        record = _record(content, where, fields)
        prompt, response, used = _split(record, where, fields)
        unread.update({key: None for key, value in record.items() if value is not None and key not in {*used, *_KEYS}})
        given = {key: plain(record.get(key), where) for key in _KEYS}
        reason: FinishReason = given["finish_reason"] or "stop"
        if reason not in ("stop", "length"):
            raise PromptError(f"{where}: its finish_reason is {reason!r:.40}, expected 'stop' or 'length'; drop the record.")
        own = {"tools": given["tools"], "variables": given["chat_template_kwargs"]}
        prompt_ids = rendering.tokenise(where, prompt, **own)
        ids = rendering.respond(where, prompt_ids, prompt, response, **own, ended=reason == "stop")
        made.append(_Text(where, given["id"], to_ids(prompt_ids), to_ids(ids), reason))
    if not made:
        raise PromptError(f"{owner}: there are 0, expected at least 1; check where they come from.")
    if unread:
        rendering.doubt(
            owner, f"the keys {', '.join(map(repr, unread))} are not read; drop them, or name the texts with `field` and `response`"
        )
    return [text.named(names) for text in _within(owner, rendering, made, most, too_long)]


def _record(content: Any, where: str, fields: Fields) -> Mapping[str, Any]:
    """Return a pair, or messages, as the record that they stand for."""
    if isinstance(content, Mapping):
        return content
    if isinstance(content, list | tuple) and content and all(isinstance(part, Mapping) for part in content):
        return {"messages": list(content)}
    if isinstance(content, list | tuple) and len(content) == 2:
        return dict(zip((fields.prompt, fields.response), content, strict=True))
    raise PromptError(f"{where}: it is {a_kind(content)}, expected a prompt and its response, messages, or a mapping; write one of these.")


def _split(record: Mapping[str, Any], where: str, fields: Fields) -> tuple[str | Messages, str, set[str]]:
    """Return prompt, response, and the keys that they were found under."""
    prompt, response = (plain(record.get(key), where) for key in (fields.prompt, fields.response))
    used = {fields.prompt, fields.response}
    if response is None:
        messages, used = prompt, {fields.prompt}
        if not isinstance(messages, list):
            messages, used = plain(from_json(record.get("messages"), where, "messages"), where), {"messages"}
        if not isinstance(messages, list) or not messages:
            raise PromptError(
                f"{where}: its keys with a value are {with_value(record)}, expected {fields.prompt!r} and {fields.response!r}, or 'messages'; name "
                "them with `field` and `response`."
            )
        check_roles(messages, where)
        prompt, response = messages[:-1], messages[-1]
        # what verifiers read as an answer may be meant as the response
        known = used | {*_KEYS} - {"answer"}
        others = any(value is not None and key not in known for key, value in record.items())
        if others and isinstance(response, Mapping) and response.get("role") == "user":
            raise PromptError(
                f"{where}: its last message has the role 'user', expected 'assistant', and its keys with a value are {with_value(record)}; name "
                "the response's key with `response`."
            )
    text = _text(response, where)
    return in_template(fields.template, checked(prompt, fields.prompt, where), where), text, used


def _text(response: Any, where: str) -> str:
    """Return the text of a response: as it is, or that of one message of the assistant."""
    message = response[0] if isinstance(response, list) and len(response) == 1 else response
    if isinstance(message, Mapping):
        check_roles([message], f"{where}, its response")
        if message.get("role") != "assistant":
            raise PromptError(
                f"{where}: its last message has the role {message.get('role')!r}, expected 'assistant'; drop what follows its answer."
            )
        others = [key for key, value in message.items() if value and key not in ("role", "content")]
        if others:
            raise PromptError(
                f"{where}: its answer has {others[0]!r}, expected text alone; write into its content all that the model wrote."
            )
        check_message(message, f"{where}, its answer")
        message = text_of(message)
    if not isinstance(message, str) or not message:
        raise PromptError(f"{where}: its response is {message!r:.80}, expected text, or one message of the assistant; drop the record.")
    return message


def _within(owner: str, rendering: Rendering, made: Sequence[_Text], most: int | None, too_long: TooLong) -> Sequence[_Text]:
    """Return the texts, those that are too long left out or cut."""
    long = 0 if most is None else sum(len(text) > most for text in made)
    if most is None or not long:
        return made
    worst = max(made, key=len)
    found = f"{long} of {len(made)} texts have more than {most} tokens, the longest {len(worst)} ({worst.where})"
    kept = [_cut(text, most) if too_long == "cut" else text for text in made if too_long == "cut" or len(text) <= most]
    hopeless = [text for text in kept if len(text) > most]
    if hopeless:
        raise ContextOverflowError(
            f'{owner}: {found}, and the prompts of {len(hopeless)} leave no room for a response; pass `too_long="drop"`.'
        )
    if too_long == "refuse":
        raise ContextOverflowError(f'{owner}: {found}; pass `too_long="drop"` or `"cut"`, or a larger `max_tokens`.')
    if not kept:
        raise ContextOverflowError(f"{owner}: {found}, so none is left; pass a larger `max_tokens`.")
    rendering.doubt(owner, f"{found}, and were {'cut' if too_long == 'cut' else 'left out'}")
    return kept


def _cut(text: _Text, most: int) -> _Text:
    """Return the text with at most so many tokens, and without the end of a longer one; whole if its prompt leaves no room."""
    room = most - text.prompt_ids.size
    return text if room < 1 or len(text) <= most else evolve(text, response_ids=text.response_ids[:room], reason="length")
