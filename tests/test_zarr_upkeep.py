"""A `ZarrStore` that is written to for long: merges by writers, what they remove, sweeps beside writers, and files that are not its own."""

import itertools
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import zarr
from attrs import evolve
from zarr_stores import _quick_disk, filled, forge, many, place, rows_of, start  # noqa: F401

from lopd.backends.files.local import LocalFiles
from lopd.backends.zarr import compaction
from lopd.backends.zarr.segment import Segment
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.testing import assert_holds, tiny_manifest, tiny_provenance, tiny_scores


def grown(folder: Path, appends: int) -> ZarrStore:
    """Make one row an append, each scored by a call of its own, without a call of `compact`."""
    store = ZarrStore.create(folder, tiny_manifest())
    go_on(store, 0, appends)
    return store


def go_on(store: ZarrStore, first: int, appends: int) -> None:
    for i in range(first, first + appends):
        store.append(many(i, 1))
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(many(i, 1)[0], -i)])


def assert_whole(store: ZarrStore, rows: int) -> None:
    assert_holds(store, many(0, rows))
    assert [row.scores["teacher"][0] for row in store.read(range(rows), ("teacher",))] == [-i for i in range(rows)]


# Merges by writers


def test_segments_checkpoints_and_what_was_replaced_do_not_grow_with_appends(tmp_path: Path) -> None:
    for appends in (20, 200):
        store = grown(tmp_path / f"{appends}", appends)
        live = store._state.all_segments()
        # at most fifteen of each of two levels, of rollouts and of the column, and one above
        assert len(live) <= 2 * (15 + 15 + 2)
        on_disk = [*place(store).glob("segments/*/"), *place(store).glob("scores/*/*/")]
        assert len(on_disk) <= len(live) + 4 * 64
        assert len(list(place(store).glob("checkpoints/*"))) <= 32
        assert [path.name for path in place(store).glob("head/*")] == [f"{store._state.commits - 1:010d}"]
        assert_whole(ZarrStore.open(place(store)), appends)
        assert list(store.verify()) == []
    sizes = [path.stat().st_size for path in place(store).glob("checkpoints/*")]
    assert max(sizes) < 1 << 17


def test_the_first_append_of_a_process_reads_the_lines_of_no_row_that_it_does_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown(tmp_path / "run", 40)
    asked: list[int] = []
    real = Segment.lines
    monkeypatch.setattr(Segment, "lines", lambda self, at=None: asked.append(self.meta.rows if at is None else len(at)) or real(self, at))
    store = ZarrStore.open(tmp_path / "run")
    store.append([*many(7, 1), *many(40, 1)])
    assert (asked, len(store)) == ([1], 41), "of row 7 alone, once: where it is, and what it holds"


def test_large_appends_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopd.backends.zarr.compaction._LARGE_TOKENS", 4)
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for i in range(20):
        store.append(many(i, 1, length=3 if i % 2 else 2))
    assert [commit.kind for commit in store.history()] == ["rollouts"] * 20
    store.compact()
    assert (len(store._state.segments), rows_of(store)) == (1, [f"r{i}" for i in range(20)])


def test_a_merge_that_fails_fails_no_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store = grown(tmp_path / "run", 15)
    path = next(place(store).glob("segments/*/lines/c.0.0"))
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    store = ZarrStore.open(place(store))
    store.append(many(15, 1))
    assert len(ZarrStore.open(place(store))) == 16
    assert "merging small segments failed" in caplog.text
    path.write_bytes(data)
    store.append(many(16, 1))
    assert [commit.kind for commit in store.history()][-1] == "compaction"
    assert_holds(store, many(0, 17))


