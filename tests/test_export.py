"""An export replaces whole or not at all; what it would lose, or transformers would refuse, is said before."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from attrs import asdict
from conftest import TOKENIZER_ID, build_tokenizer
from odd_models import SHAPE

import lopd.engines.export
import lopd.engines.placing
from lopd import CausalLMStudent, LanceStore, ModelId, ZarrStore
from lopd.engines.hf import HFSource, load_model
from lopd.engines.identity import folder_model_id, model_id
from lopd.engines.server import Servers, ServerSource
from lopd.errors import EngineError, ModelError, StoreExistsError, StoreWriteError
from lopd.records import Lineage, SamplingParams, StoreId

WRITER = ModelId("writer", "1", "float32")
FIRST, SECOND = (Lineage(WRITER, store=StoreId(8, name)) for name in ("first", "second"))
IDS = torch.arange(4, 20)[None]


@pytest.fixture
def full(make_model):
    return CausalLMStudent(make_model("llama_tied", seed=7), TOKENIZER_ID)


@pytest.fixture
def adapters(make_model, tokenizer, tmp_path):
    """Make a student with adapters on a base model in the folder `base`."""
    make_model("llama_tied", seed=1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, _ = load_model(tmp_path / "base", torch.float32)
    return CausalLMStudent(
        peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)), TOKENIZER_ID
    )


def assert_holds(folder, student, lineage):
    loaded, _ = load_model(folder, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, student.model.eval()(input_ids=IDS).logits)
    assert asdict(Lineage.read(folder)) == asdict(lineage)
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")], "nothing is left beside it"


def test_a_full_model_takes_the_place_of_adapters_and_the_reverse(full, adapters, tokenizer, tmp_path):
    out = tmp_path / "out"
    for student, lineage in ((adapters, FIRST), (full, SECOND), (adapters, FIRST)):
        student.export(out, tokenizer, lineage)
        assert_holds(out, student, lineage)
        assert (out / "config.json").exists() is (student is full)
        assert (out / "adapter_config.json").exists() is (student is adapters)


def test_files_of_its_owner_move_along(full, adapters, tokenizer, tmp_path):
    out = tmp_path / "out"
    full.export(out, tokenizer, FIRST)
    mine = {"README.md": "mine", "notes.txt": "see the log", "logs/steps.bin": "1 2 3"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / "latest").symlink_to("logs")
    for student, lineage in ((adapters, SECOND), (full, FIRST)):
        student.export(out, tokenizer, lineage)
        assert_holds(out, student, lineage)
        assert {name: (out / name).read_text() for name in mine} == mine
        assert (out / "latest").readlink().name == "logs"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_decides_who_may_read_an_export(mask, full, adapters, tokenizer, tmp_path):
    private = tmp_path / "out" / "mine" / "own.safetensors"
    private.parent.mkdir(parents=True)
    private.touch(0o600)
    before = os.umask(mask)
    try:
        for student in (adapters, full):
            student.export(tmp_path / "out", tokenizer, FIRST)
            modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
            assert modes.pop(private) == 0o600, "of its owner"
            assert set(modes.values()) == {0o666 & ~mask}
    finally:
        os.umask(before)


@pytest.mark.parametrize("foreign", ["pytorch_model.bin", "other.safetensors", "adapter_config.json", "model.gguf", "config.json"])
def test_what_no_export_wrote_is_not_replaced_and_the_student_is_not_lost(foreign, full, tokenizer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / foreign).write_text("somebody's")
    for _ in range(2):
        with pytest.raises(StoreExistsError, match=rf"holds '{foreign}', which no export is recorded.*written to {out}-export, move"):
            full.export(out, tokenizer, FIRST)
    assert {path.name: path.read_text() for path in out.iterdir()} == {foreign: "somebody's"}
    assert_holds(tmp_path / "out-export", full, FIRST)


def test_a_student_of_other_teachers_is_not_replaced(full, tokenizer, tmp_path):
    out = tmp_path / "out"
    for lineage in (Lineage(), FIRST):  # an export without a recorded teacher is replaced
        full.export(out, tokenizer, lineage)
        assert_holds(out, full, lineage)
    after = Lineage(WRITER, WRITER)
    theirs, ours = (rf"\(SFT writer@1 in float32, OPD {teacher}\)" for teacher in ("None", "writer@1 in float32"))
    with pytest.raises(
        StoreExistsError, match=rf"holds a student of other teachers {theirs} than this one {ours}; .*to {out}-export, move"
    ):
        full.export(out, tokenizer, after)
    assert_holds(out, full, FIRST)
    assert_holds(tmp_path / "out-export", full, after)


def test_an_export_whose_lineage_is_damaged_is_not_replaced(full, tokenizer, tmp_path):
    full.export(tmp_path / "out", tokenizer, FIRST)
    record = json.loads((tmp_path / "out/lopd.json").read_text())
    (tmp_path / "out/lopd.json").write_text(json.dumps({**record, "sft_teacher": 3}))
    with pytest.raises(StoreExistsError, match=r"its lopd.json cannot be read; the student was written to"):
        full.export(tmp_path / "out", tokenizer, FIRST)


def test_a_model_that_transformers_saved_is_not_replaced_though_a_lineage_is_beside_it(full, adapters, tokenizer, tmp_path):
    FIRST.write(tmp_path / "base")
    with pytest.raises(StoreExistsError, match="no export is recorded to have written"):
        full.export(tmp_path / "base", tokenizer, SECOND)
    with pytest.raises(StoreExistsError, match="it holds the model that the adapters are for"):
        adapters.export(tmp_path / "base", tokenizer, SECOND)
    assert Lineage.read(tmp_path / "base").store == FIRST.store
    assert_holds(tmp_path / "base-export", adapters, SECOND)


def test_adapters_are_not_exported_over_their_own_base_that_was_exported(full, tokenizer, tmp_path):
    full.export(tmp_path / "base", tokenizer, FIRST)
    base, _ = load_model(tmp_path / "base", torch.float32)
    student = CausalLMStudent(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])), TOKENIZER_ID)
    with pytest.raises(StoreExistsError, match="it holds the model that the adapters are for"):
        student.export(tmp_path / "base", tokenizer, SECOND)
    assert_holds(tmp_path / "base", full, FIRST)


def with_adapters(folder, *names):
    """Return a model with adapters of these names on the model in this folder; the last one is active."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    made = peft.get_peft_model(load_model(folder, torch.float32)[0], config, names[0])
    for name in names[1:]:
        made.add_adapter(name, copy.deepcopy(config))
    made.set_adapter(names[-1])
    return made


