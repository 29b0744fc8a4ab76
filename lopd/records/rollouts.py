"""The records that move between lopd's verbs: frozen; those that come from outside are checked once, when they are made.

Prompt -> Rollout -> Scores -> ScoredRollout is the way of a token to training, where `lopd.records.steps` takes it on: Batch -> LossOutput ->
StepMetrics.
Token ids are the truth; no field holds text that is ever tokenised again.  All log-probs are natural (nats), at temperature 1, with one
exception: `Rollout.sampler_logprobs`.

Shape suffixes: P prompt tokens, T response tokens of one rollout.
"""

from collections.abc import Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from attrs import Factory, converters, field, fields, frozen

from lopd.errors import InvalidRecordError
from lopd.records.arrays import BoolArray, Float32Array, Int32Array, check_logprobs, to_floats, to_ids, to_mask
from lopd.records.checks import a_kind, check_at_least, check_kind, check_number, to_real
from lopd.records.glance import Glance, Glanced, first_ids, quoted
from lopd.records.support import TopK

FinishReason = Literal["stop", "length"]
#: Virtual columns: what the sampling engine reported, kept in the rollouts themselves.  A score column cannot have the name of the second,
#: so the name shadows no column of a store.
BEHAVIOR_COLUMN, SAMPLER_COLUMN = "behavior", "behavior/sampler"
#: Virtual column -> the field of a rollout that it reads.
VIRTUAL_COLUMNS: Mapping[str, str] = MappingProxyType({BEHAVIOR_COLUMN: "behavior_logprobs", SAMPLER_COLUMN: "sampler_logprobs"})


@frozen(eq=False, repr=False)
class Prompt(Glanced):
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
        _check_text(f"Prompt {self.prompt_id!r:.80}", "prompt_id", self.prompt_id)
        for name in ("text", "answer") if self.answer is not None else ("text",):
            _check_text(f"Prompt {self.prompt_id!r}", name, getattr(self, name))
        if self.token_ids.size == 0:
            raise InvalidRecordError(f"Prompt {self.prompt_id!r}: it has 0 tokens, expected at least 1; drop it or add a BOS token.")

    def _glance(self) -> Glance:
        text = {"text": quoted(self.text)} if self.text else {"ids": first_ids(self.token_ids)}
        answer = {} if self.answer is None else {"answer": quoted(self.answer)}
        return Glance(f"Prompt {quoted(self.prompt_id)}", {**text, "tokens": self.token_ids.size, **answer})


