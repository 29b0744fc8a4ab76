"""ServerSource and ServerScorer against servers on loopback that answer as vLLM does, out of a table, and fail on demand.

What the real server does is in test_served_vllm.py.
"""

import asyncio
import importlib
import pickle
import runpy
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from vllm_stub import EOS, VOCAB, Stub, answer, changed, cut, late, table

from lopd import collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines import pool
from lopd.engines.server import Servers, ServerScorer, ServerSource, answers
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, LopdError, MissingDependencyError
from lopd.records import Lineage, Manifest, ModelId, Prompt, Rollout, SamplingParams, TokenizerId, fingerprint_tokenizer

TOKENIZER = TokenizerId("table-vocabulary", VOCAB, EOS, None, None, "")
MODEL = ModelId("table", "1", "float32")
STOP = (EOS, 5)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(pool, "backoff", lambda _: 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def start():
    """`start(**settings)`: one more server."""
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


def scorer_of(*stubs, top_k=0, tokens_per_request=1, **settings):
    """Each rollout is a request of its own, unless a test says otherwise."""
    return ServerScorer(servers_of(*stubs, **settings), TOKENIZER, MODEL, top_k, tokens_per_request)


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
    """The table's log-probs of the response: row n is about what stands at position n."""
    ids = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
    return np.array([table(ids)[n, ids[n]] for n in range(rollout.prompt_ids.size, len(ids))], np.float32)


def ids_of(rollout):
    return [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]


def is_for(rollout):
    return lambda request: ids_of(rollout) in request["prompt"]


def as_lists(rollouts):
    return {r.rollout_id: (r.response_ids.tolist(), r.finish_reason) for r in rollouts}


def entry(body, place=-1):
    return body["choices"][0]["prompt_logprobs"][place]


def spoil(value):
    """Make the log-prob of the last token something else."""

    def change(body):
        for candidate in entry(body).values():
            candidate["logprob"] = value

    return change


@contextmanager
def held(stub, when=lambda _: True):
    """Completions that fit are not answered before the block is left."""
    leave = threading.Event()

    def wait(handler, status, data):
        leave.wait(60)
        late(0)(handler, status, data)

    stub.fail(1000, wait, when)
    try:
        yield
    finally:
        leave.set()


def is_dropped(connection):
    """Whether the client has closed it; the server may still answer."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def until(fits):
    """Wait for something that another thread does."""
    for _ in range(2000):
        if fits():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


# --- scoring --------------------------------------------------------------------------------------------------------------------------


def test_each_rollout_gets_the_logprobs_of_its_own_tokens_at_their_own_places(stub):
    rollouts = make_rollouts()
    for rollout, scores in zip(rollouts, scorer_of(stub).score(rollouts), strict=True):
        assert (scores.rollout_id, scores.content_hash, scores.floored) == (rollout.rollout_id, rollout.content_hash, 0)
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


def test_scores_come_in_the_order_asked_whatever_order_the_answers_have(stub):
    rollouts = make_rollouts()
    stub.fail(1, late(0.3), is_for(rollouts[0]))
    for rollout, scores in zip(rollouts, scorer_of(stub).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_top_k_holds_the_k_most_likely_tokens_and_the_mass_of_all_others(stub, k):
    rollouts = make_rollouts()
    inside = 0
    for rollout, scores in zip(rollouts, scorer_of(stub, top_k=k).score(rollouts), strict=True):
        ids = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
        rows = table(ids)[rollout.prompt_ids.size : len(ids)]
        assert scores.top_k.ids.shape == (rollout.response_ids.size, k)
        np.testing.assert_allclose(scores.top_k.logprobs, -np.sort(-rows, -1)[:, :k], atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(rows, scores.top_k.ids.astype(int), -1), scores.top_k.logprobs, atol=1e-6)
        np.testing.assert_allclose(scores.top_k.tail, 1 - np.exp(scores.top_k.logprobs.astype(float)).sum(-1), atol=1e-6)
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
        inside += (scores.top_k.ids == rollout.response_ids[:, None]).any(-1).sum()
    assert 0 < inside < sum(r.response_ids.size for r in rollouts), "the sampled token should be among the k in some places only"


def test_what_is_sent_is_ids_with_every_setting_that_a_server_may_have_another_default_of(stub):
    rollout = make_rollouts()[4]
    scorer_of(stub, top_k=3).score([rollout])
    (request,) = stub.requests
    assert request["prompt"] == [ids_of(rollout)]
    expected = {"model": "table", "max_tokens": 1, "prompt_logprobs": 3, "temperature": 1.0, "top_p": 1.0, "return_token_ids": True}
    assert expected.items() <= request.items()
    assert request["add_special_tokens"] is False
    assert "echo" not in request


@pytest.mark.parametrize("written", [-9999.0, float("-inf"), -20000])
def test_no_probability_at_all_is_stored_as_the_floor_and_counted(stub, written):
    stub.fail(1, changed(spoil(written)))
    (scores,) = scorer_of(stub).score([make_rollouts()[1]])
    assert scores.floored == 1
    assert scores.logprobs[-1] == -100
    np.testing.assert_allclose(scores.logprobs[:-1], truth(make_rollouts()[1])[:-1], atol=1e-6)


def without(name):
    return lambda body: body["choices"][0].pop(name) and None


BAD_SCORES = {
    "nan": (spoil(float("nan")), InvalidRecordError, "nan"),
    "infinity": (spoil(float("inf")), InvalidRecordError, "inf"),
    "positive": (spoil(0.25), InvalidRecordError, "0.25"),
    "null": (spoil(None), InvalidRecordError, "response token 8 is 'None'"),
    "text": (spoil("-1.5"), InvalidRecordError, "-1.5"),
    "bool": (spoil(False), InvalidRecordError, "'False'"),
    "an entry that is null": (lambda b: b["choices"][0]["prompt_logprobs"].__setitem__(-1, None), InvalidRecordError, "no log-prob"),
    "an entry without the token": (lambda b: entry(b).clear(), InvalidRecordError, "no log-prob of response token 8"),
    "an entry of another token": (
        lambda b: entry(b).update({"7" if "7" not in entry(b) else "8": entry(b).popitem()[1]}),
        InvalidRecordError,
        "no log-prob",
    ),
    "one entry less": (lambda b: b["choices"][0]["prompt_logprobs"].pop() and None, InvalidRecordError, "9 prompt_logprobs, expected 10"),
    "text alone": (without("prompt_logprobs"), EngineError, "holds no prompt_logprobs"),
    "no ids": (without("prompt_token_ids"), EngineError, "holds no prompt_token_ids"),
    "other ids": (lambda b: b["choices"][0]["prompt_token_ids"].__setitem__(2, 1), EngineError, "from token 2 on"),
    "a token in front": (lambda b: b["choices"][0]["prompt_token_ids"].insert(0, 1), EngineError, "read 11 tokens"),
    "no choice": (lambda b: b.update(choices=[]), EngineError, "is not of 1 choices"),
    "two choices": (lambda b: b["choices"].append(b["choices"][0]), EngineError, "is not of 1 choices"),
    "no object": (lambda b: [1], EngineError, "is not of 1 choices"),
    "a cached prompt": (lambda b: b["usage"].update(prompt_tokens_details={"cached_tokens": 4}), EngineError, "4 of its tokens"),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_an_answer_that_is_not_what_it_must_be_is_an_error_that_names_the_rollout_and_never_a_number(stub, name):
    change, error, says = BAD_SCORES[name]
    rollouts = make_rollouts()
    stub.fail(1, changed(change), is_for(rollouts[1]))
    with pytest.raises(error, match=says) as caught:
        scorer_of(stub).score(rollouts)
    assert "'r1'" in str(caught.value)


BAD_CANDIDATES = {
    "too few": (lambda e, own: [e.pop(key) for key in list(e) if key != own], "has 1 candidates, expected 3 or 4"),
    "too many": (lambda e, own: e.update({str(i): {"logprob": -9.0} for i in range(VOCAB)}), "has 32 candidates"),
    "no id": (lambda e, own: e.update({"cat": e.pop(next(k for k in e if k != own))}), "'cat'"),
    "a padding id": (lambda e, own: e.update({str(VOCAB): e.pop(next(k for k in e if k != own))}), "'32', expected an id below"),
    "nan": (lambda e, own: [v.update(logprob=float("nan")) for k, v in e.items() if k != own], "nan"),
    "more than 1": (lambda e, own: [v.update(logprob=-0.1) for k, v in e.items() if k != own], "sums to"),
}


@pytest.mark.parametrize("name", BAD_CANDIDATES)
def test_candidates_that_are_none_are_an_error_that_names_the_rollout(stub, name):
    change, says = BAD_CANDIDATES[name]
    rollout = make_rollouts()[1]
    own = str(rollout.response_ids[-1])
    stub.fail(1, changed(lambda body: change(entry(body), own) and None))
    with pytest.raises(InvalidRecordError, match=says) as caught:
        scorer_of(stub, top_k=3).score([rollout])
    assert "'r1'" in str(caught.value)


def test_a_rollout_may_have_one_token_less_than_the_context_and_a_longer_one_is_refused_before_anything_is_sent(start):
    stub = start(context=20)
    longest = Rollout("longest", [1] * 10, [2] * 9, [True] * 9, "length")
    (scores,) = scorer_of(stub).score([longest])
    np.testing.assert_allclose(scores.logprobs, truth(longest), atol=1e-6)
    stub.requests.clear()
    with pytest.raises(ContextOverflowError, match=r"'long'.* has 20 tokens, expected at most the context of 19"):
        scorer_of(stub).score([longest, Rollout("long", [1] * 10, [2] * 10, [True] * 10, "length")])
    with pytest.raises(InvalidRecordError, match=r"'out'.*id 32"):
        scorer_of(stub).score([longest, Rollout("out", [1], [VOCAB], [True], "length")])
    assert not stub.requests


def test_short_rollouts_share_requests_of_so_many_tokens(stub):
    rollouts = make_rollouts(30)
    for rollout, scores in zip(rollouts, scorer_of(stub, tokens_per_request=40, top_k=2).score(rollouts), strict=True):
        assert scores.content_hash == rollout.content_hash
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    sizes = [[len(ids) for ids in request["prompt"]] for request in stub.requests]
    assert all(sum(lengths) <= 40 for lengths in sizes)
    assert 3 < len(sizes) < 15
    assert sorted(map(ids_of, rollouts)) == sorted(ids for request in stub.requests for ids in request["prompt"])


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (
            answer(400, body={"error": {"message": "Token id 5000 is out of vocabulary"}}),
            InvalidRecordError,
            "^Rollout 'r5': .*answers 400",
        ),
        (answer(500), EngineError, "^Rollout 'r5': .*answers 500"),
        (changed(lambda body: body["choices"].pop() and None), EngineError, "^Rollout 'r5': .*is not of 1 choices"),
    ],
)
def test_a_failure_of_one_of_several_is_an_error_that_names_the_one(stub, fault, error, says):
    rollouts = make_rollouts()
    stub.fail(100, fault, is_for(rollouts[5]))
    with pytest.raises(error, match=says):
        scorer_of(stub, tokens_per_request=1000, attempts=2).score(rollouts)


@pytest.mark.parametrize("change", [lambda b: b["choices"].reverse(), lambda b: b["choices"].pop() and None])
def test_answers_of_several_that_got_mixed_up_are_asked_for_one_by_one(stub, change):
    rollouts = make_rollouts()
    stub.fail(1, changed(change))
    for rollout, scores in zip(rollouts, scorer_of(stub, tokens_per_request=1000).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    assert len(stub.requests) == 1 + 12


def test_no_rollouts_give_no_scores_and_no_request(stub):
    assert scorer_of(stub).score([]) == []
    assert not stub.requests


def test_provenance_says_the_engine_with_its_version(stub, start):
    provenance = scorer_of(stub, top_k=3).provenance
    assert (provenance.model, provenance.vocab_hash, provenance.logprobs_mode, provenance.top_k) == (MODEL, "table-vocabulary", "raw", 3)
    assert provenance.engine == "vllm 0.32.0 served"


# --- what the server refuses ----------------------------------------------------------------------------------------------------------


def refused(status, message):
    return answer(status, body={"error": {"message": message}})


REFUSALS = {
    "too long": (refused(400, "This model's maximum context length is 64 tokens. However, ..."), ContextOverflowError, "'r4'.*answers 400"),
    "full": (refused(400, "max_tokens must be at least 1, got 0."), ContextOverflowError, "'r4'.*answers 400"),
    "out of vocabulary": (refused(400, "Token id 5000 is out of vocabulary"), InvalidRecordError, "'r4'.*out of vocabulary"),
    "unknown": (refused(400, "no such thing"), EngineError, "'r4'.*no such thing"),
    "not there": (refused(404, "The model `table` does not exist."), EngineError, "'r4'.*does not exist"),
    "not let in": (refused(403, "secret"), EngineError, "answers 403.*api_key"),
    "moved": (answer(307, {"Location": "http://127.0.0.1:1/"}), EngineError, "'r4'.*answers 307"),
    "unprocessable": (answer(422, body={"detail": [{"msg": "bad field"}]}), EngineError, "bad field"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_error_that_names_the_rollout_and_is_not_sent_again(stub, name):
    fault, error, says = REFUSALS[name]
    rollouts = make_rollouts()
    stub.fail(10, fault, is_for(rollouts[4]))
    with pytest.raises(error, match=says):
        scorer_of(stub).score(rollouts)
    assert sum(map(is_for(rollouts[4]), stub.requests)) == 1


def test_more_candidates_than_the_server_gives_is_an_error_that_says_how_to_start_it(start):
    stub = start(max_logprobs=3)
    with pytest.raises(EngineError, match=r"max allowed: 3.*--max-logprobs"):
        scorer_of(stub, top_k=5).score(make_rollouts())


def test_a_model_that_is_not_served_is_an_error_that_says_which_are(stub):
    with pytest.raises(EngineError, match="serves 'table', expected 'qwen'"):
        scorer_of(stub, model="qwen").score(make_rollouts())
    assert not stub.requests


def test_a_key_opens_the_server_and_is_shown_nowhere(start, monkeypatch):
    stub = start(key="sesame-17")
    for wrong in (None, "sesame-18"):
        scorer = scorer_of(stub, api_key=wrong)
        with pytest.raises(EngineError, match=r"answers 401.*VLLM_API_KEY") as caught:
            scorer.score(make_rollouts())
        assert "sesame" not in repr(scorer) + repr(scorer.servers) + str(caught.value)
    assert len(scorer_of(stub, api_key="sesame-17").score(make_rollouts())) == 12
    monkeypatch.setenv("VLLM_API_KEY", "sesame-17")
    assert len(scorer_of(stub).score(make_rollouts())) == 12


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"urls": []}, "number of urls is 0"),
        ({"urls": ["localhost:8000"]}, "'localhost:8000', expected http://"),
        ({"urls": ["http://"]}, "'http:', expected http://"),
        ({"urls": ["http://[::1"]}, "'http://\\[::1', expected http://"),
        ({"urls": ["http://me:sesame@localhost"]}, "one with a user or password"),
        ({"urls": "http://a", "api_key": "sesame\n"}, "api_key has spaces"),
        ({"urls": "http://a", "concurrency": 0}, "concurrency is 0"),
        ({"urls": "http://a", "attempts": 0}, "attempts is 0"),
        ({"urls": "http://a", "patience_s": 0}, "patience_s is 0"),
        ({"urls": "http://a", "timeout_s": -1}, "timeout_s is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_and_secrets_not_repeated(settings, says):
    with pytest.raises(InvalidRecordError, match=says) as caught:
        Servers(model="table", **settings)
    assert "sesame" not in str(caught.value)


def test_a_proxy_of_the_environment_that_is_not_one_is_named(stub, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "garbage://x:y")
    with pytest.raises(EngineError, match=r"Server http://127.*no client can be made for it \(Invalid port.*look at HTTP_PROXY"):
        scorer_of(stub).score(make_rollouts())


def test_urls_may_end_as_openai_clients_write_them():
    assert Servers(["http://a:1/v1", "http://b/", "http://c/x/v1/"], "m").urls == ("http://a:1", "http://b", "http://c/x")
    assert Servers("http://a", "m").urls == ("http://a",)


# --- trouble --------------------------------------------------------------------------------------------------------------------------

TROUBLE = {
    "503": answer(503),
    "500": answer(500, body={"error": "EngineCore encountered an issue"}),
    "502 in html": changed(lambda _: b"<html>"),
    "429": answer(429),
    "408": answer(408),
    "a cut connection": cut,
}


@pytest.mark.parametrize("name", TROUBLE)
def test_after_trouble_a_request_is_sent_again(stub, name):
    rollouts = make_rollouts()
    stub.fail(3, TROUBLE[name], is_for(rollouts[5]))
    for rollout, scores in zip(rollouts, scorer_of(stub).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    assert sum(map(is_for(rollouts[5]), stub.requests)) == 4


def test_an_answer_that_takes_too_long_is_asked_for_again(stub):
    rollouts = make_rollouts()
    stub.fail(1, late(3), is_for(rollouts[5]))
    scores = scorer_of(stub, timeout_s=0.5).score(rollouts)
    np.testing.assert_allclose(scores[5].logprobs, truth(rollouts[5]), atol=1e-6)
    assert sum(map(is_for(rollouts[5]), stub.requests)) == 2


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (answer(500, body={"error": {"message": "Out of range float values"}}), r"answers 500 \(Out of range float values\)"),
        (cut, "fails with RemoteProtocolError"),
        (changed(lambda _: b"<html>"), "answers 200 with what is no JSON"),
    ],
)
def test_a_request_that_fails_each_time_ends_the_call_with_the_rollout_the_url_and_the_last_status(stub, fault, says):
    rollouts = make_rollouts()
    stub.fail(100, fault, is_for(rollouts[5]))
    with pytest.raises(EngineError, match=f"Rollout 'r5': {stub.url}/v1/completions {says}.*at last of 3 attempts"):
        scorer_of(stub, attempts=3).score(rollouts)
    assert sum(map(is_for(rollouts[5]), stub.requests)) == 3


@pytest.fixture
def pauses(monkeypatch):
    """How long the client sleeps each time; in truth it does not."""
    asked = []
    monkeypatch.setattr(pool.Pool, "_sleep", lambda _, seconds: asked.append(seconds))
    return asked


def test_a_request_that_failed_waits_before_it_is_sent_again_unless_another_server_can_be_asked(stub, start, pauses):
    stub.fail(2, answer(500))
    assert len(scorer_of(stub).score(make_rollouts()[:1])) == 1
    assert [pause for pause in pauses if pause] == [0.01, 0.01]
    pauses.clear()
    stubs = [start(), start()]
    for one in stubs:
        one.fail(1, answer(500))
    assert len(scorer_of(*stubs).score(make_rollouts()[:1])) == 1
    assert sum(len(one.requests) for one in stubs) in (2, 3)
    assert [pause for pause in pauses if pause] in ([], [0.01])


def test_a_server_that_asks_for_a_pause_gets_it(stub, pauses):
    scorer = scorer_of(stub)
    stub.fail(1, answer(429, {"Retry-After": "7"}))
    assert len(scorer.score(make_rollouts())) == 12
    assert 7.0 in pauses
    pauses.clear()
    stub.fail(1, answer(503, {"Retry-After": "100000"}))
    assert len(scorer.score(make_rollouts())) == 12
    assert max(pauses) == scorer.servers.patience_s, "no longer than the patience"


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [("2.5", 2.5, 2.5), ("Fri, 31 Dec 2100 23:59:59 GMT", 1e8, 1e10), ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0), ("soon", 0, 0), ("", 0, 0)],
)
def test_a_pause_may_be_seconds_or_a_date(said, low, high):
    with pytest.raises(answers.Trouble) as caught:
        answers.accepted("Rollout 'r'", "http://a", httpx2.Response(429, headers={"Retry-After": said}))
    assert low <= caught.value.pause <= high


# --- several servers ------------------------------------------------------------------------------------------------------------------


def test_requests_are_spread_over_servers_and_bounded_at_each(start):
    stubs = [start(), start()]
    for stub in stubs:
        stub.fail(1000, late(0.03))
    rollouts = make_rollouts(40)
    for rollout, scores in zip(rollouts, scorer_of(*stubs, concurrency=3).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    assert [stub.busiest for stub in stubs] == [3, 3]
    assert all(len(stub.requests) >= 10 for stub in stubs)
    assert sum(len(stub.requests) for stub in stubs) == 40


def test_the_least_busy_server_gets_the_next_request(start):
    stubs = [start(), start(), start()]
    with held(stubs[0]), held(stubs[1]), held(stubs[2]):
        thread = threading.Thread(target=lambda: scorer_of(*stubs).score(make_rollouts()))
        thread.start()
        until(lambda: sum(stub.busy for stub in stubs) == 12)
        assert [stub.busy for stub in stubs] == [4, 4, 4]
    thread.join()


def test_a_server_that_is_dead_from_the_beginning_is_left_out(stub, start):
    dead = start()
    dead.close()
    scorer = scorer_of(dead, stub)
    for rollout, scores in zip(make_rollouts(), scorer.score(make_rollouts()), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    assert scorer.provenance.engine == "vllm 0.32.0 served"


def test_a_server_that_dies_leaves_its_requests_to_the_other_and_the_log_says_so(stub, start, caplog):
    dying = start()
    scorer = scorer_of(dying, stub, concurrency=4)
    assert scorer.servers.served.context == 64
    with held(dying):
        killer = threading.Thread(target=lambda: (until(lambda: dying.busy >= 2), dying.close()))
        killer.start()
        rollouts = make_rollouts(30)
        for rollout, scores in zip(rollouts, scorer.score(rollouts), strict=True):
            np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
        killer.join()
    assert f"Server {dying.url} is left alone for now: {dying.url}/v1/completions fails with" in caplog.text
    assert stub.url not in caplog.text


def test_a_server_that_comes_back_is_used_again(start):
    first = start()
    port = first.port
    scorer = scorer_of(first, concurrency=4, patience_s=30)
    assert scorer.servers.served.context == 64
    second = []

    def restart():
        until(lambda: first.busy >= 2)
        first.close()
        second.append(start(port=port))

    with held(first):
        thread = threading.Thread(target=restart)
        thread.start()
        rollouts = make_rollouts(20)
        for rollout, scores in zip(rollouts, scorer.score(rollouts), strict=True):
            np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
        thread.join()
    assert len(second[0].requests) == 20


def test_a_server_that_comes_back_with_another_model_is_not_used(start):
    first = start()
    port = first.port
    scorer = scorer_of(first, patience_s=30)
    assert scorer.servers.served.root == "/models/table"
    second = []

    def restart():
        until(lambda: first.busy >= 12)
        first.close()
        second.append(start(port=port, root="/models/chair"))

    with held(first):
        thread = threading.Thread(target=restart)
        thread.start()
        with pytest.raises(EngineError, match="model's root is '/models/chair', expected '/models/table'"):
            scorer.score(make_rollouts())
        thread.join()
    assert not second[0].requests


def test_an_engine_that_is_not_healthy_is_down_even_if_its_server_answers(stub, start):
    sick = start()
    scorer = scorer_of(sick, stub)
    assert scorer.servers.served.version == "0.32.0"
    sick.healthy = False
    assert len(scorer.score(make_rollouts())) == 12
    assert not sick.requests


def test_when_all_servers_are_dead_the_call_ends_with_one_of_them_and_what_to_do(start):
    stubs = [start(), start()]
    scorer = scorer_of(*stubs, patience_s=0.3)
    assert scorer.servers.served.context == 64
    for stub in stubs:
        stub.close()
    with pytest.raises(
        EngineError, match=r"Server http://127\.0\.0\.1:\d+: .* fails with ConnectError, expected an answer within 0 s; .*start"
    ):
        scorer.score(make_rollouts())
    with pytest.raises(EngineError, match="ConnectError"):
        _ = scorer_of(*stubs, patience_s=0.3).provenance


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"version": "0.31.0"}, "version is '0.3[12].0', expected '0.3[12].0'"),
        ({"root": "/models/chair"}, "model's root is '/models/(table|chair)', expected '/models/(table|chair)'"),
        ({"context": 32}, "max_model_len is (64|32), expected (64|32)"),
        ({"model": "chair"}, "serves 'chair', expected 'table'"),
    ],
)
def test_servers_that_do_not_agree_are_refused_by_name_before_anything_is_computed(stub, start, odd, says):
    other = start(**odd)
    for order in ((stub, other), (other, stub)):
        with pytest.raises(EngineError, match=says) as caught:
            scorer_of(*order).score(make_rollouts())
        assert other.url in str(caught.value)
    assert not stub.requests + other.requests


def test_a_context_that_all_servers_have_may_be_stated(stub, start):
    other = start(context=32)
    assert scorer_of(stub, other, context=30).servers.served.context == 30
    with pytest.raises(EngineError, match="max_model_len is 32, expected at least 40"):
        scorer_of(stub, other, context=40).score(make_rollouts())


def test_a_server_that_says_no_version_is_recorded_as_such_and_one_that_says_no_context_is_told_it(start):
    unnamed = start(version=None)
    assert scorer_of(unnamed).provenance.engine == "served by an unnamed version"
    unnamed.context = None
    with pytest.raises(EngineError, match="max_model_len is None, expected a number; pass `context=`"):
        scorer_of(unnamed).score(make_rollouts())
    assert scorer_of(unnamed, context=50).servers.served.context == 50


# --- ending early ---------------------------------------------------------------------------------------------------------------------


def test_an_error_ends_the_call_while_other_requests_are_under_way(stub):
    rollouts = make_rollouts()
    stub.fail(1, refused(400, "no such thing"), is_for(rollouts[11]))
    with held(stub):
        with pytest.raises(EngineError, match="'r11'"):
            scorer_of(stub).score(rollouts)
        assert stub.busy > 0, "nobody waits for the others"
        until(lambda: all(map(is_dropped, stub.connections)))


@pytest.fixture
def _control_c_interrupts():
    """As in a terminal: a process that a shell starts in the background ignores control-c."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_control_c_interrupts")
