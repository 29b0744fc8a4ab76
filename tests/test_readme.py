"""The program of the README runs as it is printed, only smaller."""

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from conftest import TOKENIZER_ID

from lopd import (
    CausalLMStudent,
    Lineage,
    MemoryStore,
    ReferenceOPDLoss,
    SamplingParams,
    SFTLoss,
    ZarrStore,
    batches,
    collect_rollouts,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

README = (Path(__file__).parents[1] / "README.md").read_text()
(PROGRAM,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
(GUARDS,) = re.findall(r"```python\n(from lopd import ConsistencyPolicy.*?)```", README, re.DOTALL)
(ROUNDS,) = re.findall(r"```python\n(from lopd import refresh_when.*?)```", README, re.DOTALL)


def printed_arguments(function: str) -> dict[str, Any]:
    """The keyword arguments of the one call of this function in the program."""
    calls = [node for node in ast.walk(ast.parse(PROGRAM)) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    (call,) = calls
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.mark.docs
def test_a_response_that_was_cut_at_the_printed_length_fits_into_the_printed_batches() -> None:
    sampling = SamplingParams(**printed_arguments("SamplingParams"))
    manifest = evolve(tiny_manifest(), sampling=sampling, sft_teacher=tiny_provenance().model)
    reported = [-1.0] * sampling.max_new_tokens
    longest = tiny_rollout(
        "longest",
        [5] * sampling.max_new_tokens,
        prompt_ids=[4] * 500,
        finish_reason="length",
        behavior_logprobs=reported,
    )
    store = MemoryStore(manifest)
    store.append([longest])
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(longest)])
    step = batches(store, **{**printed_arguments("batches"), "rollouts_per_step": 1}).step(0)
    assert max(batch.inputs.numel() for batch in step.batches) > sampling.max_new_tokens


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")  # of random models
def test_the_program_of_the_readme_runs_after_sft_on_the_same_teacher(
    tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("teacher", 1), ("base", 2)):
        make_model("llama_tied", seed=seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    teacher = HFSource.from_folder("teacher", SamplingParams(max_new_tokens=8))
    text = ZarrStore.create("sft.zarr", teacher.manifest)
    collect_rollouts(teacher, make_prompts(["a", "b", "c"], tokenizer), text)
    model, _ = load_model("base")
    student = CausalLMStudent(model, TOKENIZER_ID)
    steps = batches(text, teacher=None, rollouts_per_step=3)[:1]
    list(opd_steps(student, steps, SFTLoss(), torch.optim.SGD(student.parameters(), lr=0.1)))
    student.export("sft-student", tokenizer, steps.lineage)
    Path("prompts.jsonl").write_text('{"prompt": "d"}\n{"prompt": "e"}\n')
    capsys.readouterr()

    program = PROGRAM
    for printed, smaller in (
        ("max_new_tokens=4096", "max_new_tokens=8"),
        ("rollouts_per_step=256", "rollouts_per_step=2"),
        ("[:150]", "[:2]"),
    ):
        assert printed in program
        program = program.replace(printed, smaller)
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102

    assert capsys.readouterr().out.count("gap to the teacher") == 2
    assert Lineage.read(Path("opd-student")).opd_teacher == teacher.manifest.policy


@pytest.mark.docs
def test_the_rounds_of_the_readme_run_and_sample_anew(llama: Any, tokenizer: Any, prompts: Any) -> None:
    model, loss = copy.deepcopy(llama), ReferenceOPDLoss()
    student = CausalLMStudent(model, TOKENIZER_ID)
    teacher, optimizer = HFScorer(copy.deepcopy(llama), tokenizer), torch.optim.SGD(student.parameters(), lr=0.01)
    lineage = Lineage(sft_teacher=teacher.provenance.model)
    store = MemoryStore(HFSource(model, tokenizer, SamplingParams(max_new_tokens=4), lineage).manifest)
    names = {**globals(), **locals()}
    program = ROUNDS
    for printed, smaller in (
        ("max_new_tokens=4096", "max_new_tokens=4"),
        ("m.drift.ratio_mean < 0.9", "m.step % 2"),
        ("stop=150", "stop=5"),
    ):
        assert printed in program
        program = program.replace(printed, smaller)
    exec(compile(program, "README.md", "exec"), names)  # noqa: S102
    assert sorted(store.generations) == [0, 1, 2]
    assert len(store) == 3 * len(prompts)


@pytest.mark.docs
def test_the_residual_and_the_audit_of_the_readme_run(llama: Any, tokenizer: Any, prompts: Any, near_teacher: Any) -> None:
    source = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=6), Lineage(sft_teacher=tiny_provenance().model))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    for column in ("teacher", "qwen3-32b", "qwq-32b"):
        score_rollouts(store, HFScorer(llama if column == "qwq-32b" else near_teacher, tokenizer), column=column)
    names: dict[str, Any] = {**globals(), "store": store, "text": store}
    exec(compile(GUARDS, "README.md", "exec"), names)  # noqa: S102
    assert names["steps"].lineage.opd_teacher == store.columns["teacher"].model
