"""What surrounds vLLM, without vLLM: starting, dying, running out of memory and options.  A fake takes its place."""

import queue
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOKENIZER_ID
from engine_models import LONGEST, VOCAB, save_model
from test_candidates import with_candidates

from lopd import score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines.vllm import VLLMEngine, VLLMScorer, VLLMSettings, VLLMSource
from lopd.engines.vllm import engine as vllm_engine
from lopd.engines.vllm.engine import import_vllm
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, MissingDependencyError, ModelError, ModelWarning
from lopd.records import Manifest, ModelId, Prompt, Rollout, SamplingParams


class FakeVLLM:
    """The module vllm: gives -1 nats to every token of a prompt, and samples token 5; `faults` are raised, one a call,
    before it answers, and `unborn` where it is started."""

    __version__ = "0.0"

    def __init__(self):
        self.faults, self.started, self.requests, self.stopped = [], [], [], 0
        self.overrides, self.cut, self.unborn = {}, [], []

    SamplingParams = SimpleNamespace

    def LLM(self, **arguments):
        self.started.append(arguments)
        if self.unborn:
            raise self.unborn.pop()
        seen = {**arguments, **self.overrides}
        model = SimpleNamespace(logprobs_mode=seen["logprobs_mode"], get_vocab_size=lambda: self.overrides.get("rows", VOCAB))
        cache = SimpleNamespace(enable_prefix_caching=seen["enable_prefix_caching"])
        core = SimpleNamespace(shutdown=self.shutdown)
        second = self.overrides.get("second", False)
        config = SimpleNamespace(model_config=model, cache_config=cache, use_v2_model_runner=second)
        engine = SimpleNamespace(vllm_config=config, engine_core=core)
        return SimpleNamespace(llm_engine=engine, generate=self.generate, collective_rpc=self.rpc, reset_prefix_cache=lambda: True)

    def shutdown(self):
        self.stopped += 1

    def rpc(self, name, args=()):
        if name == "lopd_read_asked":
            return [self.overrides.get("asks", True)]
        if name == "lopd_head_dtypes":
            return [self.overrides.get("head", [])]
        self.cut.append(args)
        return [self.overrides.get("layers", 1)]

    def generate(self, requests, params, use_tqdm):
        assert use_tqdm is False
        self.requests.append(len(requests))
        if self.faults:
            fault = self.faults.pop(0)
            if fault is not None:
                raise fault
        return [self.answer(request["prompt_token_ids"], p) for request, p in zip(requests, params, strict=True)]

    def answer(self, ids, _params):
        n = len(ids)
        flat = SimpleNamespace(
            start_indices=[0, *range(n - 1)], end_indices=[0, *range(1, n)], token_ids=ids[1:], logprobs=[-1.0] * (n - 1)
        )
        one = SimpleNamespace(start_indices=[0], end_indices=[1], token_ids=[5], logprobs=[-2.0])
        completion = SimpleNamespace(token_ids=[5], logprobs=one, finish_reason="length")
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=flat, outputs=[completion])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tied", "llama_tied")


@pytest.fixture
def fake(monkeypatch):
    made = FakeVLLM()
    monkeypatch.setattr(vllm_engine, "import_vllm", lambda: made)
    monkeypatch.setattr("lopd.engines.vllm.nouns.import_vllm", lambda: made)
    monkeypatch.setattr(vllm_engine, "_on_cpu", lambda: True)
    return made


def scorer_of(folder, **settings):
    return VLLMScorer.from_folder(folder, VLLMSettings(**settings))


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
)


# --- dying and starting again ---------------------------------------------------------------------------------------------------------


def test_an_engine_starts_when_first_asked_and_again_after_it_was_closed(fake, folder, rollouts):
    scorer = scorer_of(folder)
    assert scorer.provenance.engine == "vllm 0.0"
    assert list(scorer.score([])) == []
    assert not fake.started
    scorer.close()
    for starts in (1, 1, 2):
        if starts == 2:
            scorer.close()
        assert [s.rollout_id for s in scorer.score(rollouts)] == [r.rollout_id for r in rollouts]
        assert len(fake.started) == scorer.engine.starts == starts


