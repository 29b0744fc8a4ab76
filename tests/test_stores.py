"""Stores: the contract, and what a disk, a kill and a second process can do to one that is on disk."""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import zarr
from attrs import evolve
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from s3_server import S3Server

from lopd.backends.files import local
from lopd.backends.files.local import LocalFiles
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.opening import open_store
from lopd.backends.sealing import seal, unseal
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import (
    ConflictError,
    CorruptStoreError,
    ForkedStoreError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    MissingScoresError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreWriteError,
)
from lopd.protocols import LogprobStore
from lopd.records import Manifest, ModelId, Rollout, SamplingParams, Scores, TopK
from lopd.testing import (
    StoreConformance,
    assert_holds,
    assert_same_rollout,
    rollouts,
    scores_for,
    tiny_manifest,
    tiny_provenance,
    tiny_rollout,
    tiny_scores,
    tiny_top_k,
)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing cuts the power here, and flushing would be most of the time.  Whether it happens, and when, has tests of its own below.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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


def place(store: ZarrStore) -> Path:
    """The folder of a local store."""
    return Path(store._files.url)


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


class StoreMachine(RuleBasedStateMachine):
    """A store against a dict of rollouts and a dict of scores per column."""

    def __init__(
        self,
        make: Callable[[], LogprobStore],
        reopen: Callable[[LogprobStore], LogprobStore],
        compact: Callable[[Any], None] = lambda store: None,
    ) -> None:
        super().__init__()
        self.store, self.reopen_store, self.compact_store = make(), reopen, compact
        self.rollouts: dict[str, Rollout] = {}
        self.columns: dict[str, tuple[str, dict[str, Scores]]] = {}
        self.reasons: dict[str, dict[str, str]] = {}

    @rule(items=st.lists(rollouts(ids=st.sampled_from("abcdef"), max_tokens=3), max_size=3), again=st.booleans())
    def append(self, items: list[Rollout], again: bool) -> None:
        items = [*items, *self.rollouts.values()] if again else items
        after = dict(self.rollouts)
        for item in items:
            if after.setdefault(item.rollout_id, item).content_hash != item.content_hash:
                with pytest.raises(ConflictError):
                    self.store.append(items)
                return
        self.store.append(items)
        self.rollouts = after

    @precondition(lambda self: self.rollouts)
    @rule(data=st.data(), column=st.sampled_from(["teacher", "ref"]), model=st.sampled_from(["A", "A", "B"]))
    def append_scores(self, data: st.DataObject, column: str, model: str) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.rollouts.values())), min_size=1, max_size=3))
        scores = [data.draw(scores_for(rollout)) for rollout in chosen]
        owner, held = self.columns.get(column, (model, {}))
        if owner != model:
            with pytest.raises(ConflictError):
                self.store.append_scores(column, tiny_provenance(model), scores)
            return
        self.store.append_scores(column, tiny_provenance(model), scores)
        self.columns[column] = owner, {**{score.rollout_id: score for score in reversed(scores)}, **held}

    @precondition(lambda self: self.rollouts)
    @rule(data=st.data(), column=st.sampled_from(["teacher", "ref"]), model=st.sampled_from(["A", "A", "B"]))
    def quarantine(self, data: st.DataObject, column: str, model: str) -> None:
        chosen = data.draw(st.dictionaries(st.sampled_from(list(self.rollouts)), st.text(max_size=3), min_size=1, max_size=3))
        owner, held = self.columns.get(column, (model, {}))
        if owner != model:
            with pytest.raises(ConflictError):
                self.store.quarantine(column, tiny_provenance(model), chosen)
            return
        self.store.quarantine(column, tiny_provenance(model), chosen)
        new = {rollout_id: reason for rollout_id, reason in chosen.items() if rollout_id not in held}
        if new:
            self.columns.setdefault(column, (model, {}))
            self.reasons.setdefault(column, {}).update(new)

    @rule()
    def reopen(self) -> None:
        self.store = self.reopen_store(self.store)

    @rule()
    def compact(self) -> None:
        self.compact_store(self.store)

    @precondition(lambda self: self.rollouts)
    @rule(data=st.data(), column=st.sampled_from(["teacher", "ref"]))
    def read(self, data: st.DataObject, column: str) -> None:
        indices = data.draw(st.lists(st.integers(0, len(self.rollouts) - 1), max_size=4))
        held = self.columns.get(column, ("", {}))[1]
        asked = [list(self.rollouts)[index] for index in indices]
        if not all(rollout_id in held for rollout_id in asked):
            with pytest.raises(MissingScoresError):
                self.store.read(indices, (column,))
            return
        for rollout_id, row in zip(asked, self.store.read(indices, (column,)), strict=True):
            assert_same_rollout(row.rollout, self.rollouts[rollout_id])
            np.testing.assert_array_equal(row.scores[column], held[rollout_id].logprobs)

    @invariant()
    def holds_what_the_dicts_hold(self) -> None:
        assert_holds(self.store, list(self.rollouts.values()))
        assert {name: provenance.model.name for name, provenance in self.store.columns.items()} == {
            name: owner for name, (owner, _) in self.columns.items()
        }
        for name, (_, held) in self.columns.items():
            np.testing.assert_array_equal(self.store.scored(name), [rollout_id in held for rollout_id in self.rollouts])
            waiting = {rollout_id: reason for rollout_id, reason in self.reasons.get(name, {}).items() if rollout_id not in held}
            rows = list(self.rollouts)
            assert {rows[row]: reason for row, reason in self.store.quarantined(name).items()} == waiting


