"""`LanceStore`: the contract, and what several writers, forks, damage and a full disk can do to it.

Kills and many processes at once are in `test_store_faults.py`, for all backends.
"""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from uuid import uuid4

import lancedb
import numpy as np
import pytest
import torch
from attrs import evolve
from fault_proxy import ALWAYS, FaultProxy
from forked import FORKS
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from s3_server import S3Server
from test_stores import MACHINE, Rows, StoreMachine, fill, many, rows_of

from lopd.backends.lance import encode
from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import LanceTable
from lopd.backends.opening import open_store
from lopd.backends.sealing import seal, unseal
from lopd.errors import (
    ConflictError,
    CorruptStoreError,
    ForkedStoreError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    MissingDependencyError,
    MissingScoresError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreReadError,
    StoreWriteError,
)
from lopd.protocols import LogprobStore
from lopd.records import Lineage, Manifest, ModelId, Scores
from lopd.testing import StoreConformance, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k

huge = tiny_rollout("huge", np.arange(100_000) % 300)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing cuts the power here; that files are flushed has a test of its own.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class TestLanceStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, manifest: Manifest) -> LanceStore:
        return LanceStore.create(self.folder / uuid4().hex, manifest)

    def reopen(self, store: LogprobStore) -> LanceStore:
        return reopened(store)

    def compact(self, store: LogprobStore) -> LanceStore:
        assert isinstance(store, LanceStore)
        store.compact()
        return store


@pytest.mark.s3
class TestLanceStoreOnS3(TestLanceStore):
    @pytest.fixture(autouse=True)
    def _server(self, s3: S3Server) -> None:
        self.s3 = s3

    def make(self, manifest: Manifest) -> LanceStore:
        return LanceStore.create(self.s3.new_url(".lance"), manifest, storage_options=self.s3.storage_options)

    def reopen(self, store: LogprobStore) -> LanceStore:
        return reopened(store, self.s3.storage_options)


def reopened(store: Any, storage_options: dict[str, Any] | None = None) -> LanceStore:
    """As a new process would see it."""
    assert isinstance(store, LanceStore)
    return LanceStore.open(store._files.url, store.manifest, storage_options=storage_options)


def place(store: LanceStore) -> Path:
    """The folder of a local store."""
    return Path(store._files.url)


def sent(store: LanceStore) -> LanceStore:
    """As a worker process of a data loader gets it."""
    return pickle.loads(pickle.dumps(store))  # noqa: S301  # our own bytes, made a moment ago


@pytest.fixture
def filled(tmp_path: Path) -> LanceStore:
    """Two commits of rollouts of all kinds, one of scores with top-k."""
    return fill(LanceStore.create(tmp_path / "run.lance", tiny_manifest()))


def table_of(store: LanceStore, name: str) -> Any:
    """LanceDB's own table: `rollouts`, or `scores.<column>`."""
    database = lancedb.connect(place(store))
    (found,) = [path.stem for path in place(store).glob(f"{name}-*.lance")]
    return database.open_table(found)


def test_a_lance_store_equals_a_dict_under_append_score_reopen_read_and_compaction(tmp_path: Path) -> None:
    def machine() -> StoreMachine:
        make = lambda: LanceStore.create(tmp_path / uuid4().hex, tiny_manifest())  # noqa: E731
        return StoreMachine(make, reopened, lambda store: store.compact())

    run_state_machine_as_test(machine, settings=settings(MACHINE, max_examples=8))


# Places