def _check_text(owner: str, name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRecordError(f"{owner}: {name} is {a_kind(value)}, expected a str; pass `str(...)` of it.")


def rollout_id(prompt_id: str, sample: int, generation: int) -> str:
    """Return the id of one rollout: which prompt, which of its samples, which round of sampling."""
    return f"{prompt_id}/s{sample}/g{generation}"


def policy_column(generation: int) -> str:
    """Return the score column that keeps what the policy of a round reported while it sampled: log-probs and candidates.

    >>> policy_column(0), policy_column(2)
    ('policy', 'policy.g2')
    """
    return f"policy.g{generation}" if generation else "policy"


def prompt_id_of(rollout: str) -> str:
    """Return the prompt's id in the id of a rollout; an id of another form is its own prompt.

    >>> prompt_id_of("sums/7/s0/g2")
    'sums/7'
    """
    parts = rollout.rsplit("/", 2)
    named = len(parts) == 3 and parts[1][:1] == "s" and parts[2][:1] == "g" and parts[1][1:].isdecimal() and parts[2][1:].isdecimal()
    return parts[0] if named else rollout


def _hash_content(rollout: "Rollout") -> bytes:
    digest = blake2b(np.array([rollout.prompt_ids.size, rollout.response_ids.size], "<i8").tobytes(), digest_size=16)
    digest.update(rollout.prompt_ids.astype("<i4", copy=False).tobytes())
    digest.update(rollout.response_ids.astype("<i4", copy=False).tobytes())
    digest.update(rollout.loss_mask.tobytes())
    return digest.digest()


@frozen(eq=False, repr=False)
class Rollout(Glanced):
    """One response sampled from a policy for one prompt: the ids that were *sampled*, EOS included.

    Args:
        rollout_id: see `rollout_id`.
        prompt_ids: (P,) int32, P >= 1.
        response_ids: (T,) int32, T >= 1.
        loss_mask: (T,) bool, True where a token counts (False for tool or user tokens inside a response).
        finish_reason: "stop" if the policy ended the response itself, "length" if it was cut.
        behavior_logprobs: (T,) float32, nats: what the sampling engine reported for these tokens, at temperature 1 and uncut, or None.
        generation: round of sampling, from 0; the store knows which policy sampled in it.
        sampler_logprobs: (T,) float32, nats: the log-probs in the distribution that drew the tokens, with its temperature and top-p.  None where
            the engine reported none, and where temperature and top-p are 1: `behavior_logprobs` are the same then.
        candidates: the support that the source kept while it sampled, with the policy's log-probs; on the way to a scorer, which ids it is to
            score.  A store keeps it as a score column of the policy (`policy_column`), and gives rollouts without it.
        content_hash: hash of ids, mask, and where the response starts; every score carries it (computed, not passed).

    Raises:
        InvalidRecordError: a field is empty, of another length, or not what it must be (ids, bools, log-probs, a round).
    """

    rollout_id: str
    prompt_ids: Int32Array = field(converter=to_ids)
    response_ids: Int32Array = field(converter=to_ids)
    loss_mask: BoolArray = field(converter=to_mask)
    finish_reason: FinishReason
    behavior_logprobs: Float32Array | None = field(default=None, converter=converters.optional(to_floats))
    generation: int = 0
    sampler_logprobs: Float32Array | None = field(default=None, converter=converters.optional(to_floats))
    candidates: TopK | None = None
    content_hash: bytes = field(init=False, default=Factory(_hash_content, takes_self=True))

    def __attrs_post_init__(self) -> None:
        owner = f"Rollout {self.rollout_id!r}"
        _check_text(f"Rollout {self.rollout_id!r:.80}", "rollout_id", self.rollout_id)
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
        object.__setattr__(self, "generation", check_at_least(owner, "generation", self.generation, 0))
        for name in VIRTUAL_COLUMNS.values():
            if (logprobs := getattr(self, name)) is not None:
                check_logprobs(owner, name, logprobs, self.response_ids.shape)
        if self.candidates is not None:
            check_kind(f"{owner}: candidates", self.candidates, TopK, "pass a `TopK`, or leave it out")
        if self.candidates is not None and len(self.candidates.ids) != self.response_ids.size:
            raise InvalidRecordError(
                f"{owner}: candidates has {len(self.candidates.ids)} tokens, expected {self.response_ids.size}; pass one row per response token."
            )

    def with_candidates(self, candidates: TopK) -> "Rollout":
        """Return the same rollout with these candidates, which have one row per response token; nothing is checked or hashed again."""
        values = {f.name: getattr(self, f.name) for f in fields(Rollout)}
        return Rollout.from_store(**{**values, "candidates": candidates})

    @classmethod
    def from_store(cls, **values: Any) -> "Rollout":
        """Return a rollout out of fields that were checked when they were first made, and verified when they were read: checked no third time."""
        rollout = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(rollout, name, value)
        return rollout

    def __len__(self) -> int:
        """Return the number of tokens of prompt and response."""
        return self.prompt_ids.size + self.response_ids.size

    def _glance(self) -> Glance:
        masked = int(self.loss_mask.size - self.loss_mask.sum())
        reported = [column for column, name in VIRTUAL_COLUMNS.items() if getattr(self, name) is not None]
        facts = {
            "ids": first_ids(self.response_ids),
            "prompt tokens": self.prompt_ids.size,
            "response tokens": self.response_ids.size,
            **({"masked": masked} if masked else {}),
            "ended by": self.finish_reason,
            "round": self.generation,
            "log-probs": ", ".join(reported) or "not reported",
        }
        return Glance(f"Rollout {quoted(self.rollout_id)}", facts)


@frozen(eq=False, repr=False)
class Scores(Glanced):
    """One model's log-probs of one rollout's response tokens, bound to the tokens they were computed on.

    Args:
        rollout_id: whose tokens.
        content_hash: the one of the `Rollout` that was read.
        logprobs: (T,) float32, nats, finite, <= 0; or what `signed` names.  0.0 is a value like any other; a missing score is a missing `Scores`.
        floored: how many of them were -inf and are stored as a floor (see `floor_logprobs`).
        top_k: the most likely tokens beside the sampled one, if the column has them (`Provenance.top_k`).
        signed: these are log-probs less an offset (`lopd.guards.residual`), or the labels of a verifier, so that they may be above 0; only a column
            whose provenance states that takes such scores.
    """

    rollout_id: str
    content_hash: bytes
    logprobs: Float32Array = field(converter=to_floats)
    floored: int = 0
    top_k: TopK | None = None
    signed: bool = False

    def __attrs_post_init__(self) -> None:
        owner = f"Scores of rollout {self.rollout_id!r}"
        check_logprobs(owner, "logprobs", self.logprobs, (self.logprobs.size,), signed=self.signed)
        if self.top_k is not None and len(self.top_k.ids) != self.logprobs.size:
            raise InvalidRecordError(
                f"{owner}: top_k has {len(self.top_k.ids)} tokens, expected {self.logprobs.size}; pass one row per response token."
            )

    @classmethod
    def of(cls, rollout: Rollout, logprobs_T: Any, floored: int = 0, top_k: TopK | None = None, *, signed: bool = False) -> "Scores":
        """Return scores for this very rollout; the length is checked here, where the rollout is at hand."""
        logprobs = to_floats(logprobs_T)
        check_logprobs(f"Rollout {rollout.rollout_id!r}", "logprobs", logprobs, rollout.response_ids.shape, signed=signed)
        return cls(rollout.rollout_id, rollout.content_hash, logprobs, floored, top_k, signed)

    def _glance(self) -> Glance:
        support = {} if self.top_k is None else {"top-k": self.top_k.ids.shape[1]}
        facts = {"response tokens": self.logprobs.size, "mean": mean_of(self.logprobs), "floored": self.floored, **support}
        return Glance(f"Scores of rollout {quoted(self.rollout_id)}", facts)


def mean_of(values_M: Float32Array) -> float | str:
    """Return the mean of what a column has, as text."""
    return float(values_M.mean(dtype=np.float64)) if values_M.size else "not known"


def floor_logprobs(logprobs_T: Any, floor: float = -100.0) -> tuple[Float32Array, int]:
    """Return log-probs with every -inf replaced by `floor` (nats), and how many there were.

    Raises:
        InvalidRecordError: numpy cannot read the log-probs, or the floor is not a log-prob.

    >>> floor_logprobs([-1.0, float("-inf")])
    (array([  -1., -100.], dtype=float32), 1)
    """
    floor = to_real("Log-probs", "floor", floor)
    check_number("Log-probs", "floor", floor, float(np.finfo(np.float32).min) <= floor <= 0, "finite in float32 and at most 0 nats")
    logprobs = to_floats(logprobs_T)
    below = np.isneginf(logprobs)
    return np.where(below, np.float32(floor), logprobs), int(below.sum())


@frozen(eq=False, repr=False)
class ScoredRollout(Glanced):
    """A rollout with the score columns that were asked for.

    Args:
        rollout: the tokens.
        scores: column name -> (T,) float32, nats.
        top_k: column name -> top-k support, of the columns for which it was asked for.
    """

    rollout: Rollout
    scores: Mapping[str, Float32Array]
    top_k: Mapping[str, TopK] = field(factory=dict)

    def _glance(self) -> Glance:
        shown = self.rollout._glance()
        return Glance(shown.title, {**shown.facts, **{f"mean of {name}": mean_of(values) for name, values in self.scores.items()}})
