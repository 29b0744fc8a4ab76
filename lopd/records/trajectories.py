"""Conversations of a policy with tools and users -> rollouts: one for each, or one for each of its turns."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import numpy as np
from attrs import frozen

from lopd.errors import InvalidRecordError, PromptError
from lopd.records.arrays import Int32Array, to_ids
from lopd.records.chat_template import folded
from lopd.records.checks import a_kind, to_whole
from lopd.records.contents import Names, check_message, check_roles, checked
from lopd.records.manifest import SamplingParams
from lopd.records.plain import from_json, plain, present
from lopd.records.recorded import FORMS, STEPS, reason_of, turns_in
from lopd.records.rendering import Rendering
from lopd.records.rollouts import Rollout
from lopd.records.turns import Turn, join

#: Which turns become rollouts: all of a conversation in one, each alone, or these alone.
Turns = Literal["together", "each"] | Sequence[int]
#: Which distribution recorded log-probs are of: the policy's at temperature 1, or the one that drew.
Recorded = Literal["behavior", "sampler"]
#: Keys of messages for what was thought before the answer.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@frozen
class Choice:
    """What becomes of the turns of a record, and of their log-probs.

    Args:
        turns: which become rollouts.
        sampling: how the policy drew.
        logprobs: what recorded log-probs are of; None where temperature and top-p are 1 and it makes no difference, or it was not stated.

    Raises:
        InvalidRecordError: they are something else.
    """

    turns: Turns
    sampling: SamplingParams
    logprobs: Recorded | None

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.turns, str):
            numbers = self.turns if isinstance(self.turns, Sequence) else [None]
            object.__setattr__(self, "turns", [to_whole("Trajectories", "turns", number) for number in numbers])
        elif self.turns not in ("together", "each"):
            raise InvalidRecordError(
                f"Trajectories: turns is {self.turns!r:.40}, expected 'together', 'each' or numbers; pass one of these."
            )
        if self.logprobs not in (None, "behavior", "sampler"):
            raise InvalidRecordError(
                f"Trajectories: logprobs is {self.logprobs!r:.40}, expected 'behavior' or 'sampler'; state what the engine reported."
            )

    def of(self, turns: list[Turn]) -> list[list[Turn]]:
        """Return the turns of each rollout; turns that a short conversation does not have are left out."""
        if self.turns == "together":
            return [turns]
        count = len(turns)
        wanted = range(count) if isinstance(self.turns, str) else sorted({n % count for n in self.turns if -count <= n < count})
        return [[turns[n]] for n in wanted]

    def field(self, where: str) -> str:
        """Return the field of a rollout that recorded log-probs belong to.

        Raises:
            PromptError: it depends on what was not stated.
        """
        if self.sampling.neutral or self.logprobs == "behavior":
            return "behavior_logprobs"
        if self.logprobs is None:
            raise PromptError(
                f"{where}: it has log-probs, drawn at temperature {self.sampling.temperature:g} and top-p {self.sampling.top_p:g}; say "
                'what of: `logprobs="sampler"` if they are of that distribution (vLLM: processed), or "behavior" if at temperature 1 (raw).'
            )
        return "sampler_logprobs"


def make_trajectories(called: tuple[str, str], records: Iterable[tuple[int, Any]], rendering: Rendering, choice: Choice) -> list[Rollout]:
    """Return the rollouts of all records, in their order: what the policy drew counts, and what others wrote does not.

    Args:
        called: how messages name all records, and one, before its number.
        records: mappings, or lists of messages or of triplets, with their numbers.
        rendering: the tokenizer, and what its template is given.
        choice: which turns become rollouts.

    Raises:
        PromptError: a record is of no known form, its parts do not fit, or its turns are not those of one rollout.
        InvalidRecordError: its values are not token ids, a mask or log-probs.
    """
    owner, item = called
    made, names, without = list[Rollout](), Names(), 0
    for i, content in records:
        where = f"{item} {i}"
        record = _record(content, where)
        calls = turns_in(record, where)
        if calls is None:
            turns = _render(record, where, rendering)
        else:
            turns = [turn for turn in calls if turn.drawn]
            _check_recorded(record, where, turns, calls, rendering.tokenizer)
        groups = choice.of(turns)
        without += not groups
        given = plain(record.get("id"), where)
        for group in groups:
            made.append(_rollout(where, names.next(where, given, turns[0].prompt_ids), group, rendering, choice))
    if not made:
        raise PromptError(f"{owner}: there are 0 rollouts in them, expected at least 1; check where they come from, and `turns`.")
    if without:
        rendering.doubt(owner, f"{without} have none of the turns {choice.turns}, and were left out")
    return made


def _record(content: Any, where: str) -> Mapping[str, Any]:
    """Return messages, or triplets, as the record that they stand for."""
    if isinstance(content, Mapping):
        # pandas gives lists as arrays of objects, and tables may have steps as JSON text
        lists = {key: value.tolist() for key, value in content.items() if isinstance(value, np.ndarray) and value.dtype == object}
        steps = {key: from_json(content[key], where, key) for key in STEPS if isinstance(content.get(key), str)}
        return present({**content, **lists, **steps})
    if isinstance(content, list | tuple) and content and all(isinstance(part, Mapping) for part in content):
        return {"messages" if "role" in content[0] else "triplets": list(content)}
    raise PromptError(f"{where}: it is {a_kind(content)}, expected a mapping, messages or triplets; write one of these.")


def _render(record: Mapping[str, Any], where: str, rendering: Rendering) -> list[Turn]:
    """Return the turns of messages: each answer of the assistant, after the prompt that the chat template makes of all before it."""
    messages = plain(from_json(record.get("messages"), where, "messages"), where)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise PromptError(f"{where}: it has the keys {', '.join(map(repr, record))}, which fit no form; rename them to those of {FORMS}.")
    check_roles(messages, where)
    tools, variables = (plain(record.get(key), where) for key in ("tools", "chat_template_kwargs"))
    answers = [i for i, message in enumerate(messages) if i and message.get("role") == "assistant"]
    reason, turns = reason_of(record, where), list[Turn]()
    for t, i in enumerate(answers):
        at, last = f"{where}, turn {t}", i == answers[-1]
        asked = messages[:i]
        checked(asked, "messages", at)
        check_message(messages[i], at)
        prompt_ids = rendering.tokenise(at, asked, tools, variables)
        ended = not last or reason != "length"
        ids = rendering.answer(at, prompt_ids, asked, messages[i], tools=tools, variables=variables, ended=ended)
        turns.append(Turn(to_ids(prompt_ids), to_ids(ids), None, "stop" if ended else "length"))
    if not turns:
        raise PromptError(f"{where}: it has 0 answers of the assistant, expected at least 1; drop the record.")
    return turns


def _check_recorded(record: Mapping[str, Any], where: str, turns: Sequence[Turn], calls: Sequence[Turn], tokenizer: Any) -> None:
    """Refuse padding in front, and ids that do not read as the text that stands beside them."""
    first, pad = turns[0].prompt_ids, getattr(tokenizer, "pad_token_id", None)
    if first[:2].tolist() == [pad, pad]:
        raise PromptError(f"{where}: its prompt begins with padding tokens; leave them out, or give its `attention_mask`.")
    text, followed, completion = record.get("output"), _whole(turns[-1])[first.size :], record.get("completion")
    if isinstance(text, str) and not _begins(tokenizer, followed, folded(text)):
        raise _other_text(where, tokenizer, followed, text)
    drawn = np.concatenate([call.response_ids for call in calls])
    if isinstance(completion, str):
        # a plain text goes on where the ids were cut, or it lacks what a framework leaves out, as thoughts are; an answer may look like messages
        there, listed = partial(_in_order, [folded(completion)]), _listed(completion)
        if _begins(tokenizer, followed, folded(completion)) or any(_reads(tokenizer, ids, there) for ids in (drawn, followed)):
            completion = []
        else:
            completion = [{"content": completion}] if isinstance(listed, str) else listed
    raw = [message for step in record.get("triplets") or () for message in _messages(step["response"].get("raw_content"))]
    # messages may begin with answers that were only read, and have whole answers where later turns read them rewritten
    read = (_whole(calls[-1]), np.concatenate([first, drawn]))
    for either, messages in ((read, record.get("messages")), ((drawn,), completion), ((drawn,), raw)):
        answers = [message for message in _messages(messages) if message.get("role", "assistant") == "assistant"]
        texts = [folded(_text(message)) for message in answers]
        there = partial(_in_order, texts[: len(texts) - _cut(tokenizer, calls, answers)])
        if not any(_reads(tokenizer, ids, there) for ids in either):
            raise _other_text(where, tokenizer, either[0], " ... ".join(texts))


def _whole(turn: Turn) -> Int32Array:
    return np.concatenate([turn.prompt_ids, turn.response_ids])


def _cut(tokenizer: Any, calls: Sequence[Turn], answers: Sequence[Mapping[str, Any]]) -> int:
    """Return how many of the last answers may be whole beside ids that were cut, as in verifiers: the ids read as their beginnings."""
    count = 0
    # what follows an answer undrawn, as padding does, ended for no reason and is no answer
    ended = [call for call in calls if call.drawn or call.finish_reason]
    for call, answer in zip(reversed(ended), reversed(answers), strict=False):
        # how a template writes what was thought is not known, and it may be all that is left
        thought = any(answer.get(key) for key in _THOUGHTS)
        if call.finish_reason != "length" or not (thought or _begins(tokenizer, call.response_ids, folded(_text(answer)))):
            break
        count += 1
    return count


def _listed(value: Any) -> Any:
    """Return arrays, and JSON text of messages, as the lists that they stand for; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # a text may begin so too
            found = json.loads(value)
            # one without a role is of the assistant
            return found if found and all(isinstance(message, Mapping) and {"role", "content"} & {*message} for message in found) else value
    return value.tolist() if isinstance(value, np.ndarray) else value


