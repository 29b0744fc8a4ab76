"""`ZarrStore` and `MemoryStore`: the contract, what is on disk, and workers of a data loader."""

import multiprocessing
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import zarr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from s3_server import S3Server
from zarr_stores import MACHINE, Rows, StoreMachine, _quick_disk, fill, filled, forge, many, place, rows_of, start  # noqa: F401

from lopd.backends.files import local
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.sealing import checksum
from lopd.backends.zarr.columns import ID_HALVES
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import ConflictError, CorruptStoreError, ForkedStoreError, InvalidRecordError, StoreNotFoundError
from lopd.protocols import LogprobStore
from lopd.records import Manifest, Rollout, SamplingParams, Scores, TopK
from lopd.testing import StoreConformance, assert_holds, rollouts, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores


class TestMemoryStore(StoreConformance):
    def make(self, manifest: Manifest) -> MemoryStore:
        return MemoryStore(manifest)

    def reopen(self, store: LogprobStore) -> LogprobStore:
        return store


class TestZarrStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, manifest: Manifest) -> ZarrStore:
        return ZarrStore.create(self.folder / uuid4().hex, manifest)

    def reopen(self, store: LogprobStore) -> ZarrStore:
        assert isinstance(store, ZarrStore)
        return ZarrStore.open(store._files.url, store.manifest)

    def compact(self, store: LogprobStore) -> ZarrStore:
        assert isinstance(store, ZarrStore)
        store.compact()
        return store


class TestZarrStoreInFsspec(TestZarrStore):
    def make(self, manifest: Manifest) -> ZarrStore:
        return ZarrStore.create(f"memory://{uuid4().hex}/run.zarr", manifest)


@pytest.mark.s3
class TestZarrStoreOnS3(StoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, s3: S3Server) -> None:
        self.s3 = s3

    def make(self, manifest: Manifest) -> ZarrStore:
        return ZarrStore.create(self.s3.new_url(), manifest, storage_options=self.s3.storage_options)

    def reopen(self, store: LogprobStore) -> ZarrStore:
        assert isinstance(store, ZarrStore)
        return ZarrStore.open(store._files.url, store.manifest, storage_options=self.s3.storage_options)

    def compact(self, store: LogprobStore) -> ZarrStore:
        assert isinstance(store, ZarrStore)
        store.compact()
        return store


@pytest.mark.parametrize("kind", ["memory", "zarr", "lance"])
def test_a_store_is_made_with_a_manifest_and_not_with_a_source(kind: str, tmp_path: Path) -> None:
    make: dict[str, Callable[[Any], Any]] = {
        "memory": MemoryStore,
        "zarr": lambda manifest: ZarrStore.open_or_create(tmp_path / "s", manifest),
        "lance": lambda manifest: LanceStore.create(tmp_path / "s", manifest),
    }
    with pytest.raises(InvalidRecordError, match=r"its manifest is a SamplingParams, expected a Manifest; pass `source\.manifest`"):
        make[kind](SamplingParams())
    assert not list(tmp_path.glob("s/*"))


def test_a_memory_store_equals_a_dict() -> None:
    run_state_machine_as_test(lambda: StoreMachine(lambda: MemoryStore(tiny_manifest()), lambda store: store), settings=MACHINE)


@pytest.mark.s3
def test_a_zarr_store_on_s3_equals_a_dict_under_append_score_reopen_read_and_compaction(s3: S3Server) -> None:
    def make() -> ZarrStore:
        return ZarrStore.create(s3.new_url(), tiny_manifest(), storage_options=s3.storage_options)

    def reopen(store: LogprobStore) -> ZarrStore:
        return ZarrStore.open(store._files.url, storage_options=s3.storage_options)

    few = settings(MACHINE, max_examples=3)
    run_state_machine_as_test(lambda: StoreMachine(make, reopen, lambda store: store.compact(target_tokens=8)), settings=few)


class CrashingMachine(StoreMachine):
    """The same, with writers that die: of an append, only the segment gets to the disk."""

    @rule(items=st.lists(rollouts(ids=st.sampled_from("uvwxyz"), max_tokens=3), min_size=1, max_size=2))
    def crash_before_the_commit(self, items: list[Rollout]) -> None:
        class Killed(BaseException):
            pass

        def publish(*_: object) -> bool:
            raise Killed

        victim = self.reopen_store(self.store)
        assert isinstance(victim, ZarrStore)
        victim._writer._publish = publish
        with suppress(Killed, ConflictError):
            victim.append(items)
        self.store = self.reopen_store(self.store)


