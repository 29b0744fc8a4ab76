"""Identities are equal if and only if logits are: over families, settings, buffers, adapters, wrappers and folders."""

import copy
import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

import peft
import pytest
import torch
import transformers
from attrs import evolve
from conftest import build_tokenizer

from lopd import MemoryStore, collect_rollouts
from lopd.engines.hf import HFScorer, HFSource, folder_model_id, load_model, model_id
from lopd.engines.identity import function_version
from lopd.errors import EngineError, ModelError, TeacherConsistencyError
from lopd.guards import check_teacher_consistency
from lopd.records import Lineage, Manifest, ModelId, Prompt, SamplingParams, fingerprint_tokenizer, mixture_id
from lopd.records.identity import hash_weights_in_order

# torch.compile and some methods of peft warn of what is not the matter here
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::UserWarning", "ignore::RuntimeWarning")

IDS = torch.tensor([[5, 9, 3, 7, 11, 30, 31, 40, 12, 8, 61, 62, 7, 7, 90, 5, 33, 20, 21, 9]])
SAME, OTHER = 1e-4, 1e-3  # nats: rounding is below the first, another function above the second
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96, "initializer_range": 0.4, "eos_token_id": 0}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024, **more}}


def rope(theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


#: Settings that may or may not change a function of any family with rotary embeddings; logits tell.
ROTARY = {
    "theta": rope(2e4),
    "theta spelled out": rope(1e4),
    "linear": rope(rope_type="linear", factor=2.0),
    "linear by 1": rope(rope_type="linear", factor=1.0),
    "yarn": yarn(),
    "yarn spelled out": yarn(beta_fast=32, beta_slow=1),
    "yarn, sharper": yarn(beta_fast=4.0),
    "llama3": rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "longer": {"max_position_embeddings": 128},
    "padded, and cached": {"pad_token_id": 0, "use_cache": False},
    "dropout": {"attention_dropout": 0.3},
    "eps": {"rms_norm_eps": 0.1},
    "activation": {"hidden_act": "gelu"},
}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": ("Llama", SHAPE, ROTARY),
    "qwen3": ("Qwen3", SHAPE, ROTARY | {"window": LOCAL | {"use_sliding_window": True}}),
    "phi3": (
        "Phi3",
        SHAPE | {"pad_token_id": 2},
        {
            "partial": rope(partial_rotary_factor=0.5),
            "partial by 1": rope(partial_rotary_factor=1.0),
            "window": {"sliding_window": 4},
        },
    ),
    "granite": (
        "Granite",
        SHAPE,
        {name: {name: 0.5} for name in ("logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier")}
        | {"no scale": {"logits_scaling": 1}},
    ),
    "gemma2": (
        "Gemma2",
        SHAPE | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0} | LOCAL,
        {
            "no cap on scores": {"attn_logit_softcapping": None},
            "another cap on scores": {"attn_logit_softcapping": 5.0},
            "no cap on logits": {"final_logit_softcapping": None},
            "scale": {"query_pre_attn_scalar": 16},
            "window": {"sliding_window": 8},
            "padded": {"pad_token_id": 0},
        },
    ),
    "gemma4": (
        "Gemma4Text",
        SHAPE
        | LOCAL
        | {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "final_logit_softcapping": 3.0,
        },
        {"no cap on logits": {"final_logit_softcapping": None}, "window": {"sliding_window": 8}, "eps": {"rms_norm_eps": 0.1}},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        SHAPE | MOE,
        {
            "routed scale": {"routed_scaling_factor": 1.5},
            "unnormalised": {"norm_topk_prob": False},
            "one expert": {"num_experts_per_tok": 1},
            "yarn": yarn(mscale_all_dim=1.0),
            "loss of the router": {"router_aux_loss_coef": 0.5},
        },
    ),
    "gpt2": (
        "GPT2",
        GPT2,
        {
            "unscaled": {"scale_attn_weights": False},
            "by layer": {"scale_attn_by_inverse_layer_idx": True},
            "eps": {"layer_norm_epsilon": 0.1},
            "dropout": {"resid_pdrop": 0.0},
            "summary": {"summary_type": "mean"},
            "upcast": {"reorder_and_upcast_attn": True},
        },
    ),
}


def build(family: str, **settings: Any) -> Any:
    prefix, shape, _ = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**copy.deepcopy(shape), **copy.deepcopy(settings)})
    attention = settings.get("attn_implementation", "eager" if family == "gemma2" else "sdpa")
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if family == "gpt2" else f"{prefix.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, kind)._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in model.state_dict())):
            tensor.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(tensor.numel()))
    return model.eval()


