"""Folders that vLLM would read otherwise than their identity states: refused by name before anything is loaded; and the dtype of logits."""

import json
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from attrs import evolve
from conftest import TOKENIZER_ID, build_tokenizer
from engine_models import save_model
from odd_models import LONGROPE, odd_model
from test_identity import fetched  # noqa: F401
from test_vllm_life import fake  # noqa: F401

from lopd import CausalLMStudent, Lineage, Manifest, ModelId, Prompt, Rollout, SamplingParams, ZarrStore, import_text, score_rollouts
from lopd.engines.vllm import VLLMEngine, VLLMScorer, VLLMSettings, VLLMSource
from lopd.engines.vllm.worker import WorkerExtension
from lopd.errors import EngineError, ModelError
from lopd.records.identity import fingerprint_tokenizer
from lopd.tools.command import main
from lopd.tools.command.models import Model

BORDER, LONGEST = 16, 64


@pytest.fixture(scope="module", params=["Phi3", "Llama"])
def long_rope(request, tmp_path_factory):
    special = {"original_max_position_embeddings": BORDER, "sliding_window": None} if request.param == "Phi3" else {}
    folder = tmp_path_factory.mktemp("long") / request.param
    odd_model(request.param, rope_parameters=LONGROPE, **special).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_a_context_above_a_rope_border_is_refused_with_the_context_that_is_not(fake, long_rope, capsys, tmp_path):
    wanted = rf"in a context of {{}} vLLM turns all positions by the long factors of LongRoPE.*at most {BORDER}; pass `max_model_len=` {BORDER}, "
    for context, settings in (LONGEST, VLLMSettings()), (BORDER + 1, VLLMSettings(max_model_len=BORDER + 1)):
        for make in (
            lambda settings: VLLMEngine(long_rope, 96, settings),
            lambda settings: VLLMSource.from_folder(long_rope, SamplingParams(), settings),
            lambda settings: VLLMScorer.from_folder(long_rope, settings),
        ):
            with pytest.raises(ModelError, match=wanted.format(context)):
                make(settings)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    command = ["sample", f"{tmp_path}/run.zarr", "--student", f"{long_rope}", "--prompts", f"{tmp_path}/prompts.jsonl", "--engine", "vllm"]
    assert main(command) == 2
    assert f"pass `--context` {BORDER}, or use transformers" in " ".join(capsys.readouterr().err.split())
    assert not fake.started


def test_a_context_up_to_the_border_is_taken(fake, long_rope):
    settings = VLLMSettings(max_model_len=BORDER)
    assert len(VLLMSource.from_folder(long_rope, SamplingParams(), settings).sample([Prompt("p", [5])])) == 1
    assert len(VLLMScorer.from_folder(long_rope, settings).score([Rollout("r", [5], [6], [True], "length")])) == 1
    assert [started["max_model_len"] for started in fake.started] == [BORDER, BORDER]


@pytest.fixture(params=["source", "scorer"])
def running(request, fake, rollouts, tmp_path):
    """Return a folder, what runs its model, and functions that ask it for its identity and for numbers."""
    folder = save_model(tmp_path / "best", "llama_tied")
    if request.param == "scorer":
        return folder, VLLMScorer.from_folder(folder), lambda scorer: scorer.provenance.model, lambda scorer: scorer.score(rollouts)
    source = VLLMSource.from_folder(folder, SamplingParams(temperature=0.5))
    return folder, source, lambda source: source.manifest.policy, lambda source: source.sample([Prompt("p", [5])])


REPLACED = r"VLLMS\w+: the model in .*best was replaced after it was identified, expected best@.*; make a new one"


def test_an_engine_that_was_closed_does_not_start_again_on_another_model(running, fake):
    folder, engine, _, ask = running
    ask(engine)
    engine.close()
    save_model(folder, "llama_tied")
    ask(engine)  # the same once more
    save_model(folder, "llama_tied", seed=1)
    ask(engine)  # it has not loaded that
    assert len(fake.started) == 2
    engine.close()
    with pytest.raises(EngineError, match=REPLACED):
        ask(engine)
    assert len(fake.started) == 2


def test_an_engine_that_dies_and_starts_again_on_another_model_gives_nothing(running, fake, monkeypatch):
    folder, engine, _, ask = running
    monkeypatch.setattr(fake, "shutdown", lambda: save_model(folder, "llama_tied", seed=1))
    fake.faults = [RuntimeError("died")]
    with pytest.raises(EngineError, match=REPLACED):
        ask(engine)