@pytest.mark.parametrize("fault", OUT_OF_MEMORY, ids=["cuda", "python", "cpu"])
def test_memory_that_runs_out_halves_the_tokens_until_it_is_enough_and_the_call_is_repeated(fault, fake, folder, rollouts):
    fake.faults = [fault, fault]
    scorer = scorer_of(folder, tokens_per_batch=64, least_tokens_per_batch=16, restarts=0)
    assert len(scorer.score(rollouts)) == len(rollouts)
    assert [a["max_num_batched_tokens"] for a in fake.started] == [64, 32, 16]
    assert [a["max_num_seqs"] for a in fake.started] == [64, 32, 16]
    assert fake.stopped == 2
    scorer.score(rollouts)
    assert len(fake.started) == 3, "the size that worked is kept"


def test_memory_that_runs_out_hidden_behind_another_error_is_found(fake, folder, rollouts):
    wrapped = RuntimeError("EngineCore failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    fake.faults = [wrapped]
    scorer_of(folder, tokens_per_batch=64, least_tokens_per_batch=16, restarts=0).score(rollouts)
    assert [a["max_num_batched_tokens"] for a in fake.started] == [64, 32]


def test_the_tokens_are_not_halved_below_the_least(fake, folder, rollouts):
    fake.faults = [torch.OutOfMemoryError("CUDA out of memory")] * 9
    with pytest.raises(EngineError, match=r"failed 1 times in one call, the last time by OutOfMemoryError \(CUDA out of memory\)"):
        scorer_of(folder, tokens_per_batch=64, least_tokens_per_batch=16, restarts=0).score(rollouts)
    assert [a["max_num_batched_tokens"] for a in fake.started] == [64, 32, 16]


def test_an_engine_that_dies_is_started_anew_and_one_that_dies_twice_gets_half_as_much(fake, folder, rollouts):
    fake.faults = [RuntimeError("EngineCore encountered an issue"), RuntimeError("again")]
    scorer = scorer_of(folder, tokens_per_batch=64, least_tokens_per_batch=16, restarts=2)
    assert len(scorer.score(rollouts)) == len(rollouts)
    assert [a["max_num_batched_tokens"] for a in fake.started] == [64, 64, 32]


def test_deaths_are_counted_for_each_call_of_its_own(fake, folder, rollouts):
    scorer = scorer_of(folder, restarts=1)
    for _ in range(3):
        fake.faults = [RuntimeError("died")]
        scorer.score(rollouts)
    assert len(fake.started) == 4


def test_an_engine_that_goes_on_dying_ends_the_run_with_everything_before_kept(fake, folder, rollouts):
    store = MemoryStore(Manifest(TOKENIZER_ID, ModelId("policy", "1", "float32"), SamplingParams()))
    store.append(rollouts)
    fake.faults = [None, RuntimeError("died"), RuntimeError("died"), RuntimeError("died")]
    scorer = scorer_of(folder, restarts=2)
    with pytest.raises(
        EngineError,
        match=r"failed 3 times in one call, the last time by RuntimeError \(died\), expected at most 2; see its log, and call again to resume",
    ):
        score_rollouts(store, scorer, rollouts_per_batch=3, preflight=None)
    assert store.scored("teacher").sum() == 3
    assert score_rollouts(store, scorer, rollouts_per_batch=3, preflight=None).floored == 0
    assert store.scored("teacher").all()
    assert fake.requests == [3, 3, 3, 3, 3, 1]


def test_a_vllm_that_does_not_start_ends_the_call_unless_one_has_died_in_it(fake, folder, rollouts):
    fake.unborn = [RuntimeError("Engine core initialization failed. See root cause above.")]
    scorer = scorer_of(folder, restarts=2)
    says = r"did not start \(RuntimeError \(Engine core initialization failed.*\)\), see its log; close other .*a smaller `max_model_len`"
    with pytest.raises(EngineError, match=says):
        scorer.score(rollouts)
    assert len(fake.started) == 1
    scorer.score(rollouts)
    # the memory of a dead one may be freed late
    fake.faults, fake.unborn = [RuntimeError("died")], [RuntimeError("Engine core initialization failed")]
    assert len(scorer.score(rollouts)) == len(rollouts)
    assert len(fake.started) == 4


def test_a_setting_that_vllm_refuses_when_it_starts_is_told_in_its_words(fake, folder, rollouts):
    reason = "Tensor parallel size (2) cannot be larger than the number of available GPUs (1)."
    refused = ValueError(f"1 validation error for ParallelConfig\n  Value error, {reason} [type=value_error, input_value=ArgsKwargs(())]")
    fake.unborn = [refused]
    scorer = scorer_of(folder, restarts=2)
    with pytest.raises(EngineError, match=r"did not start \(ValueError \(1 vali.*GPUs \(1\)\..*`tensor_parallel_size` of .*`num_gpus`"):
        scorer.score(rollouts)
    assert len(fake.started) == 1
    scorer.score(rollouts)
    fake.faults, fake.unborn = [RuntimeError("died")], [ValueError("its memory is not free yet")]
    assert len(scorer.score(rollouts)) == len(rollouts), "one that has run is started again"


class VLLMClientError(Exception):
    pass


@pytest.mark.parametrize("fault", [ValueError("prompt is empty"), TypeError("no such argument"), VLLMClientError("invalid")])
def test_what_vllm_refuses_is_not_tried_again(fault, fake, folder, rollouts):
    fake.faults = [fault]
    with pytest.raises(EngineError, match=rf"it refused {type(fault).__name__} \({fault}\)"):
        scorer_of(folder, restarts=5).score(rollouts)
    assert len(fake.started) == 1


def test_a_call_whose_engine_process_dies_while_it_waits_ends_and_is_repeated(fake, folder, rollouts, monkeypatch):
    answers, reset = queue.Queue(), Future()
    resources = SimpleNamespace(engine_dead=False)
    start, generate, waits = fake.LLM, fake.generate, iter([answers.get, reset.result])

    def in_a_process_of_its_own(**arguments):
        llm = start(**arguments)
        vars(llm.llm_engine.engine_core).update(resources=resources, outputs_queue=answers, utility_results={1: reset})
        return llm

    def never_answered(*arguments, **options):
        # as vLLM waits: for an answer in the queue, or for one of a utility, neither of which a dead process gives
        wait = next(waits, None)
        resources.engine_dead = wait is not None
        if wait is None:
            return generate(*arguments, **options)
        try:
            raise wait(timeout=20)
        except (queue.Empty, TimeoutError):
            pytest.fail("it would have waited for ever")

    monkeypatch.setattr(fake, "LLM", in_a_process_of_its_own)
    monkeypatch.setattr(fake, "generate", never_answered)
    scorer = scorer_of(folder, restarts=2)
    assert len(scorer.score(rollouts)) == len(rollouts)
    assert scorer.engine.starts == 3
    assert fake.stopped == 2


def test_an_engine_that_is_refused_when_it_has_started_is_stopped(fake, folder, rollouts):
    fake.overrides = {"enable_prefix_caching": True}
    with pytest.raises(EngineError):
        scorer_of(folder).score(rollouts)
    assert fake.stopped == 1


def test_an_interrupt_stops_the_engine_so_that_nothing_unfinished_is_answered_later(fake, folder, rollouts):
    fake.faults = [KeyboardInterrupt()]
    scorer = scorer_of(folder)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(rollouts)
    assert fake.stopped == 1
    assert len(scorer.score(rollouts)) == len(rollouts)
    assert len(fake.started) == 2


# --- what it is started with ----------------------------------------------------------------------------------------------------------


def test_sampling_and_scoring_start_vllm_as_each_must(fake, folder, rollouts):
    scorer_of(folder, tokens_per_batch=16, dtype=torch.bfloat16).score(rollouts)
    VLLMSource.from_folder(folder, SamplingParams(), VLLMSettings(tokens_per_batch=16)).sample([Prompt("p", [5])])
    scoring, sampling = fake.started
    assert (scoring["enable_prefix_caching"], sampling["enable_prefix_caching"]) == (False, True)
    assert (scoring["enable_chunked_prefill"], scoring["max_num_batched_tokens"]) == (True, 16)
    assert (sampling["enable_chunked_prefill"], sampling["max_num_batched_tokens"]) == (False, LONGEST), "a seed does not survive a part"
    assert (scoring["dtype"], sampling["dtype"]) == ("bfloat16", "float32")
    assert (scoring["logprobs_mode"], sampling["logprobs_mode"]) == ("raw_logprobs", "processed_logprobs")
    assert {a["generation_config"] for a in fake.started} == {"vllm"}
    assert {a["max_model_len"] for a in fake.started} == {LONGEST}


@pytest.mark.parametrize(
    ("sampling", "behavior", "drawn", "calls"),
    [({}, -2.0, None, 1), ({"temperature": 0.0}, -2.0, 0.0, 1), ({"temperature": 0.5}, -1.0, -2.0, 2), ({"top_p": 0.5}, -1.0, -2.0, 2)],
)
def test_rollouts_of_another_distribution_are_read_once_more_at_temperature_one(fake, folder, sampling, behavior, drawn, calls):
    (rollout,) = VLLMSource.from_folder(folder, SamplingParams(**sampling)).sample([Prompt("p", [5])])
    assert rollout.behavior_logprobs.tolist() == [behavior]
    assert (None if rollout.sampler_logprobs is None else rollout.sampler_logprobs.tolist()) == (None if drawn is None else [drawn])
    assert fake.requests == [1] * calls
    source = VLLMSource.from_folder(folder, SamplingParams(**sampling))
    room = LONGEST - (calls == 2)
    source.sample([Prompt("fits", [5] * (room - 1))])
    with pytest.raises(ContextOverflowError, match="'too long'"):
        source.sample([Prompt("too long", [5] * room)])


def test_a_gpu_may_read_a_prompt_in_parts_while_sampling(fake, folder, monkeypatch):
    monkeypatch.setattr(vllm_engine, "_on_cpu", lambda: False)
    VLLMSource.from_folder(folder, SamplingParams(), VLLMSettings(tokens_per_batch=16)).sample([Prompt("p", [5])])
    assert (fake.started[0]["enable_chunked_prefill"], fake.started[0]["max_num_batched_tokens"]) == (True, 16)


def test_other_options_reach_vllm_and_those_that_lopd_sets_are_refused(fake, folder, rollouts):
    options = {"quantization": "fp8", "max_num_seqs": 7, "hf_overrides": {"rope_theta": 1.0}, "kv_cache_dtype": "fp8"}
    VLLMScorer.from_folder(folder, VLLMSettings(options=options), identity=ModelId("model", "1", "float32")).score(rollouts)
    assert fake.started[0]["quantization"] == "fp8"
    assert fake.started[0]["max_num_seqs"] == 7
    assert fake.started[0]["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 1.0}
    for name in ("quantization", "hf_overrides", "kv_cache_dtype"):
        with pytest.raises(ModelError, match=rf"vLLM's option '{name}' makes a model that its folder does not have; pass `identity=`"):
            scorer_of(folder, options={name: options[name]}).provenance  # noqa: B018
    assert scorer_of(folder, options={"kv_cache_dtype": "auto"}).provenance.model == scorer_of(folder).provenance.model
    reserved = set(VLLMEngine(folder, VOCAB).arguments()) - {"disable_log_stats", "max_num_seqs", "hf_overrides"}
    for name in (*reserved, "logits_processors"):
        with pytest.raises(InvalidRecordError, match=rf"options has '{name}', expected an argument that lopd does not set itself"):
            VLLMSettings(options={name: 1})


@pytest.mark.parametrize("head", [[], ["torch.float32"], ["torch.bfloat16"]])
def test_a_vllm_that_computes_logits_in_16_bits_though_float32_was_asked_for_is_warned_of(head, fake, folder, rollouts):
    fake.overrides["head"] = head
    scorer_of(folder, float32_head=False).score(rollouts)
    assert fake.started[0]["hf_overrides"] == {}
    rounded = pytest.warns(ModelWarning, match=r"version 0.0 computes its logits in torch.bfloat16, expected torch.float32; use vLLM 0.32")
    with rounded if head == ["torch.bfloat16"] else nullcontext():
        scorer_of(folder).score(rollouts)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens_per_batch", 0), ("restarts", -1), ("max_model_len", 1), ("gpu_memory_utilization", 0.0), ("tensor_parallel_size", 0)],
)
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InvalidRecordError, match=rf"VLLMSettings: {name} is {value}"):
        VLLMSettings(**{name: value})


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ({"logprobs_mode": "processed_logprobs"}, EngineError, "logprobs_mode is 'processed_logprobs', expected 'raw_logprobs'"),
        ({"enable_prefix_caching": True}, EngineError, "enable_prefix_caching is True, expected False"),
        ({"rows": VOCAB - 1}, ModelError, f"its head has {VOCAB - 1} rows, expected at least {VOCAB}"),
        ({"rows": VOCAB + 1, "layers": 0}, ModelError, f"its head has {VOCAB + 1} rows and cannot be cut"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused(found, error, message, fake, folder):
    fake.overrides = found
    with pytest.raises(error, match=message):
        scorer_of(folder, restarts=0).score([Rollout("r", [5], [6], [True], "length")])


def test_only_a_head_with_padding_rows_is_cut(fake, folder, rollouts):
    scorer_of(folder).score(rollouts)
    assert fake.cut == []
    fake.overrides = {"rows": VOCAB + 8}
    scorer_of(folder).score(rollouts)
    assert fake.cut == [(VOCAB,)]


def test_engines_are_refused_where_they_do_not_fit(folder, tokenizer):
    with pytest.raises(EngineError, match=r"VLLMSource: the engine has scoring=True, expected scoring=False"):
        VLLMSource(VLLMEngine(folder, VOCAB, scoring=True), tokenizer)
    with pytest.raises(EngineError, match=r"VLLMScorer: the engine has scoring=False, expected scoring=True"):
        VLLMScorer(VLLMEngine(folder, VOCAB), tokenizer)
    with pytest.raises(EngineError, match=r"the engine gives 2 log-probs a token, expected 3"):
        VLLMScorer(VLLMEngine(folder, VOCAB, scoring=True, top_k=2), tokenizer, top_k=3)
    with pytest.raises(InvalidRecordError, match=rf"VLLMScorer: top_k is 97, expected 0 to {VOCAB}"):
        VLLMScorer.from_folder(folder, top_k=97)


def test_a_temperature_that_vllm_would_change_is_refused(folder):
    VLLMSource.from_folder(folder, SamplingParams(temperature=0.01))
    with pytest.raises(InvalidRecordError, match=r"VLLMSource: temperature is 0.001, expected 0 or at least 0.01"):
        VLLMSource.from_folder(folder, SamplingParams(temperature=0.001))


def test_where_vllm_is_missing_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match=r"VLLMEngine: vllm is not installed; pip install 'lopd\[vllm\]'"):
        import_vllm()


