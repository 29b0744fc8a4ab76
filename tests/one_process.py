"""What several processes make of prompts beside what one process makes of them."""

import numpy as np
import pytest

from lopd import MemoryStore, SamplingParams, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.records import Prompt

SAMPLING = SamplingParams(max_new_tokens=8, samples_per_prompt=2, seed=3, candidates=3, drawn=2)
#: What the teacher scores of the policy's candidates, and keeps beside them.
KEPT = {"top_k": 2, "candidates": 3, "drawn": 2}
PROMPTS = [Prompt(f"p{i}", [5 + i, 9, 20 + i % 3]) for i in range(11)]
ENDLESS = Prompt("endless", [5] * 5000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, make_model):
    """Save a policy and a teacher, from where workers take them."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("policy", "teacher")}
    for seed, folder in enumerate(made.values()):
        make_model("llama_tied", seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def alone(folders):
    """Return the store that one process makes of the prompts."""
    source, scorer = HFSource.from_folder(folders["policy"], SAMPLING), HFScorer.from_folder(folders["teacher"], **KEPT)
    store = MemoryStore(source.manifest)
    collect_rollouts(source, PROMPTS, store)
    score_rollouts(store, scorer)
    return store


def assert_same(store, expected):
    """Check that rows and order are the same, and scores and candidates too, up to the rounding of batches with other rows."""
    assert len(store) == len(expected)
    columns = ("teacher", "policy")
    mine, expected_rows = (one.read(range(len(one)), columns, top_k=columns) for one in (store, expected))
    for ours, theirs in zip(mine, expected_rows, strict=True):
        assert (ours.rollout.rollout_id, ours.rollout.content_hash) == (theirs.rollout.rollout_id, theirs.rollout.content_hash)
        for column in columns:
            np.testing.assert_allclose(ours.scores[column], theirs.scores[column], atol=1e-4)
            # of candidates that are equally likely either may be kept
            alike_T = (ours.top_k[column].ids == theirs.top_k[column].ids).all(axis=1)
            assert (~alike_T).sum() <= 1
            np.testing.assert_allclose(ours.top_k[column].logprobs[alike_T], theirs.top_k[column].logprobs[alike_T], atol=1e-4)
