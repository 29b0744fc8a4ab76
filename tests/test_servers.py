"""`Servers` in trouble: requests that fail, servers that die and come back, and calls that end early."""

import asyncio
import importlib
import pickle
import signal
import socket
import sys
import threading
from contextlib import contextmanager

import httpx2
import numpy as np
import pytest
from attrs import evolve
from served_table import _short_pauses, is_for, make_prompts, make_rollouts, refused, scorer_of, servers_of, source_of, start, stub, truth  # noqa: F401
from vllm_stub import answer, changed, cut, late

from lopd import collect_rollouts, score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.engines import pool
from lopd.engines.server import answers, servers
from lopd.engines.server.access import Key
from lopd.errors import EngineError, InvalidRecordError, LopdError, MissingDependencyError


@contextmanager
def held(stub, when=lambda _: True):
    """Hold back the answers to matching completions until the block is left."""
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
    """Return whether the client has closed it; the server may still answer."""
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


# --- trouble --------------------------------------------------------------------------------------------------------------------------


TROUBLE = {
    "503": answer(503),
    "500": answer(500, body={"error": "EngineCore encountered an issue"}),
    "502 in html": changed(lambda _: b"<html>"),
    "429": answer(429),
    "408": answer(408),
    "a cut connection": cut,
    "an abort": changed(lambda b: b["choices"][0].update(finish_reason="abort", prompt_logprobs=[None])),
    "an abort without log-probs": changed(lambda b: b["choices"][0].update(finish_reason="abort", prompt_logprobs=None)),
    "an error": changed(lambda b: b["choices"][0].update(finish_reason="error")),
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
    ("fault", "says", "do"),
    [
        (answer(500, body={"error": {"message": "out of memory"}}), r"answers 500 \(out of memory\)", "look at the server's log"),
        (cut, "fails with RemoteProtocolError", "look at the server's log"),
        (changed(lambda _: b"<html>"), "answers 200 with something that is not JSON", "look at the server's log"),
        (answer(504), r"answers 504 \(planned\)", "raise the limit of the proxy .*`proxy_read_timeout`.* to `timeout_s`, .*`urls`"),
        (answer(524), r"answers 524 \(planned\)", "raise the limit of the proxy"),
    ],
)
def test_a_request_that_fails_each_time_ends_the_call_with_the_rollout_the_url_and_the_last_status(stub, fault, says, do):
    rollouts = make_rollouts()
    stub.fail(100, fault, is_for(rollouts[5]))
    with pytest.raises(EngineError, match=f"Rollout 'r5': {stub.url}/v1/completions {says}, at last of 3 attempts; {do}.*, and run"):
        scorer_of(stub, attempts=3).score(rollouts)
    assert sum(map(is_for(rollouts[5]), stub.requests)) == 3


@pytest.fixture
def pauses(monkeypatch):
    """Return how long the client would sleep each time; it does not sleep."""
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
        answers.accepted("Rollout 'r'", "http://a", httpx2.Response(429, headers={"Retry-After": said}), Key())
    assert low <= caught.value.pause <= high


# --- several servers ------------------------------------------------------------------------------------------------------------------


