"""Small runs of the verbs: a policy, a teacher, stores, and sources that are interrupted."""

import copy

import numpy as np
import pytest
import torch
from conftest import TOKENIZER_ID

from lopd import collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.student import CausalLMStudent
from lopd.records import Lineage, SamplingParams, Scores

VOCAB = 96
PARAMS = SamplingParams(max_new_tokens=6, samples_per_prompt=2, stop_ids=(0, 5, 6, 7))


class Interrupted(Exception):  # noqa: N818
    """What stops a run in these tests."""


class Stopping:
    """A source or scorer that gives `calls` batches and then raises; it counts what it was asked for."""

    def __init__(self, inner, calls):
        self.inner, self.calls, self.asked = inner, calls, []

    @property
    def manifest(self):
        return self.inner.manifest

    @property
    def provenance(self):
        return self.inner.provenance

    def _take(self, items):
        self.asked.append(len(items))
        if len(self.asked) > self.calls:
            raise Interrupted

    def sample(self, prompts):
        self._take(prompts)
        return self.inner.sample(prompts)

    def score(self, rollouts):
        self._take(rollouts)
        return self.inner.score(rollouts)


class Bar:
    """A progress bar that writes down what it is told."""

    def __init__(self):
        self.told = []

    def begin(self, what, total, done, tokens, counted):
        self.told.append(("begin", what, total, done, tokens, counted))

    def advance(self, rollouts, tokens, quarantined):
        self.told.append(("advance", rollouts, tokens, quarantined))

    def end(self):
        self.told.append(("end",))

    @property
    def advanced(self):
        return [told[1] for told in self.told if told[0] == "advance"]


@pytest.fixture(params=["memory", "zarr"])
def make_store(request, tmp_path):
    """Return `make_store(manifest)`: a new, empty store of each kind."""
    made = []

    def make(manifest):
        made.append(1)
        return MemoryStore(manifest) if request.param == "memory" else ZarrStore.create(tmp_path / f"store{len(made)}", manifest)

    return make


def reopened(store, tmp_path):
    return store if isinstance(store, MemoryStore) else ZarrStore.open(sorted(tmp_path.glob("store*"))[-1])


@pytest.fixture
def source(llama, tokenizer):
    return HFSource(llama, tokenizer, PARAMS)


@pytest.fixture(scope="module")
def teacher_model(make_model):
    return make_model("llama_tied", seed=77)


@pytest.fixture(scope="module")
def scored(llama, tokenizer, prompts, teacher_model):
    """Return a store of the llama's rollouts, scored by the teacher that is recorded as its SFT teacher.  Only to be read."""
    scorer = HFScorer(teacher_model, tokenizer)
    made = HFSource(llama, tokenizer, PARAMS, Lineage(sft_teacher=scorer.provenance.model))
    store = MemoryStore(made.manifest)
    collect_rollouts(made, prompts, store)
    score_rollouts(store, scorer)
    return store


def behavior(store):
    return np.concatenate([r.scores["behavior"] for r in store.read(range(len(store)), columns=["behavior"])])


def column(store, name="teacher"):
    return [r.scores[name] for r in store.read(range(len(store)), columns=[name])]


def names(store, rows):
    return [record.rollout.rollout_id for record in store.read(rows)]


class Refusing:
    """A scorer that gives NaN for some rollouts, and reports another (true) number for none."""

    def __init__(self, inner, bad):
        self.inner, self.bad, self.asked = inner, set(bad), []
        self.provenance = inner.provenance

    def score(self, rollouts):
        self.asked.append(len(rollouts))
        good = self.inner.score(rollouts)
        return [Scores.of(r, s.logprobs * (np.nan if r.rollout_id in self.bad else 1)) for r, s in zip(rollouts, good, strict=True)]


def adamw(student):
    return torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.8, 0.95))


def plain_sgd(student):
    return torch.optim.SGD(student.parameters(), lr=1e-2)


def state_of(student, optimizer):
    """Return all numbers of a run: parameters, optimizer state, hyperparameters."""
    tensors = {f"parameter {name}": p.detach().clone() for name, p in student.named_parameters()}
    saved = optimizer.state_dict()
    for i, entry in saved["state"].items():
        tensors |= {f"{i} {k}": v.clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return tensors, saved["param_groups"]


def assert_same_state(a, b):
    assert a[0].keys() == b[0].keys()
    assert a[1] == b[1]
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


@pytest.fixture
def small(llama):
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    return student, adamw(student)


@torch.no_grad()
def exact_reverse_kl(policy, teacher, prompts):
    """Return the KL per token of two-token responses, over all first tokens and the whole vocabulary; a first token 0 ends the response."""
    gap, length = 0.0, 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids.tolist()])
        after = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
        logp, logq = (
            (m(input_ids=ids).logits[0, -1].double().log_softmax(-1), m(input_ids=after).logits[:, -1].double().log_softmax(-1))
            for m in (policy, teacher)
        )
        first = (logp[0].exp() * (logp[0] - logq[0])).sum()
        second = (logp[1].exp() * (logp[1] - logq[1])).sum(-1)
        goes_on = logp[0].exp().clone()
        goes_on[0] = 0
        gap += float(first + (goes_on * second).sum())
        length += 1 + float(goes_on.sum())
    return gap / length
