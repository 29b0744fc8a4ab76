"""Who made what: identities, fingerprints, and the manifest that a store carries.

A name is not an identity.  Models are compared by a revision that is a commit, a step or a hash of the weights; tokenizers by a hash of
the whole token-to-id map (two vocabularies of the same size are still two vocabularies).
"""

import json
import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from attrs import asdict, field, fields, frozen, has
from torch import Tensor

from lopd.checks import check_at_least, check_number
from lopd.errors import CorruptStoreError
from lopd.parity import Parity

SCHEMA_VERSION = 1
LINEAGE_FILE = "lopd.json"
_HASHED = "weights:"
_TOGETHER = " + "
#: The `Provenance.logprobs_mode` of columns that `lopd.residual` makes.
RESIDUAL = "residual"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


@frozen(eq=False)
class ModelId:
    """A model that can be recognised again.  Equal if weights and dtype are; the name counts only where the revision is no hash of weights.

    Several models together (`mixture_id`) are one too: the teachers whose texts were put together for SFT, for example.

    Args:
        name: for people.
        revision: commit, step or hash of the weights (`hash_weights`).
        dtype: of the weights in use.
    """

    name: str
    revision: str
    dtype: str

    def __str__(self) -> str:
        """`name@revision`, shortened."""
        return _TOGETHER.join(f"{part.name}@{part.revision.removeprefix(_HASHED)[:12]}" for part in self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelId) and (self._weights(), self.dtype) == (other._weights(), other.dtype)

    def __hash__(self) -> int:
        return hash((self._weights(), self.dtype))

    def same_weights(self, other: "ModelId") -> bool:
        """Whether both are the same model, in whatever dtype, and under whatever name if their weights were hashed."""
        return self._weights() == other._weights()

    @property
    def parts(self) -> "tuple[ModelId, ...]":
        """The models of a mixture; a single model is its only part."""
        names, revisions, dtypes = (value.split(_TOGETHER) for value in (self.name, self.revision, self.dtype))
        if len(names) == len(revisions) == len(dtypes) > 1:
            return tuple(map(ModelId, names, revisions, dtypes))
        return (self,)

    def _weights(self) -> frozenset[tuple[str, str]]:
        return frozenset(map(_weights_of_one, self.parts))


def _weights_of_one(model: ModelId) -> tuple[str, str]:
    # "main" is a revision of many models; a hash of weights is one of one
    return ("" if model.revision.startswith(_HASHED) else model.name), model.revision


def mixture_id(models: Iterable[ModelId]) -> ModelId:
    """The identity of several models together, in whatever order; of one model its own.

    >>> a, b = ModelId("a", "1", "bfloat16"), ModelId("b", "7", "bfloat16")
    >>> print(mixture_id([b, a, b]))
    a@1 + b@7
    """
    distinct = {_weights_of_one(part): part for model in models for part in model.parts}
    ordered = [distinct[key] for key in sorted(distinct)]
    name, revision, dtype = (_TOGETHER.join(getattr(model, part) for model in ordered) for part in ("name", "revision", "dtype"))
    return ModelId(name, revision, dtype)


