"""Turns of a conversation -> one rollout, or one for each turn.

A turn is what a policy drew in one call, after all that it read before.  Turns make one rollout only where each reads the turns before it as they
were drawn; what others wrote in between is in the response, and does not count.

Shape suffixes: P prompt tokens, T response tokens, S tokens of a whole trajectory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from lopd.errors import PromptError
from lopd.records.arrays import BoolArray, Float32Array, Int32Array
from lopd.records.rollouts import FinishReason

_SHOWN = 24


@frozen(eq=False)
class Turn:
    """One call of a policy.

    Args:
        prompt_ids: (P,) int32, all that it read.
        response_ids: (T,) int32, what it drew.
        logprobs: (T,) float32, nats, of what it drew, as they were recorded; or None.
        finish_reason: how it ended; None where that was not recorded.
        drawn: whether it counts; what was not drawn is kept to be compared with the text that stands beside it.
    """

    prompt_ids: Int32Array
    response_ids: Int32Array
    logprobs: Float32Array | None = None
    finish_reason: FinishReason | None = None
    drawn: bool = True


def split(ids_S: Int32Array, drawn_S: BoolArray, logprobs_S: Float32Array | None, finish_reason: FinishReason | None) -> list[Turn]:
    """Return the turns of one sequence: each run of drawn tokens, after all tokens before it.  Tokens after the last turn are left out.

    >>> ids, drawn = np.arange(6, dtype=np.int32), np.array([False, True, True, False, True, False])
    >>> [(turn.prompt_ids.tolist(), turn.response_ids.tolist()) for turn in split(ids, drawn, None, None)]
    [([0], [1, 2]), ([0, 1, 2, 3], [4])]
    """
    runs = np.flatnonzero(np.diff(drawn_S, prepend=False, append=False)).reshape(-1, 2).tolist()
    turns = [Turn(ids_S[:start], ids_S[start:stop], None if logprobs_S is None else logprobs_S[start:stop]) for start, stop in runs]
    return [*turns[:-1], *(evolve(turn, finish_reason=finish_reason) for turn in turns[-1:])]


def join(where: str, turns: Sequence[Turn], decode: Callable[[Any], str]) -> tuple[Turn, BoolArray]:
    """Return several turns as one, with what stands between them, and which of its (T,) tokens were drawn.

    Tokens between turns have a log-prob of 0.0, which nothing reads.

    Args:
        where: how messages name the trajectory.
        turns: in their order, at least one.
        decode: ids to text, for messages.

    Raises:
        PromptError: a turn does not read those before it as they were drawn, or some have log-probs and others have not.
    """
    if len({turn.logprobs is None for turn in turns}) > 1:
        raise PromptError(f"{where}: some of its turns have log-probs and others have not, expected all or none; drop the record.")
    first, last = turns[0].prompt_ids.size, turns[-1]
    whole_S = np.concatenate([last.prompt_ids, last.response_ids])
    drawn_S, logprobs_S = np.zeros(whole_S.size, np.bool_), np.zeros(whole_S.size, np.float32)
    for t, turn in enumerate(turns):
        start, stop = turn.prompt_ids.size, turn.prompt_ids.size + turn.response_ids.size
        if t + 1 < len(turns):
            _check_reads(f"{where}, turn {t + 1}", turns[t + 1].prompt_ids, turn, decode)
        drawn_S[start:stop], logprobs_S[start:stop] = True, 0.0 if turn.logprobs is None else turn.logprobs
    logprobs = None if last.logprobs is None else logprobs_S[first:]
    return Turn(whole_S[:first], whole_S[first:], logprobs, last.finish_reason), drawn_S[first:]


def _check_reads(where: str, prompt_ids: Int32Array, before: Turn, decode: Callable[[Any], str]) -> None:
    """Refuse a prompt that does not begin with the turn before it, and all that this one read."""
    expected = np.concatenate([before.prompt_ids, before.response_ids])
    shared = min(expected.size, prompt_ids.size)
    differs = np.flatnonzero(expected[:shared] != prompt_ids[:shared])
    at = int(differs[0]) if differs.size else shared
    if at < expected.size:
        read, wanted = (decode(ids[at : at + _SHOWN]) for ids in (prompt_ids, expected))
        raise PromptError(
            f"{where}: from token {at} on it reads {read!r:.80}, expected {wanted!r:.80}, which stood there in the turn before; the history was "
            'rewritten (thinking that is left out, for example), so pass `turns="each"`.'
        )
