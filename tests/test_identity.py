"""The identity of a folder is that of the model that is loaded from it."""

import copy
import json
import os

import pytest
import torch
import transformers
from conftest import PAD_ROWS
from huggingface_hub.utils import filter_repo_objects
from odd_models import SHAPE
from safetensors.torch import load_file, save_file

from lopd import import_text
from lopd.engines import finding
from lopd.engines.finding import local_folder
from lopd.engines.hf import load_model
from lopd.engines.identity import folder_model_id, model_id
from lopd.engines.stored import StoredModel
from lopd.errors import EngineError, ModelError
from lopd.records import identity as identities

KINDS = ("llama_tied", "qwen3_padded", "gemma2_softcap", "phi_bias", "gpt2")


@pytest.fixture
def saved(models, tokenizer, tmp_path):
    """Return `saved(kind, dtype, max_shard_size)`: a folder with this model."""

    def save(kind, dtype=torch.float32, **how):
        folder = tmp_path / f"{kind}-{dtype}"
        copy.deepcopy(models(kind)).to(dtype).save_pretrained(folder, **how)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_identity_of_the_model_that_is_loaded_from_it(kind, dtype, saved, models):
    folder = saved(kind, dtype)
    stored, loaded = folder_model_id(folder), model_id(load_model(folder)[0])
    assert stored == loaded
    assert (stored.name, stored.dtype) == (loaded.name, str(dtype).removeprefix("torch."))
    assert stored.same_weights(model_id(models(kind))) == (dtype == torch.float32)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_padded"])
def test_shards_and_weights_that_are_cast_when_loaded_change_nothing(kind, saved):
    folder = saved(kind, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert folder_model_id(folder) == model_id(load_model(folder)[0])
    assert folder_model_id(folder, torch.bfloat16) == model_id(load_model(folder, torch.bfloat16)[0])
    assert folder_model_id(folder) != folder_model_id(folder, torch.bfloat16)


def test_a_tied_weight_counts_once_under_whatever_names_it_is_stored(saved):
    folder = saved("llama_tied")
    expected, path = folder_model_id(folder), folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}  # some versions map the file, which is written over
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    assert folder_model_id(folder) == expected == model_id(load_model(folder)[0])
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, path, {"format": "pt"})
    assert folder_model_id(folder) == expected


def test_one_changed_value_is_another_model(saved):
    folder = saved("qwen3_padded")
    before, path = folder_model_id(folder), folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, path, {"format": "pt"})
    assert not folder_model_id(folder).same_weights(before)


def test_models_that_mask_experts_by_another_jitter_in_eval_too_are_two():
    made, logits = [], []
    for jitter in (0.01, 0.4):
        torch.manual_seed(0)
        config = transformers.PhimoeConfig(**SHAPE, num_local_experts=4, router_jitter_noise=jitter)
        made.append(transformers.PhimoeForCausalLM(config).eval())
        with torch.no_grad():
            logits.append(made[-1](input_ids=torch.arange(4, 24)[None]).logits)
    assert not torch.allclose(*logits, atol=1e-2)
    assert model_id(made[0]).revision != model_id(made[1]).revision


