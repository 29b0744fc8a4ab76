"""Candidates over HTTP, against a stub of vLLM: kept while it samples, scored as the ids that are asked for."""

import base64
import gzip
import io
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from attrs import evolve
from served_table import (  # noqa: F401
    _short_pauses,
    ids_of,
    make_prompts,
    make_rollouts,
    refused,
    scorer_of,
    source_of,
    start,
    stub,
    truth,
)
from vllm_stub import VOCAB, answer, changed, table

from lopd.engines.server import Servers
from lopd.engines.server.reading import candidate, number
from lopd.engines.server.vllm import _decoded
from lopd.errors import EngineError, InvalidRecordError
from lopd.records import TopK

GIVEN = "prompt_token_id_logprobs"


def rows_of(rollout):
    """Return (T, V) log-probs of what may stand at each response token."""
    ids = ids_of(rollout)
    return table(ids)[rollout.prompt_ids.size : len(ids)]


def with_candidates(rollouts, width, drawn, seed=5):
    """Return the rollouts with ids that are in no order of likelihood; a drawn one may come twice."""
    rng = np.random.default_rng(seed)
    made = []
    for rollout in rollouts:
        size = rollout.response_ids.size
        first = np.argsort(rng.random((size, VOCAB)), axis=1)[:, :width]
        ids = np.concatenate([first, rng.integers(0, 3, (size, drawn))], axis=1)
        made.append(evolve(rollout, candidates=TopK(ids, np.full(ids.shape, -9.0), np.full(size, 1 - width * np.exp(-9.0)), drawn)))
    return made


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_ids_asked_for_are_scored_with_the_models_own_most_likely_outside_of_them(stub, top_k):
    rollouts = with_candidates(make_rollouts(), 5, 4)
    scorer = scorer_of(stub, top_k=top_k, candidates=4, drawn=2, tokens_per_request=1000)
    overlap = 0
    for rollout, scores in zip(rollouts, scorer.score(rollouts), strict=True):
        rows, asked = rows_of(rollout), rollout.candidates.ids
        np.testing.assert_array_equal(scores.top_k.ids[:, :4], asked[:, :4])
        np.testing.assert_array_equal(scores.top_k.ids[:, 4 + top_k :], asked[:, -2:])
        np.testing.assert_allclose(scores.top_k.logprobs, np.take_along_axis(rows, scores.top_k.ids, 1), atol=1e-6)
        others = rows.copy()
        np.put_along_axis(others, asked[:, :4], -np.inf, axis=1)
        np.testing.assert_allclose(scores.top_k.logprobs[:, 4 : 4 + top_k], -np.sort(-others, axis=1)[:, :top_k], atol=1e-6)
        np.testing.assert_allclose(scores.top_k.tail, 1 - np.exp(scores.top_k.logprobs[:, : 4 + top_k].astype(float)).sum(-1), atol=1e-6)
        np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)
        assert scores.top_k.drawn == 2
        overlap += np.isin(asked[:, :4], np.argsort(-rows, axis=1)[:, :3]).sum()
    assert overlap, "some candidate should be among the most likely ones"
    assert len(stub.requests) == len(rollouts), "ids are asked for of one rollout a request"
    provenance = scorer.provenance
    assert (provenance.top_k, provenance.candidates, provenance.drawn) == (6 + top_k, 4, 2)


def test_what_is_sent_is_ids_with_the_rows_of_the_response_alone(stub):
    (rollout,) = with_candidates(make_rollouts()[4:5], 3, 1)
    scorer_of(stub, top_k=2, candidates=3, drawn=1).score([rollout])
    (request,) = stub.requests
    params = request["sampling_params"]
    assert (request["model"], request["token_ids"], request["return_token_ids"]) == ("table", ids_of(rollout), True)
    assert (params["prompt_logprobs"], params["max_tokens"], params["temperature"], params["top_p"]) == (5, 1, 1.0, 1.0)
    assert params["prompt_logprob_start"] == rollout.prompt_ids.size - 1
    asked = np.column_stack([rollout.candidates.ids, rollout.response_ids])
    np.testing.assert_array_equal(params["prompt_logprob_token_ids"], asked)


