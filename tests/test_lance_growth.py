"""What many small commits to a `LanceStore` leave behind, without anybody calling `compact`."""

import pickle
import random
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lance_stores import filled, reopened, table_of  # noqa: F401
from lancedb.index import BTree
from zarr_stores import _quick_disk, many, place, rows_of  # noqa: F401

from lopd.backends import id_index
from lopd.backends.files.local import LocalFiles
from lopd.backends.growing import Growing
from lopd.backends.lance import tiers
from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import LanceTable
from lopd.backends.lance.tiers import crowd
from lopd.backends.lance.writer import Writer
from lopd.errors import CorruptStoreError, InvalidRecordError, StoreWriteError
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores


def grown(folder: Path, commits: int) -> LanceStore:
    """Make commits of one rollout each, of which every second one is scored."""
    store = LanceStore.create(folder, tiny_manifest())
    for i in range(commits):
        item = tiny_rollout(f"r{i}", [i % 300])
        store.append([item])
        if i % 2:
            store.append_scores("teacher", tiny_provenance(), [tiny_scores(item)])
    return store


def fragments_of(store: LanceStore, name: str) -> int:
    return int(table_of(store, name).stats()["fragment_stats"]["num_fragments"])


def drop_all_versions(store: LanceStore) -> None:
    """Drop all versions, as a clean-up by somebody else does."""
    for part in store._snapshot.parts().values():
        part.table.dataset().cleanup_old_versions(older_than=timedelta(0))


@pytest.mark.parametrize("unit", [300, 30_000, 1_000_000])
def test_files_are_few_and_each_row_is_rewritten_a_few_times(unit: int) -> None:
    rng, sizes, written, most = random.Random(0), list[int](), 0, 0
    for i in range(10_000):
        sizes.append(int(unit * rng.uniform(0.3, 3)))
        most = max(most, len(sizes))
        if i % tiers.FAN == 0 and (count := crowd(sizes)):
            written += sum(sizes[-count:])
            sizes[-count:] = [sum(sizes[-count:])]
    assert most <= 60 + sum(sizes) / (1 << 26)
    assert written <= 4 * sum(sizes)


def test_a_merge_is_of_a_gigabyte_at_most() -> None:
    assert crowd([10 << 20] * 5000) == 102
    assert crowd([(1 << 26) - 1] * 16) == 16
    assert crowd([1 << 26] * 16) == 0


def test_many_commits_leave_few_files_and_few_versions_and_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "VERSIONS", 16)
    store = grown(tmp_path / "run.lance", 70)
    assert fragments_of(store, "rollouts") < 32
    assert len(list(place(store).glob("rollouts-*/_versions/*.manifest"))) < 32
    assert len(list(place(store).glob("rollouts-*/_transactions/*"))) < 32
    for reader in (store, reopened(store)):
        assert rows_of(reader) == [f"r{i}" for i in range(70)]
        assert reader.scored("teacher").tolist() == [False, True] * 35
        assert [row.rollout.response_ids.tolist() for row in reader.read([69, 3])] == [[69], [3]]
    assert list(store.verify()) == []
    assert [commit.kind for commit in store.history()].count("rollouts") == 70


def test_a_version_with_a_tag_stays_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiers, "VERSIONS", 16)
    store = grown(tmp_path / "run.lance", 3)
    table = store.table()
    table.tags.create("run-1", table.version)
    for i in range(60):
        store.append(many(100 + i, 1))
    assert len(list(place(store).glob("rollouts-*/_versions/*.manifest"))) < 32
    store.compact(older_than=0.0)
    assert caplog.messages == []
    assert [commit.kind for commit in store.history()][-1] == "compaction"
    tagged = table_of(store, "rollouts")
    tagged.checkout("run-1")
    assert tagged.count_rows() == len(tagged.to_arrow()) == 3
    assert list(store.verify()) == []


def test_compact_makes_no_file_of_more_bytes_than_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = grown(tmp_path / "run.lance", 6)
    assert fragments_of(store, "rollouts") == 6
    monkeypatch.setattr(tiers, "_BYTES", int(2.5 * store._snapshot.parts()[None].table.stored_bytes() / 6))
    store.compact(older_than=0.0)
    assert fragments_of(store, "rollouts") == 3
    assert table_of(store, "rollouts").to_arrow()["row"].to_pylist() == [*range(6)]
    assert rows_of(reopened(store)) == [f"r{i}" for i in range(6)]


