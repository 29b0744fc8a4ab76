"""What every engine does with what it is given: the checks before it computes anything, batches, what ends a response, random streams."""

from collections.abc import Collection, Sequence, Set
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lopd.errors import ContextOverflowError, InvalidRecordError
from lopd.records.checks import check_at_least, check_kind, check_list, check_number
from lopd.records.identity import TokenizerId
from lopd.records.manifest import SamplingParams
from lopd.records.rollouts import Prompt, Rollout, floor_logprobs
from lopd.records.support import TopK

T = TypeVar("T")
#: vLLM takes signed 64-bit seeds, and reads -1 as none.
SEED_BITS = 63
#: What leaves the distribution of a model as it is, by vLLM's names.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def check_prompts(
    prompts: Sequence[Prompt], tokenizer: TokenizerId, context: int, borders: Sequence[int] = (), max_new_tokens: int = 0
) -> None:
    """Check that each prompt has ids of this vocabulary and leaves room for a response in a context of `context` positions.

    Its response may not cross a rope border: its first tokens would then be drawn from another function than they are scored with.

    Raises:
        ArgumentError: they are not a list, or one is something else, such as a text.
        ContextOverflowError: the first that leaves none, or whose response of up to `max_new_tokens` could cross one of `borders`.
        InvalidRecordError: the first with an id outside the vocabulary.
    """
    check_list("Prompts", prompts)
    for prompt in prompts:
        check_kind("Prompt", prompt, Prompt, "pass those of `make_prompts` or `read_prompts`")
        owner = f"Prompt {prompt.prompt_id!r}"
        _check_ids(owner, prompt.token_ids, tokenizer)
        if prompt.token_ids.size >= context:
            raise ContextOverflowError(
                f"{owner}: it has {prompt.token_ids.size} tokens, expected fewer than the model's context of {context}; shorten it or drop it."
            )
        length = min(prompt.token_ids.size + max_new_tokens, context)
        crossed = next((border for border in borders if prompt.token_ids.size <= border < length), None)
        if crossed is not None:
            raise ContextOverflowError(
                f"{owner}: with its response it has up to {length} tokens, expected at most {crossed}, where LongRoPE "
                "changes the angles of all positions; sample with a smaller `max_new_tokens`, or drop the prompt."
            )


def check_rollouts(rollouts: Sequence[Rollout], tokenizer: TokenizerId, context: int, candidates: int = 0, drawn: int = 0) -> None:
    """Check that each rollout has ids of this vocabulary, fits into `context` positions, and has so many candidates and drawn ones.

    Raises:
        ArgumentError: they are not a list, or one is something else, such as a prompt.
        ContextOverflowError: the first that does not fit.
        InvalidRecordError: the first with an id outside the vocabulary, or without the candidates.
    """
    check_list("Rollouts", rollouts)
    for rollout in rollouts:
        check_kind("Rollout", rollout, Rollout, "pass those that a source sampled, or `record.rollout` of a store's records")
        owner = f"Rollout {rollout.rollout_id!r}"
        if len(rollout) > context:
            raise ContextOverflowError(
                f"{owner}: it has {len(rollout)} tokens, expected at most the context of {context}; use a teacher with a longer one."
            )
        _check_ids(owner, rollout.prompt_ids, tokenizer)
        _check_ids(owner, rollout.response_ids, tokenizer)
        if candidates or drawn:
            _check_ids(owner, asked_ids(rollout, candidates, drawn), tokenizer, "a candidate of token")


def _check_ids(owner: str, ids: NDArray[np.int32], tokenizer: TokenizerId, what: str = "token") -> None:
    outside = np.argwhere(ids >= tokenizer.vocab_size)
    if outside.size:
        place = tuple(outside[0].tolist())
        raise InvalidRecordError(
            f"{owner}: {what} {place[0]} is id {ids[place]}, expected an id below the vocabulary's {tokenizer.vocab_size}; "
            "tokenise with this model's tokenizer, and leave out added tokens that it has no row for."
        )


def asked_ids(rollout: Rollout, candidates: int, drawn: int) -> NDArray[np.int32]:
    """Return (T, candidates + drawn) ids that a scorer is asked for: the first candidates of a rollout, and its last drawn ones.

    Raises:
        InvalidRecordError: it has fewer.
    """
    support = rollout.candidates
    ids_TK = np.zeros((rollout.response_ids.size, 0), np.int32) if support is None else support.ids
    found = (0, 0) if support is None else (support.distinct, support.drawn)
    if found[0] < candidates or found[1] < drawn:
        raise InvalidRecordError(
            f"Rollout {rollout.rollout_id!r}: it has {found[0]} candidates and {found[1]} drawn ones a token, expected at least {candidates} and "
            f"{drawn}; collect it with SamplingParams(candidates={candidates}, drawn={drawn}), and let `score_rollouts` attach them."
        )
    return np.concatenate([ids_TK[:, :candidates], ids_TK[:, ids_TK.shape[1] - drawn :]], axis=1)


