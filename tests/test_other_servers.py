"""Scorers and sources of SGLang servers and of hosts of the OpenAI completions: what they say, what they refuse, keys, limits and costs."""

import os
import re
import time

import numpy as np
import pytest
from other_stubs import CompletionsStub, SGLangStub
from served_table import MODEL, TOKENIZER, _short_pauses, ids_of, make_prompts, make_rollouts, truth  # noqa: F401
from vllm_stub import VOCAB, Stub, answer, changed, cut, table

from lopd import score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines.server import Costs, Servers, ServerScorer, ServerSource, servers
from lopd.engines.server.access import Key
from lopd.engines.server.answers import _seconds, refusal
from lopd.errors import ArgumentError, ContextOverflowError, EngineError, InvalidRecordError, QuarantineWarning
from lopd.records import Manifest, Prompt, Rollout, SamplingParams

KINDS = {SGLangStub: "sglang", CompletionsStub: "openai"}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("VLLM_API_KEY", "SGLANG_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start():
    """Return `start(kind, **settings)`, which starts one more server."""
    stubs = []

    def make(kind, **settings):
        stubs.append(kind(**settings))
        return stubs[-1]

    yield make
    for stub in stubs:
        stub.close()


def servers_of(*stubs, **settings):
    context = {"context": 64} if isinstance(stubs[0], CompletionsStub) else {}
    return Servers(
        [stub.url for stub in stubs], "table", **{"patience_s": 20, "timeout_s": 20, "speaks": KINDS[type(stubs[0])], **context, **settings}
    )


def scorer_of(*stubs, top_k=0, tokens=1, candidates=0, drawn=0, **settings):
    return ServerScorer(servers_of(*stubs, **settings), TOKENIZER, MODEL, top_k, tokens, candidates, drawn)


def prompts_of(request):
    return request.get("input_ids", request.get("prompt"))


def is_for(rollout):
    return lambda request: ids_of(rollout) in prompts_of(request)


def assert_true(rollouts, scores, top_k=0):
    for rollout, score in zip(rollouts, scores, strict=True):
        np.testing.assert_allclose(score.logprobs, truth(rollout), atol=1e-6)
        if top_k:
            rows = table(ids_of(rollout))[rollout.prompt_ids.size : -1]
            np.testing.assert_allclose(score.top_k.logprobs, -np.sort(-rows, -1)[:, :top_k], atol=1e-6)
            np.testing.assert_allclose(np.take_along_axis(rows, score.top_k.ids.astype(int), -1), score.top_k.logprobs, atol=1e-6)


def last_id():
    """Return a rollout whose last token is the last of the vocabulary, which SGLang reports as 0."""
    return Rollout("last", [3, 4], [5, VOCAB - 1, VOCAB - 1], [True] * 3, "length")


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SGLangStub, {"cache": True}),
        (SGLangStub, {"cache": False}),
        (CompletionsStub, {"names": "ids"}),
        (CompletionsStub, {"names": "list"}),
        (CompletionsStub, {"names": "prompt"}),
    ],
)
def test_each_rollout_gets_the_logprobs_of_its_own_tokens(start, kind, settings, tokens):
    stubs, rollouts = [start(kind, **settings), start(kind, **settings)], [*make_rollouts(), last_id()]
    top_k = 4 if settings.get("names", "ids") == "ids" else 0
    assert_true(rollouts, scorer_of(*stubs, top_k=top_k, tokens=tokens).score(rollouts), top_k)
    assert scorer_of(stubs[0]).score([]) == []