def test_control_c_ends_the_call_while_requests_are_under_way(stub):
    scorer = scorer_of(stub)
    with held(stub):
        main = threading.main_thread().ident
        interrupter = threading.Thread(target=lambda: (until(lambda: stub.busy >= 12), signal.pthread_kill(main, signal.SIGINT)))
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            scorer.score(make_rollouts())
        interrupter.join()
        assert stub.busy >= 12, "nobody waits for the answers"
        until(lambda: all(map(is_dropped, stub.connections)))


def test_it_runs_where_an_event_loop_runs_already(stub):
    async def notebook():
        return scorer_of(stub).score(make_rollouts())

    assert len(asyncio.run(notebook())) == 12


def test_a_scorer_that_was_used_can_be_sent_to_another_process(stub):
    scorer = scorer_of(stub)
    scorer.score(make_rollouts())
    copy = pickle.loads(pickle.dumps(scorer))  # noqa: S301
    assert copy.provenance == scorer.provenance
    assert len(copy.score(make_rollouts())) == 12


def test_without_its_packages_the_module_says_what_to_install(monkeypatch):
    for missing in ("httpx2",):
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.startswith(("lopd.engines.http", "lopd.engines.server"))]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(MissingDependencyError, match=r"pip install 'lopd\[server\]'"):
                importlib.import_module("lopd.engines.server")


