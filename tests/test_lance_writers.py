"""Several writers of a `LanceStore`, and readers in other processes."""

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any
from uuid import uuid4

import lancedb
import numpy as np
import pytest
import torch
from attrs import evolve
from lance_stores import filled, reopened, started, table_of  # noqa: F401
from lancedb.index import BTree
from s3_server import S3Server
from zarr_stores import Rows, _quick_disk, fill, many, place, rows_of  # noqa: F401

from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import LanceTable
from lopd.errors import ConflictError, CorruptStoreError, ForkedStoreError
from lopd.records import ModelId
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k

# Races


@pytest.fixture
def before_insert(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Return `before_insert(act)`: something that happens once, between a writer's last look and its commit."""

    def arrange(act: Callable[[], None]) -> None:
        real = LanceTable.insert

        def insert(self: LanceTable, data: Any, version: int) -> bool:
            monkeypatch.setattr(LanceTable, "insert", real)
            act()
            return real(self, data, version)

        monkeypatch.setattr(LanceTable, "insert", insert)

    return arrange


def test_a_writer_that_lost_the_race_drops_rows_that_are_there_by_now(filled: LanceStore, before_insert: Any) -> None:
    other = reopened(filled)
    before_insert(lambda: other.append(many(50, 1)))
    filled.append(many(50, 2))
    assert rows_of(filled) == rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r50", "r51"]
    assert list(filled.verify()) == []


def test_two_writers_beside_an_index_of_another_tool_do_not_win_one_number(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    table_of(filled, "rollouts").create_index("commit", config=BTree())
    writers, handle = [reopened(filled), reopened(filled)], type(filled._snapshot.rollouts.table._handle)  # type: ignore[union-attr]
    real, both = handle.merge_insert, Barrier(2)

    def merge_insert(self: Any, on: str) -> Any:
        with suppress(BrokenBarrierError):
            both.wait(0.5)
        return real(self, on)

    monkeypatch.setattr(handle, "merge_insert", merge_insert)
    with ThreadPoolExecutor(2) as pool:
        for i in range(10, 16, 2):
            both.reset()
            for call in [pool.submit(store.append, many(i + k, 1)) for k, store in enumerate(writers)]:
                call.result()
    assert sorted(rows_of(reopened(filled))) == sorted(["m", "b", "r0", "r1", *(f"r{i}" for i in range(10, 16))])
    assert list(reopened(filled).verify()) == []


def test_of_two_contents_for_an_id_one_wins_and_the_other_call_commits_nothing(filled: LanceStore, before_insert: Any) -> None:
    other = reopened(filled)
    before_insert(lambda: other.append([tiny_rollout("x", [1])]))
    with pytest.raises(ConflictError, match="'x'"):
        filled.append([tiny_rollout("y"), tiny_rollout("x", [2])])
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "x"]


def test_of_two_models_for_a_new_column_one_wins_and_the_other_leaves_no_trace(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, other, real = filled.read([0])[0].rollout, reopened(filled), filled._database.create

    def create(name: str, data: Any) -> Any:
        other.append_scores("ref", tiny_provenance("A"), [tiny_scores(rollout, -1.0)])
        return real(name, data)

    monkeypatch.setattr(type(filled._database), "create", lambda self, *args: (create if self is filled._database else real)(*args))
    with pytest.raises(ConflictError, match="column 'ref' was scored by A@rev-A, expected B@rev-B"):
        filled.append_scores("ref", tiny_provenance("B"), [tiny_scores(rollout, -2.0)])
    store = reopened(filled)
    assert store.columns["ref"] == tiny_provenance("A")
    assert store.read([0], ("ref",))[0].scores["ref"].tolist() == [-1.0] * 3
    assert len(list(place(filled).glob("scores.ref-*.lance"))) == 1


def test_scores_that_another_writer_adds_to_a_new_column_at_the_same_time_are_both_there(filled: LanceStore, before_insert: Any) -> None:
    items, other = [row.rollout for row in filled.read(range(4))], reopened(filled)
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[2])])
    before_insert(lambda: other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[1], -3.0), tiny_scores(items[3])]))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[0]), tiny_scores(items[1], -4.0)])
    assert [row.scores["ref"][0] for row in reopened(filled).read(range(4), ("ref",))] == [-1.0, -3.0, -1.0, -1.0]