def test_a_zarr_store_equals_a_dict_under_append_score_reopen_read_compaction_and_crash(tmp_path: Path) -> None:
    def make() -> ZarrStore:
        return ZarrStore.create(tmp_path / uuid4().hex, tiny_manifest())

    def machine() -> CrashingMachine:
        return CrashingMachine(make, lambda store: ZarrStore.open(place(store)), lambda store: store.compact(target_tokens=8))

    run_state_machine_as_test(machine, settings=MACHINE)


# What is on disk


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_zarr_python_reads_every_array_back_equal(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest(vocab_size))
    items = [
        tiny_rollout("one", [vocab_size - 1], behavior_logprobs=[-0.5]),
        tiny_rollout("two", [7, 8], prompt_ids=[1, 2], loss_mask=[False, True], finish_reason="length"),
    ]
    store.append(items)
    top_k = TopK([[3], [4]], [[-0.5], [-0.25]], 1 - np.exp([-0.5, -0.25]))
    store.append_scores("teacher", tiny_provenance(top_k=1), [Scores.of(items[1], [0.0, -2.0], floored=1, top_k=top_k)])
    root = zarr.open_group(tmp_path / "run.zarr", mode="r")
    assert Manifest.from_json(root.attrs["lopd"]) == tiny_manifest(vocab_size)
    ((_, rollout_group),) = root["segments"].groups()
    ((_, score_group),) = root["scores"]["teacher"].groups()
    found = {name: array[:] for group in (rollout_group, score_group) for name, array in group.arrays() if name != "lines"}
    expected = {
        "token_ids": np.array([4, vocab_size - 1, 1, 2, 7, 8], dtype),
        "rollout_ids": np.frombuffer(b"onetwo", np.uint8),
        "loss_mask": np.array([1, 0, 1], np.uint8),
        "behavior_logprobs": np.array([-0.5, np.nan, np.nan], np.float32),
        "logprobs": np.array([0.0, -2.0], np.float32),
        "top_k_ids": top_k.ids.astype(dtype),
        "top_k_logprobs": top_k.logprobs,
        "top_k_tail": top_k.tail,
        "id_hashes": rollout_group["lines"][:, ID_HALVES],
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    lines = {name: rollout_group["lines"][:, i] for i, name in enumerate(rollout_group["lines"].attrs["fields"])}
    wanted = {"prompt_length": [1, 2], "response_length": [1, 2], "token_start": [0, 2], "response_start": [0, 1], "finish_reason": [0, 1]}
    assert {name: lines[name].tolist() for name in wanted} == wanted
    hashes = np.stack([lines["content_hash_0"], lines["content_hash_1"]], axis=1)
    assert [row.tobytes() for row in hashes] == [rollout.content_hash for rollout in items]
    scores = dict(zip(score_group["lines"].attrs["fields"], score_group["lines"][0].tolist(), strict=True))
    assert (scores["row"], scores["length"], scores["floored"]) == (1, 2, 1)


def test_a_flipped_bit_is_noticed_in_every_file_that_is_read_and_by_verify_in_the_others(filled: ZarrStore) -> None:
    root, rng = place(filled), random.Random(0)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) >= 30
    expected = [row.rollout for row in filled.read(range(4))]
    for path in files:
        data = path.read_bytes()
        for _ in range(25 if path.suffix == ".json" and path.parent in (root, root / "commits") else 4):
            bit = rng.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            # A manifest whose key is damaged looks like somebody else's group.
            allowed = (CorruptStoreError, StoreNotFoundError) if path.parent == root else CorruptStoreError
            noticed = False
            try:
                assert_holds(ZarrStore.open(root), expected)
                ZarrStore.open(root).read([1, 3], ("teacher",), top_k=("teacher",))
            except allowed:
                noticed = True
            # What the commit record has too, and what fills gaps between values, no read needs.
            assert noticed or path.name == "zarr.json" or path.parent.name in ("loss_mask", "behavior_logprobs", "sampler_logprobs")
            if path.parent not in (root, root / "commits"):
                (problem,) = ZarrStore.open(root).verify()
                assert str(path.relative_to(root)) in problem
        path.write_bytes(data)
    assert_holds(ZarrStore.open(root), expected)
    assert list(ZarrStore.open(root).verify()) == []


def test_a_lost_file_is_noticed(filled: ZarrStore) -> None:
    (place(filled) / "commits/0000000001.json").rename(place(filled) / "kept")
    with pytest.raises(CorruptStoreError, match=r"a commit record is missing.*0000000000.json.*0000000001.json"):
        ZarrStore.open(place(filled))
    (place(filled) / "kept").rename(place(filled) / "commits/0000000001.json")
    for path in place(filled).glob("segments/*/token_ids/c.0"):
        path.unlink()
    with pytest.raises(CorruptStoreError, match=r"run.zarr: segment .*'token_ids'.*its file is missing"):
        ZarrStore.open(place(filled)).read([0])


