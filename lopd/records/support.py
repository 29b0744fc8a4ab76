"""Several tokens at each place of a response, with what one model thinks of them, in place of the sampled token alone.

Shape suffixes: T response tokens of one rollout, K tokens of the support.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from lopd.errors import InvalidRecordError
from lopd.records.arrays import Float32Array, Int32Array, check_logprobs, read_only, to_candidates, to_floats
from lopd.records.checks import check_at_least
from lopd.records.glance import Glance, Glanced


@frozen(eq=False, repr=False)
class TopK(Glanced):
    """A support: K tokens at each response token with one model's log-probs, and the probability that the rest of the vocabulary has.

    They are the most likely tokens of the model itself, or candidates that the policy kept while it sampled, or both.

    Args:
        ids: (T, K) int32; those that were not drawn are distinct.
        logprobs: (T, K) float32, nats, of the whole vocabulary's distribution: never renormalised over the K.
        tail: (T,) float32 in [0, 1], the probability of all tokens but the K - drawn distinct ones.
        drawn: so many of the K, the last ones, were drawn from the policy's own distribution at temperature 1, with replacement.

    Raises:
        InvalidRecordError: a field has another shape, a value is not a log-prob, an id comes twice among the distinct ones, or these and the tail
            do not add up to 1 (within 0.01).
    """

    ids: Int32Array = field(converter=to_candidates)
    logprobs: Float32Array = field(converter=to_floats)
    tail: Float32Array = field(converter=to_floats)
    drawn: int = 0

    @classmethod
    def from_store(cls, ids: Any, logprobs: Any, tail: Any, drawn: int = 0) -> "TopK":
        """Return a support that was checked when it was first made, and verified when it was read."""
        support = object.__new__(cls)
        for name, value, dtype in (("ids", ids, np.int32), ("logprobs", logprobs, np.float32), ("tail", tail, np.float32)):
            object.__setattr__(support, name, read_only(value.astype(dtype, copy=False)))
        object.__setattr__(support, "drawn", drawn)
        return support

    @classmethod
    def joined(cls, supports: Sequence["TopK"]) -> "TopK":
        """Return the supports of several rollouts, which have one K, end to end."""
        ids, logprobs, tail = (np.concatenate([getattr(support, name) for support in supports]) for name in ("ids", "logprobs", "tail"))
        return cls.from_store(ids, logprobs, tail, supports[0].drawn)

    def __getitem__(self, tokens: slice) -> "TopK":
        """Return the support of some of the tokens; a view."""
        return TopK.from_store(self.ids[tokens], self.logprobs[tokens], self.tail[tokens], self.drawn)

    def _glance(self) -> Glance:
        return Glance("Top-k", {"response tokens": len(self.ids), "K": self.ids.shape[1], "drawn": self.drawn})

    @property
    def distinct(self) -> int:
        """How many of the K were not drawn."""
        return int(self.ids.shape[1]) - self.drawn

    def __attrs_post_init__(self) -> None:
        check_logprobs("Top-k", "logprobs", self.logprobs, self.ids.shape)
        object.__setattr__(self, "drawn", check_at_least("Top-k", "drawn", self.drawn, 0))
        check_at_least("Top-k", "number of candidates", self.ids.shape[1], self.drawn)
        if self.tail.shape != self.ids.shape[:1]:
            raise InvalidRecordError(
                f"Top-k: tail has shape {self.tail.shape}, expected {self.ids.shape[:1]}; pass one value per response token."
            )
        ordered_TK = np.sort(self.ids[:, : self.distinct], axis=1)
        for token, rank in np.argwhere(ordered_TK[:, 1:] == ordered_TK[:, :-1])[:1]:
            raise InvalidRecordError(
                f"Top-k: token {token} has id {ordered_TK[token, rank]} twice, which counts it twice; pass each id once."
            )
        total_T = np.exp(self.logprobs[:, : self.distinct].astype(np.float64)).sum(-1) + self.tail
        wrong = np.flatnonzero(~((self.tail >= 0) & (self.tail <= 1) & (np.abs(total_T - 1) <= 0.01)))
        if wrong.size:
            raise InvalidRecordError(
                f"Top-k: token {wrong[0]} has tail {self.tail[wrong[0]]} and sums to {total_T[wrong[0]]:.4f}, expected a tail in [0, 1] and "
                "a sum of 1; the tail is 1 minus the probabilities of the K."
            )