# --- requests and answers -------------------------------------------------------------------------------------------------------------


def test_a_rollout_needs_room_for_the_token_that_vllm_always_generates(fake, folder, rollouts):
    fits, full, over = (
        Rollout(name, [5] * 100, [6] * n, np.ones(n, bool), "length") for name, n in (("fits", 27), ("full", 28), ("over", 29))
    )
    assert len(scorer_of(folder).score([fits])) == 1
    for bad, message in ((full, "'full'.*has 128 tokens, expected at most 127"), (over, "'over'.*has 129 tokens")):
        with pytest.raises(ContextOverflowError, match=message):
            scorer_of(folder).score([*rollouts, bad])
    assert len(fake.started) == 1


def test_prompts_and_rollouts_are_checked_before_anything_starts(fake, folder):
    source = VLLMSource.from_folder(folder, SamplingParams())
    with pytest.raises(ContextOverflowError, match=r"Prompt 'long'"):
        source.sample([Prompt("p", [5]), Prompt("long", [5] * LONGEST)])
    with pytest.raises(InvalidRecordError, match=r"Prompt 'q'.*token 1 is id 96"):
        source.sample([Prompt("q", [5, 96])])
    with pytest.raises(InvalidRecordError, match=r"Rollout 'r'.*token 0 is id 99"):
        scorer_of(folder).score([Rollout("r", [5], [99], [True], "length")])
    assert not fake.started


