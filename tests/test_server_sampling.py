"""`ServerSource` against a stub of vLLM: samples, their seeds, wrong answers, and log-probs of the sampler."""

import numpy as np
import pytest
from served_table import MODEL, STOP, TOKENIZER, _short_pauses, make_prompts, servers_of, source_of, start, stub, truth, without  # noqa: F401
from vllm_stub import EOS, VOCAB, answer, changed, drawn_from, table

from lopd.engines.finding import configured_eos
from lopd.engines.server import Servers, ServerScorer, ServerSource
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError
from lopd.records import Lineage, Manifest, ModelId, Prompt, SamplingParams


def as_lists(rollouts):
    return {r.rollout_id: (r.response_ids.tolist(), r.finish_reason) for r in rollouts}


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


CHANGING = {"logit_bias": {"7": -100.0}, "bad_words": ["x"], "structured_outputs": {"regex": "a"}, "guided_choice": ["a"], "stop": "\n"}


@pytest.mark.parametrize("speaks", ["vllm", "sglang"])
def test_fields_of_a_servers_own_that_change_what_is_drawn_are_refused(speaks):
    def of(extra):
        return source_of(servers=Servers("http://a", "m", speaks=speaks, extra=extra), temperature=0.5)

    more = {"custom_logit_processor": "{}", "thinking_token_budget": 0, "best_of": 4, "vllm_xargs": {"to": 5}, "use_beam_search": True}
    for name, value in {**CHANGING, **more, "response_format": {"type": "json_object"}}.items():
        with pytest.raises(InvalidRecordError, match=f"ServerSource: extra of its servers has '{name}', which changes what is drawn"):
            of({name: value})
    set_already = {"vllm": ("temperature", "min_p", "max_tokens", "model"), "sglang": ("sampling_params", "input_ids")}
    for name in set_already[speaks]:
        with pytest.raises(InvalidRecordError, match=f"has '{name}', which every request sets itself, from .* Servers; leave it"):
            of({name: 0.25})
    of(
        {
            "priority": 1,
            "cache_salt": "a",
            "logit_bias": None,
            "return_token_ids": True,
            "use_beam_search": False,
            "best_of": 1,
            "response_format": {"type": "text"},
            "guided_decoding_backend": "xgrammar",
            "lora_path": "adapter",
            **({"temperature": 0.5} if speaks == "vllm" else {}),
        }
    )
    ServerScorer(Servers("http://a", "m", speaks=speaks, extra=CHANGING), TOKENIZER, MODEL)


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
    """Return a change that adds one more token at the end."""

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


def test_a_server_that_caps_responses_is_said_to_and_its_stop_ids_are_not_blamed(start):
    stub = start(defaults={"max_new_tokens": 3})
    with pytest.raises(EngineError, match=r"\('length'\) after 3 of 12 tokens .*it caps responses.*--generation-config vllm") as caught:
        source_of(stub).sample(make_prompts())
    assert "stop_ids" not in str(caught.value)


def test_a_server_that_does_not_stop_is_an_error(stub):
    stub.fail(1, changed(lambda body: [body["choices"][0]["token_ids"].insert(0, EOS), None][1]))
    with pytest.raises(EngineError, match="goes on after stop id 0 at token 0"):
        source_of(stub).sample(make_prompts())


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_log_probs_after_temperature_or_cut_and_raw_ones_are_told_apart_and_kept_as_what_they_are(start, sampling):
    raw, processed = start(), start(mode="processed_logprobs")
    once, again = (source_of(stub, **sampling).sample(make_prompts()) for stub in (raw, processed))
    assert as_lists(once) == as_lists(again)
    for rough, rollout in zip(once, again, strict=True):
        np.testing.assert_allclose(rough.behavior_logprobs, truth(rollout), atol=1e-6)
        np.testing.assert_allclose(rollout.behavior_logprobs, truth(rollout), atol=1e-6)
        np.testing.assert_allclose(rollout.sampler_logprobs, drawn(rollout, **sampling), atol=1e-6)
        assert (rough.sampler_logprobs is None) == (sampling != {"temperature": 0.0})
    assert len(raw.requests) == 3 + len(once)
    assert len(processed.requests) > 3 + len(again), "they were read once more"
    for _ in range(3):
        with pytest.raises(
            EngineError, match=r"logprobs_mode is '(raw|processed)_logprobs', expected '(raw|processed)_logprobs' as of Server"
        ):
            source_of(raw, processed, **sampling).sample(make_prompts() * 10)