def test_a_column_that_is_new_at_a_refresh_has_no_scores_of_rollouts_that_are_not_seen(
    filled: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, both = reopened(filled), many(10, 2)
    filled.append(both[:1])
    filled.append_scores("new", tiny_provenance("new"), [tiny_scores(both[0])])
    real = type(reader._snapshot)._open

    def meanwhile(snapshot: Any, versions: Any) -> None:
        if snapshot is reader._snapshot:
            filled.append(both[1:])
            filled.append_scores("new", tiny_provenance("new"), [tiny_scores(both[1])])
        real(snapshot, versions)

    monkeypatch.setattr(type(reader._snapshot), "_open", meanwhile)
    reader.refresh()
    scored = reader.scored("new")
    assert len(scored) == len(reader)
    assert scored[reader.find([both[0].rollout_id])].all()


def test_of_two_policies_for_a_round_one_wins(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    policies, other = [ModelId("policy", name, "float32") for name in ("A", "B")], reopened(filled)
    real = filled._catalog.put

    def put(path: str, document: Any) -> bool:
        monkeypatch.undo()
        other.begin_generation(1, policies[0])
        return real(path, document)

    monkeypatch.setattr(type(filled._catalog), "put", lambda self, *args: put(*args))
    with pytest.raises(ConflictError, match="generation 1 was sampled by policy@A"):
        filled.begin_generation(1, policies[1])
    assert reopened(filled).generations[1] == policies[0]


def begin_together(path: str, writer: int, pipe: Connection) -> None:
    """Make the store, its first rows and a column at the same moment as all other writers."""
    import lopd.backends.lance.table as module

    module._lancedb("Warm-up")
    pipe.send("ready")
    pipe.recv()
    store = LanceStore.open_or_create(path, tiny_manifest())
    for i in range(4):
        mine = [*many(10 * writer + i, 1), *many(100 + i, 1)]
        store.append(mine)
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in mine])
    pipe.send(len(store))


def test_four_processes_that_begin_a_store_together_lose_nothing_and_write_nothing_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "run.lance")
    processes = [started(begin_together, path, writer) for writer in range(4)]
    for signal in ("ready", "go"):
        for _, pipe in processes:
            assert signal == "go" or (pipe.poll(60) and pipe.recv() == signal)
            if signal == "go":
                pipe.send(signal)
    for process, _ in processes:
        process.join(60)
        assert process.exitcode == 0
    store = LanceStore.open(path)
    numbers = {*range(100, 104), *(10 * writer + i for writer in range(4) for i in range(4))}
    assert sorted(rows_of(store)) == sorted(f"r{i}" for i in numbers)
    assert store.scored("teacher").all()
    assert list(store.verify()) == []
    assert sum(commit.rows for commit in store.history()) == 2 * len(numbers)


# Other processes


