"""What is said to a server that speaks vLLM's extensions of the OpenAI completions, and what its answers mean: token ids both ways, never text.

Everything is looked up by token id, and nothing that is missing becomes a number.

Shape suffixes: T response tokens, K candidates a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.engines.server.answers import Trouble
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.identity import TokenizerId
from lopd.records.manifest import SamplingParams
from lopd.records.rollouts import Rollout, Scores, TopK, floor_logprobs

# vLLM writes -inf, which JSON has no word for, as this (`clamp_prompt_logprobs`, and the completions' own log-probs)
_NO_PROBABILITY = -9999.0
# Of these a server's generation_config.json has values of its own, which hold where a request says nothing.
_UNCHANGED = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_EXTENSIONS = "serve with vLLM, or with a server that speaks its extensions (return_token_ids, prompt_logprobs, return_tokens_as_token_ids)"
_PROBED = 5
# the highest that vLLM takes
_HOT = 2.0


def _body(ids: Sequence[int] | Sequence[Sequence[int]], max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": max_tokens, "add_special_tokens": False, "return_token_ids": True, **_UNCHANGED, **more}


def scoring_body(rollouts: Sequence[Rollout], top_k: int) -> dict[str, Any]:
    """A request for the log-probs of rollouts' own tokens; the one token that vLLM insists on generating is thrown away."""
    return _body([_ids(rollout) for rollout in rollouts], 1, prompt_logprobs=top_k, temperature=1.0, top_p=1.0)


def read_scores(rollouts: Sequence[Rollout], top_k: int, vocab_size: int, answer: Any) -> list[Scores]:
    """The scores in the answer to `scoring_body`, in the order of the rollouts.

    Raises:
        InvalidRecordError: a log-prob is missing, or is none; it names the rollout.
        EngineError: the server read other tokens than were sent, or does not speak the extensions.
    """
    owner = f"Rollout {rollouts[0].rollout_id!r}"
    choices = _choices(owner, answer, len(rollouts))
    _check_computed(owner, answer)
    return [_scores(rollout, top_k, vocab_size, choice) for rollout, choice in zip(rollouts, choices, strict=True)]


def _scores(rollout: Rollout, top_k: int, vocab_size: int, choice: Mapping[str, Any]) -> Scores:
    owner, ids = f"Rollout {rollout.rollout_id!r}", _ids(rollout)
    _check_read(owner, choice, ids)
    entries = _listed(owner, choice, "prompt_logprobs", len(ids))[rollout.prompt_ids.size :]
    logprobs = [
        _logprob(owner, t, entry, token) for t, (entry, token) in enumerate(zip(entries, rollout.response_ids.tolist(), strict=True))
    ]
    return Scores.of(rollout, *floor_logprobs(logprobs), _top_k(owner, entries, top_k, vocab_size) if top_k else None)


def _check_computed(owner: str, answer: Mapping[str, Any]) -> None:
    """No position came out of the prefix cache: what a cache gives depends on the order of requests (vllm-project/vllm#42019).

    vLLM does not read the cache for such a request, and says so where it was started with `--enable-prompt-tokens-details`.
    """
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    if cached:
        raise EngineError(f"{owner}: {cached} of its tokens came out of the prefix cache, expected 0; start the server without it.")


def _ids(rollout: Rollout) -> list[int]:
    return [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]


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
    return float("-inf") if value <= _NO_PROBABILITY else float(value)


def _top_k(owner: str, entries: Sequence[Any], top_k: int, vocab_size: int) -> TopK:
    """The K most likely of each position; the server gives the prompt token too, and with it K or K + 1."""
    ids_TK, logprobs_TK = np.empty((len(entries), top_k), np.int64), np.empty((len(entries), top_k), np.float32)
    for t, entry in enumerate(entries):
        found = sorted((-_logprob(owner, t, entry, key), _candidate(owner, t, key, vocab_size)) for key in entry)
        if not top_k <= len(found) <= top_k + 1:
            raise InvalidRecordError(
                f"{owner}: response token {t} has {len(found)} candidates, expected {top_k} or {top_k + 1}; check the server's max_logprobs."
            )
        ids_TK[t] = [token for _, token in found[:top_k]]
        logprobs_TK[t] = [-minus for minus, _ in found[:top_k]]
    tail_T = 1 - np.exp(logprobs_TK.astype(np.float64)).sum(-1)
    try:
        return TopK(ids_TK, floor_logprobs(logprobs_TK)[0], tail_T.clip(0, 1))
    except InvalidRecordError as error:
        raise InvalidRecordError(f"{owner}: {error}") from error


def _candidate(owner: str, place: int, key: str, vocab_size: int) -> int:
    token = int(key) if key.isdecimal() else -1
    if not 0 <= token < vocab_size:
        raise InvalidRecordError(
            f"{owner}: a candidate for response token {place} is {key!r}, expected an id below the vocabulary's {vocab_size}; "
            "the model gives probability to ids that no token has, drop the rollout or score in process."
        )
    return token


@frozen(eq=False)
class Ask:
    """One response that is asked for.

    Args:
        rollout_id: its name.
        prompt_ids: what is answered.
        max_tokens: its longest, at least 1.
        seed: below 2**63.
        stop_ids: end it.
        generation: round of sampling.
    """

    rollout_id: str
    prompt_ids: NDArray[np.int32]
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    generation: int