def test_files_that_do_not_hold_what_the_model_holds_are_refused(saved):
    folder = saved("qwen3_padded")
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({f"renamed.{name}": weight for name, weight in weights.items()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"hold no 'lm_head.weight'.*pass `model_id\(model\)` of the loaded model"):
        folder_model_id(folder)
    save_file({**weights, "lm_head.weight": weights["lm_head.weight"][:-PAD_ROWS].contiguous()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"'lm_head.weight' has shape \(96, 32\), expected \(104, 32\)"):
        folder_model_id(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"holds 0 files of weights in safetensors"):
        folder_model_id(folder)


def test_each_weight_is_hashed_before_the_next_is_read(saved, monkeypatch):
    events = []
    monkeypatch.setattr(StoredModel, "_load", recorded(events, "read", StoredModel._load))
    monkeypatch.setattr(identities, "_narrowest", recorded(events, "hash", identities._narrowest))
    folder_model_id(saved("qwen3_padded"))
    assert len(events) > 40
    assert events == ["read", "hash"] * (len(events) // 2)


def recorded(events, name, function):
    return lambda *arguments: events.append(name) or function(*arguments)


def test_a_folder_is_its_own_snapshot_and_a_hub_name_is_looked_up_among_those_that_are_here(saved, tmp_path, monkeypatch):
    folder = saved("llama_tied")
    assert local_folder(folder) == local_folder(str(folder)) == folder
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert local_folder("someone/tiny") == snapshot
    assert folder_model_id(local_folder("someone/tiny")) == model_id(load_model(snapshot)[0])


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Return `fetched(files, folder)`: the list of what is downloaded from now on, of a model in the hub with these files; they are in the folder."""

    def serve(files, folder=tmp_path):
        asked = []
        monkeypatch.setattr(finding, "_reach_hub", lambda _: None)
        monkeypatch.setattr(
            finding, "snapshot_download", lambda _, **patterns: asked.extend(filter_repo_objects(files, **patterns)) or str(folder)
        )
        return asked

    return serve


def test_of_a_model_in_the_hub_with_several_copies_of_its_weights_one_is_downloaded(fetched):
    gpt_oss = ["chat_template.jinja", "config.json", "original/config.json", "tokenizer.json", "model.safetensors.index.json"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in range(3)]
    copies = ["metal/model.bin", *(f"original/model--0000{i}-of-00007.safetensors" for i in range(1, 8))]
    mistral = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"]
    asked = fetched([*gpt_oss, *shards, *copies, *mistral])
    local_folder("openai/gpt-oss-120b")
    assert asked == [*gpt_oss, *shards]
    asked.clear()
    local_folder("openai/gpt-oss-120b", weights=False)
    assert asked == gpt_oss


def test_quantised_weights_in_the_hub_are_refused_before_they_are_downloaded_and_before_a_text_is_read(fetched, saved, tokenizer):
    folder = saved("llama_tied")
    asked, plain = fetched(["config.json", "model.safetensors"], folder), folder_model_id(folder)
    assert (folder_model_id("someone/tiny"), "model.safetensors" in asked) == (plain, True)
    asked.clear()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match=r"its weights are quantised, expected plain ones.*`ModelId\(name, commit, dtype\)`"):
        import_text((pytest.fail(f"text {i} was read") for i in range(2)), tokenizer, teacher="someone/tiny-AWQ")
    assert asked == ["config.json"]


@pytest.mark.parametrize("load", [load_model, local_folder])
def test_a_model_that_is_not_there_is_one_sentence(load, tmp_path):
    with pytest.raises(
        EngineError, match=r"Model '.*nowhere': it cannot be loaded \(.+\), expected a folder that transformers saved, or a name in"
    ):
        load(tmp_path / "nowhere")


def test_a_folder_without_a_model_and_adapters_without_their_base_are_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"holds neither config.json nor adapter_config.json, expected a model"):
        folder_model_id(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"it cannot be loaded \('base_model_name_or_path' of its adapter_config.json is None, expected"):
        folder_model_id(tmp_path)


def test_weights_that_this_account_may_not_read_are_called_that(llama, tmp_path, monkeypatch):
    llama.save_pretrained(tmp_path)

    def refuse(path, *_):
        raise FileNotFoundError(f"No such file or directory: {path}")  # as safetensors words it

    monkeypatch.setattr("lopd.engines.stored.safe_open", refuse)
    monkeypatch.setattr("os.access", lambda _, mode: mode == os.F_OK)  # root may read everything
    with pytest.raises(EngineError, match=r"this account may not read its model\.safetensors\), .*; change the mode of that file"):
        folder_model_id(tmp_path)