@pytest.mark.filterwarnings("ignore:(Already found a `peft_config` attribute|You are trying to modify a model with PEFT)")
@pytest.mark.parametrize(
    ("folder", "names"), [("base", ["policy"]), ("base", ["default", "opd"]), ("base", ["sft", "default"]), ("loaded", ["opd"])]
)
def test_an_export_holds_the_active_adapter_whatever_its_name(folder, names, adapters, tokenizer, tmp_path):
    adapters.export(tmp_path / "loaded", tokenizer, FIRST)
    student = CausalLMStudent(with_adapters(tmp_path / folder, *names), TOKENIZER_ID)
    student.export(tmp_path / "out", tokenizer, FIRST)
    assert folder_model_id(tmp_path / "out").revision == model_id(student.model).revision
    assert_holds(tmp_path / "out", student, FIRST)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.usefixtures("adapters")
def test_a_student_with_two_active_adapters_is_refused_before_it_is_trained_and_at_its_export(tokenizer, tmp_path):
    model = with_adapters(tmp_path / "base", "default", "opd")
    student = CausalLMStudent(model, TOKENIZER_ID)
    model.base_model.set_adapter(["default", "opd"])
    for call in (lambda: CausalLMStudent(model, TOKENIZER_ID), lambda: student.export(tmp_path / "out", tokenizer, FIRST)):
        with pytest.raises(ModelError, match=r"it applies 2 adapters \(default, opd\), expected 1, as an export holds one; merge"):
            call()
    assert not (tmp_path / "out").exists()
    loaded = load_model(tmp_path / "base", torch.float32)[0]
    for name in ("default", "opd"):
        loaded.add_adapter(copy.deepcopy(model.peft_config[name]), name)
    loaded.set_adapter(["default", "opd"])
    with pytest.raises(ModelError, match="it applies 2 adapters"):
        CausalLMStudent(loaded, TOKENIZER_ID)


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_a_store_is_not_replaced(kind, full, tokenizer, llama, tmp_path):
    kind.create(str(tmp_path / "store"), HFSource(llama, tokenizer, SamplingParams()).manifest)
    with pytest.raises(StoreExistsError, match="it is a store"):
        full.export(tmp_path / "store", tokenizer, FIRST)
    assert len(kind.open(str(tmp_path / "store"))) == 0


