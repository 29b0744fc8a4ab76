"""From what an engine says about each response token to checked scores with a top-k support.

Shape suffixes: T response tokens, K candidates a token.
"""

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lopd.types import Rollout, Scores, TopK, floor_logprobs


def make_scores(
    rollout: Rollout, logprobs_T: NDArray[np.float32], ids_TK: NDArray[np.integer], candidates_TK: NDArray[np.float32]
) -> Scores:
    """Scores of one rollout: -inf becomes the floor, and is counted among the sampled tokens; K = 0 is no support.

    Args:
        rollout: whose tokens.
        logprobs_T: of them, nats.
        ids_TK: the K most likely tokens.
        candidates_TK: of those, nats.

    Raises:
        InvalidRecordError: something is no log-prob; it names the rollout.
    """
    scores = Scores.of(rollout, *floor_logprobs(logprobs_T))
    if ids_TK.shape[1] == 0:
        return scores
    # float32 rounding may leave the sum a little above 1
    tail_T = np.clip(1 - np.exp(candidates_TK.astype(np.float64)).sum(-1), 0, 1)
    return evolve(scores, top_k=TopK(ids_TK, floor_logprobs(candidates_TK)[0], tail_T))
