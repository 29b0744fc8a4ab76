"""From an engine's answers about each response token to checked scores with a top-k support.

Shape suffixes: T response tokens, K candidates a token, A ids that a scorer is asked for, W entries that an engine
gives at a token.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError
from lopd.records.identity import ModelId, TokenizerId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores, floor_logprobs
from lopd.records.support import TopK


def make_scores(
    rollout: Rollout, logprobs_T: NDArray[np.float32], ids_TK: NDArray[np.integer], candidates_TK: NDArray[np.float32], drawn: int = 0
) -> Scores:
    """Return scores of one rollout: -inf becomes the floor, and is counted among the sampled tokens; K = 0 leaves out the support.

    Args:
        rollout: whose tokens.
        logprobs_T: their log-probs, nats.
        ids_TK: ids in the support, the drawn ones last.
        candidates_TK: their log-probs, nats.
        drawn: how many of the K were drawn.

    Raises:
        InvalidRecordError: something is not a log-prob; it names the rollout.
    """
    support = make_support(f"Rollout {rollout.rollout_id!r}", ids_TK, candidates_TK, drawn) if ids_TK.shape[1] else None
    return Scores.of(rollout, *floor_logprobs(logprobs_T), support)


def make_support(owner: str, ids_TK: NDArray[np.integer], logprobs_TK: NDArray[np.float32], drawn: int = 0) -> TopK:
    """Return a support with its tail, 1 minus the probability of all but the last `drawn`; -inf becomes the floor.

    Raises:
        InvalidRecordError: something is not a log-prob; it names the owner.
    """
    distinct_TK = logprobs_TK[:, : logprobs_TK.shape[1] - drawn]
    # float32 rounding may leave the sum a little above 1
    tail_T = np.clip(1 - np.exp(distinct_TK.astype(np.float64)).sum(-1), 0, 1)
    try:
        return TopK(ids_TK, floor_logprobs(logprobs_TK)[0], tail_T, drawn)
    except InvalidRecordError as error:
        raise InvalidRecordError(f"{owner}: {error}") from error


def arrange(
    asked_TA: NDArray[np.integer],
    logprobs_TA: NDArray[np.float32],
    likely_TW: NDArray[np.integer],
    logprobs_TW: NDArray[np.float32],
    *,
    candidates: int,
    top_k: int,
) -> tuple[NDArray[np.integer], NDArray[np.float32]]:
    """Return (T, A + top_k) ids and log-probs in the order of a column: candidates, the model's own most likely outside of those, drawn ones.

    Args:
        asked_TA: the ids that were asked for, see `lopd.engines.inputs.asked_ids`.
        logprobs_TA: their log-probs, nats.
        likely_TW: the `candidates + top_k` most likely ids, most likely first: so many are enough, whichever of them are candidates.
        logprobs_TW: their log-probs, nats.
        candidates: how many of the ids asked for are distinct; the others were drawn.
        top_k: how many of the most likely ones to keep.
    """
    if not asked_TA.shape[1] + top_k:
        return asked_TA, logprobs_TA
    known_TW = (likely_TW[:, :, None] == asked_TA[:, None, :candidates]).any(-1)
    own_TK = np.argsort(known_TW, axis=1, kind="stable")[:, :top_k]

    def joined(asked: NDArray[Any], likely: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([asked[:, :candidates], np.take_along_axis(likely, own_TK, 1), asked[:, candidates:]], axis=1)

    return joined(asked_TA, likely_TW), joined(logprobs_TA, logprobs_TW)


def provenance_of(model: ModelId, tokenizer: TokenizerId, engine: str, *, top_k: int, candidates: int, drawn: int) -> Provenance:
    """Return the provenance of a scorer that keeps so many of the model's own tokens, of the policy's candidates and of drawn ones."""
    width = candidates + top_k + drawn
    return Provenance(model, tokenizer.vocab_hash, engine, top_k=width, eos_id=tokenizer.eos_id, candidates=candidates, drawn=drawn)


def likely(top_k: int, candidates: int) -> int:
    """Return how many of its most likely ids a model is asked for: `top_k` outside of the candidates are among so many, whichever those are."""
    return top_k and candidates + top_k
