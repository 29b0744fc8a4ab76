"""The program of the README runs as it is printed, only smaller."""

import ast
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from lopd import (
    Lineage,
    MemoryStore,
    SamplingParams,
    batches,
)
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

README = (Path(__file__).parents[1] / "README.md").read_text()
(PROGRAM,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)


def printed_arguments(function: str) -> dict[str, Any]:
    """Return the keyword arguments of the last call of this function in the program."""
    calls = [node for node in ast.walk(ast.parse(PROGRAM)) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in calls[-1].keywords}


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
@pytest.mark.filterwarnings("ignore::lopd.errors.RepeatedRolloutsWarning")  # of three texts
def test_the_program_of_the_readme_runs(
    tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("teacher", 1), ("base", 2)):
        make_model("llama_tied", seed=seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    Path("text.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    for name in ("prompts", "test"):
        Path(f"{name}.jsonl").write_text('{"prompt": "d", "answer": "a"}\n{"prompt": "e", "answer": "b"}\n')
    program = PROGRAM
    for printed, smaller in (
        ("max_new_tokens=4096", "max_new_tokens=8"),
        ("rollouts_per_step=64", "rollouts_per_step=2"),
        ("[:300]", "[:2]"),
        ("rollouts_per_step=256", "rollouts_per_step=2"),
        ("[:150]", "[:2]"),
    ):
        assert printed in program
        program = program.replace(printed, smaller)
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102

    out = capsys.readouterr().out
    assert out.count("gap to the teacher") == 2, "a line for each step of OPD"
    assert "Evaluation(" in out
    assert Lineage.read(Path("opd-student")).opd_teacher == Lineage.of("teacher").sft_teacher


def test_the_readme_has_at_most_220_lines() -> None:
    assert len(README.splitlines()) <= 220


def test_no_link_of_the_page_on_pypi_leads_to_a_file_that_is_not_there() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    page = README
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page, changed = re.subn(each["pattern"], each["replacement"], page)
        assert changed, each
    targets = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", page)
    assert targets
    assert [target for target in targets if not (target[0] or target[1]).startswith("https://")] == []
    assert "which were tried (docs/models.md)" in page
    assert PROGRAM in page
