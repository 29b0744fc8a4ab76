"""Adapters are exported for the base that is under them: one that was changed in memory is said before anything is trained, and refused.

Those that would stay as they are, loaded to be sampled from, are not trained without a word either.
"""

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_function_identity import TUNERS

from lopd import CausalLMStudent
from lopd.engines.adapters import check_base
from lopd.engines.finding import served_eos
from lopd.engines.hf import load_model
from lopd.engines.identity import folder_model_id, model_id
from lopd.errors import EngineError, ModelError, ModelWarning
from lopd.records import Lineage, fingerprint_tokenizer

CHANGED = r"Model \w+: '{}' under its adapters is not as in .*, on which an export of them is loaded; export it merged"


@pytest.fixture
def base(make_model, tokenizer, tmp_path):
    """Return `base(kind, dtype)`: a model that was loaded from the folder `base`, which is in shards."""

    def load(kind="qwen3_padded", dtype=torch.float32):
        make_model(kind).save_pretrained(tmp_path / "base", max_shard_size="20KB")
        tokenizer.save_pretrained(tmp_path / "base")
        return load_model(tmp_path / "base", dtype)[0]

    return load


def adapted(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options}))


def assert_compared(model):
    """See that a model passes, and no longer does when a frozen weight is changed."""
    state = torch.get_rng_state()
    check_base(model, before=False)
    assert torch.equal(torch.get_rng_state(), state)
    names = [name for name, _ in model.named_parameters() if re.search(r"\.1\.(input_layernorm|ln_1)\.(original_module\.)?weight", name)]
    with torch.no_grad():
        model.get_parameter(names[0]).mul_(1.01)
    with pytest.raises(ModelError, match=CHANGED.format(r"[\w.]+\.1\.(input_layernorm|ln_1)\.weight")):
        check_base(model, before=False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3_padded", {"use_dora": True}),
        ("qwen3_padded", {"modules_to_save": ["norm", "lm_head"]}),
        ("llama_tied", {"trainable_token_indices": [5, 6]}),
        ("qwen3_padded", {"target_modules": ["embed_tokens", "down_proj"]}),
        ("qwen3_padded", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}),
        ("llama_tied", {"init_lora_weights": "pissa"}),
        ("llama_tied", {"init_lora_weights": "olora"}),
        ("phi_bias", {"bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_what_adapters_change_by_themselves_is_not_a_change_of_their_base(kind, options, base):
    model = adapted(base(kind), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert_compared(model)


def test_neither_are_merged_adapters_nor_those_that_transformers_loaded(base, tokenizer, tmp_path):
    model = adapted(base())
    model.merge_adapter()
    check_base(model, before=False)
    model.unmerge_adapter()
    CausalLMStudent(adapted(base()), tokenizer).export(tmp_path / "out", tokenizer, Lineage())
    assert_compared(load_model(tmp_path / "out")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neither_is_the_rounding_of_adapters_that_were_merged_and_taken_out_again(dtype, base):
    model = adapted(base(dtype=dtype), target_modules=["q_proj", "down_proj", "embed_tokens"])
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    before = layer.base_layer.weight.clone()
    for strength in (0.5, 1.0):  # trained between
        layer.scaling["default"] = strength
        model.merge_adapter()
        model.unmerge_adapter()
    assert not torch.equal(layer.base_layer.weight, before)
    assert_compared(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neither_is_a_cast(dtype, base):
    check_base(adapted(base(dtype=dtype).bfloat16()), before=False)
    assert_compared(adapted(base(dtype=dtype).float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_adapters_that_stays_in_the_base_is_a_change_of_it(dtype, base):
    model = adapted(base(dtype=dtype))
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        layer.base_layer.weight += 0.2 * layer.get_delta_weight("default")
    with pytest.raises(ModelError, match=CHANGED.format("model.layers.1.self_attn.q_proj.weight")):
        check_base(model, before=False)


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_base_that_other_adapters_were_merged_into_is_refused(snapshot, base, tokenizer, tmp_path, monkeypatch):
    model = base()
    if snapshot:
        place = tmp_path / "hub/models--org--base"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("a" * 40)
        (tmp_path / "base").rename((place / "snapshots").mkdir() or place / "snapshots" / ("a" * 40))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        model.name_or_path = "org/base"
    first = adapted(model)
    check_base(first, before=False)
    merged = first.merge_and_unload()
    assert_refused_at_its_export(adapted(copy.deepcopy(merged)), "model.layers.0.self_attn.q_proj.weight", tokenizer, tmp_path)
    CausalLMStudent(merged.requires_grad_(True), tokenizer).export(tmp_path / "merged", tokenizer, Lineage())


def assert_refused_at_its_export(model, name, tokenizer, tmp_path):
    """See that a student is made with a warning, trained as it is, and exported in no folder."""
    with pytest.warns(ModelWarning, match=CHANGED.format(name)):
        student = CausalLMStudent(model, tokenizer)
    with pytest.raises(ModelError, match=CHANGED.format(name)):
        student.export(tmp_path / "out", tokenizer, Lineage())
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_shapes_is_refused_at_its_export(base, tokenizer, tmp_path):
    model = base()
    model.resize_token_embeddings(140)
    assert_refused_at_its_export(adapted(model), "model.embed_tokens.weight", tokenizer, tmp_path)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # of peft
def test_adapters_on_a_model_without_a_name_are_exported_with_a_warning(base, tokenizer, tmp_path):
    model = base()
    model.name_or_path = ""
    student = CausalLMStudent(adapted(model), tokenizer)
    with pytest.warns(ModelWarning, match=r"its adapters are on a model without a name, .*; save that model too"):
        student.export(tmp_path / "out", tokenizer, Lineage())
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("content", ["[1]", "{}", '{"base_model_name_or_path": [1]}', "{", "[" * 100_000])
def test_adapters_that_name_no_base_are_refused_by_their_folder(content, tokenizer, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    refused = rf"{tmp_path.name}'?: it cannot be loaded \(.*its adapter_config\.json is "
    with pytest.raises(EngineError, match=refused):
        folder_model_id(tmp_path)
    with pytest.raises(EngineError, match=refused):
        served_eos(tmp_path, fingerprint_tokenizer(tokenizer), of_both=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["final_layernorm"]}, {"bias": "all"}, {"trainable_token_indices": [5]}, {"loha": True}]
)
def test_adapters_that_load_model_gave_are_frozen_as_a_whole(options, dtype, base, tokenizer, tmp_path):
    loha = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(base("phi_bias", dtype), loha) if options == {"loha": True} else adapted(base("phi_bias", dtype), **options)
    CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, Lineage())
    with pytest.raises(ModelError, match=r"0 of its parameters require a gradient, .* load adapters as trainable \(`PeftModel"):
        CausalLMStudent(load_model(tmp_path / "out")[0], tokenizer)


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["final_layernorm"]}, {"bias": "all"}, {"bias": "lora_only"}, {"trainable_token_indices": [5]}]
)
def test_adapters_that_stay_frozen_beside_what_is_trained_are_named(options, base, tokenizer):
    model = adapted(base("phi_bias"), target_modules=["q_proj", "fc1"], **options)
    for half in ("lora_A", "lora_B"):  # where half of each is trained, as LoRA-FA trains them, nothing is wrong
        CausalLMStudent(model, tokenizer)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and half not in name)
    with pytest.warns(
        ModelWarning, match=r"its adapters stay as they are, since 0 of their parameters .*, while '.*' does; .*is_trainable=True"
    ):
        CausalLMStudent(model, tokenizer)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # of peft
def test_adapters_that_were_put_beside_loaded_ones_are_those_that_are_judged(base, tokenizer, tmp_path):
    CausalLMStudent(adapted(base()), tokenizer).export(tmp_path / "out", tokenizer, Lineage())
    model = load_model(tmp_path / "out")[0]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["k_proj"]), "second")
    CausalLMStudent(model, tokenizer).export(tmp_path / "second", tokenizer, Lineage())
    assert json.loads((tmp_path / "second/adapter_config.json").read_text())["target_modules"] == ["k_proj"]


