"""What the page on lm-eval shows is what runs: its files, its command and its Python, on a tiny student.  `make test-lm-eval` installs lm-eval."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "howto" / "evaluate-elsewhere.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder with `opd-student`, and the two files of the page."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: run `make test-lm-eval`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / "20_share.py"), run_name="__main__")
    Path("runs/20/student").rename("opd-student")
    (task,), (rows,) = blocks("yaml"), blocks("json")
    Path("sums.yaml").write_text(task)
    Path("sums.jsonl").write_text(rows)
    return tmp_path


def run(*command: str) -> str:
    environment = {**os.environ, "HF_DATASETS_CACHE": "cache", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_command_of_the_page_evaluates_an_export(folder: Path) -> None:
    command = blocks("bash")[-1].replace("\\\n", " ").split()
    assert command[0] == "lm-eval"
    run(sys.executable, "-m", "lm_eval", *command[1:])
    (written,) = (folder / "results").rglob("results_*.json")
    found: dict[str, Any] = json.loads(written.read_text())["results"]["sums"]
    assert 0 <= found["exact_match,none"] <= 1


def test_a_verifier_gives_the_same_score_in_both_whatever_penalty_the_base_has(folder: Path) -> None:
    config = folder / "opd-student" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "repetition_penalty": 9.0}))
    out = run(sys.executable, "-c", "\n".join(blocks("python")))
    ours, theirs = map(float, out.split()[-2:])
    assert 0 < ours < 1
    assert theirs == pytest.approx(ours, abs=1e-12)


def test_adapters_are_evaluated_with_the_tokenizer_of_their_export(folder: Path) -> None:
    import peft
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string

    Path("opd-student").rename("BASE")
    tokenizer = transformers.AutoTokenizer.from_pretrained("BASE")
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = transformers.AutoModelForCausalLM.from_pretrained("BASE")
    for part in (peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), tokenizer):
        part.save_pretrained("opd-student")
    (arguments,) = re.findall("`(pretrained=BASE.*?)`", PAGE)
    evaluated = HFLM(device="cpu", **simple_parse_args_string(arguments))
    assert isinstance(evaluated.model, peft.PeftModel)
    assert evaluated.tokenizer.chat_template == tokenizer.chat_template