def test_an_export_that_lands_while_an_engine_starts_is_not_taken_for_what_was_identified(running, fake, monkeypatch):
    folder, engine, identity, ask = running
    identity(engine)
    start = fake.LLM
    monkeypatch.setattr(fake, "LLM", lambda **arguments: (save_model(folder, "llama_tied", seed=1), start(**arguments))[1])
    with pytest.raises(EngineError, match=r"vLLM with .*best: the files in its folder were replaced while it started; call again"):
        ask(engine)
    monkeypatch.setattr(fake, "LLM", start)
    with pytest.raises(EngineError, match=REPLACED):
        ask(engine)
    assert (len(fake.started), fake.stopped) == (1, 1)


def test_an_engine_that_answered_with_another_model_gives_nothing_though_the_folder_is_as_it_was(running, fake, monkeypatch):
    folder, engine, _, ask = running
    seeds, real = [1, 0], fake.generate
    monkeypatch.setattr(fake, "shutdown", lambda: save_model(folder, "llama_tied", seed=seeds.pop(0)))
    monkeypatch.setattr(fake, "generate", lambda *args, **options: (save_model(folder, "llama_tied"), real(*args, **options))[1])
    fake.faults = [RuntimeError("died")]
    with pytest.raises(EngineError, match=REPLACED):
        ask(engine)


def test_a_round_after_an_export_is_of_what_was_exported_though_an_engine_of_before_runs(running, fake):
    folder, engine, identity, ask = running
    before = identity(engine)
    ask(engine)
    save_model(folder, "llama_tied", seed=1)
    later = evolve(engine)
    assert identity(later) != before
    ask(later)
    assert (len(fake.started), fake.stopped) == (2, 1)
    with pytest.raises(EngineError, match=REPLACED):
        ask(engine)


@pytest.fixture
def opened(monkeypatch):
    """Return a function that opens a folder in both ways, where loading anything fails."""
    monkeypatch.setattr("lopd.engines.vllm.folders.load_tokenizer", lambda _: pytest.fail("something was loaded"))
    return lambda folder: (lambda: VLLMSource.from_folder(folder, SamplingParams()), lambda: VLLMScorer.from_folder(folder))


