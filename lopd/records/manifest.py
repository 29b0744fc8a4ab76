"""Who made what: the manifest that a store carries, and the provenance of each score column."""

import math
from collections.abc import Iterable, Mapping
from operator import index
from typing import Any, Literal

from attrs import asdict, evolve, field, fields, frozen, has

from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.records.checks import check_at_least, check_number, own_numbers, own_texts
from lopd.records.glance import Glance, Glanced
from lopd.records.identity import ModelId, TokenizerId, rounding_note
from lopd.records.parity import Parity
from lopd.records.stored import read_as

SCHEMA_VERSION = 1
#: What roots of stores have in its place: lopd 0.2 refuses it as another version's, and would call what it finds behind a 1 damaged.
STORE_VERSION = 2
#: The `Provenance.logprobs_mode` of columns that `lopd.guards.residual` makes.
RESIDUAL = "residual"
#: How those of columns begin that `lopd.PrivilegedScorer` makes; what follows is a hash of the prompts.
PRIVILEGED = "privileged"
#: That of columns of labels (`lopd.label_rollouts`).
LABEL = "label"


def _to_stop_ids(ids: Iterable[Any]) -> tuple[int, ...]:
    """Return a tuple of ints, also of a list or an array: a manifest that is read again has a tuple."""
    try:
        return tuple(index(token) for token in ids)
    except TypeError as error:
        raise InvalidRecordError(
            f"Sampling: stop_ids is {ids!r:.80}, expected token ids; for a text, pass `tokenizer.convert_tokens_to_ids(...)` of its token."
        ) from error


