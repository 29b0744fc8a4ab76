"""A served table of log-probs: sources and scorers of it, and what to expect of them."""

import numpy as np
import pytest
from vllm_stub import EOS, VOCAB, Stub, answer, table

from lopd.engines import pool
from lopd.engines.server import Servers, ServerScorer, ServerSource
from lopd.records import ModelId, Prompt, Rollout, SamplingParams, TokenizerId

TOKENIZER = TokenizerId("table-vocabulary", VOCAB, EOS, None, None, "")
MODEL = ModelId("table", "1", "float32")
STOP = (EOS, 5)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(pool, "backoff", lambda _: 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def start():
    """Return `start(**settings)`, which starts one more server."""
    stubs = []

    def make(**settings):
        stubs.append(Stub(**settings))
        return stubs[-1]

    yield make
    for stub in stubs:
        stub.close()


@pytest.fixture
def stub(start):
    return start()


def servers_of(*stubs, **settings):
    return Servers([s.url for s in stubs], **{"model": "table", "patience_s": 20, "timeout_s": 20, **settings})


def scorer_of(*stubs, top_k=0, tokens_per_request=1, candidates=0, drawn=0, **settings):
    """Make a scorer that sends each rollout as a request of its own, unless a test changes that."""
    return ServerScorer(servers_of(*stubs, **settings), TOKENIZER, MODEL, top_k, tokens_per_request, candidates, drawn)


def source_of(*stubs, generation=0, eos_ids=STOP, servers=None, **sampling):
    params = SamplingParams(**{"max_new_tokens": 12, **sampling})
    return ServerSource(servers or servers_of(*stubs), TOKENIZER, MODEL, params, eos_ids, generation=generation)


def make_rollouts(count=12, seed=3):
    rng = np.random.default_rng(seed)
    sizes = [(1, 1), (1, 9), (8, 1), *rng.integers(1, 12, (count - 3, 2)).tolist()]
    return [
        Rollout(f"r{i}", rng.integers(0, VOCAB, p), rng.integers(0, VOCAB, t), np.ones(t, bool), "length") for i, (p, t) in enumerate(sizes)
    ]


def make_prompts(count=6, seed=4):
    rng = np.random.default_rng(seed)
    return [Prompt(f"p{i}", rng.integers(0, VOCAB, 1 + i)) for i in range(count)]


def truth(rollout):
    """Return the table's log-probs of the response: row n is about what stands at position n."""
    ids = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
    return np.array([table(ids)[n, ids[n]] for n in range(rollout.prompt_ids.size, len(ids))], np.float32)


def ids_of(rollout):
    return [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]


def is_for(rollout):
    return lambda request: ids_of(rollout) in request["prompt"]


def without(name):
    return lambda body: body["choices"][0].pop(name) and None


def refused(status, message):
    return answer(status, body={"error": {"message": message}})
