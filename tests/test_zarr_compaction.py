"""Compaction of a `ZarrStore`: readers that are open, rivals, damage, and sweeps."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import zarr
from attrs import evolve
from test_zarr_upkeep import assert_whole, go_on, grown
from zarr_stores import _quick_disk, filled, many, place, rows_of  # noqa: F401

from lopd.backends.files.local import LocalFiles
from lopd.backends.zarr import compaction
from lopd.backends.zarr.segment import Segment
from lopd.backends.zarr.state import State
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import CorruptStoreError, InvalidRecordError, MissingScoresError
from lopd.testing import assert_holds, assert_same_top_k, tiny_manifest, tiny_provenance, tiny_scores, tiny_top_k


def test_compaction_leaves_few_large_segments_and_sorts_scores_by_row(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    items = many(0, 12)
    for item in items:
        store.append([item])
    for i in (7, 3, 11, 0, 5, 1, 2, 4, 6, 8, 9, 10):
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[i], -i)])
    before = {path.name for path in place(store).glob("segments/*/")}
    store.compact(target_tokens=16)
    assert [len(s) for s in (store._state.segments, store._state.columns["teacher"].segments)] == [3, 3]
    assert all(segment.meta.dense for segment in store._state.all_segments())
    assert [row.scores["teacher"][0] for row in ZarrStore.open(place(store)).read(range(12), ("teacher",))] == [-i for i in range(12)]
    assert before < {path.name for path in place(store).glob("segments/*/")}
    commits = len(store.history())
    store.compact(target_tokens=16)
    assert len(store.history()) == commits
    assert list(store.verify()) == []


@pytest.mark.parametrize(("most", "tokens"), [(9, [9] * 4), (20, [18, 18]), (1, [3] * 12)])
def test_merged_scores_have_no_more_bytes_than_fit_into_memory(
    most: int, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, a_token = 64, 4 + 64 * (2 + 4) + 4  # log-prob, ids of a vocabulary of 300 and their log-probs, tail
    monkeypatch.setattr(compaction, "_MERGED_BYTES", most * a_token)
    store, items = ZarrStore.create(tmp_path / "run", tiny_manifest()), many(0, 12)
    store.append(items)
    for i in (7, 3, 11, 0, 5, 1, 2, 4, 6, 8, 9, 10):
        store.append_scores("teacher", tiny_provenance(top_k=k), [evolve(tiny_scores(items[i], -i), top_k=tiny_top_k(3, k))])
    before = store.read(range(12), ("teacher",), ("teacher",))
    store.compact()
    segments, commits = store._state.columns["teacher"].segments, len(store.history())
    assert [segment.meta.tokens for segment in segments] == tokens
    for segment in segments:
        found = [np.prod(array.shape) * np.dtype(array.dtype).itemsize for name, array in segment.meta.arrays.items() if name != "lines"]
        assert sum(found) <= max(most, 3) * a_token, "a rollout has 3 tokens"
    after = ZarrStore.open(place(store)).read(range(12), ("teacher",), ("teacher",))
    assert after.scores["teacher"].tolist() == before.scores["teacher"].tolist()
    assert_same_top_k(after.top_k["teacher"], before.top_k["teacher"])
    store.compact()
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


@pytest.mark.parametrize(("looked", "scored"), [(True, [0, 1, 4]), (False, [0, 1, 2, 4])])
def test_a_reader_keeps_its_snapshot_where_its_segments_were_removed(tmp_path: Path, looked: bool, scored: list[int]) -> None:
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    go_on(store, 0, 1)
    store.append(many(1, 19))
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(row) for row in (*many(1, 1), *many(4, 1))])
    store.quarantine("teacher", tiny_provenance(), {"r9": "why"})
    reader = ZarrStore.open(place(store))
    if looked:
        reader.scored("teacher")
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(row) for row in (*many(2, 1), *many(5, 15))])
    store.append_scores("late", tiny_provenance("late", top_k=2), [evolve(tiny_scores(row), top_k=tiny_top_k(3)) for row in many(0, 20)])
    store.compact()
    store.sweep(older_than=-60)
    assert reader.read([0], ("teacher",))[0].scores["teacher"].tolist() == [0] * 3
    assert np.flatnonzero(reader.scored("teacher")).tolist() == scored, "of row 2 it cannot tell, if it has not looked"
    assert reader.quarantined("teacher") == {9: "why"}
    for row, columns, top_k in ((9, ("teacher",), ()), (0, (), ("late",))):
        with pytest.raises(MissingScoresError, match=rf"'r{row}' has no scores"):
            reader.read([row], columns, top_k)
    store.append(many(20, 1))
    reader.compact()
    assert reader.read([20])[0].rollout.rollout_id == "r20", "a compaction refreshes"


def test_a_reader_whose_file_server_has_forgotten_its_open_files_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = grown(tmp_path / "run", 3), os.pread

    def pread(descriptor: int, size: int, start: int) -> bytes:
        if not os.fstat(descriptor).st_nlink:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(descriptor, size, start)

    monkeypatch.setattr(os, "pread", pread)
    reader = ZarrStore.open(place(store))
    assert_whole(reader, 3)
    store.compact()
    store.sweep(older_than=-60)
    assert_whole(reader, 3)


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


@pytest.mark.parametrize("array", ["token_ids", "rollout_ids", "logprobs", "top_k_tail"])
def test_a_damaged_value_is_not_moved_by_a_compaction_which_would_give_its_file_a_checksum_that_fits(tmp_path: Path, array: str) -> None:
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for item in many(0, 2):
        store.append([item])
        store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(item), top_k=tiny_top_k(3))])
    path = next(place(store).rglob(f"{array}/c.0*"))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    store = ZarrStore.open(place(store))
    with pytest.raises(CorruptStoreError, match=array if array != "top_k_tail" else "top_k"):
        store.compact()
    assert any(array in problem for problem in store.verify())


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


@pytest.mark.parametrize("put_back", ["no", "yes", "and gone on with"])
@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.read([2]),
        lambda store: store.lengths(),
        lambda store: store.find(["r2"]),
        lambda store: store.append(many(9, 1)),
    ],
)
def test_a_reader_of_a_store_that_was_removed_or_put_back_to_an_older_state_says_that_its_rows_are_gone(
    call: Callable[[ZarrStore], object], put_back: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = grown(tmp_path / "run", 2)
    shutil.copytree(place(store), tmp_path / "kept")
    go_on(store, 2, 1)
    reader = ZarrStore.open(place(store))
    shutil.rmtree(place(store))
    if put_back != "no":
        shutil.copytree(tmp_path / "kept", place(store))
    if put_back == "and gone on with":
        go_on(ZarrStore.open(place(store)), 50, 2)
    looked: list[int] = []
    real = State.latest

    def latest(self: State) -> State:
        looked.append(1)
        assert len(looked) < 5, "it looks for ever"
        return real(self)

    monkeypatch.setattr(State, "latest", latest)
    with pytest.raises(CorruptStoreError, match="restore"):
        call(reader)


def test_a_sweep_does_not_say_that_it_removed_what_stands_behind_a_link(filled: ZarrStore, tmp_path: Path) -> None:
    filled.compact()
    (place(filled) / "segments").rename(tmp_path / "elsewhere")
    (place(filled) / "segments").symlink_to(tmp_path / "elsewhere")
    assert filled.sweep(older_than=-1.0) == []
    assert len(list((tmp_path / "elsewhere").glob("*/"))) == 3


def test_a_sweep_removes_what_killed_writers_left_of_a_put(filled: ZarrStore) -> None:
    left = [place(filled) / folder / f".tmp-{uuid4().hex}" for folder in (".", "commits", "scores/teacher")]
    for path in left:
        path.touch()
    filled.sweep(older_than=-1.0)
    assert all(path.exists() for path in left), "their writers may be at work"
    for path in left:
        os.utime(path, (0, 0))
    filled.sweep(older_than=-1.0)
    assert not any(path.exists() for path in left)


# Columns that were scored shortest first: each segment has rows from everywhere


def scattered(folder: Path, segments: int) -> ZarrStore:
    """Make a column of so many segments of two rows, which share one range of rows, without a merge by their writer."""
    store, items = ZarrStore.create(folder, tiny_manifest()), many(0, 2 * segments)
    store.append(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_FAN_IN", 1000)
        for k in range(segments):
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(items[i], -i) for i in (k, segments + k)])
    return store


def assert_scores(store: ZarrStore) -> None:
    rows = range(len(store))
    assert [row.scores["teacher"][0] for row in store.read(rows, ("teacher",))] == [-i for i in rows]
    assert list(store.verify()) == []


def test_what_a_compaction_of_scattered_scores_writes_down_grows_with_their_segments(tmp_path: Path) -> None:
    sizes = []
    for segments in (16, 64):
        store = scattered(tmp_path / f"{segments}", segments)
        store.compact(target_tokens=6)
        assert len(store._state.columns["teacher"].segments) == segments
        assert_scores(ZarrStore.open(place(store)))
        groups = dict(zarr.open_group(place(store) / "scores/teacher", mode="r").groups())
        live = groups.keys() - {name for group in groups.values() for name in group.attrs["lopd_replaces"]}
        assert live == {segment.meta.path[len("scores/teacher/") :] for segment in store._state.columns["teacher"].segments}
        written = [*place(store).glob("scores/teacher/*/zarr.json"), max(place(store).glob("commits/*"))]
        sizes.append(sum(path.stat().st_size for path in written) / segments)
    assert sizes[1] < 1.1 * sizes[0], "bytes a segment"


def test_a_compaction_in_which_each_segment_names_all_that_it_replaced_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lopd wrote them before."""
    store, real = scattered(tmp_path / "run", 8), compaction.merge

    def merge(column: str | None, segments: Sequence[Segment], *others: Any) -> Iterator[Any]:
        names = tuple(segment.meta.path.rpartition("/")[2] for segment in segments)
        return (evolve(data, replaces=names) for data in real(column, segments, *others))

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "merge", merge)
        store.compact(target_tokens=6)
    again = ZarrStore.open(place(store))
    assert {len(segment.meta.replaces) for segment in again._state.columns["teacher"].segments} == {8}
    assert_scores(again)
    again.compact()
    assert len(again._state.columns["teacher"].segments) == 1
    assert_scores(ZarrStore.open(place(store)))