def test_a_reader_whose_segments_were_removed_looks_up_where_its_rows_are_now(tmp_path: Path) -> None:
    store = grown(tmp_path / "run", 20)
    reader, copied = ZarrStore.open(place(store)), pickle.dumps(store)
    before = {path.name for path in place(store).glob("segments/*/")}
    go_on(store, 20, 100)
    store.compact()
    store.sweep(older_than=-60)
    assert before.isdisjoint(path.name for path in place(store).glob("segments/*/"))
    for seen in (reader, pickle.loads(copied)):  # noqa: S301
        assert_whole(seen, 20)
        assert seen.find(["r3", "r50"]).tolist() == [3, -1], "what came later is not in its snapshot"
        assert (len(seen), seen.scored("teacher").all()) == (20, True)
        seen.refresh()
        assert_whole(seen, 120)


def test_a_segment_that_is_lost_is_not_looked_for_for_ever(tmp_path: Path) -> None:
    store = grown(tmp_path / "run", 3)
    shutil.rmtree(place(store) / store._state.segments[1].meta.path / "token_ids")
    with pytest.raises(CorruptStoreError, match="its file is missing") as caught:
        ZarrStore.open(place(store)).read(range(3))
    assert type(caught.value) is CorruptStoreError, "a class of the table of errors"


def test_a_compaction_ends_although_writers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown(tmp_path / "run", 12)
    other, log, real, tries = ZarrStore.open(place(store)), store._log, store._log.commit, list[int]()

    def commit(number: int, record: Mapping[str, Any], previous: str) -> Any:
        tries.append(number)
        go_on(other, len(other), 1)
        return real(number, record, previous)

    monkeypatch.setattr(log, "commit", commit)
    store.compact()
    store.refresh()
    assert_whole(store, len(other))
    # for rollouts and for the column: it lost the number until the other writer had had its turn
    assert len(tries) <= 2 * 2 * 3


def test_a_compaction_whose_segments_others_merge_and_remove_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = grown(tmp_path / "run", 15), compaction.merge
    others = iter([ZarrStore.open(place(store))])

    def merge(*args: Any) -> Any:
        for other in others:
            go_on(other, 15, 55)
        return real(*args)

    monkeypatch.setattr(compaction, "merge", merge)
    store.compact()
    assert_whole(store, 70)
    assert list(store.verify()) == []


def test_of_two_compactions_one_commits_each_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown(tmp_path / "run", 12)
    log, real, others = store._log, store._log.commit, iter([ZarrStore.open(place(store))])

    def commit(*record: Any) -> Any:
        for other in others:
            other.compact(target_tokens=12)
        return real(*record)

    monkeypatch.setattr(log, "commit", commit)
    store.compact(target_tokens=12)
    assert len(store._state.segments) > 2, "several merges of rollouts"
    for seen in (store, ZarrStore.open(place(store))):
        assert_whole(seen, 12)
        assert list(seen.verify()) == []


def test_what_is_moved_while_it_is_verified_is_verified_where_it_is_now(tmp_path: Path) -> None:
    store = grown(tmp_path / "run", 15)
    problems = ZarrStore.open(place(store)).verify()
    go_on(store, 15, 55)
    assert list(problems) == []
    path = next((place(store) / store._state.segments[0].meta.path).glob("token_ids/c.0"))
    path.write_bytes(path.read_bytes()[:-1])
    reader = ZarrStore.open(place(store))
    assert [str(path.relative_to(place(store))) in problem for problem in reader.verify()] == [True]


def test_a_record_that_nobody_could_read_again_is_not_made(filled: ZarrStore) -> None:
    commits = filled._state.commits
    with pytest.raises(InvalidRecordError, match="reason of rollout 'm' is an int"):
        filled.quarantine("other", tiny_provenance(), {"m": 5})  # type: ignore[dict-item]
    with pytest.raises(InvalidRecordError, match="the policy is a str"):
        filled.begin_generation(1, "policy")  # type: ignore[arg-type]
    for wrong in (None, evolve(tiny_provenance(), parity=5)):
        with pytest.raises(InvalidRecordError):
            filled.quarantine("other", wrong, {"m": "why"})  # type: ignore[arg-type]
    assert ZarrStore.open(place(filled))._state.commits == commits