def sampling_body(ask: Ask, sampling: SamplingParams, vocab_size: int) -> dict[str, Any]:
    """A request for one response.  Stop ids are sent, and the server's own idea of EOS is turned off: the two may differ.

    An id of no token never ends anything, and a server refuses it.
    """
    return _body(
        ask.prompt_ids.tolist(),
        ask.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=ask.seed,
        n=1,
        min_tokens=0,
        ignore_eos=True,
        stop_token_ids=sorted(token for token in ask.stop_ids if token < vocab_size),
        skip_special_tokens=False,
        logprobs=0,
        return_tokens_as_token_ids=True,
    )


def read_rollout(ask: Ask, tokenizer: TokenizerId, answer: Any) -> Rollout:
    """The rollout in the answer to `sampling_body`.

    Raises:
        InvalidRecordError: an id is outside the vocabulary, or a log-prob is missing or none; it names the rollout.
        EngineError: the server read another prompt, or stopped elsewhere than it was told to, or does not speak the extensions.
    """
    owner = f"Rollout {ask.rollout_id!r}"
    (choice,) = _choices(owner, answer, 1)
    _check_read(owner, choice, ask.prompt_ids.tolist())
    ids = _listed(owner, choice, "token_ids")
    _check_sampled(owner, ids, tokenizer)
    _check_end(owner, ids, ask, choice.get("finish_reason"))
    return Rollout(
        rollout_id=ask.rollout_id,
        prompt_ids=ask.prompt_ids,
        response_ids=np.array(ids, np.int64),
        loss_mask=np.ones(len(ids), np.bool_),
        finish_reason="stop" if ids[-1] in ask.stop_ids else "length",
        behavior_logprobs=floor_logprobs(_reported(owner, choice.get("logprobs"), ids))[0],
        generation=ask.generation,
    )


def _check_sampled(owner: str, ids: Sequence[Any], tokenizer: TokenizerId) -> None:
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise InvalidRecordError(
                f"{owner}: sampled token {place} is {str(token)[:40]}, expected an id below the vocabulary's {tokenizer.vocab_size}; "
                "serve the model of this tokenizer (a head that is padded may sample its padding)."
            )


def _check_end(owner: str, ids: Sequence[int], ask: Ask, reason: Any) -> None:
    """The response ends at a stop id, or is as long as it may be, and has no stop id inside."""
    if reason in (None, "abort", "error"):
        raise Trouble(f"the response was broken off (finish_reason {reason!r})")
    inside = next((place for place, token in enumerate(ids[:-1]) if token in ask.stop_ids), None)
    if inside is not None:
        raise EngineError(
            f"{owner}: it goes on after stop id {ids[inside]} at token {inside}, expected its end there; {_EXTENSIONS}, and its stop_token_ids."
        )
    if not ids or (ids[-1] not in ask.stop_ids and len(ids) != ask.max_tokens):
        raise EngineError(
            f"{owner}: the server ended it ({str(reason)[:40]!r}) after {len(ids)} of {ask.max_tokens} tokens at id {ids[-1:]}, expected a stop id; "
            "add the server's own stop ids to the sampling's stop_ids."
        )


def _reported(owner: str, logprobs: Any, ids: Sequence[int]) -> list[float]:
    """(T,) what the server says of the tokens it sampled, each checked to be of that token."""
    tokens = _listed(owner, logprobs, "tokens", len(ids))
    values = _listed(owner, logprobs, "token_logprobs", len(ids))
    for place, (name, token) in enumerate(zip(tokens, ids, strict=True)):
        if name != f"token_id:{token}":
            raise EngineError(f"{owner}: log-prob {place} is of {str(name)[:40]!r}, expected 'token_id:{token}'; {_EXTENSIONS}.")
    return [_number(owner, place, value) for place, value in enumerate(values)]


def probe_bodies(ids: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two requests for one token, the same but for temperature and top_p, on which raw log-probs do not depend."""
    same: dict[str, Any] = {"logprobs": _PROBED, "return_tokens_as_token_ids": True}
    return _body(ids, 1, temperature=1.0, top_p=1.0, **same), _body(ids, 1, temperature=_HOT, top_p=0.1, **same)


def check_raw(owner: str, plain: Any, heated: Any, tolerance: float = 0.5) -> None:
    """The answers to `probe_bodies` say the same.

    Log-probs that are taken after temperature and top_p differ: what top_p = 0.1 leaves is renormalised, and all else is ruled out.

    Raises:
        EngineError: they do not, so the server's `logprobs_mode` is not "raw_logprobs".
    """
    first, second = (_candidates(owner, answer) for answer in (plain, heated))
    shared = first.keys() & second.keys()
    gap = max((abs(first[name] - second[name]) for name in shared), default=float("inf"))
    if len(shared) < 2 or not gap <= tolerance:
        raise EngineError(
            f"{owner}: its log-probs change with the temperature (by {gap:.3g} nats), expected those of temperature 1; "
            "start it with `--logprobs-mode raw_logprobs`."
        )


def _candidates(owner: str, answer: Any) -> dict[str, float]:
    try:
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {str(name): float(value) for name, value in top.items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise EngineError(f"{owner}: its answer holds no top_logprobs, expected those of one token; {_EXTENSIONS}.") from None


def _choices(owner: str, answer: Any, count: int) -> list[Mapping[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not (isinstance(choices, list) and len(choices) == count and all(isinstance(choice, Mapping) for choice in choices)):
        raise EngineError(f"{owner}: the server's answer is not of {count} choices, expected one for each prompt; {_EXTENSIONS}.")
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
        raise EngineError(f"{owner}: the server's answer holds no {name}, expected a list; {_EXTENSIONS}.")
    if length is not None and len(values) != length:
        raise InvalidRecordError(f"{owner}: the server gives {len(values)} {name}, expected {length}; score it again or drop it.")
    return values
