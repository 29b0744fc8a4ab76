"""Text or messages -> token ids, with or without a chat template, and what looks wrong about them."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cached_property
from numbers import Integral
from typing import Any

from lopd.errors import PromptError, PromptWarning
from lopd.records.chat_template import PROBE, ChatTemplate, Messages, asks_for_the_day, folded, formats_chats, special_of, text_of
from lopd.records.checks import a_kind
from lopd.records.contents import as_served
from lopd.records.plain import from_json, plain
from lopd.records.warn import warn_user

#: Messages that a table keeps as text, as JSON or as pandas writes them.
MESSAGES = re.compile(r"""\s*\[\s*\{.*["']role["']\s*:""", re.DOTALL)


class Rendering:
    """A tokenizer, and what its chat template is given with every prompt; what may be wrong with prompts is noted on the way.

    Args:
        owner: how messages name all prompts, for example "Prompt file p.jsonl".
        tokenizer: the student's tokenizer.
        verbatim: the texts carry the chat template already, so nothing is added to them.
        tools: for prompts that have no tools of their own.
        variables: variables of the template; those of a prompt override them.
        day: what the template reads as today; None for today.

    Raises:
        ArgumentError: the tokenizer is something else, such as a name.
        PromptError: they are not what they must be, or there is no chat template to read them.
    """

    def __init__(self, owner: str, tokenizer: Any, *, verbatim: bool, tools: Any, variables: Any, day: date | None) -> None:
        self._doubts, self._unread, self._compared = dict[str, tuple[str, int]](), dict[str, None](), set[Any]()
        self._special = special_of(owner, tokenizer)
        self._owner, self.tokenizer, self._verbatim, self._day = owner, tokenizer, verbatim, day
        has_template = not verbatim and formats_chats(tokenizer)
        self._template = ChatTemplate(owner, tokenizer, self._special, day) if has_template else None
        if day is not None:
            self._need_template(owner, "`date`")
            if not isinstance(day, date):
                raise PromptError(f"{owner}: `date` is {day!r:.40}, expected a datetime.date; pass one.")
        self._tools, self._variables = self._tools_in(owner, tools), self._variables_in(owner, variables)
        self._written_end = self._template.answer_end if self._template else []
        #: Ids that end an answer.
        self.ends = {getattr(tokenizer, "eos_token_id", None), *self._written_end[-1:]}
        if not has_template and not verbatim:
            self.ends |= {*self._encode(owner, PROBE)[-1:]} - {*self._encode(owner, PROBE, bare=True)[-1:]}

    def tokenise(self, where: str, content: str | Messages, tools: Any, variables: Any) -> list[int]:
        """Return the token ids of one prompt, the generation prompt included.

        Args:
            where: how messages name the prompt.
            content: text (one user message), or messages that were checked.
            tools: tools of this prompt; None for those of all.
            variables: variables of the template, for this prompt.

        Raises:
            PromptError: the template or the tokenizer refuses it, or there is no template to read it.
        """
        given = self._given(where, content, tools, variables)
        ids = self._converse(self._template, where, *given) if self._template else self._encode(where, content, bare=self._verbatim)
        if not ids:
            raise PromptError(f"{where}: it has 0 tokens, expected at least 1; drop it or add a BOS token.")
        if isinstance(content, str) and MESSAGES.match(content):
            self.doubt(where, "it is a list of messages that was written as text, and is read as text; decode it for the chat template")
        if isinstance(content, str) and not (self._template or self._verbatim) and any(map(content.__contains__, self._special.values())):
            # what stands at the ends of a text is judged with what is added there
            between = self._encode(where, content.strip(), bare=True)[1:-1]
            if inside := self._inside(between, content):
                remedy = "leave it if it is meant, pass `verbatim=True` if a template wrote the text, BOS included, or drop it"
                self.doubt(where, f"its text contains {inside!r}, as if from a chat template; {remedy}")
        self._doubt_ends(where, ids)
        return ids

    def respond(self, where: str, prompt_ids: Sequence[int], content: str | Messages, response: str, **given: Any) -> list[int]:
        """Return the token ids of a response, as a policy would draw them after the prompt.

        The text is tokenised by itself, for sampling begins where the prompt ends, and gets the tokens with which the chat template ends an answer,
        or else EOS.

        Args:
            where: how messages name the record.
            prompt_ids: what `tokenise` gave for the prompt.
            content: the prompt.
            response: text; it may have the end token already.
            given: `tools` and `variables` of this prompt, and whether the response `ended`, or was cut.

        Raises:
            PromptError: it has 0 tokens, it ends although it was cut, or there is no token to end it with.
        """
        whole = self._encode(where, response.rstrip(), bare=True)
        ended = bool(whole) and whole[-1] in (self._special if self._verbatim else self.ends)
        ids = whole[:-1] if ended else self._encode(where, response, bare=True)
        if ended and (before_end := self._written_end[:-1]) == ids[-len(before_end) :]:
            ids = ids[: -len(before_end)]
        if not ids:
            raise PromptError(f"{where}: its response {response!r:.40} has 0 tokens, expected at least 1; drop the record.")
        if ended and not given["ended"]:
            raise PromptError(
                f"{where}: its response ends with {self._special.get(whole[-1], str(whole[-1]))!r}, and its finish_reason is 'length', expected "
                "'stop'; correct the record."
            )
        if inside := self._inside(ids, response):
            remedy = "leave it if the model itself writes it (channels, thoughts), or else drop it from the text"
            self.doubt(where, f"its response contains {inside!r}, as if a chat template had written it; {remedy}")
        if MESSAGES.match(response) and "assistant" in response:
            self.doubt(where, "its response is a list of messages that was written as text, and is read as text; decode it")
        if (mark := re.match(r"\s*(<[^<>\s]+>)", response)) and self.tokenizer.decode([*prompt_ids[-32:]]).rstrip().endswith(mark[1]):
            self.doubt(where, f"its prompt ends with {mark[1]!r}, and its response begins with it again; leave it out of the response")
        # a template may treat each kind otherwise, as with `enable_thinking`; longer values are of one record
        named = self._variables_in(where, given["variables"]).items()
        switches = frozenset((name, v if isinstance(v, str | int) and len(str(v)) < 20 else bool(v)) for name, v in named)
        kind = (response[0].isspace(), response[-1].isspace(), response.lstrip().startswith("<think>"), bool(given["tools"]), switches)
        if kind not in self._compared and len(self._compared) < 64:
            self._compared.add(kind)
            messages = self._given(where, content, given["tools"], given["variables"]) if self._template else None
            self._compare(where, messages, [*prompt_ids], ids, response)
        return [*ids, *self._written_end[:-1], whole[-1] if ended else self._end] if given["ended"] else ids

    def answer(self, where: str, prompt_ids: Sequence[int], asked: Messages, answer: Mapping[str, Any], **given: Any) -> list[int]:
        """Return the token ids of an assistant's message, as a policy would draw them after the prompt: of text by `respond`, of more by the
        template.

        Args:
            where: how messages name the turn.
            prompt_ids: what `tokenise` gave for `asked`.
            asked: the messages before it.
            answer: the message; calls of tools, or what it thought, are written as the chat template writes them.
            given: `tools` and `variables` of these messages, and whether the answer `ended`, or was cut.

        Raises:
            PromptError: what `respond` refuses; or the template leaves a part of the answer out, does not end it, or writes what stands before it
                otherwise.
        """
        if not any(value for key, value in answer.items() if key not in ("role", "content")):
            return self.respond(where, prompt_ids, asked, text_of(answer), **given)
        template = self._need_template(where, "an answer that is more than text")
        shown = self._given(where, [*asked, answer], given["tools"], given["variables"])
        whole, before = self._encoded(where, lambda: template.ids(*shown, answered=True)), len(prompt_ids)
        stop = next((t for t, token in enumerate(whole) if t >= before and token in self.ends), None)
        text = self.tokenizer.decode(whole[before:stop])
        faults = {
            **{f"does not read {part}": True for part in template.unread([answer], None, {})},
            "writes what stands before it otherwise than where it is asked for": whole[:before] != [*prompt_ids],
            "does not end it": stop is None,
            "leaves its text out": folded(text_of(answer)) not in folded(text),
        }
        if wrong := [fault for fault, found in faults.items() if found]:
            raise PromptError(
                f"{where}: of its answer the chat template {wrong[0]}, so the tokens that were drawn are not known; record their ids."
            )
        doubt = "its answer is more than text, and is as the chat template writes it; see that the policy drew it so, or import token ids"
        self.doubt(where, doubt)
        return whole[before : (stop or 0) + given["ended"]]

    @cached_property
    def _end(self) -> int:
        """What ends a response."""
        eos: Any = getattr(self.tokenizer, "eos_token_id", None)
        end = [eos, *self._written_end][-1]
        if end is None:
            raise PromptError(f"{self._owner}: the tokenizer has no EOS token; set `tokenizer.eos_token`.")
        if end != eos:
            self.doubt(
                self._owner,
                f"responses end with {self._special[end]!r}, as the chat template has it, and EOS is {self._special.get(eos)!r}; see that sampling "
                "stops at both (`generation_config.eos_token_id`, or `SamplingParams(stop_ids=...)`)",
            )
        return int(end)

    def _compare(self, where: str, asked: Any, prompt_ids: list[int], ids: list[int], response: str) -> None:
        """Note a doubt if tokens do not read as the chat template has the response, or as its text; one response stands for its kind."""
        read = self.tokenizer.decode([*prompt_ids, *ids])[len(self.tokenizer.decode(prompt_ids)) :]
        written = self._template.written(response, *asked) if self._template else response
        if written is not None and written.startswith(read):
            return
        doubt = (
            "the chat template writes its prompt otherwise where an answer follows than where one is asked for, and responses go on from the "
            "second; see that they begin as the model is to begin"
            if written is None
            else f"its response begins {read!r:.40}, expected {written!r:.40}, as the chat template or its text has it; it is trained as it is, so "
            "correct the texts or the template if that is not meant"
        )
        # others of its kind are not counted
        self._doubts.setdefault(doubt, (where, 1))

    def doubt(self, where: str, doubt: str) -> None:
        """Note what may be wrong with one prompt, or with all."""
        first, count = self._doubts.get(doubt, (where, 0))
        self._doubts[doubt] = (first, count + 1)

    def warn(self) -> None:
        """Give one warning for each kind of doubt, which names the first prompt and counts the others; call it when all were tokenised."""
        self._doubt_template()
        for doubt, (first, count) in self._doubts.items():
            others = f" and {count - 1} more" if count > 1 else ""
            warn_user(f"{first}{others}: {doubt}.", PromptWarning)

    def _doubt_template(self) -> None:
        """Note what concerns the template and not one prompt."""
        if not self._template:
            return
        if self._unread:
            self.doubt(self._owner, f"the chat template does not read {', '.join(self._unread)}; drop them, or use a template that does")
        if self._template.clock_was_read and self._day is None:
            self.doubt(
                self._owner,
                "the chat template writes today's date, so that the same records give other prompts tomorrow; fix it with `date`",
            )
        if self._day is not None and not asks_for_the_day(self.tokenizer):
            self.doubt(self._owner, "the chat template does not ask for today's date, so that `date` changes nothing; leave it out")

    def _given(self, where: str, content: str | Messages, tools: Any, variables: Any) -> tuple[Messages, Any, Mapping[str, Any]]:
        own_tools, own_variables = self._tools_in(where, tools), self._variables_in(where, variables)
        if not isinstance(content, str):
            self._need_template(where, "a list of messages")
        values = self._template is None or self._template.reads_values
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return (
            [as_served(message, where, values=values) for message in messages],
            self._tools if own_tools is None else own_tools,
            {**self._variables, **own_variables},
        )

    def _converse(self, template: ChatTemplate, where: str, messages: Messages, tools: Any, variables: Mapping[str, Any]) -> list[int]:
        self._unread.update(dict.fromkeys(template.unread(messages, tools, variables)))
        if mark := template.mark_in(messages):
            self.doubt(
                where,
                f"its text contains {mark!r}, as if it carried a chat template already, and the template is applied to it; pass `verbatim=True` "
                "if it does, or else drop it",
            )
        ids = self._encoded(where, lambda: template.ids(messages, tools, variables))
        if role := template.left_out(messages, tools, variables):
            self.doubt(where, f"the chat template leaves out the text of the role {role!r}; drop it, or use a template that writes it")
        return ids

    def _encode(self, where: str, text: Any, *, bare: bool = False) -> list[int]:
        return self._encoded(where, lambda: self.tokenizer(text, add_special_tokens=not bare)["input_ids"])

    def _encoded(self, where: str, encode: Callable[[], Sequence[int]]) -> list[int]:
        try:
            ids = list(encode())
        except Exception as error:  # a template may raise anything
            raise PromptError(
                f"{where}: the tokenizer or its chat template raised {type(error).__name__} ({error!s:.200}); mend the record or the template."
            ) from error
        if ids and not isinstance(ids[0], Integral):
            raise PromptError(f"{where}: the tokenizer gave {a_kind(ids[0])}, expected token ids; pass the tokenizer of a processor.")
        return ids

    def _tools_in(self, where: str, value: Any) -> list[Any] | None:
        tools = self._for_template(where, "tools", value)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)):
            raise PromptError(f"{where}: `tools` is {tools!r:.80}, expected a list of mappings; write one JSON schema for each tool.")
        return tools

    def _variables_in(self, where: str, value: Any) -> Mapping[str, Any]:
        variables = self._for_template(where, "chat_template_kwargs", value) or {}
        if not isinstance(variables, Mapping) or (self._template and not self._template.reserved.isdisjoint(variables)):
            raise PromptError(
                f"{where}: `chat_template_kwargs` is {variables!r:.80}, expected a mapping of the template's own variables; leave others out."
            )
        return variables

    def _for_template(self, where: str, key: str, value: Any) -> Any:
        value = plain(from_json(value, where, key), where)
        if value:
            self._need_template(where, f"`{key}`")
        return value

    def _need_template(self, where: str, what: str) -> ChatTemplate:
        if not self._template:
            why, remedy = "the tokenizer has no chat template", "set `tokenizer.chat_template`"
            if self._verbatim:
                why, remedy = "`verbatim` text is tokenised as it is", "leave `verbatim` out"
            raise PromptError(f"{where}: it has {what}, which only a chat template reads, but {why}; pass text alone, or {remedy}.")
        return self._template

    def _inside(self, ids: Sequence[int], text: str) -> str | None:
        """Return the first special token that the text has; that for unknown characters is among the ids alone."""
        return next((self._special[token] for token in ids if token in self._special and self._special[token] in text), None)

    def _doubt_ends(self, where: str, ids: Sequence[int]) -> None:
        remedy = "or pass `verbatim=True` for text to which nothing is added"
        if ids[0] in self._special and ids[1:2] == ids[:1]:
            self.doubt(where, f"it begins with {self._special[ids[0]]!r} twice; drop it from the text, {remedy}")
        # spaces after the last token that can be seen
        last = next((token for token in reversed(ids) if token in self._special or self.tokenizer.decode([token]).strip()), None)
        if last is not None and last in self.ends:
            end = self._special.get(last, str(last))
            self.doubt(
                where, f"it ends with {end!r}, after which a response seldom goes on; give the template a generation prompt, {remedy}"
            )