def test_what_is_no_place_for_a_store_is_refused(filled: LanceStore, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/file").touch()
    for path in (place(filled), tmp_path / "foreign", tmp_path / "foreign/file"):
        with pytest.raises(StoreExistsError, match="is there, expected an empty folder"):
            LanceStore.create(path, tiny_manifest())
    for name, words in (("nothing", "is not there"), ("foreign", "is no store"), ("foreign/file", "is no store")):
        with pytest.raises(StoreNotFoundError, match=words):
            LanceStore.open(tmp_path / name)
    with pytest.raises(StoreExistsError):
        LanceStore.open_or_create(tmp_path / "foreign", tiny_manifest())
    with pytest.raises(StorePathError, match=r"memory://here.*LanceDB cannot store there"):
        LanceStore.create("memory://here", tiny_manifest())
    with pytest.raises(InvalidRecordError, match="logprob_dtype is 'bfloat16', expected one of float32, float16"):
        LanceStore.create(tmp_path / "new", tiny_manifest(), logprob_dtype="bfloat16")
    assert sorted(os.listdir(tmp_path)) == ["foreign", "run.lance"]  # noqa: PTH208


def test_open_or_create_makes_a_store_once(tmp_path: Path) -> None:
    for i in range(2):
        LanceStore.open_or_create(tmp_path / "run.lance", tiny_manifest()).append(many(i, 1))
    assert rows_of(open_store(tmp_path / "run.lance")) == ["r0", "r1"]


def test_another_manifest_is_refused_and_the_field_is_named(filled: LanceStore) -> None:
    other = evolve(tiny_manifest(), policy=ModelId("policy", "rev-q", "float32"))
    for make in (LanceStore.open, LanceStore.open_or_create):
        with pytest.raises(ManifestMismatchError, match=r"run.lance: policy.revision is .*rev-p.*, expected .*rev-q.*;"):
            make(place(filled), other)


def test_another_schema_version_is_refused(filled: LanceStore) -> None:
    path = place(filled) / "lopd.json"
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(CorruptStoreError, match="schema_version is 2, expected 1"):
        LanceStore.open(place(filled))


@pytest.mark.parametrize("name", ["with space", "per%20cent", "\u4f60", "a#b", "q?x=1"])
def test_a_path_may_have_any_characters(tmp_path: Path, name: str) -> None:
    store = fill(LanceStore.create(tmp_path / name, tiny_manifest()))
    assert rows_of(reopened(store)) == ["m", "b", "r0", "r1"]
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208


def test_a_relative_path_keeps_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = LanceStore.create("run.lance", tiny_manifest())
    monkeypatch.chdir("/")
    store.append(many(0, 1))
    assert len(LanceStore.open(tmp_path / "run.lance")) == 1


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lopd\[lance\]'"):
        LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    assert not (tmp_path / "run.lance").exists()


# What is stored


@pytest.mark.parametrize(("vocab_size", "item"), [(256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_lancedb_reads_every_column_under_its_name(tmp_path: Path, vocab_size: int, item: str) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest(vocab_size))
    rollout = tiny_rollout("r", [7, vocab_size - 1], loss_mask=[False, True], behavior_logprobs=[-0.5, 0], finish_reason="length")
    store.append([rollout, tiny_rollout("plain", [1])])
    store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(rollout), top_k=tiny_top_k(2))])
    table = table_of(store, "rollouts").to_arrow()
    row = table.to_pylist()[0]
    expected = {"row": 0, "rollout_id": b"r", "content_hash": rollout.content_hash, "finish_reason": "length", "generation": 0}
    expected |= {"token_ids": [4, 7, vocab_size - 1], "loss_mask": [0, 1], "behavior_logprobs": [-0.5, 0], "prompt_length": 1}
    assert {name: row[name] for name in expected} == expected
    assert str(table.schema.field("token_ids").type.value_type) == item
    assert table["loss_mask"][1].as_py() is table["behavior_logprobs"][1].as_py() is None
    scores = table_of(store, "scores.teacher").to_arrow().to_pylist()[0]
    assert (scores["row"], scores["logprobs"], scores["top_k_ids"], scores["top_k_tail"]) == (0, [-1, -1], [0, 1, 2, 3], [0.5, 0.5])


