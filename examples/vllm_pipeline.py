"""Lightning OPD with vLLM for the two phases that cost money: sampling and scoring.  Needs `lopd[hf,zarr,vllm]`.

    python examples/vllm_pipeline.py --student SFT_DIR --teacher DIR --prompts FILE.jsonl --store run.zarr --out opd --dtype bfloat16

The student is one that lopd fine-tuned on the teacher's text (its folder records it), or pass `--any-teacher`.  Each phase resumes where it was
stopped, and may be a process of its own, on a machine of its own: name the phases to run, as in

    python examples/vllm_pipeline.py --phases collect --student ...      # GPUs for the student
    python examples/vllm_pipeline.py --phases score --teacher ...        # GPUs for the teacher
    python examples/vllm_pipeline.py --phases train --student ...        # no teacher, no vLLM
"""

import argparse
from contextlib import closing

import torch
import transformers

from lopd import (
    CausalLMStudent,
    ConsistencyPolicy,
    FusedOPDLoss,
    SamplingParams,
    ZarrStore,
    batches,
    collect_rollouts,
    load_checkpoint,
    opd_steps,
    save_checkpoint,
    score_rollouts,
)
from lopd.engines.hf import load_model
from lopd.engines.vllm import VLLMScorer, VLLMSettings, VLLMSource
from lopd.records import read_prompts


def main() -> None:
    """Run the phases that were asked for, one after the other; at no time are two models in memory."""
    options = parse()
    if "collect" in options.phases:
        collect(options)
    if "score" in options.phases:
        score(options)
    if "train" in options.phases:
        train(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["collect", "score", "train"]
    parser.add_argument("--phases", nargs="+", choices=every, default=every, help="default: all")
    parser.add_argument("--student", help="folder of the SFT student")
    parser.add_argument("--teacher", help="folder or hub name of the teacher")
    parser.add_argument("--any-teacher", action="store_true", help="train although the SFT teacher is not known to be this one")
    parser.add_argument("--prompts", help="JSONL or parquet")
    parser.add_argument("--store", required=True, help="path or URL")
    parser.add_argument("--out", help="folder of the trained student")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="the length that is trained on: longer responses are thrown away")
    parser.add_argument("--samples-per-prompt", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, help="prompt and response together; default: the model's context")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="that vLLM runs in; default: as the weights are stored")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of one model")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rollouts-per-step", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=2e-6)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> VLLMSettings:
    dtype = getattr(torch, options.dtype) if options.dtype else None
    return VLLMSettings(dtype, options.max_model_len, tensor_parallel_size=options.tensor_parallel_size)


def collect(options: argparse.Namespace) -> None:
    """Sample the student's answers: phase 1."""
    sampling = SamplingParams(max_new_tokens=options.max_new_tokens, samples_per_prompt=options.samples_per_prompt)
    with closing(VLLMSource.from_folder(options.student, sampling, settings(options))) as source:
        store = ZarrStore.open_or_create(options.store, source.manifest)
        collect_rollouts(source, read_prompts(options.prompts, source.tokenizer), store, prompts_per_batch=256)


def score(options: argparse.Namespace) -> None:
    """Score the answers with the teacher: phase 2."""
    with closing(VLLMScorer.from_folder(options.teacher, settings(options))) as scorer:
        score_rollouts(ZarrStore.open(options.store), scorer)


def train(options: argparse.Namespace) -> None:
    """Train the student on what is stored: phase 3."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.student, torch.float32, device, autocast=torch.bfloat16)
    student = CausalLMStudent(model, tokenizer, autocast=torch.bfloat16, gradient_checkpointing=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.1)
    steps = batches(
        ZarrStore.open(options.store),
        rollouts_per_step=options.rollouts_per_step,
        tokens_per_batch=options.tokens_per_batch,
        ref="behavior",
        consistency=ConsistencyPolicy.WARN if options.any_teacher else ConsistencyPolicy.ERROR,
    )[: options.steps]
    checkpoints = f"{options.out}-checkpoints"
    start = load_checkpoint(checkpoints, student, optimizer, steps=steps)
    for metrics in opd_steps(student, steps[start:], FusedOPDLoss(ratio_to_ref=True), optimizer):
        print(metrics)
        if (metrics.step + 1) % 10 == 0:
            save_checkpoint(checkpoints, student, optimizer, next_step=metrics.step + 1, steps=steps)
    student.export(options.out, tokenizer, steps.lineage)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
