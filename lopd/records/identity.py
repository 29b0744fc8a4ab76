"""Which model, and which tokenizer: identities that are compared, and fingerprints that make them.

A name is not an identity.  Models are compared by a revision that is a commit, a step or a hash of the function; tokenizers by a hash of
the whole token-to-id map (two vocabularies of the same size are still two vocabularies).

A hash of the function is `weights:<parameters>/<rest>`: parameters by name and value; then the buffers and the settings that decide what
is computed from them.  lopd 0.2 recorded `weights:<parameters>` alone: such an identity is compared by its parameters.
A revision with more in it than one such hash, as that of an ensemble, is compared as text, with the name.
"""

import json
import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Protocol

import torch
from attrs import field, frozen
from torch import Tensor

from lopd.errors import ArgumentError, printable
from lopd.records.checks import a_kind, check_kind, check_number, own_numbers, own_texts

_HASHED = "weights:"
_REST = "/"
_HASH = re.compile(rf"{_HASHED}([\w.-]+)({_REST}?)([\w.-]*)")
_TOGETHER = " + "


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


@frozen(eq=False)
class ModelId:
    """A model that can be recognised again.  Equal if function and dtype are; the name counts only where the revision is not a hash.

    Several models together (`mixture_id`) are one too: the teachers whose texts were put together for SFT, for example.

    Args:
        name: for people.
        revision: commit, step or hash of the function (`lopd.engines.identity.model_id`).
        dtype: type of the weights in use.

    Raises:
        InvalidRecordError: a field is not text.
    """

    name: str
    revision: str
    dtype: str

    def __attrs_post_init__(self) -> None:
        own_texts(self, "ModelId")

    def __str__(self) -> str:
        """Return `name@revision`, shortened and printable."""
        return printable(_TOGETHER.join(f"{part.name}@{_short(part.revision)}" for part in self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelId) and self.same_weights(other) and self.dtype == other.dtype

    def __hash__(self) -> int:
        # not of the rest of a function, which one of two equal identities may lack
        return hash((frozenset(_key(part)[:2] for part in self.parts), self.dtype))

    def same_weights(self, other: "ModelId") -> bool:
        """Return whether both are the same function, in whatever dtype, and under whatever name if it was hashed."""
        mine, theirs = set(map(_key, self.parts)), set(map(_key, other.parts))
        return all(any(_fits(a, b) for b in theirs) for a in mine) and all(any(_fits(a, b) for a in mine) for b in theirs)

    def same_parameters(self, other: "ModelId") -> bool:
        """Return whether both have the same weights, and perhaps other settings or buffers."""
        return {_key(part)[:2] for part in self.parts} == {_key(part)[:2] for part in other.parts}

    @property
    def parts(self) -> "tuple[ModelId, ...]":
        """The models of a mixture; a single model is its only part."""
        names, revisions, dtypes = (value.split(_TOGETHER) for value in (self.name, self.revision, self.dtype))
        if len(names) == len(revisions) == len(dtypes) > 1:
            return tuple(map(ModelId, names, revisions, dtypes))
        return (self,)


#: The unknown author of a text; a student that learns such a text has no recorded SFT teacher.
UNKNOWN = ModelId("unknown", "unknown", "unknown")


def _key(model: ModelId) -> tuple[str, str, str]:
    """Return name, parameters and the rest of a function; "" where it does not count or was not recorded."""
    hashed = _HASH.fullmatch(model.revision)
    if not hashed:
        return model.name, model.revision, ""  # "main" is a revision of many models; a hash is one of one
    return "", hashed[1], hashed[3]


def _fits(a: tuple[str, str, str], b: tuple[str, str, str]) -> bool:
    return a[:2] == b[:2] and (a[2] == b[2] or not a[2] or not b[2])


def rounding_note(one: ModelId, other: ModelId) -> str:
    """Return, in brackets, why one model may have both hashes, as adapters that two processors merge, or lopd 0.2 hashed, do; else ""."""
    (plain, a, mine), (other_plain, b, theirs) = _key(one), _key(other)
    if a == b or plain or other_plain or one.name != other.name or len({mine, theirs} - {""}) != 1:
        return ""
    if mine != theirs:
        return (
            " (lopd 0.2 recorded one of them: if it is a model with adapters, compiled, or in float64, 0.2 hashed it otherwise; see 'What makes two "
            "models the same' in the concepts)"
        )
    return (
        " (if both are the same adapters, not merged, another processor rounds otherwise: merge them once and use that folder everywhere)"
    )


def _short(revision: str) -> str:
    short, hashes = _HASH.subn(lambda found: found[1][:12] + found[2] + found[3][:4], revision)  # that of an ensemble has several
    name, slash, rest = revision.partition(_REST)
    return short if hashes else name[:12] + slash + rest[:4]


def mixture_id(models: Iterable[ModelId]) -> ModelId:
    """Return the identity of several models together, in whatever order; of one model its own.

    >>> a, b = ModelId("a", "1", "bfloat16"), ModelId("b", "7", "bfloat16")
    >>> print(mixture_id([b, a, b]))
    a@1 + b@7
    """
    distinct = {_key(part): part for model in models for part in model.parts}
    # one that lacks the rest of its function is left out where the same parameters are there with it
    ordered = [distinct[key] for key in sorted(distinct) if key[2] or not any(key != other and _fits(key, other) for other in distinct)]
    name, revision, dtype = (_TOGETHER.join(getattr(model, part) for model in ordered) for part in ("name", "revision", "dtype"))
    return ModelId(name, revision, dtype)


def hash_function(parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]], settings: str) -> str:
    """Return the revision of a function: of its parameters and saved buffers, each sorted by name, and of the settings that decide it."""
    rest = _digest(f"{hash_weights_in_order(buffers)}|{settings}".encode())
    return f"{hash_weights_in_order(parameters)}{_REST}{rest}"