def test_sglang_is_asked_for_no_more_than_its_cache_makes_necessary(start):
    rollout = make_rollouts()[4]
    for cache, first in ((True, 0), (False, rollout.prompt_ids.size - 1)):
        stub = start(SGLangStub, cache=cache)
        scorer_of(stub, top_k=2).score([rollout])
        probe, request = stub.requests
        assert len(probe["input_ids"][0]) <= 16
        assert request["logprob_start_len"] == [first]
        assert request["sampling_params"].items() >= {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": -1}.items()
        assert "model" not in request


def test_all_that_sglang_reads_for_a_column_of_candidates_asks_for_ids(start):
    """Some of its versions end where requests with such ids and without meet in one batch, and a probe may meet any."""
    stub, source = (
        start(SGLangStub),
        ServerSource(servers_of(start(SGLangStub)), TOKENIZER, MODEL, SamplingParams(max_new_tokens=9, candidates=4), (0,)),
    )
    scorer_of(stub, candidates=4).score(source.sample(make_prompts()[:2]))
    assert len(stub.requests) > 2
    assert all(len(request["token_ids_logprob"]) == len(request["input_ids"]) for request in stub.requests)


def test_candidates_are_scored_by_sglang_and_refused_of_others_when_a_scorer_is_made(start):
    stub, rollouts = (
        start(SGLangStub),
        ServerSource(servers_of(start(SGLangStub)), TOKENIZER, MODEL, SamplingParams(max_new_tokens=9, candidates=4), (0,)).sample(
            make_prompts()
        ),
    )
    for rollout, scores in zip(rollouts, scorer_of(stub, top_k=3, candidates=4).score(rollouts), strict=True):
        rows = table(ids_of(rollout))[rollout.prompt_ids.size : -1]
        np.testing.assert_array_equal(scores.top_k.ids[:, :4], rollout.candidates.ids)
        np.testing.assert_allclose(np.take_along_axis(rows, scores.top_k.ids.astype(int), -1), scores.top_k.logprobs, atol=1e-6)
        np.testing.assert_allclose(scores.top_k.logprobs, -np.sort(-rows, -1)[:, :7], atol=1e-6)
    with pytest.raises(InvalidRecordError, match=r"candidates is 4 .*'openai', which cannot be asked for given ids"):
        scorer_of(start(CompletionsStub), candidates=4)
    with pytest.raises(InvalidRecordError, match="speak 'openai', which returns text and not the sampled ids"):
        ServerSource(servers_of(start(CompletionsStub)), TOKENIZER, MODEL, SamplingParams(), (0,))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_sglang_samples_ids_with_the_logprobs_that_are_true_and_no_others(start, sampling):
    stub = start(SGLangStub)
    params = SamplingParams(max_new_tokens=12, samples_per_prompt=2, candidates=3, **sampling)
    source = ServerSource(servers_of(stub), TOKENIZER, MODEL, params, (0, 5))
    rollouts = source.sample(make_prompts())
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, truth(rollout), atol=1e-6)
        if sampling.get("temperature") == 0.0:
            np.testing.assert_array_equal(rollout.sampler_logprobs, 0)
        else:
            assert rollout.sampler_logprobs is None
        rows = table(ids_of(rollout))[rollout.prompt_ids.size : -1]
        np.testing.assert_allclose(rollout.candidates.logprobs, -np.sort(-rows, -1)[:, :3], atol=1e-6)
    assert [r.response_ids.tolist() for r in source.sample(make_prompts())] == [r.response_ids.tolist() for r in rollouts]
    assert {r.finish_reason for r in rollouts} >= {"stop"}


def test_sglang_without_seeds_does_not_sample(start):
    source = ServerSource(servers_of(start(SGLangStub, deterministic=False)), TOKENIZER, MODEL, SamplingParams(max_new_tokens=4), (0,))
    with pytest.raises(EngineError, match=r"do not take seeds.*--enable-deterministic-inference"):
        source.sample(make_prompts())


@pytest.mark.parametrize("pool", [None, 40, 1000])
def test_what_sglang_would_not_read_is_quarantined_and_its_neighbours_are_scored(start, pool):
    room = min(64, pool or 64)
    rollouts = [Rollout(f"of {n}", [1], [2] * (n - 1), [True] * (n - 1), "length") for n in (room - 7, room - 6, room - 2)]
    store = MemoryStore(Manifest(TOKENIZER, MODEL, SamplingParams()))
    store.append([*make_rollouts(), *rollouts])
    with pytest.warns(QuarantineWarning, match="2 rollouts are without scores"):
        score_rollouts(store, scorer_of(start(SGLangStub, pool=pool)))
    assert {row: reason.partition(":")[0] for row, reason in store.quarantined("teacher").items()} == {
        len(store) - 2: f"Rollout 'of {room - 6}'",
        len(store) - 1: f"Rollout 'of {room - 2}'",
    }


@pytest.mark.parametrize("pool", [None, 60])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}])
def test_a_response_of_sglang_that_runs_to_the_end_of_its_room_is_a_rollout(start, sampling, pool):
    room = pool or 64
    params = SamplingParams(max_new_tokens=60, samples_per_prompt=4, **sampling)
    prompts = [Prompt(f"of {n}", [3] * n) for n in (room - 8, room - 12)]
    rollouts = ServerSource(servers_of(start(SGLangStub, pool=pool)), TOKENIZER, MODEL, params, (0,)).sample(prompts)
    assert "length" in {rollout.finish_reason for rollout in rollouts}
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, truth(rollout), atol=1e-6)


