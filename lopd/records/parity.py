"""How far two engines disagree about one model's log-probs, and what that does to the signal."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, printable
from lopd.records.rollouts import Rollout, Scores


@frozen
class Parity:
    """Differences, in nats, between an engine's log-probs and those of another over the same response tokens.

    An inference engine computes in other precisions and other orders than the code that trains; in bfloat16 single tokens differ by
    tenths of a nat.  The advantage inherits the difference whole, so it is to be compared with the advantage and not with zero.

    Args:
        engine, truth: what ran either.
        rollouts, tokens: compared; tokens with a loss mask of False are not.
        mean, p99, max: mean, 99 % quantile and maximum of the absolute difference.
        bias: mean of the difference, engine minus truth; unlike noise it does not average out.
        advantage: mean absolute advantage of the same tokens, truth minus what the sampling engine reported; None unless it reported all.
        sign_flips: share of tokens whose advantage has another sign under the engine; None unless the sampling engine reported all.
    """

    engine: str
    truth: str
    rollouts: int
    tokens: int
    mean: float
    p99: float
    max: float
    bias: float
    advantage: float | None = None
    sign_flips: float | None = None

    def __str__(self) -> str:
        effect = "" if self.advantage is None else f", beside a mean absolute advantage of {self.advantage:.3g}"
        return printable(
            f"{self.engine} against {self.truth}: mean {self.mean:.2g}, p99 {self.p99:.2g}, max {self.max:.2g}, bias {self.bias:.2g} nats "
            f"over {self.tokens} response tokens of {self.rollouts} rollouts{effect}"
        )


def measure_parity(rollouts: Sequence[Rollout], ours: Sequence[Scores], theirs: Sequence[Scores], *, engine: str, truth: str) -> Parity:
    """Return the differences over the tokens that count.

    Args:
        rollouts: at least one of them with a token that counts.
        ours: the engine's scores of them, in order.
        theirs: those it is compared with.
        engine: what ran ours.
        truth: what ran theirs.

    Raises:
        InvalidRecordError: no token counts.
    """
    counted = np.concatenate([rollout.loss_mask for rollout in rollouts])
    if not counted.any():
        raise InvalidRecordError(
            f"Parity of {engine}: 0 tokens of {len(rollouts)} rollouts count, expected at least 1; pass other rollouts."
        )
    ours_M, theirs_M = (_flat([score.logprobs for score in scores])[counted] for scores in (ours, theirs))
    difference_M = ours_M - theirs_M
    size_M = np.abs(difference_M)
    advantage, flips = None, None
    behavior = [rollout.behavior_logprobs for rollout in rollouts if rollout.behavior_logprobs is not None]
    if len(behavior) == len(rollouts):
        behavior_M = _flat(behavior)[counted]
        advantage = float(np.abs(theirs_M - behavior_M).mean())
        flips = float((np.sign(ours_M - behavior_M) != np.sign(theirs_M - behavior_M)).mean())
    return Parity(
        engine=engine,
        truth=truth,
        rollouts=len(rollouts),
        tokens=size_M.size,
        mean=float(size_M.mean()),
        p99=float(np.quantile(size_M, 0.99)),
        max=float(size_M.max()),
        bias=float(difference_M.mean()),
        advantage=advantage,
        sign_flips=flips,
    )


def _flat(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate(values).astype(np.float64)
