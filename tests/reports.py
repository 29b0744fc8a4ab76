"""What the tests of both reports share: a store with hostile tokens in two rounds, and the tokens of a page."""

import html
import re

import numpy as np

from lopd.records import ModelId, Scores
from lopd.testing import tiny_provenance, tiny_rollout

HOSTILE = ["<script>alert(1)</script>", "\"'><b>", "\ud83d", "\u202eabc", " word", "\n", "&amp;", "שלום", ""]


def decode(token):
    return HOSTILE[token] if token < len(HOSTILE) else f" w{token}"


def filled(store):
    store.begin_generation(1, ModelId("student", "step-5", "float32"))
    rng = np.random.default_rng(0)
    rollouts = []
    for i in range(12):
        ids = [*range(9), *rng.integers(9, 200, 10 + i)]
        mask = [t != 3 for t in range(len(ids))]
        logprobs = -rng.exponential(1.0, len(ids))
        rollouts.append(
            tiny_rollout(f"p{i}/s0/g{i % 2}", ids, prompt_ids=[9, 5, 0], loss_mask=mask, behavior_logprobs=logprobs, generation=i % 2)
        )
    store.append(rollouts)
    teacher = [Scores.of(r, np.minimum(r.behavior_logprobs + rng.normal(-1, 3, r.response_ids.size), 0)) for r in rollouts]
    store.append_scores("teacher", tiny_provenance("T"), teacher)
    return store


def tokens_of(text):
    """Return (class, attributes, text) of every token."""
    found = []
    for classes, attributes, inner in re.findall(r'<span class="(t [^"]*)"([^>]*)>(.*?)</span>', text, re.DOTALL):
        found.append((classes.split(), dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)), html.unescape(inner)))
    return found