@pytest.mark.filterwarnings("ignore:(Failed to load|Setting|Unsupported layer|Model has `tie):UserWarning")  # of peft
@pytest.mark.parametrize(
    ("method", "dtype"), [*((method, torch.float32) for method in TUNERS), ("dora", torch.bfloat16), ("norms", torch.bfloat16)]
)
def test_an_export_of_this_kind_of_adapters_is_loaded_as_it_was_trained(method, dtype, base, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(base("llama_tied" if "tied" in method else "qwen3_padded", dtype), copy.deepcopy(TUNERS[method]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    if method == "vera":  # transformers loads none, and what it does not load is named before it is trained
        with pytest.warns(ModelWarning, match=r"of the kind VERA, which transformers does not load, .*merge them"):
            CausalLMStudent(model, tokenizer)
        return
    CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, Lineage())
    loaded = load_model(tmp_path / "out", dtype)[0]
    assert model_id(loaded).revision == model_id(model).revision == folder_model_id(tmp_path / "out", dtype).revision
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5)


def test_adapters_beside_a_base_are_not_put_on_it_with_those_of_another_folder(base, tokenizer, tmp_path):
    model = adapted(base())
    CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, Lineage())
    beside = adapted(base(), lora_alpha=64)
    beside.save_pretrained(tmp_path / "base")
    for folder, expected in (("out", model), ("base", beside)):
        loaded = load_model(tmp_path / folder)[0]
        assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "base")
        assert model_id(loaded).revision == model_id(expected).revision == folder_model_id(tmp_path / folder).revision


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_adapters_on_a_base_whose_files_lack_weights_are_refused(name, beside, base, tokenizer, tmp_path):
    model, out = adapted(base()), tmp_path / ("base" if beside else "out")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    found = {key: value for file in (tmp_path / "base").glob("model*.safetensors") for key, value in load_file(file).items()}
    del found[name]
    for file in (tmp_path / "base").glob("model*"):
        file.unlink()
    save_file(found, tmp_path / "base/model.safetensors", {"format": "pt"})
    for load in (load_model, folder_model_id):
        with pytest.raises(ModelError, match=rf"its files lack 1 weights \('{name}'\)"):
            load(out)


@pytest.mark.parametrize("quantised", [False, True])
def test_adapters_on_a_base_that_was_quantised_as_it_was_loaded_are_named(quantised, base, tmp_path):
    model, method = adapted(base()), {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.get_base_model().config.quantization_config = method  # as its loader leaves it; it needs a GPU
    if quantised:
        config = tmp_path / "base/config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
        check_base(model, before=True)
    else:
        with pytest.warns(
            ModelWarning, match=r"its weights were quantised when it was loaded, and those of .*base, .*; save the quantised model"
        ):
            check_base(model, before=True)
