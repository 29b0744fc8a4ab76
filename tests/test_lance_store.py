"""`LanceStore`: the contract, places, what is stored, and snapshots.

Kills and many processes at once are in `test_store_kills.py`, for all backends.
"""

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from attrs import evolve
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from lance_stores import filled, reopened, table_of  # noqa: F401
from s3_server import S3Server
from zarr_stores import MACHINE, StoreMachine, _quick_disk, fill, many, place, rows_of  # noqa: F401

from lopd import score_rollouts
from lopd.backends.lance import encode
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import Database, LanceTable
from lopd.backends.opening import open_store
from lopd.errors import (
    CorruptStoreError,
    InvalidRecordError,
    ManifestMismatchError,
    MissingDependencyError,
    MissingScoresError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreWriteError,
)
from lopd.protocols import LogprobStore
from lopd.records import Lineage, Manifest, ModelId, Scores
from lopd.testing import StoreConformance, assert_same_top_k, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.verbs import filling


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


def sent(store: LanceStore) -> LanceStore:
    """Send the store as a worker process of a data loader gets it."""
    return pickle.loads(pickle.dumps(store))  # noqa: S301  # our own bytes, made a moment ago


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
    for name, words in (("nothing", "is not there"), ("foreign", "is not a store"), ("foreign/file", "is not a store")):
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
    path.write_text(path.read_text().replace('"schema_version":2', '"schema_version":3'))
    with pytest.raises(CorruptStoreError, match="schema_version is 3, expected 1 or 2"):
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


@pytest.mark.parametrize("package", ["lancedb", "lance"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lopd\[lance\]'"):
        LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    assert not (tmp_path / "run.lance").exists()


def test_the_folder_of_a_trained_model_is_not_taken_for_a_damaged_store(tmp_path: Path) -> None:
    Lineage().write(tmp_path)
    with pytest.raises(StoreNotFoundError, match="lineage of a trained model"):
        open_store(tmp_path)


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


def test_a_column_of_another_tool_that_may_not_be_empty_is_named(filled: LanceStore) -> None:
    table_of(filled, "rollouts").add_columns({"note": "response_length + 1"})
    with pytest.raises(StoreWriteError, match="has a column 'note' of another tool that may not be empty"):
        filled.append(many(10, 1))
    table_of(filled, "rollouts").alter_columns({"path": "note", "nullable": True})
    filled.append(many(10, 1))
    assert rows_of(reopened(filled))[-1] == "r10"
    assert list(filled.verify()) == []


@pytest.mark.parametrize("kind", [pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int64())])
def test_a_column_of_another_tool_that_lance_cannot_leave_empty_is_named(kind: Any, filled: LanceStore) -> None:
    for i in range(4):
        filled.append(many(10 + i, 1))
    table_of(filled, "rollouts").add_columns(pa.schema([pa.field("note", kind)]))
    for write in (filled.compact, lambda: filled.append(many(20, 1))):
        with pytest.raises(StoreWriteError, match=r"failed with .*note.*, so drop that column of another tool \(`drop_columns`\)"):
            write()
    table_of(filled, "rollouts").drop_columns(["note"])
    filled.append(many(20, 1))
    filled.compact()
    assert rows_of(reopened(filled))[-1] == "r20"


def test_an_empty_store_has_no_table_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingScoresError, match="no table of rollouts; append some first"):
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


