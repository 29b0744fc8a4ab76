"""Models that also read images are loaded, identified and exported whole; adapters on them are loaded again."""

import copy
import json
import re
import weakref

import peft
import pytest
import torch
import transformers
from odd_models import SHAPE
from safetensors.torch import load_file, save_file

from lopd import CausalLMStudent, ModelId
from lopd.engines.export import export_model
from lopd.engines.hf import load_model
from lopd.engines.identity import folder_model_id, model_id
from lopd.errors import ModelError
from lopd.records import Lineage
from lopd.tools.plan.following import empty

LINEAGE = Lineage(ModelId("writer", "1", "float32"))
IDS = torch.arange(4, 20)[None]
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
pytestmark = pytest.mark.filterwarnings("ignore:.*it also reads images")


def qwen3_5():
    """Return one whose configuration AutoModelForCausalLM takes for that of its text part."""
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text = {**SHAPE, **linear, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    return transformers.Qwen3_5ForConditionalGeneration, transformers.Qwen3_5Config(text_config=text, vision_config=VISION)


def llama4():
    text = {**SHAPE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "pad_token_id": 0}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    vision = {**sizes, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return transformers.Llama4ForConditionalGeneration, transformers.Llama4Config(text_config=text, vision_config=vision)


def mllama():
    text = {**SHAPE, "cross_attention_layers": [1], "num_hidden_layers": 3, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
    return transformers.MllamaForConditionalGeneration, transformers.MllamaConfig(text_config=text, vision_config=vision)


def emu3():
    sizes = {"codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    images = {**sizes, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "attn_resolutions": [], "norm_num_groups": 4}
    text, places = {**SHAPE, "pad_token_id": 0}, {"<image>": 90}
    return transformers.Emu3ForConditionalGeneration, transformers.Emu3Config(text_config=text, vq_config=images, vocabulary_map=places)


def qwen_vl():
    """Return one that AutoModelForCausalLM does not know."""
    text = {**SHAPE, "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION, image_token_id=95, video_token_id=94)
    return transformers.Qwen2_5_VLForConditionalGeneration, config


def save(make, tokenizer, folder, *, tied=False):
    """Save a model and a tokenizer, and return the model."""
    torch.manual_seed(0)
    kind, config = make()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = kind(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(params=[qwen3_5, qwen_vl])
def saved(request, tokenizer, tmp_path):
    """Give a model and the folder that it was saved in, with a tokenizer."""
    return save(request.param, tokenizer, tmp_path / "base"), tmp_path / "base"


def adapted(model):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=r".*layers.*\.(q_proj|v_proj)", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model), config)


def assert_same(one, other):
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(input_ids=IDS).logits, other.eval()(input_ids=IDS).logits)


def test_a_model_that_also_reads_images_is_one_model_loaded_and_exported(saved, tokenizer, tmp_path):
    model, folder = saved
    loaded, _ = load_model(folder)
    assert type(loaded) is type(model)
    assert model_id(loaded).revision == folder_model_id(folder).revision == model_id(model).revision
    CausalLMStudent(loaded, tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert folder_model_id(tmp_path / "out").revision == model_id(model).revision


def test_the_text_part_of_an_export_is_loaded_in_the_dtype_of_the_student(tokenizer, tmp_path):
    save(qwen3_5, tokenizer, tmp_path / "base")
    loaded, _ = load_model(tmp_path / "base", torch.bfloat16)
    student = CausalLMStudent(loaded.float(), tokenizer)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1 + 1e-4)  # less than bfloat16 holds
    student.export(tmp_path / "out", tokenizer, LINEAGE)
    written = json.loads((tmp_path / "out/config.json").read_text())
    parts = [written, written["text_config"], written["vision_config"]]
    assert {part["dtype"] for part in parts} == {part.get("torch_dtype", "float32") for part in parts} == {"float32"}
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), loaded)
    assert folder_model_id(tmp_path / "out").revision == model_id(loaded).revision


@pytest.mark.filterwarnings("ignore:.*most of its weights are in bfloat16")
@pytest.mark.parametrize("make", [qwen3_5, None])
@pytest.mark.parametrize("values", ["of 32 bits", "that fit 16", "that stay in 32"])
def test_an_export_of_several_dtypes_states_one_that_rounds_none(values, make, make_model, tokenizer, tmp_path, monkeypatch):
    make_model("llama_tied").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    if make is not None:
        save(make, tokenizer, tmp_path / "plain")
    model, _ = load_model(tmp_path / "plain", torch.bfloat16)
    layers = model.get_submodule("model" if make is None else "model.language_model").layers.float()
    if values != "that fit 16":
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.add_(1e-4)
    if values == "that stay in 32":
        monkeypatch.setattr(model, "_keep_in_fp32_modules_strict", {"layers"})
    export_model(model, tokenizer, LINEAGE, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out")
    assert loaded.dtype == (torch.float32 if values == "of 32 bits" else torch.bfloat16)
    if values != "that stay in 32":  # by its class, and not by this test
        for name, weight in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name).float(), weight.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_a_model_that_also_reads_images_are_loaded_from_their_export(dtype, saved, tokenizer, tmp_path):
    student = CausalLMStudent(adapted(load_model(saved[1], dtype)[0]), tokenizer, autocast=None if dtype is torch.float32 else dtype)
    student.export(tmp_path / "out", tokenizer, LINEAGE)
    loaded, _ = load_model(tmp_path / "out", dtype)
    assert type(loaded) is type(saved[0])
    assert_same(loaded, student.model)
    assert folder_model_id(tmp_path / "out", dtype).revision == model_id(loaded).revision == model_id(student.model).revision


def test_adapters_that_were_trained_on_the_text_part_are_loaded_on_it(saved, tokenizer, tmp_path):
    if type(saved[0]) is not transformers.Qwen3_5ForConditionalGeneration:
        pytest.skip("it has no class for its text part")
    text = adapted(transformers.AutoModelForCausalLM.from_pretrained(saved[1]))
    text.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out")
    assert type(loaded) is transformers.Qwen3_5ForCausalLM
    assert_same(loaded, text)


@pytest.mark.parametrize("lacks", ["the rest", "a part of the rest", "a part of the text"])
def test_weights_of_the_text_part_alone_are_loaded_as_a_model_of_text(lacks, saved, tokenizer, tmp_path):
    model, folder = saved
    if type(model) is not transformers.Qwen3_5ForConditionalGeneration:
        pytest.skip("it has no class for its text part")
    weights = load_file(folder / "model.safetensors")
    gone = {"the rest": "visual", "a part of the rest": "visual.merger", "a part of the text": "layers.1.mlp"}[lacks]
    kept = {name: values for name, values in weights.items() if gone not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if lacks != "the rest":
        for read in (load_model, folder_model_id):
            with pytest.raises(ModelError):
                read(folder)
        return
    loaded, _ = load_model(folder)
    assert type(loaded) is transformers.Qwen3_5ForCausalLM
    assert_same(loaded, model)
    assert folder_model_id(folder).revision == model_id(loaded).revision
    CausalLMStudent(loaded, tokenizer).export(tmp_path / "out", tokenizer, LINEAGE)
    assert folder_model_id(tmp_path / "out").revision == model_id(loaded).revision


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [qwen3_5, llama4, mllama, emu3])
@pytest.mark.parametrize("names", ["of the text part", "of the whole"])
def test_the_text_part_is_known_under_its_own_names_and_under_those_of_the_whole(names, make, tied, tokenizer, tmp_path):
    if (names, make) == ("of the whole", emu3):
        pytest.skip("transformers does not read it so")
    model, folder = save(make, tokenizer, tmp_path / "base", tied=tied), tmp_path / "base"
    with torch.device("meta"):
        kind = type(transformers.AutoModelForCausalLM.from_config(model.config))
    if names == "of the whole":
        weights = {
            name: values
            for name, values in load_file(folder / "model.safetensors").items()
            if not re.search("vision|visual|multi_modal", name)
        }
        text = None
    else:
        torch.manual_seed(1)
        text = kind(model.config.get_text_config()).eval()
        text.save_pretrained(tmp_path / "text")
        weights = load_file(tmp_path / "text/model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = load_model(folder)
    assert type(loaded) is kind
    assert_same(loaded, text or model)
    assert folder_model_id(folder).revision == model_id(loaded).revision
    for name in sorted(weights)[:-1:5]:
        save_file({other: weights[other] for other in weights if other != name}, folder / "model.safetensors", metadata={"format": "pt"})
        for read in (load_model, folder_model_id):
            with pytest.raises(ModelError):
                read(folder)


def test_a_model_makes_room_before_its_text_part_is_loaded(tokenizer, tmp_path, monkeypatch):
    save(qwen3_5, tokenizer, tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {name: weights[name] for name in weights if "visual" not in name}, tmp_path / "base/model.safetensors", metadata={"format": "pt"}
    )
    made, load = [], transformers.PreTrainedModel.from_pretrained.__func__

    def watched(kind, *args, **settings):
        assert [one() for one in made] == [None] * len(made)
        model, read = load(kind, *args, **settings)
        made.append(weakref.ref(model))
        return model, read

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(watched))
    load_model(tmp_path / "base")
    assert len(made) == 2


@pytest.mark.parametrize("make", [qwen3_5, None])
def test_trained_tokens_of_tied_embeddings_are_loaded(make, make_model, tokenizer, tmp_path):
    if make is None:
        make_model("llama_tied").save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    else:
        save(make, tokenizer, tmp_path / "base", tied=True)
    model = load_model(tmp_path / "base")[0]
    student = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    student.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out")
    assert type(loaded) is type(model)
    assert_same(loaded, student)
    assert folder_model_id(tmp_path / "out").revision == model_id(student).revision


def test_adapters_that_lack_weights_are_refused_once_they_were_read(make_model, tokenizer, tmp_path, monkeypatch):
    make_model("llama_tied").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted(load_model(tmp_path / "base")[0]).save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "out/adapter_model.safetensors")
    reads, load = [], transformers.PreTrainedModel.from_pretrained.__func__
    counted = classmethod(lambda kind, *args, **settings: reads.append(kind) or load(kind, *args, **settings))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", counted)
    for read in (load_model, folder_model_id):
        with pytest.raises(ModelError, match=r"its files lack 1 weights \('model\.layers\.0\.self_attn\.q_proj\.lora_A"):
            read(tmp_path / "out")
    assert len(reads) == 2


@pytest.mark.parametrize("make", [qwen3_5, llama4, mllama, emu3, qwen_vl])
def test_the_planner_counts_the_model_that_is_loaded(make, tokenizer, tmp_path):
    save(make, tokenizer, tmp_path / "base")
    loaded, _ = load_model(tmp_path / "base")
    planned = empty(transformers.AutoConfig.from_pretrained(tmp_path / "base"), torch.float32, 0, None)
    assert type(planned) is type(loaded)
    assert {name: weight.shape for name, weight in planned.named_parameters()} == {
        name: weight.shape for name, weight in loaded.named_parameters()
    }
