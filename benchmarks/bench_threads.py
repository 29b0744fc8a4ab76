"""How the fused loss and plain logits scale to several threads: wall time, so on a machine that does nothing else.

python benchmarks/bench_threads.py        # writes benchmarks/results/bench_loss_threads.json; two minutes
"""

import argparse
import random
import statistics
from itertools import product
from typing import Any

from bench_loss import child
from record import describe_machine, result_file

TOKENS, SHAPE = 2048, "151936x896"


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    jobs = list(product(("fused", "full logits"), (1, options.threads)))
    runs: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
    for repeat in range(options.repeats):
        for name, threads in random.Random(repeat).sample(jobs, len(jobs)):  # noqa: S311
            runs[name, threads].append(child(name, str(TOKENS), SHAPE, "float32", "mkl", threads=threads)["wall_s"])
            print(name, threads, runs[name, threads][-1], flush=True)
    rows: list[dict[str, Any]] = []
    for (name, threads), seconds in runs.items():
        wall = statistics.median(seconds)
        row = {"path": name, "tokens": TOKENS, "shape": SHAPE, "threads": threads, "wall_s": wall, "spread_s": [min(seconds), max(seconds)]}
        rows.append({**row, "speed_up": statistics.median(runs[name, 1]) / wall})
    measured = next(row["speed_up"] for row in rows if (row["path"], row["threads"]) == ("fused", options.threads))
    ideal = float(options.threads)
    goal = {"name": f"speed-up of the fused loss on {options.threads} threads", "goal": f"near {ideal:g}", "measured": measured}
    result_file("bench_loss_threads", describe_machine(), rows, [{**goal, "met": measured >= 0.9 * ideal}])


if __name__ == "__main__":
    main()