def meta(item):
    return item[0]["meta_info"]


BAD_SGLANG = {
    "null": (
        lambda a: meta(a)["input_token_logprobs"][-1].__setitem__(0, None),
        InvalidRecordError,
        "token 8 is 'None', expected a number",
    ),
    "nan": (lambda a: meta(a)["input_token_logprobs"][-1].__setitem__(0, float("nan")), InvalidRecordError, "nan"),
    "another token": (lambda a: meta(a)["input_token_logprobs"][-1].__setitem__(1, 30), EngineError, "expected one of id"),
    "one entry less": (lambda a: meta(a)["input_token_logprobs"].pop() and None, InvalidRecordError, "9 input_token_logprobs, expected 10"),
    "other ids": (lambda a: a[0]["prompt_token_ids"].__setitem__(2, 1), EngineError, "from token 2 on"),
    "ids cut": (lambda a: a[0]["prompt_token_ids"].pop() and None, EngineError, "read 9 tokens"),
    "no ids": (lambda a: a[0].pop("prompt_token_ids") and None, EngineError, "holds no prompt_token_ids"),
    "no meta": (lambda a: a[0].pop("meta_info") and None, EngineError, "holds no meta_info"),
    "not a list": (lambda a: a[0], EngineError, "is not a list of 1"),
    "two": (lambda a: a.append(a[0]), EngineError, "is not a list of 1"),
    "cached": (lambda a: meta(a).update(cached_tokens=4), EngineError, "4 of its tokens.*--disable-radix-cache"),
    "refused": (
        lambda a: meta(a).update(finish_reason={"type": "abort", "status_code": 400, "message": "longer than the model's context length"}),
        ContextOverflowError,
        "answers 400",
    ),
    "too long": (
        lambda a: meta(a).update(
            finish_reason={"type": "abort", "status_code": 400, "message": "Input length (9 tokens) exceeds the maximum allowed length"}
        ),
        ContextOverflowError,
        "answers 400",
    ),
    "fewer": (lambda a: meta(a)["input_top_logprobs"][-1].pop() and None, InvalidRecordError, "has 2 candidates, expected 3"),
    "top null": (lambda a: meta(a)["input_top_logprobs"].__setitem__(-1, None), InvalidRecordError, "expected its most likely tokens"),
}


def logprobs(body):
    return body["choices"][0]["logprobs"]


SHIFT = (("tokens", -1), ("token_logprobs", 0), ("top_logprobs", 0))
BAD_COMPLETIONS = {
    "null": (lambda b: logprobs(b)["token_logprobs"].__setitem__(-2, None), InvalidRecordError, "token 8 is 'None', expected a number"),
    "nan": (lambda b: logprobs(b)["token_logprobs"].__setitem__(-2, float("nan")), InvalidRecordError, "nan"),
    "positive": (lambda b: logprobs(b)["token_logprobs"].__setitem__(-2, 0.5), InvalidRecordError, "0.5"),
    "one less": (lambda b: [logprobs(b)[name].pop() for name in ("tokens", "token_logprobs")][:0] or b, EngineError, "top_logprobs"),
    "two less": (lambda b: [logprobs(b)["token_logprobs"].pop() for _ in "ab"][:0] or b, EngineError, "9 token_logprobs, expected 10"),
    "a token in front": (
        lambda b: logprobs(b)["tokens"].insert(0, "token_id:1"),
        EngineError,
        "other tokens than were sent from token 0 on",
    ),
    "other tokens": (lambda b: logprobs(b)["tokens"].__setitem__(3, "token_id:x"), EngineError, "from token 3 on"),
    "of the next tokens": (lambda b: [logprobs(b)[n].pop(at) for n, at in SHIFT][:0] or b, EngineError, "-.*, expected null, for nothing"),
    "of the next, beside all": (lambda b: [logprobs(b)[n].pop(at) for n, at in SHIFT[1:]][:0] or b, EngineError, "11 tokens beside 10"),
    "texts": (lambda b: logprobs(b)["tokens"].__setitem__(3, "cat"), EngineError, "by text alone"),
    "no logprobs": (lambda b: b["choices"][0].pop("logprobs") and None, EngineError, "holds no logprobs"),
    "no choices": (lambda b: b.update(choices=[]), EngineError, "is not of 1 choices"),
    "fewer": (lambda b: logprobs(b)["top_logprobs"][-2].popitem() and None, InvalidRecordError, "has 2 candidates, expected 3"),
    "padding": (lambda b: logprobs(b)["top_logprobs"].__setitem__(-2, {f"token_id:{VOCAB}": -1.0}), InvalidRecordError, "'32'"),
}


