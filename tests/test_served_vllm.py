"""ServerSource and ServerScorer on a real vLLM server on loopback, against transformers on the same folder."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from conftest import build_tokenizer
from engine_models import drawn_logprobs
from second_runner import second_runner
from test_candidates import C, D, with_candidates

from lopd import collect_rollouts, score_rollouts
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.server import Servers, ServerScorer, ServerSource
from lopd.errors import ContextOverflowError, EngineError
from lopd.records import ModelId, Prompt, Rollout, SamplingParams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]

VOCAB, CONTEXT, TOLERANCE = 96, 128, 1e-4
START_S = 400
MODEL = ModelId("tiny", "1", "float32")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a tiny Qwen3, random but far from flat, whose heads are of a size that vLLM's kernels take."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("models") / "tiny"
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer = build_tokenizer()
    # vLLM 0.32 asks a chat template for letters that this tokenizer does not have, and does not start
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


class Server:
    """The server of a folder, in a process group of its own."""

    def __init__(self, folder, port, *arguments, environment):
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager"]
        self.log = folder.parent / f"server-{port}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **environment},
                start_new_session=True,
            )

    def wait(self):
        """Wait until the server answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):  # noqa: S310
                    return self
            except OSError:
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"vLLM did not answer within {START_S} s: {self.log.read_text()[-3000:]}")

    def kill(self):
        """Kill this server, with the processes it started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder, *arguments, port=None, environment=None):
    server = Server(folder, port or free_port(), *arguments, environment=environment or {})
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--enable-scale-out") as running:
        yield running


@pytest.fixture(scope="module")
def hf(folder):
    return HFScorer.from_folder(folder)


def servers_of(*servers, **settings):
    return Servers([s.url for s in servers], "tiny", **{"patience_s": 30, **settings})


def source_of(folder, server, **sampling):
    return ServerSource.from_folder(servers_of(server), folder, MODEL, SamplingParams(**{"max_new_tokens": 24, **sampling}))


def scorer_of(server, top_k=0, **widths):
    return ServerScorer(servers_of(server), build_tokenizer(), MODEL, top_k, **widths)


def assert_supports(rollouts, supports, hf):
    """Check that supports are those that transformers gives."""
    for support, truth in zip(supports, hf.score(rollouts), strict=True):
        np.testing.assert_array_equal(support.ids, truth.top_k.ids)
        np.testing.assert_allclose(support.logprobs, truth.top_k.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(support.tail, truth.top_k.tail, atol=TOLERANCE)


def make_prompts(count=12):
    rng = np.random.default_rng(0)
    return [Prompt(f"p{i}", rng.integers(4, VOCAB, 1 + i % 7)) for i in range(count)]


def make_rollouts():
    """Make rollouts of all lengths, none of them likely: 1 token on either side, the longest that fits."""
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (1, 30), (30, 1), (60, CONTEXT - 1 - 60), *rng.integers(1, 40, (20, 2)).tolist()]
    return [
        Rollout(f"r{i}", rng.integers(0, VOCAB, p), rng.integers(0, VOCAB, t), np.ones(t, bool), "length") for i, (p, t) in enumerate(sizes)
    ]


def distributions(model, rollout):
    """Return (T, V) log-probs by transformers."""
    ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, rollout.prompt_ids.size - 1 : -1].log_softmax(-1).numpy()


def as_lists(rollouts):
    return {r.rollout_id: (r.response_ids.tolist(), r.finish_reason) for r in rollouts}


def test_scores_are_those_of_transformers(server, hf):
    rollouts = make_rollouts()
    scorer = scorer_of(server)
    for scores, truth in zip(scorer.score(rollouts), hf.score(rollouts), strict=True):
        assert scores.content_hash == truth.content_hash
        np.testing.assert_allclose(scores.logprobs, truth.logprobs, atol=TOLERANCE)
    assert scorer.provenance.engine.startswith("vllm 0.")
    assert scorer.servers.served.context == CONTEXT


def test_candidates_are_the_most_likely_tokens_of_transformers_and_the_tail_is_the_rest(server, hf):
    rollouts = make_rollouts()
    for rollout, scores in zip(rollouts, scorer_of(server, top_k=5).score(rollouts), strict=True):
        truth_TV = distributions(hf.model, rollout)
        np.testing.assert_allclose(scores.top_k.logprobs, -np.sort(-truth_TV, -1)[:, :5], atol=TOLERANCE)
        np.testing.assert_allclose(np.take_along_axis(truth_TV, scores.top_k.ids.astype(int), -1), scores.top_k.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(scores.top_k.tail, 1 - np.exp(scores.top_k.logprobs.astype(float)).sum(-1), atol=1e-6)
        np.testing.assert_allclose(
            scores.logprobs, np.take_along_axis(truth_TV, rollout.response_ids[:, None].astype(int), -1)[:, 0], atol=TOLERANCE
        )


def test_its_plain_completions_score_as_transformers_do(folder, server):
    """As a hosted model is asked: nothing but `echo`, `logprobs` and tokens named by id."""
    rollouts, servers = make_rollouts(), servers_of(server, speaks="openai", context=CONTEXT)
    scorer = ServerScorer(servers, build_tokenizer(), MODEL, top_k=5)
    hf = HFScorer.from_folder(folder, top_k=5)
    for scores, truth in zip(scorer.score(rollouts), hf.score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(scores.top_k.logprobs, truth.top_k.logprobs, atol=TOLERANCE)
    assert servers.costs.prompt_tokens >= sum(map(len, rollouts))


def test_more_candidates_than_the_server_allows_is_an_error_that_says_how_to_start_it(server):
    with pytest.raises(EngineError, match="--max-logprobs"):
        scorer_of(server, top_k=21).score(make_rollouts()[:1])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0}])
def test_a_source_keeps_the_most_likely_tokens_of_transformers_at_temperature_1(server, folder, sampling):
    rollouts = source_of(folder, server, candidates=4, **sampling).sample(make_prompts()[:3])
    assert_supports(rollouts, [r.candidates for r in rollouts], HFScorer.from_folder(folder, top_k=4))


def test_candidates_are_scored_as_by_transformers_with_the_second_model_runner_and_refused_with_the_first(server, folder, tmp_path):
    given, widths = [with_candidates(rollout) for rollout in make_rollouts()], {"candidates": C, "drawn": D}
    with pytest.raises(EngineError, match=r"requires the V2 model runner.*expected log-probs of the candidates; serve with vLLM 0.32"):
        scorer_of(server, **widths).score(given)
    with serving(folder, "--enable-scale-out", "--skip-tokenizer-init", environment=second_runner(tmp_path)) as second:
        for top_k in (0, 3):
            scores = scorer_of(second, top_k, **widths).score(given)
            assert_supports(given, [s.top_k for s in scores], HFScorer.from_folder(folder, top_k=top_k, **widths))


def test_the_server_refuses_what_lopd_refuses_before_it_is_asked(server):
    """Our limits are the server's: past our own check, it answers the same."""
    rollout = Rollout("long", [5] * 60, [6] * (CONTEXT - 60), [True] * (CONTEXT - 60), "length")
    with pytest.raises(ContextOverflowError, match="'long'"):
        scorer_of(server).score([rollout])
    unchecked = scorer_of(server)
    with pytest.raises(ContextOverflowError, match=r"'long'.*answers 400"):
        unchecked.servers.ask([unchecked._request([rollout])])


