"""The records that move between lopd's verbs: frozen; those that come from outside are checked once, when they are made.

Prompt -> Rollout -> Scores -> ScoredRollout -> Batch -> LossOutput -> StepMetrics is the way of a token through a run.
Token ids are the truth; no field holds text that is ever tokenised again.  All log-probs are natural (nats), at temperature 1.

Shape suffixes: N tokens of a packed batch, P prompt tokens, T response tokens of one rollout, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from attrs import Factory, evolve, field, fields, frozen
from numpy.typing import NDArray
from torch import Tensor

from lopd.arrays import (
    BoolArray,
    Float32Array,
    Int32Array,
    check_logprobs,
    read_only,
    to_candidates,
    to_floats,
    to_ids,
    to_mask,
    to_optional_floats,
)
from lopd.checks import check_at_least
from lopd.drift import Drift
from lopd.errors import InvalidRecordError

FinishReason = Literal["stop", "length"]
#: The virtual column: what the sampling engine reported, kept in the rollouts themselves.
BEHAVIOR_COLUMN = "behavior"


@frozen(eq=False)
class Prompt:
    """Token ids before generation starts, chat template already applied.

    Args:
        prompt_id: unique within a run; rollouts are named after it.
        token_ids: (P,) int32, P >= 1.
        text: for people and verifiers; never tokenised.
        answer: what a verifier compares a response with, if there is one.
    """

    prompt_id: str
    token_ids: Int32Array = field(converter=to_ids)
    text: str = ""
    answer: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.token_ids.size == 0:
            raise InvalidRecordError(f"Prompt {self.prompt_id!r}: it has 0 tokens, expected at least 1; drop it or add a BOS token.")


def rollout_id(prompt_id: str, sample: int, generation: int) -> str:
    """The id of one rollout: which prompt, which of its samples, which round of sampling."""
    return f"{prompt_id}/s{sample}/g{generation}"


def prompt_id_of(rollout: str) -> str:
    """The prompt's id in the id of a rollout; an id of another form is its own prompt.

    >>> prompt_id_of("sums/7/s0/g2")
    'sums/7'
    """
    parts = rollout.rsplit("/", 2)
    named = len(parts) == 3 and parts[1][:1] == "s" and parts[2][:1] == "g" and parts[1][1:].isdigit() and parts[2][1:].isdigit()
    return parts[0] if named else rollout


def _hash_content(rollout: "Rollout") -> bytes:
    digest = blake2b(np.array([rollout.prompt_ids.size, rollout.response_ids.size], "<i8").tobytes(), digest_size=16)
    digest.update(rollout.prompt_ids.astype("<i4", copy=False).tobytes())
    digest.update(rollout.response_ids.astype("<i4", copy=False).tobytes())
    digest.update(rollout.loss_mask.tobytes())
    return digest.digest()


@frozen(eq=False)
class Rollout:
    """One response sampled from a policy for one prompt: the ids that were *sampled*, EOS included.

    Args:
        rollout_id: see `rollout_id`.
        prompt_ids: (P,) int32, P >= 1.
        response_ids: (T,) int32, T >= 1.
        loss_mask: (T,) bool, True where a token counts (False for tool or user tokens inside a response).
        finish_reason: "stop" if the policy ended the response itself, "length" if it was cut.
        behavior_logprobs: (T,) float32, nats: what the sampling engine reported for these tokens, or None.
        generation: round of sampling, from 0; the store knows which policy sampled in it.
        content_hash: of ids and mask, where the response starts included; every score carries it (computed, not passed).

    Raises:
        InvalidRecordError: a field is empty, of another length, or not what it must be (ids, bools, log-probs, a round).
    """

    rollout_id: str
    prompt_ids: Int32Array = field(converter=to_ids)
    response_ids: Int32Array = field(converter=to_ids)
    loss_mask: BoolArray = field(converter=to_mask)
    finish_reason: FinishReason
    behavior_logprobs: Float32Array | None = field(default=None, converter=to_optional_floats)
    generation: int = 0
    content_hash: bytes = field(init=False, repr=lambda digest: digest.hex()[:8], default=Factory(_hash_content, takes_self=True))

    def __attrs_post_init__(self) -> None:
        owner = f"Rollout {self.rollout_id!r}"
        for name, ids in (("prompt_ids", self.prompt_ids), ("response_ids", self.response_ids)):
            if ids.size == 0:
                raise InvalidRecordError(f"{owner}: {name} has 0 tokens, expected at least 1; drop the rollout.")
        if self.loss_mask.shape != self.response_ids.shape:
            raise InvalidRecordError(
                f"{owner}: loss_mask has shape {self.loss_mask.shape}, but response_ids has shape {self.response_ids.shape}; "
                "pass one value per response token."
            )
        if self.finish_reason not in ("stop", "length"):
            raise InvalidRecordError(
                f"{owner}: finish_reason is {self.finish_reason!r}, expected 'stop' or 'length'; map the engine's word."
            )
        check_at_least(owner, "generation", self.generation, 0)
        if self.behavior_logprobs is not None:
            check_logprobs(owner, "behavior_logprobs", self.behavior_logprobs, self.response_ids.shape)

    @classmethod
    def from_store(cls, **values: Any) -> "Rollout":
        """A rollout out of fields that were checked when they were first made, and verified when they were read: checked no third time."""
        rollout = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(rollout, name, value)
        return rollout

    def __len__(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt_ids.size + self.response_ids.size


@frozen(eq=False)
class TopK:
    """The K most likely tokens of one model at each response token, and what they leave out.

    Args:
        ids: (T, K) int32.
        logprobs: (T, K) float32, nats, of the whole vocabulary's distribution: never renormalised over the K.
        tail: (T,) float32 in [0, 1], the probability of all other tokens.

    Raises:
        InvalidRecordError: a field has another shape, a log-prob is none, or the K and the tail do not add up to 1 (within 0.01).
    """

    ids: Int32Array = field(converter=to_candidates)
    logprobs: Float32Array = field(converter=to_floats)
    tail: Float32Array = field(converter=to_floats)

    @classmethod
    def from_store(cls, ids: Any, logprobs: Any, tail: Any) -> "TopK":
        """A support that was checked when it was first made, and verified when it was read."""
        support = object.__new__(cls)
        for name, value, dtype in (("ids", ids, np.int32), ("logprobs", logprobs, np.float32), ("tail", tail, np.float32)):
            object.__setattr__(support, name, read_only(value.astype(dtype)))
        return support

    def __attrs_post_init__(self) -> None:
        check_logprobs("Top-k", "logprobs", self.logprobs, self.ids.shape)
        if self.tail.shape != self.ids.shape[:1]:
            raise InvalidRecordError(
                f"Top-k: tail has shape {self.tail.shape}, expected {self.ids.shape[:1]}; pass one value per response token."
            )
        total_T = np.exp(self.logprobs.astype(np.float64)).sum(-1) + self.tail
        wrong = np.flatnonzero(~((self.tail >= 0) & (self.tail <= 1) & (np.abs(total_T - 1) <= 0.01)))
        if wrong.size:
            raise InvalidRecordError(
                f"Top-k: token {wrong[0]} has tail {self.tail[wrong[0]]} and sums to {total_T[wrong[0]]:.4f}, expected a tail in [0, 1] and "
                "a sum of 1; the tail is 1 minus the probabilities of the K."
            )


@frozen(eq=False)
class Scores:
    """One model's log-probs of one rollout's response tokens, bound to the tokens they were computed on.

    Args:
        rollout_id: whose tokens.
        content_hash: of the `Rollout` that was read.
        logprobs: (T,) float32, nats, finite, <= 0.  0.0 is a value like any other; a missing score is a missing `Scores`.
        floored: how many of them were -inf and are stored as a floor (see `floor_logprobs`).
        top_k: the most likely tokens beside the sampled one, if the column has them (`Provenance.top_k`).
        residual: an offset was subtracted from the log-probs (`lopd.residual`), so that they may be above 0; only a column whose provenance
            says so takes such scores.
    """

    rollout_id: str
    content_hash: bytes
    logprobs: Float32Array = field(converter=to_floats)
    floored: int = 0
    top_k: TopK | None = None
    residual: bool = False

    def __attrs_post_init__(self) -> None:
        owner = f"Scores of rollout {self.rollout_id!r}"
        check_logprobs(owner, "logprobs", self.logprobs, (self.logprobs.size,), residual=self.residual)
        if self.top_k is not None and len(self.top_k.ids) != self.logprobs.size:
            raise InvalidRecordError(
                f"{owner}: top_k has {len(self.top_k.ids)} tokens, expected {self.logprobs.size}; pass one row per response token."
            )

    @classmethod
    def of(cls, rollout: Rollout, logprobs_T: Any, floored: int = 0, top_k: TopK | None = None, *, residual: bool = False) -> "Scores":
        """Scores for this very rollout; the length is checked here, where the rollout is at hand."""
        logprobs = to_floats(logprobs_T)
        check_logprobs(f"Rollout {rollout.rollout_id!r}", "logprobs", logprobs, rollout.response_ids.shape, residual=residual)
        return cls(rollout.rollout_id, rollout.content_hash, logprobs, floored, top_k, residual)


def floor_logprobs(logprobs_T: Any, floor: float = -100.0) -> tuple[Float32Array, int]:
    """Log-probs with every -inf replaced by `floor` (nats), and how many there were.

    >>> floor_logprobs([-1.0, float("-inf")])
    (array([  -1., -100.], dtype=float32), 1)
    """
    logprobs = np.array(logprobs_T, dtype=np.float32)
    below = np.isneginf(logprobs)
    logprobs[below] = floor
    return logprobs, int(below.sum())


@frozen(eq=False)
class ScoredRollout:
    """A rollout with the score columns that were asked for.

    Args:
        rollout: the tokens.
        scores: column name -> (T,) float32, nats.
        top_k: column name -> top-k support, of the columns for which it was asked for.
    """

    rollout: Rollout
    scores: Mapping[str, Float32Array]
    top_k: Mapping[str, TopK] = field(factory=dict)


@frozen(eq=False)
class RolloutArrays:
    """Many rollouts end to end, for work on whole columns; the arrays may be views of files, in the types of the store.

    Args:
        prompt_lengths, response_lengths: (B,) int64.
        token_ids: prompt and response of one rollout after the other.
        loss_mask: one bool a response token; None where every token counts.
        scores: column name -> one log-prob a response token, nats.
    """

    prompt_lengths: NDArray[np.int64]
    response_lengths: NDArray[np.int64]
    token_ids: NDArray[Any]
    loss_mask: BoolArray | None
    scores: Mapping[str, NDArray[Any]]


@frozen(eq=False)
class Batch:
    """Several rollouts in one row of N tokens, packed: no padding, positions restart with each rollout.

    Everything is aligned with `targets`: entry n is about predicting `targets[n]` from the tokens up to `inputs[n]` of the same segment.

    Args:
        inputs: (N,) int64.
        targets: (N,) int64, the inputs of the same rollout shifted by one.
        position_ids: (N,) int64, the position within the rollout.
        segment_ids: (N,) int64, which rollout of this batch.
        weight: (N,) float32, how much a token counts; 0 for prompt tokens and masked tokens.
        teacher_logprobs: (N,) float32, nats, meaningful where weight > 0 (0 elsewhere); None if no such column was asked for.
        ref_logprobs: (N,) float32, nats, likewise.
        top_k_ids: (N, K) int64, the tokens that the teacher finds most likely; None if they were not asked for, like the next two.
        top_k_logprobs: (N, K) float32, nats, of the teacher's whole distribution.
        top_k_tail: (N,) float32, the probability that the teacher gives to all other tokens.
    """

    inputs: Tensor
    targets: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    weight: Tensor
    teacher_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    top_k_ids: Tensor | None = None
    top_k_logprobs: Tensor | None = None
    top_k_tail: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(Batch)}
        return evolve(self, **{name: value.to(device) for name, value in values.items() if value is not None})


@frozen(eq=False)
class Step:
    """The micro-batches of one optimizer step.

    Args:
        index: its number in the run.
        batches: at least one.
        vocab_hash: of the tokenizer whose ids these are; `opd_steps` compares it with the student's.  None if nobody says.
        idle: so many of the last batches weigh nothing, and are there for this rank to keep step with others.
    """

    index: int
    batches: tuple[Batch, ...]
    vocab_hash: str | None = None
    idle: int = 0


@frozen(eq=False)
class LMHead:
    r"""The last layer of a causal LM: \(z = c \tanh(s (W h + b) / c)\), without the tanh if there is no soft-cap \(c\).

    Args:
        weight: (V, D); V is the tokenizer's vocabulary, padding rows already cut off so that no padding id carries mass.
        bias: (V,) or None.
        softcap: c or None.
        scale: s.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def float(self) -> "LMHead":
        """The same head with float32 weights: convert once where `logits` is called many times and no gradient is wanted."""
        return evolve(self, weight=self.weight.float())

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) logits in float32 (float64 if given float64): bf16 logits would cost 0.02 to 0.05 nats."""
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits_NV = torch.nn.functional.linear(hidden_ND.to(dtype), self.weight.to(dtype), bias)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


@frozen(eq=False)
class LossOutput:
    """What a loss says about one micro-batch: weighted sums, so that any split of a step adds up to the same gradient.

    Args:
        loss_sum: scalar, differentiable: sum over tokens of weight times loss.
        reverse_kl_sum: scalar, detached, nats: sum of weight times (student - teacher) log-prob, the one-sample estimate of
            KL(student, teacher) on these tokens; may be negative; 0 for losses that see no teacher.
        clipped_sum: scalar, detached: sum of weight over tokens whose advantage was clipped.
        neglected_sum: scalar, detached, or None where nothing was left out of the gradient on purpose: at least the sum over tokens of the
            1-norm of the gradient by the logits that was left out.  Times the largest norm of a hidden state it bounds what the head's
            weight lacks (Frobenius norm); times the largest norm of a row of that weight, what the hidden states lack.
        logprobs: (M,) detached, nats: the student's log-probs of the targets whose weight is more than 0, in their order; None where a loss
            does not say.  The loop measures drift with them.
    """

    loss_sum: Tensor
    reverse_kl_sum: Tensor
    clipped_sum: Tensor
    neglected_sum: Tensor | None = None
    logprobs: Tensor | None = None


@frozen
class StepMetrics:
    """Plain numbers of one optimizer step; means are weighted by the batch weights of the whole step.

    Args:
        step: its number in the run.
        loss: mean loss, before the update.
        reverse_kl: nats per token, one-sample estimate on the stored tokens.
        clip_fraction: share of clipped advantages.
        grad_norm: before clipping.
        rollouts: in this step.
        tokens: positions the student read in this step, prompts included.
        seconds: wall time.
        drift: from the reference policy; None unless the steps bring teacher and ref columns and the loss says its log-probs.
    """

    step: int
    loss: float
    reverse_kl: float
    clip_fraction: float
    grad_norm: float
    rollouts: int
    tokens: int
    seconds: float
    drift: Drift | None = None

    def __str__(self) -> str:
        """One line for people; `repr` has every number.

        >>> print(StepMetrics(step=9, loss=0.5, reverse_kl=0.25, clip_fraction=0.0, grad_norm=2.0, rollouts=8, tokens=900, seconds=0.5))
        step    9  loss   0.500  reverse KL  0.250  gradient  2.00  1,800 tokens/s
        """
        drift = "" if self.drift is None else f"ratio {self.drift.ratio_mean:.3f}  effective rollouts {self.drift.ess:4.0%}  "
        speed = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        return (
            f"step {self.step:4d}  loss {self.loss:7.3f}  reverse KL {self.reverse_kl:6.3f}  gradient {self.grad_norm:5.2f}  {drift}{speed}"
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepMetrics":
        """The inverse of `attrs.asdict`, also after a way through JSON."""
        drift = data.get("drift")
        return cls(**{**data, "drift": None if drift is None else Drift.from_json(drift)})
