"""Messages -> token ids.  The chat template is applied here, once; from here on there are only ids."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import Any

from lopd.errors import ArgumentError, PromptError
from lopd.records.checks import a_kind
from lopd.records.optional import need

Messages = Sequence[Mapping[str, Any]]
#: A word for which the template shows how it treats text; nothing in it is changed by trimming.
PROBE = "lopd"
# a shorter end of a template is found in text by chance
_SHORTEST_MARK = 4
# what templates write without naming them
_ROLES = {"system", "developer", "user", "assistant", "tool"}
# names the call that a tool answers; many templates go by the order
_LINKS = {"tool_call_id"}


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message, its parts joined.

    >>> text_of({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    'ab'
    """
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def special_of(owner: str, tokenizer: Any) -> dict[int, str]:
    """Return the special tokens of a tokenizer, token id -> text.

    Raises:
        ArgumentError: it cannot tokenise, as the name of a model cannot.
    """
    if isinstance(tokenizer, type) or not (callable(tokenizer) or hasattr(tokenizer, "apply_chat_template")):
        raise ArgumentError(f"{owner}: the tokenizer is {a_kind(tokenizer)}, which cannot tokenise; `load_model` gives one.")
    named = zip(getattr(tokenizer, "all_special_ids", ()), getattr(tokenizer, "all_special_tokens", ()), strict=False)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    # mistral-common has a method of this name, which raises
    return {**dict(named), **({id_: str(token) for id_, token in added.items() if token.special} if isinstance(added, dict) else {})}