@pytest.mark.parametrize("where", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_spawned_data_loader_workers_read_a_store(filled: LanceStore, where: str, request: pytest.FixtureRequest) -> None:
    if where == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        filled = fill(LanceStore.create(s3.new_url(".lance"), tiny_manifest(), storage_options=s3.storage_options))
    loader = torch.utils.data.DataLoader(Rows(filled), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    found = list(loader)
    assert [ids for _, ids in found] == [row.rollout.response_ids.tolist() for row in filled.read(range(4))]
    assert os.getpid() not in {pid for pid, _ in found}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_is_told_to_be_spawned(filled: LanceStore) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        for attempt in (lambda: filled.read([0]), lambda: filled.append(many(10, 1)), filled.refresh, lambda: reopened(filled)):
            try:
                attempt()
            except ForkedStoreError as error:
                theirs.send(str(error))

    process = context.Process(target=work, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for _ in range(4):
        assert "start workers with the 'spawn' or 'forkserver' method" in ours.recv()
    assert rows_of(filled) == ["m", "b", "r0", "r1"]


# A store that is put back, or removed, under its writer


def test_a_writer_of_a_store_that_was_put_back_under_it_adds_no_record(filled: LanceStore, tmp_path: Path) -> None:
    shutil.copytree(place(filled), tmp_path / "kept")
    scores = [tiny_scores(row.rollout) for row in filled.read([0])]
    for number in (1, 2):
        filled.begin_generation(number, ModelId("later", f"{number}", "float32"))
    shutil.rmtree(place(filled))
    shutil.copytree(tmp_path / "kept", place(filled))
    for call in (
        lambda: filled.append([tiny_rollout("r5", generation=1)]),
        lambda: filled.append_scores("teacher", filled.columns["teacher"], [evolve(scores[0], top_k=tiny_top_k(3))]),
        lambda: filled.begin_generation(2, ModelId("later", "2", "float32")),
        lambda: filled.begin_generation(3, ModelId("later", "3", "float32")),
        lambda: filled.quarantine("teacher", filled.columns["teacher"], {"m": "too long"}),
        lambda: filled.append_scores("ref", tiny_provenance("ref"), scores),
    ):
        with pytest.raises(CorruptStoreError, match=r"json is not what it was when it was read"):
            call()
    (problem,) = filled.verify()
    assert "json is not what it was when it was read" in problem
    again = reopened(filled)
    assert rows_of(again) == ["m", "b", "r0", "r1"]
    again.begin_generation(1, ModelId("again", "1", "float32"))
    assert list(reopened(again).verify()) == []


def test_an_empty_store_that_was_removed_under_its_writer_takes_nothing(tmp_path: Path) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    shutil.rmtree(place(store))
    assert len(list(store.verify())) == 1
    for call in (lambda: store.append(many(0, 1)), lambda: store.append([]), store.compact):
        with pytest.raises(CorruptStoreError, match=r"lopd.json is not what it was when it was read"):
            call()


def test_a_compaction_of_an_empty_store_that_was_removed_leaves_its_place_free(s3: S3Server) -> None:
    url = s3.new_url(".lance")
    store = LanceStore.create(url, tiny_manifest(), storage_options=s3.storage_options)
    store._files.remove(["lopd.json"])
    with pytest.raises(CorruptStoreError, match=r"lopd.json is not what it was when it was read"):
        store.compact()
    assert len(LanceStore.create(url, tiny_manifest(), storage_options=s3.storage_options)) == 0


@pytest.mark.parametrize("more", [1, 3])
def test_a_store_that_was_put_back_and_gone_on_with_gives_nobody_other_rows(more: int, filled: LanceStore, tmp_path: Path) -> None:
    shutil.copytree(place(filled), tmp_path / "kept")
    filled.append(many(20, 2))
    readers, copy = [reopened(filled), reopened(filled), pickle.loads(pickle.dumps(filled))], pickle.dumps(filled)  # noqa: S301  # our own
    readers[1].read([4, 5])
    filled.find(["r20"])
    shutil.rmtree(place(filled))
    shutil.copytree(tmp_path / "kept", place(filled))
    other = reopened(filled)
    for i in range(more):
        other.append(many(30 + 2 * i, 2))
    for call in (
        *(partial(reader.read, [4, 5]) for reader in readers),
        *(reader.table for reader in readers),
        *(reader.refresh for reader in readers),
        lambda: pickle.loads(copy),  # noqa: S301  # our own
        lambda: filled.append(many(20, 2)),
        lambda: filled.append(many(40, 1)),
    ):
        with pytest.raises(CorruptStoreError, match=r"version 3 of table 'rollouts-.* is not what it was when it was read"):
            call()
    again = reopened(filled)
    assert rows_of(again)[4:] == [f"r{i}" for i in range(30, 30 + 2 * more)]
    assert list(again.verify()) == []


def test_a_writer_of_a_store_that_was_put_back_and_gone_on_with_by_fewer_commits_adds_nothing(filled: LanceStore, tmp_path: Path) -> None:
    shutil.copytree(place(filled), tmp_path / "kept")
    for i in (20, 21):
        filled.append(many(i, 1))
    reader, copy = reopened(filled), pickle.dumps(filled)
    shutil.rmtree(place(filled))
    shutil.copytree(tmp_path / "kept", place(filled))
    reopened(filled).append(many(30, 2))
    for call in (
        filled.refresh,
        lambda: filled.append(many(20, 2)),
        lambda: filled.append(many(40, 1)),
        lambda: reader.read([4]),
        lambda: pickle.loads(copy),  # noqa: S301  # our own
    ):
        with pytest.raises(CorruptStoreError, match=r"version 4 of table 'rollouts-.* is not what it was when it was read"):
            call()
    assert rows_of(reopened(filled))[4:] == ["r30", "r31"]


@pytest.mark.parametrize("more", [0, 1, 2, 3])
def test_a_store_that_is_put_back_while_its_writer_loses_a_race_acknowledges_nothing(
    more: int, filled: LanceStore, tmp_path: Path, before_insert: Any
) -> None:
    shutil.copytree(place(filled), tmp_path / "kept")
    for i in (20, 21):
        filled.append(many(i, 1))

    def put_back() -> None:
        shutil.rmtree(place(filled))
        shutil.copytree(tmp_path / "kept", place(filled))
        other = reopened(filled)
        for i in range(more):
            other.append(many(30 + i, 1))

    before_insert(put_back)
    for i in (40, 20):
        with pytest.raises(CorruptStoreError, match=r"version 4 of table 'rollouts-.* is not what it was when it was read"):
            filled.append(many(i, 1))
    assert rows_of(reopened(filled))[4:] == [f"r{i}" for i in range(30, 30 + more)]


def test_a_store_that_is_put_back_while_a_write_fails_is_not_taken_for_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    store.append(many(0, 1))
    shutil.copytree(place(store), tmp_path / "kept")
    for i in (20, 21):
        store.append(many(i, 1))

    def conflicting(*_: Any) -> None:
        monkeypatch.undo()
        shutil.rmtree(place(store))
        shutil.copytree(tmp_path / "kept", place(store))
        other = reopened(store)
        for i in (30, 31, 32):
            other.append(many(i, 1))
        raise OSError("commit conflict")

    monkeypatch.setattr(lancedb.table.LanceTable, "merge_insert", conflicting)
    behavior = np.full(3, -1.0, np.float32)
    for rollout in (tiny_rollout("r40", behavior_logprobs=behavior, sampler_logprobs=behavior), tiny_rollout("r20")):
        with pytest.raises(CorruptStoreError, match=r"version 3 of table 'rollouts-.* is not what it was when it was read"):
            store.append([rollout])
    assert rows_of(reopened(store))[1:] == ["r30", "r31", "r32"]


def test_a_compaction_removes_what_killed_writers_left_of_a_record(filled: LanceStore) -> None:
    left = place(filled) / f"log/.tmp-{uuid4().hex}"
    left.touch()
    os.utime(left, (0, 0))
    filled.compact()
    assert not left.exists()
