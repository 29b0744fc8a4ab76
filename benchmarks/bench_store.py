"""How fast are the stores?  Each beside numpy memmap, which is the limit, and beside what else people keep such data in.

    make bench-store

Synthetic rollouts (log-normal lengths, three values a token: id, teacher and reference log-prob), written and read by every backend in
processes of their own on one core, interleaved; a figure is the median over repetitions, with the smallest and the largest beside it.
Writes `benchmarks/results/bench_store.json` and `docs/bench_store.png`.
"""

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray
from pictures import RATIO, TEXT, panels, rule, save
from record import ROOT, describe_machine, result_file
from store_backends import APPEND, BACKENDS, Backend, Rows, Store, records
from store_training import training

from lopd.backends.zarr.store import ZarrStore
from lopd.records import Rollout, Scores
from lopd.testing import tiny_manifest, tiny_provenance

BATCH, BLOCK, BLOCKS = 64, 1024, 4
GROUP = BLOCK * BLOCKS // BATCH
VOCABULARY = 151_936
SEGMENT = 1 << 24
SECONDS = 3.0


def make_rows(count: int, seed: int) -> Rows:
    """Make rollouts whose lengths are spread as those of reasoning models are (median 722, mean about 1000)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(6.58, 0.8, count).astype(np.int64), 8, 16_384)
    total = int(lengths.sum())
    # Zipf's law over a large vocabulary; log-probs with the many certainties that models have.
    ids = np.minimum(rng.zipf(1.2, total) - 1, VOCABULARY - 1).astype(np.uint32)
    teacher, ref = (-np.square(rng.standard_normal(total, np.float32)) * (rng.random(total) < 0.8) for _ in range(2))
    return Rows(lengths, ids, teacher.astype(np.float32), ref.astype(np.float32))


def orders(count: int, seed: int) -> dict[str, list[NDArray[np.int64]]]:
    """Return batches of rows: in order, at random, and shuffled inside blocks that are picked at random."""
    rng = np.random.default_rng(seed)
    blocks = np.array_split(np.arange(count), max(count // BLOCK, 1))
    picked = [blocks[i] for i in rng.permutation(len(blocks))]
    shuffled = [rng.permutation(np.concatenate(picked[i : i + BLOCKS])) for i in range(0, len(picked), BLOCKS)]
    flat = {"sequential": np.arange(count), "random": rng.permutation(count), "blocks": np.concatenate(shuffled)}
    return {name: [rows[i : i + BATCH] for i in range(0, count, BATCH)] for name, rows in flat.items()}


def drop_cache(folder: Path) -> None:
    """Drop these files from the page cache; it needs no privilege, and works on files that are on disk."""
    os.sync()
    for path in folder.rglob("*") if folder.is_dir() else [folder]:
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed_reads(store: Store, batches: Sequence[NDArray[np.int64]], order: str) -> tuple[float, float]:
    """Return (million tokens a second, median ms of a batch); the reads stop after a while, because some would take minutes.

    The batches of a group of blocks are known together, so a backend may read them together.
    """
    size = GROUP if order == "blocks" and store.read_group is not None else 1
    tokens, spent = 0, []
    started = time.perf_counter()
    for group in [batches[i : i + size] for i in range(0, len(batches), size)]:
        before = time.perf_counter()
        tokens += store.tokens_of_group(group) if size > 1 else store.tokens_of(group[0])
        spent.append((time.perf_counter() - before, len(group)))
        if time.perf_counter() - started > SECONDS:
            break
    return tokens / sum(took for took, _ in spent) / 1e6, statistics.median(took / count for took, count in spent) * 1e3


def warm_up(backend: Backend) -> None:
    """Write, finish and open a small store elsewhere: what is imported meanwhile is not a cost of this one."""
    with TemporaryDirectory() as elsewhere:
        backend.write(backend.prepare(make_rows(BATCH, seed=0)), Path(elsewhere), APPEND)
        if backend.finish is not None:
            backend.finish(Path(elsewhere))
        if backend.open is not None:
            backend.open(Path(elsewhere))


def open_cold(backend: Backend, folder: Path) -> tuple[Store, float]:
    """Open what is not in the page cache, and return the seconds too; no store may be open, for pages that it has mapped would stay."""
    assert backend.open is not None  # noqa: S101
    gc.collect()
    drop_cache(folder)
    started = time.perf_counter()
    store = backend.open(folder)
    return store, time.perf_counter() - started


def open_warm(backend: Backend, folder: Path, rows: Rows, batches: Sequence[NDArray[np.int64]]) -> Store:
    """Open what is in the page cache, for it was read once; no other order has left anything in this store's own memory."""
    assert backend.open is not None  # noqa: S101
    store = backend.open(folder)
    store.check(rows)
    for batch in batches:
        store.tokens_of(batch)
    return store


