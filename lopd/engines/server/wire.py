"""What is said to a server that speaks vLLM's extensions of the OpenAI completions, and what its answers mean: token ids both ways, never text.

Everything is looked up by token id, and nothing that is missing becomes a number.

Shape suffixes: T response tokens, K candidates a token.
"""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.engines.asked import IDS, asked_scores, asking
from lopd.engines.inputs import NEUTRAL, all_ids, make_rollout
from lopd.engines.server.answers import Trouble
from lopd.engines.supports import likely, make_scores, make_support
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.rollouts import Rollout, Scores

# vLLM writes -inf, which JSON has no word for, as this (`clamp_prompt_logprobs`, and the completions' own log-probs)
NO_PROBABILITY = -9999.0
EXTENSIONS = "serve with vLLM, or with a server that speaks its extensions (return_token_ids, prompt_logprobs, return_tokens_as_token_ids)"


def request_body(ids: Sequence[int] | Sequence[Sequence[int]], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A completion that is asked for: token ids in, token ids out."""
    return {"prompt": ids, "max_tokens": max_tokens, "add_special_tokens": False, "return_token_ids": True, **NEUTRAL, **more}


def scoring_body(rollouts: Sequence[Rollout], top_k: int) -> dict[str, Any]:
    """A request for the log-probs of rollouts' own tokens; the one token that vLLM insists on generating is thrown away."""
    return request_body([all_ids(rollout) for rollout in rollouts], 1, prompt_logprobs=top_k, temperature=1.0, top_p=1.0)


def read_scores(rollouts: Sequence[Rollout], top_k: int, vocab_size: int, answer: Any) -> list[Scores]:
    """The scores in the answer to `scoring_body`, in the order of the rollouts.

    Raises:
        InvalidRecordError: a log-prob is missing, or is none; it names the rollout.
        EngineError: the server read other tokens than were sent, or does not speak the extensions.
    """
    owner = f"Rollout {rollouts[0].rollout_id!r}"
    choices = _choices(owner, answer, len(rollouts))
    _check_computed(owner, answer)
    parts = zip(rollouts, choices, strict=True)
    return [make_scores(rollout, *_prompt_logprobs(rollout, top_k, vocab_size, choice)) for rollout, choice in parts]


def asking_body(rollout: Rollout, top_k: int, candidates: int, drawn: int) -> dict[str, Any]:
    """A request for the log-probs of a rollout's own tokens, of its candidates and of its drawn ones, and of the most likely ones.

    Only this endpoint takes ids to score (vLLM 0.32): completions do not.

    Raises:
        InvalidRecordError: the rollout has fewer.
    """
    asked = asking(rollout, candidates, drawn)
    settings = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "detokenize": False, "prompt_logprobs": likely(top_k, candidates)}
    return {
        "token_ids": all_ids(rollout),
        "return_token_ids": True,
        "sampling_params": {**NEUTRAL, **settings, **asked, IDS: asked[IDS].tolist()},
    }


def read_asked(rollout: Rollout, body: Mapping[str, Any], answer: Any, *, top_k: int, candidates: int, vocab_size: int) -> list[Scores]:
    """The scores in the answer to this `asking_body`.

    Raises:
        InvalidRecordError: a log-prob is missing, or is not one; it names the rollout.
        EngineError: the server read other tokens than were sent, or gives log-probs of others.
    """
    owner = f"Rollout {rollout.rollout_id!r}"
    found = _prompt_logprobs(rollout, likely(top_k, candidates), vocab_size, answer)
    _check_computed(owner, answer)
    ids_TA = np.array(body["sampling_params"][IDS], np.int64)
    return [asked_scores(rollout, ids_TA, _decoded(owner, answer), found, candidates=candidates, top_k=top_k)]


def _decoded(owner: str, answer: Mapping[str, Any]) -> Any:
    """The array that vLLM writes as base64 of a .npy."""
    written: Any = answer.get("prompt_token_id_logprobs")
    try:
        return np.load(BytesIO(b64decode(written, validate=True)), allow_pickle=False)
    except (TypeError, ValueError, EOFError, OSError):
        raise EngineError(
            f"{owner}: prompt_token_id_logprobs of the server's answer is {str(written)[:40]!r}, expected a .npy in base64; serve with vLLM 0.32 or "
            "later."
        ) from None


