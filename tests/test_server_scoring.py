"""`ServerScorer` against a stub of vLLM: scores, wrong answers, refusals, and keys."""

import runpy
import shutil
import ssl
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from other_stubs import CompletionsStub, SGLangStub
from served_table import MODEL, _short_pauses, ids_of, is_for, make_rollouts, refused, scorer_of, start, stub, truth, without  # noqa: F401
from vllm_stub import VOCAB, Stub, answer, changed, late, table

from lopd import score_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.server import Servers
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, QuarantineWarning
from lopd.records import Manifest, ModelId, Rollout, SamplingParams, fingerprint_tokenizer


@pytest.fixture
def host():
    """Yield a host of the OpenAI completions."""
    host = CompletionsStub()
    yield host
    host.close()


def hosted(host, **settings):
    return scorer_of(host, **{"speaks": "openai", "context": 64, **settings})


def entry(body, place=-1):
    return body["choices"][0]["prompt_logprobs"][place]


def spoil(value):
    """Make the log-prob of the last token something else."""

    def change(body):
        for candidate in entry(body).values():
            candidate["logprob"] = value

    return change


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
    "entries of the next tokens": (
        lambda b: b["choices"][0].update(prompt_logprobs=[*b["choices"][0]["prompt_logprobs"][1:], {"0": {"logprob": -1.0}}]),
        EngineError,
        "first of the prompt's log-probs is .*, expected null",
    ),
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
    "a padding id": (lambda e, own: e.update({str(VOCAB): e.pop(next(k for k in e if k != own))}), "'32', .*larger one.* in process"),
    "nan": (lambda e, own: [v.update(logprob=float("nan")) for k, v in e.items() if k != own], "nan"),
    "logits": (
        lambda e, own: [v.update(logprob=v["logprob"] - 30) for v in e.values()],
        "has log-prob -3.*, expected at least -3.5 of one of 32 tokens; .*raw_logprobs",
    ),
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


@pytest.mark.parametrize("status", [400, 500])
def test_a_nan_that_the_server_cannot_write_is_quarantined_and_its_neighbours_are_scored(stub, status):
    rollouts, scorer = make_rollouts(), scorer_of(stub, tokens_per_request=1000, attempts=2)
    store = MemoryStore(Manifest(scorer.tokenizer_id, MODEL, SamplingParams()))
    store.append(rollouts)
    stub.fail(100, refused(status, "Out of range float values are not JSON compliant: nan"), is_for(rollouts[5]))
    with pytest.warns(QuarantineWarning, match="1 rollouts are without scores"):
        score_rollouts(store, scorer)
    ((row, reason),) = store.quarantined("teacher").items()
    assert row == 5
    assert reason.startswith(f"Rollout 'r5': {stub.url}/v1/completions answers {status} (Out of range float values")
    assert "expected log-probs that are numbers; check the model for NaN" in reason
    rows = [row for row in range(12) if row != 5]
    expected = np.concatenate([truth(rollouts[row]) for row in rows])
    np.testing.assert_allclose(store.read(rows, ["teacher"]).scores["teacher"], expected, atol=1e-6)


def test_no_rollouts_give_no_scores_and_no_request(stub):
    assert scorer_of(stub).score([]) == []
    assert not stub.requests


def test_provenance_says_the_engine_with_its_version(stub, start):
    provenance = scorer_of(stub, top_k=3).provenance
    assert (provenance.model, provenance.vocab_hash, provenance.logprobs_mode, provenance.top_k) == (MODEL, "table-vocabulary", "raw", 3)
    assert provenance.engine == "vllm 0.32.0 served"