def test_a_merge_by_a_writer_moves_what_fits_in_memory_and_older_segments_do_not_keep_it_from_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "_FAN_IN", 1000)
        for i in range(20):
            store.append(many(i, 1))
    monkeypatch.setattr(compaction, "_MOST_BYTES", 37 * store._state.segments[0].meta.stored_bytes // 2)
    store.append(many(20, 1))
    assert [segment.meta.rows for segment in store._state.segments] == [1] * 3 + [18]


@pytest.mark.parametrize("moment", ["rollouts", "scores", "compaction"])
def test_after_an_interrupt_at_any_line_a_state_takes_in_the_record_once(tmp_path: Path, moment: str) -> None:
    at, lines = 0, itertools.count()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return trace if frame.f_code.co_filename.endswith(("state.py", "column.py")) else None

    store = grown(tmp_path / "run", 2)
    work: dict[str, Callable[[ZarrStore], None]] = {
        "rollouts": lambda store: store.append(many(2, 1)),
        "scores": lambda store: store.append_scores("teacher", tiny_provenance(), [tiny_scores(many(2, 1)[0], -2)]),
        "compaction": lambda store: store.compact(),
    }
    while True:
        shutil.copytree(place(store), tmp_path / f"{at}")
        interrupted, lines = ZarrStore.open(tmp_path / f"{at}"), itertools.count()
        if moment != "rollouts":
            interrupted.append(many(2, 1))
        before = sys.gettrace()
        sys.settrace(trace)
        with suppress(KeyboardInterrupt):
            work[moment](interrupted)
            at = -1
        sys.settrace(before)
        go_on(interrupted, 2, 1)
        again = ZarrStore.open(place(interrupted))
        assert interrupted._state.to_json() == again._state.to_json()
        assert_whole(again, 3)
        if at < 0:
            break
        at += 1
    assert next(lines) > 10


def test_a_checkpoint_that_another_process_removes_or_that_is_too_large_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopd.backends.sealing.LARGEST_JSON", 1 << 13)
    store = grown(tmp_path / "run", 40)
    real = LocalFiles.names
    monkeypatch.setattr(LocalFiles, "names", lambda self, folder: [*real(self, folder), *["0000000064.json"] * (folder == "checkpoints")])
    assert_whole(ZarrStore.open(place(store)), 40)


def test_what_a_power_cut_leaves_of_the_head_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    head, kept = place(store) / "head", list[str]()

    def flushed(*folders: Path) -> None:
        if head in folders:
            kept[:] = os.listdir(head)  # noqa: PTH208 (names)

    monkeypatch.setattr("lopd.backends.files.local.flush", flushed)
    go_on(store, 0, 3)
    shutil.rmtree(head)
    if kept:
        head.mkdir()
    for name in kept:
        (head / name).touch()
    again = ZarrStore.open(place(store))
    assert (len(again), list(again.verify())) == (3, [])


# Sweeps


def test_a_sweep_goes_on_where_others_remove_what_it_looks_at(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.compact()
    paths, real = sorted(filled._state.replaced), LocalFiles.age

    def age(self: LocalFiles, path: str) -> float:
        self.remove(paths[:1])
        return real(self, path)

    monkeypatch.setattr(LocalFiles, "age", age)
    assert set(paths[1:]) <= set(filled.sweep(older_than=-1.0))
    assert paths[1:]


@pytest.mark.parametrize("moment", ["written", "half written"])
def test_a_sweep_with_a_clock_that_is_ahead_takes_nothing_from_a_writer(
    filled: ZarrStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    other, swept, real = ZarrStore.open(place(filled)), list[str](), LocalFiles.write

    def write(self: LocalFiles, files: Mapping[str, Any]) -> None:
        if swept:
            return real(self, files)
        first = dict(list(files.items())[: len(files) if moment == "written" else 1])
        real(self, first)
        swept.extend(other.sweep(older_than=-1e9))
        return real(self, {path: data for path, data in files.items() if path not in first})

    monkeypatch.setattr(LocalFiles, "write", write)
    filled.append(many(20, 2))
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(20, 1)[0])])
    assert len(swept) == 1
    again = ZarrStore.open(place(filled))
    assert rows_of(again) == ["m", "b", "r0", "r1", "r20", "r21"]
    assert again.read([4], ("ref",))[0].scores["ref"].tolist() == [-1.0] * 3
    assert list(again.verify()) == []


