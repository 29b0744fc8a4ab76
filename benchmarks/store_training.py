"""What training gets from a store: `batches` to collated micro-batches, beside a memory map's own way to the very same batch.

Run by `bench_store.py`, in one process and on one thread; the ways take turns, so a share of the memory map's is of the same minute.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from numpy.typing import NDArray
from store_backends import VOCABULARY, Records, append_all

from lopd import LanceStore, MemoryStore, ZarrStore, batches
from lopd.records import Batch
from lopd.testing import tiny_manifest, tiny_provenance
from lopd.verbs import StepStream
from lopd.verbs.loader import _places_of_step, _split

ROLLOUTS, TOKENS_PER_BATCH, STEPS = 256, 1 << 16, 6
Fields = dict[str, torch.Tensor]


def open_stores(made: Records, folder: Path) -> dict[str, Any]:
    """Open every store with the same rows; the durable ones as they are after appends, and compacted."""
    teacher, ref = (tiny_provenance(name).model for name in ("teacher", "ref"))
    manifest = evolve(tiny_manifest(VOCABULARY), sft_teacher=teacher, policy=ref)
    stores: dict[str, Any] = {"memory": MemoryStore(manifest)}
    for name, kind in (("zarr", ZarrStore), ("lance", LanceStore)):
        stores[name] = kind.create(folder / f"plain.{name}", manifest)
        stores[f"{name}, compacted"] = kind.create(folder / f"compacted.{name}", manifest)
    for name, store in stores.items():
        append_all(store, made, 1024)
        if name.endswith("compacted"):
            store.compact()
    return stores


class MemoryMap:
    """Three flat files, and the plain numpy that makes a batch of them."""

    def __init__(self, made: Records, folder: Path) -> None:
        rollouts = made.rollouts
        self.lengths = np.array([(r.prompt_ids.size, r.response_ids.size) for r in rollouts])
        self.tokens = np.concatenate([[0], self.lengths.sum(axis=1).cumsum()])
        self.responses = np.concatenate([[0], self.lengths[:, 1].cumsum()])
        for name, dtype, parts in (
            ("ids", np.uint32, [ids for r in rollouts for ids in (r.prompt_ids, r.response_ids)]),
            ("teacher", np.float32, [scores.logprobs for scores in made.teacher]),
            ("ref", np.float32, [scores.logprobs for scores in made.ref]),
        ):
            np.concatenate(parts).astype(dtype).tofile(folder / name)
        self.ids, self.teacher, self.ref = (
            np.memmap(folder / name, dtype, "r") for name, dtype in (("ids", "u4"), ("teacher", "f4"), ("ref", "f4"))
        )

    def batch(self, rows: NDArray[np.int64]) -> Fields:
        """Return the fields of a `Batch` of these rows, weights by rollout; nothing is verified."""
        spans = [(self.tokens[i], self.tokens[i + 1]) for i in rows]
        prompts = self.lengths[rows, 0]
        found: dict[str, list[NDArray[Any]]] = {"weight": [], "teacher_logprobs": [], "ref_logprobs": []}
        for i, p in zip(rows.tolist(), prompts.tolist(), strict=True):
            first, last = self.responses[i], self.responses[i + 1]
            before = np.zeros(p - 1, np.float32)
            found["weight"] += [before, np.full(last - first, 1 / (last - first), np.float32)]
            found["teacher_logprobs"] += [before, self.teacher[first:last]]
            found["ref_logprobs"] += [before, self.ref[first:last]]
        arrays = {
            "inputs": np.concatenate([self.ids[a : b - 1] for a, b in spans]).astype(np.int64),
            "targets": np.concatenate([self.ids[a + 1 : b] for a, b in spans]).astype(np.int64),
            "position_ids": np.concatenate([np.arange(b - a - 1) for a, b in spans]),
            "segment_ids": np.repeat(np.arange(len(rows)), [b - a - 1 for a, b in spans]),
            **{name: np.concatenate(parts) for name, parts in found.items()},
        }
        return {name: torch.from_numpy(values) for name, values in arrays.items()}


def fields(batch: Batch) -> Fields:
    """Return those fields of a batch that a memory map makes too."""
    names = ("inputs", "targets", "position_ids", "segment_ids", "weight", "teacher_logprobs", "ref_logprobs")
    return {name: getattr(batch, name) for name in names}


def training(made: Records, folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every way: million tokens a second, and the share of the memory map's in the same turn."""
    torch.set_num_threads(1)
    memory_map, stores = MemoryMap(made, folder), open_stores(made, folder)
    steps = {
        name: batches(store, rollouts_per_step=ROLLOUTS, tokens_per_batch=TOKENS_PER_BATCH, ref="ref") for name, store in stores.items()
    }
    plan = [[_rows(steps["memory"], index) for index in range(STEPS * turn, STEPS * (turn + 1))] for turn in range(repeats)]
    for name, stream in steps.items():  # a fast way to another batch does not count
        for ours, rows in zip(stream.step(0).batches, plan[0][0], strict=True):
            for field, values in memory_map.batch(rows).items():
                assert torch.equal(fields(ours)[field], values), f"{name}: {field}"  # noqa: S101

    def by_map(turn: int) -> int:
        return sum(int(memory_map.batch(rows)["inputs"].numel()) for step in plan[turn] for rows in step)

    def by_store(name: str) -> Callable[[int], int]:
        def read(turn: int) -> int:
            turns = steps[name][STEPS * turn : STEPS * (turn + 1)]
            return sum(batch.inputs.numel() for step in turns for batch in step.batches)

        return read

    ways: dict[str, Callable[[int], int]] = {"memmap": by_map, **{name: by_store(name) for name in steps}}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            tokens = way(turn)
            speeds[name].append(tokens / (time.perf_counter() - started) / 1e6)
    for name, values in speeds.items():
        yield {"training": name, "to_batch": values, "of_memmap": [a / b for a, b in zip(values, speeds["memmap"], strict=True)]}


def _rows(stream: StepStream, index: int) -> list[NDArray[np.int64]]:
    """Return the rows of each micro-batch of a step, in their order."""
    places = _places_of_step(index, stream.rollouts_per_step, len(stream.rows), stream.seed)
    return [stream.rows[places[part]] for part in _split(stream.positions[places], stream.tokens_per_batch)]
