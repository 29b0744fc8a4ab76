"""Families whose caches differ, sampled in batches and alone, against the whole model on each rollout alone."""

import copy
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
import transformers
from hf_parts import source_of

from lopd import MemoryStore, collect_rollouts
from lopd.engines import borders, structure
from lopd.engines.hf import probing
from lopd.engines.hf.probing import check_sampling
from lopd.engines.hf.texts import Way, select_rows
from lopd.errors import ContextOverflowError, ModelError, ModelWarning, RefusedPromptsWarning
from lopd.records import Prompt

VOCAB, BORDER = 96, 16
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "init_std": 0.4, "dropout": 0.0}
_NEMOTRON = {
    "layers_block_type": ["mamba", "attention"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 8,
}
_HALVES = ["linear_attention", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": BORDER,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 8.0, 12.0],
    "factor": 4.0,
}
#: name -> class of the configuration, of the model, what is special about it, and the way that is right for it
FAMILIES = {
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**_LINEAR, "layer_types": _HALVES}, Way.PADDED),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_LINEAR, **_EXPERTS, "layer_types": _HALVES}, Way.PADDED),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}, Way.PADDED),
    "jamba": ("JambaConfig", "JambaForCausalLM", {**_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}, Way.PADDED),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"state_size": 8, "time_step_rank": 4}, Way.EQUAL),
    "bart": ("BartConfig", "BartForCausalLM", _BART, Way.EQUAL),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {"lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"], "logits_soft_cap": 1e4},
        Way.WHOLE,
    ),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"attention_hidden_size": 32, "context_length": 64}, Way.WHOLE),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", {"layer_types": _HALVES, "block_size": 8}, Way.WHOLE),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", _NEMOTRON, Way.WHOLE),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, Way.PADDED),
}


def build(config_class, model_class, special):
    """Build a random model of two layers in eval mode, far from flat."""
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**_SHAPE, **special}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


every_family = pytest.mark.parametrize("name", FAMILIES)
without_warning = pytest.mark.filterwarnings("ignore::lopd.errors.ModelWarning")


@pytest.fixture(scope="module")
def family():
    made = {}

    def get(name):
        if name not in made:
            made[name] = build(*FAMILIES[name][:3])
        return made[name]

    return get


@pytest.fixture
def phi3():
    return build(
        "Phi3Config", "Phi3ForCausalLM", {"rope_parameters": LONGROPE, "original_max_position_embeddings": BORDER, "sliding_window": None}
    )


def check_rollouts(model, rollouts, full_logprobs):
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.behavior_logprobs, full_logprobs(model, rollout), atol=1e-4)


def same_tokens(first, second):
    return [r.response_ids.tolist() for r in first] == [r.response_ids.tolist() for r in second]


@without_warning
@every_family
def test_each_family_reports_the_logprobs_of_the_whole_model_in_batches_and_alone(name, family, tokenizer, prompts, full_logprobs):
    source = source_of(family(name), tokenizer, stop_ids=tuple(range(20)))
    together, alone = source.sample(prompts), [r for prompt in prompts for r in source.sample([prompt])]
    assert len({r.response_ids.size for r in together}) > 2, "rows should leave the batch at different times"
    check_rollouts(family(name), together, full_logprobs)
    check_rollouts(family(name), alone, full_logprobs)
    assert same_tokens(together, alone)


@without_warning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_each_family_is_decoded_in_the_fastest_way_that_is_right(name, dtype, family):
    assert check_sampling(copy.deepcopy(family(name)).to(dtype), VOCAB) is FAMILIES[name][3]


