"""The records that the suites test with, the Hypothesis strategies that make more of them, and what it means that two are equal."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lopd.records.identity import ModelId, TokenizerId
from lopd.records.manifest import Manifest, Provenance, SamplingParams
from lopd.records.rollouts import Rollout, Scores
from lopd.records.support import TopK


def tiny_manifest(vocab_size: int = 300) -> Manifest:
    """Return a manifest of a made-up policy; 300 ids do not fit into a byte, which is a border worth crossing."""
    tokenizer = TokenizerId("vocab-hash", vocab_size, eos_id=1, bos_id=None, pad_id=0, template_hash="")
    return Manifest(tokenizer, ModelId("policy", "rev-p", "float32"), SamplingParams(max_new_tokens=8))


def tiny_provenance(name: str = "teacher", top_k: int = 0, drawn: int = 0) -> Provenance:
    """Return the provenance of a made-up model."""
    return Provenance(ModelId(name, f"rev-{name}", "float32"), "vocab-hash", "made-up 1.0", top_k=top_k, drawn=drawn)


def tiny_rollout(rollout_id: str, response: Any = (5, 6, 1), **fields: Any) -> Rollout:
    """Return a rollout with a one-token prompt; `fields` are those of `Rollout`."""
    values: dict[str, Any] = {"prompt_ids": [4], "loss_mask": [True] * len(response), "finish_reason": "stop"} | fields
    return Rollout(rollout_id=rollout_id, response_ids=response, **values)


def tiny_scores(rollout: Rollout, logprob: float = -1.0) -> Scores:
    """Return scores with one value for every token."""
    return Scores.of(rollout, np.full(rollout.response_ids.size, logprob))


def tiny_top_k(length: int, k: int = 2, start: int = 0, drawn: int = 0) -> TopK:
    """Return a support of a made-up model: `k` equally likely tokens, and a tail of one half; the first of them drawn `drawn` times."""
    ids = start + np.arange(length * k).reshape(length, k) % 200
    again = np.r_[:k, [0] * drawn].astype(np.int64)
    return TopK(ids[:, again], np.full((length, k + drawn), np.log(0.5 / k)), np.full(length, 0.5), drawn)


def assert_same_top_k(left: TopK, right: TopK) -> None:
    """Check that every field is equal, and of the same type."""
    assert left.drawn == right.drawn
    for name in ("ids", "logprobs", "tail"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name, strict=True)


def _logprobs(length: int) -> st.SearchStrategy[list[float]]:
    # Certainty (0.0), the floor and the ugliest float32 are as likely as the rest.
    value = st.sampled_from([0.0, -100.0, -1e-45, -3.4e38]) | st.floats(min_value=-128.0, max_value=0.0, width=32)
    return st.lists(value, min_size=length, max_size=length)


@st.composite
def rollouts(draw: st.DrawFn, manifest: Manifest | None = None, ids: st.SearchStrategy[str] | None = None, max_tokens: int = 6) -> Rollout:
    """Return one legal rollout of any kind: short or long, masked or not, with log-probs of the engine or without.

    Args:
        draw: given by Hypothesis.
        manifest: whose vocabulary bounds the token ids; `tiny_manifest()` if None.
        ids: rollout ids; any text if None.
        max_tokens: cap on the prompt and on the response.
    """
    token = st.integers(0, (manifest or tiny_manifest()).tokenizer.vocab_size - 1)
    response = draw(st.lists(token, min_size=1, max_size=max_tokens))
    length = len(response)
    mask = st.just([True] * length) | st.lists(st.booleans(), min_size=length, max_size=length)
    return Rollout(
        rollout_id=draw(st.text(max_size=8) if ids is None else ids),
        prompt_ids=draw(st.lists(token, min_size=1, max_size=max_tokens)),
        response_ids=response,
        loss_mask=draw(mask),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        behavior_logprobs=draw(st.none() | _logprobs(length)),
        sampler_logprobs=draw(st.none() | _logprobs(length)),
    )


@st.composite
def scores_for(draw: st.DrawFn, rollout: Rollout) -> Scores:
    """Return legal scores of this rollout.

    Args:
        draw: given by Hypothesis.
        rollout: whose tokens were scored.
    """
    return Scores.of(rollout, draw(_logprobs(rollout.response_ids.size)), draw(st.integers(0, 2)))


def assert_same_rollout(left: Rollout, right: Rollout) -> None:
    """Check that every field is equal; an absent array equals only an absent one."""
    for name in ("rollout_id", "finish_reason", "generation", "content_hash"):
        assert getattr(left, name) == getattr(right, name), name
    for name in ("prompt_ids", "response_ids", "loss_mask", "behavior_logprobs", "sampler_logprobs"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name, strict=True)
