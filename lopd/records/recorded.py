"""Records of agent frameworks, found by their keys -> turns: token ids as they were recorded, never text that is tokenised again.

`docs/howto/trajectories.md` lists which frameworks write which keys, and which versions of them were read.

Shape suffixes: S tokens of a whole trajectory.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any

import numpy as np
from attrs import frozen

from lopd.errors import InvalidRecordError, PromptError
from lopd.records.arrays import BoolArray, to_floats, to_ids, to_mask
from lopd.records.plain import plain, present
from lopd.records.rollouts import FinishReason, floor_logprobs
from lopd.records.turns import Turn, split


@frozen
class _Keys:
    """Where a sequence has its tokens; all but the prompt have one entry for each response token.  Without a mask, all were drawn."""

    prompt: str
    response: str
    drawn: str
    logprobs: str


_CALL = _Keys("prompt_ids", "completion_ids", "completion_mask", "completion_logprobs")
_TRIPLET = _Keys("prompt_ids", "completion_ids", "", "completion_logprobs")
_SEQUENCES = (
    _Keys("prompts", "responses", "response_mask", "rollout_log_probs"),
    _Keys("prompt_ids", "response_ids", "response_mask", "response_logprobs"),
    _CALL,
    _Keys("", "token_ids", "mask", "logprobs"),
)
#: Keys of log-probs and of masks in all forms and in TRL, each of which is read in one form alone, or in none.
_LOGPROBS = dict.fromkeys([*(k.logprobs for k in _SEQUENCES), "sampling_per_token_logps"])
_MASKS = dict.fromkeys([*(k.drawn for k in _SEQUENCES), "tool_mask", "env_mask"])
#: Keys of the steps of a record.
STEPS = ("trajectory", "triplets")
_ENDINGS = ("is_truncated", "finish_reason")
#: Forms of a record, for messages.
FORMS = "; ".join([*("+".join(filter(None, (k.prompt, k.response, k.drawn))) for k in _SEQUENCES), "trajectory", "triplets", "messages"])


def reason_of(record: Mapping[str, Any], where: str) -> FinishReason | None:
    """Return how a policy ended, in our words; None where the record does not state it.

    Raises:
        PromptError: its finish reason is another word.
    """
    truncated, reason = (plain(record.get(key), where) for key in _ENDINGS)
    reason = "length" if truncated else reason
    if reason not in (None, "stop", "length", "tool_calls"):
        raise PromptError(f"{where}: its finish_reason is {reason!r:.40}, expected 'stop', 'length' or 'tool_calls'; drop the record.")
    return None if reason is None else "length" if reason == "length" else "stop"


def turns_in(record: Mapping[str, Any], where: str) -> list[Turn] | None:
    """Return the turns of one record that has token ids, and nothing null; None if its keys are of no form that is known.

    What a call has behind its last turn follows as one that was not drawn, and so does a call that drew nothing.

    Raises:
        PromptError: parts of it do not fit together or are missing, or its policy drew nothing.
        InvalidRecordError: something is not token ids, a mask or log-probs.
    """
    steps = next((key for key in STEPS if key in record), None)
    if steps is not None:
        keys: _Keys | None = _CALL if steps == "trajectory" else _TRIPLET
        calls = list(_calls(where, steps, record[steps]))
        # how the last call ended may stand in the record alone
        calls[-1:] = [(at, {**call, **{key: record.get(key) for key in _ENDINGS if call.get(key) is None}}) for at, call in calls[-1:]]
    else:
        keys = next((k for k in _SEQUENCES if record.keys() >= {k.prompt, k.response, k.drawn} - {""}), None)
        calls = [(where, record)]
    if keys is None:
        _refuse_ids(record, where)
        return None
    turns = [turn for at, call in calls for turn in _sequence(at, call, keys)]
    if not any(turn.drawn for turn in turns):
        raise PromptError(f"{where}: its policy drew 0 tokens, expected at least 1; look at its mask, or drop the record.")
    return turns


def _refuse_ids(record: Mapping[str, Any], where: str) -> None:
    """Refuse token ids without the keys that belong to them: messages beside them would be tokenised in their place."""
    for keys in _SEQUENCES:
        with suppress(InvalidRecordError):  # texts may stand under such a key
            if keys.response in record and to_ids(record[keys.response]).size:
                lacks = " and ".join(repr(key) for key in (keys.prompt, keys.drawn) if key and key not in record)
                raise PromptError(
                    f"{where}: it has recorded ids under {keys.response!r}, but not {lacks}; add what is missing, or leave the ids out to import "
                    "the messages."
                )


def _calls(where: str, key: str, steps: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the calls of a policy in the steps of verifiers, or in the triplets of agent-lightning."""
    if not isinstance(steps, list | tuple):
        raise PromptError(f"{where}: its {key!r} is {steps!r:.40}, expected a list of steps; have the framework record them.")
    for i, step in enumerate(steps):
        at = f"{where}, step {i}"
        if key == "trajectory":
            yield at, _mapping(at, step, "tokens")
            continue
        prompt, response = _mapping(at, step, "prompt"), _mapping(at, step, "response")
        ids, logprobs = response.get("token_ids"), response.get("logprobs")
        if isinstance(logprobs, Sequence | np.ndarray) and all(isinstance(token, Mapping) for token in logprobs):
            logprobs = [token.get("logprob") for token in logprobs]
        yield at, {_TRIPLET.prompt: prompt.get("token_ids"), _TRIPLET.response: ids, _TRIPLET.logprobs: logprobs}