def _prompt_logprobs(
    rollout: Rollout, top_k: int, vocab_size: int, choice: Any
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """(T,) log-probs of the response tokens, and (T, K) ids and log-probs of the most likely ones."""
    owner, ids = f"Rollout {rollout.rollout_id!r}", all_ids(rollout)
    _check_read(owner, choice, ids)
    entries = _listed(owner, choice, "prompt_logprobs", len(ids))[rollout.prompt_ids.size :]
    tokens = rollout.response_ids.tolist()
    logprobs = [_logprob(owner, t, entry, token) for t, (entry, token) in enumerate(zip(entries, tokens, strict=True))]
    return np.array(logprobs, np.float32), *_top_k(owner, entries, tokens, top_k, vocab_size)


def _check_computed(owner: str, answer: Mapping[str, Any]) -> None:
    """No position came out of the prefix cache: what a cache gives depends on the order of requests (vllm-project/vllm#42019).

    vLLM does not read the cache for such a request, and says so where it was started with `--enable-prompt-tokens-details`.
    """
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    if cached:
        raise EngineError(f"{owner}: {cached} of its tokens came out of the prefix cache, expected 0; start the server without it.")


def _logprob(owner: str, place: int, entry: Any, token: int | str) -> float:
    """The log-prob of this token among those of its position, keyed by id; -inf where the server says so."""
    try:
        value = entry[str(token)]["logprob"]
    except (KeyError, TypeError):
        raise InvalidRecordError(
            f"{owner}: the server gives no log-prob of response token {place} (id {token}), expected one; score it again or drop it."
        ) from None
    return _number(owner, place, value)


def _number(owner: str, place: int, value: Any) -> float:
    if type(value) not in (float, int):
        raise InvalidRecordError(
            f"{owner}: the log-prob of response token {place} is {str(value)[:40]!r}, expected a number; check the model for NaN."
        )
    return float("-inf") if value <= NO_PROBABILITY else float(value)


def _top_k(
    owner: str, entries: Sequence[Any], tokens: Sequence[int], top_k: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The K most likely of each position; where the server gives K + 1, the token itself is beside them, however likely it is."""
    ids_TK, logprobs_TK = np.empty((len(entries), top_k), np.int64), np.empty((len(entries), top_k), np.float32)
    for t, entry in enumerate(entries if top_k else ()):
        found = sorted((-_logprob(owner, t, entry, key), _candidate(owner, t, key, vocab_size)) for key in entry)
        if not top_k <= len(found) <= top_k + 1:
            raise InvalidRecordError(
                f"{owner}: response token {t} has {len(found)} candidates, expected {top_k} or {top_k + 1}; check the server's max_logprobs."
            )
        best = found if len(found) == top_k else [each for each in found if each[1] != tokens[t]][:top_k]
        ids_TK[t] = [token for _, token in best]
        logprobs_TK[t] = [-minus for minus, _ in best]
    return ids_TK, logprobs_TK


def _candidate(owner: str, place: int, key: str, vocab_size: int) -> int:
    token = int(key) if key.isdecimal() else -1
    if not 0 <= token < vocab_size:
        raise InvalidRecordError(
            f"{owner}: a candidate for response token {place} is {key!r}, expected an id below the vocabulary's {vocab_size}; "
            "the model gives probability to ids that no token has, drop the rollout or score in process."
        )
    return token


def sampling_body(prompt_ids: Sequence[int], max_tokens: int, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A request for one response of at most `max_tokens` tokens; `settings` are `sampling_settings`, and how many `logprobs` to report."""
    return request_body(prompt_ids, max_tokens, seed=seed, skip_special_tokens=False, return_tokens_as_token_ids=True, **settings)


def read_rollout(rollout_id: str, generation: int, vocab_size: int, body: Mapping[str, Any], answer: Any, *, processed: bool) -> Rollout:
    """The rollout in the answer to this `sampling_body`; where the server's log-probs are `processed`, all that are at temperature 1 are missing.

    Raises:
        InvalidRecordError: an id is outside the vocabulary, or a log-prob is missing or none; it names the rollout.
        EngineError: the server read another prompt, or stopped elsewhere than it was told to, or does not speak the extensions.
    """
    owner, prompt, stops = f"Rollout {rollout_id!r}", body["prompt"], body["stop_token_ids"]
    (choice,) = _choices(owner, answer, 1)
    _check_read(owner, choice, prompt)
    ids = _listed(owner, choice, "token_ids")
    _check_sampled(owner, ids, vocab_size)
    _check_end(owner, ids, stops, body["max_tokens"], choice.get("finish_reason"))
    reported = _reported(owner, choice.get("logprobs"), ids)
    behavior, drawn = (None, reported) if processed else (reported, None)
    kept = 0 if processed else body["logprobs"]
    if body["temperature"] == 0:
        drawn = [0.0] * len(ids)
    support = make_support(owner, *_top_k(owner, _tops(owner, choice["logprobs"], len(ids)), ids, kept, vocab_size)) if kept else None
    ids_P = np.array(prompt, np.int32)
    return make_rollout(rollout_id, ids_P, ids, behavior, drawn, stops=stops, generation=generation, candidates=support)


def _check_sampled(owner: str, ids: Sequence[Any], vocab_size: int) -> None:
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InvalidRecordError(
                f"{owner}: sampled token {place} is {str(token)[:40]}, expected an id below the vocabulary's {vocab_size}; "
                "serve the model of this tokenizer (a head that is padded may sample its padding)."
            )


def _check_end(owner: str, ids: Sequence[int], stops: Sequence[int], longest: int, reason: Any) -> None:
    """The response ends at a stop id, or is as long as it may be, and has no stop id inside."""
    if reason in (None, "abort", "error"):
        raise Trouble(f"the response was broken off (finish_reason {reason!r})")
    inside = next((place for place, token in enumerate(ids[:-1]) if token in stops), None)
    if inside is not None:
        raise EngineError(
            f"{owner}: it goes on after stop id {ids[inside]} at token {inside}, expected its end there; {EXTENSIONS}, and its stop_token_ids."
        )
    if not ids or (ids[-1] not in stops and len(ids) != longest):
        raise EngineError(
            f"{owner}: the server ended it ({str(reason)[:40]!r}) after {len(ids)} of {longest} tokens at id {ids[-1:]}, expected a stop id; "
            "add the server's own stop ids to the sampling's stop_ids."
        )


def _reported(owner: str, logprobs: Any, ids: Sequence[int]) -> list[float]:
    """(T,) what the server says of the tokens it sampled, each checked to be of that token."""
    tokens = _listed(owner, logprobs, "tokens", len(ids))
    values = _listed(owner, logprobs, "token_logprobs", len(ids))
    for place, (name, token) in enumerate(zip(tokens, ids, strict=True)):
        if name != f"token_id:{token}":
            raise EngineError(f"{owner}: log-prob {place} is of {str(name)[:40]!r}, expected 'token_id:{token}'; {EXTENSIONS}.")
    return [_number(owner, place, value) for place, value in enumerate(values)]


def _tops(owner: str, logprobs: Any, length: int) -> list[dict[str, Any]]:
    """The most likely tokens at each sampled one, keyed by id as those of a prompt."""
    tops = _listed(owner, logprobs, "top_logprobs", length)
    try:
        return [{name.removeprefix("token_id:"): {"logprob": value} for name, value in top.items()} for top in tops]
    except AttributeError:
        raise InvalidRecordError(
            f"{owner}: top_logprobs holds {str(tops)[:40]!r}, expected those of each token; sample it again."
        ) from None


def _choices(owner: str, answer: Any, count: int) -> list[Mapping[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not (isinstance(choices, list) and len(choices) == count and all(isinstance(choice, Mapping) for choice in choices)):
        raise EngineError(f"{owner}: the server's answer is not of {count} choices, expected one for each prompt; {EXTENSIONS}.")
    return choices


def _check_read(owner: str, choice: Mapping[str, Any], prompt: list[int]) -> None:
    """The server read these very ids."""
    read = _listed(owner, choice, "prompt_token_ids")
    if read != prompt:
        place = next((i for i, (a, b) in enumerate(zip(read, prompt, strict=False)) if a != b), min(len(read), len(prompt)))
        raise EngineError(
            f"{owner}: the server read {len(read)} tokens that differ from those sent from token {place} on, expected the {len(prompt)} sent; "
            "start it without truncation, and with no proxy that changes prompts."
        )


def _listed(owner: str, holder: Any, name: str, length: int | None = None) -> list[Any]:
    values = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(values, list):
        raise EngineError(f"{owner}: the server's answer holds no {name}, expected a list; {EXTENSIONS}.")
    if length is not None and len(values) != length:
        raise InvalidRecordError(f"{owner}: the server gives {len(values)} {name}, expected {length}; score it again or drop it.")
    return values