@pytest.mark.parametrize(("kind", "name"), [*((SGLangStub, n) for n in BAD_SGLANG), *((CompletionsStub, n) for n in BAD_COMPLETIONS)])
def test_an_answer_that_is_not_what_it_must_be_is_an_error_that_names_the_rollout(start, kind, name):
    change, error, says = (BAD_SGLANG if kind is SGLangStub else BAD_COMPLETIONS)[name]
    stub, rollouts = start(kind), make_rollouts()
    stub.fail(1, changed(change), is_for(rollouts[1]))
    if name == "one less":  # no more than the echoed prompt is as good
        error, says = InvalidRecordError, "11 top_logprobs, expected 10"
    with pytest.raises(error, match=says) as caught:
        scorer_of(stub, top_k=3).score(rollouts)
    assert "Rollout 'r1'" in str(caught.value)


NULL = {SGLangStub: changed(BAD_SGLANG["null"][0]), CompletionsStub: changed(BAD_COMPLETIONS["null"][0])}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_where_a_server_is_tried_with_a_rollout_quarantines_that_alone(start, kind, count):
    stubs, rollouts = [start(kind) for _ in range(count)], make_rollouts()
    for stub in stubs:
        stub.fail(10**6, NULL[kind], is_for(rollouts[0]))
    store = MemoryStore(Manifest(TOKENIZER, MODEL, SamplingParams()))
    store.append(rollouts)
    with pytest.warns(QuarantineWarning, match="1 rollouts are without scores"):
        score_rollouts(store, scorer_of(*stubs, patience_s=1e6))
    ((row, reason),) = store.quarantined("teacher").items()
    assert (row, reason.endswith("check the model for NaN.")) == (0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_with_nan_alone_is_left_out_while_another_gives_numbers(start, kind):
    sick, sound = (start(kind) for _ in range(2))
    sick.fail(10**6, NULL[kind])
    rollouts = make_rollouts()
    assert_true(rollouts, scorer_of(sick, sound).score(rollouts))
    with pytest.raises(InvalidRecordError, match=rf"^Server {sick.url}: .*; check the model for NaN\.$"):
        scorer_of(sick, patience_s=1e6).score(rollouts)


def test_what_a_host_broke_off_is_asked_again(start):
    stub, rollouts = start(CompletionsStub), make_rollouts()
    stub.fail(2, changed(lambda b: b["choices"][0].update(finish_reason="abort", logprobs=None)), is_for(rollouts[3]))
    assert_true(rollouts, scorer_of(stub).score(rollouts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fault", [cut, answer(500), answer(503), changed(lambda _: b'[{"meta_info": {'), answer(429, {"Retry-After": "0"})]
)
def test_trouble_is_asked_again(start, kind, fault):
    stub, rollouts = start(kind), make_rollouts()
    stub.fail(2, fault, is_for(rollouts[3]))
    assert_true(rollouts, scorer_of(stub).score(rollouts))


def test_sglangs_minus_infinity_where_it_is_a_number_is_the_floor(start):
    stub, (first, rollout) = start(SGLangStub), make_rollouts()[:2]
    stub.fail(1, changed(lambda a: meta(a)["input_token_logprobs"][-1].__setitem__(0, -3.4e38)), is_for(rollout))
    _, scores = scorer_of(stub).score([first, rollout])
    assert (scores.floored, scores.logprobs[-1]) == (1, -100)


CANNOT = {
    "it does not echo": ({"echoes": False}, "gives 1 token_logprobs, expected"),
    "it names tokens by text": ({"names": "texts"}, "by text alone, expected token ids"),
    "it names the most likely by text": ({"names": "list"}, r"most likely tokens by text \('t.*top_k=0"),
    "it gives fewer": ({"most": 5}, "has 5 candidates, expected 8 or 9"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_host_cannot_do_is_said_by_its_name_before_a_rollout_is_sent(start, name):
    settings, says = CANNOT[name]
    stub, rollouts = start(CompletionsStub, **settings), make_rollouts()
    store = MemoryStore(Manifest(TOKENIZER, MODEL, SamplingParams()))
    store.append(rollouts)
    with pytest.raises(EngineError, match=f"^Server {stub.url}: .*{says}"):
        score_rollouts(store, scorer_of(stub, top_k=8))
    assert len(stub.requests) == 1
    assert not store.scored("teacher").any()


def test_a_model_that_a_host_does_not_have_and_a_context_that_it_does_not_say(start):
    stub = start(CompletionsStub)
    with pytest.raises(EngineError, match=r"^Server .*answers 404 \(The model `gpt` does not exist"):
        ServerScorer(Servers(stub.url, "gpt", context=64, speaks="openai"), TOKENIZER, MODEL).score(make_rollouts())
    with pytest.raises(EngineError, match=r"max_model_len is None, expected a number; pass `context=`"):
        scorer_of(stub, context=None).score(make_rollouts())
    with pytest.raises(InvalidRecordError, match="speaks is 'gpt', expected one of 'vllm', 'sglang', 'openai'"):
        Servers(stub.url, "gpt", speaks="gpt")


@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (404, "Model not found", "check URL, model name"),
        (
            400,
            "Extra inputs are not permitted, field: 'return_tokens_as_token_ids'",
            r"pass `extra=` with the host's own field .*return_token_ids",
        ),
    ],
)
def test_a_host_that_refuses_is_not_taken_for_vllm(status, message, says):
    error = refusal("x", "https://host/inference/v1/completions", status, message, Key())
    assert re.search(says, str(error))
    assert "vLLM" not in str(error)


def test_what_is_forbidden_is_said_with_the_reason_and_the_proxies_where_there_are_any(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    say = lambda: str(refusal("x", "https://host/v1/completions", 403, "no access to it", Key("MY_KEY")))  # noqa: E731
    assert re.search(r"answers 403 \(no access to it\): the key, or what it may do, was refused; .*MY_KEY\.$", say())
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert re.search("MY_KEY, and look at HTTP_PROXY, .* NO_PROXY", say())


def test_a_server_that_is_not_sglang_is_said_before_anything_is_asked(start):
    stub = start(Stub)
    with pytest.raises(EngineError, match=r"it has neither /model_info nor /server_info, which SGLang has; check .* `speaks`"):
        ServerScorer(Servers(stub.url, "table", speaks="sglang"), TOKENIZER, MODEL).score(make_rollouts())
    assert not stub.requests


@pytest.mark.parametrize("noun", [ServerScorer, ServerSource])
def test_a_url_is_not_servers_and_a_name_is_not_an_identity(noun):
    with pytest.raises(ArgumentError, match=r"servers: it is a str, .*make them: `Servers\(url, model\)`"):
        noun("http://a", TOKENIZER, MODEL)
    with pytest.raises(ArgumentError, match=r"identity: it is a str, .*make it: `ModelId\(name, commit, dtype\)`"):
        noun(Servers("http://a", "m"), TOKENIZER, "org/model")
    for urls, model, wrong in (
        (None, "m", "urls: it is None"),
        (["http://a", 3], "m", "urls: it is an int"),
        ("http://a", None, "model is None"),
    ):
        with pytest.raises(InvalidRecordError, match=f"^Servers: {wrong}, expected text"):
            Servers(urls, model)


def test_two_sglang_servers_must_have_the_same_settings(start):
    with pytest.raises(EngineError, match=r"use of a prefix cache is .*the same settings everywhere"):
        scorer_of(start(SGLangStub, cache=True), start(SGLangStub, cache=False)).score(make_rollouts())


@pytest.mark.parametrize("kind", [Stub, *KINDS])
def test_a_key_is_read_from_the_environment_and_is_shown_nowhere(start, kind, monkeypatch):
    key, stub = "sesame-17", start(kind, key="sesame-17")
    monkeypatch.setenv("MY_KEY", "sesame-18")
    speaks = KINDS.get(kind, "vllm")
    wrong = ServerScorer(Servers(stub.url, "table", context=64, speaks=speaks, key_variable="MY_KEY"), TOKENIZER, MODEL)
    with pytest.raises(EngineError, match=r"answers 401 \(Unauthorized\): the key in MY_KEY was refused; set another") as caught:
        wrong.score(make_rollouts())
    with pytest.raises(InvalidRecordError, match=r"^Servers: NO_KEY is not set in the environment"):
        Servers(stub.url, "table", speaks=speaks, key_variable="NO_KEY")
    with pytest.raises(InvalidRecordError, match=r"^Servers: key_variable is not the name") as mistaken:
        Servers(stub.url, "table", speaks=speaks, key_variable=key)
    monkeypatch.setenv("MY_KEY", key)
    right = ServerScorer(Servers(stub.url, "table", context=64, speaks=speaks, key_variable="MY_KEY"), TOKENIZER, MODEL)
    store = MemoryStore(Manifest(TOKENIZER, MODEL, SamplingParams()))
    store.append(make_rollouts())
    report = score_rollouts(store, right)
    stub.fail(99, answer(400, body={"error": {"message": f"the key {key} may not do this"}}))
    with pytest.raises(EngineError, match=r"the key ... may not do this") as told:
        right.score(make_rollouts())
    shown = [
        str(mistaken.value),
        str(caught.value),
        str(told.value),
        repr(wrong),
        repr(right),
        repr(right.servers),
        repr(right.servers.costs),
        repr(report),
    ]
    shown += [repr(store.columns), repr(store.manifest), repr(right.provenance)]
    assert "sesame" not in " ".join(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_what_the_answers_say_with_the_probe(start, kind):
    stub, rollouts = start(kind), make_rollouts()
    scorer = scorer_of(stub, tokens=1000)
    assert scorer.servers.costs == Costs()
    scorer.score(rollouts)
    probe, *requests = stub.requests
    read, made = sum(len(ids) for r in (probe, *requests) for ids in prompts_of(r)), 0 if kind is SGLangStub else 1 + len(rollouts)
    assert scorer.servers.costs == Costs(2, read, made)
    uncounted = changed(
        lambda b: b.pop("usage") and None if isinstance(b, dict) else [item["meta_info"].pop("prompt_tokens") for item in b][:0] or b
    )
    stub.fail(2, uncounted)
    scorer.score(rollouts)
    assert scorer.servers.costs == Costs(4, read, made, uncounted=2)


def test_a_busy_server_is_asked_again_more_often_than_a_failing_one_until_patience_is_over(start):
    stub, rollouts = start(CompletionsStub), make_rollouts()
    stub.fail(6, answer(429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "20ms"}), is_for(rollouts[3]))
    assert_true(rollouts, scorer_of(stub, attempts=2).score(rollouts))
    stub.fail(99, answer(429, {"Retry-After": "0.01"}), is_for(rollouts[3]))
    with pytest.raises(EngineError, match=r"Rollout 'r3': .*answers 429"):
        scorer_of(stub, attempts=2, patience_s=0.3).score(rollouts)


@pytest.mark.parametrize(("status", "code"), [(429, "insufficient_quota"), (402, "payment_required")])
def test_an_account_without_credit_is_not_asked_again(start, status, code):
    stub, rollouts = start(CompletionsStub), make_rollouts()
    stub.fail(9, answer(status, body={"error": {"message": "You exceeded your current quota", "code": code}}), is_for(rollouts[0]))
    with pytest.raises(EngineError, match=rf"answers {status} .*expected credit"):
        scorer_of(stub).score(rollouts)
    assert sum(map(is_for(rollouts[0]), stub.requests)) == 1


def test_a_server_that_says_that_nothing_is_left_is_left_alone(start, monkeypatch, caplog):
    monkeypatch.setattr(servers, "QUIET_S", 0.3)
    stub, rollouts = start(CompletionsStub), make_rollouts(3)
    body = []
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "400ms"}

    def answer_then_rest(handler, status, data):
        body.append(time.monotonic())
        handler.reply(status, data, headers)

    stub.fail(1, answer_then_rest)  # of the probe, before anything else is asked
    scorer_of(stub).score(rollouts)
    assert time.monotonic() - body[0] >= 0.4
    assert "rests for 0 s: it reports that nothing is left of its limit" in caplog.text


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("7", 7),
        ("0.5", 0.5),
        ("", 0),
        ("soon", 0),
        ("-1", 0),
        ("1764390000", 0),
    ],
)
def test_what_a_limit_says_is_read_in_seconds(said, seconds):
    assert _seconds(said) == pytest.approx(seconds)