def check_top_k(owner: str, top_k: int, tokenizer: TokenizerId, name: str = "top_k") -> None:
    """Check that a vocabulary has so many distinct ids.

    Raises:
        InvalidRecordError: it has fewer, or the number is below 0; `name` is what the message calls it.
    """
    check_number(owner, name, top_k, 0 <= top_k <= tokenizer.vocab_size, f"0 to {tokenizer.vocab_size}")


def check_support(owner: str, tokenizer: TokenizerId, top_k: int, candidates: int, drawn: int) -> None:
    """Check the widths that a scorer is made with: the candidates and its own most likely tokens are distinct ids of one vocabulary.

    Raises:
        InvalidRecordError: a width is below 0, or the vocabulary has fewer ids.
    """
    for name, width in (("top_k", top_k), ("candidates", candidates), ("candidates + top_k", candidates + top_k)):
        check_top_k(owner, width, tokenizer, name)
    check_at_least(owner, "drawn", drawn, 0)


def budgeted(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return indices in runs of similar length whose padded size, the longest times how many, stays within the budget; one too long is alone."""
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[i] <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def all_ids(rollout: Rollout) -> list[int]:
    """Return prompt and response."""
    return [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]


def in_order(order: Sequence[int], results: Sequence[T], each: int = 1) -> list[T]:
    """Return results of items that were asked for in this order, `each` for one item, in the order of the items."""
    places = np.argsort(np.array(order, np.int64))
    return [results[place * each + k] for place in places.tolist() for k in range(each)]


def stop_ids(sampling: SamplingParams, configured: int | Collection[int] | None, tokenizer: TokenizerId) -> frozenset[int]:
    """Return ids that end a response: those asked for, or the EOS ids of the model's generation configuration and of the tokenizer."""
    if sampling.stop_ids:
        return frozenset(sampling.stop_ids)
    # programs put sets there, numbers of numpy and torch, and tensors on a GPU
    plain: Any = list(configured) if isinstance(configured, Set) else configured
    ids = np.asarray(plain.tolist() if hasattr(plain, "tolist") else plain).reshape(-1).tolist()
    return frozenset(i for i in [*ids, tokenizer.eos_id] if i is not None)


def stream_seed(sampling: SamplingParams, rollout_id: str, bits: int) -> int:
    """Return at most 128 bits that are the rollout's own: of the run's seed and of prompt, sample and generation, which its id names."""
    return int.from_bytes(blake2b(f"{sampling.seed}|{rollout_id}".encode(), digest_size=16).digest(), "little") & ((1 << bits) - 1)


def sampling_settings(sampling: SamplingParams, stops: Collection[int], tokenizer: TokenizerId) -> dict[str, Any]:
    """Return all settings for which vLLM has its own defaults, some of which come with the weights; log-probs are of the sampled token alone.

    Stop ids are named, and its own idea of EOS is turned off: the two may differ.  An id outside the vocabulary ends nothing, and vLLM refuses it.
    """
    ends = sorted(token for token in stops if token < tokenizer.vocab_size)
    given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "n": 1, "logprobs": 0}
    return {**NEUTRAL, **given, "min_tokens": 0, "ignore_eos": True, "stop_token_ids": ends}


def make_rollout(
    name: str,
    prompt_ids: NDArray[np.int32],
    ids: Sequence[int],
    logprobs: Any,
    drawn: Any,
    *,
    stops: Collection[int],
    generation: int,
    candidates: TopK | None = None,
) -> Rollout:
    """Return a rollout as it was sampled: all of its tokens count, and it ends at a stop id or for its length.

    Args:
        name: its id.
        prompt_ids: what is answered.
        ids: (T,) sampled tokens, at least one.
        logprobs: (T,) of them, nats, at temperature 1; -inf becomes the floor.  None where the engine reported none.
        drawn: (T,) of them, nats, in the distribution that they were drawn from; None where that is the one at temperature 1, too.
        stops: ids that end a response.
        generation: round of sampling.
        candidates: what the engine kept while it sampled, see `lopd.engines.supports.make_support`.

    Raises:
        InvalidRecordError: something is not a log-prob; it names the rollout.
    """
    return Rollout(
        rollout_id=name,
        prompt_ids=prompt_ids,
        response_ids=np.array(ids, np.int64),
        loss_mask=np.ones(len(ids), np.bool_),
        finish_reason="stop" if int(ids[-1]) in stops else "length",
        behavior_logprobs=None if logprobs is None else floor_logprobs(logprobs)[0],
        generation=generation,
        sampler_logprobs=None if drawn is None else floor_logprobs(drawn)[0],
        candidates=candidates,
    )
