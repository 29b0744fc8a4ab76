"""One engine on one model, measured in a process of its own: vLLM takes over torch's threads, so it shares none with transformers.

    python benchmarks/engine_worker.py hf|vllm|served MODEL STORE OUT --max-new-tokens 64 --repeats 3 [--half-head]

Writes OUT.json with the seconds of each repeat, and OUT.npz with the log-probs that it gave.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from attrs import evolve
from engine_server import NAME, serving

from lopd import Prompt, Rollout, SamplingParams, Scores, ZarrStore
from lopd.engines.causal_lm import hidden_states
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.identity import folder_model_id
from lopd.engines.server import Servers, ServerScorer, ServerSource
from lopd.engines.vllm import VLLMEngine, VLLMScorer, VLLMSettings, VLLMSource

TOKENS_PER_BATCH, TOP_K = 2048, 20


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["hf", "vllm", "served"])
    parser.add_argument("model", type=Path)
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--half-head", action="store_true", help="vLLM's own logits, in the dtype of the weights")
    options = parser.parse_args()
    store = ZarrStore.open(options.store)
    rollouts = [record.rollout for record in store.read(range(len(store)))]
    # the last id of the vocabulary is next to never sampled, so that all responses are of one length
    sampling = SamplingParams(max_new_tokens=options.max_new_tokens, stop_ids=(store.manifest.tokenizer.vocab_size - 1,))
    with engine_of(options, store, sampling, rollouts) as (variants, score):
        scores = score()
        np.savez(options.out.with_suffix(".npz"), logprobs=np.concatenate([s.logprobs for s in scores]))
        tokens = {"scoring": sum(len(r) for r in rollouts), "sampling": len(rollouts) * options.max_new_tokens}
        report = {"seconds": measure(variants, options.repeats), "tokens": tokens, "threads": torch.get_num_threads()}
        options.out.with_suffix(".json").write_text(json.dumps(report))


@contextmanager
def engine_of(options: argparse.Namespace, store: ZarrStore, sampling: SamplingParams, rollouts: Sequence[Rollout]) -> "Iterator[Variants]":
    """Open the engine that was asked for, and yield what can be measured of it."""
    prompts = [Prompt(r.rollout_id, r.prompt_ids) for r in rollouts]
    if options.engine == "hf":
        yield hf_variants(options.model, sampling, prompts, rollouts)
    elif options.engine == "vllm":
        yield vllm_variants(options.model, sampling, prompts, rollouts, float32_head=not options.half_head)
    else:
        longest = max(len(r) for r in rollouts) + sampling.max_new_tokens + 1
        sizes = {"--max-model-len": longest, "--max-num-batched-tokens": max(TOKENS_PER_BATCH, longest), "--max-logprobs": TOP_K}
        arguments = [str(part) for pair in sizes.items() for part in pair]
        with serving(options.model, *arguments, "--no-enable-prefix-caching", "--dtype", store.manifest.policy.dtype) as url:
            yield served_variants(url, options.model, sampling, prompts, rollouts)


def measure(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Measure the seconds of each variant; they take turns, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1 if repeats else 0):
        for name, work in variants.items():
            started = perf_counter()
            work()
            if turn:
                seconds[name].append(perf_counter() - started)
    return seconds


Variants = tuple[dict[str, Callable[[], Any]], Callable[[], Sequence[Scores]]]


def hf_variants(model: Path, sampling: SamplingParams, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Variants:
    """Return scoring, and the forward pass of the same model on the same padded batches, with all its logits and without them."""
    source = HFSource.from_folder(model, sampling)
    scorer = HFScorer(source.model, source.tokenizer, TOKENS_PER_BATCH)
    wide = HFScorer(source.model, source.tokenizer, TOKENS_PER_BATCH, top_k=TOP_K)
    batches = padded(rollouts)

    @torch.inference_mode()
    def forward(run: Callable[[torch.Tensor], Any]) -> None:
        for ids_BS in batches:
            run(ids_BS)

    return {
        "forward, no logits": lambda: forward(lambda ids_BS: hidden_states(source.model, ids_BS)),
        "forward": lambda: forward(lambda ids_BS: source.model(ids_BS, use_cache=False).logits),
        "scoring": lambda: scorer.score(rollouts),
        "scoring, top-k": lambda: wide.score(rollouts),
        "sampling": lambda: source.sample(prompts),
    }, lambda: scorer.score(rollouts)


def padded(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    """Return the batches that HFScorer makes: of similar length, within its budget of tokens."""
    parts: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=len):
        if parts and (len(parts[-1]) + 1) * len(rollout) <= TOKENS_PER_BATCH:
            parts[-1].append(rollout)
        else:
            parts.append([rollout])
    rows = [[torch.from_numpy(np.concatenate([r.prompt_ids, r.response_ids]).astype(np.int64)) for r in part] for part in parts]
    return [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in rows]


def vllm_variants(
    model: Path, sampling: SamplingParams, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, float32_head: bool
) -> Variants:
    """Return both phases; each call computes everything again."""
    longest = max(len(r) for r in rollouts) + sampling.max_new_tokens + 1
    settings = VLLMSettings(enforce_eager=True, max_model_len=longest, tokens_per_batch=TOKENS_PER_BATCH, float32_head=float32_head)
    source = VLLMSource.from_folder(model, sampling, settings)
    wide = VLLMScorer.from_folder(model, settings, top_k=TOP_K)
    plain = evolve(wide, top_k=0)
    return {
        "scoring": lambda: plain.score(rollouts),
        "scoring, top-k": lambda: wide.score(rollouts),
        "vLLM alone, scoring": lambda: alone(plain.engine, rollouts),
        "sampling": lambda: source.sample(prompts),
    }, lambda: plain.score(rollouts)


def served_variants(url: str, model: Path, sampling: SamplingParams, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Variants:
    """Return both phases on one server; prefix caching is off."""
    servers = Servers([url], NAME)
    source = ServerSource.from_folder(servers, model, folder_model_id(model), sampling)
    plain = ServerScorer(servers, source.tokenizer_id, source.identity)
    wide = ServerScorer(servers, source.tokenizer_id, source.identity, TOP_K)
    return {
        "scoring": lambda: plain.score(rollouts),
        "scoring, top-k": lambda: wide.score(rollouts),
        "sampling": lambda: source.sample(prompts),
    }, lambda: plain.score(rollouts)


def alone(engine: VLLMEngine, rollouts: Sequence[Rollout]) -> None:
    """Send the requests that scoring makes, and leave their answers unread."""
    ids = [[*r.prompt_ids.tolist(), *r.response_ids.tolist()] for r in sorted(rollouts, key=len)]
    params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "flat_logprobs": True, "detokenize": False}
    engine.generate(ids, [params] * len(ids))


if __name__ == "__main__":
    main()
