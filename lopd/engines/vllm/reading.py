"""vLLM's log-probs: found by id wherever it gives some, and those of prompt tokens as scores of rollouts that are read as prompts.

Shape suffixes: T response tokens, K candidates a token, A ids asked for a token, W entries that vLLM gives at a token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.engines.asked import IDS, asked_scores, asking
from lopd.engines.inputs import all_ids, budgeted, in_order
from lopd.engines.supports import likely, make_scores
from lopd.engines.vllm.engine import VLLMEngine
from lopd.errors import EngineError
from lopd.records.rollouts import Rollout, Scores

# log-probs of one call: vLLM gives them as Python objects, some 88 bytes each
_ENTRIES = 1 << 25


def widest(top_k: int, candidates: int, drawn: int) -> int:
    """Return the most log-probs a token that vLLM must give (`max_logprobs`), those of the ids asked for and of the sampled token included."""
    asked = candidates + drawn
    return likely(top_k, candidates) + (asked and asked + 1)


def read_scores(engine: VLLMEngine, rollouts: Sequence[Rollout], top_k: int, candidates: int = 0, drawn: int = 0) -> list[Scores]:
    """Return scores of rollouts, which go in as prompts, shortest first, in calls that memory can hold; see `VLLMScorer` for the arguments."""
    runs = budgeted([len(rollout) for rollout in rollouts], _ENTRIES // (1 + widest(top_k, candidates, drawn)))
    scores = [made for run in runs for made in _read_run(engine, [rollouts[i] for i in run], top_k, candidates, drawn)]
    return in_order([i for run in runs for i in run], scores)


def _read_run(engine: VLLMEngine, rollouts: Sequence[Rollout], top_k: int, candidates: int, drawn: int) -> list[Scores]:
    """Return scores of these in one call; a function of its own, so that what vLLM gave is dropped before the next."""
    wanted = likely(top_k, candidates)
    params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": wanted, "flat_logprobs": True, "detokenize": False}
    requests = [params | asking(rollout, candidates, drawn) for rollout in rollouts]
    outputs = engine.generate([all_ids(rollout) for rollout in rollouts], requests)
    parts = zip(rollouts, outputs, requests, strict=True)
    return [_scores(rollout, output, request.get(IDS), candidates, top_k) for rollout, output, request in parts]


def _scores(rollout: Rollout, output: Any, ids_TA: NDArray[np.integer] | None, candidates: int, top_k: int) -> Scores:
    owner, flat = f"Rollout {rollout.rollout_id!r}", output.prompt_logprobs
    positions = len(flat.start_indices)
    if positions != len(rollout):
        raise EngineError(f"{owner}: vLLM gave log-probs at {positions} positions, expected {len(rollout)}; report it.")
    # position 0 has no log-prob, and is never that of a response: a prompt has at least one token
    given = entries(flat, first=rollout.prompt_ids.size)
    if ids_TA is None:
        return make_scores(rollout, *look_up(owner, rollout.response_ids, *given, top_k=top_k))
    logprobs_TA = getattr(output, "prompt_token_id_logprobs", None)
    if logprobs_TA is None:
        # the worker gave them, last of all
        width = ids_TA.shape[1]
        ids, logprobs_TA = given[0][:, -width:], given[1][:, -width:]
        if not np.array_equal(ids, ids_TA):
            raise EngineError(f"{owner}: vLLM gave log-probs of other ids than it was asked for; report it.")
        given = given[0][:, :-width], given[1][:, :-width]
    found = look_up(owner, rollout.response_ids, *given, top_k=likely(top_k, candidates))
    return asked_scores(rollout, ids_TA, logprobs_TA, found, candidates=candidates, top_k=top_k)


def entries(flat: Any, first: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (T, W) ids and log-probs of the positions from `first` on; where a position has fewer entries than another, id -1.

    `flat` is vLLM's `FlatLogprobs`: all positions end to end, those of position i at `start_indices[i]` to `end_indices[i]`.
    """
    starts_T, ends_T = (np.array(indices[first:], np.int64) for indices in (flat.start_indices, flat.end_indices))
    places_TW = starts_T[:, None] + np.arange(max((ends_T - starts_T).max(initial=0), 1))
    missing_TW = places_TW >= ends_T[:, None]
    places_TW[missing_TW] = 0
    ids_TW = np.array(flat.token_ids or [0], np.int64)[places_TW]
    logprobs_TW = np.array(flat.logprobs or [0.0], np.float32)[places_TW]
    ids_TW[missing_TW] = -1
    return ids_TW, logprobs_TW


def look_up(
    owner: str, tokens_T: NDArray[np.integer], ids_TW: NDArray[np.int64], logprobs_TW: NDArray[np.float32], top_k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Return (T,) log-probs of the tokens, and (T, K) ids and log-probs of the K most likely, all found by id.

    A sampled token that is not among the K most likely comes on top of them, and one that is may come twice: rank and place have no meaning.

    Raises:
        EngineError: a token is not among its entries, or there are fewer than K others.
    """
    hits_TW = ids_TW == tokens_T[:, None]
    lost = np.flatnonzero(~hits_TW.any(1))
    if lost.size:
        raise EngineError(
            f"{owner}: response token {lost[0]} is id {tokens_T[lost[0]]}, which is not among the engine's log-probs; report it."
        )
    places_T1 = hits_TW.argmax(1)[:, None]
    twice_TW = hits_TW & (np.arange(ids_TW.shape[1]) > places_T1)
    unusable_TW = twice_TW | (ids_TW < 0)
    # where the engine put the sampled token beside its K, it must not come among them for being as likely as the last: they are chosen without it
    beside_T = (~unusable_TW).sum(1) == top_k + 1
    unusable_TW |= hits_TW & (beside_T & ~twice_TW.any(1))[:, None]
    few = np.flatnonzero((~unusable_TW).sum(1) < top_k)
    if few.size:
        raise EngineError(
            f"{owner}: response token {few[0]} has {(~unusable_TW[few[0]]).sum()} candidates, expected at least {top_k}; report it."
        )
    best_TK = np.lexsort((-logprobs_TW, unusable_TW), axis=-1)[:, :top_k]
    logprobs_T = np.take_along_axis(logprobs_TW, places_T1, 1)[:, 0]
    return logprobs_T, np.take_along_axis(ids_TW, best_TK, 1), np.take_along_axis(logprobs_TW, best_TK, 1)
