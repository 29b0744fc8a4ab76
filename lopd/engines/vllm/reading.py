"""vLLM's log-probs of prompt tokens, as scores of rollouts that are read as prompts.

Shape suffixes: T response tokens, A ids asked for a token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.engines.asked import IDS, asked_scores, asking, widest
from lopd.engines.inputs import all_ids, budgeted, in_order
from lopd.engines.supports import entries, likely, look_up, make_scores
from lopd.engines.vllm.engine import VLLMEngine
from lopd.errors import EngineError
from lopd.records.rollouts import Rollout, Scores

# log-probs of one call: vLLM gives them as Python objects, some 88 bytes each
_ENTRIES = 1 << 25


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