def _messages(value: Any) -> list[Mapping[str, Any]]:
    """Return the messages in a list of them, whatever holds it; none in anything else."""
    value = _listed(value)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [message for message in value if isinstance(message, Mapping)] if several else []


def _text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, which may be empty beside a call."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in _messages(content))


def _in_order(texts: Sequence[str], read: str) -> bool:
    """Return whether all texts are in what was read, one after the other."""
    at = 0
    for text in texts:
        found = read.find(text, at)
        if found < 0:
            return False
        at = found + len(text)
    return True


def _reads(tokenizer: Any, ids: Int32Array, fits: Callable[[str], bool]) -> bool:
    """Return whether ids fit as text, with their special tokens or without."""
    return any(fits(folded(tokenizer.decode(ids.tolist(), skip_special_tokens=skip))) for skip in (False, True))


def _begins(tokenizer: Any, ids: Int32Array, text: str) -> bool:
    """Return whether ids read as the beginning of a text; they may end within a character."""
    return _reads(tokenizer, ids, lambda read: text.startswith(read.rstrip("\ufffd")))


def _other_text(where: str, tokenizer: Any, ids: Int32Array, text: str) -> PromptError:
    return PromptError(
        f"{where}: its tokens read {tokenizer.decode(ids.tolist())!r:.80}, expected {text!r:.80}, the text that stands beside them; pass the "
        "policy's own tokenizer, look for rows that were mixed up, or state the finish_reason 'length' of one that was cut."
    )


def _rollout(where: str, name: str, turns: Sequence[Turn], rendering: Rendering, choice: Choice) -> Rollout:
    whole, drawn = join(where, turns, rendering.tokenizer.decode)
    ended = int(whole.response_ids[-1]) in {*rendering.ends, *choice.sampling.stop_ids}
    reported: dict[str, Any] = {} if whole.logprobs is None else {choice.field(where): whole.logprobs}
    try:
        return Rollout(
            name, whole.prompt_ids, whole.response_ids, drawn, whole.finish_reason or ("stop" if ended else "length"), **reported
        )
    except InvalidRecordError as error:
        raise InvalidRecordError(f"{where}: {error}") from error