def test_lengths_and_coverage_read_neither_tokens_nor_scores(filled: ZarrStore) -> None:
    for path in [*place(filled).glob("segments/*/token_ids/c.0"), *place(filled).glob("scores/*/*/logprobs/c.0")]:
        path.unlink()
    store = ZarrStore.open(place(filled))
    np.testing.assert_array_equal(store.lengths(), [[1, 3]] * 4)
    np.testing.assert_array_equal(store.scored("teacher"), [False, True, False, True])
    np.testing.assert_array_equal(store.scored("behavior"), [False, True, False, False])


def test_scores_that_belong_to_other_tokens_are_refused_at_read(tmp_path: Path) -> None:
    stores = [ZarrStore.create(tmp_path / name, tiny_manifest()) for name in ("x", "y")]
    for store, response in zip(stores, ([7, 8], [8, 7]), strict=True):
        store.append([tiny_rollout("r", response)])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("r", response))])
    # Somebody copies the scores of one store, with their commit record, into the other.
    shutil.rmtree(tmp_path / "x/scores")
    shutil.copytree(tmp_path / "y/scores", tmp_path / "x/scores")
    shutil.copy(tmp_path / "y/commits/0000000001.json", tmp_path / "x/commits/0000000001.json")
    with pytest.raises(CorruptStoreError, match=r"commits/0000000001.json has store .*expected"):
        ZarrStore.open(tmp_path / "x")
    # and even makes it look as if it were of this store
    previous = (tmp_path / "x/commits/0000000000.json").read_bytes()
    forge(tmp_path / "x/commits/0000000001.json", store=stores[0]._root.creation, previous=checksum(previous))
    with pytest.raises(CorruptStoreError, match=r"scores/teacher/.*row 0 were computed on other tokens"):
        ZarrStore.open(tmp_path / "x").read([0], ("teacher",))


def test_a_torn_append_is_invisible(filled: ZarrStore) -> None:
    filled.append(many(2, 1))
    # Killed just before its record was linked: the segment is there, the record has only its temporary name.
    (place(filled) / "commits/0000000003.json").rename(place(filled) / "commits/.tmp-0")
    (place(filled) / "head/0000000003").rename(place(filled) / "head/0000000002")
    store = ZarrStore.open(place(filled))
    assert (len(store), store.find(["r2"]).tolist()) == (4, [-1])
    store.append(many(2, 2))
    assert rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1", "r2", "r3"]


def test_more_files_than_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_OPEN_FILES", 2)
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    for i in range(5):
        store.append(many(i, 1))
    rows = store.read([4, 0, 1, 2, 3, 4, 0])
    assert [row.rollout.rollout_id for row in rows] == ["r4", "r0", "r1", "r2", "r3", "r4", "r0"]
    assert_holds(store, many(0, 5))


class ClosedMeanwhile(OrderedDict[str, Any]):
    """Open files that another thread closes between two steps of a read."""

    def move_to_end(self, key: str, last: bool = True) -> None:
        self.clear()
        super().move_to_end(key, last)


def test_a_file_that_another_thread_closes_meanwhile_is_read(filled: ZarrStore) -> None:
    filled._files._open = ClosedMeanwhile()
    assert rows_of(filled) == rows_of(filled) == ["m", "b", "r0", "r1"]


# Data loader workers


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_data_loader_workers_read_a_local_store(filled: ZarrStore, method: str) -> None:
    filled.read([0])
    loader = torch.utils.data.DataLoader(Rows(filled), batch_size=None, num_workers=2, multiprocessing_context=method)
    found = list(loader)
    assert [ids for _, ids in found] == [row.rollout.response_ids.tolist() for row in filled.read(range(4))]
    assert os.getpid() not in {pid for pid, _ in found}


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_store_on_s3_tells_a_forked_process_to_be_spawned(s3: S3Server) -> None:
    store = fill(ZarrStore.create(s3.new_url(), tiny_manifest(), storage_options=s3.storage_options))

    def work(pipe: multiprocessing.connection.Connection) -> None:
        for attempt in (lambda: store.read([0]), lambda: ZarrStore.open(store._files.url, storage_options=s3.storage_options)):
            try:
                attempt()
            except ForkedStoreError as error:
                pipe.send(str(error))

    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = start(work, theirs)
    process.join(60)
    assert process.exitcode == 0
    assert "forkserver" in ours.recv()
    assert "forkserver" in ours.recv()


@pytest.mark.s3
def test_spawned_workers_read_a_store_on_s3(s3: S3Server) -> None:
    store = fill(ZarrStore.create(s3.new_url(), tiny_manifest(), storage_options=s3.storage_options))
    loader = torch.utils.data.DataLoader(Rows(store), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [ids for _, ids in loader] == [row.rollout.response_ids.tolist() for row in store.read(range(4))]
