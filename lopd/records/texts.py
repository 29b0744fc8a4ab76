"""Prompts with written responses -> rollouts, for SFT: the same records and rules as for prompts, and a response beside each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from attrs import frozen

from lopd.errors import ContextOverflowError, PromptError
from lopd.records.chat_template import Messages, text_of
from lopd.records.checks import a_kind
from lopd.records.contents import KEYS, Names, checked, in_template
from lopd.records.plain import plain
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


@frozen
class Limit:
    """The longest text allowed, prompt and response in tokens, and what becomes of a longer one."""

    tokens: int | None
    too_long: TooLong


def make_texts(called: tuple[str, str], contents: Iterable[Any], rendering: Rendering, fields: Fields, limit: Limit) -> list[Rollout]:
    """Return one rollout for each text, all tokens of the response counting; several responses to a prompt are its samples.

    Args:
        called: how messages name all texts, and one, before its number.
        contents: pairs, lists of messages, or records.
        rendering: the tokenizer, and what its template is given.
        fields: where a record has its texts.
        limit: most tokens that one may have.

    Raises:
        PromptError: a content is not a prompt with its response, or two prompts share an id.
        ContextOverflowError: texts are too long, and shall be neither dropped nor cut.
    """
    owner, item = called
    unread, names, made = dict[str, None](), Names(), list[Rollout]()
    for i, content in enumerate(contents):
        where = f"{item} {i}"
        record = _record(content, where, fields)
        prompt, response, used = _split(record, where, fields)
        unread.update({key: None for key, value in record.items() if value is not None and key not in {*used, *_KEYS}})
        given = {key: plain(record.get(key), where) for key in _KEYS}
        prompt_ids, ids, reason = _tokenise(rendering, where, prompt, response, given)
        made.append(Rollout(names.next(where, given["id"], prompt_ids), prompt_ids, ids, np.ones(len(ids), np.bool_), reason))
    if not made:
        raise PromptError(f"{owner}: there are 0, expected at least 1; check where they come from.")
    if unread:
        rendering.doubts.add(
            owner, f"the keys {', '.join(map(repr, unread))} are not read; drop them, or name the texts with `field` and `response`"
        )
    rendering.doubt_template()
    return _within(owner, rendering, made, limit)


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
    prompt, response, messages = (plain(record.get(key), where) for key in (fields.prompt, fields.response, "messages"))
    used = {fields.prompt, fields.response}
    if response is None:
        messages, used = (prompt, {fields.prompt}) if isinstance(prompt, list) else (messages, {"messages"})
        if not isinstance(messages, list) or not messages:
            raise PromptError(
                f"{where}: it has the keys {', '.join(map(repr, record))}, expected {fields.prompt!r} and {fields.response!r}, or 'messages'; name "
                "them with `field` and `response`."
            )
        prompt, response = messages[:-1], messages[-1]
    text = _text(response, where)
    return in_template(fields.template, checked(prompt, fields.prompt, where), where), text, used


def _text(response: Any, where: str) -> str:
    """Return the text of a response: as it is, or that of one message of the assistant."""
    message = response[0] if isinstance(response, list) and len(response) == 1 else response
    if isinstance(message, Mapping):
        if message.get("role") != "assistant":
            raise PromptError(
                f"{where}: its last message has the role {message.get('role')!r}, expected 'assistant'; drop what follows its answer."
            )
        others = [key for key, value in message.items() if value and key not in ("role", "content")]
        if others:
            raise PromptError(
                f"{where}: its answer has {others[0]!r}, expected text alone; write into its content all that the model wrote."
            )
        message = text_of(message)
    if not isinstance(message, str) or not message:
        raise PromptError(f"{where}: its response is {message!r:.80}, expected text, or one message of the assistant; drop the record.")
    return message


def _tokenise(
    rendering: Rendering, where: str, prompt: str | Messages, response: str, given: Mapping[str, Any]
) -> tuple[list[int], list[int], FinishReason]:
    reason: FinishReason = given["finish_reason"] or "stop"
    tools, variables = given["tools"], given["chat_template_kwargs"]
    if reason not in ("stop", "length"):
        raise PromptError(f"{where}: its finish_reason is {reason!r:.40}, expected 'stop' or 'length'; drop the record.")
    prompt_ids = rendering.tokenise(where, prompt, tools, variables)
    ids = rendering.respond(where, prompt_ids, prompt, response, tools=tools, variables=variables, ended=reason == "stop")
    return prompt_ids, ids, reason


def _within(owner: str, rendering: Rendering, made: Sequence[Rollout], limit: Limit) -> list[Rollout]:
    """Return the texts, those that are too long left out or cut."""
    most = limit.tokens
    long = {rollout.rollout_id for rollout in made if most is not None and len(rollout) > most}
    if most is None or not long:
        return list(made)
    worst = max(made, key=len)
    found = f"{len(long)} of {len(made)} texts have more than {most} tokens, the longest {len(worst)} ({worst.rollout_id!r})"
    kept = [
        _cut(rollout, most) if rollout.rollout_id in long else rollout
        for rollout in made
        if limit.too_long == "cut" or rollout.rollout_id not in long
    ]
    hopeless = [rollout for rollout in kept if len(rollout) > most]
    if hopeless:
        raise ContextOverflowError(
            f'{owner}: {found}, and the prompts of {len(hopeless)} leave no room for a response; pass `too_long="drop"`.'
        )
    if limit.too_long == "refuse":
        raise ContextOverflowError(f'{owner}: {found}; pass `too_long="drop"` or `"cut"`, or a larger `max_tokens`.')
    if not kept:
        raise ContextOverflowError(f"{owner}: {found}, so none is left; pass a larger `max_tokens`.")
    rendering.doubts.add(owner, f"{found}, and were {'cut' if limit.too_long == 'cut' else 'left out'}")
    return kept


def _cut(rollout: Rollout, most: int) -> Rollout:
    """Return the text with so many tokens, and without its end; whole if its prompt leaves no room."""
    room = most - rollout.prompt_ids.size
    if room < 1:
        return rollout
    return Rollout(rollout.rollout_id, rollout.prompt_ids, rollout.response_ids[:room], rollout.loss_mask[:room], "length")