MACHINE = settings(max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


def many(start: int, n: int, length: int = 3) -> list[Rollout]:
    """Rollouts that can be made again from their number."""
    return [tiny_rollout(f"r{i}", (np.arange(length) + i) % 300) for i in range(start, start + n)]


def fill(store: ZarrStore) -> ZarrStore:
    """Two segments of rollouts of all kinds, one of scores with top-k."""
    store.append(
        [tiny_rollout("m", loss_mask=[True, False, True]), tiny_rollout("b", behavior_logprobs=[0, -1, -2], finish_reason="length")]
    )
    store.append(many(0, 2))
    scores = [evolve(tiny_scores(row.rollout), top_k=tiny_top_k(3)) for row in store.read([1, 3])]
    store.append_scores("teacher", tiny_provenance(top_k=2), scores)
    return store


@pytest.fixture
def filled(tmp_path: Path) -> ZarrStore:
    """See `fill`."""
    return fill(ZarrStore.create(tmp_path / "run.zarr", tiny_manifest()))


def sent(store: ZarrStore) -> ZarrStore:
    """As a worker process of a data loader gets it."""
    return pickle.loads(pickle.dumps(store))  # noqa: S301  # our own bytes, made a moment ago


def rows_of(store: ZarrStore) -> list[str]:
    return [row.rollout.rollout_id for row in store.read(range(len(store)))]


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
            # What the commit record says too, and what fills gaps between values, no read needs.
            assert noticed or path.name == "zarr.json" or path.parent.name in ("loss_mask", "behavior_logprobs")
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
    with pytest.raises(CorruptStoreError, match=r"scores/teacher/.*row 0 were computed on other tokens"):
        ZarrStore.open(tmp_path / "x").read([0], ("teacher",))


def test_a_torn_append_is_invisible(filled: ZarrStore) -> None:
    filled.append(many(2, 1))
    # Killed just before its record was linked: the segment is there, the record has only its temporary name.
    (place(filled) / "commits/0000000003.json").rename(place(filled) / "commits/.tmp-0")
    store = ZarrStore.open(place(filled))
    assert (len(store), store.find(["r2"]).tolist()) == (4, [-1])
    store.append(many(2, 2))
    assert rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1", "r2", "r3"]


def test_more_segments_than_maps_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_OPEN_MAPS", 2)
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    for i in range(5):
        store.append(many(i, 1))
    rows = store.read([4, 0, 1, 2, 3, 4, 0])
    assert [row.rollout.rollout_id for row in rows] == ["r4", "r0", "r1", "r2", "r3", "r4", "r0"]
    assert_holds(store, many(0, 5))


# Failing writes


def attempt(store: ZarrStore, left: list[int], moment: int) -> StoreWriteError | None:
    left[0] = moment
    try:
        store.append([tiny_rollout(f"r{moment}")])
    except StoreWriteError as error:
        return error
    return None


def test_a_write_that_fails_at_any_flush_commits_nothing_and_the_store_stays_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [0]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    failures, committed = 0, 0
    while error := attempt(store, left, moment=failures + 1):
        failures += 1
        assert isinstance(error.__cause__, OSError)
        # Only the last flushes come after the commit; then the rows are there, and the message does not say otherwise.
        there = ZarrStore.open(place(store)).find([f"r{failures}"])[0] >= 0
        assert ("nothing of this call was committed" in str(error)) == (not there)
        committed += int(there)
        assert len(list(place(store).glob("segments/*/"))) == len(ZarrStore.open(place(store)))
    assert failures > 10
    left[0] = 0
    store.append(many(500, 2))
    assert len(ZarrStore.open(place(store))) == len(store) == 3 + committed


def test_a_failing_score_write_names_the_store(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        with pytest.raises(StoreWriteError, match=r"Store .*run.zarr: the write failed with .*quota.*nothing.*committed"):
            filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(filled.read([0])[0].rollout)])
    assert dict(filled.columns).keys() == {"teacher"}
    assert not list(place(filled).glob("scores/ref/*/"))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(filled.read([0])[0].rollout)])
    assert ZarrStore.open(place(filled)).scored("ref").tolist() == [True, False, False, False]


