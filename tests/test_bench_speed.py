"""The benchmarks of speed and memory: what is timed, what is beside what, and what is refused; no figure is measured here."""

import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_engines
import bench_loss
import bench_store
import bench_train
import gpu_memory
import record
from loss_paths import paths_on
from store_backends import BACKENDS, Backend, Store, open_memmap, write_memmap
from testbed.trl_peer import ARM as TRL


@pytest.fixture
def clock(monkeypatch):
    """Give `bench_store` a clock that goes on only where it is told to."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(bench_store, "time", SimpleNamespace(perf_counter=lambda: now.s))
    return now


def test_what_is_imported_at_the_first_append_is_not_timed(clock, monkeypatch, tmp_path):
    imported = []

    def write(rows, folder, size):
        clock.s += 1.0 if imported else 100.0
        imported.append("it")
        write_memmap(rows, folder, size)

    monkeypatch.setitem(BACKENDS, "slow to import", Backend(write))
    found = bench_store.work("slow to import", tmp_path / "store", 64, 0)
    assert found["append"] == pytest.approx(bench_store.make_rows(64, 0).ids.size / 1e6)


def test_each_order_has_a_store_of_its_own_that_was_opened_cold_or_has_read_everything(clock, monkeypatch, tmp_path):
    events = []

    def write(rows, folder, size):
        clock.s += 1.0
        write_memmap(rows, folder, size)

    def open_one(folder):
        store, number = open_memmap(folder), sum(event[0] == "open" for event in events)
        events.append(("open", number))

        def read(rows):
            clock.s += 1e-3
            events.append(("read", number, rows.tolist()))
            return store.read(rows)

        return Store(read)

    monkeypatch.setitem(BACKENDS, "one", Backend(write, open_one))
    monkeypatch.setattr(bench_store, "drop_cache", lambda _: events.append(("dropped",)))
    bench_store.work("one", tmp_path / "store", 256, 0)
    dropped = [i for i, event in enumerate(events) if event[0] == "dropped"]
    assert [events[i + 1][0] for i in dropped] == ["open", "open"]
    reads = [[event[2] for event in events if event[:2] == ("read", number)] for number in range(6)]
    assert [len(of_one) for of_one in reads] == [0, 1, 1, 9, 9, 9]  # elsewhere; a quarter, cold; a check, everything, and an order
    for of_one in reads[3:]:
        assert list(chain(*of_one[1:5])) == list(range(256))
        assert sorted(chain(*of_one[5:])) == list(range(256))


def test_a_large_store_is_made_by_another_process_and_its_memory_is_not_below_nothing(monkeypatch, tmp_path):
    bench_store.make_repeated(tmp_path / "large", 16 * 1024)
    used = iter([9_000_000, 8_000_000, 8_000_000])
    monkeypatch.setattr(bench_store, "anonymous_memory", lambda: next(used))
    with pytest.raises(SystemExit, match=r"-1\.0 MB, expected at least 0"):
        bench_store.open_large(tmp_path / "large")
    monkeypatch.setattr(bench_store, "anonymous_memory", lambda: 0)
    assert bench_store.open_large(tmp_path / "large")["tokens"] == 16 * 1024
    asked = []
    monkeypatch.setattr(bench_store, "make_repeated", lambda folder, tokens: asked.append(tokens))
    monkeypatch.setattr(sys, "argv", ["bench_store.py", "--folder", str(tmp_path), "--make-large", "16384"])
    bench_store.main()
    assert asked == [16384]


def test_backends_that_append_alike_share_their_appends_and_storage_is_beside_them_without_a_goal():
    def runs(*appends):
        return [{"append": append, "random": 2.0, "sequential": 2.0} for append in appends]

    found = {"memmap": runs(10, 20), "zarr": runs(1, 2), "zarr, compacted": runs(3, 2), "zarr, its files alone": runs(2, 4)}
    found |= {"lance, compacted": runs(1, 1), "lance, its take alone": [{**run, "random": 4.0} for run in runs(1, 1)]}
    assert bench_store.figures(found, "zarr", "append") == bench_store.figures(found, "zarr, compacted", "append") == [1, 2, 3, 2]
    assert bench_store.figures(found, "zarr", "random") == [2, 2]
    assert bench_store.ratio(found, "zarr", "append") == pytest.approx(0.1)
    beside = {row["beside"]: row["share"]["median"] for row in bench_store.beside_storage(found)}
    assert beside == {
        "zarr: append against zarr, its files alone": 0.5,
        "lance, compacted: random against lance, its take alone": 0.5,
        "lance, compacted: sequential against lance, its take alone": 1.0,
    }


@pytest.mark.parametrize("name", ["lance, its take alone", "lancedb StreamingDataset"])
def test_what_a_store_is_beside_has_the_same_rows(name, tmp_path):
    pytest.importorskip("lancedb")
    backend, rows = BACKENDS[name], bench_store.make_rows(64, 0)
    backend.write(backend.prepare(rows), tmp_path, 16)
    backend.finish(tmp_path)
    store = backend.open(tmp_path)
    store.check(rows)
    assert store.tokens_of(np.arange(64)) == rows.ids.size
    assert len(list(tmp_path.rglob("*.lance"))) >= 1


def loss_row(path, *seconds):
    runs = [s and {"cpu_s": s, "beyond_gradients_mib": 1.0} for s in seconds]
    size = {"tokens": 2048, "shape": "151936x896", "dtype": "float32", "library": "mkl", "path": path}
    return {**size, **bench_loss.summary(runs), "over_floor": 1.0}


def test_a_loss_is_beside_its_peer_in_the_same_repetition(monkeypatch):
    rows = [loss_row("fused", 1.0, 30.0, 5.0), loss_row("full logits", 2.0, 40.0, None)]
    (goal,) = (goal for goal in bench_loss.goals(rows, []) if "CPU seconds" in goal["name"])
    assert (goal["measured"], goal["range"]) == (0.625, [0.5, 0.75])
    older = [{name: value for name, value in row.items() if name != "runs"} for row in rows]
    assert bench_loss.shares(*older, "cpu_s") == [pytest.approx(5 / 21)]
    rates = dict.fromkeys(("logits", "hidden", "weight"), 1.0)
    answers = {"floor": iter([rates, rates, {}]), "fused": iter([{"cpu_s": 30.0}, {"cpu_s": 60.0}, {"cpu_s": 1.0}])}
    monkeypatch.setattr(bench_loss, "child", lambda name, tokens, *_: {} if tokens == "0" else next(answers[name]))
    floor, fused = bench_loss.measure_series(10, "49152x576", "bfloat16", 3, ["fused"])
    assert floor["cpu_s"] == 30
    assert (fused["over_floor"], fused["over_floor_range"]) == (1.5, [1, 2])


def test_libraries_run_on_a_card_as_they_are_meant_to_and_say_so_elsewhere():
    here, there = paths_on("cpu"), paths_on("cuda")
    assert set(here) - set(there) == {"cut-cross-entropy, torch.compile", "Liger's fallback without a GPU"}
    assert set(there) - set(here) == {"cut-cross-entropy", "Liger, scaled cross-entropy"}
    asked = []
    module = SimpleNamespace(linear_cross_entropy=lambda *_, impl, **__: asked.append(impl) or torch.ones(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cut_cross_entropy", module)
        for path in (there["cut-cross-entropy"], here["cut-cross-entropy, torch.compile"]):
            path(bench_loss.make_problem(4, 8, 2, torch.float32))
    assert asked == ["cce", "torch_compile"]


def test_scoring_is_beside_the_forward_pass_of_the_same_turn():
    found = bench_engines.per_turn({"forward": [1.0, 10.0, 2.0], "scoring": [2.0, 10.0, 2.0]})
    assert found == {"median": 1.0, "min": 0.5, "max": 1.0}
    (goal,) = bench_engines.goals([{"model": "M", "scoring_over_forward": found}])
    assert goal["met"]


def test_the_faster_way_of_trl_is_quoted():
    def rows(peer, ours, theirs):
        steps = [
            {"path": path, "step": 1, "tokens": 100, "cpu_s": ours, "parts_s": {"reading and collating": 0.0}} for path in bench_train.PATHS
        ]
        return [
            {**row, "beside": peer} for row in (*steps, {"path": peer, "step": 1, "tokens": 100, "cpu_s": theirs, "teacher_cpu_s": 1.0})
        ]

    whole, cut = bench_train.PEERS
    assert whole == TRL
    found = bench_train.summarise([*rows(whole, 1.0, 4.0), *rows(cut, 2.0, 3.0)])
    assert (found[0]["faster_than_trl"], found[0]["steps"], found[-1]["path"]) == (1.5, 1, cut)
    with pytest.raises(ValueError, match=f"no step of '{cut}': they are older than this script"):
        bench_train.summarise(rows(whole, 1.0, 4.0))


def test_the_load_is_kept_and_no_machine_is_compared_by_it(tmp_path):
    report = record.describe_machine()
    path = record.result_file("x", report, [], [], tmp_path)
    assert json.loads(path.read_text())["load"] == record.LOAD
    assert "load" not in {**report["machine"], **report["versions"]}


def test_a_unit_of_another_commit_is_measured_again(monkeypatch, tmp_path):
    asked, written = [], []

    def run(command, **_):
        asked.append(command[-2:])
        return SimpleNamespace(stdout='{"size": "20M", "case": "scoring", "measured_gb": 1.0}\n')

    monkeypatch.setattr(gpu_memory, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_memory, "CASES", {"scoring": gpu_memory.CASES["scoring"]})
    monkeypatch.setattr(gpu_memory, "result_file", lambda *given: written.append(given))
    monkeypatch.setattr(gpu_memory.subprocess, "run", run)
    monkeypatch.setattr(gpu_memory, "describe_machine", dict)
    monkeypatch.setattr(sys, "argv", ["gpu_memory.py", "--sizes", "20M"])
    for commit in ("a", "a", "b"):
        monkeypatch.setattr(gpu_memory, "commit", lambda commit=commit: commit)
        gpu_memory.main()
    assert asked == [["20M", "scoring"]] * 2
    assert len(written) == 3