@pytest.mark.parametrize(("written", "generated"), [(0.0, True), (None, False), (float("nan"), False)])
def test_a_host_is_read_whatever_stands_for_the_first_token_where_nothing_can_be_shifted(host, written, generated):
    def change(body):
        for values in body["choices"][0]["logprobs"].values():
            values[:] = values[: None if generated else -1]
        body["choices"][0]["logprobs"]["token_logprobs"][0] = written

    host.fail(10**6, changed(change))
    rollouts = make_rollouts()
    for rollout, scores in zip(rollouts, hosted(host).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


REFUSALS = {
    "too long": (refused(400, "This model's maximum context length is 64 tokens. However, ..."), ContextOverflowError, "'r4'.*answers 400"),
    "full": (refused(400, "max_tokens must be at least 1, got 0."), ContextOverflowError, "'r4'.*answers 400"),
    "out of vocabulary": (refused(400, "Token id 5000 is out of vocabulary"), InvalidRecordError, "'r4'.*out of vocabulary"),
    "unknown": (refused(400, "no such thing"), EngineError, "'r4'.*no such thing"),
    "not there": (refused(404, "The model `table` does not exist."), EngineError, "'r4'.*does not exist"),
    "not let in": (refused(403, "secret"), EngineError, r"answers 403 \(secret\): .*api_key"),
    "too large": (answer(413), EngineError, r"'r4'.*answers 413 \(planned\); raise .*proxy.* `client_max_body_size`\), .*`urls`"),
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


TOO_LONG, CODES = "maximum context length", (400, "400", "context_length_exceeded", None)
PASSING = [({"code": 502, "message": "overloaded"}, 2), ({"code": 429}, 6), ({"code": "429"}, 6), ("overloaded", 2)]
PASSING += [({"code": "rate_limit_exceeded", "type": "invalid_request_error"}, 6), ({"type": "overloaded_error"}, 2)]


@pytest.mark.parametrize(("error", "count"), PASSING)
def test_a_passing_error_in_an_answer_of_200_is_asked_again(stub, host, error, count):
    rollouts = make_rollouts()
    for server, scorer in ((stub, scorer_of(stub, attempts=3)), (host, hosted(host, attempts=3))):
        server.fail(count, answer(200, body={"error": error, "choices": None}), is_for(rollouts[4]))
        for rollout, scores in zip(rollouts, scorer.score(rollouts), strict=True):
            np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


@pytest.mark.parametrize(
    ("code", "message", "error", "says", "count"),
    [
        (502, "Provider returned error", EngineError, r"answers 502 \(in a 200: Provider returned error\), at last of 2 attempts", 2),
        (None, "no such thing", EngineError, r"answers 500 \(in a 200: no such thing\), at last of 2 attempts", 2),
        ("no_such_code", "no such thing", EngineError, r"answers 500 \(in a 200: no such thing\), at last of 2 attempts", 2),
        ("invalid_upstream_response", "cut", EngineError, r"answers 500 \(in a 200: cut\), at last of 2 attempts", 2),
        (402, "Insufficient credits", EngineError, r"answers 402 \(in a 200: Insufficient credits\), expected credit", 1),
        ("insufficient_quota", "Quota exceeded", EngineError, r"answers 402 \(in a 200: Quota exceeded\), expected credit", 1),
        *(
            (code, f"This model's {TOO_LONG} is 64", ContextOverflowError, rf"answers 400 \(in a 200: This model's {TOO_LONG}", 1)
            for code in CODES
        ),
    ],
)
def test_a_lasting_error_in_an_answer_of_200_is_one_error_with_its_words(host, code, message, error, says, count):
    rollouts = make_rollouts()
    host.fail(10, answer(200, body={"error": {"code": code, "message": message}}), is_for(rollouts[4]))
    with pytest.raises(error, match=f"^Rollout 'r4': .*{says}"):
        hosted(host, attempts=2).score(rollouts)
    assert sum(map(is_for(rollouts[4]), host.requests)) == count


def test_more_candidates_than_the_server_gives_is_an_error_that_says_how_to_start_it(start):
    stub = start(max_logprobs=3)
    with pytest.raises(EngineError, match=r"max allowed: 3.*--max-logprobs"):
        scorer_of(stub, top_k=5).score(make_rollouts())


def emptied(fits):
    """Leave all log-probs of choices of such ids out."""

    def change(body):
        for logprobs in (choice["logprobs"] for choice in body["choices"]):
            if fits([int(token.removeprefix("token_id:")) for token in logprobs["tokens"][:-1]]):
                logprobs["token_logprobs"] = [None] * len(logprobs["tokens"])

    return changed(change)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_rollout_whose_log_probs_a_host_leaves_empty_is_quarantined_and_the_others_are_scored(host, tokens):
    rollouts, scorer = make_rollouts(), hosted(host, tokens_per_request=tokens)
    store = MemoryStore(Manifest(scorer.tokenizer_id, MODEL, SamplingParams()))
    store.append(rollouts)
    host.fail(10**6, emptied(lambda ids: ids == ids_of(rollouts[5])))
    with pytest.warns(QuarantineWarning, match="1 rollouts are without scores"):
        score_rollouts(store, scorer)
    ((row, reason),) = store.quarantined("teacher").items()
    assert row == 5
    assert "Rollout 'r5': the server gives null for all log-probs of the echoed prompt" in reason


def test_a_host_that_leaves_the_log_probs_of_prompts_empty_is_refused_before_a_rollout_is_sent(host):
    store = MemoryStore(Manifest(hosted(host).tokenizer_id, MODEL, SamplingParams()))
    store.append([rollout for rollout in make_rollouts() if rollout.response_ids.size > 1])
    host.fail(10**6, emptied(lambda _: True))
    with pytest.raises(EngineError, match=rf"^Server {host.url}: .* gives null for all log-probs of the echoed prompt, .*; use a host"):
        score_rollouts(store, hosted(host))
    assert len(host.requests) == 1
    assert not store.quarantined("teacher")


GUARDED = [(401, b"{}"), (403, b"<html>"), (405, b'{"detail": "Method Not Allowed"}'), (307, b""), (200, b"<html>app</html>")]


@pytest.mark.parametrize(("status", "page"), GUARDED)
def test_a_path_that_a_gateway_guards_is_not_asked_for_where_the_server_can_do_without(start, host, request, status, page):
    stub, sglang = start(), SGLangStub()
    request.addfinalizer(sglang.close)
    stub.guards, sglang.guards = {"/health": (status, page), "/version": (status, page)}, {"/health": (status, page)}
    host.guards = {"/v1/models": (status, page)}
    rollouts = make_rollouts()
    for scorer in (scorer_of(stub), scorer_of(sglang, speaks="sglang"), hosted(host)):
        for rollout, scores in zip(rollouts, scorer.score(rollouts), strict=True):
            np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    with pytest.raises(EngineError, match=rf"/v1/models:? .*answers {status}"):
        hosted(host, context=None).score(rollouts)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_path_that_answers_with_trouble_is_of_a_server_that_is_down(start, host, status):
    stub = start()
    stub.guards, host.guards = {"/health": (status, b"{}")}, {"/v1/models": (status, b"{}")}
    for scorer in (scorer_of(stub, patience_s=0.3), hosted(host, patience_s=0.3)):
        with pytest.raises(EngineError, match=rf"answers {status} .*, expected an answer within 0 s"):
            scorer.score(make_rollouts())


@pytest.mark.parametrize("torn", [b'{"choices": [{"te', b""])
def test_an_answer_to_the_first_probe_that_breaks_off_is_asked_for_again(host, torn):
    rollouts = make_rollouts()
    host.fail(1, changed(lambda _: torn))
    for rollout, scores in zip(rollouts, hosted(host).score(rollouts), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


def test_a_model_that_is_not_served_is_an_error_that_says_which_are(stub):
    with pytest.raises(EngineError, match="serves 'table', expected 'qwen'"):
        scorer_of(stub, model="qwen").score(make_rollouts())
    assert not stub.requests


def test_a_key_opens_the_server_and_is_shown_nowhere(start, monkeypatch):
    stub = start(key="sesame-17")
    said = {None: "it needs a key, and the request had none", "sesame-18": "the key in `api_key=` was refused"}
    for wrong, what in said.items():
        scorer = scorer_of(stub, api_key=wrong)
        with pytest.raises(EngineError, match=rf"answers 401 \(Unauthorized\): {what}; pass .*set VLLM_API_KEY") as caught:
            scorer.score(make_rollouts())
        assert "sesame" not in repr(scorer) + repr(scorer.servers) + str(caught.value)
    assert len(scorer_of(stub, api_key="sesame-17").score(make_rollouts())) == 12
    monkeypatch.setenv("VLLM_API_KEY", "sesame-17")
    assert len(scorer_of(stub).score(make_rollouts())) == 12


def test_a_proxy_of_the_environment_that_is_not_one_is_named(stub, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "garbage://x:y")
    with pytest.raises(
        EngineError, match=r"Server http://127.*no client can be made for it \(InvalidURL: Invalid port.*look at HTTP_PROXY"
    ):
        scorer_of(stub).score(make_rollouts())


@pytest.fixture
def secure(tmp_path, monkeypatch):
    """Return `secure(stub)`, which gives it a certificate of its own; return it as it is asked from then on, and the file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=stub -addext subjectAltName=IP:127.0.0.1"

    def give(stub):
        key, certificate = (tmp_path / f"{stub.url[-5:]}{what}.pem" for what in ("key", "certificate"))
        subprocess.run([*made.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        stub._listener.socket = context.wrap_socket(stub._listener.socket, server_side=True)
        return SimpleNamespace(url=stub.url.replace("http", "https")), certificate

    return give


def test_a_certificate_that_is_not_trusted_is_said_and_trusted_in_the_same_program_once_its_file_is_named(stub, secure, monkeypatch):
    secured, certificate = secure(stub)
    with pytest.raises(
        EngineError, match=rf"^Server {secured.url}: its certificate is not trusted \(self.signed certificate\), .*; set SSL_CERT_FILE"
    ):
        scorer_of(secured).score(make_rollouts())
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for rollout, scores in zip(make_rollouts(), scorer_of(secured).score(make_rollouts()), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


def test_a_file_of_certificates_counts_as_it_is_now(start, secure, monkeypatch):
    (first, authorities), (second, other) = secure(start()), secure(start())
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    scorer_of(first).score(make_rollouts())
    with pytest.raises(EngineError, match="its certificate is not trusted"):
        scorer_of(second).score(make_rollouts())
    authorities.write_text(authorities.read_text() + other.read_text())
    assert len(scorer_of(second).score(make_rollouts())) == len(make_rollouts())


def test_a_server_whose_certificate_is_not_trusted_leaves_the_work_to_the_others(start, secure, caplog):
    (secured, _), healthy = secure(start()), start()
    for rollout, scores in zip(make_rollouts(), scorer_of(secured, healthy).score(make_rollouts()), strict=True):
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
    assert f"Server {secured.url} is given up: its certificate is not trusted" in caplog.text


def test_urls_may_end_as_openai_clients_write_them():
    assert Servers(["http://a:1/v1", "http://b/", "http://c/x/v1/"], "m").urls == ("http://a:1", "http://b", "http://c/x")
    assert Servers("http://a", "m").urls == ("http://a",)


@pytest.mark.parametrize(("kind", "spoken"), [(Stub, []), (CompletionsStub, ["--speaks", "openai", "--context", "64"])])
def test_the_example_scores_a_store(kind, spoken, tmp_path, tokenizer, monkeypatch, capsys, request):
    stubs = [kind(), kind()]
    request.addfinalizer(lambda: [each.close() for each in stubs])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rollouts = make_rollouts()
    store = ZarrStore.create(tmp_path / "run.zarr", Manifest(fingerprint_tokenizer(tokenizer), MODEL, SamplingParams()))
    store.append(rollouts)
    arguments = ["--model", "table", "--revision", "abc", "--tokenizer", str(tmp_path / "tokenizer"), "--top-k", "2", *spoken]
    monkeypatch.setattr(sys, "argv", ["served_teacher.py", str(tmp_path / "run.zarr"), *(s.url for s in stubs), *arguments])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "served_teacher.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "column 'teacher' is complete; 0 log-probs were -inf" in printed
    assert f"Costs(requests={sum(len(stub.requests) for stub in stubs)}, " in printed
    assert any(stub.requests for stub in stubs)
    store.refresh()
    assert store.columns["teacher"].model == ModelId("table", "abc", "bfloat16")
    for record in store.read(range(len(store)), ["teacher"], ["teacher"]):
        np.testing.assert_allclose(record.scores["teacher"], truth(record.rollout), atol=1e-6)
