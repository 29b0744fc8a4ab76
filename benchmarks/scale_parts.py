"""What the workers of `bench_scale` do: train on a share of each step, score, and iterate over a store."""

import statistics
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attrs import define, field
from scale_workers import Found

from lopd import (
    CausalLMStudent,
    FusedOPDLoss,
    Manifest,
    ModelId,
    Rollout,
    SamplingParams,
    Scores,
    ZarrStore,
    batches,
    opd_steps,
    score_rollouts,
)
from lopd.backends.opening import open_store
from lopd.records import Provenance, Ranks, TokenizerId

VOCABULARY, PROMPT, LONGEST, PER_COMMIT = 8192, 16, 2048, 1024
TEACHER = ModelId("teacher", "0", "float32")
#: One rank; two that know nothing of each other; two on their shares of the same steps, with nothing summed; two that train together.
ALONE, APART, SHARES, DDP, FSDP = "1 rank", "2 apart", "2 on their shares", "2 ranks, DDP", "2 ranks, FSDP2"


def make_tokenizer() -> Any:
    """Make a tokenizer of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w1")  # noqa: S106


def make_model(hidden: int, layers: int) -> Any:
    """Make a Llama model of random weights, the same at each call: speed does not depend on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=1, max_position_embeddings=PROMPT + LONGEST, **sizes))


def make_scorer(hidden: int, layers: int) -> Any:
    """Make a teacher on one thread; its weights are hashed at once, not with the first scores."""
    from lopd.engines.hf import HFScorer

    torch.set_num_threads(1)
    scorer = HFScorer(make_model(hidden, layers).eval(), make_tokenizer())
    assert scorer.provenance  # noqa: S101
    return scorer


def make_rollouts(count: int, median: int, first: int = 0) -> list[Rollout]:
    """Make responses of log-normal length, as those of reasoning models are, with the policy's log-probs."""
    rng, made = np.random.default_rng(first), []
    lengths = np.clip(rng.lognormal(np.log(median), 0.6, count), 4, LONGEST).astype(int)
    for i, length in enumerate(lengths.tolist(), first):
        ids = rng.integers(2, VOCABULARY, PROMPT + length, dtype=np.uint32)
        logprobs = -rng.exponential(1.0, length).astype(np.float32)
        made.append(Rollout(f"{i}/s0/g0", ids[:PROMPT], ids[PROMPT:], np.ones(length, bool), "stop", behavior_logprobs=logprobs))
    return made


def make_scores(rollouts: Sequence[Rollout]) -> list[Scores]:
    """Make the scores of a made-up teacher."""
    rng = np.random.default_rng(1)
    return [Scores.of(rollout, -rng.exponential(1.0, rollout.response_ids.size).astype(np.float32)) for rollout in rollouts]


def make_store(folder: Path, words: TokenizerId, rollouts: Sequence[Rollout], kind: Any = ZarrStore) -> Any:
    """Make a store of these rollouts and their scores."""
    manifest = Manifest(words, ModelId("student", "0", "float32"), SamplingParams(LONGEST), sft_teacher=TEACHER)
    store, provenance = kind.create(str(folder), manifest), Provenance(TEACHER, words.vocab_hash, "a benchmark")
    for start in range(0, len(rollouts), PER_COMMIT):
        part = rollouts[start : start + PER_COMMIT]
        store.append(part)
        store.append_scores("teacher", provenance, make_scores(part))
    return store


@define
class Clock:
    """Seconds spent in what goes through it."""

    seconds: float = field(default=0.0)

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call so that its seconds are counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            begun = perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += perf_counter() - begun

        return counted

    def read(self) -> float:
        """Return the seconds counted since the last read."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def meet(rank: int, size: int, meeting: Path) -> None:
    """Join two processes in a group that can sum."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)


def part() -> None:
    """Leave the group."""
    dist.barrier()
    dist.destroy_process_group()


def wrapped(student: CausalLMStudent, arm: str) -> Any:
    """Wrap the student as torch trains it on several ranks."""
    if arm == DDP:
        return torch.nn.parallel.DistributedDataParallel(student)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in student.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(student, mesh=mesh)