def drawn(rollout, temperature=1.0, top_p=1.0):
    rows = table([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])[rollout.prompt_ids.size : -1]
    return [drawn_from(row, temperature, top_p)[token] for row, token in zip(rows, rollout.response_ids, strict=True)]


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logprobs"])
def test_a_rollout_of_another_distribution_leaves_room_to_be_read_once_more(start, mode):
    stub = start(mode=mode, context=16)
    prompts = [Prompt("short", [5, 6]), Prompt("just fits", [5] * 14)]
    assert max(len(r) for r in source_of(stub, temperature=0.7, samples_per_prompt=4, max_new_tokens=99).sample(prompts)) == 15
    with pytest.raises(ContextOverflowError, match="'too long'"):
        source_of(stub, temperature=0.7).sample([Prompt("too long", [5] * 15)])


def scaled(body):
    """Return log-probs after the temperature, without the cut: what some other servers report."""
    top = body["choices"][0]["logprobs"]["top_logprobs"][0]
    body["choices"][0]["logprobs"]["top_logprobs"] = [{name: value / 2 - 3 for name, value in top.items()}]


def test_log_probs_of_no_known_kind_are_refused(stub):
    stub.fail(1, changed(scaled), when=lambda request: request["temperature"] == 2.0)
    with pytest.raises(EngineError, match=r"neither those at temperature 1 nor those of what is drawn.*--logprobs-mode processed_logprobs"):
        source_of(stub, temperature=0.7).sample(make_prompts())
    assert len(stub.requests) == 3


def test_at_temperature_one_and_uncut_no_probe_is_sent(stub):
    source_of(stub).sample(make_prompts())
    assert len(stub.requests) == 6


@pytest.mark.parametrize(
    "change", [set_choice(logprobs=None), set_choice(logprobs={"top_logprobs": [None]}), lambda b: b.update(choices=[])]
)
def test_a_server_that_gives_no_candidates_fails_the_probe(stub, change):
    stub.fail(1, changed(change))
    with pytest.raises(EngineError, match=r"holds no top_logprobs|is not of 1 choices"):
        source_of(stub, temperature=0.7).sample(make_prompts())


def test_a_probe_that_was_broken_off_is_sent_again(stub):
    stub.fail(1, changed(set_choice(finish_reason="abort", logprobs=None)))
    assert len(source_of(stub, temperature=0.7).sample(make_prompts())) == 6


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


@pytest.mark.parametrize(
    ("generation", "model", "first", "both"),
    [
        ('{"temperature": 0.6, "do_sample": true}', '{"eos_token_id": 4}', {0}, {0, 4}),
        ('{"eos_token_id": 5}', '{"eos_token_id": [5, 6]}', {0, 5}, {0, 5, 6}),
        (None, '{"text_config": {"eos_token_id": 4}}', {0, 4}, {0, 4}),
        (None, '{"model_type": "llama"}', {0}, {0}),
    ],
)
def test_what_ends_a_response_is_what_engines_take_from_the_folder(generation, model, first, both, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(model)
    if generation:
        (tmp_path / "generation_config.json").write_text(generation)
    servers = [Servers("http://a", "m", speaks=speaks) for speaks in ("vllm", "sglang")]
    assert [ServerSource.from_folder(s, tmp_path, MODEL, SamplingParams()).stop_ids for s in servers] == [first, both]
    assert {0, *configured_eos(tmp_path)} == first


def test_a_tokenizer_will_do_in_place_of_its_fingerprint(tokenizer):
    scorer = ServerScorer(Servers("http://a", "m"), tokenizer, MODEL)
    assert scorer.tokenizer_id.vocab_size == 96
    with pytest.raises(InvalidRecordError, match="top_k is -1"):
        ServerScorer(Servers("http://a", "m"), TOKENIZER, MODEL, -1)
    with pytest.raises(InvalidRecordError, match="top_k is 33, expected 0 to 32"):
        ServerScorer(Servers("http://a", "m"), TOKENIZER, MODEL, 33)
