"""Time, memory and error of every way to the loss and its gradient, beside the three bare matrix products that none can do without.

    python benchmarks/bench_loss.py                      # writes benchmarks/results/bench_loss.json and docs/bench_loss.png
    python benchmarks/bench_loss.py --rollouts DIR       # the gradient filter, too, on the stored rollouts of a quickstart run

One thread; CPU seconds of the process, which other work on the machine disturbs less than wall time does.  Every measurement is a process
of its own; repetitions are interleaved, and each figure is a median; a ratio is the median, beside its range, of those to the floor or the
other path in the same repetition.  The floor is the best rate, over chunks of 256 to 1024 rows and both matrix libraries, of each of the three
products (logits, gradient by hidden states, gradient by the weight).
The loss is Lightning OPD's.  Liger, cut-cross-entropy and torch's own op give log-probs, on which the same loss is then plain autograd.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from loss_paths import PATHS, Problem, make_problem, paths_on
from matrix_library import fast_matmul
from pictures import RATIO, TEXT, panels, rule, save, wrap
from record import ROOT, describe_machine, result_file

import lopd
from lopd.losses.reference import ReferenceOPDLoss

SHAPES = {"151936x896": (151_936, 896), "49152x576": (49_152, 576)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNKS = (256, 512, 1024)
EPSILONS = (1e-4, 1e-3, 1e-2, 1e-1)
MIB = 2**20
FILTER = "filter on rollouts"
#: In the recorded results, and no longer a path of lopd: it rounded logits to bfloat16.
FORMER = "fused, bfloat16 products"
TABLE = (2048, "151936x896")
RESULTS = ROOT / "benchmarks" / "results" / "bench_loss.json"


def memory(field: str) -> float:
    """Return MiB from /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def forget_peak() -> None:
    """Let the peak of memory start again from what is in use."""
    Path("/proc/self/clear_refs").write_text("5")


def floor_rates(problem: Problem) -> dict[str, float]:
    """Return the CPU seconds a token of each bare product, the best over chunks."""
    weight_VD = problem.weight.detach()
    vocabulary = len(weight_VD)
    gradient_VD = torch.zeros_like(weight_VD)
    best: dict[str, float] = {}
    for rows in (rows for rows in CHUNKS if rows <= len(problem.hidden)):
        hidden_CD = problem.hidden.detach()[:rows]
        logits_CV, out_CD = hidden_CD.new_zeros(rows, vocabulary), torch.empty_like(hidden_CD)
        products: dict[str, Callable[[], Any]] = {
            "logits": lambda h=hidden_CD, z=logits_CV: torch.mm(h, weight_VD.T, out=z),
            "hidden": lambda z=logits_CV, o=out_CD: torch.mm(z, weight_VD, out=o),
            "weight": lambda h=hidden_CD, z=logits_CV: torch.mm(z.T, h, out=gradient_VD),
        }
        for name, multiply in products.items():
            multiply()
            for _ in range(2):
                started = time.process_time()
                multiply()
                seconds = (time.process_time() - started) / rows
                best[name] = min(best.get(name, seconds), seconds)
    return best


def measure_path(problem: Problem, name: str) -> dict[str, float]:
    """Measure one loss and its backward pass: CPU and wall seconds, and MiB beyond the gradients."""
    path = PATHS[name]
    path(make_problem(32, problem.weight.shape[0], problem.weight.shape[1], problem.hidden.dtype, weight=problem.weight)).backward()
    problem.weight.grad = None
    gradients = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight)) / MIB
    before = memory("VmRSS")
    forget_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    path(problem).backward()
    found = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    found["beyond_gradients_mib"] = memory("VmHWM") - before - gradients
    return found