def hash_weights(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and values of all tensors, whatever their order (some seconds per GB).

    Of values, not of the dtype that holds them: bfloat16 weights loaded as float32 are still the same model.
    """
    return hash_weights_in_order(sorted(named_tensors, key=lambda item: item[0]))


def hash_weights_in_order(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same of tensors that come sorted by name: they are needed one at a time."""
    digest = blake2b(digest_size=16)
    for name, tensor in named_tensors:
        data = _narrowest(tensor.detach().cpu().contiguous())
        digest.update(f"{name}|{data.dtype}|{tuple(data.shape)}|".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return _HASHED + digest.hexdigest()


def _narrowest(tensor: Tensor) -> Tensor:
    """The same values in bfloat16 or float16, if nothing is lost by it."""
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


class HasVocabulary(Protocol):
    """Something whose token ids are of one tokenizer, and that says of which: a `TokenizerId`, `Provenance` or `lopd.steps.Step`."""

    @property
    def vocab_hash(self) -> str | None:
        """Of the whole token-to-id map; None if nobody recorded it."""
        ...


@frozen
class TokenizerId:
    """Fingerprint of a tokenizer.

    Args:
        vocab_hash: of the whole token-to-id map, added tokens included.
        vocab_size: highest id + 1.
        eos_id: end of a response, or None.
        bos_id: beginning of a text, or None.
        pad_id: padding, or None; may equal `eos_id`, nothing in lopd masks by it.
        template_hash: of the chat template, or "".
    """

    vocab_hash: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    template_hash: str

    def same_vocabulary(self, other: HasVocabulary) -> bool:
        """Whether both map the same tokens to the same ids."""
        return self.vocab_hash == other.vocab_hash


class TokenizerLike(Protocol):
    """What a fingerprint needs of a tokenizer; transformers' tokenizers fit."""

    def get_vocab(self) -> dict[str, int]:
        """The whole token-to-id map."""
        ...


def fingerprint_tokenizer(tokenizer: TokenizerId | TokenizerLike) -> TokenizerId:
    """The identity of a tokenizer, from its full vocabulary map, special ids and chat template; an identity is its own."""
    if isinstance(tokenizer, TokenizerId):
        return tokenizer
    vocab = tokenizer.get_vocab()
    by_id = sorted((token_id, token) for token, token_id in vocab.items())
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerId(
        vocab_hash=_digest(json.dumps(by_id).encode()),
        vocab_size=by_id[-1][0] + 1,
        eos_id=getattr(tokenizer, "eos_token_id", None),
        bos_id=getattr(tokenizer, "bos_token_id", None),
        pad_id=getattr(tokenizer, "pad_token_id", None),
        template_hash=_digest(json.dumps(template).encode()) if template else "",
    )


@frozen
class SamplingParams:
    """How responses are drawn.

    Args:
        max_new_tokens: cap on T; make it the length you will train on, longer costs and is thrown away.
        temperature: of the sampling distribution; stored log-probs are at temperature 1 all the same.
        top_p: keep the most likely tokens that hold this much probability; stored log-probs are uncut all the same.
        samples_per_prompt: responses for each prompt.
        seed: each (seed, prompt, sample, generation) has its own random stream.
        stop_ids: ids that end a response (kept in it); empty means the model's own EOS ids.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    samples_per_prompt: int = 1
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __attrs_post_init__(self) -> None:
        owner = "Sampling"
        check_at_least(owner, "max_new_tokens", self.max_new_tokens, 1)
        check_number(owner, "temperature", self.temperature, 0 <= self.temperature < math.inf, "finite and at least 0")
        check_number(owner, "top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        check_at_least(owner, "samples_per_prompt", self.samples_per_prompt, 1)
        check_at_least(owner, "seed", self.seed, 0)
        check_at_least(owner, "smallest of stop_ids", min(self.stop_ids, default=0), 0)


@frozen
class Manifest:
    """What every rollout of a store has in common.

    Args:
        tokenizer: of policy, teacher and student.
        policy: the model that sampled.
        sampling: how.
        sft_teacher: the model whose text the policy was SFT-trained on; None if nobody recorded it.
        generation: the round of sampling that the store begins with (0 for Lightning OPD; online OPD and refresh count up).
    """

    tokenizer: TokenizerId
    policy: ModelId
    sampling: SamplingParams
    sft_teacher: ModelId | None = None
    generation: int = 0
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """The inverse of `to_json`.

        Raises:
            CorruptStoreError: not a manifest, or of another schema version.
        """
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CorruptStoreError(
                f"Manifest: schema_version is {version!r}, expected {SCHEMA_VERSION}; this store was not written by this version of lopd."
            )
        sampling = dict(data["sampling"])
        sampling["stop_ids"] = tuple(sampling["stop_ids"])
        return cls(
            tokenizer=TokenizerId(**data["tokenizer"]),
            policy=ModelId(**data["policy"]),
            sampling=SamplingParams(**sampling),
            sft_teacher=_model_or_none(data["sft_teacher"]),
            generation=data["generation"],
        )

    def difference(self, other: "Manifest") -> str | None:
        """The first field in which two manifests differ, as `policy.dtype is <self>, expected <other>`; None if they agree."""
        return _difference("", self, other)


@frozen
class Provenance:
    """Who computed a score column, and how.

    Args:
        model: whose log-probs these are.
        vocab_hash: of that model's tokenizer.
        engine: name and version of what ran it.
        logprobs_mode: "raw" is log-softmax of the logits at temperature 1, uncut; `RESIDUAL` is that minus a fitted offset, and may be above 0.
        top_k: how many of the model's most likely tokens are kept at each response token, beside the sampled one.
        eos_id: what ends a text of that model, by its tokenizer; no part of the identity.
        parity: how this engine compared with another that ran the same model, when the column was begun: what the first append
            said stays; no part of the identity.

    Raises:
        InvalidRecordError: `top_k` is less than 0.
    """

    model: ModelId
    vocab_hash: str
    engine: str
    logprobs_mode: str = "raw"
    top_k: int = 0
    eos_id: int | None = field(default=None, eq=False)
    parity: Parity | None = field(default=None, eq=False)

    def __attrs_post_init__(self) -> None:
        check_at_least(f"Provenance of {self.model}", "top_k", self.top_k, 0)

    @property
    def residual(self) -> bool:
        """Whether an offset was subtracted from these log-probs."""
        return self.logprobs_mode == RESIDUAL

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Provenance":
        """The inverse of `to_json`."""
        parity = data.get("parity")
        return cls(**{**data, "model": ModelId(**data["model"]), "parity": None if parity is None else Parity(**parity)})


@frozen
class Commit:
    """One entry of a store's history.

    Args:
        number: its place, from 0.
        kind: what was committed.
        rows: rollouts that were added, scored, rewritten or quarantined.
        tokens: prompt and response tokens of added rollouts; scored response tokens; or tokens that a compaction rewrote.
        column: of the scores, or of those that could not be computed; or None.
        when: seconds since 1970, by the writer's clock.
        rounding: largest error in nats by which a log-prob was rounded to the store's type.
    """

    number: int
    kind: Literal["rollouts", "scores", "generation", "compaction", "quarantine"]
    rows: int
    tokens: int
    column: str | None
    when: float
    rounding: float = 0.0


@frozen
class Lineage:
    """What a student was trained on: kept beside its weights, and copied into the manifest of what it samples.

    Args:
        sft_teacher: the model that wrote the SFT data; `mixture_id` of several.
        opd_teacher: the model whose scores it was distilled on.
    """

    sft_teacher: ModelId | None = None
    opd_teacher: ModelId | None = field(default=None)

    def write(self, folder: str | Path) -> None:
        """Write it into a model's folder."""
        (Path(folder) / LINEAGE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "Lineage":
        """What is recorded in a model's folder; an empty lineage if nothing is."""
        path = Path(folder) / LINEAGE_FILE
        if not path.exists():
            return cls()
        try:
            data = json.loads(path.read_text())
            return cls(_model_or_none(data["sft_teacher"]), _model_or_none(data["opd_teacher"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(
                f"Lineage {path}: it cannot be read ({error!r}), expected what lopd wrote; restore or remove it."
            ) from error


def _difference(path: str, mine: Any, theirs: Any) -> str | None:
    if mine == theirs:
        return None
    if has(type(mine)) and type(mine) is type(theirs):
        names = [f.name for f in fields(type(mine))]
        found = (_difference(f"{path}.{name}".lstrip("."), getattr(mine, name), getattr(theirs, name)) for name in reversed(names))
        return next(difference for difference in found if difference)
    return f"{path} is {mine!r}, expected {theirs!r}"


def _model_or_none(data: Mapping[str, Any] | None) -> ModelId | None:
    return None if data is None else ModelId(**data)