def test_a_compaction_whose_record_is_too_large_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = scattered(tmp_path / "run", 16)
    before = set(place(store).rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("lopd.backends.sealing.LARGEST_JSON", 1 << 12)
        with pytest.raises(InvalidRecordError, match="expected at most 4,096"):
            store.compact(target_tokens=6)
    assert set(place(store).rglob("*")) == before
    assert_scores(store)


def test_a_merge_asks_for_its_segments_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = scattered(tmp_path / "run", 12)
    store.append(many(24, 1))
    asked, real = list[int](), LocalFiles.run
    monkeypatch.setattr(LocalFiles, "run", lambda self, calls: asked.append(len(calls)) or real(self, calls))
    store.compact()
    assert asked == [2, 2, 2, 12, 12], "lines, tokens and ids of rollouts; lines and log-probs of scores"


# Checkpoints


def test_segments_that_were_merged_go_though_no_checkpoint_can_be_written_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lopd.backends.sealing.LARGEST_JSON", 1 << 12)
    store = grown(tmp_path / "run", 16)
    merged = [place(store) / path for path in store._state.replaced]
    assert [path.is_dir() for path in merged] == [True] * 2 * 16
    go_on(store, 16, 40)
    assert not any(path.exists() for path in merged)
    assert not list(place(store).glob("checkpoints/*.json"))
    assert ["no checkpoint holds its 16 segments" in message for message in caplog.messages] == [True]
    assert_whole(ZarrStore.open(place(store)), 56)
    store.compact()
    monkeypatch.setattr("lopd.backends.sealing.LARGEST_JSON", 1 << 20)
    go_on(store, 56, 7)
    assert list(place(store).glob("checkpoints/*.json")), "of fewer segments it is tried again"


def test_scores_of_batches_as_large_as_the_defaults_make_are_merged_by_their_writer(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for i in range(16):
        made = many(i, 1, length=(1 << 19) + 1)
        store.append(made)
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in made])
    assert [len(segments) for segments in (store._state.segments, store._state.columns["teacher"].segments)] == [16, 1]


def test_each_append_merges_its_share_of_a_backlog_of_scores(tmp_path: Path) -> None:
    store = scattered(tmp_path / "run", 40)
    store.append(many(80, 2))
    for row, segments in ((80, 26), (81, 12)):
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(many(row, 1)[0], -row)])
        assert len(store._state.columns["teacher"].segments) == segments
    assert_scores(store)


def test_merged_rollouts_of_any_size_are_merged_again_where_they_fit_in_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_FAN_IN", 2)
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for i in range(2):
        store.append(many(i, 1, length=50))
    (large,) = store._state.segments
    monkeypatch.setattr(compaction, "_MOST_BYTES", 2 * large.meta.stored_bytes - 1)
    for i in range(2, 4):
        store.append(many(i, 1))
    assert [(segment.meta.rows, segment.meta.level) for segment in store._state.segments] == [(4, 2)]
