"""What the workers of `bench_scale` do to see how the costs of a store grow: write many short rollouts, and look at them."""

import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pictures import OFFLINE, ONLINE, RATIO, SUPPORT, TEACHER, TRL, label_ends, panels, save
from scale_parts import VOCABULARY, Clock
from scale_workers import Found

from lopd import LanceStore, Rollout, Scores, ZarrStore
from lopd.testing import tiny_manifest, tiny_provenance

STORES: dict[str, Any] = {"zarr": ZarrStore, "lance": LanceStore}
READ, SMALL, PROMPT = 64, 16, 4
#: What grows, and is drawn: a figure of `look` and its name.
COSTS = {
    "open_s": "open",
    "lengths_s": "first look at all lengths",
    "read_s": f"read {READ} random rows",
    "append_s": f"append {SMALL} rollouts",
    "refresh_s": "refresh after that",
    "compact_s": "compact",
}


def short_rollouts(first: int, count: int) -> list[Rollout]:
    """Make rollouts of 16 to 32 tokens; the i-th of all always has the same length."""
    rng = np.random.default_rng(first)
    lengths = rng.integers(16 - PROMPT, 33 - PROMPT, count)
    ends = np.concatenate([[0], np.cumsum(lengths + PROMPT)]).tolist()
    ids = rng.integers(2, VOCABULARY, ends[-1], dtype=np.uint32)
    masks = np.ones(32, np.bool_)
    spans = enumerate(pairwise(ends), first)
    return [Rollout(f"{i}/s0/g0", ids[a : a + PROMPT], ids[a + PROMPT : b], masks[: b - a - PROMPT], "stop") for i, (a, b) in spans]


def write(kind: str, folder: Path, count: int, per_commit: int) -> Callable[[], Found]:
    """Return a function that writes a store with scores, and returns seconds and number of its commits."""
    store, clock = STORES[kind].create(folder, tiny_manifest(VOCABULARY)), Clock()
    append, append_scores = clock.timed(store.append), clock.timed(store.append_scores)

    def work() -> Found:
        for first in range(0, count, per_commit):
            made = short_rollouts(first, min(per_commit, count - first))
            append(made)
            append_scores("teacher", tiny_provenance(), [Scores.of(r, np.full(r.response_ids.size, -1.0, np.float32)) for r in made])
        files = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
        return {"commits": len(store.history()), "write_s": clock.read(), "bytes_per_rollout": sum(files) / count}

    return work


def memory(name: str) -> float:
    """Return the megabytes of this process, as Linux counts them."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) / 1000


def warm_up(opening: Any) -> None:
    """Write and read a tiny store elsewhere: imports and connections of the libraries are not a cost of the one that is measured."""
    with tempfile.TemporaryDirectory() as other:
        tiny = opening.create(f"{other}/store", tiny_manifest(VOCABULARY))
        made = short_rollouts(0, 2)
        tiny.append(made)
        tiny.append_scores("teacher", tiny_provenance(), [Scores.of(r, np.full(r.response_ids.size, -1.0, np.float32)) for r in made])
        opening.open(f"{other}/store").read([0, 1], ("teacher",))


def look(kind: str, folder: Path, draws: int) -> Callable[[], Found]:
    """Return a function that times opening, reading, appending, refreshing and compacting a store.

    The process is fresh, and the files of the store are in the page cache.
    """
    opening = STORES[kind]
    warm_up(opening)

    def work() -> Found:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
        found, before, clock = {}, memory("VmRSS"), Clock()
        store = clock.timed(opening.open)(folder)
        found |= {"open_s": clock.read(), "open_peak_mb": memory("VmHWM") - before}
        clock.timed(store.lengths)()
        found |= {"lengths_s": clock.read(), "lengths_peak_mb": memory("VmHWM") - before}
        rows = np.random.default_rng(0).integers(0, len(store), (draws + 1, READ)).tolist()
        read = reading(store, rows, "read")
        return found | read | growing(opening, folder, store) | compacting(opening, folder, rows)

    return work


def reading(store: Any, draws: list[list[int]], name: str) -> Found:
    """Return the median seconds of reading these rows, and those of the first read, which also opens files."""
    clock, spent = Clock(), []
    for rows in draws:
        clock.timed(store.read)(rows, ("teacher",))
        spent.append(clock.read())
    return {f"{name}_first_s": spent[0], f"{name}_s": statistics.median(spent[1:])}


def growing(opening: Any, folder: Path, reader: Any) -> Found:
    """Return the median seconds of a small append by a writer of its own, of the writer's first, and of the reader's refresh.

    The times of the first look are left out.
    """
    writer, clock, appends, refreshes, lengths = opening.open(folder), Clock(), [], [], []
    for _ in range(4):
        before = len(writer)
        clock.timed(writer.append)(short_rollouts(before, SMALL))
        appends.append(clock.read())
        clock.timed(reader.refresh)()
        refreshes.append(clock.read())
        clock.timed(reader.lengths)()
        lengths.append(clock.read())
        assert len(reader) == before + SMALL  # noqa: S101
    costs = {"append_first_s": appends[0], "append_s": statistics.median(appends[1:])}
    return {**costs, "refresh_s": statistics.median(refreshes), "refreshed_lengths_s": statistics.median(lengths)}


def compacting(opening: Any, folder: Path, draws: list[list[int]]) -> Found:
    """Return the seconds of a compaction by a process that has only opened the store, and of reads after it."""
    store, clock = opening.open(folder), Clock()
    clock.timed(store.compact)()
    return {"compact_s": clock.read(), **reading(opening.open(folder), draws, "read_compacted")}


def exponents(rows: list[Found], cost: str) -> Found:
    """Return the slopes of log cost over log rollouts: through all sizes, and between the two largest, where constant costs weigh least."""
    x, y = np.log10([row["rollouts"] for row in rows]), np.log10([row[cost] for row in rows])
    return {"all": float(np.polyfit(x, y, 1)[0]), "last": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}


def draw(path: Path, rows: list[Found]) -> None:
    """Draw every cost over the number of rollouts, a panel for each kind of store, with its exponent."""
    rows = [row for row in rows if row["kind"] == "growth"]
    figure, both = panels(1, 2, height=4.2, sharey=True)
    for axes, kind in zip(both, STORES, strict=True):
        mine = [row for row in rows if row["store"] == kind]
        for (cost, name), color in zip(COSTS.items(), (OFFLINE, RATIO, SUPPORT, ONLINE, TRL, TEACHER), strict=True):
            label = f"{name} ({exponents(mine, cost)['all']:+.2f})"
            axes.loglog([row["rollouts"] for row in mine], [row[cost] for row in mine], "o-", color=color, label=label)
        axes.set(title=f"{kind}: seconds (and exponents)", xlabel="rollouts")
    for axes in both:
        label_ends(axes)
    save(figure, path)
