"""An export has the weights of its student, whatever form the files had that it was loaded from; where transformers writes others, it is refused."""

import json
import re

import peft
import pytest
import torch
import transformers
from odd_models import odd_model
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lopd import CausalLMStudent, ModelId
from lopd.engines.export import export_model
from lopd.engines.hf import load_model
from lopd.engines.identity import folder_model_id, model_id
from lopd.engines.stored import StoredModel
from lopd.errors import ModelError, ModelWarning
from lopd.records import Lineage

LINEAGE = Lineage(ModelId("writer", "1", "float32"))
IDS = torch.arange(4, 20)[None]
SQUARE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 32,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def rewrite(folder, weights, method):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))


def blocks_of_fp8(name, folder):
    """Write a tiny model as those with a scale for each block of 128 x 128 are published."""
    odd_model(name, **SQUARE).to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for key in [key for key in weights if "proj.weight" in key]:
        weights[f"{key}_scale_inv"] = torch.full((1, 1), 0.5)
        weights[key] = (weights[key].float() * 2).to(torch.float8_e4m3fn)
    rewrite(folder, weights, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"})


def mxfp4(name, folder):
    """Write a tiny model as gpt-oss is published."""
    odd_model(name, hidden_size=64, intermediate_size=64, num_local_experts=4, head_dim=16).to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for key in [key for key in weights if key.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        experts, fan_in, fan_out = weights.pop(key).shape
        weights[f"{key}_blocks"] = torch.randint(0, 255, (experts, fan_out, fan_in // 32, 16), dtype=torch.uint8)
        weights[f"{key}_scales"] = torch.full((experts, fan_out, fan_in // 32), 124, dtype=torch.uint8)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    rewrite(folder, weights, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def assert_same(one, other):
    with torch.no_grad():
        torch.testing.assert_close(one(input_ids=IDS).logits, other.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(("quantise", "name"), [(blocks_of_fp8, "Qwen3"), (blocks_of_fp8, "Qwen3Moe"), (mxfp4, "GptOss")])
def test_a_student_of_what_was_quantised_is_exported_as_it_is(quantise, name, tokenizer, tmp_path):
    quantise(name, tmp_path / "quantised")
    tokenizer.save_pretrained(tmp_path / "quantised")
    model, _ = load_model(tmp_path / "quantised", torch.float32)
    model.float()  # transformers makes experts of gpt-oss in bfloat16, whatever dtype is asked for
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    conversions = model._weight_conversions
    CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)
    assert model._weight_conversions is conversions
    loaded, _ = load_model(tmp_path / "out")
    assert_same(loaded, model)
    assert folder_model_id(tmp_path / "out").revision == model_id(model).revision
    if name == "Qwen3Moe":  # as transformers writes any model with experts
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in load_file(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("lost", ["dropped", "changed"])
@pytest.mark.parametrize(
    ("name", "part", "found"),
    [
        ("Llama", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("Qwen3Moe", "model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
        ("Qwen3Moe", "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_weights_that_transformers_writes_otherwise_are_refused_and_kept_aside(name, part, found, lost, tokenizer, tmp_path, monkeypatch):
    save = transformers.PreTrainedModel.save_pretrained

    def wrong(self, folder, **settings):
        save(self, folder, **settings)
        weights = load_file(folder / "model.safetensors")
        weight = weights.pop(part)
        save_file(weights if lost == "dropped" else {**weights, part: 2 * weight}, folder / "model.safetensors")

    student = CausalLMStudent(odd_model(name, **SQUARE), tokenizer)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(ModelError, match=f"transformers wrote '{re.escape(found)}' otherwise than the model has it"):
        student.export(tmp_path / "out", tokenizer, LINEAGE)
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("out-refused.")
    kept, own = load_file(aside / "model.safetensors"), student.model.state_dict()
    assert torch.equal(kept["model.layers.0.self_attn.q_proj.weight"], own["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("error", [KeyError, NotImplementedError, RuntimeError])  # the last as the CPU lacks memory
def test_a_weight_that_cannot_be_compared_does_not_keep_others_from_it(error, tokenizer, tmp_path, monkeypatch):
    make, save, part = StoredModel._make, transformers.PreTrainedModel.save_pretrained, "model.layers.1.self_attn.q_proj.weight"

    def fail(self, source, name, dtype):
        if source.converter is not None:
            raise error("its converter")
        return make(self, source, name, dtype)

    def wrong(self, folder, **settings):
        save(self, folder, **settings)
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, part: 2 * weights[part]}, folder / "model.safetensors")

    student = CausalLMStudent(odd_model("Qwen3Moe", **SQUARE), tokenizer)
    monkeypatch.setattr(StoredModel, "_make", fail)
    student.export(tmp_path / "right", tokenizer, LINEAGE)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(ModelError, match=f"transformers wrote '{re.escape(part)}' otherwise"):
        student.export(tmp_path / "out", tokenizer, LINEAGE)


def test_layers_under_activation_checkpointing_are_compared_too(tokenizer, tmp_path, monkeypatch):
    model, save = odd_model("Llama"), transformers.PreTrainedModel.save_pretrained
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)
    assert folder_model_id(tmp_path / "out").revision == model_id(model).revision

    def wrong(self, folder, **settings):
        save(self, folder, **settings)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] *= 2
        save_file(weights, folder / "model.safetensors")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", wrong)
    with pytest.raises(ModelError, match=r"transformers wrote 'model\.layers\.1\.mlp\.up_proj\.weight' otherwise"):
        CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)


def test_what_cannot_be_compared_is_exported(tokenizer, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("it cannot be read")

    monkeypatch.setattr(StoredModel, "holds", fail)
    CausalLMStudent(odd_model("Llama"), tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)
    assert (tmp_path / "out/model.safetensors").exists()


class Scaled(torch.Tensor):
    """Weights of a class of their own, as torchao and quanto make them, which knows no extremes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.aminmax:
            raise NotImplementedError("of quantised weights")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_adapters_on_weights_of_a_class_of_their_own_are_exported(tokenizer, tmp_path):
    base = odd_model("Llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Scaled), requires_grad=False)
    CausalLMStudent(model, tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_no_numbers_are_exported_all_the_same_with_a_warning(value, tokenizer, tmp_path):
    student = CausalLMStudent(odd_model("Llama"), tokenizer)
    with torch.no_grad():
        student.model.lm_head.weight[1] = value
    with pytest.warns(ModelWarning, match=r"its weight 'lm_head\.weight' goes from (nan|-inf) to .*; it is exported as it is"):
        student.export(tmp_path / "out", tokenizer, LINEAGE)
    finite = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].isfinite()
    assert torch.equal(finite, student.model.lm_head.weight.isfinite())


@pytest.mark.parametrize("names", [["model.norm.weight"], ["model.embed_tokens.weight", "model.norm.weight"]])
def test_a_few_weights_in_float32_that_make_an_export_of_32_bits_are_named(names, make_model, tokenizer, tmp_path):
    model = make_model("llama_tied").to(torch.bfloat16)
    for name in names:
        weight = model.get_parameter(name)
        weight.data = torch.full_like(weight, 1.0001, dtype=torch.float32)
    with pytest.warns(
        ModelWarning, match=rf"most .* in bfloat16, and '{names[0]}' is in float32, so its export states float32, .*; cast such"
    ):
        export_model(model, tokenizer, LINEAGE, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    export_model(model.to(torch.bfloat16), tokenizer, LINEAGE, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_weight_of_nan_does_not_make_an_export_one_of_32_bits(make_model, tokenizer, tmp_path):
    model = make_model("llama_tied").to(torch.bfloat16)
    model.model.norm.float().weight.data.fill_(float("nan"))
    export_model(model, tokenizer, LINEAGE, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
