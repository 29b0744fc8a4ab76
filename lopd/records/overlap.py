r"""Two models' supports compared: how far they overlap, what one leaves out of the other, and a bound on the KL.

With \(S_T\) the distinct tokens of the teacher's support and \(S\) those of the policy's,

- overlap@k is \(\lvert \mathrm{top}_k(\pi_T) \cap \mathrm{top}_k(\pi) \rvert / k\) (arXiv 2604.13016);
- the policy's mass outside \(S_T\) is at least \(\sum_{S \setminus S_T} \pi\), and at most that and the tail of \(S\);
- the reverse KL of the buckets \(S \cap S_T\) and the rest is at most that of the whole vocabulary, since merging tokens never adds to a KL.

Shape suffixes: T response tokens, K and S tokens of two supports.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.records.support import TopK

_LEAST = float(np.finfo(np.float32).eps)


def compare_supports(teacher: TopK, policy: TopK, tops: Iterable[int]) -> Mapping[str, NDArray[Any]]:
    """Measure two supports of the same tokens against each other.

    Args:
        teacher: with at least one token that was not drawn.
        policy: the same, of the policy.
        tops: k of each overlap; both supports hold so many of their own model's most likely tokens.

    Returns:
        (T,) values: `overlap8` and so on, shares; `least` and `most`, the policy's mass outside the teacher's support; `bucket_kl`, nats, at most
        KL(policy, teacher) up to rounding.
    """
    (theirs_TK, theirs), (mine_TS, mine) = _sorted(teacher), _sorted(policy)
    place_TS = _places(mine_TS, theirs_TK)
    both_TS = place_TS < theirs_TK.shape[1]
    theirs_TS = np.take_along_axis(theirs, np.where(both_TS, place_TS, 0), -1)
    least_T = np.exp(mine).sum(-1, where=~both_TS)
    rest_T = least_T + policy.tail
    theirs_rest_T = np.exp(theirs).sum(-1) - np.exp(theirs_TS).sum(-1, where=both_TS) + teacher.tail
    bucket_kl_T = (np.exp(mine) * (mine - theirs_TS)).sum(-1, where=both_TS)
    # a rest that rounding made 0 would make the bound infinite
    bucket_kl_T += rest_T * np.log(np.maximum(rest_T, _LEAST) / np.maximum(theirs_rest_T, _LEAST))
    overlap = {f"overlap{k}": (place_TS[:, :k] < k).mean(-1) for k in tops}
    return {**overlap, "least": least_T, "most": rest_T, "bucket_kl": bucket_kl_T}


def _sorted(support: TopK) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return ids and log-probs of the distinct tokens, the most likely first."""
    ids, logprobs = support.ids[:, : support.distinct], support.logprobs[:, : support.distinct].astype(np.float64)
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)


def _places(ids_TS: NDArray[np.int32], among_TK: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return (T, S): where each id stands among the K, and K for one that is not there."""
    place_TS = np.full(ids_TS.shape, among_TK.shape[1], np.int64)
    for place in range(among_TK.shape[1]):
        np.copyto(place_TS, place, where=ids_TS == among_TK[:, place, None])
    return place_TS
