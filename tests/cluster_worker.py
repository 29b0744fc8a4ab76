"""What each of several processes does in `test_cluster_store`: it writes its part of a store in a bucket, or trains on its share of one.

Which store and which folder to meet in are arguments; where the bucket is and who may use it is in the environment.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attrs import asdict

from lopd import FusedOPDLoss, LanceStore, MemoryStore, ZarrStore, batches, opd_steps, open_store
from lopd.protocols import LogprobStore
from lopd.records import Ranks, Scores
from lopd.records.ranks import inner, on_first

WRITERS, RANKS = 4, 2
WHOLE, FOUND = "whole.pt", "found.pt"
_ROWS_PER_CALL = 4
_KINDS: dict[str, Any] = {"zarr": ZarrStore, "lance": LanceStore}


def deliveries(rows: int, writer: int) -> list[Sequence[int]]:
    """Return the rows of each call of a writer.

    Every third batch is handed in by two writers: a queue of work promises delivery at least once.
    """
    found: list[Sequence[int]] = []
    for batch, first in enumerate(range(0, rows, _ROWS_PER_CALL)):
        writers = (batch, batch + 1) if batch % 3 == 0 else (batch,)
        if writer in {number % WRITERS for number in writers}:
            found.append(range(first, min(first + _ROWS_PER_CALL, rows)))
    return found


def write(kind: str, url: str, whole: MemoryStore, writer: int) -> None:
    """Append this writer's rollouts; when all writers have, score its share of the rows, whoever appended them."""
    dist.barrier()  # imports take longer than writing does, and the writers are to meet
    store = _KINDS[kind].open_or_create(url, whole.manifest)
    for rows in deliveries(len(whole), writer):
        store.append([record.rollout for record in whole.read(rows)])
    dist.barrier()
    store.refresh()
    for rows in deliveries(len(store), writer):
        rollouts = [record.rollout for record in store.read(rows)]
        truth = whole.read(whole.find([rollout.rollout_id for rollout in rollouts]).tolist(), ("teacher",))
        scores = [Scores.of(rollout, record.scores["teacher"]) for rollout, record in zip(rollouts, truth, strict=True)]
        store.append_scores("teacher", whole.columns["teacher"], scores)


def train(store: LogprobStore) -> dict[str, Any]:
    """Train, and return the metrics of every step, and the weights at the end, on rank 0."""
    from ranks_worker import STEPS, Case, make_optimizer, make_student  # it imports transformers, which no writer needs

    student = make_student(Case(), Ranks.current())
    steps = batches(store, rollouts_per_step=6, tokens_per_batch=50, ref="behavior")[:STEPS]
    history = [asdict(metrics) for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), make_optimizer(student))]
    return {"history": history, "weights": on_first(inner(student).state_dict())}


def main(environment: Mapping[str, str], work: str, kind: str, url: str, folder: Path, ranks: Ranks) -> None:
    """Write or train, as the rank that was passed; stores find the bucket in this environment."""
    os.environ.update(environment)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{work}", rank=ranks.rank, world_size=ranks.size)
    if work == "write":
        write(kind, url, torch.load(folder / WHOLE, weights_only=False), ranks.rank)
    else:
        found = train(open_store(url))
        if ranks.rank == 0:
            torch.save(found, folder / FOUND)
    dist.barrier()
    os._exit(0)  # the interpreter's end is a race with gloo's threads, see `recipes.train`