def test_a_scored_batch_of_more_values_than_one_append_can_hold_is_committed_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_MOST_VALUES", 1000)
    monkeypatch.setattr(filling, "_VALUES", 500)
    store, provenance = LanceStore.create(tmp_path / "run.lance", tiny_manifest()), tiny_provenance(top_k=10)
    rollouts = [tiny_rollout(f"r{i}", [5] * 30) for i in range(10)]
    store.append(rollouts)
    made = {r.rollout_id: evolve(tiny_scores(r, -0.5 * i), top_k=tiny_top_k(30, 10, start=i)) for i, r in enumerate(rollouts)}
    with pytest.raises(InvalidRecordError, match=r"3000 values.*append fewer rollouts"):
        store.append_scores("other", provenance, list(made.values()))
    scorer = SimpleNamespace(provenance=provenance, score=lambda rollouts: [made[rollout.rollout_id] for rollout in rollouts])
    assert score_rollouts(store, scorer, column="other", preflight=None).rollouts == 10
    for row in reopened(store).read(range(10), ("other",), ("other",)):
        scores = made[row.rollout.rollout_id]
        np.testing.assert_array_equal(row.scores["other"], scores.logprobs)
        assert scores.top_k is not None
        assert_same_top_k(row.top_k["other"], scores.top_k)


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
    """Return which files and folders were flushed, and in which state: a file may have got its name later."""
    found: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        found[status.st_ino] = status.st_mtime_ns

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def not_flushed(store: LanceStore, flushed: dict[int, int]) -> list[Path]:
    # How far a table has come need not survive a power cut; it is marked at the end, in a new folder of the store.
    paths = [path for path in place(store).rglob("*") if ".head" not in str(path.relative_to(place(store)))]
    assert place(store).stat().st_ino in flushed
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


def test_verify_reads_fewer_rows_at_once_where_their_values_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, looked = LanceStore.create(tmp_path / "run.lance", tiny_manifest()), list[tuple[int, bool]]()
    store.append(many(0, 12))
    for column, k in (("plain", 0), ("wide", 50)):
        scores = [evolve(tiny_scores(rollout), top_k=tiny_top_k(3, k) if k else None) for rollout in many(0, 12)]
        store.append_scores(column, tiny_provenance(column, top_k=k), scores)
    read = Snapshot.read
    monkeypatch.setattr(Snapshot, "read", lambda self, rows, *asked: looked.append((len(rows), bool(asked[1]))) or read(self, rows, *asked))
    monkeypatch.setattr("lopd.backends.lance.store.VALUES_AT_ONCE", 4 * (1 + 3 * (4 + 1 + 2 * 50)))
    assert list(store.verify()) == []
    assert looked == [(12, False), (12, False), (4, True), (4, True), (4, True)]


def test_columns_that_no_row_asked_for_has_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = list[set[str]](), LanceTable.take
    monkeypatch.setattr(LanceTable, "take", lambda self, offsets, columns: asked.append({*columns}) or real(self, offsets, columns))
    drawn = evolve(tiny_rollout("b"), behavior_logprobs=np.full(tiny_rollout("b").response_ids.size, -1.0, np.float32))
    store = LanceStore.create(tmp_path / "store", tiny_manifest())
    store.append([tiny_rollout("a"), drawn])
    store.lengths()
    without, both = store.read([0]), (asked.clear(), store.read([1, 0]))[1]
    assert without.behavior_logprobs is None
    assert both[0].rollout.behavior_logprobs is not None
    store.read([0])
    assert asked == [{"rollout_id", "finish_reason", "token_ids", "loss_mask", "behavior_logprobs"}, asked[0] - {"behavior_logprobs"}]


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


def test_a_copy_of_an_older_lopd_has_no_identities_of_its_versions(filled: LanceStore) -> None:
    kind, (files, _, (state, versions)) = filled.__reduce__()
    copy = kind(files, None, (state, {name: seen[:2] for name, seen in versions.items()}))
    filled.append(many(10, 1))
    assert rows_of(copy) == ["m", "b", "r0", "r1"]
    copy.refresh()
    assert rows_of(copy) == ["m", "b", "r0", "r1", "r10"]


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
    with pytest.raises(CorruptStoreError, match="refresh the store"):
        reader.table()
    reader.refresh()
    assert reader.table().count_rows() == 4
    assert rows_of(reader) == ["m", "b", "r0", "r1"]


def test_a_table_that_did_not_change_is_not_opened_again_to_be_read(filled, monkeypatch):
    opened, view = [], Database.view
    monkeypatch.setattr(Database, "view", lambda self, name, version: opened.append(name) or view(self, name, version))
    store = reopened(filled)
    for _ in range(3):
        store.read([0, 1])
        store.refresh()
    assert len(opened) == 1
    store.append([tiny_rollout("another")])
    before = len(opened)
    assert store.read([len(store) - 1])[0].rollout.rollout_id == "another"
    assert len(opened) == before + 1
