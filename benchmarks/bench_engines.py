"""Sampling and scoring on transformers, on vLLM in process and served, and how far their log-probs are from each other: `make bench-engines`.

Tokens a second are prompt and response tokens that were scored, or response tokens that were sampled; medians of repeats that take turns
within one process for each engine.  Both engines run on the same CPU threads, one engine at a time.  Absolute numbers are those of a small
CPU machine, and vLLM runs with `enforce_eager`, in process and served; on a GPU the two engines are much further apart.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from record import ROOT, describe_machine, result_file

from lopd import SamplingParams, ZarrStore, collect_rollouts
from lopd.engines.hf import HFSource, load_model
from lopd.records import make_prompts

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
WORKER = Path(__file__).with_name("engine_worker.py")
GOAL = 0.9


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-engines"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="write results")
    options = parser.parse_args()
    rows = [measure(name, folder, options) for name, folder in models(options.out).items()]
    for row in rows:
        print(json.dumps(row))
    if options.record:
        write(rows)


def models(out: Path) -> dict[str, Path]:
    """Return the folders of SmolLM2-135M-Instruct in two dtypes, and of a random model of two layers."""
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    folders = {"SmolLM2-135M, float32": out / "fp32", "SmolLM2-135M, bfloat16": out / "bf16", "random, 3M, float32": out / "tiny"}
    full, half, tiny = folders.values()
    if not full.exists():
        smollm2.save_teacher(full)
    model, tokenizer = load_model(full)
    if not half.exists():
        model.to(torch.bfloat16).save_pretrained(half)
        tokenizer.save_pretrained(half)
    if not tiny.exists():
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = transformers.Qwen3Config(
            vocab_size=len(tokenizer), head_dim=32, max_position_embeddings=1024, initializer_range=0.1, **sizes
        )
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(tiny)
        tokenizer.save_pretrained(tiny)
    return folders


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row of the tables: both engines on rollouts that the model itself sampled."""
    import smollm2

    source = HFSource.from_folder(folder, SamplingParams(max_new_tokens=options.max_new_tokens))
    store = ZarrStore.open_or_create(str(folder) + f"-{options.prompts}-{options.max_new_tokens}.zarr", source.manifest)
    collect_rollouts(source, make_prompts(smollm2.questions()[: options.prompts], source.tokenizer), store)
    del source
    hf, truth = work("hf", folder, options)
    vllm, ours = work("vllm", folder, options)
    served, theirs = work("served", folder, options)
    row = {
        "model": name,
        "threads": hf["threads"],
        "tokens": hf["tokens"],
        "hf": speeds(hf),
        "vllm": speeds(vllm),
        "served": speeds(served),
        "scoring_over_forward": per_turn(hf["seconds"]),
        "options": {
            "prompts": options.prompts,
            "max_new_tokens": options.max_new_tokens,
            "repeats": options.repeats,
            "enforce_eager": True,
        },
    }
    row["gaps"] = {"in process": gaps(ours, truth)}
    if "bfloat16" in name:
        half = work("vllm", folder, options, "--half-head", "--repeats", "0")[1]
        row["gaps"]["in process, head in the model's dtype"] = gaps(half, truth)
    row["gaps"]["served"] = gaps(theirs, truth)
    return row


def work(engine: str, folder: Path, options: argparse.Namespace, *more: str) -> tuple[dict[str, Any], np.ndarray]:
    """Run one engine in a process of its own; return its report and the log-probs that it computes."""
    out = folder.with_name(f"{folder.name}-{engine}{''.join(more)}")
    sizes = ["--max-new-tokens", str(options.max_new_tokens), "--repeats", str(options.repeats)]
    where = f"{folder}-{options.prompts}-{options.max_new_tokens}.zarr"
    command = [sys.executable, str(WORKER), engine, str(folder), where, str(out), *sizes, *more]
    subprocess.run(command, check=True, env={**VLLM_ENVIRONMENT, **os.environ})
    report: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return report, np.load(out.with_suffix(".npz"))["logprobs"]


def speeds(report: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens a second of each variant: median, slowest, fastest."""
    made = {}
    for name, seconds in report["seconds"].items():
        tokens = report["tokens"]["sampling" if name == "sampling" else "scoring"]
        made[name] = {"median": tokens / median(seconds), "min": tokens / max(seconds), "max": tokens / min(seconds)}
    return made


def per_turn(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the speed of scoring over that of the bare forward pass of the same tokens in the same turn: median, smallest and largest."""
    found = [forward / scoring for forward, scoring in zip(seconds["forward"], seconds["scoring"], strict=True)]
    return {"median": median(found), "min": min(found), "max": max(found)}


def gaps(ours: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return how far two columns of log-probs are apart, in nats."""
    difference = ours.astype(np.float64) - truth
    size = np.abs(difference)
    return {
        "mean": float(size.mean()),
        "p99": float(np.quantile(size, 0.99)),
        "max": float(size.max()),
        "bias": float(difference.mean()),
        "tokens": size.size,
    }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every goal, and what was measured of it."""
    found = []
    for row in rows:
        ratio = row["scoring_over_forward"]["median"]
        goal = f"HFScorer, tokens/s beside a bare forward pass of {row['model']} in the same turn"
        found.append({"name": goal, "goal": f">= {GOAL}", "measured": round(ratio, 3), "met": ratio >= GOAL})
    return found


def write(rows: list[dict[str, Any]]) -> None:
    """Write the result file."""
    report = describe_machine()
    import vllm

    report["versions"] |= {"vllm": vllm.__version__, "transformers": transformers.__version__}
    result_file("bench_engines", report, rows, goals(rows))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