def test_tables_for_queries_stand_at_what_the_store_sees_and_take_no_writes(filled: LanceStore) -> None:
    reader = open_store(filled._files.url)
    assert isinstance(reader, LanceStore)
    before = len(reader)
    filled.append([tiny_rollout("later/s0/g0")])
    assert reader.table().count_rows() == before
    reader.refresh()
    table = reader.table()
    found = table.search().where("CAST(rollout_id AS STRING) LIKE 'later/%'").select(["row"]).to_list()
    assert [row["row"] for row in found] == [before]
    scores = reader.table("teacher").to_arrow()
    for row, logprobs in zip(scores["row"].to_pylist(), scores["logprobs"].to_pylist(), strict=True):
        assert logprobs == reader.read([row], columns=("teacher",))[0].scores["teacher"].tolist()
    for write in (lambda: table.delete("row = 0"), lambda: table.add(table.to_arrow())):
        with pytest.raises(ValueError, match="cannot be modified"):
            write()
    assert len(open_store(filled._files.url)) == before + 1
    with pytest.raises(MissingScoresError, match="no table of column 'nobody'"):
        reader.table("nobody")


def test_an_empty_store_has_no_table_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingScoresError, match="no table of rollouts, expected one; append some first"):
        LanceStore.create(tmp_path / "empty.lance", tiny_manifest()).table()


def test_half_the_bytes_cost_a_rounding_that_each_commit_reports(tmp_path: Path) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest(), logprob_dtype="float16")
    full = np.array([-0.1, -1e-9, -77.7], np.float32)
    store.append([tiny_rollout("r", behavior_logprobs=full)])
    store.append_scores("teacher", tiny_provenance(), [Scores.of(tiny_rollout("r"), full / 2)])
    row = reopened(store).read([0], ("teacher", "behavior"))[0]
    for commit, column, values in zip(store.history(), ("behavior", "teacher"), (full, full / 2), strict=True):
        np.testing.assert_array_equal(row.scores[column], values.astype(np.float16).astype(np.float32))
        assert commit.rounding == np.abs(row.scores[column] - values).max() > 0
    with pytest.raises(InvalidRecordError, match=r"'low'.*-70000.*at least -65504"):
        store.append([tiny_rollout("low", [1], behavior_logprobs=[-70000.0])])
    assert len(reopened(store)) == 1


def test_more_values_than_one_append_can_hold_are_refused_before_they_are_copied() -> None:
    half = np.broadcast_to(np.uint8(0), 1 << 30)
    with pytest.raises(InvalidRecordError, match=r"2147483648 values.*append fewer rollouts"):
        encode._list_column([half, half], half.dtype)


def test_history_says_what_was_committed_in_which_order(filled: LanceStore) -> None:
    filled.begin_generation(1, ModelId("policy", "rev-1", "float32"))
    filled.compact()
    filled.compact()
    expected = [("rollouts", 2, 8, None), ("rollouts", 2, 8, None), ("scores", 2, 6, "teacher"), ("generation", 0, 0, None)]
    expected.append(("compaction", 4, 16, None))
    for store in (filled, reopened(filled), sent(filled)):
        commits = store.history()
        assert [(commit.kind, commit.rows, commit.tokens, commit.column) for commit in commits] == expected
        assert [commit.number for commit in commits] == list(range(5))
        assert [commit.when for commit in commits] == sorted(commit.when for commit in commits)


