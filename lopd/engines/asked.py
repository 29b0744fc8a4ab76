"""Log-probs of ids that are asked for at each response token: vLLM's `prompt_logprob_token_ids`, and what its answer means.

vLLM 0.32 has it where its second model runner runs.  It is new, and other rows or other ids would give numbers that look as good: the sampled
token is asked for too, last, and must be as likely there as vLLM reports elsewhere.

Shape suffixes: T response tokens, A ids asked for a token, the sampled one last, W most likely ids of the model.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.engines.inputs import asked_ids
from lopd.engines.supports import arrange, make_scores
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.manifest import SamplingParams
from lopd.records.rollouts import Rollout, Scores

#: Of vLLM's sampling parameters: the ids, and the position whose next token is the first that they are asked for.
IDS, FIRST = "prompt_logprob_token_ids", "prompt_logprob_start"
# nats by which two computations of one number may differ, in the dtype of any head
_TOLERANCE = 0.5


def check_drawn(owner: str, sampling: SamplingParams) -> None:
    """Check that a source is asked for no draws beside the sampled tokens: vLLM gives none.

    Raises:
        InvalidRecordError: it is.
    """
    if sampling.drawn:
        raise InvalidRecordError(
            f"{owner}: drawn is {sampling.drawn}, expected 0, since vLLM gives no draws beside the sampled token; sample with HFSource, or keep "
            "`candidates` most likely ones."
        )


def asking(rollout: Rollout, candidates: int, drawn: int) -> dict[str, Any]:
    """Return the sampling parameters that ask for a rollout's candidates, its drawn ones and its sampled tokens; nothing where it is for none.

    Raises:
        InvalidRecordError: it has fewer.
    """
    if not candidates + drawn:
        return {}
    ids_TA = np.concatenate([asked_ids(rollout, candidates, drawn), rollout.response_ids[:, None]], axis=1)
    return {IDS: ids_TA, FIRST: rollout.prompt_ids.size - 1}


def asked_scores(
    rollout: Rollout,
    ids_TA: NDArray[np.integer],
    logprobs_TA: NDArray[Any],
    found: tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]],
    *,
    candidates: int,
    top_k: int,
) -> Scores:
    """Return scores whose support has the ids that were asked for.

    Args:
        rollout: whose tokens.
        ids_TA: asked for, see `asking`.
        logprobs_TA: that vLLM gives for them, nats.
        found: (T,) log-probs that it gives for the sampled tokens themselves, and (T, W) ids and log-probs of the model's most likely ones, most
            likely first, `likely` of them.
        candidates: how many of the ids are the rollout's first candidates; the others but the last are its drawn ones.
        top_k: how many of the model's own are kept.

    Raises:
        EngineError: vLLM gives log-probs of other tokens or other ids.
        InvalidRecordError: something is not a log-prob; it names the rollout.
    """
    owner, (logprobs_T, likely_TW, logprobs_TW) = f"Rollout {rollout.rollout_id!r}", found
    if logprobs_TA.shape != ids_TA.shape or logprobs_TA.dtype.kind != "f":
        raise EngineError(
            f"{owner}: the log-probs of the ids asked for are {logprobs_TA.dtype} of shape {logprobs_TA.shape}, expected floats of shape "
            f"{ids_TA.shape}; use vLLM 0.32 or later."
        )
    own_T = logprobs_TA[:, -1].astype(np.float32)
    off = np.flatnonzero(~np.isclose(own_T, logprobs_T, rtol=0, atol=_TOLERANCE))
    if off.size:
        t = int(off[0])
        raise EngineError(
            f"{owner}: response token {t} has log-prob {own_T[t]} among the ids asked for, expected {logprobs_T[t]}, as without asking; report it."
        )
    asked = ids_TA[:, :-1], logprobs_TA[:, :-1].astype(np.float32)
    support = arrange(*asked, likely_TW, logprobs_TW, candidates=candidates, top_k=top_k)
    return make_scores(rollout, logprobs_T, *support, ids_TA.shape[1] - 1 - candidates)
