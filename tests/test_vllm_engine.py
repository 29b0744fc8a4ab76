"""VLLMSource and VLLMScorer on a real vLLM, against transformers on the same folders: `make test-engines`."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_environment  # noqa: F401
from attrs import asdict
from conftest import TOKENIZER_ID
from engine_models import LONGEST, VOCAB, drawn_logprobs, save_model
from second_runner import second_runner
from test_candidates import C, D, with_candidates

from lopd import collect_rollouts, score_rollouts
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.vllm import VLLMScorer, VLLMSettings, VLLMSource
from lopd.engines.vllm.engine import import_vllm
from lopd.errors import EngineError, InvalidRecordError
from lopd.records import Lineage, ModelId, Prompt, Rollout, SamplingParams
from lopd.testing import ScorerConformance, SourceConformance, tiny_rollout

# warnings of vLLM and of what it brings are its own
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
KINDS = ("llama_tied", "qwen3_padded")
TEACHER = ModelId("teacher", "weights:1", "float32")
EAGER = VLLMSettings(enforce_eager=True)
TOLERANCE = 1e-4

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return kind -> a folder with a model that knows its SFT teacher."""
    base = tmp_path_factory.mktemp("models")
    made = {kind: save_model(base / kind, kind, seed=3) for kind in KINDS}
    for folder in made.values():
        Lineage(sft_teacher=TEACHER).write(folder)
    return made


@pytest.fixture(scope="module")
def sources(folders):
    """Return `sources(kind, **sampling)`: a source; all of one kind share an engine."""
    engines = {}

    def get(kind, generation=0, **sampling):
        params = SamplingParams(**{"max_new_tokens": 12, **sampling})
        wide = VLLMSource.from_folder(folders[kind], SamplingParams(candidates=5), EAGER)
        engine = engines.setdefault(kind, wide.engine)
        return VLLMSource(engine, wide.tokenizer, params, wide.lineage, generation=generation)

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def scorers(folders):
    """Return `scorers(kind)`: a scorer with a top-5 support, or another; all of one kind share an engine."""
    made = {}

    def get(kind, **widths):
        wide = made.setdefault(kind, VLLMScorer.from_folder(folders[kind], EAGER, top_k=5, candidates=4, drawn=3))
        return VLLMScorer(wide.engine, wide.tokenizer, **widths or {"top_k": 5})

    yield get
    for scorer in made.values():
        scorer.close()


def as_lists(rollouts):
    return {r.rollout_id: r.response_ids.tolist() for r in rollouts}


def assert_scores_agree(ours, theirs, tolerance=TOLERANCE):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.rollout_id, a.content_hash) == (b.rollout_id, b.content_hash)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)


# --- the contract ---------------------------------------------------------------------------------------------------------------------


class TestVLLMSource(SourceConformance):
    @pytest.fixture(autouse=True)
    def _engines(self, sources, scorers):
        self.sources, self.scorers = sources, scorers

    def make(self, sampling, generation):
        return self.sources("qwen3_padded", generation, **asdict(sampling))

    def prompts(self):
        return [Prompt(f"p{i}", range(4, 5 + 2 * i)) for i in range(3)]

    def too_long(self):
        return Prompt("too long", [5] * LONGEST)

    def scorer(self):
        return self.scorers("qwen3_padded")


class TestVLLMScorer(ScorerConformance):
    @pytest.fixture(autouse=True)
    def _engines(self, scorers):
        self.scorers = scorers

    def make(self):
        return self.scorers("qwen3_padded")

    def tokenizer(self):
        return TOKENIZER_ID

    def rollouts(self):
        return [tiny_rollout(f"r{length}", range(4, 4 + length)) for length in (1, 3, 12)]

    def too_long(self):
        return tiny_rollout("too long", [5] * LONGEST)


class TestVLLMScorerOfCandidates(TestVLLMScorer):
    def make(self):
        return self.scorers("qwen3_padded", top_k=3, candidates=4, drawn=2)