def export_adapters(base, tokenizer, folder):
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    CausalLMStudent(adapted, tokenizer).export(folder / "adapters", tokenizer, Lineage())


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_the_export_of_a_lora_student_is_refused_before_anything_is_loaded(beside, opened, make_model, tokenizer, tmp_path):
    export_adapters(make_model("llama_tied"), tokenizer, tmp_path)
    if beside:
        # transformers applies the adapters there, and vLLM passes them by
        (tmp_path / "adapters" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for make in opened(tmp_path / "adapters"):
        with pytest.raises(
            ModelError, match=r"it holds adapters \(adapter_config.json\), and vLLM is given one model; merge them .*the lineage beside it"
        ):
            make()


def test_a_command_refuses_the_export_of_a_lora_student_by_the_same_name(make_model, tokenizer, tmp_path):
    export_adapters(make_model("llama_tied"), tokenizer, tmp_path)
    with pytest.raises(ModelError, match=r"it holds adapters \(adapter_config.json\), and vLLM is given one model"):
        Model(str(tmp_path / "adapters"), "vllm").fitted(8)


def test_an_engine_that_cuts_elsewhere_than_the_tokenizer_ends_is_refused(make_model, tokenizer, tmp_path):
    """The ids between them would have probability in the engine, and none in the column."""
    make_model("llama_tied").save_pretrained(tmp_path)
    whole = fingerprint_tokenizer(tokenizer).vocab_size
    for scoring in (True, False):
        engine = VLLMEngine(tmp_path, whole - 2, scoring=scoring)
        with pytest.raises(
            EngineError, match=rf"cuts its logits to {whole - 2} ids, expected {whole}, as the tokenizer has them; make it with `vocab"
        ):
            (VLLMScorer if scoring else VLLMSource)(engine, fingerprint_tokenizer(tokenizer))


def test_a_folder_without_a_model_is_refused_before_anything_is_loaded(opened, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for make in opened(tmp_path):
        with pytest.raises(ModelError, match=r"it holds neither config.json nor adapter_config.json, expected a model"):
            make()


def test_a_quantised_teacher_is_stated_in_the_ways_that_its_refusal_names(fake, rollouts, tokenizer, tmp_path, capsys):
    folder = save_model(tmp_path / "tiny-FP8", "llama_tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    says = r"its weights are quantised.*`ModelId\(name, commit, dtype\)`: as the teacher to `import_text` or `Lineage.of`, as `identity=` to a source"
    with pytest.raises(ModelError, match=says):
        import_text([("what is 2 + 3?", "5")], tokenizer, teacher=folder)
    stated = ModelId(str(folder), "abc", "float16")
    assert VLLMSource.from_folder(folder, SamplingParams(), identity=stated).manifest.policy == stated
    store = ZarrStore.create(tmp_path / "run.zarr", Manifest(TOKENIZER_ID, ModelId("policy", "1", "float32"), SamplingParams()))
    store.append(rollouts)
    score = ["score", str(tmp_path / "run.zarr"), "--teacher", str(folder), "--engine", "vllm"]
    assert main(score) == 2
    assert "to the command as `--revision` and `--dtype`" in " ".join(capsys.readouterr().err.split())
    assert main([*score, "--revision", "abc", "--dtype", "float16"]) == 0
    store.refresh()
    assert store.columns["teacher"].model == stated
    assert fake.started[0]["dtype"] == "float16"


@pytest.mark.parametrize("scored", [False, True])
def test_rollouts_that_come_while_vllm_is_loaded_are_for_the_next_call(scored, fake, rollouts, tokenizer, tmp_path, capsys, monkeypatch):
    folder, load = save_model(tmp_path / "tiny", "llama_tied"), VLLMScorer.from_folder
    store = ZarrStore.create(tmp_path / "run.zarr", Manifest(TOKENIZER_ID, ModelId("policy", "1", "float32"), SamplingParams()))
    score = ["score", str(tmp_path / "run.zarr"), "--teacher", str(folder), "--engine", "vllm"]
    assert main(score) == 2
    assert "it has 0 rollouts" in capsys.readouterr().err
    store.append(rollouts)
    longer = Rollout("longer", [5] * 9, [6] * 90, [True] * 90, "length")

    def loaded(*given, **named):
        store.append([longer])
        if scored:
            score_rollouts(store, load(folder), rows=store.find(["longer"]))
        return load(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(VLLMScorer, "from_folder", loaded)
        assert main(score) == 0
    assert "1 rollouts came meanwhile, and are for the next call." in capsys.readouterr().out
    store.refresh()
    assert store.scored("teacher").tolist() == [True] * len(rollouts) + [scored]
    assert main(score) == 0
    store.refresh()
    assert (store.scored("teacher").all(), store.quarantined("teacher")) == (True, {})


def test_a_model_whose_identity_has_to_be_stated_is_refused_before_its_weights_are_downloaded(fetched, tmp_path):
    folder = save_model(tmp_path / "tiny", "llama_tied")
    asked, quantised = fetched(["config.json", "model.safetensors"], folder), VLLMSettings(options={"quantization": "fp8"})
    with pytest.raises(ModelError, match=r"vLLM's option 'quantization' makes a model that its folder does not have; pass `identity=`"):
        VLLMSource.from_folder("someone/tiny", SamplingParams(), quantised)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match=r"its weights are quantised.*as `identity=` to a source or scorer"):
        VLLMScorer.from_folder("someone/tiny-AWQ")
    assert set(asked) == {"config.json"}
    VLLMScorer.from_folder("someone/tiny-AWQ", identity=ModelId("tiny-AWQ", "abc", "float16"))
    assert "model.safetensors" in asked


def test_what_is_stated_of_a_model_is_recorded_by_transformers_too(tmp_path):
    folder = str(save_model(tmp_path / "tiny", "llama_tied"))
    model = Model(folder, revision="abc", dtype="float32")
    recorded = model.source(SamplingParams()).manifest.policy, model.scorer().provenance.model, model.identity()
    assert set(recorded) == {ModelId(folder, "abc", "float32")}


def test_a_worker_states_what_its_layers_of_logits_compute_in_and_nothing_where_it_cannot_know(monkeypatch):
    layer, name = type("LogitsProcessor", (torch.nn.Module,), {}), "vllm.model_executor.layers.logits_processor"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(LogitsProcessor=layer))
    worker, config = WorkerExtension(), SimpleNamespace()
    assert worker.lopd_head_dtypes() == []
    worker.get_model, worker.model_runner = layer, SimpleNamespace(model_config=config)
    assert worker.lopd_head_dtypes() == []
    config.head_dtype = torch.bfloat16
    assert worker.lopd_head_dtypes() == ["torch.bfloat16"]
    layer.head_dtype = torch.float32
    assert worker.lopd_head_dtypes() == ["torch.float32"]


def test_a_float32_head_is_asked_for_where_a_model_that_also_reads_images_makes_it(fake, tmp_path):
    for config, part in ((transformers.Gemma3Config(), {"text_config": {"head_dtype": "float32"}}), (transformers.Gemma3TextConfig(), {})):
        config.save_pretrained(tmp_path)
        arguments = VLLMEngine(tmp_path, 96, VLLMSettings(dtype=torch.bfloat16)).arguments()
        assert arguments["hf_overrides"] == {"head_dtype": "float32", **part}
