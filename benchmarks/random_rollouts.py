"""Stores of random rollouts with scores, for measurements in which only sizes count."""

import numpy as np

from lopd import Manifest, ModelId, Rollout, SamplingParams, Scores
from lopd.protocols import LogprobStore
from lopd.records import Provenance, TokenizerId

TEACHER = ModelId("teacher", "0", "float32")


def random_manifest(words: TokenizerId, longest: int) -> Manifest:
    """Make the manifest of a made-up student, after SFT on the text of a made-up teacher."""
    return Manifest(words, ModelId("student", "0", "float32"), SamplingParams(longest), sft_teacher=TEACHER)


def fill(store: LogprobStore, rollouts: int, prompt: int, longest: int, typical: float | None = None) -> None:
    """Add rollouts, and what student and teacher say of them.

    Args:
        store: store with the manifest of `random_manifest`.
        rollouts: how many.
        prompt: tokens of each prompt.
        longest: tokens of the longest response.
        typical: the median response of log-normal lengths, such as those of reasoning models; None for responses that are all of the longest.
    """
    rng, words = np.random.default_rng(0), store.manifest.tokenizer
    drawn = np.full(rollouts, longest) if typical is None else rng.lognormal(np.log(typical), 0.7, rollouts)
    lengths = np.clip(drawn, min(16, longest), longest).astype(int)
    made = []
    for i, length in enumerate(lengths):
        ids = [rng.integers(2, words.vocab_size, size) for size in (prompt, length)]
        logprobs = -rng.exponential(1.0, length).astype(np.float32)
        made.append(Rollout(f"{i}/s0/g0", *ids, np.ones(length, bool), "stop", behavior_logprobs=logprobs))
    store.append(made)
    scores = [Scores(r.rollout_id, r.content_hash, -rng.exponential(1.0, r.response_ids.size).astype(np.float32)) for r in made]
    store.append_scores("teacher", Provenance(TEACHER, words.vocab_hash, "a benchmark"), scores)