@torch.no_grad()
def function_of(model: Any) -> torch.Tensor:
    """Return (20, 96) log-probs of the model as it is called, wrappers and all."""
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=IDS, use_cache=False).logits[0, :, :96].float().log_softmax(-1)


Seen = dict[str, tuple[ModelId, torch.Tensor]]


def look(model: Any) -> tuple[ModelId, torch.Tensor]:
    return model_id(model), function_of(model)


def assert_equal_if_and_only_if_the_function_is(seen: Seen) -> None:
    for (a, (mine, ours)), (b, (yours, theirs)) in combinations(seen.items(), 2):
        difference = float((ours - theirs).abs().max())
        assert not SAME < difference < OTHER, f"{a!r} and {b!r} differ by {difference:.2g}: neither rounding nor another function"
        assert (mine == yours) == (difference <= SAME), (
            f"{a!r} and {b!r} differ by {difference:.2g}, and their identities are {mine} and {yours}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_settings(family: str) -> None:
    seen = {"as it is": look(build(family))}
    for name, settings in FAMILIES[family][2].items():
        seen[name] = look(build(family, **settings))
    for attention in ("sdpa", "eager"):
        seen[attention] = look(build(family, attn_implementation=attention))
    assert_equal_if_and_only_if_the_function_is(seen)
    assert len({str(identity) for identity, _ in seen.values()}) > 2


def adapted(model: Any, *names: str, seed: int = 1, **options: Any) -> Any:
    """Return a copy of the model with adapters of these names, each of which does something."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(copy.deepcopy(model), config, names[0])
    for name in names[1:]:
        made.add_adapter(name, made.peft_config[names[0]])
    with torch.no_grad():
        for number, name in enumerate(names, seed):
            for path, parameter in made.named_parameters():
                if any(part in path for part in (f".lora_B.{name}.", f".modules_to_save.{name}.", ".trainable_tokens_delta")):
                    parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(number))
    return made.eval()


def in_folder(model: Any, folder: Any) -> dict[str, tuple[ModelId, torch.Tensor]]:
    """Return the identity of a saved model: as it is loaded again, and without loading it."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    loaded = load_model(folder)[0]
    return {f"{folder.name} loaded": look(loaded), f"{folder.name} not loaded": (folder_model_id(folder), function_of(loaded))}


@pytest.mark.parametrize("family", FAMILIES)
def test_wrappers_adapters_and_folders(family: str, tmp_path: Any) -> None:
    model = build(family)
    seen = in_folder(model, tmp_path / "whole") | {"as it is": look(model), "compiled": look(torch.compile(model))}
    both = adapted(load_model(tmp_path / "whole")[0], "default", "other")
    seen |= {"adapter": look(both), "compiled adapter": look(torch.compile(both))} | in_folder(both, tmp_path / "adapter")
    both.set_adapter("other")
    seen["other adapter"] = look(both)
    both.base_model.set_adapter(["default", "other"])
    seen["two adapters"] = look(both)
    with both.disable_adapter():
        seen["adapters off"] = look(both)
    both.set_adapter("default")
    both.merge_adapter()
    seen |= {"merged": look(both), "unloaded": look(both.unload())}
    layer = next(child for name, child in model.named_modules() if name.endswith((".0.mlp", ".0.self_attn")))
    parent = model.get_submodule(next(name for name, child in model.named_modules() if child is layer).rpartition(".")[0])
    parent.mlp = torch.compile(parent.mlp)
    seen["compiled layer"] = look(model)
    assert_equal_if_and_only_if_the_function_is(seen)
    assert len({identity.revision for identity, _ in seen.values()}) == 4
    assert str(seen["compiled"][0]) == str(seen["as it is"][0])


@pytest.mark.parametrize(
    "saved", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [3, 5]}]
)
def test_adapters_keep_their_precision_on_a_narrow_base(saved: dict[str, Any], tmp_path: Any) -> None:
    in_folder(build("llama").bfloat16(), tmp_path / "base")
    model = adapted(load_model(tmp_path / "base")[0], "default", **saved)
    seen = {"as it is": look(model), "parallel": look(torch.nn.DataParallel(model))} | in_folder(model, tmp_path / "adapter")
    assert_equal_if_and_only_if_the_function_is(seen)
    assert len({identity for identity, _ in seen.values()}) == 1


TUNERS = {
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "lokr": peft.LoKrConfig(target_modules=["q_proj"], r=4),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "boft": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "lora": peft.LoraConfig(target_modules=["q_proj"]),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=100),
    "dora": peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "saved modules": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
    "tied embedding": peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "tokens": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "expert weights": peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]),
}