def hash_weights_in_order(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and values of tensors that come sorted by name, one at a time (some seconds per GB).

    Of values, not of the dtype that holds them: bfloat16 weights loaded as float32 are still the same model.
    """
    digest = blake2b(digest_size=16)
    for name, tensor in named_tensors:
        data = _narrowest(tensor.detach().cpu().contiguous())
        digest.update(f"{name}|{data.dtype}|{tuple(data.shape)}|".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return _HASHED + digest.hexdigest()


def _narrowest(tensor: Tensor) -> Tensor:
    """Return the same values in the first dtype that loses nothing."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if tensor.is_floating_point() and (tensor.dtype == dtype or torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)):
            return tensor.to(dtype)
    return tensor


class HasVocabulary(Protocol):
    """Something whose token ids are of one tokenizer, which it names: a `TokenizerId`, `Provenance` or `lopd.records.Step`."""

    @property
    def vocab_hash(self) -> str | None:
        """Hash of the whole token-to-id map; None if it was not recorded."""
        ...


@frozen
class TokenizerId:
    """Fingerprint of a tokenizer.

    Args:
        vocab_hash: hash of the whole token-to-id map, added tokens included.
        vocab_size: highest id + 1.
        eos_id: end of a response, or None.
        bos_id: beginning of a text, or None.
        pad_id: padding, or None; may equal `eos_id`, nothing in lopd masks by it, and it is not part of the identity.
        template_hash: hash of the chat template, or "".

    Raises:
        InvalidRecordError: a field is of another type, or `vocab_size` is not one of a vocabulary whose ids are int32.
    """

    vocab_hash: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None = field(eq=False)
    template_hash: str

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "TokenizerId")
        own_texts(self, "TokenizerId")
        check_number("TokenizerId", "vocab_size", self.vocab_size, 0 < self.vocab_size <= 1 << 31, "from 1 to 2**31")

    def same_vocabulary(self, other: HasVocabulary) -> bool:
        """Return whether both map the same tokens to the same ids."""
        return self.vocab_hash == other.vocab_hash


class TokenizerLike(Protocol):
    """What a fingerprint needs of a tokenizer; transformers' tokenizers fit."""

    def get_vocab(self) -> dict[str, int]:
        """Return the whole token-to-id map."""
        ...


def fingerprint_tokenizer(tokenizer: TokenizerId | TokenizerLike) -> TokenizerId:
    """Return the identity of a tokenizer, from its full vocabulary map, special ids and chat template; an identity is its own.

    Raises:
        ArgumentError: it is something else, or its vocabulary is of bytes.
    """
    if isinstance(tokenizer, TokenizerId):
        return tokenizer
    check_kind("Tokenizer", tokenizer, TokenizerLike, "pass the tokenizer that belongs to the model")
    vocab = tokenizer.get_vocab()
    if any(isinstance(token, bytes) for token in vocab):
        raise ArgumentError(
            f"Tokenizer: the vocabulary of {a_kind(tokenizer)} is of bytes and lacks special tokens, expected text for every id; use the converted "
            "tokenizer (`tokenizer.json`)."
        )
    by_id = sorted((token_id, token) for token, token_id in vocab.items())
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerId(
        vocab_hash=_digest(json.dumps(by_id).encode()),
        vocab_size=by_id[-1][0] + 1,
        eos_id=getattr(tokenizer, "eos_token_id", None),
        bos_id=getattr(tokenizer, "bos_token_id", None),
        pad_id=getattr(tokenizer, "pad_token_id", None),
        # of several templates by name, which are listed as a file system has them
        template_hash=_digest(json.dumps(template, sort_keys=True).encode()) if template else "",
    )