def test_a_sweep_takes_nothing_from_a_compaction(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other, log, real, swept = ZarrStore.open(place(filled)), filled._log, filled._log.commit, list[str]()

    def commit(number: int, record: Mapping[str, Any], previous: str) -> Any:
        if record["kind"] == "compaction" and not swept:
            swept.extend(other.sweep(older_than=-1e9))
        return real(number, record, previous)

    monkeypatch.setattr(log, "commit", commit)
    filled.compact()
    assert len(swept) == 1
    assert rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1"]
    assert list(ZarrStore.open(place(filled)).verify()) == []


def test_a_sweep_removes_only_what_this_store_has_made(filled: ZarrStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ("0" * 32)).mkdir()
    (elsewhere / ("0" * 32) / "kept").touch()
    root = place(filled)
    (root / "scores/linked").symlink_to(elsewhere)
    (root / "segments" / ("1" * 32)).symlink_to(elsewhere)
    nested = ZarrStore.create(root / "segments" / ("2" * 32), tiny_manifest())
    nested.append(many(0, 1))
    mine = zarr.open_group(root / "segments" / ("3" * 32), mode="w", attributes={"mine": 1})
    mine.create_array("x", shape=(3,), dtype="int64")
    (root / "segments/notes").mkdir()
    assert filled.sweep(older_than=-1e9) == []
    assert (elsewhere / ("0" * 32) / "kept").exists()
    assert rows_of(ZarrStore.open(place(nested))) == ["r0"]
    assert zarr.open_group(root / "segments" / ("3" * 32), mode="r")["x"].shape == (3,)
    assert list(filled.verify()) == []


# Files that are missing, or of another store


def lost_tail(root: Path) -> None:
    for number in (1, 2):
        (root / f"commits/{number:010d}.json").unlink()


def lost_head(root: Path) -> None:
    shutil.rmtree(root / "head")


def other_root(root: Path) -> None:
    shutil.copy(ZarrStore.create(root.parent / "other", tiny_manifest())._files.url + "/zarr.json", root / "zarr.json")


def other_record(root: Path) -> None:
    other = ZarrStore.create(root.parent / "other", tiny_manifest())
    other.append(many(0, 2))
    other.append(many(2, 2))
    shutil.copy(root.parent / "other/commits/0000000001.json", root / "commits/0000000001.json")


def moved_record(root: Path) -> None:
    shutil.copy(root / "commits/0000000000.json", root / "commits/0000000001.json")


def other_history(root: Path) -> None:
    """Write a record with the right number and store that follows another one."""
    forge(root / "commits/0000000001.json", when=0.0)


def far_record(root: Path) -> None:
    shutil.copy(root / "commits/0000000000.json", root / "commits/9999999999.json")


def lost_group(root: Path) -> None:
    (root / "segments/zarr.json").unlink()


def lost_segment_group(root: Path) -> None:
    next(root.glob("scores/teacher/*/zarr.json")).unlink()


@pytest.mark.parametrize(
    "damage",
    [lost_tail, lost_head, other_root, other_record, moved_record, other_history, far_record, lost_group, lost_segment_group],
    ids=lambda damage: damage.__name__,
)
def test_a_file_that_is_missing_or_of_another_store_is_noticed(filled: ZarrStore, damage: Callable[[Path], None]) -> None:
    def problems() -> Iterator[str]:
        try:
            yield from ZarrStore.open(place(filled)).verify()
        except CorruptStoreError as error:
            yield str(error)

    assert list(problems()) == []
    damage(place(filled))
    found = list(problems())
    assert found
    assert all("expected" in problem or "restore" in problem for problem in found)


def test_a_checkpoint_of_another_store_or_number_is_refused(tmp_path: Path) -> None:
    stores = [grown(tmp_path / name, 40) for name in ("x", "y")]
    checkpoint = "checkpoints/0000000080.json"
    shutil.copy(place(stores[1]) / checkpoint, place(stores[0]) / checkpoint)
    with pytest.raises(CorruptStoreError, match=r"0000000080.json has store"):
        ZarrStore.open(place(stores[0]))
    shutil.copy(place(stores[1]) / checkpoint, place(stores[1]) / "checkpoints/0000000096.json")
    with pytest.raises(CorruptStoreError, match=r"0000000096.json has commits 80, expected 96"):
        ZarrStore.open(place(stores[1]))


def test_a_writer_of_a_store_that_was_put_back_under_it_commits_nothing(tmp_path: Path) -> None:
    store = grown(tmp_path / "run", 3)
    shutil.copytree(place(store), tmp_path / "kept")
    go_on(store, 3, 2)
    shutil.rmtree(place(store))
    shutil.copytree(tmp_path / "kept", place(store))
    rollouts = many(4, 1)
    for call in (
        lambda: store.append(many(9, 1)),
        lambda: store.append(rollouts),
        lambda: store.append_scores("teacher", store.columns["teacher"], [tiny_scores(rollout, -4.0) for rollout in rollouts]),
    ):
        with pytest.raises(CorruptStoreError, match="a commit record is missing"):
            call()
    again = ZarrStore.open(place(store))
    assert_whole(again, 3)
    go_on(again, 3, 1)
    assert list(ZarrStore.open(place(store)).verify()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.compact(target_tokens="x"),
        lambda store: store.compact(target_tokens=0),
        lambda store: store.sweep(older_than="x"),
        lambda store: store.find([3]),
        lambda store: store.quarantine("ref", tiny_provenance("ref"), ["m"]),
    ],
)
def test_arguments_of_another_type_are_refused(filled: ZarrStore, call: Callable[[ZarrStore], object]) -> None:
    with pytest.raises(InvalidRecordError, match="expected"):
        call(filled)
    assert list(ZarrStore.open(place(filled)).verify()) == []