class _Broken:
    """A tokenizer that cannot be saved."""

    def __init__(self, error):
        self._error, self._inner = error, build_tokenizer()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def save_pretrained(self, folder):
        raise self._error


class Killed(BaseException):
    """What stops an export in these tests."""


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(28, "No space left on device"), StoreWriteError, "No space left on device"),
        (Exception("No space left on device (os error 28)"), StoreWriteError, "(os error 28).*export elsewhere"),  # as tokenizers has it
        (NotImplementedError("a slow one"), ModelError, "cannot be saved.*a slow one"),
        (Killed(), Killed, None),
    ],
)
def test_an_export_that_is_cut_short_leaves_the_one_before_it(raised, expected, message, full, adapters, tokenizer, tmp_path):
    full.export(tmp_path / "out", tokenizer, FIRST)
    with pytest.raises(expected, match=message):
        adapters.export(tmp_path / "out", _Broken(raised), SECOND)
    assert_holds(tmp_path / "out", full, FIRST)
    with pytest.raises(expected, match=message):
        adapters.export(tmp_path / "new", _Broken(raised), SECOND)
    assert not (tmp_path / "new").exists()


def test_at_every_flush_and_move_the_folder_is_one_whole_export(full, adapters, tokenizer, monkeypatch, tmp_path):
    """The process is killed at each of these places in turn: nothing is cleaned up, and the next export is as if nothing had been."""
    out, place = tmp_path / "out", 0
    full.export(out, tokenizer, FIRST)
    monkeypatch.setattr(lopd.engines.placing.shutil, "rmtree", lambda *_, **__: None)

    def counted(act):
        def at(*arguments):
            left.append(1)
            if len(left) > place:
                raise Killed
            return act(*arguments)

        return at

    for owner, name in ((os, "fsync"), (lopd.engines.placing, "_exchange")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    while True:
        left = []
        shutil_free = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        for path in shutil_free:
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink()
            path.rmdir()
        try:
            adapters.export(out, tokenizer, SECOND)
        except Killed:
            place += 1
            holds = Lineage.read(out).store
            assert (out / "config.json").exists() is (holds == FIRST.store)
            assert (out / "adapter_model.safetensors").exists() is (holds == SECOND.store)
        else:
            break
    assert place > 6
    assert Lineage.read(out).store == SECOND.store


def test_without_an_exchange_a_kill_between_two_moves_is_set_right_by_the_next_export(full, adapters, tokenizer, monkeypatch, tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.old"
    monkeypatch.setattr(lopd.engines.placing, "_exchange", lambda *_: False)
    full.export(out, tokenizer, FIRST)
    adapters.export(out, tokenizer, SECOND)
    assert_holds(out, adapters, SECOND)
    (out / "notes.txt").write_text("mine")
    shutil.move(out, old)  # as after a kill between the moves
    full.export(out, tokenizer, FIRST)
    assert_holds(out, full, FIRST)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("after", [True, False])
def test_without_an_exchange_an_interrupt_between_two_moves_leaves_the_earlier_export(
    after, full, adapters, tokenizer, monkeypatch, tmp_path
):
    out, rename = tmp_path / "out", Path.rename
    monkeypatch.setattr(lopd.engines.placing, "_exchange", lambda *_: False)
    full.export(out, tokenizer, FIRST)

    def interrupted(path, target):
        if not after and path.name.startswith(".out.partial"):
            raise KeyboardInterrupt
        rename(path, target)
        if after and path == out:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapters.export(out, tokenizer, SECOND)
    assert_holds(out, full, FIRST)


@pytest.mark.parametrize("removable", [True, False])
def test_without_an_exchange_what_is_left_of_a_replaced_export_is_in_nobodys_way(
    removable, full, adapters, tokenizer, monkeypatch, tmp_path
):
    out, old, remove = tmp_path / "out", tmp_path / ".out.old", shutil.rmtree
    monkeypatch.setattr(lopd.engines.placing, "_exchange", lambda *_: False)
    full.export(out, tokenizer, FIRST)
    shutil.copytree(out, old)  # as after a kill before it was removed

    def stays(path, **options):
        if not (path / "held").exists():
            remove(path, **options)

    if not removable:
        (old / "held").touch()
        monkeypatch.setattr(lopd.engines.placing.shutil, "rmtree", stays)
    adapters.export(out, tokenizer, SECOND)
    full.export(out, tokenizer, FIRST)
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert [(path / "held").exists() for path in left] == [True] * (not removable)
    for path in left:
        remove(path)
    assert_holds(out, full, FIRST)
    shutil.move(out, old)  # as after a kill between the moves
    adapters.export(out, tokenizer, SECOND)
    assert_holds(out, adapters, SECOND)


def test_a_generation_config_that_transformers_refuses_to_save_is_found_when_the_student_is_made(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    (tmp_path / "sft" / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6}))
    model, own = load_model(tmp_path / "sft", torch.float32)
    with pytest.raises(ModelError, match=r"its generation_config cannot be saved .*do_sample.*before training"):
        CausalLMStudent(model, own)
    model.generation_config.do_sample = True
    student = CausalLMStudent(model, own)
    student.export(tmp_path / "out", own, FIRST)
    assert_holds(tmp_path / "out", student, FIRST)


def test_adapters_keep_what_ends_a_response(adapters, tokenizer, monkeypatch, tmp_path):
    out, sampling, servers = tmp_path / "out", SamplingParams(), Servers("http://a", "m")

    def stops(name=out):
        return [
            source.stop_ids for source in (HFSource.from_folder(name, sampling), ServerSource.from_folder(servers, name, WRITER, sampling))
        ]

    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": [0, 9], "do_sample": false, "temperature": 0.9}')
    adapters.model.generation_config.update(eos_token_id=[0, 5], do_sample=False, temperature=0.9)  # which `save_pretrained` refuses
    adapters.export(out, tokenizer, FIRST)
    assert stops() == [{0, 5}] * 2
    assert_holds(out, adapters, FIRST)
    adapters.export(out, tokenizer, SECOND)
    assert_holds(out, adapters, SECOND)
    place, commit = tmp_path / "hub/models--org--student", "a" * 40
    shutil.copytree(out, place / "snapshots" / commit)
    for name, text in {"refs/main": commit, f".no_exist/{commit}/config.json": ""}.items():
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert stops("org/student") == [{0, 5}] * 2
    (out / "generation_config.json").unlink()  # as an export by an older lopd, and peft itself, have it
    assert stops() == [{0, 9}] * 2
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        EngineError, match=r"its adapters do not state .*, and their base model '.*base' is not here; pass `SamplingParams\(stop"
    ):
        ServerSource.from_folder(servers, out, WRITER, sampling)
    assert ServerSource.from_folder(servers, out, WRITER, SamplingParams(stop_ids=[7])).stop_ids == {7}