@pytest.mark.parametrize("never", [float("inf"), 1e300, 1e14])
def test_compact_may_keep_every_version(filled: LanceStore, never: float) -> None:
    versions = {*place(filled).glob("*.lance/_versions/*")}
    filled.compact(older_than=never)
    assert versions < {*place(filled).glob("*.lance/_versions/*")}
    assert fragments_of(filled, "rollouts") == 1
    assert [commit.kind for commit in filled.history()][-1] == "compaction"


@pytest.mark.parametrize("number", [float("nan"), -1.0, "7"])
def test_an_age_that_is_none_is_refused_before_anything_is_done(filled: LanceStore, number: Any) -> None:
    with pytest.raises(InvalidRecordError, match=r"older_than is .*, expected "):
        filled.compact(older_than=number)
    assert fragments_of(filled, "rollouts") == 2


def test_an_append_reads_no_rows_but_those_that_are_new(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.append(many(10, 1))
    filled.append_scores("teacher", tiny_provenance(top_k=2), [])
    taken: list[int] = []
    real = LanceTable.take

    def take(self: LanceTable, offsets: Any, columns: Any) -> Any:
        taken.extend(offsets.tolist())
        return real(self, offsets, columns)

    monkeypatch.setattr(LanceTable, "take", take)
    snapshot, asked = type(filled._snapshot), list[int]()
    scored = snapshot.scored_rows
    monkeypatch.setattr(snapshot, "scored_rows", lambda self, column, rows: asked.append(rows.size) or scored(self, column, rows))
    for i in (11, 12):
        filled.append(many(i, 1))
        assert filled.find([f"r{i}"]).tolist() == [i - 6]
        filled.append_scores("teacher", tiny_provenance(top_k=2), [])
    assert sorted(taken) == sorted([5, 6] * (len(taken) // 2))
    assert len(taken) <= 4
    filled.append_scores("other", tiny_provenance("other"), [*map(tiny_scores, many(11, 2))])
    assert max(asked) == 2, "which have scores is asked of new rows alone"


def test_a_merge_beside_a_writer_keeps_the_order_of_rows(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other, real = reopened(filled), Writer._flush_file

    def look(self: Writer, *args: Any) -> None:
        monkeypatch.setattr(Writer, "_flush_file", real)
        other.append(many(20, 2))
        real(self, *args)

    monkeypatch.setattr(Writer, "_flush_file", look)
    filled.append([tiny_rollout("s", sampler_logprobs=[-0.5] * 3)])
    filled.compact()
    assert table_of(filled, "rollouts").to_arrow()["row"].to_pylist() == list(range(7))
    assert fragments_of(filled, "rollouts") == 2
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "s", "r20", "r21"]
    assert filled.scored("behavior/sampler").tolist() == reopened(filled).scored("behavior/sampler").tolist()
    assert list(filled.verify()) == []


def test_of_two_merges_of_the_same_files_one_is_kept(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other, real = reopened(filled), Writer._flush_file

    def look(self: Writer, *args: Any) -> None:
        monkeypatch.setattr(Writer, "_flush_file", real)
        other.compact()
        real(self, *args)

    monkeypatch.setattr(Writer, "_flush_file", look)
    filled.compact()
    assert fragments_of(filled, "rollouts") == 1
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1"]


def test_a_merged_file_that_is_cut_changes_nothing(
    filled: LanceStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Writer._flush_file

    def look(self: Writer, table: str, name: str) -> None:
        path = place(filled) / f"{table}.lance/data/{name}"
        path.write_bytes(path.read_bytes()[:-10])
        real(self, table, name)

    monkeypatch.setattr(Writer, "_flush_file", look)
    monkeypatch.setattr(tiers, "FAN", 1)
    monkeypatch.setattr(tiers, "crowd", len)
    filled.append(many(10, 1))
    assert "merging small files failed, which a later commit repeats" in caplog.text
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r10"]
    assert list(filled.verify()) == []


@pytest.mark.parametrize("nested", [False, True])
def test_files_with_a_nan_of_another_tool_are_merged(nested: bool, filled: LanceStore) -> None:
    table = table_of(filled, "rollouts")
    kind = pa.list_(pa.float32()) if nested else pa.float64()
    table.add_columns(pa.schema([pa.field("judge", kind)]))
    values = [[0.25, float("nan")], None] if nested else [float("nan"), 0.25]
    rows = table.to_arrow().slice(0, 2).drop_columns("judge")
    table.merge_insert("row").when_matched_update_all().execute(rows.append_column("judge", pa.array(values, kind)))
    before = repr(table.to_arrow().sort_by("row").to_pydict())
    filled.append(many(10, 1))
    filled.compact()
    assert fragments_of(filled, "rollouts") == 1
    assert repr(table_of(filled, "rollouts").to_arrow().sort_by("row").slice(0, 4).to_pydict()) == before
    assert list(reopened(filled).verify()) == []


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)])
def test_a_merge_notices_a_changed_list_among_many_with_a_nan(kind: pa.DataType) -> None:
    values = [[*range(30)], [*range(30)], [*range(15), 99, *range(16, 30)]]
    columns = [pa.chunked_array([pa.array([[float("nan"), one] for one in each], kind)]) for each in values]
    texts = list(map(tiers._text, columns))
    assert columns[0] != columns[1]
    assert texts[0] == texts[1] != texts[2]


def test_a_merge_notices_a_changed_value_beside_a_nan() -> None:
    nan = float("nan")
    columns = [pa.chunked_array([[[nan, 0.5]], [None, [value] * 3000]]) for value in (1.0, 1.0, float(np.nextafter(1.0, 2.0)))]
    texts = list(map(tiers._text, columns))
    assert columns[0] != columns[1]
    assert texts[0] == texts[1] != texts[2]


def test_an_index_of_another_tool_stays_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    for i in range(12):
        store.append(many(i, 1))
    table_of(store, "rollouts").create_index("row", config=BTree())
    with pytest.raises(
        StoreWriteError, match=r"rollouts-\w+.lance: it has an index 'row_idx' of another tool, which a merge would make wrong"
    ):
        store.compact()
    with monkeypatch.context() as patched:
        patched.setattr(tiers, "FAN", 1)
        patched.setattr(tiers, "crowd", len)
        store.append(many(12, 1))
    assert "merging small files failed" in caplog.text
    assert "it has an index 'row_idx'" in caplog.text
    for files in (13, 1):
        assert fragments_of(store, "rollouts") == files
        for row in (0, 11, 12):
            found = store.table().search().where(f"row = {row}").select(["rollout_id"]).to_list()
            assert [item["rollout_id"] for item in found] == [f"r{row}".encode()]
        table_of(store, "rollouts").drop_index("row_idx")
        store.compact()
        table_of(store, "rollouts").create_index("row", config=BTree())
        store.refresh()


def test_a_reader_and_its_copy_read_on_when_their_versions_are_removed(filled: LanceStore) -> None:
    readers = [reopened(filled), reopened(filled), pickle.loads(pickle.dumps(reopened(filled)))]  # noqa: S301  # our own
    copied = pickle.dumps(readers[0])
    readers[1].read([1, 3], ("teacher",))
    filled.append(many(10, 2))
    filled.append_scores("teacher", tiny_provenance(top_k=2), [])
    filled.compact()
    drop_all_versions(filled)
    for reader in (*readers, pickle.loads(copied)):  # noqa: S301
        assert rows_of(reader) == ["m", "b", "r0", "r1"]
        assert len(reader.read([1, 3], ("teacher",))) == 2
        assert reader.find(["r10"]).tolist() == [-1]
        reader.refresh()
        assert rows_of(reader) == ["m", "b", "r0", "r1", "r10", "r11"]


def test_all_tables_are_looked_at_side_by_side(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for column in ("a", "b"):
        filled.append_scores(column, tiny_provenance(column), [tiny_scores(many(0, 1)[0])])
    reader, asked, alone = reopened(filled), list[str](), list[str]()

    def run(files: LocalFiles, calls: Any) -> list[Any]:
        before, found = len(alone), [call() for call in calls]
        asked.extend(alone[before:])
        del alone[before:]
        return found

    monkeypatch.setattr(LocalFiles, "run", run)
    for name in ("read", "names"):
        ask = getattr(LocalFiles, name)
        monkeypatch.setattr(LocalFiles, name, lambda self, path, ask=ask: alone.append(path) or ask(self, path))
    reader.refresh()
    assert [path.rpartition(".")[2] for path in asked] == ["manifest"] * 4 + ["head"] * 3
    assert [path.rpartition("-")[0] or path for path in alone] == ["log/0000000008.json", "rollouts"]
    filled.append_scores("a", tiny_provenance("a"), [tiny_scores(many(1, 2)[0])])
    for look in (reader.refresh, partial(reopened, filled)):
        asked.clear()
        alone.clear()
        look()
        assert [path for path in asked + alone if path.startswith("scores.")]
        assert not [path for path in alone if path.startswith("scores.")], "one after the other takes as many round trips"


@pytest.mark.parametrize("compacted", [False, True])
def test_a_writer_that_was_held_up_while_versions_were_removed_adds_nothing_twice(
    filled: LanceStore, monkeypatch: pytest.MonkeyPatch, compacted: bool
) -> None:
    filled.append(many(8, 1))
    other, handle = reopened(filled), type(filled._snapshot.rollouts.table._handle)  # type: ignore[union-attr]
    real = handle.merge_insert

    def merge_insert(self: Any, on: str) -> Any:
        begun = real(self, on)
        monkeypatch.setattr(handle, "merge_insert", real)
        for i in range(3):
            other.append(many(10 + i, 1))
        if compacted:
            other.compact()
        drop_all_versions(other)
        return begun

    monkeypatch.setattr(handle, "merge_insert", merge_insert)
    filled.append(many(11, 4))
    for store in (filled, reopened(filled)):
        assert sorted(rows_of(store)) == sorted(["m", "b", "r0", "r1", "r8", *(f"r{i}" for i in range(10, 15))])
    assert list(filled.verify()) == []


def test_scores_of_rows_that_are_not_there_are_refused(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = reopened(filled)
    monkeypatch.setattr(type(store._snapshot), "rows", 3)
    for _ in range(2):
        with pytest.raises(CorruptStoreError, match="has scores of rows 1 to 3, expected rows below 3"):
            store.scored("teacher")


def test_an_array_that_grows_is_what_a_concatenation_is() -> None:
    rng, growing, parts = np.random.default_rng(0), Growing(np.int64, 2), [np.zeros((0, 2), np.int64)]
    for size in (0, 1, 5, 0, 100, 3):
        before, kept = growing.view(), growing.view().copy()
        parts.append(rng.integers(0, 9, (size, 2)))
        growing.append(parts[-1])
        np.testing.assert_array_equal(growing.view(), np.concatenate(parts))
        np.testing.assert_array_equal(before, kept)
    assert len(growing) == 109


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_look_for_rollouts_forgets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    store.append([tiny_rollout("r0", [5])])
    store.find(["r0"])
    store.append([tiny_rollout("r1", [6])])
    with monkeypatch.context() as patch:
        patch.setattr(id_index.np, "argsort", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.find(["r0"])
    assert store.find(["r0", "r1"]).tolist() == [0, 1]
    # an interrupt after that, before they are counted, adds the same rows again
    store._snapshot._indexed = 0
    assert store.find(["r0", "r1", "r2"]).tolist() == [0, 1, -1]
    store.append([tiny_rollout("r0", [5])])
    assert len(store) == 2


def test_after_an_interrupted_refresh_a_store_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    writer.append([tiny_rollout("r0", [5])])
    store = reopened(writer)
    assert rows_of(store) == ["r0"]
    writer.append([tiny_rollout("r1", [6])])
    assert store._snapshot.rollouts is not None
    with monkeypatch.context() as patch:
        patch.setattr(type(store._snapshot.rollouts.table._handle), "schema", property(interrupted))
        with pytest.raises(KeyboardInterrupt):
            store.refresh()
    assert rows_of(store) == ["r0"]
    store.refresh()
    assert rows_of(store) == ["r0", "r1"]