def test_a_model_of_another_name_is_an_error_that_says_which_is_served(server):
    with pytest.raises(EngineError, match="serves 'tiny', expected 'big'"):
        ServerScorer(Servers(server.url, "big"), build_tokenizer(), MODEL).score(make_rollouts())


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}])
def test_reported_logprobs_are_those_of_transformers_whatever_the_sampling(server, folder, hf, sampling):
    rollouts = source_of(folder, server, samples_per_prompt=2, **sampling).sample(make_prompts())
    for rollout, truth in zip(rollouts, hf.score(rollouts), strict=True):
        np.testing.assert_allclose(rollout.behavior_logprobs, truth.logprobs, atol=TOLERANCE)


def test_greedy_responses_are_those_of_transformers(server, folder):
    model = HFSource.from_folder(folder, SamplingParams(max_new_tokens=24, temperature=0.0))
    assert as_lists(source_of(folder, server, temperature=0.0).sample(make_prompts())) == as_lists(model.sample(make_prompts()))


def test_the_same_seeds_give_the_same_rollouts_whatever_is_sampled_beside(server, folder):
    prompts = make_prompts()
    once = as_lists(source_of(folder, server, samples_per_prompt=2).sample(prompts))
    alone = as_lists([r for p in prompts[::-1] for r in source_of(folder, server, samples_per_prompt=2).sample([p])])
    assert once == alone
    assert len({tuple(ids) for ids, _ in once.values()}) == 24
    assert as_lists(source_of(folder, server, samples_per_prompt=2, seed=1).sample(prompts)) != once