def work(name: str, folder: Path, count: int, seed: int) -> dict[str, float]:
    """Take all measurements of one backend, in this process."""
    backend, rows = BACKENDS[name], make_rows(count, seed=0)
    warm_up(backend)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepared = backend.prepare(rows)
    os.sync()
    found: dict[str, float] = {}
    started = time.perf_counter()
    backend.write(prepared, folder, APPEND)
    found["append"] = rows.ids.size / (time.perf_counter() - started) / 1e6
    if backend.finish is not None:
        started = time.perf_counter()
        backend.finish(folder)
        found["compact"] = rows.ids.size / (time.perf_counter() - started) / 1e6
    del prepared
    found["bytes_per_token"] = backend.stored_bytes(folder) / rows.ids.size
    if backend.open is None:
        shutil.rmtree(folder)
        return found
    batches = orders(count, seed)
    for order in ("random", "blocks"):
        store, found["open_cold_s"] = open_cold(backend, folder)
        found[f"{order}_cold"], _ = timed_reads(store, batches[order][: len(batches[order]) // 4], order)
        del store
    plan = ["sequential", "random", "blocks"]
    random.Random(seed).shuffle(plan)  # noqa: S311
    for order in plan:
        store = open_warm(backend, folder, rows, batches["sequential"])
        found[order], found[f"{order}_ms"] = timed_reads(store, batches[order], order)
    shutil.rmtree(folder)
    return found


def open_large(folder: Path) -> dict[str, float]:
    """Open what `make_repeated` made in another process, whose memory is not taken again here, and read from it: seconds, and memory of its own."""
    before = anonymous_memory()
    started = time.perf_counter()
    store = ZarrStore.open(folder)
    opened = time.perf_counter() - started
    rng, seen = np.random.default_rng(0), 0
    started = time.perf_counter()
    for _ in range(64):
        seen += store.read(rng.integers(0, len(store), BATCH).tolist(), ("teacher", "ref")).token_ids.size
    read_s = time.perf_counter() - started
    after = anonymous_memory()
    lengths_started = time.perf_counter()
    held = int(store.lengths().sum())
    found = {
        "tokens": float(held),
        "rollouts": float(len(store)),
        "open_s": opened,
        "random_mtok_s": seen / read_s / 1e6,
        "memory_mb": (after - before) / 1e6,
        "lengths_s": time.perf_counter() - lengths_started,
        "memory_with_lengths_mb": (anonymous_memory() - before) / 1e6,
    }
    if found["memory_mb"] < 0:
        raise SystemExit(f"Store {folder}: opening it took {found['memory_mb']:.1f} MB, expected at least 0; measure in a fresh process.")
    shutil.rmtree(folder)
    return found


def make_repeated(folder: Path, tokens: int) -> None:
    """Make a store whose checkpoint names the bytes of one segment again and again: large to a reader, small on disk.

    The segment is as large as a compaction makes them.
    """
    count = min(tokens, SEGMENT) // 1024
    segments = max(tokens // (count * 1024), 1)
    rows = make_rows(1024, seed=0)
    rows = evolve(rows, lengths=np.full(count, 1024), **{n: np.resize(getattr(rows, n), count * 1024) for n in ("ids", "teacher", "ref")})
    shutil.rmtree(folder, ignore_errors=True)
    store = ZarrStore.create(folder, tiny_manifest(VOCABULARY))
    bounds = np.concatenate([[0], np.cumsum(rows.lengths)])
    rollouts = [
        Rollout(f"r{i}", rows.ids[a : a + 1], rows.ids[a + 1 : b], np.ones(b - a - 1, np.bool_), "stop")
        for i, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    ]
    store.append(rollouts)
    for name in ("teacher", "ref"):
        values = getattr(rows, name)
        scores = [Scores.of(r, values[a + 1 : a + len(r)]) for r, a in zip(rollouts, bounds[:-1].tolist(), strict=True)]
        store.append_scores(name, tiny_provenance(name), scores)
    state = store._state.to_json()
    repeated = {
        **state,
        "segments": [{**state["segments"][0], "first_row": k * count, "last_row": (k + 1) * count - 1} for k in range(segments)],
        "columns": {
            name: {
                **column,
                "segments": [{**column["segments"][0], "first_row": k * count, "last_row": (k + 1) * count - 1} for k in range(segments)],
            }
            for name, column in state["columns"].items()
        },
    }
    store._log.put_checkpoint(state["commits"], repeated)


def anonymous_memory() -> int:
    """Return the bytes of memory that are this process's own, without mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


Runs = dict[str, list[dict[str, float]]]


def alike(runs: Runs, name: str, key: str) -> list[str]:
    """Return the backends whose figures are one backend's: of appends all that append alike."""
    return [other for other in runs if BACKENDS[other].write is BACKENDS[name].write] if key == "append" else [name]


def figures(runs: Runs, name: str, key: str) -> list[float]:
    """Return a backend's figure in all repetitions."""
    return [run[key] for like in alike(runs, name, key) for run in runs[like]]


def ratios(runs: Runs, name: str, key: str, other: str = "memmap") -> list[float]:
    """Return one backend's figure over another's in the same repetition."""
    return [a[key] / b[key] for like in alike(runs, name, key) for a, b in zip(runs[like], runs[other], strict=True)]


def ratio(runs: Runs, name: str, key: str, other: str = "memmap") -> float:
    """Return the median of `ratios`."""
    return statistics.median(ratios(runs, name, key, other))


def beside_storage(runs: Runs) -> list[dict[str, Any]]:
    """Return what stores reach of their storage's own speed at the same; no goal is about it."""
    pairs = [("zarr", "append", "zarr, its files alone")]
    pairs += [("lance, compacted", order, "lance, its take alone") for order in ("random", "sequential")]
    return [
        {"beside": f"{name}: {key} against {other}", "share": spread(ratios(runs, name, key, other))}
        for name, key, other in pairs
        if name in runs
    ]


def goals(runs: Runs, large: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return every goal, met or not."""
    compact, lance = "zarr, compacted", "lance, compacted"
    rows: list[tuple[str, str, float, bool]] = []
    for order, least in (("random", 0.9), ("blocks", 0.9), ("sequential", 1.0)):
        value = ratio(runs, compact, order)
        rows.append((f"Zarr, compacted: {order} reads against memmap", f">= {least}", value, value >= least))
    appended = statistics.median(figures(runs, "zarr", "append"))
    share = ratio(runs, "zarr", "append")
    rows.append(
        (
            "Zarr durable append, ids and both columns, Mtok/s (and share of memmap's)",
            f">= 30, or a share of 0.25 (it is {share:.2f})",
            appended,
            appended >= 30 or share >= 0.25,
        )
    )
    share, limit = (ratio(runs, name, "append", "memmap, flushed") for name in ("zarr", "zarr, its files alone"))
    rows.append(
        (
            "Zarr durable append, against a memory map that is flushed at every append",
            f">= 0.25 (writing and flushing the same files, and nothing else, has {limit:.2f})",
            share,
            share >= 0.25,
        )
    )
    for name, wanted in (("zarr", 12.0), ("zarr, float16", 8.0)):
        payload = statistics.median(run["bytes_per_token"] for run in runs[name])
        # lines and zarr.json are a few hundred bytes a rollout of a thousand tokens
        rows.append(
            (f"{name}: bytes per token, lines and metadata included", f"{wanted} and at most 4 % more", payload, payload <= wanted * 1.04)
        )
    if lance in runs:
        value = ratio(runs, lance, "blocks")
        rows.append(("Lance, compacted, a group of blocks a read: block-shuffled reads against memmap", ">= 0.5", value, value >= 0.5))
        value = ratio(runs, lance, "blocks", "lancedb StreamingDataset")
        rows.append(("Lance, likewise, against LanceDB's StreamingDataset", "> 1", value, value > 1))
    biggest, smallest = large[-1], large[0]
    rows.append((f"opening {biggest['tokens']:.3g} tokens (s)", "< 1", biggest["open_s"], biggest["open_s"] < 1))
    growth = biggest["memory_mb"] - smallest["memory_mb"]
    rows.append(
        (
            f"memory of opening and random reads, {smallest['tokens']:.3g} to {biggest['tokens']:.3g} tokens: growth (MB)",
            "< 20, and not below -20",
            growth,
            abs(growth) < 20,
        )
    )
    return [{"name": name, "goal": goal, "measured": value, "met": bool(met)} for name, goal, value, met in rows]


def training_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge what training reads from each store, as a share of what it reads from a memory map."""
    shares = {row["training"]: row["of_memmap"]["median"] for row in rows}
    least = {"zarr, compacted": 0.6, "memory": 0.6, "lance, compacted": 0.4}
    return [
        {
            "name": f"{name}: tokens a second through batches to collated batches, against a memory map's own way",
            "goal": f">= {share}",
            "measured": shares[name],
            "met": shares[name] >= share,
        }
        for name, share in least.items()
    ]


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the reads of every backend beside each other: medians, from the smallest to the largest."""
    rows = [row for row in rows if "sequential" in row]
    figure, three = panels(1, 3, height=3.6, sharex=True, sharey=True)
    for axes, (order, title) in zip(
        three, {"sequential": "in order", "blocks": "block-shuffled", "random": "at random"}.items(), strict=True
    ):
        for place, row in enumerate(rows):
            speed, own = row[order], row["backend"].startswith(("zarr", "lance,")) and not row["backend"].endswith("alone")
            reach = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
            axes.errorbar([speed["median"]], [place], xerr=reach, fmt="o", color=RATIO if own else TEXT)
        axes.set(xscale="log", title=f"Reads {title}", xlabel="million tokens a second")
        rule(axes, x=rows[0][order]["median"])
    three[0].set_yticks(range(len(rows)), [row["backend"] for row in rows])
    three[0].invert_yaxis()
    save(figure, path)


def main() -> None:
    """Measure, write the result file, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench_store")
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "SEED"))
    parser.add_argument("--make-large", type=int, metavar="TOKENS")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--training", type=int, metavar="REPEATS")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker[0], options.folder / "store", options.rollouts, int(options.worker[1]))))
        return
    if options.make_large:
        make_repeated(options.folder / "large", options.make_large)
        print("null")
        return
    if options.large:
        print(json.dumps(open_large(options.folder / "large")))
        return
    if options.training:
        folder = options.folder / "training"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(json.dumps(list(training(records(make_rows(options.rollouts, seed=0), prompt=64), folder, options.training))))
        shutil.rmtree(folder)
        return
    measure(options.rollouts, options.repeats, options.folder)


def measure(rollouts: int, repeats: int, folder: Path) -> None:
    """Measure every backend in a process of its own, in another order each time."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # every child inherits the one core, and all of its threads
    names = [name for name, backend in BACKENDS.items() if backend.available()]
    runs: Runs = {name: [] for name in names}
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(names, len(names)):  # noqa: S311
            found = child(folder, "--rollouts", str(rollouts), "--worker", name, str(repeat))
            runs[name].append(found)
            print(f"{name:28s}", "  ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
    large = []
    for tokens in (10**6, 10**8, 10**9):
        child(folder, "--make-large", str(tokens))
        large.append(child(folder, "--large"))
    trained = child(folder, "--rollouts", str(rollouts), "--training", str(4 * repeats + 1))
    rows = [{"backend": name, **{key: spread(figures(runs, name, key)) for key in runs[name][0]}} for name in names]
    storage = beside_storage(runs)
    to_batch = [{key: value if key == "training" else spread(value) for key, value in row.items()} for row in trained]
    for row in [*large, *to_batch, *storage]:
        print(row)
    found_goals = goals(runs, large) + training_goals(to_batch)
    for goal in found_goals:
        print("met   " if goal["met"] else "MISSED", goal["name"], "goal", goal["goal"], "measured", f"{goal['measured']:.3g}")
    result_file("bench_store", describe_machine(), [*rows, *to_batch, *storage, *({"large_store": row} for row in large)], found_goals)
    draw(ROOT / "docs" / "bench_store.png", rows)


def child(folder: Path, *options: str) -> Any:
    """Measure in a fresh process, on one thread."""
    command = [sys.executable, __file__, "--folder", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(printed.splitlines()[-1])


if __name__ == "__main__":
    main()