def test_requests_are_spread_over_servers_and_bounded_at_each(start):
    stubs = [start(), start()]
    for each in stubs:
        each.fail(1000, late(0.03))
    rollouts = make_rollouts(40)
    for rollout, scores in zip(rollouts, scorer_of(*stubs, concurrency=3).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    assert [stub.busiest for stub in stubs] == [3, 3]
    assert all(len(stub.requests) >= 10 for stub in stubs)
    assert sum(len(stub.requests) for stub in stubs) == 40


def test_of_many_answers_that_arrive_together_one_at_a_time_is_parsed_and_read(start, monkeypatch):
    stubs, under_way, most, accepted = [start(), start()], [], [], servers.accepted

    def parse(owner, *args, **keywords):
        if owner.startswith("Rollout"):
            under_way.append(owner)
            most.append(len(under_way))
        return accepted(owner, *args, **keywords)

    def read(answer):
        threading.Event().wait(0.01)
        return [under_way.pop()]

    monkeypatch.setattr(servers, "accepted", parse)
    for each in stubs:
        each.fail(1000, late(0.1))
    scorer, rollouts = scorer_of(*stubs, concurrency=8), make_rollouts(16)
    read_in_order = scorer.servers.ask([evolve(scorer._request([rollout]), read=read) for rollout in rollouts])
    assert read_in_order == [f"Rollout {rollout.rollout_id!r}" for rollout in rollouts]
    assert [each.busiest for each in stubs] == [8, 8]
    assert most == [1] * 16


def test_answers_that_wait_to_be_read_are_left_unread_once_the_call_is_over(stub):
    read, end = [], threading.Event()

    def fail(answer):
        read.append(answer)
        until(lambda: stub.busy == 0)
        end.wait(0.1)
        raise InvalidRecordError("the first")

    scorer = scorer_of(stub, concurrency=8)
    stub.fail(1000, late(0.1))
    with pytest.raises(InvalidRecordError, match="the first"):
        scorer.servers.ask([evolve(scorer._request([rollout]), read=fail) for rollout in make_rollouts(8)])
    until(lambda: not any(thread.name == "lopd-Servers" for thread in threading.enumerate()))
    assert len(read) < 8


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


def test_each_connection_asks_whether_its_machine_is_still_there(stub, monkeypatch):
    asks, stop = [], servers._Endpoint.stop

    def look(endpoint):
        asks.extend(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for connection in endpoint._sockets)
        stop(endpoint)

    monkeypatch.setattr(servers._Endpoint, "stop", look)
    assert len(scorer_of(stub).score(make_rollouts()[:1])) == 1
    assert asks
    assert all(asks)


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


def test_a_router_that_says_in_words_that_its_servers_are_healthy_is_used(stub):
    stub.says = b"All servers healthy"
    rollouts = make_rollouts()
    for rollout, scores in zip(rollouts, scorer_of(stub).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_answers_a_probe_with_a_nan_is_left_out_and_alone_it_is_refused_at_once(stub, start, status):
    sick = start()
    sick.fail(10**6, refused(status, "Out of range float values are not JSON compliant: nan"))
    alone, both = (source_of(*stubs, temperature=0.5).sample(make_prompts()) for stubs in ([stub], [sick, stub]))
    assert [r.response_ids.tolist() for r in both] == [r.response_ids.tolist() for r in alone]
    with pytest.raises(InvalidRecordError, match=rf"Server {sick.url}: .*answers {status} \(.*nan\), expected .*; check the model for NaN"):
        source_of(servers=servers_of(sick, patience_s=1e6), temperature=0.5).sample(make_prompts())
    assert len(sick.requests) == 2


def test_when_all_servers_are_dead_the_call_ends_with_one_of_them_and_what_to_do(start):
    stubs = [start(), start()]
    scorer = scorer_of(*stubs, patience_s=0.3)
    assert scorer.servers.served.context == 64
    for each in stubs:
        each.close()
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
        assert stub.busy > 0, "a request does not wait for the others"
        until(lambda: all(map(is_dropped, stub.connections)))


@pytest.fixture
def _control_c_interrupts():
    """Let control-c interrupt, as in a terminal: a process that a shell starts in the background ignores it."""
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
        assert stub.busy >= 12, "requests do not wait for the answers"
        until(lambda: all(map(is_dropped, stub.connections)))


@pytest.mark.usefixtures("_control_c_interrupts")
def test_control_c_ends_several_calls_at_once_and_nothing_is_committed_after_it(stub):
    store = MemoryStore(source_of(stub).manifest)
    store.append(make_rollouts())
    with held(stub):
        main = threading.main_thread().ident
        interrupter = threading.Thread(target=lambda: (until(lambda: stub.busy >= 8), signal.pthread_kill(main, signal.SIGINT)))
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            score_rollouts(store, scorer_of(stub, timeout_s=600), rollouts_per_batch=4, batches_at_once=2, preflight=None)
        interrupter.join()
        assert stub.busy >= 8, "requests do not wait for the answers"
        until(lambda: all(map(is_dropped, stub.connections)))
    until(lambda: not any(thread.name == "lopd-overlap" for thread in threading.enumerate()))
    assert not store.scored("teacher").any()


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