def test_answers_to_other_prompts_are_refused(fake, folder, rollouts, monkeypatch):
    real = fake.answer
    monkeypatch.setattr(fake, "answer", lambda ids, p: real([7, *ids[1:]], p))
    with pytest.raises(EngineError, match=r"it answered 7 prompts, expected the 7 asked, in order"):
        scorer_of(folder).score(rollouts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": "abort"}, "1 tokens and the reason 'abort'"),
        ({"token_ids": []}, "0 tokens and the reason 'length'"),
        ({"token_ids": [VOCAB]}, f"sampled id {VOCAB}, expected ids below {VOCAB}"),
        ({"token_ids": [6]}, "response token 0 is id 6, which is not among the engine's log-probs"),
    ],
)
def test_responses_that_are_none_are_refused_by_name(change, message, fake, folder, monkeypatch):
    real = fake.answer

    def answer(ids, params):
        output = real(ids, params)
        vars(output.outputs[0]).update(change)
        return output

    monkeypatch.setattr(fake, "answer", answer)
    with pytest.raises(EngineError, match=rf"Rollout 'p/s0/g0': .*{message}"):
        VLLMSource.from_folder(folder, SamplingParams()).sample([Prompt("p", [5])])


@pytest.mark.parametrize(("overrides", "runner"), [({"asks": False}, "first"), ({"second": True}, "second")])
def test_a_vllm_that_cannot_score_given_ids_is_refused_by_its_version_before_it_computes_anything(
    overrides, runner, fake, folder, rollouts
):
    fake.overrides = overrides
    scorer = VLLMScorer.from_folder(folder, candidates=3)
    with pytest.raises(EngineError, match=rf"version 0.0 of vLLM .* its {runner} model runner, expected version 0.32"):
        scorer.score([with_candidates(rollout) for rollout in rollouts])
    assert (fake.requests, fake.stopped) == ([], 1)
    assert len(scorer_of(folder).score(rollouts)) == len(rollouts), "sampled tokens need nothing of it"