# --- the probe ------------------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_right_cache_is_named_with_the_cause_when_a_source_is_made(family, tokenizer):
    model = copy.deepcopy(family("rwkv"))
    for _ in range(2):
        with pytest.warns(
            ModelWarning, match=r"Model RwkvForCausalLM: decoding with a cache.* gives other log-probs .*right but slow; sample with vLLM"
        ):
            source = source_of(model, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.sample([Prompt("p", [5, 6])])
        source_of(family("llama"), tokenizer)


@pytest.mark.parametrize(
    ("special", "way"),
    [
        ({"floor_scale": 32}, Way.EQUAL),
        ({"floor_scale": 32, "attn_temperature_tuning": False}, Way.PADDED),
        ({"floor_scale": 128}, Way.PADDED),
    ],
    ids=["within the context", "not asked for", "beyond the context"],
)
def test_rows_are_not_padded_where_places_decide_behind_a_border_that_no_probe_reaches(special, way, monkeypatch):
    monkeypatch.setattr(borders, "_LONGEST", 16)
    experts = {"num_local_experts": 2, "moe_layers": [1], "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]}
    assert check_sampling(build("Llama4TextConfig", "Llama4ForCausalLM", {**experts, **special}), VOCAB) is way


def test_models_of_one_structure_are_probed_once_and_again_with_another_attention_or_setting(family, monkeypatch):
    probed = []
    monkeypatch.setattr(probing, "_first_right", lambda model, _: probed.append(model) or (Way.PADDED, []))
    monkeypatch.setattr(structure, "_of_all", {})
    first, second = copy.deepcopy(family("llama")), copy.deepcopy(family("llama"))
    second.name_or_path = second.model.name_or_path = "another/folder"
    with torch.no_grad():
        second.lm_head.weight.add_(1.0)
    for model in (first, second, first):
        check_sampling(model, VOCAB)
    assert probed == [first]
    second.model.layers[0].self_attn.scaling = 0.5
    check_sampling(second, VOCAB)
    first.set_attn_implementation("eager")
    check_sampling(first, VOCAB)
    first.double()
    check_sampling(first, VOCAB)
    first.model.layers[0].forward = first.model.layers[0].forward
    for model in (first, first):
        check_sampling(model, VOCAB)
    third = copy.deepcopy(second)
    third.__class__ = type("Mine", (type(third),), {})
    for model in (third, third, copy.deepcopy(third)):
        check_sampling(model, VOCAB)
    assert [id(model) for model in probed[:-1]] == list(map(id, [first, second, first, first, first, third]))
    assert len(probed) == 7, "each object with code of its own"


def test_a_model_that_no_way_decodes_right_is_refused_with_the_cause_and_the_next_step(family):
    model = copy.deepcopy(family("llama"))

    def alone_is_another_function(_module, _args, kwargs, output):
        if kwargs["input_ids"].shape[0] == 1:
            output.last_hidden_state = output.last_hidden_state * 1.01

    model.get_decoder().register_forward_hook(alone_is_another_function, with_kwargs=True)
    with pytest.raises(ModelError, match=r"Model LlamaForCausalLM: sampling is not possible here, because decoding .*; sample with vLLM"):
        check_sampling(model, VOCAB)


@pytest.mark.parametrize(
    ("dtype", "distance", "right"),
    [(torch.bfloat16, 0.2, True), (torch.bfloat16, math.inf, False), (torch.float32, 0.2, False)],
    ids=["rounding", "NaN", "float32"],
)
def test_the_way_without_a_cache_is_not_refused_for_rounding(dtype, distance, right, family, monkeypatch):
    monkeypatch.setattr(structure, "_of_all", {})
    monkeypatch.setattr(probing, "_distances", lambda model, vocab_size, way: iter([[distance]]))
    model = copy.deepcopy(family("llama")).to(dtype)
    refused = pytest.raises(ModelError, match="decoding without a cache gives other log-probs")
    with pytest.warns(ModelWarning, match="right but slow") if right else refused:
        assert check_sampling(model, VOCAB) is Way.WHOLE


def test_prompts_of_unlike_length_share_no_batch_where_padding_is_wrong(family, tokenizer, prompts):
    model, lengths = copy.deepcopy(family("mamba")), []
    model.get_decoder().register_forward_hook(
        lambda _m, a, kwargs, _o: lengths.append(tuple(kwargs.get("input_ids", *a[:1]).shape)), with_kwargs=True
    )
    source = source_of(model, tokenizer, max_new_tokens=1, samples_per_prompt=2)
    lengths.clear()  # those of its probes
    source.sample(prompts)
    assert sorted(lengths) == [(2, 1), (2, 2), (2, 3), (2, 8), (2, 11), (4, 5)]


def test_a_cache_with_a_tensor_that_has_other_rows_is_refused():
    with pytest.raises(ModelError, match=r"a tensor of shape \(3, 4\), expected 2 rows"):
        select_rows({"keys": [torch.zeros(3, 4)]}, torch.tensor([0]), 2)


@pytest.mark.parametrize("rows", [2, 3])
def test_positions_in_time_height_and_width_are_cut_by_row(rows):
    """The cache of Qwen4 has them, on itself or on a layer: (3, rows, length), which are three rows too."""
    cache, positions = transformers.DynamicCache(), torch.arange(3 * rows * 4).view(3, rows, 4)
    cache.update(torch.zeros(rows, 1, 4, 2), torch.zeros(rows, 1, 4, 2), 0)
    cache.position_ids = cache.layers[0].indexer_position_ids = positions
    select_rows({"cache": cache}, torch.tensor([1]), rows)
    for cut in (cache.position_ids, cache.layers[0].indexer_position_ids):
        assert torch.equal(cut, positions[:, 1:2])
    assert cache.layers[0].keys.shape == (1, 1, 4, 2)


def test_a_cache_that_has_two_names_is_cut_once(family, tokenizer, prompts):
    """As in transformers 5.24, whose outputs have it as `cache`, and under the names of before; the older name warns as an argument."""
    model = copy.deepcopy(family("llama"))
    decoder = model.get_decoder()
    forward = decoder.forward
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def renamed(*args, cache=None, **kwargs):
        assert kwargs.pop("past_key_values", None) is None
        output = forward(*args, **{name: cache}, **kwargs)
        output.cache = getattr(output, name)
        return output

    decoder.forward = renamed
    assert check_sampling(model, VOCAB) is Way.PADDED
    assert same_tokens(source_of(model, tokenizer).sample(prompts), source_of(family("llama"), tokenizer).sample(prompts))


def test_an_autocast_around_sampling_changes_nothing(family, tokenizer, prompts):
    source = source_of(family("llama"), tokenizer)
    plain = source.sample(prompts)
    with torch.autocast("cpu", torch.bfloat16):
        inside = source_of(copy.deepcopy(family("llama")), tokenizer).sample(prompts)
    assert same_tokens(plain, inside)
    for a, b in zip(plain, inside, strict=True):
        np.testing.assert_array_equal(a.behavior_logprobs, b.behavior_logprobs)


# --- LongRoPE -------------------------------------------------------------------------------------------------------------------------


def test_rollouts_on_both_sides_of_a_rope_border_are_those_of_the_whole_model(phi3, tokenizer, full_logprobs):
    source = source_of(phi3, tokenizer, max_new_tokens=8)
    prompts = [Prompt("short", [5] * 4), Prompt("long", [6, 7] * 10), Prompt("shorter", [8]), Prompt("to the border", [9] * 8)]
    together, alone = source.sample(prompts), [source.sample([prompt])[0] for prompt in prompts]
    check_rollouts(phi3, together, full_logprobs)
    assert same_tokens(together, alone)


def test_a_rollout_that_could_cross_a_rope_border_is_refused_before_anything_is_sampled(phi3, tokenizer):
    calls = []
    source = source_of(phi3, tokenizer, max_new_tokens=8)
    phi3.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        ContextOverflowError, match=r"Prompt 'nine': .* up to 17 tokens, expected at most 16, .*LongRoPE.*; .*`max_new_tokens`"
    ):
        source.sample([Prompt("one", [5]), Prompt("nine", [5] * 9)])
    assert not calls
    store = MemoryStore(source.manifest)
    with pytest.warns(RefusedPromptsWarning, match="LongRoPE"):
        report = collect_rollouts(source, [Prompt("one", [5]), Prompt("nine", [5] * 9), Prompt("long", [5] * 17)], store)
    assert list(report.refused) == ["nine"]
    assert [record.rollout.rollout_id for record in store.read(range(2))] == ["one/s0/g0", "long/s0/g0"]


@pytest.mark.parametrize("context", [2, 4, 8, 9, 10])
def test_a_context_of_a_few_tokens_is_no_reason_to_refuse_a_model(context):
    config = transformers.LlamaConfig(**{**_SHAPE, "max_position_embeddings": context})
    torch.manual_seed(0)
    assert check_sampling(transformers.LlamaForCausalLM(config).eval(), VOCAB) is Way.PADDED