def measure_error(name: str, vocabulary: int, size: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the relative error of loss and gradients on 48 tokens and part of the vocabulary against the plain loss in float64."""
    problem = make_problem(48, min(vocabulary, 16_384), size, dtype)
    exact = problem.double()
    loss, truth = PATHS[name](problem), ReferenceOPDLoss()(exact.hidden, exact.head, exact.batch).loss_sum
    mine = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    expected = torch.autograd.grad(truth, (exact.hidden, exact.weight))
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, expected, strict=True)]
    return {
        "loss_error": abs(float((loss.detach().double() - truth.detach()) / truth.detach())),
        "hidden_error": errors[0],
        "weight_error": errors[1],
    }


def work(name: str, tokens: int, shape: str, dtype: str, library: str) -> dict[str, float]:
    """Take the measurement that the arguments name, in this process."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    vocabulary, size = SHAPES[shape]
    with ExitStack() as stack:
        if library == "onednn" and not stack.enter_context(fast_matmul()):
            return {}
        if name == "floor":
            return floor_rates(make_problem(min(tokens, max(CHUNKS)), vocabulary, size, DTYPES[dtype]))
        if tokens == 0:
            return measure_error(name, vocabulary, size, DTYPES[dtype])
        return measure_path(make_problem(tokens, vocabulary, size, DTYPES[dtype]), name)


def child(*arguments: str, threads: int = 1) -> dict[str, float]:
    """Measure in a fresh process; return an empty dict where the process fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--worker", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        print("failed:", " ".join(arguments), done.stderr.strip().splitlines()[-1:], flush=True)
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_series(tokens: int, shape: str, dtype: str, repeats: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure all paths of one size, interleaved with the floor; return medians, and the runs of which they are, None where one failed."""
    jobs = [*product(names, ("mkl", "onednn")), *product(["floor"], ("mkl", "onednn"))]
    jobs = [job for job in jobs if job[1] == "mkl" or (dtype == "float32" and job[0] in ("floor", "fused"))]
    runs: dict[tuple[str, str], list[dict[str, float] | None]] = {job: [] for job in jobs}
    for repeat in range(repeats):
        for job in random.Random(repeat).sample(jobs, len(jobs)):  # noqa: S311
            found = child(job[0], str(tokens), shape, dtype, job[1])
            runs[job].append(found or None)
            print(tokens, shape, dtype, *job, {key: float(f"{value:.3g}") for key, value in found.items()}, flush=True)
    floors = [floor_of(tokens, rates) for rates in zip(*(runs.pop(job) for job in jobs if job[0] == "floor"), strict=True)]
    size = {"tokens": tokens, "shape": shape, "dtype": dtype}
    rows: list[dict[str, Any]] = [{**size, "path": "three products", "library": "best", "over_floor": 1.0, **summary(floors)}]
    for (name, library), found in runs.items():
        if any(found):
            row = {**size, "path": name, "library": library, **summary(found), **child(name, "0", shape, dtype, library)}
            over = shares(row, rows[0], "cpu_s")
            rows.append({**row, "over_floor": statistics.median(over), "over_floor_range": [min(over), max(over)]})
    return rows


def floor_of(tokens: int, rates: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """Return the CPU seconds of the three products in one repetition, each at the best rate of the libraries that ran."""
    ran = [run for run in rates if run]
    return {"cpu_s": tokens * sum(min(run[name] for run in ran) for name in ("logits", "hidden", "weight"))} if ran else None


def summary(runs: Sequence[dict[str, float] | None]) -> dict[str, Any]:
    """Return the medians of what ran, and all runs, in their order."""
    ran = [run for run in runs if run]
    return {**{key: statistics.median(run[key] for run in ran) for key in ran[0]}, "runs": list(runs)}


def shares(row: dict[str, Any], other: dict[str, Any], key: str) -> list[float]:
    """Return one row's figure over another's in each repetition that both have; of older results, which kept no runs, over their medians."""
    pairs = zip(*(found.get("runs", [found]) for found in (row, other)), strict=True)
    return [a[key] / b[key] if b[key] > 0 else float("inf") for a, b in pairs if a and b] or [float("inf")]


def goals(rows: Sequence[dict[str, Any]], filtered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every goal, met or not, at each size that was measured."""
    found: list[dict[str, Any]] = []

    def add(name: str, goal: str, measured: float, met: bool, **more: Any) -> None:
        found.append({"name": name, "goal": goal, "measured": measured, "met": bool(met), **more})

    for row in rows:
        size = f"N={row['tokens']}, V x D = {row['shape']}, {row['dtype']}"
        if row["path"] == "fused" and row["library"] == "mkl":
            if row["dtype"] == "float32":
                add(f"fused over the three products, {size}", "<= 1.10", row["over_floor"], row["over_floor"] <= 1.10)
                add(f"fused, MiB beyond the gradients, {size}", "<= 160", row["beyond_gradients_mib"], row["beyond_gradients_mib"] <= 160)
            else:
                add(f"fused, float32 logits, over the three products, {size}", "<= 1.5", row["over_floor"], row["over_floor"] <= 1.5)
            peers = [
                peer for peer in rows if size_of(peer) == size_of(row) and not peer["path"].startswith(("fused", "recomputed", "three"))
            ]
            for key, what in (("cpu_s", "CPU seconds"), ("beyond_gradients_mib", "memory")):
                for peer in peers:
                    each = shares(row, peer, key)
                    share = statistics.median(each)
                    add(f"fused against {peer['path']}, {what}, {size}", "< 1", share, share < 1, range=[min(each), max(each)])
    useful = [row for row in filtered if row["epsilon"] > 0 and max(row["hidden_error"], row["weight_error"]) <= 1e-3]
    best = min((row["over_floor"] for row in useful), default=None)
    if filtered:
        add("filter on real rollouts at an error <= 1e-3, over the three products", "< 1", best or 0.0, best is not None and best < 1)
    return found


def size_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return tokens, shape and dtype of a row, or the name of the filter's own row."""
    return (FILTER,) if row["path"] == FILTER else (row["tokens"], row["shape"], row["dtype"])


def filter_on_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Measure what the filter saves, and costs in error, on the stored rollouts of a quickstart run, with the student that sampled them."""
    from loss_paths import rollout_problem

    torch.set_num_threads(1)
    problem = rollout_problem(folder)
    rates = floor_rates(problem)
    counted = int((problem.batch.weight > 0).sum())
    floor = counted * sum(rates.values())
    _, exact, _ = filtered_gradients(problem, 0.0)
    rows = []
    for epsilon in (0.0, *EPSILONS):
        seconds, gradients, neglected = filtered_gradients(problem, epsilon)
        hidden_error, weight_error = (float((a - b).norm() / b.norm()) for a, b in zip(gradients, exact, strict=True))
        row = {"epsilon": epsilon, "tokens": counted, "kept": int((gradients[0].abs().sum(-1) > 0).sum()), "cpu_s": seconds}
        row |= {"over_floor": seconds / floor, "hidden_error": hidden_error, "weight_error": weight_error, "neglected_bound": neglected}
        rows.append(row)
        print(row, flush=True)
    return rows


def filtered_gradients(problem: Problem, epsilon: float) -> tuple[float, Sequence[torch.Tensor], float]:
    """Return CPU seconds (the better of two), gradients by hidden states and weight, and the bound of what they lack."""
    loss, best = lopd.FusedOPDLoss(epsilon=epsilon), float("inf")
    for _ in range(2):
        started = time.process_time()
        output = loss(problem.hidden, problem.head, problem.batch)
        gradients = torch.autograd.grad(output.loss_sum, (problem.hidden, problem.weight))
        best = min(best, time.process_time() - started)
    return best, gradients, float(output.neglected_sum if output.neglected_sum is not None else 0.0)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the CPU seconds over the floor, and the memory, of every path at the largest size of each dtype; lopd's in colour."""
    largest = [row for row in rows if size_of(row)[:2] == TABLE and row["path"] not in {"three products", FORMER}]
    figure, axes = panels(2, 2, height=6)
    for line, dtype in zip((axes[:2], axes[2:]), DTYPES, strict=True):
        chosen = [row for row in largest if row["dtype"] == dtype]
        names = [wrap(f"{row['path']}{', oneDNN' if row['library'] == 'onednn' else ''}", 28) for row in chosen]
        colors = [RATIO if row["path"].startswith(("fused", "recomputed")) else TEXT for row in chosen]
        costs = {"over_floor": "CPU time over three products", "beyond_gradients_mib": "MiB beyond the gradients"}
        for panel, (key, label) in zip(line, costs.items(), strict=True):
            panel.barh(names, [row[key] for row in chosen], color=colors, height=0.7)
            panel.set(title=f"{label}, {dtype}")
            panel.invert_yaxis()
        line[1].tick_params(labelleft=False)
        rule(line[0], x=1)
    save(figure, path)


def main() -> None:
    """Measure, write the result file, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollouts", type=Path, metavar="DIR", help="folder of a finished quickstart run")
    parser.add_argument("--add", action="store_true", help="keep what the results file has of other sizes")
    parser.add_argument("--worker", nargs=5, metavar=("PATH", "TOKENS", "SHAPE", "DTYPE", "LIBRARY"))
    options = parser.parse_args()
    if options.worker:
        name, tokens, *rest = options.worker
        print(json.dumps(work(name, int(tokens), *rest)))
        return
    names = [name for name, path in paths_on("cpu").items() if path.package is None or find_spec(path.package)]
    rows: list[dict[str, Any]] = []
    for tokens, shape, dtype in product(options.tokens, options.shapes, options.dtypes):
        # (N, V) logits, a few times over, of a plain path have to fit into memory
        fitting = [name for name in names if PATHS[name].bounded or tokens * SHAPES[shape][0] * 4 < 2**31]
        rows += measure_series(tokens, shape, dtype, options.repeats, fitting)
    filtered = filter_on_rollouts(options.rollouts) if options.rollouts else []
    filtered = [{"path": FILTER, **row} for row in filtered]
    if options.add:
        measured = {size_of(row) for row in [*rows, *filtered]}
        old = json.loads(RESULTS.read_text())["rows"]
        kept = [row for row in old if size_of(row) not in measured]
        rows = [*(row for row in kept if row["path"] != FILTER), *rows]
        filtered = [*(row for row in kept if row["path"] == FILTER), *filtered]
    found = goals(rows, filtered)
    for goal in found:
        print("met   " if goal["met"] else "MISSED", goal["name"], "goal", goal["goal"], "measured", f"{goal['measured']:.3g}")
    result_file("bench_loss", describe_machine(), [*rows, *filtered], found)
    draw(ROOT / "docs" / "bench_loss.png", rows)


if __name__ == "__main__":
    main()