def formats_chats(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template, in Jinja or, like that of mistral-common, in code."""
    if getattr(tokenizer, "chat_template", None):
        return True
    try:
        return bool(tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], add_generation_prompt=True))
    except Exception:  # transformers raises where there is no template
        return False


def asks_for_the_day(tokenizer: Any) -> bool:
    """Return whether the chat template of a tokenizer may write what day it is."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


class ChatTemplate:
    """The chat template of a tokenizer, and what it reads; of a template in code only what it gives is known.

    Args:
        owner: how messages name all prompts.
        tokenizer: one that `formats_chats`.
        special: its special tokens, by id.
        day: what the template reads as today; None for today.

    Raises:
        PromptError: the template is not valid Jinja.
    """

    def __init__(self, owner: str, tokenizer: Any, special: Mapping[int, str], day: date | None) -> None:
        self._tokenizer, self._source = tokenizer, getattr(tokenizer, "chat_template", None)
        self._words = _words(owner, self._source) if self._source else set[str]()
        #: Arguments of transformers that are not variables of a template.
        self.reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"documents", "reasoning_effort"}
        # one day for all, also when it ends meanwhile
        self._day = day or datetime.now()
        self.clock_was_read = False
        text, parts = (self._written(content) for content in (PROBE, [{"type": "text", "text": PROBE}])) if self._source else ("", "")
        self._wants_parts = PROBE not in text and PROBE in parts
        self._reads_parts = self._wants_parts or text == parts != ""
        #: Ids of the special tokens with which the template ends an answer.
        self.answer_end = self._end(special) if self._source else list[int]()
        #: Whether the arguments of a call may be values, as in most templates; DeepSeek's join them to text.
        self.reads_values = not self._source or self._writes_call({}) or not self._writes_call("{}")
        mark = text.partition(PROBE)[2].strip()
        marks = [*special.values(), mark] if len(mark) >= _SHORTEST_MARK else list(special.values())
        self._marks = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")
        self.clock_was_read = False
        self._tried = set[frozenset[str]]()

    def ids(self, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any], *, answered: bool = False) -> list[int]:
        """Return the token ids of checked messages, the generation prompt included unless they end with an answer."""
        given = {"tokenize": True, "return_dict": True, "add_generation_prompt": not answered}
        return list(self._apply(messages, tools, variables, **given)["input_ids"])

    def written(self, answer: str, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> str | None:
        """Return what the template writes behind the prompt for this answer; None if it writes the prompt itself otherwise.

        Where it cannot be asked, that is the answer: it is code, or refuses this one, as gpt-oss refuses channels that are written out.
        """
        if not self._source:
            return answer
        try:
            prompt = str(self._apply(messages, tools, variables, tokenize=False))
            answered = [*messages, {"role": "assistant", "content": answer}]
            whole = str(self._apply(answered, tools, variables, tokenize=False, add_generation_prompt=False))
        except Exception:  # a template may raise anything
            return answer
        return whole[len(prompt) :] if whole.startswith(prompt) else None

    def unread(self, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> Iterator[str]:
        """Yield what the template does not mention: `tools`, variables, keys of messages that have a value, and unusual roles."""
        if not self._source:
            return
        if tools and "tools" not in self._words:
            yield "`tools`"
        yield from (f"{name!r} of `chat_template_kwargs`" for name in variables if name not in self._words)
        known = self._words | _LINKS
        yield from (f"{key!r} of messages" for message in messages for key, value in message.items() if value and key not in known)
        yield from (f"the role {role!r}" for role in (message.get("role") for message in messages) if role not in self._words | _ROLES)

    def left_out(self, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> str | None:
        """Return a role whose text the template does not write; tried once for each set of roles."""
        roles = frozenset(message["role"] for message in messages if text_of(message))
        if roles in self._tried or not self._source:
            return None
        self._tried.add(roles)
        whole = str(self._apply(messages, tools, variables, tokenize=False))
        page = folded(whole)

        def written(role: str) -> bool:
            texts = [text_of(message) for message in messages if message["role"] == role]
            if role not in {"assistant", "tool"}:
                # spaces and case may be the template's
                return all(folded(text) in page for text in texts)
            # what an assistant thought, or a tool gave, is often rewritten, so that it counts whether another text changes anything
            longer = [
                {**message, "content": text + PROBE} if message["role"] == role and (text := text_of(message)) else message
                for message in messages
            ]
            return self._attempt(longer, tools, variables) != whole

        return next((role for role in ("system", "developer", "user", "assistant", "tool") if role in roles and not written(role)), None)

    def mark_in(self, messages: Messages) -> str | None:
        """Return a special token, or the end of the template, that the text of the messages contains: it was written by this or another template."""
        found = (self._marks.search(text_of(message)) for message in messages)
        return next((match[0] for match in found if match), None)

    def _apply(self, messages: Messages, tools: Sequence[Any] | None, variables: Mapping[str, Any], **how: Any) -> Any:
        given = dict(variables)
        if tools:
            given["tools"] = tools
        if "strftime_now" in self._words:
            given.setdefault("strftime_now", self._strftime)
        messages = [{**message, "content": self._content(message)} if "content" in message else dict(message) for message in messages]
        return self._tokenizer.apply_chat_template(messages, **{"add_generation_prompt": True, **given, **how})

    def _content(self, message: Mapping[str, Any]) -> Any:
        content = message["content"]
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._wants_parts else content
        return content if self._reads_parts else text_of(message)

    def _written(self, content: Any) -> str:
        self._wants_parts, self._reads_parts = False, True
        return self._attempt([{"role": "user", "content": content}]) or ""

    def _end(self, special: Mapping[int, str]) -> list[int]:
        """Return the tokens up to EOS if nothing is between them, or else the first: behind it may be what asks for the next answer."""
        (last, asked), eos = (self._behind_answer(asks) for asks in (False, True)), str(getattr(self._tokenizer, "eos_token", None) or "")
        if asked and not asked.startswith(last):
            # Phi's write EOS behind a whole conversation alone, and end an answer with another token
            last = last.removesuffix(eos).rstrip() or last
        found = list[int]()
        while fitting := [(len(text), id_) for id_, text in special.items() if text and last.startswith(text)]:
            size, token = max(fitting)
            found, last = [*found, token], last[size:]
            if special[token] == eos:
                return found
        return found[:1]

    def _behind_answer(self, asks: bool) -> str:
        """Return what is written behind an answer where another one is asked for, or where none is; nothing if the template refuses."""
        messages = [{"role": role, "content": PROBE} for role in ("user", "assistant")]
        text = self._attempt(messages, add_generation_prompt=asks) or ""
        return text.rpartition(PROBE)[2].strip()

    def _writes_call(self, arguments: Any) -> bool:
        named = {"name": PROBE, "arguments": arguments}
        call = {"id": PROBE, "type": "function", "function": named, **named}
        messages: Messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return self._attempt(messages) is not None

    def _attempt(self, messages: Messages, tools: Any = None, variables: Mapping[str, Any] | None = None, **how: Any) -> str | None:
        """Return what the template writes of messages of lopd's own; None if it refuses them: what it raises for a prompt is reported there."""
        try:
            return str(self._apply(messages, tools, variables or {}, tokenize=False, **how))
        except Exception:  # a template may raise anything
            return None

    def _strftime(self, form: str) -> str:
        self.clock_was_read = True
        return self._day.strftime(form)


def folded(text: str) -> str:
    """Return text without spaces and case, which a template may change."""
    return "".join(text.split()).casefold()


def _words(owner: str, source: Any) -> set[str]:
    """Return names and texts in the code of a template, or of several by name."""
    jinja2 = need("jinja2", "Chat templates")
    templates = source.values() if isinstance(source, Mapping) else [source]
    try:
        tokens = [token for template in templates for token in jinja2.Environment().lex(template)]
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"{owner}: the chat template is not valid Jinja ({error}); mend it.") from error
    return {"role", "content", *(text.strip("'\"") for _, kind, text in tokens if kind in {"name", "string"})}