# --- candidates -----------------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0}])
def test_a_source_keeps_the_most_likely_tokens_of_transformers_at_temperature_1(kind, settings, sources, folders):
    prompts = [Prompt(f"p{i}", range(4, 5 + 2 * i)) for i in range(3)]
    rollouts = sources(kind, samples_per_prompt=2, candidates=5, **settings).sample(prompts)
    for rollout, truth in zip(rollouts, HFScorer.from_folder(folders[kind], top_k=5).score(rollouts), strict=True):
        np.testing.assert_array_equal(rollout.candidates.ids, truth.top_k.ids)
        np.testing.assert_allclose(rollout.candidates.logprobs, truth.top_k.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(rollout.candidates.tail, truth.top_k.tail, atol=TOLERANCE)
        np.testing.assert_allclose(rollout.behavior_logprobs, truth.logprobs, atol=TOLERANCE)


def test_draws_beside_the_sampled_token_are_refused_with_who_makes_them(sources):
    with pytest.raises(InvalidRecordError, match=r"VLLMSource: drawn is 2, expected 0.*sample with HFSource"):
        sources("llama_tied", drawn=2)
    with pytest.raises(EngineError, match=r"gives 5 log-probs a token, expected 6"):
        sources("llama_tied", candidates=6)


@every_kind
@pytest.mark.parametrize("top_k", [0, 3])
def test_candidates_are_scored_as_by_transformers_in_whatever_parts_prompts_are_read(kind, top_k, folders, rollouts):
    given, widths = [with_candidates(rollout) for rollout in rollouts], {"top_k": top_k, "candidates": C, "drawn": D}
    small = VLLMSettings(enforce_eager=True, tokens_per_batch=8)
    with closing(VLLMScorer.from_folder(folders[kind], small, **widths)) as scorer:
        ours = scorer.score(given)
        # with the second model runner, vLLM does it itself
        assert scorer.engine._asks_worker == ("VLLM_USE_V2_MODEL_RUNNER" not in os.environ)
    theirs = HFScorer.from_folder(folders[kind], **widths)
    assert_scores_agree(ours, theirs.score(given))
    for a, b in zip(ours, theirs.score(given), strict=True):
        np.testing.assert_array_equal(a.top_k.ids, b.top_k.ids)
        np.testing.assert_allclose(a.top_k.logprobs, b.top_k.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(a.top_k.tail, b.top_k.tail, atol=TOLERANCE)
    assert (scorer.provenance.top_k, scorer.provenance.candidates, scorer.provenance.drawn) == (C + top_k + D, C, D)


def test_candidates_are_scored_with_the_second_model_runner_too(tmp_path):
    name = "test_candidates_are_scored_as_by_transformers_in_whatever_parts_prompts_are_read"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "vllm", "-p", "no:cacheprovider", f"{__file__}::{name}[3-qwen3_padded]"]
    ran = subprocess.run(
        command, env={**os.environ, **second_runner(tmp_path)}, capture_output=True, text=True, check=False, cwd=TESTS.parent
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "1 passed" in ran.stdout


# --- scoring --------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_scores_and_top_k_are_those_of_transformers_from_one_token_to_many(kind, scorers, folders, rollouts):
    assert min(len(r) for r in rollouts) == 2, "a prompt and a response of one token each must be among them"
    ours, theirs = scorers(kind).score(rollouts), HFScorer.from_folder(folders[kind]).score(rollouts)
    assert_scores_agree(ours, theirs)
    wide = HFScorer.from_folder(folders[kind])
    wide.top_k = 5
    for a, b in zip(ours, wide.score(rollouts), strict=True):
        np.testing.assert_array_equal(a.top_k.ids, b.top_k.ids)
        np.testing.assert_allclose(a.top_k.logprobs, b.top_k.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(a.top_k.tail, b.top_k.tail, atol=TOLERANCE)


def test_the_rows_of_a_padded_head_have_mass_before_they_are_cut_and_none_after(folders, rollouts, scorers):
    model = HFScorer.from_folder(folders["qwen3_padded"]).model
    ids = torch.tensor(rollouts[3].response_ids.tolist())
    with torch.no_grad():
        masses = model(ids[None]).logits[0].softmax(-1)[:, VOCAB:].sum(-1)
    assert masses.max() > 0.01, "the test needs padding rows whose mass shows"
    assert all(s.top_k.ids.max() < VOCAB for s in scorers("qwen3_padded").score(rollouts))


def test_scores_do_not_depend_on_what_was_asked_with_them_or_before(scorers, rollouts):
    scorer = scorers("qwen3_padded")
    together, backwards = scorer.score(rollouts), scorer.score(rollouts[::-1])[::-1]
    alone = [scorer.score([r])[0] for r in rollouts]
    assert_scores_agree(together, backwards, 1e-6)
    assert_scores_agree(together, alone, 1e-6)


def test_rollouts_longer_than_a_batch_and_as_long_as_the_context_allows_are_scored_in_parts(folders):
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(f"r{p}/s0/g0", rng.integers(4, VOCAB, p), rng.integers(4, VOCAB, LONGEST - 1 - p), np.ones(LONGEST - 1 - p, bool), "length")
        for p in (1, 40, LONGEST - 2)
    ]
    settings = VLLMSettings(enforce_eager=True, tokens_per_batch=16, least_tokens_per_batch=8)
    scorer = VLLMScorer.from_folder(folders["llama_tied"], settings)
    try:
        assert_scores_agree(scorer.score(rollouts), HFScorer.from_folder(folders["llama_tied"]).score(rollouts))
    finally:
        scorer.close()


def test_a_bfloat16_model_is_scored_with_float32_logits_as_transformers_scores_it(tmp_path, rollouts):
    folder = save_model(tmp_path / "bf16", "qwen3_padded", seed=5, dtype=torch.bfloat16)
    scorer = VLLMScorer.from_folder(folder, EAGER)
    hf = HFScorer.from_folder(folder)
    try:
        ours, theirs = scorer.score(rollouts), hf.score(rollouts)
        assert scorer.provenance.model == hf.provenance.model
    finally:
        scorer.close()
    gaps = np.abs(np.concatenate([a.logprobs - b.logprobs for a, b in zip(ours, theirs, strict=True)]))
    assert gaps.mean() < 0.05
    assert gaps.max() < 0.5


def test_provenance_says_the_same_model_as_transformers_and_another_engine(scorers, folders):
    ours, theirs = scorers("llama_tied").provenance, HFScorer.from_folder(folders["llama_tied"]).provenance
    assert ours.model == theirs.model
    assert (ours.vocab_hash, ours.logprobs_mode, ours.top_k) == (theirs.vocab_hash, "raw", 5)
    assert ours.engine == f"vllm {import_vllm().__version__}"


def test_a_running_scorer_has_no_prefix_cache_and_raw_logprobs(scorers, rollouts):
    scorer = scorers("llama_tied")
    scorer.score(rollouts)
    config = scorer.engine._llm.llm_engine.vllm_config
    assert config.cache_config.enable_prefix_caching is False
    assert config.model_config.logprobs_mode == "raw_logprobs"
    assert config.model_config.dtype == torch.float32


def test_an_engine_whose_memory_ran_out_is_built_smaller_and_gives_the_same(scorers, folders, rollouts):
    scorer = VLLMScorer.from_folder(folders["llama_tied"], VLLMSettings(enforce_eager=True, tokens_per_batch=64, least_tokens_per_batch=8))
    expected = scorer.score(rollouts)

    def runs_out(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer.engine._llm.generate = runs_out
    try:
        assert_scores_agree(scorer.score(rollouts), expected, 1e-6)
        assert scorer.engine.starts == 2
        assert scorer.engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 32
    finally:
        scorer.close()


# --- sampling -------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_reported_logprobs_are_what_transformers_says_of_the_sampled_tokens(kind, sources, folders, prompts):
    rollouts = sources(kind, samples_per_prompt=4).sample(prompts)
    assert [r.rollout_id for r in rollouts] == [f"p{i}/s{s}/g0" for i in range(len(prompts)) for s in range(4)]
    assert max(r.response_ids.max() for r in rollouts) < VOCAB
    for rollout, score in zip(rollouts, HFScorer.from_folder(folders[kind]).score(rollouts), strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, score.logprobs, atol=TOLERANCE)


@every_kind
@pytest.mark.parametrize("sampling", [{"temperature": 0.6}, {"top_p": 0.8}, {"temperature": 1.4, "top_p": 0.7}, {"temperature": 0.0}])
def test_both_log_probs_are_those_of_transformers(kind, sampling, sources, folders, prompts, scorers):
    rollouts = sources(kind, samples_per_prompt=2, **sampling).sample(prompts)
    model = HFScorer.from_folder(folders[kind]).model
    for rollout, scores in zip(rollouts, scorers(kind).score(rollouts), strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, scores.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(rollout.sampler_logprobs, drawn_logprobs(model, rollout, **sampling), atol=TOLERANCE)


@every_kind
def test_temperature_zero_gives_the_responses_of_transformers(kind, sources, folders, prompts):
    ours = sources(kind, temperature=0.0).sample(prompts)
    theirs = HFSource.from_folder(folders[kind], SamplingParams(max_new_tokens=12, temperature=0.0)).sample(prompts)
    assert as_lists(ours) == as_lists(theirs)
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in theirs]


def test_a_rollout_does_not_depend_on_what_it_was_batched_with(sources, prompts):
    source = sources("qwen3_padded", samples_per_prompt=2)
    together, again, backwards = source.sample(prompts), source.sample(prompts), source.sample(prompts[::-1])
    alone = [r for prompt in prompts for r in source.sample([prompt])]
    assert as_lists(together) == as_lists(again) == as_lists(backwards) == as_lists(alone)
    for a, b in zip(together, again, strict=True):
        np.testing.assert_array_equal(a.behavior_logprobs, b.behavior_logprobs)


def test_other_seeds_samples_generations_and_prompts_draw_other_tokens(sources):
    prompts = [Prompt(name, [5, 6, 7]) for name in ("a", "b")]
    wide = {"samples_per_prompt": 2, "temperature": 2.0, "stop_ids": (10**6,)}
    batches = [sources("llama_tied", **wide), sources("llama_tied", seed=1, **wide), sources("llama_tied", generation=1, **wide)]
    responses = [tuple(r.response_ids.tolist()) for source in batches for r in source.sample(prompts)]
    assert len(set(responses)) == 12


def test_first_tokens_follow_the_distribution_cut_and_tempered_and_their_logprobs_do_not(sources, folders):
    count, prompt = 3000, Prompt("p", [9, 10, 11, 12])
    rollouts = sources("qwen3_padded", samples_per_prompt=count, max_new_tokens=1, temperature=0.7, top_p=0.8).sample([prompt])
    model = HFScorer.from_folder(folders["qwen3_padded"]).model
    with torch.no_grad():
        logits = model(torch.tensor([prompt.token_ids.tolist()])).logits[0, -1, :VOCAB].double()
    probabilities = (logits / 0.7).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    kept = order[ordered.cumsum(0) - ordered < 0.8]
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    drawn = Counter(int(r.response_ids[0]) for r in rollouts)
    assert set(drawn) <= set(kept.tolist())
    for token in kept.tolist():
        p = float(expected[token])
        assert abs(drawn[token] / count - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3
    raw = logits.log_softmax(-1)
    for rollout in rollouts[:50]:
        assert abs(rollout.behavior_logprobs[0] - float(raw[rollout.response_ids[0]])) < TOLERANCE


def test_pain_08_a_response_keeps_the_id_that_ended_it_and_its_logprob(sources, prompts):
    stops = tuple(range(30))
    rollouts = sources("llama_tied", samples_per_prompt=4, stop_ids=stops).sample(prompts)
    ended = [r for r in rollouts if r.finish_reason == "stop"]
    assert len(ended) > 5
    for rollout in rollouts:
        hits = [i for i, token in enumerate(rollout.response_ids.tolist()) if token in stops]
        assert hits == ([rollout.response_ids.size - 1] if rollout.finish_reason == "stop" else [])
        assert rollout.behavior_logprobs.size == rollout.response_ids.size


def test_eos_of_the_model_ends_a_response_unless_other_ids_are_asked_for(sources):
    prompts = [Prompt(f"p{i}", [5, i + 4]) for i in range(40)]
    hot = {"temperature": 2.0, "max_new_tokens": 60}
    by_default = sources("llama_tied", **hot).sample(prompts)
    ended = [r for r in by_default if r.finish_reason == "stop"]
    assert ended
    assert all(r.response_ids[-1] == 0 and 0 not in r.response_ids[:-1] for r in ended)
    never = sources("llama_tied", stop_ids=(10**6,), **hot).sample(prompts)
    assert all((r.finish_reason, r.response_ids.size) == ("length", 60) for r in never)
    assert any(0 in r.response_ids for r in never)


def test_responses_stop_at_the_asked_length_and_at_the_end_of_the_context(sources):
    short, long = Prompt("short", [5]), Prompt("long", [5] * (LONGEST - 3))
    rollouts = sources("llama_tied", max_new_tokens=7, stop_ids=(10**6,)).sample([short, long])
    assert [(r.response_ids.size, r.finish_reason) for r in rollouts] == [(7, "length"), (3, "length")]


def test_seeds_survive_prompts_that_are_longer_than_a_batch(folders):
    settings = VLLMSettings(enforce_eager=True, tokens_per_batch=16, least_tokens_per_batch=8)
    prompts = [Prompt(f"p{i}", [4 + (7 * i + j) % 90 for j in range(60 + i)]) for i in range(12)]
    params = SamplingParams(max_new_tokens=6, samples_per_prompt=2)
    source = VLLMSource.from_folder(folders["qwen3_padded"], params, settings)
    try:
        first, backwards = source.sample(prompts), source.sample(prompts[::-1])
        assert source.engine.starts == 1, "the engine died on the way"
    finally:
        source.close()
    assert as_lists(first) == as_lists(backwards)


def test_a_closed_source_starts_again_and_samples_the_same(sources, prompts):
    source = sources("llama_tied")
    before, starts = source.sample(prompts), source.engine.starts
    source.close()
    assert source.engine._llm is None
    assert as_lists(source.sample(prompts)) == as_lists(before)
    assert source.engine.starts == starts + 1


@every_kind
def test_the_manifest_is_that_of_transformers_on_the_same_folder(kind, sources, folders):
    ours, theirs = sources(kind).manifest, HFSource.from_folder(folders[kind], SamplingParams(max_new_tokens=12)).manifest
    assert ours == theirs
    assert ours.sft_teacher == TEACHER


def test_both_phases_through_a_store(sources, scorers, prompts, tmp_path):
    source = sources("qwen3_padded", samples_per_prompt=2)
    store = ZarrStore.create(tmp_path / "store", source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=3)
    score_rollouts(store, scorers("qwen3_padded"), rollouts_per_batch=4)
    for record in store.read(range(len(store)), columns=["behavior", "teacher"], top_k=["teacher"]):
        np.testing.assert_allclose(record.scores["behavior"], record.scores["teacher"], atol=1e-5)
        assert record.top_k["teacher"].ids.shape == (record.rollout.response_ids.size, 5)


# --- processes of their own -----------------------------------------------------------------------------------------------------------


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], check=False, capture_output=True, text=True, cwd=TESTS, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_an_engine_process_that_is_killed_is_started_anew_or_the_run_ends_with_everything_before_kept(folders, tmp_path):
    assert "killed twice" in run("vllm_kill_worker.py", folders["llama_tied"], tmp_path / "store")


def test_the_example_collects_scores_and_trains_phase_by_phase(folders, tmp_path):
    prompts, store, out = tmp_path / "prompts.jsonl", tmp_path / "store", tmp_path / "opd"
    prompts.write_text("".join(json.dumps({"prompt": f"what is {i}?"}) + "\n" for i in range(6)))
    save_model(tmp_path / "teacher", "llama_tied", seed=9)
    models = ["--student", folders["llama_tied"], "--teacher", tmp_path / "teacher"]
    sizes = ["--max-new-tokens", "8", "--steps", "3", "--rollouts-per-step", "6", "--any-teacher"]
    command = [EXAMPLES / "vllm_pipeline.py", "--prompts", prompts, "--store", store, "--out", out, *models, *sizes]
    assert run(*command).count("gap to the teacher") == 3
    rollouts = ZarrStore.open(store)
    assert len(rollouts) == 6
    assert rollouts.columns["teacher"].model == Lineage.read(out).opd_teacher == HFScorer.from_folder(tmp_path / "teacher").provenance.model
    assert run(*command, "--phases", "collect", "score").count("StepMetrics") == 0, (
        "a second call finds both phases done and trains nothing"
    )


def test_workers_of_ray_with_a_vllm_each_sample_and_score_as_one_in_this_process_does(folders, sources, scorers):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from lopd.engines.on_ray import RayScorer, RaySource

    folder, prompts = folders["llama_tied"], [Prompt(f"p{i}", [5 + i, 9, 20]) for i in range(7)]
    source, scorer = sources("llama_tied", samples_per_prompt=2), scorers("llama_tied")
    expected = source.sample(prompts)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with closing(RaySource(partial(VLLMSource.from_folder, folder, source.sampling, EAGER))) as spread:
            assert spread.manifest == source.manifest
            found = spread.sample(prompts)
        with closing(RayScorer(partial(VLLMScorer.from_folder, folder, EAGER, top_k=5))) as spread_scorer:
            scores = spread_scorer.score(expected)
            assert spread_scorer.provenance == scorer.provenance
    finally:
        ray.shutdown()
    assert [r.rollout_id for r in found] == [r.rollout_id for r in expected]
    assert as_lists(found) == as_lists(expected)
    for ours, theirs in zip(scores, scorer.score(expected), strict=True):
        assert ours.rollout_id == theirs.rollout_id
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=TOLERANCE)