def test_names_that_no_record_has_are_nobodys(filled: ZarrStore) -> None:
    for name in ("99999999999999999999.json", "notes.json", ".DS_Store", "-1.json"):
        (place(filled) / "commits" / name).touch()
    assert rows_of(ZarrStore.open(place(filled))) == ["m", "b", "r0", "r1"]


# Files that change under a reader


def test_a_file_that_is_cut_under_a_reader_is_an_error_and_no_dead_process(filled: ZarrStore) -> None:
    reader = ZarrStore.open(place(filled))
    reader.read(range(4))
    for path in place(filled).glob("segments/*/token_ids/c.0"):
        os.truncate(path, 1)
    with pytest.raises(CorruptStoreError, match=r"'token_ids': its file is too short"):
        reader.read(range(4))


def test_a_store_of_more_files_than_a_process_may_open_is_written_and_read(tmp_path: Path) -> None:
    store = grown(tmp_path / "run", 30)

    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, hard))  # noqa: PTH208 (a number)
        again = ZarrStore.open(place(store))
        assert_whole(again, 30)
        go_on(again, 30, 20)
        assert_whole(again, 50)

    process = start(work)
    process.join()
    assert process.exitcode == 0


def test_a_sweep_takes_nothing_from_a_column_that_is_listed_under_another_name(filled: ZarrStore) -> None:
    """As a file system that ignores capitals lists a column whose name another one had first."""
    (column,) = filled.columns
    (place(filled) / "scores" / column.upper()).symlink_to(place(filled) / "scores" / column)
    assert filled.sweep(older_than=-1e9) == []