def test_a_tokenizer_that_cannot_be_saved_is_found_when_the_student_is_made(llama):
    with pytest.raises(ModelError, match=r"its tokenizer cannot be saved .*a slow one"):
        CausalLMStudent(copy.deepcopy(llama), _Broken(NotImplementedError("a slow one")))


def test_a_full_folder_for_temporary_files_is_named_when_the_student_is_made(llama, monkeypatch):
    full = Exception("No space left on device (os error 28)")
    with pytest.raises(StoreWriteError, match=rf"its tokenizer .*error 28.*tried in {tempfile.gettempdir()}, so .*, or set TMPDIR"):
        CausalLMStudent(copy.deepcopy(llama), _Broken(full))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(StoreWriteError, match=r"found in \['/nowhere'\]\); it is tried in one of these, so free space there"):
        CausalLMStudent(copy.deepcopy(llama), build_tokenizer())


@pytest.mark.parametrize("kind", ["embeddings", "layers"])
def test_weights_that_are_one_tensor_though_the_configuration_does_not_say_so_are_found(kind, make_model):
    model = make_model("qwen3_padded")
    if kind == "embeddings":
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ModelError, match="are one tensor, which its configuration does not state"):
        CausalLMStudent(model, TOKENIZER_ID)


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 8.0, 12.0]}
LINEAR, SECTIONS = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default", "mrope_section": [1, 1, 2]}