def test_log_probs_of_other_ids_than_those_asked_for_are_refused_by_name(fake, folder, rollouts):
    with pytest.raises(EngineError, match=r"^Rollout '.*': vLLM gave log-probs of other ids than it was asked for"):
        VLLMScorer.from_folder(folder, candidates=3, drawn=1).score([with_candidates(rollout) for rollout in rollouts])


def test_an_engine_that_gives_fewer_log_probs_than_a_scorer_asks_for_is_refused(folder, tokenizer):
    # 2 candidates and its own 4, then the 2 again with 3 drawn ones and the sampled token
    assert VLLMScorer.from_folder(folder, top_k=4, candidates=2, drawn=3).engine.top_k == 12
    with pytest.raises(EngineError, match=r"VLLMScorer: the engine gives 11 log-probs a token, expected 12; make it with `top_k=12`"):
        VLLMScorer(VLLMEngine(folder, VOCAB, scoring=True, top_k=11), tokenizer, top_k=4, candidates=2, drawn=3)
    for widths, says in (
        ({"candidates": -1}, "candidates is -1"),
        ({"drawn": -1}, "drawn"),
        ({"candidates": VOCAB, "top_k": 1}, "together|top_k"),
    ):
        with pytest.raises(InvalidRecordError, match=says):
            VLLMScorer.from_folder(folder, **widths)