@pytest.mark.parametrize("method", TUNERS)
def test_methods_of_peft(method: str) -> None:
    base = build("llama", tie_word_embeddings=method == "tied embedding")
    made = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(TUNERS[method])).eval()
    seen = {"base": look(base), "fresh": look(made)}
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    seen["trained"] = look(made)
    with torch.autocast("cpu", torch.bfloat16):
        assert model_id(made) == seen["trained"][0]
    with made.disable_adapter():
        seen["off"] = look(made)
    if method not in ("saved modules",):
        made.merge_adapter()
        seen["merged"] = look(made)
    assert_equal_if_and_only_if_the_function_is(seen)
    assert seen["trained"][0] != seen["base"][0]


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.LoraConfig(target_modules=["q_proj"], lora_bias=True),
    ],
)
def test_an_adapter_with_an_effect_beside_the_weights_is_refused(config: Any) -> None:
    made = peft.get_peft_model(build("llama"), config)
    with pytest.raises(ModelError, match=r"(of the kind .*TUNING|cannot be merged).*pass `identity=`"):
        model_id(made)


@pytest.mark.parametrize(
    ("family", "buffer"),
    [("gemma4", "layer_scalar"), ("deepseek_v3", "e_score_correction_bias"), ("gemma2", "embed_scale"), ("llama", "inv_freq")],
)
def test_buffers_saved_or_not(family: str, buffer: str, tmp_path: Any) -> None:
    model = build(family)
    seen = {"as it is": look(model)} | in_folder(model, tmp_path / "before")
    with torch.no_grad():
        next(tensor for name, tensor in model.named_buffers() if name.endswith(buffer)).mul_(-1.0)
    seen |= {"changed": look(model)} | in_folder(model, tmp_path / "after")
    assert_equal_if_and_only_if_the_function_is(seen)
    assert len({identity.revision for identity, _ in seen.values()}) == 2