def llama3():
    return transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 500000.0, **SCALING})


def phi3():
    fields = {"original_max_position_embeddings": 16, "sliding_window": None}
    return transformers.Phi3Config(**SHAPE, **fields, rope_parameters={"rope_theta": 20000.0, **LONGROPE})


def gpt_neox():
    rope = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
    fields = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**fields, rope_parameters=rope)


def gemma3():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    rope = {"full_attention": {"rope_theta": 2e6, **LINEAR}, "sliding_attention": {"rope_theta": 20000.0, "rope_type": "default"}}
    layers = {"layer_types": [*rope], "sliding_window": 4, "head_dim": 8, "rope_parameters": rope}
    return transformers.Gemma3Config(text_config={**SHAPE, **layers}, vision_config=vision, mm_tokens_per_image=4)


def qwen_vl():
    text = {**SHAPE, "rope_parameters": {"rope_theta": 20000.0, **SECTIONS}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=95, video_token_id=94)


@pytest.mark.filterwarnings("ignore:.*it also reads images")
@pytest.mark.parametrize(
    ("make", "older"),
    [
        (llama3, {"rope_theta": 500000.0, "rope_scaling": SCALING}),
        (phi3, {"rope_theta": 20000.0, "rope_scaling": LONGROPE, "partial_rotary_factor": 1.0}),
        (gpt_neox, {"rotary_emb_base": 20000.0, "rotary_pct": 0.5}),
        (gemma3, {"rope_theta": 2e6, "rope_scaling": LINEAR, "rope_local_base_freq": 20000.0}),
        (qwen_vl, {"rope_theta": 20000.0, "rope_scaling": SECTIONS}),
    ],
)
def test_an_export_states_rope_and_dtype_as_transformers_4_does_too_and_is_the_same_model(make, older, tokenizer, tmp_path):
    config = make()
    kind = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else transformers.AutoModelForCausalLM
    student = CausalLMStudent(kind.from_config(config), tokenizer)
    student.export(tmp_path / "out", tokenizer, FIRST)
    student.model.save_pretrained(tmp_path / "plain")
    written = json.loads((tmp_path / "out/config.json").read_text())
    text = written.get("text_config", written)
    assert {name: text.get(name) for name in older} == older
    assert written["torch_dtype"] == "float32"
    assert "rope_scaling" in older or "rope_scaling" not in text
    assert_holds(tmp_path / "out", student, FIRST)
    (one, other) = (transformers.AutoConfig.from_pretrained(tmp_path / name).get_text_config() for name in ("out", "plain"))
    assert one.rope_parameters == other.rope_parameters
    assert folder_model_id(tmp_path / "out").revision == folder_model_id(tmp_path / "plain").revision


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_head_that_was_trained_apart_from_the_embedding_is_not_stated_to_be_tied(elsewhere, make_model, tokenizer, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(make_model("llama_tied"), config)
    (head,) = (parameter for name, parameter in adapted.named_parameters() if "modules_to_save" in name)
    torch.nn.init.normal_(head)
    model = adapted.merge_and_unload()
    model.config.tie_word_embeddings = True  # as older versions of peft leave it
    if elsewhere:
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "sft")
        model, _ = load_model(tmp_path / "sft", torch.float32)
    student = CausalLMStudent(model.requires_grad_(True), tokenizer)
    student.export(tmp_path / "out", tokenizer, FIRST)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert_holds(tmp_path / "out", student, FIRST)
    assert folder_model_id(tmp_path / "out").revision == model_id(model).revision


def test_tied_weights_that_ranks_put_together_one_by_one_stay_tied(full, tokenizer, tmp_path):
    state = {name: tensor.clone() for name, tensor in full.model.state_dict().items()}
    lopd.engines.export.export_model(full.model, tokenizer, FIRST, tmp_path / "out", state)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert_holds(tmp_path / "out", full, FIRST)