def train(
    arm: str, rank: int, folder: Path, meeting: Path, *, steps: int, per_step: int, tokens_per_batch: int, hidden: int, layers: int
) -> Callable[[], Found]:
    """Return a function that trains these steps, and returns wall and CPU seconds and tokens of each; a step before them is a warm-up."""
    torch.set_num_threads(1)
    together, store = arm in {DDP, FSDP}, ZarrStore.open(folder)
    if together:
        meet(rank, 2, meeting)
    ranks = Ranks(rank, 2) if together or arm == SHARES else Ranks()
    options = {"rollouts_per_step": per_step, "tokens_per_batch": tokens_per_batch, "ref": "behavior", "ranks": ranks}
    stream = batches(store, seed=rank if arm == APART else 0, **options)[: steps + 1]
    student: Any = CausalLMStudent(make_model(hidden, layers), store.manifest.tokenizer)
    student = wrapped(student, arm) if together else student
    optimizer, reading, updating = torch.optim.AdamW(student.parameters(), lr=1e-5), Clock(), Clock()
    optimizer.step = updating.timed(optimizer.step)
    training = opd_steps(student, map(reading.timed(stream.step), range(steps + 1)), FusedOPDLoss(ratio_to_ref=True), optimizer)
    next(training)
    reading.read(), updating.read()

    def work() -> Found:
        rows = []
        for _ in range(steps):
            begun, cpu = perf_counter(), process_time()
            metrics = next(training)
            wall_s, cpu_s = perf_counter() - begun, process_time() - cpu
            rows.append(
                {"tokens": metrics.read_tokens, "wall_s": wall_s, "cpu_s": cpu_s, "read_s": reading.read(), "update_s": updating.read()}
            )
        if together:
            part()
        return {name: [row[name] for row in rows] for name in rows[0]}

    return work


def collectives(rank: int, meeting: Path, hidden: int, layers: int, repeats: int) -> Callable[[], Found]:
    """Return a function that times one bare all-reduce and one bare all-gather of as many numbers as the student has.

    It returns median seconds.
    """
    meet(rank, 2, meeting)
    size = sum(parameter.numel() for parameter in make_model(hidden, layers).parameters()) // 2 * 2
    whole, mine = torch.zeros(size), torch.zeros(size // 2)

    def median(call: Callable[..., Any], *arguments: Any) -> float:
        clock, spent = Clock(), []
        for _ in range(repeats):
            clock.timed(call)(*arguments)
            spent.append(clock.read())
        return statistics.median(spent)

    def work() -> Found:
        found = {"all_reduce_s": median(dist.all_reduce, whole), "all_gather_s": median(dist.all_gather_into_tensor, whole, mine)}
        part()
        return {"megabytes": size * 4e-6, **found}

    return work


def scored(store: ZarrStore, scorer: Any, **options: Any) -> Found:
    """Score all rollouts that have no scores yet; return their tokens, and wall and CPU seconds of this process."""
    begun, cpu = perf_counter(), process_time()
    report = score_rollouts(store, scorer, preflight=None, **options)
    return {"tokens": report.read_tokens, "wall_s": perf_counter() - begun, "cpu_s": process_time() - cpu}


def score(folder: Path, column: str, per_batch: int, hidden: int, layers: int) -> Callable[[], Found]:
    """Return a function that does the same with a model of its own."""
    store, scorer = ZarrStore.open(folder), make_scorer(hidden, layers)
    scorer.score([record.rollout for record in store.read(range(4))])

    def work() -> Found:
        return scored(store, scorer, column=column, rollouts_per_batch=per_batch)

    return work


def load(folder: Path, rank: int, size: int, *, seconds: float, per_step: int, tokens_per_batch: int) -> Callable[[], Found]:
    """Return a function that counts the tokens of this rank's share of steps, for about so many seconds."""
    torch.set_num_threads(1)
    ranks = Ranks(rank, size)
    stream = batches(open_store(folder), rollouts_per_step=per_step, tokens_per_batch=tokens_per_batch, ref="behavior", ranks=ranks)
    stream.step(0)

    def work() -> Found:
        tokens, begun, cpu = 0, perf_counter(), process_time()
        for index in count(1):
            step = stream.step(index)
            tokens += sum(batch.inputs.numel() for batch in step.batches[: len(step.batches) - step.idle])
            if perf_counter() - begun > seconds:
                break
        return {"tokens": tokens, "steps": index, "wall_s": perf_counter() - begun, "cpu_s": process_time() - cpu}

    return work