def array(change):
    """Make something else of the array in the answer."""

    def changing(body):
        values = np.load(io.BytesIO(base64.b64decode(body[GIVEN])))
        written = io.BytesIO()
        np.save(written, change(values))
        body[GIVEN] = base64.b64encode(written.getvalue()).decode()

    return changing


def nan_first(values):
    values[0, 0] = np.nan
    return values


BAD_ANSWERS = {
    "an older version, which drops what it does not know": (lambda b: b.pop(GIVEN) and None, EngineError, "is 'None'"),
    "null": (lambda b: b.update({GIVEN: None}), EngineError, "is 'None'"),
    "not base64": (lambda b: b.update({GIVEN: "%%%"}), EngineError, "is '%%%'"),
    "not an array": (lambda b: b.update({GIVEN: "AAAA"}), EngineError, "is 'AAAA'"),
    "a pickle": (lambda b: b.update({GIVEN: base64.b64encode(b"\x80\x04N.").decode()}), EngineError, "a .npy in base64"),
    "a row less": (array(lambda v: v[1:]), EngineError, r"shape \(8, 5\), expected floats of shape \(9, 5\)"),
    "one row of ids for all": (array(lambda v: v[0]), EngineError, r"shape \(5,\), expected floats"),
    "rows of the next tokens": (array(lambda v: np.roll(v, 1, axis=0)), EngineError, "response token 0 has log-prob"),
    "columns in another order": (array(lambda v: v[:, ::-1]), EngineError, "has log-prob"),
    "texts": (array(lambda v: v.astype(str)), EngineError, "<U"),
    "nan": (array(nan_first), InvalidRecordError, "nan"),
    "other ids": (lambda b: b["prompt_token_ids"].__setitem__(1, 1), EngineError, "from token 1 on"),
    "a list": (lambda b: [1], EngineError, "is not of 1 choices"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_about_other_ids_or_tokens_is_an_error_that_names_the_rollout(stub, name):
    change, error, says = BAD_ANSWERS[name]
    stub.fail(1, changed(change))
    with pytest.raises(error, match=says) as caught:
        scorer_of(stub, candidates=3, drawn=1).score(with_candidates(make_rollouts()[1:2], 3, 1))
    assert "'r1'" in str(caught.value)


def test_an_answer_that_was_broken_off_is_asked_for_again(stub):
    broken = {"choices": [{"finish_reason": "abort"}], "prompt_logprobs": [None], GIVEN: None}
    stub.fail(1, changed(lambda body: body.update(broken)))
    (rollout,) = with_candidates(make_rollouts()[1:2], 3, 0)
    (scores,) = scorer_of(stub, candidates=3).score([rollout])
    np.testing.assert_allclose(scores.logprobs, truth(rollout), atol=1e-6)


def test_a_candidate_without_any_probability_becomes_the_floor(stub):
    def none_first(values):
        values[:, 0] = -np.inf
        return values

    stub.fail(1, changed(array(none_first)))
    (scores,) = scorer_of(stub, candidates=3).score(with_candidates(make_rollouts()[1:2], 3, 0))
    assert (scores.top_k.logprobs[:, 0] == -100).all()
    assert scores.floored == 0, "which counts sampled tokens"


REFUSALS = {
    "switched off": (403, "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."),
    "the first model runner": (400, "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."),
    "no such endpoint": (404, "Not Found"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_cannot_score_candidates_is_an_error_that_says_how_to_start_it(start, name):
    status, said = REFUSALS[name]
    stub = start(scores_ids=(status, said))
    with pytest.raises(EngineError, match=rf"answers {status}.*vLLM 0.32 or later, `--enable-scale-out` and its second model runner"):
        scorer_of(stub, candidates=3).score(with_candidates(make_rollouts()[:2], 3, 0))
    # and it goes on scoring sampled tokens
    assert len(scorer_of(stub).score(make_rollouts())) == 12


def test_a_key_that_is_refused_is_still_said_to_be_one(start):
    with pytest.raises(EngineError, match="the key in `api_key=` was refused"):
        scorer_of(start(key="secret"), candidates=3, api_key="wrong", context=64).score(with_candidates(make_rollouts()[:1], 3, 0))


def test_more_candidates_than_the_server_allows_is_an_error_that_says_how_to_start_it(start):
    with pytest.raises(EngineError, match="larger `--max-logprobs`"):
        scorer_of(start(max_logprobs=3), candidates=3).score(with_candidates(make_rollouts()[:1], 3, 0))


def test_a_rollout_without_its_candidates_is_refused_before_anything_is_sent(stub):
    with pytest.raises(InvalidRecordError, match=r"'r0'.* 0 candidates"):
        scorer_of(stub, candidates=3).score(make_rollouts()[:1])
    with pytest.raises(InvalidRecordError, match=r"'r0'.*drawn"):
        scorer_of(stub, candidates=3, drawn=2).score(with_candidates(make_rollouts()[:1], 3, 1))
    assert not stub.requests


# --- while it samples -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("raw_logprobs", {}),
        ("processed_logprobs", {}),
        ("raw_logprobs", {"temperature": 0.7}),
        ("processed_logprobs", {"temperature": 0.7, "top_p": 0.9}),
        ("raw_logprobs", {"temperature": 0}),
        ("processed_logprobs", {"temperature": 0}),
    ],
)
def test_a_source_keeps_the_most_likely_tokens_at_temperature_1_and_samples_the_same(start, mode, settings):
    stub = start(mode=mode)
    rollouts = source_of(stub, candidates=4, **settings).sample(make_prompts())
    without = source_of(stub, **settings).sample(make_prompts())
    inside = 0
    for rollout, plain in zip(rollouts, without, strict=True):
        np.testing.assert_array_equal(rollout.response_ids, plain.response_ids)
        np.testing.assert_array_equal(rollout.behavior_logprobs, plain.behavior_logprobs)
        rows, kept = rows_of(rollout), rollout.candidates
        np.testing.assert_allclose(kept.logprobs, -np.sort(-rows, axis=1)[:, :4], atol=1e-6)
        np.testing.assert_allclose(kept.logprobs, np.take_along_axis(rows, kept.ids, 1), atol=1e-6)
        np.testing.assert_allclose(kept.tail, 1 - np.exp(kept.logprobs.astype(float)).sum(-1), atol=1e-6)
        assert kept.drawn == 0
        assert plain.candidates is None
        inside += (kept.ids == rollout.response_ids[:, None]).any(-1).sum()
    total = sum(r.response_ids.size for r in rollouts)
    assert inside == total if settings.get("temperature") == 0 else 0 < inside < total, "a sampled token is not put in by force"


def tops(change):
    return changed(lambda body: change(body["choices"][0]["logprobs"]["top_logprobs"]) and None)


BAD_TOPS = {
    "one fewer": (lambda t: t.pop(), "top_logprobs, expected"),
    "null": (lambda t: t.__setitem__(0, None), "top_logprobs holds"),
    "an empty one": (lambda t: t[0].clear(), "has 0 candidates"),
    "a text": (lambda t: t[0].update({"cat": t[0].pop(next(iter(t[0])))}), "'cat'"),
    "nan": (lambda t: t[0].update({name: float("nan") for name in t[0]}), "nan"),
}


@pytest.mark.parametrize("name", BAD_TOPS)
def test_candidates_of_a_sampled_token_that_are_none_are_an_error_that_names_the_rollout(stub, name):
    change, says = BAD_TOPS[name]
    stub.fail(1, tops(change))
    with pytest.raises(InvalidRecordError, match=says) as caught:
        source_of(stub, candidates=3).sample(make_prompts()[:1])
    assert "'p0/s0/g0'" in str(caught.value)


def test_a_source_that_is_asked_for_draws_says_who_draws(stub):
    with pytest.raises(InvalidRecordError, match=r"ServerSource: drawn is 2, expected 0.*sample with HFSource"):
        source_of(stub, candidates=3, drawn=2)
    with pytest.raises(InvalidRecordError, match="candidates is 33, expected 0 to 32"):
        source_of(stub, candidates=VOCAB + 1)


def test_an_answer_of_500_is_tried_again(stub):
    stub.fail(2, answer(500))
    rollouts = with_candidates(make_rollouts()[:3], 3, 0)
    assert len(scorer_of(stub, candidates=3).score(rollouts)) == 3
    stub.fail(9, refused(500, "it stays so"))
    with pytest.raises(EngineError, match="it stays so"):
        scorer_of(stub, candidates=3, attempts=2).score(rollouts)


# --- answers that do harm -----------------------------------------------------------------------------------------------------------------


def npy_of(header: bytes, data: bytes = b"") -> dict[str, str]:
    return {"prompt_token_id_logprobs": base64.b64encode(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data).decode()}


@pytest.mark.parametrize(
    "answer",
    [
        npy_of(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024)}\n"),
        npy_of(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}\n", bytes(16)),
        npy_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}\n", bytes(16)),
        npy_of(b"{'descr': (\n"),
        npy_of(b"-" * 9000 + b"1\n"),
        npy_of(b"{'descr': '|S0', 'fortran_order': False, 'shape': (1099511627776, 1024)}\n"),
        npy_of(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, %d)}\n" % 10**30),
        {"prompt_token_id_logprobs": base64.b64encode(b"PK\x03\x04" + bytes(60)).decode()},
        {"prompt_token_id_logprobs": base64.b64encode(b"PK\x05\x06" + bytes(18)).decode()},
    ],
)
def test_an_array_that_is_not_what_its_header_names_is_one_error(answer):
    with pytest.raises(EngineError, match=r"expected a \.npy in base64"):
        _decoded("Rollout 'a'", answer)