def test_stored_bytes_are_those_of_the_data_files(filled: LanceStore) -> None:
    assert filled.stored_bytes() == sum(path.stat().st_size for path in place(filled).glob("*/data/*.lance"))


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Which files and folders were flushed, and in which state: a file may have got its name later."""
    found: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        found[status.st_ino] = status.st_mtime_ns

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def not_flushed(store: LanceStore, flushed: dict[int, int]) -> list[Path]:
    paths = [place(store), *place(store).rglob("*")]
    return [path for path in paths if flushed.get(path.stat().st_ino) != path.stat().st_mtime_ns]


def test_all_that_a_commit_wrote_is_flushed_before_the_call_returns(tmp_path: Path, flushed: dict[int, int]) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    for item in many(0, 3):
        store.append([item])
        assert not_flushed(store, flushed) == []
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(item)])
        assert not_flushed(store, flushed) == []
    store.compact()
    assert not_flushed(store, flushed) == []


def test_to_be_told_that_rows_are_there_is_to_be_told_that_they_stay(filled: LanceStore, flushed: dict[int, int]) -> None:
    # Whoever wrote them may have died before flushing them.
    rollout = filled.read([1])[0].rollout
    reopened(filled).append([rollout])
    reopened(filled).append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(rollout), top_k=tiny_top_k(3))])
    assert [path for path in not_flushed(filled, flushed) if ".lance/" in str(path.relative_to(place(filled)))] == []


def test_opening_reads_no_rows_and_reading_some_rows_reads_no_others(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    real = LanceTable.take

    def take(self: LanceTable, offsets: Any, columns: Any) -> Any:
        taken.append(offsets.tolist())
        return real(self, offsets, columns)

    monkeypatch.setattr(LanceTable, "take", take)
    store = reopened(filled)
    assert (len(store), store.columns.keys(), taken) == (4, {"teacher"}, [])
    assert [row.rollout.rollout_id for row in store.read([3, 1, 3])] == ["r1", "b", "r1"]
    assert taken == [[1, 3], [1, 3]], "their lines, then their values"
    store.lengths()
    assert store.find(["b"]).tolist() == [1]
    assert taken[2:] == [[0, 1, 2, 3]]


# Snapshots


def test_a_reader_keeps_its_snapshot_until_it_refreshes_and_so_does_its_copy(filled: LanceStore) -> None:
    reader, copied = reopened(filled), pickle.dumps(reopened(filled))
    filled.append(many(10, 2))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(10, 1)[0])])
    filled.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(many(10, 1)[0]), top_k=tiny_top_k(3))])
    filled.begin_generation(1, ModelId("policy", "rev-1", "float32"))
    filled.compact()
    for store in (reader, pickle.loads(copied)):  # noqa: S301
        assert rows_of(store) == ["m", "b", "r0", "r1"]
        assert (store.columns.keys(), store.generations.keys(), len(store.history())) == ({"teacher"}, {0}, 3)
        assert store.scored("teacher").tolist() == [False, True, False, True]
        store.refresh()
        assert rows_of(store) == ["m", "b", "r0", "r1", "r10", "r11"]
        assert (store.columns.keys(), store.generations.keys()) == ({"teacher", "ref"}, {0, 1})
        assert store.scored("teacher").tolist() == [False, True, False, True, True, False]


def test_a_copy_writes_too(filled: LanceStore) -> None:
    sent(filled).append(many(10, 1))
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r10"]


def test_compaction_leaves_one_fragment_and_removes_old_versions_only_when_told_to(filled: LanceStore) -> None:
    reader = reopened(filled)
    filled.compact()
    assert table_of(filled, "rollouts").stats()["fragment_stats"]["num_fragments"] == 1
    assert rows_of(reader) == ["m", "b", "r0", "r1"]
    assert len(list(place(filled).glob("rollouts-*/data/*"))) == 3
    filled.compact(older_than=0.0)
    assert len(list(place(filled).glob("rollouts-*/data/*"))) == 1
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1"]
    with pytest.raises(CorruptStoreError, match="reopen the store"):
        reader.read([0])
    reader.refresh()
    assert rows_of(reader) == ["m", "b", "r0", "r1"]


# Races


@pytest.fixture
def before_insert(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """`before_insert(act)`: something that happens once, between a writer's last look and its commit."""

    def arrange(act: Callable[[], None]) -> None:
        real = LanceTable.insert

        def insert(self: LanceTable, data: Any) -> bool:
            monkeypatch.setattr(LanceTable, "insert", real)
            act()
            return real(self, data)

        monkeypatch.setattr(LanceTable, "insert", insert)

    return arrange


def test_a_writer_that_lost_the_race_drops_rows_that_are_there_by_now(filled: LanceStore, before_insert: Any) -> None:
    other = reopened(filled)
    before_insert(lambda: other.append(many(50, 1)))
    filled.append(many(50, 2))
    assert rows_of(filled) == rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r50", "r51"]
    assert list(filled.verify()) == []


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
    assert len(list(place(filled).glob("scores.ref-*"))) == 1