@frozen
class SamplingParams:
    """How responses are drawn.

    Args:
        max_new_tokens: cap on T; make it the length you will train on, longer costs and is thrown away.
        temperature: the sampling temperature.  `behavior_logprobs` are at temperature 1 and uncut all the same; where `neutral` is False,
            `sampler_logprobs` are those of the distribution that drew the tokens, for the importance ratio of a loss.
        top_p: keep the most likely tokens that hold this much probability.  The others are never drawn, and what they would have added to
            the gradient is missing from it, whatever the ratio.
        samples_per_prompt: responses for each prompt.
        seed: each (seed, prompt, sample, generation) has its own random stream, whichever model draws, so models are compared on the same numbers.
            Give the writer of a text for SFT another one than the student that learns from it: that draws what these numbers drew far more often
            than its policy does; and so does an evaluation on the prompts of a training: give it another than the rollouts have.
        stop_ids: ids that end a response (kept in it); empty means the model's own EOS ids.  They take the place of those, so name EOS too unless
            a response may go on after it.
        candidates: how many of the most likely tokens are kept at each response token, with their log-probs at temperature 1.
        drawn: how many more tokens are drawn there and kept: from the policy's own distribution at temperature 1, with replacement.

    Raises:
        InvalidRecordError: a number makes no sense, or is not a number.  Those of numpy or torch are made Python's own.
    """

    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    samples_per_prompt: int = 1
    seed: int = 0
    stop_ids: tuple[int, ...] = field(default=(), converter=_to_stop_ids)
    candidates: int = 0
    drawn: int = 0

    def __attrs_post_init__(self) -> None:
        owner = "Sampling"
        own_numbers(self, owner, max_new_tokens=1, samples_per_prompt=1, seed=0, candidates=0, drawn=0)
        check_number(owner, "temperature", self.temperature, 0 <= self.temperature < math.inf, "finite and at least 0")
        check_number(owner, "top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        check_at_least(owner, "smallest of stop_ids", min(self.stop_ids, default=0), 0)

    @property
    def neutral(self) -> bool:
        """Whether tokens are drawn from the model's own distribution: temperature and top_p are 1."""
        return self.temperature == self.top_p == 1


@frozen(repr=False)
class Manifest(Glanced):
    """What every rollout of a store has in common.

    Args:
        tokenizer: the one of policy, teacher and student.
        policy: the model that sampled.
        sampling: how.
        sft_teacher: the model whose text the policy was SFT-trained on; None if it was not recorded.
        generation: the round of sampling that the store begins with (0 for Lightning OPD; online OPD and refresh count up).
    """

    tokenizer: TokenizerId
    policy: ModelId
    sampling: SamplingParams
    sft_teacher: ModelId | None = None
    generation: int = 0
    schema_version: int = SCHEMA_VERSION

    def _glance(self) -> Glance:
        sampling = self.sampling
        facts = {
            "policy": f"{self.policy} in {self.policy.dtype}",
            "SFT teacher": self.sft_teacher or "not recorded",
            "temperature": f"{sampling.temperature:g}",
            "top-p": f"{sampling.top_p:g}",
            "response tokens at most": sampling.max_new_tokens,
            "samples per prompt": sampling.samples_per_prompt,
            "seed": sampling.seed,
            "first round": self.generation,
            "tokenizer ids": self.tokenizer.vocab_size,
        }
        return Glance("Manifest", facts)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, owner: str = "Manifest") -> "Manifest":
        """Return the inverse of `to_json`.

        Raises:
            CorruptStoreError: not a manifest, or of another schema version.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if version not in (SCHEMA_VERSION, STORE_VERSION):
            raise CorruptStoreError(
                f"{owner}: schema_version is {version!r:.80}, expected {SCHEMA_VERSION} or {STORE_VERSION}; this store was not written by this "
                "version of lopd."
            )
        return evolve(read_as(cls, data, owner), schema_version=SCHEMA_VERSION)

    def difference(self, other: "Manifest") -> str | None:
        """Return the first field in which two manifests differ, as `policy.dtype is <self>, expected <other>`; None if they agree."""
        found = _difference("", self, other)
        return found + rounding_note(self.policy, other.policy) if found and found.startswith("policy.revision") else found


@frozen(eq=False)
class Provenance:
    """Who computed a score column, and how.

    Args:
        model: whose log-probs these are.
        vocab_hash: hash of the vocabulary of that model's tokenizer.
        engine: name and version of what ran it; not part of the identity (`Preflight` compares what it computes), except that of a residual, whose
            fit it names.
        logprobs_mode: "raw" is log-softmax of the logits at temperature 1, uncut; `RESIDUAL` is that minus a fitted offset, and may be above 0;
            `PRIVILEGED`, with a hash of the prompts, is raw after other prompts than the policy's; `LABEL` is a verifier's value, and its model is
            that verifier.
        top_k: how many tokens are kept at each response token, beside the sampled one: the most likely ones, unless one of the next two is set.
        eos_id: what ends a text of that model, by its tokenizer; no part of the identity.
        parity: how this engine compared with another that ran the same model, when the column was begun: what the first append
            said stays; no part of the identity.
        candidates: so many of the `top_k`, the first ones, are the most likely tokens of the policy; the model's own come from outside of them.
        drawn: so many of the `top_k`, the last ones, were drawn from the policy (`TopK.drawn`).

    Raises:
        InvalidRecordError: a number is less than 0, `candidates` and `drawn` are more than `top_k`, or a field is of another type.
    """

    model: ModelId
    vocab_hash: str
    engine: str
    logprobs_mode: str = "raw"
    top_k: int = 0
    eos_id: int | None = None
    parity: Parity | None = None
    candidates: int = 0
    drawn: int = 0

    def __attrs_post_init__(self) -> None:
        owner = f"Provenance of {self.model}"
        own_numbers(self, owner, candidates=0, drawn=0)
        own_texts(self, owner)
        check_at_least(owner, "top_k", self.top_k, self.candidates + self.drawn)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Provenance) and self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        support = self.top_k, self.candidates, self.drawn
        return self.model, self.vocab_hash, self.logprobs_mode, support, self.engine if self.residual else ""

    @property
    def residual(self) -> bool:
        """Whether an offset was subtracted from these log-probs."""
        return self.logprobs_mode == RESIDUAL

    @property
    def label(self) -> bool:
        """Whether these are what a verifier said, and so not log-probs."""
        return self.logprobs_mode == LABEL

    @property
    def signed(self) -> bool:
        """Whether values may be above 0, as log-probs may not."""
        return self.residual or self.label

    @property
    def privileged(self) -> bool:
        """Whether the model read other prompts than the policy did."""
        return self.logprobs_mode.startswith(PRIVILEGED)

    def is_of(self, policy: ModelId) -> bool:
        """Return whether these are a policy's own log-probs: those of its function, after the prompts that it read."""
        return self.model.same_weights(policy) and not self.privileged

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, owner: str = "Provenance") -> "Provenance":
        """Return the inverse of `to_json`.

        Raises:
            CorruptStoreError: not a provenance.
        """
        return read_as(cls, data, owner)


@frozen
class Commit:
    """One entry of a store's history.

    Args:
        number: its place, from 0.
        kind: what was committed.
        rows: rollouts that were added, scored, rewritten or quarantined.
        tokens: prompt and response tokens of added rollouts; scored response tokens; or tokens that a compaction rewrote.
        column: column of the scores, computed or not; or None.
        when: seconds since 1970, by the writer's clock.
        rounding: largest error in nats by which a log-prob was rounded to the store's type.
    """

    number: int
    kind: Literal["rollouts", "scores", "generation", "compaction", "quarantine", "sweep"]
    rows: int
    tokens: int
    column: str | None
    when: float
    rounding: float = 0.0


def _difference(path: str, mine: Any, theirs: Any) -> str | None:
    if mine == theirs:
        return None
    if has(type(mine)) and type(mine) is type(theirs):
        names = [f.name for f in fields(type(mine)) if f.eq]
        found = (_difference(f"{path}.{name}".lstrip("."), getattr(mine, name), getattr(theirs, name)) for name in reversed(names))
        return next(difference for difference in found if difference)
    return f"{path} is {mine!r}, expected {theirs!r}"