def test_numbers_beyond_a_float_and_ids_of_many_digits_are_refused():
    with pytest.raises(InvalidRecordError, match="expected a number"):
        number("Rollout 'a'", 0, 10**400)
    for text in ("9" * 5000, "٣", "²"):
        with pytest.raises(InvalidRecordError, match="expected an id below"):
            candidate("Rollout 'a'", 0, text, 96)


@pytest.fixture
def told():
    """Return `told(body, **headers)`, the URL of a server that answers everything with these bytes, or with drops where they are None."""

    def tell(body, **headers):
        class Answers(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                    self.flush_headers()
                    time.sleep(0.3)
                self.end_headers()
                with suppress(OSError):
                    while body is None:
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.05)
                    self.wfile.write(body)

        opened.append(ThreadingHTTPServer(("127.0.0.1", 0), Answers))
        Thread(target=opened[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{opened[-1].server_port}"

    opened = []
    yield tell
    for server in opened:
        server.shutdown()
        server.server_close()


def test_answers_that_are_nested_never_end_or_become_gigabytes_are_one_error(told):
    bomb = gzip.compress(bytes(1 << 25))
    for url, said in (
        (told(b"[" * 100_000), "expected the JSON of a model server"),
        (told(None), "has not answered in full after 2 s"),
        (told(b"{}", **{f"X_{i}": "a drip" for i in range(8)}), "has not answered in full after 2 s"),
        (told(bomb, Content_Encoding="gzip"), "answers with more than 16,777,216 bytes"),
    ):
        with pytest.raises(EngineError, match=said):
            _ = Servers([url], "m", first_contact_s=1.5, patience_s=1.5).served
