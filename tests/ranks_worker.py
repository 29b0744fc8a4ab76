"""What each of several processes does in `test_ranks`: the same training as one process, on its share."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attrs import asdict, frozen
from conftest import TOKENIZER_ID, build_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, ReferenceOPDLoss, batches, load_checkpoint, opd_steps, save_checkpoint
from lopd.errors import CheckpointError, InvalidRecordError
from lopd.records import Lineage, Manifest, ModelId, Provenance, Ranks, Rollout, SamplingParams, Scores, Step
from lopd.records.ranks import inner, on_first

TEACHER = ModelId("teacher", "0", "float32")
STEPS = 4


@frozen
class Case:
    """How a student is trained."""

    wrap: str = "ddp"
    loss: str = "fused"
    model: str = "llama_tied"
    autocast: bool = False
    recompute: bool = False
    adapters: bool = False
    per_step: int = 5
    ratio: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


CASES = [
    *(Case(wrap, loss) for wrap in ("ddp", "fsdp") for loss in ("fused", "reference")),
    *(Case(wrap, loss, "qwen3_padded", ratio=True) for wrap in ("ddp", "fsdp") for loss in ("fused", "reference")),
    *(Case(wrap, recompute=True, per_step=1) for wrap in ("ddp", "fsdp")),
    *(Case(wrap, autocast=True) for wrap in ("ddp", "fsdp")),
    *(Case(wrap, adapters=True) for wrap in ("ddp", "fsdp")),
    *(Case(wrap, recompute=True, compiled=True) for wrap in ("ddp", "fsdp")),
    Case("freed"),
]


def make_store(per_step: int) -> MemoryStore:
    """Make a store of eleven rollouts from 3 to 40 tokens, of which one does not count at all, unless it would be alone.

    At 5 a step the last step has fewer.
    """
    rng = np.random.default_rng(0)
    store = MemoryStore(Manifest(TOKENIZER_ID, ModelId("policy", "0", "float32"), SamplingParams(40), sft_teacher=TEACHER))
    made = []
    for i, length in enumerate([3, 40, 7, 25, 4, 12, 33, 5, 9, 17, 6]):
        mask = rng.random(length) < (0.0 if i == 4 and per_step > 1 else 0.8)
        logprobs = -rng.exponential(1.0, length).astype(np.float32)
        made.append(Rollout(f"{i}/s0/g0", rng.integers(8, 96, 3), rng.integers(8, 96, length), mask, "stop", behavior_logprobs=logprobs))
    store.append(made)
    scores = [Scores(r.rollout_id, r.content_hash, -rng.exponential(1.0, r.response_ids.size).astype(np.float32)) for r in made]
    store.append_scores("teacher", Provenance(TEACHER, TOKENIZER_ID.vocab_hash, "a test"), scores)
    return store


def make_student(case: Case, ranks: Ranks) -> Any:
    model = build_model(case.model, seed=3)
    if case.adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    autocast = torch.bfloat16 if case.autocast else None
    student = CausalLMStudent(model, TOKENIZER_ID, autocast=autocast, gradient_checkpointing=case.recompute)
    if case.compiled:
        torch._dynamo.reset()  # graphs of an earlier case count against the most that layers of one class may have
        for layer in model.model.layers:
            layer.compile(backend="eager")
    if ranks.size == 1:
        return student
    if case.wrap == "ddp":
        return DistributedDataParallel(student)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (ranks.size,))}
    if case.wrap == "freed":  # what torch would have to gather again before the backward pass
        options["reshard_after_forward"] = True
    for layer in (model.get_base_model() if case.adapters else model).model.layers:
        fully_shard(layer, **options)
    return fully_shard(student, **options)


def make_optimizer(student: Any) -> torch.optim.Optimizer:
    """Make SGD: of a gradient that is nearly 0, Adam makes a step as large as any, and rounding decides its sign."""
    return torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(case: Case, start: int = 0, stop: int = STEPS, checkpoints: Path | None = None) -> dict[str, Any]:
    """Train, and return the metrics of every step, and the weights at the end, on rank 0."""
    ranks = Ranks.current()
    student = make_student(case, ranks)
    optimizer = make_optimizer(student)
    if checkpoints is not None and start:
        assert load_checkpoint(checkpoints, student, optimizer) == start
    kind = FusedOPDLoss if case.loss == "fused" else ReferenceOPDLoss
    stream = batches(make_store(case.per_step), rollouts_per_step=case.per_step, tokens_per_batch=50, ref="behavior")[start:stop]
    history = [asdict(m) for m in opd_steps(student, stream, kind(ratio_to_ref=case.ratio), optimizer)]
    if checkpoints is not None and not start:
        save_checkpoint(checkpoints, student, optimizer, next_step=stop, lineage=Lineage())
    return {"history": history, "weights": on_first(inner(student).state_dict())}


def unlike_steps(rank: int, size: int) -> dict[str, list[Step]]:
    """Return steps of several ranks that do not belong together."""
    options: dict[str, Any] = {"rollouts_per_step": 4, "tokens_per_batch": 50, "ref": "behavior"}
    own, whole = ([*batches(make_store(1), ranks=ranks, **options)[:3]] for ranks in (Ranks(rank, size), Ranks()))
    return {
        "one share": [*batches(make_store(1), ranks=Ranks(0, size), **options)[:1]],
        "made before the group": whole,
        "another left out": [step for step in own if step.index != 1 or rank != 1],
        "one more": own[: 1 + (rank == 0)],
        "more batches": [Step(0, (own[0].batches[0],) * (1 + (rank == 0)))],
        "no batches": [Step(0, own[0].batches[: int(rank == 0)])],
    }


def main(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    for case in CASES:
        found[case.name] = train(case)
    for wrap in ("ddp", "fsdp"):
        case, path = Case(wrap), Path(folder) / f"checkpoints-{wrap}"
        found[f"{wrap} first half"] = train(case, stop=2, checkpoints=path)
        found[f"{wrap} second half of one process"] = train(case, start=2, checkpoints=Path(folder) / "checkpoints-single")
        from conftest import build_tokenizer

        # rank 1 has a folder of its own, as on a machine that shares no disk
        student, own = make_student(case, Ranks.current()), Path(folder) / "nothing" if rank == 1 else path
        try:
            load_checkpoint(own, student)
        except CheckpointError as error:
            found[f"{wrap} different folders"] = str(error)
        stream = batches(make_store(5), rollouts_per_step=5, tokens_per_batch=50, ref="behavior", seed=rank)
        try:
            next(opd_steps(student, stream, FusedOPDLoss(), make_optimizer(student)))
        except InvalidRecordError as error:
            found[f"{wrap} seeds of their own"] = str(error)
        for name, steps in unlike_steps(rank, size).items():
            of = make_student(case, Ranks.current())
            try:
                found[f"{wrap} {name}"] = len(list(opd_steps(of, steps, FusedOPDLoss(), make_optimizer(of))))
            except InvalidRecordError as error:
                found[f"{wrap} {name}"] = str(error)
        pair = student, make_optimizer(student)
        torch.manual_seed(100 + rank)
        save_checkpoint(Path(folder) / f"random-{wrap}", *pair, next_step=1, lineage=Lineage())
        drawn = torch.rand(3).tolist()
        load_checkpoint(Path(folder) / f"random-{wrap}", *pair)
        found[f"{wrap} drawn"] = Ranks.current().gather([(drawn, torch.rand(3).tolist())])
        inner(student).export(Path(folder) / f"export-{wrap}", build_tokenizer(), Lineage())
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    os._exit(0)  # the interpreter's end is a race with gloo's threads, see `recipes.train`
