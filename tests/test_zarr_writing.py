"""Writes of a `ZarrStore` that fail, and several processes that write at once."""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from zarr_stores import _quick_disk, filled, many, place, rows_of, start  # noqa: F401

from lopd.backends.files.local import LocalFiles
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import ConflictError, CorruptStoreError, StoreReadError, StoreWriteError
from lopd.records import ModelId
from lopd.testing import assert_holds, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores


def sent(store: ZarrStore) -> ZarrStore:
    """Send the store as a worker process of a data loader gets it."""
    return pickle.loads(pickle.dumps(store))  # noqa: S301  # our own bytes, made a moment ago


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
    left, lock = [0], Lock()

    def fsync(descriptor: int) -> None:
        with lock:
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


@pytest.mark.parametrize("call", [lambda store: store.append(many(10, 1)), ZarrStore.compact], ids=["append", "compact"])
@pytest.mark.parametrize(("failing", "answer"), [(False, None), (True, None), (True, SimpleNamespace(st_nlink=1))])
def test_a_commit_that_was_linked_before_its_file_server_failed_keeps_its_segments(
    failing: bool, answer: Any, call: Callable[[ZarrStore], None], filled: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, look, before = os.link, os.stat, rows_of(filled)

    def fail_once(*_: object, **__: object) -> Any:
        monkeypatch.setattr(os, "stat", look)
        if answer is None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return answer

    def link_and_fail(source: Path, target: Path) -> None:
        link(source, target)
        if target.parent.name == "commits":
            monkeypatch.setattr(os, "link", link)
            monkeypatch.setattr(os, "stat", fail_once)
            if failing:
                raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", link_and_fail)
    with pytest.raises(StoreWriteError) as raised:
        call(filled)
    assert answer or "nothing of this call was committed" not in str(raised.value)
    assert os.stat is look
    again = ZarrStore.open(place(filled))
    assert len(again.history()) == 4
    assert rows_of(again)[: len(before)] == before
    call(filled)
    assert list(again.verify()) == []


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
            paths = [path for path in root.rglob("*") if path.parent.name != "commits" and "head" not in path.parts]
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
    assert sum(commit.rows for commit in store.history() if commit.kind != "compaction") == 48


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


@pytest.mark.parametrize("column", [None, "ref"])
def test_a_writer_that_loses_the_race_twice_adds_no_row_under_an_old_number(
    column: str | None, filled: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, writer = ZarrStore.open(place(filled)), filled._writer
    publish, remove = writer._publish, writer._remove
    rollouts = [record.rollout for record in filled.read([0, 1, 2])] if column else many(50, 3)

    def add(store: ZarrStore, part: slice) -> None:
        if column:
            store.append_scores(column, tiny_provenance("ref"), [tiny_scores(rollout) for rollout in rollouts[part]])
        else:
            store.append(rollouts[part])

    def lose(*record: Any) -> bool:
        monkeypatch.setattr(writer, "_publish", publish)
        add(other, slice(0, 1))
        return publish(*record)

    def remove_late(paths: list[str]) -> None:
        monkeypatch.setattr(writer, "_remove", remove)
        add(other, slice(1, 2))
        remove(paths)

    monkeypatch.setattr(writer, "_publish", lose)
    monkeypatch.setattr(writer, "_remove", remove_late)
    add(filled, slice(0, 3))
    again = ZarrStore.open(place(filled))
    assert rows_of(filled) == rows_of(again) == ["m", "b", "r0", "r1"] + ([] if column else ["r50", "r51", "r52"])
    assert [commit.rows for commit in again.history()[3:]] == [1, 1, 1]
    assert list(again.verify()) == []


def test_a_commit_that_was_answered_as_lost_keeps_its_segment_where_the_log_cannot_be_read(
    filled: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, commit = filled._log, filled._log.commit

    def answer_late(*record: Any) -> None:  # the second of two requests, and a client of NFS that shows an old count of names
        commit(*record)
        patch.setattr(log, "next", Mock(side_effect=StoreReadError("Stale file handle")))

    with monkeypatch.context() as patch:
        patch.setattr(log, "commit", answer_late)
        with pytest.raises(StoreReadError):
            filled.append(many(10, 1))
    filled.append([*many(10, 1), *many(20, 1)])
    again = ZarrStore.open(place(filled))
    assert (rows_of(again)[4:], list(again.verify())) == (["r10", "r20"], [])


def test_a_segment_of_a_call_that_was_interrupted_is_not_committed_by_a_later_one(
    filled: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, rollouts, looks = ZarrStore.open(place(filled)), many(30, 2), []
    log, refresh = filled._log, filled._snapshot.refresh

    def lose(number: int, record: object, previous: str, *, commit: object = log.commit) -> object:
        if not looks[1:]:
            other.append(many(40, 1))
        return commit(number, record, previous)  # type: ignore[operator]

    def interrupted() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt
        refresh()

    monkeypatch.setattr(log, "commit", lose)
    monkeypatch.setattr(filled._snapshot, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled.append(rollouts)
    other.sweep(older_than=0)
    filled.append(rollouts)
    again = ZarrStore.open(place(filled))
    assert list(again.verify()) == []
    assert [record.rollout.rollout_id for record in again.read(again.find([r.rollout_id for r in rollouts]).tolist())] == [
        r.rollout_id for r in rollouts
    ]


def test_a_reader_keeps_its_snapshot_until_it_refreshes(filled: ZarrStore) -> None:
    reader, copied = ZarrStore.open(place(filled)), sent(filled)
    filled.append(many(10, 1))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(filled.read([0])[0].rollout)])
    for store in (reader, copied, sent(reader)):
        assert (len(store), store.scored("ref").tolist(), len(store.columns)) == (4, [False] * 4, 1)
        store.refresh()
        assert (len(store), store.scored("ref").sum(), len(store.columns)) == (5, 1, 2)


# A store that is removed under its writer


@pytest.mark.parametrize("made_again", [False, True])
def test_an_empty_store_that_was_removed_under_its_writer_takes_nothing(made_again: bool, tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    shutil.rmtree(place(store))
    other = ZarrStore.create(tmp_path / "run", tiny_manifest()) if made_again else None
    policy = tiny_manifest().policy
    for call in (
        lambda: store.append(many(0, 1)),
        lambda: store.begin_generation(1, ModelId("later", "rev", "float32")),
        lambda: store.append([]),
        lambda: store.begin_generation(0, policy),
        lambda: store.quarantine("ref", tiny_provenance("ref"), {}),
        store.compact,
    ):
        with pytest.raises(CorruptStoreError, match=r"zarr.json is gone or another store's"):
            call()
    assert [problem for problem in store.verify() if "zarr.json is gone" in problem]
    assert (place(store).exists(), (place(store) / "segments").exists()) == (made_again, False)
    if other is not None:
        other.append(many(0, 1))
        assert_holds(ZarrStore.open(place(other)), many(0, 1))


@pytest.mark.parametrize("wrote", [False, True])
def test_the_place_of_a_store_that_was_removed_under_its_writer_stays_free(filled: ZarrStore, wrote: bool) -> None:
    writer = filled if wrote else ZarrStore.open(place(filled))
    rollout, there = filled.read([2])[0].rollout, [row.rollout for row in filled.read(range(4))]
    writer.append(there)
    shutil.rmtree(place(filled))
    for call in (
        lambda: writer.append(there),
        lambda: writer.append([]),
        lambda: writer.append_scores("teacher", writer.columns["teacher"], []),
        lambda: writer.quarantine("teacher", writer.columns["teacher"], {}),
        writer.compact,
        lambda: writer.append(many(10, 1)),
        lambda: writer.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollout)]),
        lambda: writer.begin_generation(1, ModelId("later", "rev", "float32")),
    ):
        with pytest.raises(CorruptStoreError, match="restore"):
            call()
    assert not place(filled).exists()
    assert len(ZarrStore.open_or_create(place(filled), tiny_manifest())) == 0


def test_a_segment_of_a_store_that_is_put_back_while_it_is_written_does_not_stay(
    filled: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = set(place(filled).glob("segments/*")), LocalFiles.write

    def put_back(self: LocalFiles, files: Any) -> None:
        write(self, files)
        (place(filled) / "commits" / f"{filled._state.commits - 1:010d}.json").unlink()

    monkeypatch.setattr(LocalFiles, "write", put_back)
    with pytest.raises(CorruptStoreError, match="a commit record is missing"):
        filled.append(many(10, 1))
    assert set(place(filled).glob("segments/*")) == before


def test_a_root_that_is_gone_is_a_problem_at_once_and_an_error_within_sixteen_commits(filled: ZarrStore) -> None:
    def go_on() -> None:
        for i in range(10, 26):
            filled.append(many(i, 1))

    (place(filled) / "zarr.json").unlink()
    assert [problem for problem in filled.verify() if "zarr.json is gone" in problem]
    with pytest.raises(CorruptStoreError, match=r"zarr.json is gone"):
        go_on()


def test_a_folder_of_the_log_that_cannot_be_listed_is_a_problem(filled: ZarrStore) -> None:
    shutil.rmtree(place(filled) / "head")
    (place(filled) / "head").touch()
    (problem,) = filled.verify()
    assert "reading its commit log failed" in problem
