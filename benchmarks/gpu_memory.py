"""What the planner predicts for a phase beside what it takes, on a processor at three sizes of random Qwen3-like models.

    python benchmarks/gpu_memory.py         # writes benchmarks/results/gpu_memory.json; twenty minutes

Every case is a process of its own, whose result is kept in runs/gpu-memory: a second call at the same commit finds it.  Measured is the largest
resident size that the system saw, less that before the model was made, once the same case has run: for each new shape of a product in bfloat16,
oneDNN keeps code and workspace, which no card holds.  Freed tensors are given back to the system at once.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from bench_loss import forget_peak, memory
from random_rollouts import fill, random_manifest
from record import ROOT, commit, describe_machine, result_file
from transformers import AutoModelForCausalLM, Qwen3Config

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, SamplingParams, batches, opd_steps
from lopd.engines.hf import HFScorer, HFSource
from lopd.losses.chunking import CHUNK_BYTES
from lopd.records import Prompt, TokenizerId
from lopd.tools.plan import Use, lora_config, sampling, scoring, training

WITHIN = 0.15
_SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True}
#: By parameters.
SIZES: dict[str, dict[str, Any]] = {
    "20M": {"vocab_size": 32_768, "hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6, **_SHAPE},
    "60M": {"vocab_size": 49_152, "hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 6, **_SHAPE},
    "150M": {"vocab_size": 49_152, "hidden_size": 960, "intermediate_size": 2880, "num_hidden_layers": 8, **_SHAPE},
}
# the losses take another chunk of logits on a card
_PLAIN = Use(prompt_tokens=64, response_tokens=448, tokens_per_batch=2048, rows=16, autocast=None, chunk_bytes=CHUNK_BYTES)
#: Phase -> uses.
CASES: dict[str, Use] = {
    "training": _PLAIN,
    "training, checkpointing": evolve(_PLAIN, gradient_checkpointing=True),
    "training, bfloat16 autocast": evolve(_PLAIN, autocast=torch.bfloat16),
    "training, adapters on bfloat16, checkpointing": evolve(_PLAIN, dtype=torch.bfloat16, lora_rank=16, gradient_checkpointing=True),
    "scoring": evolve(_PLAIN, dtype=torch.bfloat16, rows_per_chunk=256),
    "sampling": evolve(_PLAIN, response_tokens=192, rows=64),
}
_NEEDS: dict[str, Callable[[Any, Use], Any]] = {"training": training, "scoring": scoring, "sampling": sampling}


def planned_gb(config: Qwen3Config, case: str) -> dict[str, float]:
    """Return the planner's 10^9 bytes of each part."""
    use = CASES[case]
    phase = case.split(",", maxsplit=1)[0]
    rows = use.rows if phase == "sampling" else use.rollouts
    parts: dict[str, float] = _NEEDS[phase](config, use).gigabytes(rows)
    return parts


def run(config: Qwen3Config, case: str) -> None:
    """Run the phase, with everything that it makes."""
    use = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=use.dtype).eval()
    words = TokenizerId("words", config.vocab_size, eos_id=None, bos_id=None, pad_id=0, template_hash="")
    store = MemoryStore(random_manifest(words, use.response_tokens))
    fill(store, 2 * int(use.rollouts), use.prompt_tokens, use.response_tokens)
    if case == "scoring":
        scorer = HFScorer(model, words, use.tokens_per_batch, use.rows_per_chunk)
        scorer.score([row.rollout for row in store.read(list(range(len(store))))])
    elif case == "sampling":
        params = SamplingParams(use.response_tokens, stop_ids=())
        prompts = [Prompt(f"p{i}", [5] * (use.prompt_tokens - i % 2)) for i in range(use.rows)]
        HFSource(model, words, params, rows_per_batch=use.rows).sample(prompts)
    else:
        if use.lora_rank:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(use.lora_rank))
        student = CausalLMStudent(model, words, autocast=use.autocast, gradient_checkpointing=use.gradient_checkpointing)
        # as on a card, where it is the default: all square roots at once
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6, foreach=True)
        steps = batches(store, rollouts_per_step=len(store), tokens_per_batch=use.tokens_per_batch)[:2]
        list(opd_steps(student, steps, FusedOPDLoss(), optimizer))


def measure(size: str, case: str) -> dict[str, Any]:
    """Measure a row; call it in a process that has done nothing else."""
    torch.set_num_threads(1)
    config = Qwen3Config(**SIZES[size])
    run(config, case)  # what libraries load and keep
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    forget_peak()
    run(config, case)
    taken = (memory("VmHWM") - before) * 2**20 / 1e9
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    return {"size": size, "parameters": parameters, "case": case, "measured_gb": taken}


def planned(row: dict[str, Any]) -> dict[str, Any]:
    """Return the same row, with what the planner predicts."""
    parts = planned_gb(Qwen3Config(**SIZES[row["size"]]), row["case"])
    total = sum(parts.values())
    return {**row, "planned_gb": total, "ratio": total / row["measured_gb"], "parts": parts}


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge how near every case is."""
    found = []
    for row in rows:
        name = f"planned over measured memory, {row['size']}, {row['case']}"
        found.append({"name": name, "goal": "0.85 to 1.15", "measured": row["ratio"], "met": abs(row["ratio"] - 1) <= WITHIN})
    return found


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "CASE"))
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    # memory of tensors comes from the system and goes back to it, whatever was freed before
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    units, rows = ROOT / "runs" / "gpu-memory" / str(commit()), []
    units.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        for case in CASES:
            unit = units / f"{size}, {case}.json"
            if not unit.exists():
                command = [sys.executable, str(Path(__file__)), "--worker", size, case]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                unit.write_text(done.stdout.splitlines()[-1])
            rows.append(planned(json.loads(unit.read_text())))
            print({name: value for name, value in rows[-1].items() if name != "parts"}, flush=True)
    result_file("gpu_memory", describe_machine(), rows, goals(rows))


if __name__ == "__main__":
    main()