# --- sampling -------------------------------------------------------------------------------------------------------------------------


def test_rollouts_are_what_was_sampled_with_the_end_and_the_logprobs_of_each_token(stub):
    prompts = make_prompts()
    rollouts = source_of(stub, samples_per_prompt=3).sample(prompts)
    assert [r.rollout_id for r in rollouts] == [f"p{i}/s{s}/g0" for i in range(6) for s in range(3)]
    for i, rollout in enumerate(rollouts):
        assert np.array_equal(rollout.prompt_ids, prompts[i // 3].token_ids)
        np.testing.assert_allclose(rollout.behavior_logprobs, truth(rollout), atol=1e-6)
        assert rollout.loss_mask.all()
        ended = int(rollout.response_ids[-1]) in STOP
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or rollout.response_ids.size == 12
        assert not set(rollout.response_ids[:-1].tolist()) & set(STOP)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_a_rollout_depends_on_seed_prompt_sample_and_generation_and_on_nothing_else(stub, start):
    prompts = make_prompts()
    once = as_lists(source_of(stub, samples_per_prompt=2).sample(prompts))
    stub.fail(4, answer(503))
    again = as_lists(source_of(stub, start(), samples_per_prompt=2).sample(prompts[::-1]))
    alone = as_lists([r for p in prompts for r in source_of(stub, samples_per_prompt=2).sample([p])])
    assert once == again == alone
    assert len({tuple(ids) for ids, _ in once.values()}) == 12
    other_seed = as_lists(source_of(stub, samples_per_prompt=2, seed=1).sample(prompts))
    other_round = as_lists(source_of(stub, samples_per_prompt=2, generation=1).sample(prompts))
    assert not {tuple(ids) for ids, _ in other_seed.values()} & {tuple(ids) for ids, _ in once.values()}
    assert {name.replace("/g1", "/g0"): ids for name, ids in other_round.items()} != once
    assert all(0 <= request["seed"] < 2**63 for request in stub.requests)


def test_every_sampling_field_is_sent_so_that_the_servers_own_defaults_never_count(start):
    neutral, biased = start(), start(defaults={"temperature": 0.01, "top_p": 0.1})
    assert as_lists(source_of(neutral).sample(make_prompts())) == as_lists(source_of(biased).sample(make_prompts()))
    request = biased.requests[0]
    expected = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": [0, 5],
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }
    assert expected.items() <= request.items()


def test_a_response_is_as_long_as_the_context_leaves_room_for(start):
    stub = start(context=20)
    prompts = [Prompt("short", [1] * 4), Prompt("long", [1] * 19)]
    source_of(stub).sample(prompts)
    assert sorted(r["max_tokens"] for r in stub.requests) == [1, 12]
    stub.requests.clear()
    with pytest.raises(ContextOverflowError, match="'full'"):
        source_of(stub).sample([*prompts, Prompt("full", [1] * 20)])
    with pytest.raises(InvalidRecordError, match="'out'"):
        source_of(stub).sample([*prompts, Prompt("out", [VOCAB])])
    assert not stub.requests
    assert source_of(stub).sample([]) == []


def test_a_stop_id_of_no_token_ends_nothing(stub):
    (rollout,) = source_of(stub, stop_ids=(VOCAB + 5,)).sample(make_prompts(1))
    assert (rollout.response_ids.size, rollout.finish_reason) == (12, "length")


def set_choice(**values):
    return lambda body: body["choices"][0].update(values)


def set_logprobs(name, place, value):
    return lambda body: body["choices"][0]["logprobs"][name].__setitem__(place, value)


def add_token(token):
    """One more token at the end."""

    def change(body):
        choice = body["choices"][0]
        choice["token_ids"].append(token)
        choice["logprobs"]["tokens"].append(f"token_id:{token}")
        choice["logprobs"]["token_logprobs"].append(-1.0)

    return change


BAD_SAMPLES = {
    "an id of no token": (add_token(VOCAB), InvalidRecordError, "is 32, expected an id below the vocabulary's 32"),
    "no id": (add_token(None), InvalidRecordError, "is None, expected an id"),
    "a negative id": (add_token(-1), InvalidRecordError, "is -1, expected an id"),
    "one token too many": (add_token(3), EngineError, "goes on after stop id|of 12 tokens at id"),
    "none at all": (set_choice(token_ids=[]), EngineError, "after 0 of 12 tokens"),
    "text alone": (without("token_ids"), EngineError, "holds no token_ids"),
    "no logprobs": (set_choice(logprobs=None), EngineError, "holds no tokens"),
    "logprobs of another token": (set_logprobs("tokens", 0, "token_id:31"), EngineError, "is of 'token_id:31', expected 'token_id:"),
    "logprobs of text": (set_logprobs("tokens", 0, " the"), EngineError, "is of ' the', expected 'token_id:"),
    "null": (set_logprobs("token_logprobs", 0, None), InvalidRecordError, "'None'"),
    "nan": (set_logprobs("token_logprobs", 0, float("nan")), InvalidRecordError, "nan"),
    "positive": (set_logprobs("token_logprobs", 0, 1e-3), InvalidRecordError, "0.001"),
    "one logprob less": (lambda b: b["choices"][0]["logprobs"]["token_logprobs"].pop() and None, InvalidRecordError, "expected"),
    "another prompt": (set_choice(prompt_token_ids=[1, 1]), EngineError, "from token"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_sample_that_is_not_what_it_must_be_is_an_error_that_names_the_rollout(stub, name):
    change, error, says = BAD_SAMPLES[name]
    prompts = make_prompts()
    stub.fail(1, changed(lambda body: change(body) and None), lambda request: request["prompt"] == prompts[2].token_ids.tolist())
    with pytest.raises(error, match=says) as caught:
        source_of(stub).sample(prompts)
    assert "'p2/s0/g0'" in str(caught.value)


@pytest.mark.parametrize("reason", ["abort", None, "error"])
def test_a_response_that_was_broken_off_is_asked_for_again(stub, reason):
    whole = as_lists(source_of(stub).sample(make_prompts()))
    stub.fail(2, changed(set_choice(finish_reason=reason)))
    assert as_lists(source_of(stub).sample(make_prompts())) == whole


def test_a_server_that_stops_at_ids_of_its_own_is_an_error(start):
    stub = start(defaults={"stop_token_ids": list(range(8, VOCAB))})
    with pytest.raises(EngineError, match=r"the server ended it \('stop'\) after \d+ of 12 tokens .*expected a stop id"):
        source_of(stub).sample(make_prompts())


def test_a_server_that_does_not_stop_is_an_error(stub):
    stub.fail(1, changed(lambda body: [body["choices"][0]["token_ids"].insert(0, EOS), None][1]))
    with pytest.raises(EngineError, match="goes on after stop id 0 at token 0"):
        source_of(stub).sample(make_prompts())


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_logprobs_after_temperature_or_cut_are_found_out_before_anything_is_sampled(start, sampling):
    raw, processed = start(), start(mode="processed_logprobs")
    rollouts = source_of(raw, **sampling).sample(make_prompts())
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, truth(rollout), atol=1e-6)
    for _ in range(3):
        with pytest.raises(EngineError, match=f"{processed.url}: its log-probs change with the temperature .*--logprobs-mode raw_logprobs"):
            source_of(raw, processed, **sampling).sample(make_prompts() * 10)
    assert len(processed.requests) == 6, "the two of the probe, each time"


def test_at_temperature_one_and_uncut_no_probe_is_sent(stub):
    source_of(stub).sample(make_prompts())
    assert len(stub.requests) == 6


@pytest.mark.parametrize(
    "change", [set_choice(logprobs=None), set_choice(logprobs={"top_logprobs": [None]}), lambda b: b.update(choices=[])]
)
def test_a_server_that_gives_no_candidates_fails_the_probe(stub, change):
    stub.fail(1, changed(change))
    with pytest.raises(EngineError, match="holds no top_logprobs"):
        source_of(stub, temperature=0.7).sample(make_prompts())


def test_how_a_response_ends_must_be_said():
    servers = Servers("http://a", "table")
    with pytest.raises(InvalidRecordError, match=r"eos_ids and sampling.stop_ids are empty"):
        ServerSource(servers, TOKENIZER, MODEL)
    assert ServerSource(servers, TOKENIZER, MODEL, SamplingParams(stop_ids=(7,)), eos_ids=[EOS]).stop_ids == {7}
    assert ServerSource(servers, TOKENIZER, MODEL, eos_ids=[EOS, 3]).stop_ids == {EOS, 3}


def test_a_folder_says_tokenizer_ends_and_teacher(tmp_path, tokenizer, stub):
    teacher = ModelId("teacher", "2", "bfloat16")
    tokenizer.save_pretrained(tmp_path)
    Lineage(sft_teacher=teacher).write(tmp_path)
    servers, params = servers_of(stub), SamplingParams()
    assert ServerSource.from_folder(servers, tmp_path, MODEL, params).stop_ids == {0}
    (tmp_path / "config.json").write_text('{"eos_token_id": 4}')
    assert ServerSource.from_folder(servers, tmp_path, MODEL, params).stop_ids == {0, 4}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    source = ServerSource.from_folder(servers, tmp_path, MODEL, params)
    assert source.stop_ids == {0, 5, 6}
    assert source.manifest == Manifest(source.tokenizer_id, MODEL, params, teacher)
    assert source.tokenizer_id.vocab_size == 96
    with pytest.raises(EngineError, match="cannot be loaded"):
        ServerSource.from_folder(servers, tmp_path / "not here", MODEL, params)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(EngineError, match="cannot be loaded"):
        ServerSource.from_folder(servers, tmp_path, MODEL, params)


def test_a_tokenizer_will_do_in_place_of_its_fingerprint(tokenizer):
    scorer = ServerScorer(Servers("http://a", "m"), tokenizer, MODEL)
    assert scorer.tokenizer_id.vocab_size == 96
    with pytest.raises(InvalidRecordError, match="top_k is -1"):
        ServerScorer(Servers("http://a", "m"), TOKENIZER, MODEL, -1)
    with pytest.raises(InvalidRecordError, match="size of the vocabulary is 32, expected at least 33"):
        ServerScorer(Servers("http://a", "m"), TOKENIZER, MODEL, 33)


# --- with the verbs -------------------------------------------------------------------------------------------------------------------


def test_a_run_that_lost_its_server_goes_on_where_it_was_and_ends_as_if_it_had_not(start):
    whole, broken = start(), start()
    store, reference = MemoryStore(source_of(whole).manifest), MemoryStore(source_of(whole).manifest)
    prompts = make_prompts(12)
    collect_rollouts(source_of(whole), prompts, reference)
    score_rollouts(reference, scorer_of(whole, top_k=2))

    broken.fail(100, cut, lambda request: len(broken.requests) > 5)
    with pytest.raises(EngineError, match="2 attempts"):
        collect_rollouts(source_of(servers=servers_of(broken, attempts=2)), prompts, store, prompts_per_batch=3)
    assert 0 < len(store) < 12
    collect_rollouts(source_of(whole), prompts, store, prompts_per_batch=3)
    broken = start()
    broken.fail(100, cut, lambda request: len(broken.requests) > 5)
    with pytest.raises(LopdError, match="2 attempts"):
        score_rollouts(store, scorer_of(broken, top_k=2, attempts=2), rollouts_per_batch=3, preflight=None)
    assert 0 < store.scored("teacher").sum() < 12
    score_rollouts(store, scorer_of(whole, top_k=2), rollouts_per_batch=3)
    for mine, theirs in zip(
        store.read(range(12), ["teacher"], ["teacher"]), reference.read(range(12), ["teacher"], ["teacher"]), strict=True
    ):
        assert mine.rollout.content_hash == theirs.rollout.content_hash
        np.testing.assert_array_equal(mine.scores["teacher"], theirs.scores["teacher"])
        np.testing.assert_array_equal(mine.top_k["teacher"].ids, theirs.top_k["teacher"].ids)


def test_two_batches_at_once_keep_a_server_busy_and_fill_the_same_store(start):
    stub, lone = start(), start()
    prompts, stores = make_prompts(12), []
    for server, at_once in ((lone, 1), (stub, 2)):
        server.fail(1000, late(0.05))
        store = MemoryStore(source_of(server).manifest)
        collect_rollouts(source_of(server), prompts, store, prompts_per_batch=3, batches_at_once=at_once)
        score_rollouts(store, scorer_of(server), rollouts_per_batch=3, batches_at_once=at_once, preflight=None)
        stores.append(store)
    for mine, theirs in zip(*(store.read(range(12), ["teacher"]) for store in stores), strict=True):
        assert (mine.rollout.rollout_id, mine.rollout.content_hash) == (theirs.rollout.rollout_id, theirs.rollout.content_hash)
        np.testing.assert_array_equal(mine.scores["teacher"], theirs.scores["teacher"])
    assert (lone.busiest, stub.busiest) == (3, 6)


def test_the_example_scores_a_store(start, tmp_path, tokenizer, monkeypatch, capsys):
    stubs = [start(), start()]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rollouts = make_rollouts()
    store = ZarrStore.create(tmp_path / "run.zarr", Manifest(fingerprint_tokenizer(tokenizer), MODEL, SamplingParams()))
    store.append(rollouts)
    arguments = ["--model", "table", "--revision", "abc", "--tokenizer", str(tmp_path / "tokenizer"), "--top-k", "2"]
    monkeypatch.setattr(sys, "argv", ["served_teacher.py", str(tmp_path / "run.zarr"), *(s.url for s in stubs), *arguments])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "served_teacher.py"), run_name="__main__")
    assert "column 'teacher' is complete; 0 log-probs were -inf" in capsys.readouterr().out
    assert any(stub.requests for stub in stubs)
    store.refresh()
    assert store.columns["teacher"].model == ModelId("table", "abc", "bfloat16")
    for record in store.read(range(len(store)), ["teacher"], ["teacher"]):
        np.testing.assert_allclose(record.scores["teacher"], truth(record.rollout), atol=1e-6)
