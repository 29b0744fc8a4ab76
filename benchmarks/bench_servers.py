"""Servers of objects that install here, with four writers each: what they do, what was acknowledged, what was lost, and lopd's verdict on them.

python benchmarks/bench_servers.py     # `make bench-servers`; writes benchmarks/results/servers.json; about three minutes
"""

import sys
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from record import ROOT, describe_machine, result_file

from lopd.backends.files import open_files, prove
from lopd.errors import LopdError

sys.path.insert(0, str(ROOT / "tests"))

from crash_worker import Place
from real_servers import KINDS, RealServer, four_writers, running

_TRIES, _WRITERS = 20, 4


def creates(server: RealServer) -> float:
    """Return how many of four writers, on average, are told that they created an object which all four create at once."""
    files = open_files(server.new_url(), server.storage_options)
    with ThreadPoolExecutor(_WRITERS) as pool:
        made = [sum(pool.map(partial(files.put_if_absent, f"{i}"), [bytes([j]) for j in range(_WRITERS)])) for i in range(_TRIES)]
    return sum(made) / _TRIES


def proven(server: RealServer) -> tuple[str, float]:
    """Return lopd's verdict on a server, and the milliseconds that the proof takes."""
    url = server.new_url()
    files, started = open_files(url, server.storage_options), perf_counter()
    files.names("")
    started = perf_counter()
    try:
        prove(files)
    except LopdError as error:
        return str(error).removeprefix(f"Store {url}: ").split(";")[0], 1e3 * (perf_counter() - started)
    return "sound", 1e3 * (perf_counter() - started)


def measure(name: str, folder: Path, pool: Executor) -> dict[str, Any]:
    """Measure one server."""
    with running(name, folder) as server:
        winners = creates(server)
        said, milliseconds = proven(server)
        row: dict[str, Any] = {"server": name, "version": server.version, "winners_of_4": winners, "said": said, "asking_ms": milliseconds}
        for backend in ("zarr", "lance"):
            found = four_writers(Place(backend, server.new_url(), server.storage_options), pool)
            row[backend] = {"acknowledged": found.acknowledged, "lost": found.lost + len(found.problems), "refused": len(found.errors)}
    return row


def main() -> None:
    """Measure all that are installed."""
    with ProcessPoolExecutor(_WRITERS, get_context("spawn")) as pool, tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, Path(folder) / name, pool) for name in KINDS]
    for row in rows:
        print(row)
    lost = sum(row[backend]["lost"] for row in rows for backend in ("zarr", "lance"))
    goals = [{"name": "lost", "goal": "nothing that was acknowledged is lost on any server", "measured": lost, "met": lost == 0}]
    print("written:", result_file("servers", describe_machine(), rows, goals))


if __name__ == "__main__":
    main()
