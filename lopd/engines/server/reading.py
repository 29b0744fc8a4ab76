"""What all kinds of servers' answers have in common: everything is looked up by token id, and nothing that is missing becomes a number.

Shape suffixes: T response tokens, K candidates a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.engines.server.answers import NotANumberError, Trouble
from lopd.engines.server.dialect import Draw
from lopd.errors import EngineError, InvalidRecordError

# vLLM writes -inf, which JSON has no word for, as this (`clamp_prompt_logprobs`, and the completions' own log-probs)
NO_PROBABILITY = -9999.0
# a whole number beyond it is not a float
_LARGEST = 10**300
# how a choice ends that the server gave up, for example while it shuts down
_BROKEN_OFF = ("abort", "error")
EXTENSIONS = "serve with vLLM, or with a server that has its extensions (return_token_ids, prompt_logprobs, return_tokens_as_token_ids)"


def check_first(owner: str, value: Any) -> None:
    """Check that the first token of a prompt has no log-prob: where it has one, each may be of the token after it."""
    if value not in (None, {}) and value == value:  # noqa: PLR0124  # some write NaN
        raise EngineError(
            f"{owner}: the first of the prompt's log-probs is {str(value)[:40]!r}, expected null, for nothing comes before that token (each may be "
            "of the token after it, as in TensorRT-LLM); use a server that begins with null, as vLLM does."
        )


def logprob(owner: str, place: int, entry: Any, token: int | str) -> float:
    """Return the log-prob of this token among those of its position, keyed by id; -inf where the server reports it."""
    try:
        value = entry[str(token)]["logprob"]
    except (KeyError, TypeError):
        raise InvalidRecordError(
            f"{owner}: the server gives no log-prob of response token {place} (id {token}); score it again or drop it."
        ) from None
    return number(owner, place, value)


def number(owner: str, place: int, value: Any) -> float:
    """Return a log-prob, nats; -inf where the server reports probability 0."""
    if type(value) not in (float, int) or value != value or (type(value) is int and value > _LARGEST):  # noqa: PLR0124
        raise NotANumberError(
            f"{owner}: the log-prob of response token {place} is {str(value)[:40]!r}, expected a number; check the model for NaN."
        )
    return float("-inf") if value <= NO_PROBABILITY else float(value)


def most_likely(
    owner: str, entries: Sequence[Any], tokens: Sequence[int], top_k: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the K most likely of each position; where the server gives K + 1, the token itself is beside them, however likely it is."""
    ids_TK, logprobs_TK = np.empty((len(entries), top_k), np.int64), np.empty((len(entries), top_k), np.float32)
    for t, entry in enumerate(entries if top_k else ()):
        found = sorted((-logprob(owner, t, entry, key), candidate(owner, t, key, vocab_size)) for key in entry)
        if not top_k <= len(found) <= top_k + 1:
            raise InvalidRecordError(
                f"{owner}: response token {t} has {len(found)} candidates, expected {top_k} or {top_k + 1}; check the server's max_logprobs."
            )
        best = found if len(found) == top_k else [each for each in found if each[1] != tokens[t]][:top_k]
        # true for all distributions over so many tokens; half a nat is for the padding of a head
        if best[0][0] > np.log(vocab_size) + 0.5:
            raise InvalidRecordError(
                f"{owner}: the most likely token at response token {t} has log-prob {-best[0][0]:.4g}, expected at least "
                f"{-np.log(vocab_size):.1f} of one of {vocab_size} tokens; start the server with `--logprobs-mode raw_logprobs`, these may be logits."
            )
        ids_TK[t] = [token for _, token in best]
        logprobs_TK[t] = [-minus for minus, _ in best]
    return ids_TK, logprobs_TK


def candidate(owner: str, place: int, key: str, vocab_size: int) -> int:
    """Return the id in a key."""
    token = named_id(key)
    if not 0 <= token < vocab_size:
        raise InvalidRecordError(
            f"{owner}: a candidate for response token {place} is {key[:40]!r}, expected an id below the vocabulary's {vocab_size}; "
            "the model gives probability to ids that this tokenizer lacks (padding, or tokens of a larger one, such as <think>), drop the rollout or "
            "score in process, which cuts them off."
        )
    return token


def named_id(text: str) -> int:
    """Return the id that a text is; -1 for another text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1


def check_response(owner: str, draw: Draw, ids: Sequence[Any], reason: Any) -> None:
    """Check that sampled tokens are ids of this vocabulary, and that their first stop id ends them, or that they are as many as they may be."""
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < draw.vocab_size:
            raise InvalidRecordError(
                f"{owner}: sampled token {place} is {str(token)[:40]}, expected an id below the vocabulary's {draw.vocab_size}; "
                "serve the model of this tokenizer (a head that is padded may sample its padding)."
            )
    if reason is None:
        raise Trouble("the response was broken off (finish_reason None)")
    stops, longest = draw.settings["stop_token_ids"], draw.room
    inside = next((place for place, token in enumerate(ids[:-1]) if token in stops), None)
    if inside is not None:
        raise EngineError(
            f"{owner}: it goes on after stop id {ids[inside]} at token {inside}, expected its end there; {EXTENSIONS}, and its stop_token_ids."
        )
    if not ids or (ids[-1] not in stops and len(ids) != longest):
        expected = "a stop id; add the server's own stop ids to the sampling's stop_ids"
        if reason == "length" and len(ids) < longest:
            expected = (
                "all of them, or a stop id; it caps responses, so set `max_new_tokens` or `context=` to what it gives, or start vLLM with "
                "`--generation-config vllm`"
            )
        raise EngineError(
            f"{owner}: the server ended it ({str(reason)[:40]!r}) after {len(ids)} of {longest} tokens at id {ids[-1:]}, expected {expected}."
        )


def choices_of(owner: str, answer: Any, count: int) -> list[Mapping[str, Any]]:
    """Return the choices of a completion, one for each prompt; none of them was broken off."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not (isinstance(choices, list) and len(choices) == count and all(isinstance(choice, Mapping) for choice in choices)):
        raise EngineError(f"{owner}: the server's answer is not of {count} choices; {EXTENSIONS}.")
    if broken := next((choice for choice in choices if choice.get("finish_reason") in _BROKEN_OFF), None):
        raise Trouble(f"the response was broken off (finish_reason {broken['finish_reason']!r})")
    return choices


def check_read(owner: str, choice: Mapping[str, Any], prompt: list[int]) -> None:
    """Check that the server read these very ids."""
    read = listed(owner, choice, "prompt_token_ids")
    if read != prompt:
        place = next((i for i, (a, b) in enumerate(zip(read, prompt, strict=False)) if a != b), min(len(read), len(prompt)))
        raise EngineError(
            f"{owner}: the server read {len(read)} tokens that differ from those sent from token {place} on, expected the {len(prompt)} sent; "
            "start it without truncation, and with no proxy that changes prompts."
        )


def listed(owner: str, holder: Any, name: str, length: int | None = None) -> list[Any]:
    """Return a list that an answer must hold."""
    values = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(values, list):
        raise EngineError(f"{owner}: the server's answer holds no {name}, expected a list; {EXTENSIONS}.")
    if length is not None and len(values) != length:
        raise InvalidRecordError(f"{owner}: the server gives {len(values)} {name}, expected {length}; score it again or drop it.")
    return values