def test_scores_that_another_writer_adds_to_a_new_column_at_the_same_time_are_both_there(filled: LanceStore, before_insert: Any) -> None:
    items, other = [row.rollout for row in filled.read(range(4))], reopened(filled)
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[2])])
    before_insert(lambda: other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[1], -3.0), tiny_scores(items[3])]))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(items[0]), tiny_scores(items[1], -4.0)])
    assert [row.scores["ref"][0] for row in reopened(filled).read(range(4), ("ref",))] == [-1.0, -3.0, -1.0, -1.0]


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
    """All writers make the store, its first rows and a column at the same moment."""
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


def started(work: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """A process that inherits nothing of ours, with a pipe to it."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=work, args=(*args, theirs), daemon=True)
    process.start()
    return process, ours


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


# Damage


def readable(store: LanceStore) -> list[Any]:
    """All that a store says."""
    rows = store.read(range(len(store)))
    scored = store.read([1, 3], ("teacher",), top_k=("teacher",))
    return [
        [(r.rollout.rollout_id, r.rollout.content_hash, r.rollout.finish_reason, r.rollout.generation) for r in rows],
        [[a.tolist() for a in (r.rollout.prompt_ids, r.rollout.response_ids, r.rollout.loss_mask)] for r in rows],
        [None if (values := r.rollout.behavior_logprobs) is None else values.tolist() for r in rows],
        [[*r.scores["teacher"].tolist(), *r.top_k["teacher"].ids.tolist(), *r.top_k["teacher"].logprobs.tolist()] for r in scored],
        store.lengths().tolist(), store.scored("teacher").tolist(), store.scored("behavior").tolist(),
        store.find(["m", "b", "r0", "r1", "r2"]).tolist(), dict(store.columns), dict(store.generations), len(store.history()),
    ]  # fmt: skip


def test_a_flipped_bit_in_any_file_is_an_error_or_changes_nothing(filled: LanceStore, capfd: pytest.CaptureFixture[str]) -> None:
    expected, rng, noticed = readable(filled), random.Random(0), 0
    files = [path for path in sorted(place(filled).rglob("*")) if path.is_file() and path.parent.name != "_transactions"]
    for path in files:
        data = path.read_bytes()
        for _ in range(12):
            bit = rng.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                assert readable(reopened(filled)) == expected, f"{path}: bit {bit}"
            except (CorruptStoreError, StoreNotFoundError):
                noticed += 1
        path.write_bytes(data)
    assert len(files) >= 10
    assert noticed >= 50
    assert readable(reopened(filled)) == expected
    # Rust's panics are printed where they happen.
    capfd.readouterr()


def test_a_damaged_value_is_an_error_that_names_its_rollout_and_so_does_verify(filled: LanceStore) -> None:
    wanted = np.array([4, 2, 3], np.uint16).tobytes()
    filled.append([tiny_rollout("r2", [2, 3])])
    (path,) = [path for path in place(filled).glob("rollouts-*/data/*") if wanted in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(wanted, np.array([4, 2, 7], np.uint16).tobytes()))
    store = reopened(filled)
    with pytest.raises(CorruptStoreError, match="rollout 'r2': the checksum of its values"):
        store.read([4, 0])
    assert [row.rollout.rollout_id for row in store.read(range(4))] == ["m", "b", "r0", "r1"]
    (problem,) = store.verify()
    assert "rollout 'r2'" in problem


def test_a_lost_file_is_an_error(filled: LanceStore) -> None:
    for pattern, words in (("rollouts-*/data/*", "Not found"), ("scores.*/_versions", "was not found"), ("rollouts.json", "is missing")):
        kept = place(filled).with_name("kept")
        path = next(place(filled).glob(pattern))
        path.rename(kept)
        with pytest.raises(CorruptStoreError, match=words):
            readable(reopened(filled))
        kept.rename(path)
    assert list(reopened(filled).verify()) == []


def test_rows_that_lance_has_moved_are_found_again(filled: LanceStore) -> None:
    expected, reader = readable(filled), reopened(filled)
    assert readable(reader) == expected
    for name in ("rollouts", "scores.teacher"):
        table = table_of(filled, name)
        data = table.to_arrow()
        database = lancedb.connect(place(filled))
        database.create_table(table.name, data.take(list(reversed(range(len(data))))), mode="overwrite")
    assert readable(reopened(filled)) == expected
    reader.refresh()
    assert readable(reader) == expected


def test_rows_that_somebody_added_past_the_store_are_refused(filled: LanceStore) -> None:
    table = table_of(filled, "rollouts")
    table.add(table.to_arrow())
    store = reopened(filled)
    with pytest.raises(CorruptStoreError, match="a row twice"):
        store.append(many(10, 1))
    with pytest.raises(CorruptStoreError, match="a row twice"):
        store.find(["r0"])


def test_scores_of_other_tokens_are_refused_at_read(tmp_path: Path) -> None:
    stores = [LanceStore.create(tmp_path / name, tiny_manifest()) for name in ("x", "y")]
    for store, response in zip(stores, ([7, 8], [8, 7]), strict=True):
        store.append([tiny_rollout("r", response)])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("r", response))])
    # Somebody copies the scores of one store, with the file that names their table, into the other.
    shutil.copytree(tmp_path / "y", tmp_path / "x", ignore=lambda _, names: [n for n in names if "rollouts" in n], dirs_exist_ok=True)
    with pytest.raises(CorruptStoreError, match=r"column 'teacher': scores of rollout 'r' were computed on other tokens"):
        LanceStore.open(tmp_path / "x").read([0], ("teacher",))


def test_a_catalog_file_that_leads_out_of_the_store_is_refused(filled: LanceStore) -> None:
    path = place(filled) / "columns/teacher.json"
    document = unseal(path.read_bytes())
    assert document is not None
    for name in ("../elsewhere", "/etc", ".", "a/b"):
        path.write_bytes(seal({**document, "table": name}))
        with pytest.raises(CorruptStoreError, match=r"names table .*expected letters"):
            reopened(filled)


def test_tables_of_killed_writers_are_removed_when_they_are_old(filled: LanceStore) -> None:
    shutil.copytree(next(place(filled).glob("scores.*.lance")), place(filled) / f"scores.ref-{uuid4().hex}.lance")
    filled.compact()
    assert len(list(place(filled).glob("scores.ref-*"))) == 1
    filled.compact(older_than=0.0)
    assert len(list(place(filled).glob("scores.ref-*"))) == 0
    assert list(reopened(filled).verify()) == []


# Failing writes


def write_to_a_full_disk(path: str, pipe: Connection) -> None:
    """Files may not grow past a limit; a big call fails, a small one does not, and the big one can be repeated."""
    store, hard = LanceStore.open(path), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    for call in (
        lambda: store.append(many(10, 1, length=100_000)),
        lambda: store.append_scores("big", tiny_provenance(), [tiny_scores(huge)]),
    ):
        try:
            call()
        except StoreWriteError as error:
            pipe.send(str(error))
    store.append(many(11, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    store.append(many(10, 1, length=100_000))
    pipe.send(len(store))


def test_a_write_past_the_file_size_limit_is_a_typed_error_and_can_be_repeated(filled: LanceStore) -> None:
    filled.append([huge])
    process, pipe = started(write_to_a_full_disk, str(place(filled)))
    process.join(60)
    for _ in range(2):
        assert "File too large" in (said := pipe.recv())
        assert "nothing of this call was committed" in said
    assert pipe.recv() == 7
    store = reopened(filled)
    assert rows_of(store) == ["m", "b", "r0", "r1", "huge", "r11", "r10"]
    assert store.columns.keys() == {"teacher"}
    assert list(store.verify()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_a_typed_error(filled: LanceStore) -> None:
    for folder in place(filled).glob("rollouts-*/*/"):
        folder.chmod(0o500)
    with pytest.raises(StoreWriteError):
        filled.append(many(10, 1))


def test_a_failing_flush_says_that_what_was_committed_may_not_last(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreWriteError, match=r"flushing table .*may not survive a power cut"):
            filled.append(many(10, 1))
    filled.append(many(10, 1))
    assert rows_of(filled) == ["m", "b", "r0", "r1", "r10"]


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


IMPATIENT = {"client_max_retries": "1", "client_retry_timeout": "1"}
OPERATIONS: dict[str, Callable[[LanceStore], object]] = {
    "read": lambda store: store.read([1], ("teacher",)),
    "find": lambda store: store.find(["r0"]),
    "refresh": lambda store: store.refresh(),
    "append": lambda store: store.append(many(10, 1)),
    "append_scores": lambda store: store.append_scores("ref", tiny_provenance("ref"), [tiny_scores(tiny_rollout("b"))]),
    "compact": lambda store: store.compact(),
    "begin_generation": lambda store: store.begin_generation(1, tiny_manifest().policy),
}


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["refuse", "cut"])
def test_a_storage_that_stays_away_ends_each_call_in_one_clear_error_and_nothing_is_changed(
    s3: S3Server, proxy: FaultProxy, fault: str
) -> None:
    url = s3.new_url(".lance")
    fill(LanceStore.create(url, tiny_manifest(), storage_options=s3.storage_options))
    for name, operation in OPERATIONS.items():
        proxy.heal()
        store = LanceStore.open(url, storage_options=proxy.storage_options | IMPATIENT | {"client_max_retries": "0"})
        getattr(proxy, fault)(ALWAYS)
        with pytest.raises((StoreReadError, StoreWriteError), match=url) as caught:
            operation(store)
        assert "\n" not in str(caught.value), name
        assert rows_of(LanceStore.open(url, storage_options=s3.storage_options)) == ["m", "b", "r0", "r1"]
    proxy.heal()
    store = LanceStore.open(url, storage_options=proxy.storage_options)
    for operation in OPERATIONS.values():
        operation(store)
    assert rows_of(store) == ["m", "b", "r0", "r1", "r10"]


@pytest.mark.s3
@pytest.mark.parametrize("path", ["/_versions/", "/data/", "/columns/"])
@pytest.mark.parametrize("fault", ["refuse", "cut", "refuse_after", "cut_after"])
def test_a_write_that_meets_a_fault_is_done_once_or_ends_in_an_error_and_can_be_repeated(
    s3: S3Server, proxy: FaultProxy, fault: str, path: str
) -> None:
    store = fill(LanceStore.create(s3.new_url(".lance"), tiny_manifest(), storage_options=proxy.storage_options | IMPATIENT))
    calls = (lambda: store.append(many(10, 2)), lambda: store.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(10, 1)[0])]))
    for call in calls:
        getattr(proxy, fault)(1, "PUT", path)
        with suppress(StoreReadError, StoreWriteError):
            call()
        proxy.heal()
        call()
    again = reopened(store, s3.storage_options)
    assert rows_of(again) == ["m", "b", "r0", "r1", "r10", "r11"]
    assert again.scored("ref").tolist() == [False] * 4 + [True, False]
    assert [(commit.kind, commit.rows) for commit in again.history()][3:] == [("rollouts", 2), ("scores", 1)]
    assert list(again.verify()) == []


@pytest.mark.s3
def test_no_error_tells_a_secret(s3: S3Server) -> None:
    options = s3.storage_options | {"aws_secret_access_key": "xyzzy", "client_max_retries": "0", "client_retry_timeout": "1"}
    store = fill(LanceStore.create(s3.new_url(".lance"), tiny_manifest(), storage_options=options))
    s3.delete([key for key in s3.keys(store._files.url) if "/data/" in key])
    with pytest.raises(LopdError) as caught:
        store.read([0])
    assert store._files.url in str(caught.value)
    for text in (str(caught.value), repr(store), repr(caught.value.__cause__)):
        assert "xyzzy" not in text


def test_the_folder_of_a_trained_model_is_not_taken_for_a_damaged_store(tmp_path: Path) -> None:
    Lineage().write(tmp_path)
    with pytest.raises(StoreNotFoundError, match="lineage of a trained model"):
        open_store(tmp_path)