def _mapping(where: str, step: Any, key: str) -> Mapping[str, Any]:
    value = step.get(key) if isinstance(step, Mapping) else None
    if not isinstance(value, Mapping):
        raise PromptError(f"{where}: its {key!r} is {value!r:.40}, expected a mapping with token ids; have the framework record them.")
    return present(value)


def _others(call: Mapping[str, Any], keys: Mapping[str, None], own: str) -> Iterator[str]:
    """Yield which of these keys have entries, beside the form's own."""
    return (key for key in keys if key != own and _has_entries(call.get(key)))


def _has_entries(value: Any) -> bool:
    """Return whether there are any, a mapping by places being them, another having those of its values; what is empty, a text or a flag has none."""
    if isinstance(value, Mapping):
        return any(str(key).isdecimal() or _has_entries(inner) for key, inner in value.items())
    return isinstance(value, Sized) and not isinstance(value, str) and getattr(value, "ndim", None) != 0 and len(value) > 0


def _mask(call: Mapping[str, Any], key: str) -> BoolArray:
    """Return the mask under a key, an empty one where the key is missing; an InvalidRecordError names the key."""
    try:
        return to_mask([] if call.get(key) is None else call[key])
    except InvalidRecordError as error:
        raise InvalidRecordError(f"{key!r} is not a mask ({error})") from error


def _refuse_others(where: str, call: Mapping[str, Any], keys: _Keys, drawn: BoolArray, sizes: tuple[int, int]) -> None:
    """Refuse log-probs under the key of another form, which would be lost, and a second mask, whose tokens of tools would be learnt.

    A second mask is one of the response, or of the prompt too; `sizes` has the tokens of the prompt and of the response.
    """
    before, size = sizes
    for key in () if keys.logprobs in call else _others(call, _LOGPROBS, keys.logprobs):
        raise PromptError(
            f"{where}: it has log-probs under {key!r}, which the form of {keys.response!r} does not read; rename it to {keys.logprobs!r}, or "
            "leave it out."
        )
    for key in _others(call, _MASKS, keys.drawn):
        second = _mask(call, key)
        second = second[before:] if second.shape == (before + size,) else second
        if second.shape != (size,):
            raise PromptError(
                f"{where}: its second mask {key!r} has shape {second.shape}, expected {(size,)}, one for each token; record it again, or "
                "leave it out."
            )
        if drawn.shape == second.shape and (drawn & ~second).any():
            raise PromptError(
                f"{where}: it has a second mask under {key!r}, which is not read and lacks tokens of {keys.drawn!r}; multiply it into that, or leave "
                "it out."
            )


def _sequence(where: str, call: Mapping[str, Any], keys: _Keys) -> list[Turn]:
    """Return the turns of a prompt and what follows it."""
    try:
        prompt, response = (to_ids([] if key == "" else call.get(key)) for key in (keys.prompt, keys.response))
        drawn, kept, before = (_mask(call, key) for key in (keys.drawn, "attention_mask", "prompt_mask"))
        drawn = drawn if keys.drawn else np.ones(response.size, np.bool_)
        kept = kept if kept.size else np.ones(prompt.size + response.size, np.bool_)
        logprobs = None if call.get(keys.logprobs) is None else floor_logprobs(to_floats(call[keys.logprobs]))[0]
        _refuse_others(where, call, keys, drawn, (prompt.size, response.size))
    except InvalidRecordError as error:
        raise InvalidRecordError(f"{where}: {error}") from error
    size, whole = response.size, prompt.size + response.size
    wanted = {keys.drawn: (drawn, size), keys.logprobs: (logprobs, size), "attention_mask": (kept, whole)}
    for key, (values, wants) in wanted.items():
        if values is not None and values.shape != (wants,):
            raise PromptError(f"{where}: {key!r} has {values.size} entries, expected {wants}, one for each token; record it again.")
    if before.any():
        raise PromptError(
            f"{where}: its prompt_mask has a 1, expected 0 at tokens that were read; move what was drawn behind the prompt, or leave out a mask of "
            "padding, and the padding."
        )
    ids_S, drawn_S = np.concatenate([prompt, response])[kept], np.concatenate([np.zeros(prompt.size, np.bool_), drawn])[kept]
    logprobs_S = None if logprobs is None else np.concatenate([np.zeros(prompt.size, np.float32), logprobs])[kept]
    reason, stop = reason_of(call, where), max([int(kept[: prompt.size].sum()), *(np.flatnonzero(drawn_S)[-1:] + 1).tolist()])
    turns = split(ids_S, drawn_S, logprobs_S, reason)
    if turns and stop == ids_S.size:
        return turns
    return [*turns, Turn(ids_S[:stop], ids_S[stop:], None, None if turns else reason, drawn=False)]
