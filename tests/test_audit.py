"""Who wrote a text: the author is found, a stranger is seen as one, and what cannot be told is said to be so."""

import copy

import numpy as np
import pytest
import torch
from attrs import evolve

from lopd import MemoryStore, SamplingParams, audit, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import ArgumentError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.guards.audit import FOREIGN_Z
from lopd.records import Prompt, Scores, TopK
from lopd.records.estimates import mean
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout


@pytest.fixture(scope="module")
def candidates(llama):
    """Return three models near each other."""
    made = {"author": llama}
    for seed, name in enumerate(("second", "third")):
        model = copy.deepcopy(llama)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.06 * torch.randn_like(parameter))
        made[name] = model
    return made


@pytest.fixture(scope="module")
def text_of(candidates, tokenizer):
    def make(author, temperature=1.0, top_k=5, count=60, seed=3):
        sampling = SamplingParams(max_new_tokens=20, temperature=temperature, samples_per_prompt=count // 6, seed=seed, stop_ids=(0,))
        source = HFSource(candidates[author], tokenizer, sampling)
        store = MemoryStore(source.manifest)
        collect_rollouts(source, [Prompt(f"p{i}", [10 + i, 20, 30 + i]) for i in range(6)], store)
        for name, model in candidates.items():
            score_rollouts(store, HFScorer(model, tokenizer, top_k=top_k), column=name)
        return store

    return make


@pytest.mark.parametrize("author", ["author", "second", "third"])
def test_the_author_is_named(author, text_of):
    found = audit(text_of(author), ["third", "second", "author"])
    assert found.author == found.candidates[0].column == author
    assert found.error < 0.01
    assert found.candidates[0].behind.mean == 0 < found.candidates[1].behind.mean
    assert abs(found.candidates[0].z) < FOREIGN_Z < found.candidates[1].z
    assert f"{author!r} is the likeliest author among the candidates" in found.verdict
    assert "the text is consistent with it" in found.verdict


def test_a_text_by_none_of_them_is_seen_as_such_if_the_columns_keep_a_top_k(text_of):
    found = audit(text_of("author"), ["second", "third"])
    assert found.author is None
    assert "Consistent with none of the candidates" in found.verdict
    blind = audit(text_of("author", top_k=0), ["second", "third"])
    assert blind.candidates[0].z is None
    assert "Cannot be told" in blind.verdict


def test_a_text_at_a_lower_temperature_is_surer_and_still_its_authors(text_of):
    found = audit(text_of("author", temperature=0.7, count=120), ["author", "second", "third"])
    assert found.author == "author"
    assert found.candidates[0].z < -2


def test_little_text_is_not_enough_to_tell(text_of):
    store = text_of("author", seed=7)
    found = audit(store, ["author", "second"], rows=np.array([0, 1]))
    assert found.author is None, "two rollouts prove as little as two tossed coins"
    assert found.error >= 0.25
    assert "Cannot be told" in found.verdict
    assert "2 rollouts" in found.verdict


def known_texts(rng, texts, noise=0.0, size=200):
    """Return texts drawn from known distributions over 6 tokens, and scores of a model whose logits differ by this noise.

    The scores keep 3 of the 6.
    """
    store, scores = MemoryStore(tiny_manifest()), []
    for text in range(texts):
        logits = np.log(rng.dirichlet(np.ones(6) * 0.5, size) + 1e-9)
        drawn = (rng.gumbel(size=logits.shape) + logits).argmax(-1)
        scored = np.exp(logits + noise * rng.standard_normal(logits.shape))
        p = scored / scored.sum(-1, keepdims=True)
        order = np.argsort(-p, axis=1)[:, :3]
        kept = np.take_along_axis(p, order, axis=1)
        rollout = tiny_rollout(f"r{text}", drawn)
        support = TopK(order, np.minimum(np.log(np.maximum(kept, 1e-30)), 0), np.clip(1 - kept.sum(1), 0, 1))
        scores.append(Scores.of(rollout, np.log(np.maximum(p[np.arange(size), drawn], 1e-30)), top_k=support))
        store.append([rollout])
    store.append_scores("m", evolve(tiny_provenance(), top_k=3), scores)
    return store


def test_under_the_author_z_is_standard_normal():
    rng = np.random.default_rng(0)
    store = known_texts(rng, 300)
    found = [audit(store, ["m"], rows=np.array([row])).candidates[0].z for row in range(300)]
    assert abs(np.mean(found)) < 4 / np.sqrt(300)
    assert 0.85 < np.std(found) < 1.15, "the 1 under the root takes a little"


def test_a_text_by_a_model_near_the_only_candidate_is_consistent_with_it_and_the_verdict_claims_no_more():
    """Logits that differ by 0.1: the verdict used to be that the candidate wrote it."""
    found = audit(known_texts(np.random.default_rng(1), 20, noise=0.1), ["m"])
    assert abs(found.candidates[0].z) < FOREIGN_Z
    assert found.verdict.startswith("'m' is the likeliest author among the candidates; the text is consistent with it (z ")
    assert "as it may be with a model near it" in found.verdict
    far = audit(known_texts(np.random.default_rng(1), 20, noise=2.0), ["m"])
    assert far.verdict.startswith("Consistent with none of the candidates")


def test_no_author_is_named_while_any_other_candidate_may_be_it():
    """The third is further behind than the second on average, and varies so much that the text may be its own."""
    store, rollouts = MemoryStore(tiny_manifest()), [tiny_rollout(f"r{i}", [5] * 10) for i in range(8)]
    store.append(rollouts)
    behind = {"a": [0.0] * 8, "b": [0.55, 0.45] * 4, "c": [6.0, -5.0, 6.0, -5.0, 6.0, -5.0, 7.0, -5.0]}
    for name, sums in behind.items():
        scores = [Scores.of(r, np.full(10, -(20 + total) / 10)) for r, total in zip(rollouts, sums, strict=True)]
        store.append_scores(name, tiny_provenance(name), scores)
    found = audit(store, [*behind])
    assert [candidate.column for candidate in found.candidates] == ["a", "b", "c"]
    assert (found.author, found.error) == (None, pytest.approx(0.39, abs=0.01))
    assert found.verdict.startswith("Cannot be told: a text by 'c' puts 'a' this far before it with a chance of 0.39")
    assert audit(store, ["a", "b"]).author == "a"


def test_a_row_that_is_named_often_counts_once():
    """Two rollouts that were named twelve times each looked like twenty-four."""
    store, items = MemoryStore(tiny_manifest()), [tiny_rollout("r0"), tiny_rollout("r1")]
    store.append(items)
    for name, gap in (("a", 0.0), ("b", 0.3)):
        store.append_scores(name, tiny_provenance(name), [Scores.of(r, [-1 - gap * (2 + i)] * 3) for i, r in enumerate(items)])
    assert audit(store, ["a", "b"], rows=np.array([1, 0] * 12)) == audit(store, ["a", "b"])


def test_intervals_are_over_prompts_and_the_error_is_over_rollouts():
    """Four samples that agree are not four draws of a prompt; given their prompts they are four draws of its author."""
    store, rollouts = MemoryStore(tiny_manifest()), [tiny_rollout(f"p{i}/s{s}/g0") for i in range(6) for s in range(4)]
    store.append(rollouts)
    for name, behind in (("a", 0.0), ("b", 0.1)):
        scores = [Scores.of(r, [-1 - (behind + 0.1) * (i // 4)] * 3) for i, r in enumerate(rollouts)]
        store.append_scores(name, tiny_provenance(name), scores)
    found = audit(store, ["a", "b"])
    assert [(c.surprisal.clusters, c.behind.clusters) for c in found.candidates] == [(6, 6)] * 2
    assert found.candidates[1].behind.mean == pytest.approx(0.25)
    alike = mean(0.1 * np.arange(6))
    assert (found.candidates[0].surprisal.ci95, found.candidates[1].behind.ci95) == pytest.approx([alike.ci95] * 2, rel=1e-4)
    assert (found.rollouts, found.author) == (24, "a")
    assert found.error < audit(store, ["a", "b"], rows=np.arange(0, 24, 4)).error


def test_masked_tokens_do_not_count():
    store = MemoryStore(tiny_manifest())
    rollouts = [tiny_rollout(f"r{i}", loss_mask=[True, False, True]) for i in range(4)]
    store.append([*rollouts, tiny_rollout("unmasked", loss_mask=[False] * 3)])
    for name, masked in (("a", -50.0), ("b", -0.1)):
        scores = [Scores.of(r, [-1.0, masked, -1.0 - i / 10]) for i, r in enumerate([*rollouts, store.read([4])[0].rollout])]
        store.append_scores(name, tiny_provenance(name), scores)
    found = audit(store, ["a", "b"])
    assert [c.surprisal.mean for c in found.candidates] == pytest.approx([1.075, 1.075])
    assert (found.rollouts, found.tokens) == (4, 8)
    assert found.author is None, "they agree on everything that counts"


def test_what_cannot_be_audited_is_refused():
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout("r")])
    store.append_scores("a", tiny_provenance("a"), [Scores.of(store.read([0])[0].rollout, [-1.0] * 3)])
    with pytest.raises(MissingScoresError, match="'b' is absent"):
        audit(store, ["a", "b"])
    with pytest.raises(ArgumentError, match=r"Audit: columns: it was given a str \('a'\), expected a list of texts"):
        audit(store, "a")
    for columns in ([], ["a", "a"]):
        with pytest.raises(InvalidRecordError, match="Audit"):
            audit(store, columns)
    for rows, error, says in (([], InvalidRecordError, "0 rows were chosen"), ([1], NoSuchRowError, "row 1 was chosen")):
        with pytest.raises(error, match=says):
            audit(store, ["a"], rows=np.array(rows, np.int64))
    alone = audit(store, (column for column in ["a"]))
    assert (alone.author, alone.error) == ("a", 1.0)
    assert "nothing shows whether the text is consistent with it" in alone.verdict
