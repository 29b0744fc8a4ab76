"""The recipes of the paper: dry-run at tiny size, their estimate, and the grader."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from lopd import SamplingParams, ZarrStore
from lopd.engines.hf import load_model
from lopd.errors import PromptError, TokenizerMismatchError
from lopd.records import Lineage, Prompt, Rollout
from lopd.tools.plan import rates_like

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from recipes import run as recipe_run
from recipes import train as recipe_train
from recipes.estimate import estimate, work_of
from recipes.grading import MathGrader
from recipes.paper import RECIPES

TINY = {
    "template": "what is {prompt}?",
    "sft-texts": 12,
    "sft-tokens": 8,
    "sft-steps": 12,
    "sft-rollouts-per-step": 4,
    "rollouts": 10,
    "max-new-tokens": 8,
    "opd-steps": 4,
    "opd-rollouts-per-step": 4,
    "tokens-per-batch": 128,
    "test-samples": 2,
    "test-tokens": 6,
    "teacher-billions": 1e-6,
    "student-billions": 1e-6,
    "training-gpus": 2,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path, tokenizer, make_model):
    """Save two models and the three files of a recipe."""
    for name, seed in (("teacher", 1), ("base", 2)):
        make_model("llama_tied", seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, start in (("sft", 0), ("opd", 20), ("test", 40)):
        records = [{"prompt": f"{i} + {i}", "answer": 2 * i} for i in range(start, start + 12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def start(monkeypatch, folder, name, **given):
    """Run a recipe in this process."""
    files = {"sft-prompts": "sft.jsonl", "prompts": "opd.jsonl", "test": "test.jsonl", "out": "run"}
    paths = {option: folder / file for option, file in files.items()}
    models = {"teacher": folder / "teacher", "student": folder / "base"}
    flags = [option for option, value in given.items() if value is True]
    options = {"engine": "hf", **paths, **models, **TINY, **{k: v for k, v in given.items() if v is not True}}
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run", name, *words, *(f"--{flag}" for flag in flags)])
    recipe_run.main()


def phase(out, name):
    return json.loads((out / "phases" / f"{name}.json").read_text())


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")  # the models are random
def test_math_then_code_from_the_base_model_to_the_evaluated_student(monkeypatch, folder, capsys):
    start(monkeypatch, folder, "qwen3-4b-math")
    out = folder / "run"
    assert "GPU-hours" in capsys.readouterr().out
    store = ZarrStore.open(str(out / "opd.zarr"))
    sampling = store.manifest.sampling
    assert (len(store), sampling.temperature, sampling.top_p, sampling.seed) == (10, 0.8, 1.0, 42)
    assert ZarrStore.open(str(out / "sft.zarr")).manifest.sampling.seed == 1_000_042
    assert store.scored("teacher").all()
    lineage = Lineage.read(out / "opd")
    assert lineage.sft_teacher.same_weights(lineage.opd_teacher)
    history = phase(out, "opd")["history"]
    assert [m["step"] for m in history] == [0, 1, 2, 3]
    assert all(np.isfinite(m["loss"]) for m in history)
    assert phase(out, "evaluation-of-opd")["samples"] == 2

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    start(monkeypatch, folder, "qwen3-4b-math")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before, "what is done stays done"

    code = {"student": out / "opd", "template": "{prompt}", "sft-steps": 0, "out": folder / "code", "prompts": folder / "sft.jsonl"}
    start(monkeypatch, folder, "qwen3-4b-code", **code, **{"ratio-to-ref": True})
    assert ZarrStore.open(str(folder / "code" / "opd.zarr")).scored("behavior/sampler").all()
    assert all(m["drift"] is not None for m in phase(folder / "code", "opd")["history"])
    assert not (folder / "code" / "sft").exists()
    assert Lineage.read(folder / "code" / "opd").sft_teacher.same_weights(lineage.sft_teacher)


def test_a_teacher_of_another_vocabulary_is_refused_before_it_writes_anything(monkeypatch, folder, swapped_tokenizer):
    swapped_tokenizer.save_pretrained(folder / "teacher")
    with pytest.raises(TokenizerMismatchError, match=r"Teacher '.*/teacher': the hash of its vocabulary is .* expected the student's"):
        start(monkeypatch, folder, "qwen3-4b-math")
    assert not (folder / "run").exists()


def test_a_student_stored_in_16_bits_is_sampled_in_float32_and_a_teacher_scores_in_the_dtype_of_the_recipe(folder):
    model, _ = load_model(str(folder / "base"), torch.bfloat16)
    model.save_pretrained(folder / "base")
    teacher = str(folder / "teacher")
    engine = recipe_run.Engine(evolve(RECIPES["qwen3-4b-math"], teacher=teacher, device="cpu"), "hf")
    assert engine.source(str(folder / "base"), SamplingParams(2)).manifest.policy.dtype == "float32"
    assert engine.source(teacher, SamplingParams(2)).manifest.policy == engine.scorer(teacher).provenance.model
    assert engine.scorer(teacher).provenance.model.dtype == "bfloat16"


def test_an_estimate_alone_starts_nothing(monkeypatch, folder):
    start(monkeypatch, folder, "qwen3-4b-math", **{"only-estimate": True})
    assert not (folder / "run").exists()


def test_rates_of_sft_rise_and_fall_and_that_of_opd_is_constant(monkeypatch, folder):
    monkeypatch.setattr(recipe_train, "_steps", lambda *_, **__: None)
    recipe = RECIPES["qwen3-8b-math"]
    sft, opd = recipe_train.sft_phase(folder, recipe), recipe_train.opd_phase(folder, recipe)
    assert sft.rate(299) == pytest.approx(8e-5)
    assert sft.rate(149) == pytest.approx(4e-5)
    assert sft.rate(300 + 1350) == pytest.approx(4e-5)
    assert sft.rate(2999) < 1e-9
    assert {opd.rate(step) for step in range(150)} == {2e-6}
    assert (opd.loss.clip, opd.loss.ratio_to_ref) == (10.0, False)


@pytest.mark.parametrize(("name", "hours"), [("qwen3-4b-math", 20), ("qwen3-8b-math", 30)])
def test_the_estimate_of_the_opd_stage_is_near_table_2(name, hours):
    assert estimate(RECIPES[name]).opd.gpu_hours == pytest.approx(hours, rel=0.1)


def test_the_estimate_counts_every_phase():
    recipe = RECIPES["qwen3-8b-math"]
    one, more = estimate(recipe), estimate(evolve(recipe, sft_texts=2 * recipe.sft_texts, sft_steps=3 * recipe.sft_steps), problems=30)
    assert more.gpu_hours["SFT text"] == pytest.approx(2 * one.gpu_hours["SFT text"])
    assert more.gpu_hours["SFT"] == pytest.approx(3 * one.gpu_hours["SFT"])
    assert (one.gpu_hours["evaluation"], more.gpu_hours["evaluation"]) == (
        0,
        pytest.approx(2 * 30 * 32 * 32_768 * 0.75 / 1485 / 3600, rel=1e-3),
    )
    assert more.opd == one.opd
    assert estimate(evolve(recipe, ratio_to_ref=True)).opd == one.opd, "the engine that samples reports what a ratio needs"
    rates = rates_like(work_of(recipe))
    fast = estimate(recipe, rates=evolve(rates, training=2 * rates.training))
    assert fast.gpu_hours["SFT"] == pytest.approx(one.gpu_hours["SFT"] / 2)
    assert one.gpu_hours["SFT"] == pytest.approx(3000 * 128 * (200 + 16_384 * 0.75) / rates.training / 3600), "prompts are read too"
    assert one.opd.memory_gb == pytest.approx(8.2 * 16)
    slow = estimate(evolve(recipe, tflops=recipe.tflops / 4))
    assert slow.gpu_hours["SFT text"] == pytest.approx(4 * one.gpu_hours["SFT text"])
    assert slow.opd.gpu_hours == pytest.approx(4 * one.opd.gpu_hours)


class Text:
    """Decodes to what it is told."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return self.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("answer", "text", "grade"),
    [
        ("1/2", r"so it is \boxed{\frac{1}{2}}", 1),
        (r"\frac12", r"\boxed{0.5}", 1),
        ("27", r"<think>\boxed{27} or so</think> It is \boxed{28}.", 0),
        ("27", r"<think>\boxed{28} or so</think> It is \boxed{27}.", 1),
        ("27", r"<think>\boxed{27} and then it was cut", 1),
        ("27", "I do not know", 0),
        ("(1, 2)", r"\boxed{(1,2)}", 1),
        ("She has 500 + 510 = <<500+510=1010>>1010.\n#### 1,010", r"\boxed{1010}", 1),
        ("She has 500 + 510 = <<500+510=1010>>1010.\n#### 1,010", r"\boxed{510}", 0),
    ],
)
def test_the_grader_looks_at_the_answer_after_the_thinking(answer, text, grade):
    prompt, rollout = Prompt("p", [1], answer=answer), Rollout("p/s0/g0", [1], [2], [True], "stop")
    assert MathGrader(Text(text))(prompt, rollout) == grade


def test_a_problem_without_an_answer_is_refused_and_not_graded_0():
    with pytest.raises(PromptError, match=r"Prompt 'p': it has no answer to grade by"):
        MathGrader(Text("1"))(Prompt("p", [1]), Rollout("p/s0/g0", [1], [2], [True], "stop"))