def test_everything_a_commit_record_names_is_flushed_before_the_record_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, flushed = (tmp_path / "run.zarr").resolve(), {}
    real_fsync, real_link = os.fsync, os.link

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        flushed[path] = {child.name for child in path.iterdir()} if path.is_dir() else set()
        real_fsync(descriptor)

    def link(source: Path, target: Path) -> None:
        if target.parent.name == "commits":
            assert source in flushed
            paths = [path for path in root.rglob("*") if path.parent.name != "commits"]
            assert [path for path in paths if path.name not in flushed.get(path.parent, ())] == []
            # What is outside a segment was linked into place, and shares the bytes of a temporary file that was flushed.
            written = {path for path in paths if path.is_file() and any(len(part) == 32 for part in path.relative_to(root).parts)}
            assert len(written) > 6
            assert written <= flushed.keys()
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    store = ZarrStore.create(root, tiny_manifest())
    store.append(many(0, 2))
    assert flushed[root / "commits"] == {"0000000000.json"}
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in many(0, 2)])
    assert flushed[root / "commits"] == {"0000000000.json", "0000000001.json"}


def start(work: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """Run it in a forked process: a fresh interpreter would spend its life importing torch."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    with warnings.catch_warnings():
        # numpy's idle threads; nothing the child needs is in their hands.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def test_a_write_past_the_file_size_limit_is_a_typed_error(filled: ZarrStore) -> None:
    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
        with pytest.raises(StoreWriteError, match="File too large"):
            filled.append(many(10, 1, length=100_000))
        filled.append(many(11, 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        filled.append(many(10, 1, length=100_000))

    process = start(work)
    process.join()
    assert process.exitcode == 0
    assert rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1", "r11", "r10"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_a_typed_error(filled: ZarrStore) -> None:
    (place(filled) / "segments").chmod(0o500)
    with pytest.raises(StoreWriteError):
        filled.append(many(10, 1))


# Several processes


def test_a_killed_writer_loses_nothing_it_acknowledged_and_leaves_nothing_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real, slow disk: more instants to be killed at.
    monkeypatch.undo()
    root, rng = tmp_path / "run.zarr", random.Random(1)
    ZarrStore.create(root, tiny_manifest())

    def work(pipe: multiprocessing.connection.Connection) -> None:
        store = ZarrStore.open(root)
        while True:
            n = len(store)
            store.append(many(n, 3))
            pipe.send("rollouts")
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in many(n, 3)])
            pipe.send("scores")

    acknowledged = {"rollouts": 0, "scores": 0}
    for trial in range(15):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = start(work, theirs)
        theirs.close()
        # Most are killed some time after their first answer, however slow the disk is; some even before it.
        assert trial % 3 == 0 or ours.poll(60)
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.join()
        while True:
            try:
                acknowledged[ours.recv()] += 3
            except EOFError:
                break
        store = ZarrStore.open(root)
        covered = np.flatnonzero(store.scored("teacher"))
        assert len(store) >= acknowledged["rollouts"]
        assert covered.size >= acknowledged["scores"]
        assert_holds(store, many(0, len(store)))
        # Calls were about three rows each, and none of them is there in part.
        assert len(store) % 3 == 0
        assert set(store.scored("teacher").reshape(-1, 3).sum(axis=1)) <= {0, 3}
        assert all(row.scores["teacher"].tolist() == [-1.0] * 3 for row in store.read(covered, ("teacher",)))
    assert acknowledged["rollouts"] >= 30


def test_processes_that_append_at_the_same_time_lose_nothing_and_write_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    root = tmp_path / "run.zarr"
    ZarrStore.create(root, tiny_manifest())

    def work(first: int) -> None:
        store = ZarrStore.open(root)
        for i in range(6):
            store.append([*many(first + 2 * i, 2), *many(500 + i, 1)])
            shared = many(500 + i, 1)
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in shared])

    processes = [start(work, first) for first in (0, 100, 200)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = ZarrStore.open(root)
    expected = {f"r{first + i}" for first in (0, 100, 200) for i in range(12)} | {f"r{500 + i}" for i in range(6)}
    assert (len(store), set(rows_of(store))) == (42, expected)
    assert rows_of(store) == rows_of(ZarrStore.open(root))
    assert store.scored("teacher").sum() == 6
    assert sum(commit.rows for commit in store.history()) == 48


def test_two_models_that_race_for_a_column_do_not_share_it(filled: ZarrStore) -> None:
    late = ZarrStore.open(place(filled))
    rollout = filled.read([0])[0].rollout
    filled.append_scores("ref", tiny_provenance("A"), [tiny_scores(rollout)])
    with pytest.raises(ConflictError):
        late.append_scores("ref", tiny_provenance("B"), [tiny_scores(rollout)])


def test_a_writer_that_lost_the_race_drops_rows_that_are_there_by_now(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other, real, raced = ZarrStore.open(place(filled)), os.link, []

    def link(source: Path, target: Path) -> None:
        if not raced and target.parent.name == "commits":
            raced.append(1)
            other.append(many(50, 1))
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    filled.append(many(50, 2))
    assert rows_of(filled) == rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1", "r50", "r51"]
    assert len(list(place(filled).glob("segments/*/"))) == 4


def test_a_reader_keeps_its_snapshot_until_it_refreshes(filled: ZarrStore) -> None:
    reader, copied = ZarrStore.open(place(filled)), sent(filled)
    filled.append(many(10, 1))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(filled.read([0])[0].rollout)])
    for store in (reader, copied, sent(reader)):
        assert (len(store), store.scored("ref").tolist(), len(store.columns)) == (4, [False] * 4, 1)
        store.refresh()
        assert (len(store), store.scored("ref").sum(), len(store.columns)) == (5, 1, 2)


# Opening


def test_creating_over_anything_is_refused(filled: ZarrStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    for path in (place(filled), tmp_path / "other", tmp_path / "other/file"):
        with pytest.raises(StoreExistsError, match=path.name):
            ZarrStore.create(path, tiny_manifest())
    with pytest.raises(StoreExistsError, match="no store"):
        ZarrStore.open_or_create(tmp_path / "other", tiny_manifest())
    assert len(ZarrStore.open_or_create(place(filled), tiny_manifest())) == 4


def test_an_empty_folder_will_do_and_so_will_what_a_killed_creator_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1").touch()
    assert len(ZarrStore.open_or_create(str(tmp_path), tiny_manifest())) == 0
    assert len(ZarrStore.open_or_create(tmp_path / "deep/er/run.zarr", tiny_manifest())) == 0


def test_opening_what_is_no_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{"mine":1}}')
    (tmp_path / "file").touch()
    for name, words in (("missing", "is not there"), ("foreign", "without a lopd manifest"), ("file", "is no store"), (".", "is no store")):
        with pytest.raises(StoreNotFoundError, match=words):
            ZarrStore.open(tmp_path / name)
    with pytest.raises(StoreNotFoundError, match="without a lopd manifest"):
        ZarrStore.open_or_create(tmp_path / "foreign", tiny_manifest())


@pytest.mark.parametrize("make", [ZarrStore.create, ZarrStore.open, ZarrStore.open_or_create])
def test_a_url_that_nobody_can_open_is_refused(make: Callable[[str, Manifest], ZarrStore]) -> None:
    with pytest.raises(StorePathError, match=r"nonsense://bucket/run.zarr.*expected a URL it knows"):
        make("nonsense://bucket/run.zarr", tiny_manifest())


def test_another_manifest_is_refused_and_the_field_is_named(filled: ZarrStore) -> None:
    other = evolve(tiny_manifest(), policy=ModelId("policy", "rev-q", "float32"))
    for make in (ZarrStore.open, ZarrStore.open_or_create):
        with pytest.raises(ManifestMismatchError, match=r"run.zarr: policy.revision is .*rev-p.*, expected .*rev-q.*;"):
            make(place(filled), other)


def test_another_schema_version_is_refused(filled: ZarrStore) -> None:
    path = place(filled) / "zarr.json"
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(CorruptStoreError, match="schema_version is 2, expected 1"):
        ZarrStore.open(place(filled))


def test_a_relative_path_keeps_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = ZarrStore.create("run.zarr", tiny_manifest())
    monkeypatch.chdir("/")
    store.append(many(0, 1))
    assert len(ZarrStore.open(tmp_path / "run.zarr")) == 1
    assert repr(store) == f"Store {tmp_path}/run.zarr"


def test_the_message_for_a_second_model_is_the_one_we_promise(filled: ZarrStore) -> None:
    old, new = (evolve(tiny_provenance(), model=ModelId(name, "main", "bf16")) for name in ("Qwen3-8B", "Qwen3-32B"))
    scores = [tiny_scores(filled.read([0])[0].rollout)]
    filled.append_scores("t", old, scores)
    with pytest.raises(ConflictError) as caught:
        filled.append_scores("t", new, scores)
    words = "column 't' was scored by Qwen3-8B@main, expected Qwen3-32B@main; write another column or score with the same model."
    assert str(caught.value) == f"{filled!r}: {words}"
    with pytest.raises(ConflictError, match="float32"):
        filled.append_scores("t", evolve(old, model=evolve(old.model, dtype="float32")), scores)
    with pytest.raises(ConflictError, match=r"was scored with engine 'made-up 1.0', expected 'other'"):
        filled.append_scores("t", evolve(old, engine="other"), scores)
    assert isinstance(caught.value, LopdError)


def test_half_the_bytes_cost_a_rounding_that_each_commit_reports(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest(), logprob_dtype="float16")
    full = np.array([-0.1, -1e-9, -77.7], np.float32)
    store.append([tiny_rollout("r", behavior_logprobs=full)])
    store.append_scores("teacher", tiny_provenance(), [Scores.of(tiny_rollout("r"), full / 2)])
    row = ZarrStore.open(store._files.url).read([0], ("teacher", "behavior"))[0]
    for commit, column, values in zip(store.history(), ("behavior", "teacher"), (full, full / 2), strict=True):
        np.testing.assert_array_equal(row.scores[column], values.astype(np.float16).astype(np.float32))
        assert commit.rounding == np.abs(row.scores[column] - values).max() > 0
    assert (row.scores["teacher"] <= 0).all()
    with pytest.raises(InvalidRecordError, match=r"'low'.*-70000.*at least -65504"):
        store.append([tiny_rollout("low", [1], behavior_logprobs=[-70000.0])])
    assert len(ZarrStore.open(store._files.url)) == 1


def test_a_storage_type_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecordError, match="bfloat16"):
        ZarrStore.create(tmp_path / "run.zarr", tiny_manifest(), logprob_dtype="bfloat16")
    assert not (tmp_path / "run.zarr").exists()


# Many commits


def test_opening_reads_the_latest_checkpoint_and_the_records_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    for i in range(130):
        store.append(many(i, 1))
    names = sorted(path.name for path in (tmp_path / "run.zarr/checkpoints").iterdir())
    assert names == ["0000000064.json", "0000000128.json"]
    asked: list[str] = []
    real = LocalFiles.read
    monkeypatch.setattr(LocalFiles, "read", lambda self, path: asked.append(path) or real(self, path))
    again = ZarrStore.open(tmp_path / "run.zarr")
    assert asked == ["zarr.json", "checkpoints/0000000128.json", "commits/0000000128.json", "commits/0000000129.json"]
    assert_holds(again, many(0, 130))
    assert [commit.number for commit in again.history()] == list(range(130))


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_a_place_is_listed_once_and_its_root_read_once(
    kind: type[ZarrStore | LanceStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, listed = LocalFiles.read, LocalFiles.names
    asked: list[str] = []
    monkeypatch.setattr(LocalFiles, "read", lambda self, path: asked.append(path) or read(self, path))
    monkeypatch.setattr(LocalFiles, "names", lambda self, folder: asked.append(folder) or listed(self, folder))
    root = "zarr.json" if kind is ZarrStore else "lopd.json"
    # The catalog of a LanceStore is a listing of its own, of the same folder.
    lists = 1 if kind is ZarrStore else 2
    kind.create(tmp_path / "run", tiny_manifest())
    assert (asked.count(""), asked.count(root)) == (lists, 0)
    for attempt in (lambda: open_store(tmp_path / "run"), lambda: kind.open_or_create(tmp_path / "run", tiny_manifest())):
        asked.clear()
        attempt()
        assert (asked.count(""), asked.count(root)) == (lists, 1)
    asked.clear()
    kind.open(tmp_path / "run", tiny_manifest())
    assert (asked.count(""), asked.count(root)) == (lists - 1, 1)


def test_a_copy_sees_the_snapshot_of_its_original_also_behind_later_checkpoints(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    for i in range(70):
        store.append(many(i, 1))
        if i == 10:
            early = pickle.dumps(store)
    assert_holds(pickle.loads(early), many(0, 11))  # noqa: S301
    (tmp_path / "run.zarr/commits/0000000003.json").unlink()
    with pytest.raises(CorruptStoreError, match="a commit record is missing"):
        pickle.loads(early)  # noqa: S301
    (problem,) = ZarrStore.open(tmp_path / "run.zarr").verify()
    assert "a commit record is missing" in problem


def test_a_checkpoint_that_cannot_be_written_does_not_fail_the_append(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CommitLog, "put_checkpoint", refuse)
    filled.compact()
    assert len(filled.history()) == 4
    assert_holds(ZarrStore.open(place(filled)), [row.rollout for row in filled.read(range(4))])


# Compaction


def test_compaction_leaves_few_large_segments_and_sorts_scores_by_row(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    items = many(0, 12)
    for item in items:
        store.append([item])
    for i in (7, 3, 11, 0, 5, 1, 2, 4, 6, 8, 9, 10):
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[i], -i)])
    before = {path.name for path in place(store).glob("segments/*/")}
    store.compact(target_tokens=16)
    assert [len(s) for s in (store._snapshot.segments, store._snapshot.columns["teacher"].segments)] == [3, 3]
    assert all(segment.meta.dense for segment in store._snapshot.all_segments())
    assert [row.scores["teacher"][0] for row in ZarrStore.open(place(store)).read(range(12), ("teacher",))] == [-i for i in range(12)]
    assert before < {path.name for path in place(store).glob("segments/*/")}
    commits = len(store.history())
    store.compact(target_tokens=16)
    assert len(store.history()) == commits
    assert list(store.verify()) == []


def test_a_reader_that_was_open_reads_on_through_a_compaction_and_an_old_copy_too(filled: ZarrStore) -> None:
    reader, copied = ZarrStore.open(place(filled)), pickle.dumps(filled)
    expected = [row.rollout for row in filled.read(range(4))]
    filled.compact()
    for store in (reader, pickle.loads(copied)):  # noqa: S301
        assert_holds(store, expected)
        assert store.read([3], ("teacher",), top_k=("teacher",))[0].scores["teacher"].tolist() == [-1.0] * 3
        assert len(store.history()) == 3
        store.refresh()
        assert len(store.history()) == 4
        assert_holds(store, expected)


def test_of_two_compactions_at_once_one_wins_and_nothing_is_doubled(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other, real, raced = ZarrStore.open(place(filled)), os.link, []

    def link(source: Path, target: Path) -> None:
        if not raced and target.parent.name == "commits":
            raced.append(1)
            other.append(many(50, 1))
            other.compact()
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    filled.compact()
    assert rows_of(filled) == rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1", "r50"]
    assert [commit.kind for commit in filled.history()] == ["rollouts"] * 2 + ["scores", "rollouts", "compaction"]
    assert list(filled.verify()) == []


def test_a_damaged_line_is_not_moved_by_a_compaction(filled: ZarrStore) -> None:
    path = next(place(filled).glob("segments/*/lines/c.0.0"))
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    count = len(list(place(filled).rglob("*")))
    with pytest.raises(CorruptStoreError, match="lines"):
        ZarrStore.open(place(filled)).compact()
    assert len(list(place(filled).rglob("*"))) == count


def test_a_damaged_value_stays_noticed_after_a_compaction_has_moved_it(filled: ZarrStore) -> None:
    path = next(place(filled).glob("segments/*/token_ids/c.0"))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    store = ZarrStore.open(place(filled))
    store.compact()
    with pytest.raises(CorruptStoreError, match="token_ids"):
        store.read(range(4))


def test_a_sweep_removes_only_what_is_old_and_that_nothing_needs(filled: ZarrStore) -> None:
    filled.compact()
    orphan = place(filled) / "scores/teacher" / uuid4().hex
    orphan.mkdir()
    (orphan / "zarr.json").touch()
    assert filled.sweep() == []
    assert filled.sweep(older_than=3600.0) == []
    removed = filled.sweep(older_than=-1.0)
    assert len(removed) == 3
    assert f"scores/teacher/{orphan.name}" in removed
    assert_holds(ZarrStore.open(place(filled)), [row.rollout for row in filled.read(range(4))])
    assert list(filled.verify()) == []
    assert filled.sweep(older_than=-1.0) == []


# Strange records


def test_a_record_that_leads_out_of_the_store_is_refused(filled: ZarrStore) -> None:
    path = place(filled) / "commits/0000000000.json"
    record = unseal(path.read_bytes())
    for strange in ("../../elsewhere", "/etc", "segments/../../x", "scores/../x/" + "0" * 32, "scores/.x/" + "0" * 32):
        record["segment"]["path"] = strange
        path.write_bytes(seal(record))
        with pytest.raises(CorruptStoreError, match="expected a folder of segments/ or scores/"):
            ZarrStore.open(place(filled))


def test_records_that_do_not_fit_together_are_refused(filled: ZarrStore) -> None:
    path = place(filled) / "commits/0000000001.json"
    record = unseal(path.read_bytes())
    path.write_bytes(seal({**record, "segment": {**record["segment"], "first_row": 3, "last_row": 4}}))
    with pytest.raises(CorruptStoreError, match="begins with row 3, expected 2"):
        ZarrStore.open(place(filled))
    path.write_bytes(seal({**record, "kind": "surprise"}))
    with pytest.raises(CorruptStoreError, match="commit 1 is of kind 'surprise'"):
        ZarrStore.open(place(filled))


# Data loader workers


class Rows(torch.utils.data.Dataset):
    def __init__(self, store: ZarrStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> tuple[int, list[int]]:
        return os.getpid(), self.store.read([row])[0].rollout.response_ids.tolist()


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