class Quantised(torch.nn.Module):
    """A linear layer of whole numbers and a scale, as buffers, as most methods of quantisation have it."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.qweight.float() * self.scale).T


def test_scales_of_quantised_weights(tmp_path: Any) -> None:
    model = build("llama")
    seen = {"as it is": look(model)} | in_folder(model, tmp_path / "plain")
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
    seen["quantised"] = look(model)
    model.model.layers[1].mlp.down_proj.scale.mul_(2)
    seen["doubled"] = look(model)
    made = adapted(build("llama"), "default", "other")
    for layer in made.base_model.model.model.layers:
        layer.mlp.down_proj.base_layer = Quantised(layer.mlp.down_proj.base_layer)
    seen["adapter"] = look(made)
    made.set_adapter("other")
    seen["other adapter"] = look(made)
    with made.disable_adapter():
        seen["adapters off"] = look(made)
    assert_equal_if_and_only_if_the_function_is(seen)
    config = tmp_path / "plain" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"its weights are quantised, expected plain ones.*pass `model_id\(model\)` of the loaded model"):
        folder_model_id(tmp_path / "plain")


def test_a_model_that_reads_images_too(tmp_path: Any) -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=build("llama").config, vision_config=vision)
    ).save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model_id(loaded) == folder_model_id(tmp_path)


def test_a_cast_that_loses_nothing_keeps_the_function_in_whatever_dtype() -> None:
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    wide, narrow = model_id(model), model_id(model.bfloat16())
    assert wide.same_weights(narrow)
    assert narrow.same_weights(model_id(model.double()))
    assert wide == model_id(model.float()), "a cast rounds the rotary frequencies, and loading makes them again"
    assert wide != narrow, "scores of one are not put in a column of the other"


def settings_changed(model: Any) -> None:
    model.config.final_logit_softcapping = 1.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weights": lambda model: next(model.parameters()).mul_(1.5),
    "weights through .data": lambda model: next(model.parameters()).data.mul_(1.5),
    "buffer": lambda model: model.base_model.model.model.rotary_emb.inv_freq.mul_(0.5),
    "setting": settings_changed,
    "dtype": lambda model: model.half(),
    "other adapter": lambda model: model.set_adapter("other"),
    "two adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "strength": lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_model_was_identified_is_seen(change: str) -> None:
    model, tokenizer = adapted(build("llama"), "default", "other"), build_tokenizer()
    source, scorer = HFSource(model, tokenizer, SamplingParams(max_new_tokens=4)), HFScorer(model, tokenizer)
    rollouts = source.sample([Prompt("p", [5, 6, 7])])
    scorer.score(rollouts)
    tokenizer.pad_token, model.config.pad_token_id, model.config.use_cache = "x", 3, False
    model.train().eval()
    scorer.score(source.sample([Prompt("q", [8, 9])]))
    with torch.no_grad():
        CHANGES[change](model)
    assert not model_id(model).same_weights(source.manifest.policy) or change == "dtype"
    for ask in (lambda: source.sample([Prompt("p", [5])]), lambda: scorer.score(rollouts)):
        with pytest.raises(
            EngineError, match=r"HFS\w+: the weights of its model were changed after it was identified \(or .* active adapters"
        ):
            ask()


def trained_while_off(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.mul_(1.5)


@pytest.mark.parametrize("off", [True, False])
def test_what_leaves_the_function_as_it_is_is_not_a_change(off: bool) -> None:
    model, tokenizer = adapted(build("llama"), "default", "other"), build_tokenizer()
    if off:
        model.base_model.disable_adapter_layers()
    source, scorer = HFSource(model, tokenizer, SamplingParams(max_new_tokens=4)), HFScorer(model, tokenizer)
    rollouts = source.sample([Prompt("p", [5, 6, 7])])
    scores = scorer.score(rollouts)
    for change in [trained_while_off] if off else [lambda model: model.merge_adapter(), lambda model: model.delete_adapter("other")]:
        change(model)
        assert [rollout.response_ids.tolist() for rollout in source.sample([Prompt("p", [5, 6, 7])])] == [rollouts[0].response_ids.tolist()]
        torch.testing.assert_close(scorer.score(rollouts)[0].logprobs, scores[0].logprobs, atol=1e-5, rtol=0)
    if off:
        model.base_model.enable_adapter_layers()
        with pytest.raises(EngineError, match="active adapters"):
            scorer.score(rollouts)


def test_what_is_not_a_model_in_memory_has_no_identity() -> None:
    for thing in (None, "org/student", torch.nn.Linear(2, 2)):
        with pytest.raises(ModelError, match=f"it is {type(thing).__name__}, expected a causal LM"):
            model_id(thing)
    for ask in (model_id, lambda model: HFScorer(model, build_tokenizer())):
        with pytest.raises(
            ModelError, match=r"Model LlamaForCausalLM: \d+ of its weights \('.*'\) are on the meta device, expected all in memory"
        ):
            ask(build("llama").to("meta"))


def test_embeddings_that_follow_the_longest_sequence_are_not_a_change() -> None:
    model = build("llama", **rope(rope_type="dynamic", factor=2.0))
    identity, version = model_id(model), function_version(model)
    with torch.no_grad():
        model(input_ids=torch.arange(90)[None])
    assert (model_id(model), function_version(model)) == (identity, version)


def test_a_name_in_the_hub_is_its_folder_and_keeps_its_lineage(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, folder = ModelId("teacher", "weights:1/2", "float32"), tmp_path / "student"
    model = build("llama")
    in_folder(model, folder)
    Lineage(sft_teacher=teacher).write(folder)
    expected = folder_model_id(folder)
    place = tmp_path / "hub" / "models--org--student"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    folder.rename((place / "snapshots").mkdir() or place / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = HFSource.from_folder("org/student", SamplingParams())
    assert source.manifest.sft_teacher == teacher
    assert source.manifest.policy == folder_model_id("org/student") == expected == model_id(model)
    assert source.manifest.policy.name == folder_model_id("org/student").name == "student"


def test_an_identity_of_lopd_0_2_is_compared_by_its_parameters() -> None:
    model = build("llama")
    now, other = model_id(model), model_id(build("llama", **yarn()))
    old = ModelId("student", hash_weights_in_order(sorted(model.named_parameters())), "float32")
    assert old == now and old == other and now != other  # noqa: PT018
    assert hash(old) == hash(now) == hash(other)
    assert mixture_id([old, now]) == now == mixture_id([now, old])
    assert mixture_id([now, other]).parts != mixture_id([old, other]).parts
    assert str(now).startswith(str(old).replace("student", "LlamaForCausalLM") + "/")
    store = MemoryStore(Manifest(fingerprint_tokenizer(build_tokenizer()), old, SamplingParams(max_new_tokens=4), sft_teacher=old))
    report = collect_rollouts(HFSource(model, build_tokenizer(), store.manifest.sampling, Lineage(now)), [Prompt("p", [5, 6])], store)
    assert report.rollouts == 1
    scored = HFScorer(model, build_tokenizer()).provenance
    check_teacher_consistency(store.manifest, [scored])
    with pytest.raises(TeacherConsistencyError, match=r"its weights are the same, and its settings or buffers are not: load it as it was"):
        check_teacher_consistency(evolve(store.manifest, sft_teacher=other), [scored])