def test_responses_end_at_stop_ids_which_are_kept_or_at_the_end_of_the_context(server, folder):
    stops = tuple(range(10, 30))
    rollouts = source_of(folder, server, stop_ids=stops, samples_per_prompt=2).sample(make_prompts())
    assert {r.finish_reason for r in rollouts} >= {"stop"}
    for rollout in rollouts:
        assert (rollout.finish_reason == "stop") == (int(rollout.response_ids[-1]) in stops)
        assert not set(rollout.response_ids[:-1].tolist()) & set(stops)
    (rollout,) = source_of(folder, server, stop_ids=(VOCAB + 1,), max_new_tokens=64).sample([Prompt("long", [7] * (CONTEXT - 3))])
    assert (rollout.response_ids.size, rollout.finish_reason) == (3, "length")


def test_a_server_that_is_killed_and_started_again_leaves_the_store_of_an_unbroken_run(folder, tmp_path):
    port = free_port()
    scorer = ServerScorer(
        Servers([f"http://127.0.0.1:{port}", f"http://localhost:{port}"], "tiny", patience_s=1), build_tokenizer(), MODEL, 3
    )
    store, whole = tmp_path / "store.zarr", tmp_path / "whole.zarr"
    with serving(folder, port=port) as server:
        source = source_of(folder, server, samples_per_prompt=4)
        for path in (store, whole):
            collect_rollouts(source, make_prompts(24), ZarrStore.create(path, source.manifest))
        score_rollouts(ZarrStore.open(whole), scorer, rollouts_per_batch=16)

        class Killer:
            """Kills the server while the batch after the first is under way."""

            def begin(self, *_):
                self.timer = threading.Timer(0.02, server.kill)

            def advance(self, *_):
                if not self.timer.ident:
                    self.timer.start()

            def end(self):
                self.timer.join()

        with pytest.raises(EngineError, match="expected an answer within 1 s"):
            score_rollouts(ZarrStore.open(store), scorer, rollouts_per_batch=16, progress=Killer())
    assert 16 <= ZarrStore.open(store).scored("teacher").sum() < 96
    patient = ServerScorer(
        Servers(f"http://127.0.0.1:{port}", "tiny", patience_s=START_S, first_contact_s=START_S), build_tokenizer(), MODEL, 3
    )
    again = Server(folder, port, environment={})
    try:
        score_rollouts(ZarrStore.open(store), patient, rollouts_per_batch=16)
    finally:
        again.kill()
    columns = (["teacher"], ["teacher"])
    for mine, theirs in zip(ZarrStore.open(store).read(range(96), *columns), ZarrStore.open(whole).read(range(96), *columns), strict=True):
        assert mine.rollout.content_hash == theirs.rollout.content_hash
        np.testing.assert_allclose(mine.scores["teacher"], theirs.scores["teacher"], atol=1e-5)
        np.testing.assert_array_equal(mine.top_k["teacher"].ids, theirs.top_k["teacher"].ids)


def test_a_server_that_reports_logprobs_after_temperature_gives_both_and_none_needs_a_tokenizer(folder, hf):
    with serving(folder, "--logprobs-mode", "processed_logprobs", "--skip-tokenizer-init") as server:
        for scores, truth in zip(scorer_of(server, top_k=5).score(make_rollouts()), hf.score(make_rollouts()), strict=True):
            np.testing.assert_allclose(scores.logprobs, truth.logprobs, atol=TOLERANCE)
        for sampling in ({"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 1.3, "top_p": 0.7}, {"temperature": 0.0}):
            rollouts = source_of(folder, server, **sampling).sample(make_prompts())
            for rollout, truth in zip(rollouts, hf.score(rollouts), strict=True):
                np.testing.assert_allclose(rollout.behavior_logprobs, truth.logprobs, atol=TOLERANCE)
                np.testing.assert_allclose(rollout.sampler_logprobs, drawn_logprobs(hf.model, rollout, **sampling), atol=TOLERANCE)
        assert len(source_of(folder, server).sample(make_prompts())) == 12
