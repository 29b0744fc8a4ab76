"""Files of a `LanceStore` that are missing, or another store's; maintenance beside writers; writes that LanceDB reports as done."""

import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from attrs import evolve
from lance_stores import filled, reopened, started  # noqa: F401
from test_old_stores import ROLLOUTS, assert_whole
from zarr_stores import _quick_disk, fill, many, place, rows_of  # noqa: F401

from lopd.backends.lance import writer, written
from lopd.backends.lance.catalog import Catalog
from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import Database, LanceTable
from lopd.backends.lance.writer import Writer
from lopd.backends.opening import open_store
from lopd.errors import CorruptStoreError, StoreWriteError
from lopd.records import ModelId
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.tools.doctor import check_store, inspect_store

# Writes that LanceDB reports as done


def cut(path: Path) -> None:
    """Cut a file to what is left when its last write failed."""
    path.write_bytes(path.read_bytes()[:-64])


def newest(pattern: str, store: LanceStore) -> Path:
    return max(place(store).glob(pattern), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def badly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `badly(owner, name, act)`: `act` happens once, after the next call of this method has returned."""

    def arrange(owner: Any, name: str, act: Callable[[], object]) -> None:
        real = getattr(owner, name)

        def work(*args: Any) -> Any:
            monkeypatch.setattr(owner, name, real)
            answer = real(*args)
            act()
            return answer

        monkeypatch.setattr(owner, name, work)

    return arrange


@pytest.mark.parametrize("what", ["rollouts", "scores", "a new column", "the first rollouts"])
def test_rows_that_cannot_be_read_back_are_not_acknowledged_and_the_store_stays_usable(
    what: str, filled: LanceStore, badly: Any, tmp_path: Path
) -> None:
    rollouts = [row.rollout for row in filled.read(range(4))]
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollouts[0])])
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "rollouts": ("rollouts-*", lambda: filled.append(many(10, 2))),
        "scores": ("scores.ref-*", lambda: filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollouts[1])])),
        "a new column": ("scores.new-*", lambda: filled.append_scores("new", tiny_provenance("new"), [tiny_scores(rollouts[1])])),
        "the first rollouts": ("rollouts-*", lambda: filled.append(many(10, 2))),
    }
    if what == "the first rollouts":
        filled = LanceStore.create(tmp_path / "empty.lance", tiny_manifest())
    table, call = calls[what]
    owner, name = (LanceTable, "insert") if what in ("rollouts", "scores") else (Database, "create")
    before, other = rows_of(filled), reopened(filled)
    badly(owner, name, lambda: cut(newest(f"{table}/data/*", filled)))
    with pytest.raises(StoreWriteError, match=r"cannot be read .* nothing of this call was committed, so check the disk"):
        call()
    assert rows_of(reopened(filled)) == before
    assert list(filled.verify()) == []
    other.append(many(20, 1))
    call()
    assert list(reopened(filled).verify()) == []
    assert len(reopened(filled)) == len(before) + (3 if "rollouts" in what else 1)


@pytest.fixture
def misled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `misled(act)`: `act` happens before the next call reads back what it wrote, and then it cannot, though all is well."""

    def arrange(act: Callable[[], object]) -> None:
        real = writer.check_added

        def check(*_: Any) -> None:
            monkeypatch.setattr(writer, "check_added", real)
            act()
            raise CorruptStoreError("Table: it cannot be read, expected rows; check it.")

        monkeypatch.setattr(writer, "check_added", check)

    return arrange


@pytest.mark.parametrize("what", ["scores", "a quarantine", "the same rollouts", "rollouts behind", "rollouts and scores"])
def test_rows_that_others_rely_on_are_not_taken_back(what: str, filled: LanceStore, misled: Any) -> None:
    other, rollouts = reopened(filled), many(10, 2)
    calls: dict[str, Callable[[], object]] = {
        "scores": lambda: other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollouts[0])]),
        "a quarantine": lambda: other.quarantine("ref", tiny_provenance("ref"), {"r10": "too long"}),
        "the same rollouts": lambda: other.append(rollouts),
        "rollouts behind": lambda: other.append(many(20, 2)),
        "rollouts and scores": lambda: (other.append(many(20, 2)), calls["scores"]()),
    }
    misled(calls[what])
    with pytest.raises(StoreWriteError, match="its rows could not be taken back"):
        filled.append(rollouts)
    for store in (reopened(filled), other, filled):
        store.append(rollouts)
        assert rows_of(store) == ["m", "b", "r0", "r1", "r10", "r11", *(["r20", "r21"] if "rollouts " in what else [])]
        assert store.scored("ref").tolist()[4:5] == ["scores" in what]
        assert list(store.verify()) == []


def test_scores_that_others_have_added_to_are_not_taken_back(filled: LanceStore, misled: Any) -> None:
    scores = [tiny_scores(row.rollout) for row in filled.read(range(4))]
    filled.append_scores("ref", tiny_provenance("ref"), scores[:1])
    other = reopened(filled)
    misled(lambda: other.append_scores("ref", tiny_provenance("ref"), scores[2:3]))
    with pytest.raises(StoreWriteError, match="its rows could not be taken back"):
        filled.append_scores("ref", tiny_provenance("ref"), scores[1:2])
    assert reopened(filled).scored("ref").tolist() == [True, True, True, False]
    assert list(reopened(filled).verify()) == []


def unacknowledged(store: LanceStore, rollouts: list[Any]) -> None:
    """Append as a writer does that is killed before it says that its rows are there."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "_flush", killed)
        with pytest.raises(KeyboardInterrupt):
            store.append(rollouts)


@pytest.mark.parametrize("where", ["insert", "merge_insert"])
def test_rows_are_not_added_behind_others_that_are_taken_back_at_that_moment(
    where: str, filled: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, mine = reopened(filled), filled._snapshot.rollouts
    assert mine is not None
    unacknowledged(filled, many(10, 2))
    owner = LanceTable if where == "insert" else type(mine.table._handle)
    real = getattr(owner, where)

    def work(self: Any, *args: Any) -> Any:
        monkeypatch.setattr(owner, where, real)
        begun = real(self, *args) if where == "merge_insert" else None
        assert written.take_back(mine.table, 2)
        return begun or real(self, *args)

    monkeypatch.setattr(owner, where, work)
    other.append(many(20, 3))
    for store in (other, reopened(filled)):
        assert rows_of(store) == ["m", "b", "r0", "r1", "r20", "r21", "r22"]
        assert list(store.verify()) == []
    filled.append(many(10, 2))
    assert rows_of(reopened(filled))[-3:] == ["r22", "r10", "r11"]


def test_a_store_that_saw_rows_which_were_taken_back_sees_those_that_came_in_their_place(filled: LanceStore) -> None:
    reader, other, mine = reopened(filled), reopened(filled), filled._snapshot.rollouts
    assert mine is not None
    unacknowledged(filled, many(10, 2))
    reader.refresh()
    assert reader.find(["r10", "r20"]).tolist() == [4, -1]
    assert written.take_back(mine.table, 2)
    other.append(many(20, 2))
    reader.refresh()
    assert reader.find(["r10", "r20"]).tolist() == [-1, 4]
    reader.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(20, 1)[0])])
    assert list(reopened(filled).verify()) == []


def test_nothing_is_built_on_rows_that_are_taken_back_at_that_moment(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other, mine, real = reopened(filled), filled._snapshot.rollouts, written.hold_rows
    assert mine is not None
    unacknowledged(filled, many(10, 2))

    def hold(table: LanceTable) -> None:
        assert written.take_back(mine.table, 2)
        real(table)

    monkeypatch.setattr(written, "hold_rows", hold)
    with pytest.raises(StoreWriteError, match=r"rows that were read were taken back by their writer.*; it was not acknowledged"):
        other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(10, 1)[0])])
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1"]
    assert list(reopened(filled).verify()) == []


def test_nothing_is_built_on_rows_that_cannot_be_read_and_their_writer_takes_them_back(
    filled: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real, item, tried = reopened(filled), writer.check_added, tiny_rollout("r2", [2, 3]), list[str]()
    calls: dict[str, Callable[[], object]] = {
        "scores": lambda: other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(item)]),
        "the same rollout": lambda: other.append([item]),
        "rollouts behind": lambda: other.append(many(20, 1)),
        "a merge": lambda: other.compact(older_than=0.0),
    }

    def check(*args: Any) -> None:
        monkeypatch.setattr(writer, "check_added", real)
        path, good = newest("rollouts-*/data/*", filled), np.array([4, 2, 3], np.uint16).tobytes()
        assert good in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(good, np.array([4, 2, 7], np.uint16).tobytes()))
        for name, call in calls.items():
            with pytest.raises(StoreWriteError, match=r"rollout 'r2': the checksum of its values.*; it was not acknowledged"):
                call()
            tried.append(name)
        real(*args)

    monkeypatch.setattr(writer, "check_added", check)
    with pytest.raises(StoreWriteError, match="nothing of this call was committed, so check the disk"):
        filled.append([item])
    assert tried == [*calls]
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1"]
    for call in (lambda: filled.append([item]), *calls.values()):
        call()
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r2", "r20"]
    assert list(reopened(filled).verify()) == []


def test_a_merged_file_that_cannot_be_read_back_is_not_put_in_the_place_of_others(filled: LanceStore, badly: Any) -> None:
    filled.append(many(10, 2))
    badly(Writer, "_flush_file", lambda: cut(newest("rollouts-*/data/*", filled)))
    with pytest.raises(StoreWriteError, match="nothing of it was lost"):
        filled.compact(older_than=0.0)
    for _ in range(2):
        assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r10", "r11"]
        assert list(reopened(filled).verify()) == []
        filled.compact(older_than=0.0)


# Missing and foreign files


def noticed(path: Path) -> list[str]:
    """Return the error of opening a store, or else the problems that `verify` finds."""
    try:
        return list(LanceStore.open(path).verify())
    except CorruptStoreError as error:
        return [str(error)]


def grown(path: Path, name: str) -> LanceStore:
    """Make a store in which each kind of record is, and several commits a table."""
    store = fill(LanceStore.create(path, tiny_manifest()))
    more = [tiny_rollout(f"{name}{i}") for i in range(3)]
    for rollout in more:
        store.append([rollout])
    store.begin_generation(1, ModelId("policy", name, "float32"))
    store.quarantine("ref", tiny_provenance("ref"), {more[0].rollout_id: "too long"})
    store.append_scores("ref", tiny_provenance("ref"), [tiny_scores(more[1])])
    store.append_scores("ref", tiny_provenance("ref"), [tiny_scores(more[2])])
    store.compact()
    last = tiny_rollout(f"{name} last")
    store.append([last])
    for column in ("ref", "teacher"):
        store.append_scores(
            column, store.columns[column], [evolve(tiny_scores(last), top_k=tiny_top_k(3) if column == "teacher" else None)]
        )
    assert noticed(path) == []
    return store


def test_every_file_that_is_missing_is_noticed(tmp_path: Path) -> None:
    whole = place(grown(tmp_path / "run.lance", "a"))
    files = [path for path in whole.rglob("*") if path.is_file() and path.stat().st_size and path.parent.name != "_transactions"]
    latest = {max((path for path in files if path.match(f"{table.name}/_versions/*.manifest")), key=lambda path: path.stat().st_mtime_ns)
              for table in whole.glob("*.lance")}  # fmt: skip
    # files of versions that are no longer looked at, and hints, are in nobody's way
    needed = [path for path in files if path.parent.name == "log" or path in latest]
    assert len(needed) >= 10 + 3
    for path in needed:
        kept = path.rename(tmp_path / "kept")
        assert noticed(whole), path
        kept.rename(path)
    tail = sorted((whole / "log").iterdir())[-3:]
    for path in tail:
        path.rename(tmp_path / path.name)
    assert "is missing, expected" in noticed(whole)[0]
    for path in tail:
        (tmp_path / path.name).rename(path)
    assert noticed(whole) == []
    shutil.rmtree(whole / "log.head")
    assert noticed(whole) == []
    shutil.rmtree(whole / "log")
    assert "0000000000.json is missing, expected a record of table" in noticed(whole)[0]


def test_every_file_of_another_store_is_noticed(tmp_path: Path) -> None:
    mine, other = (place(grown(tmp_path / f"{name}.lance", name)) for name in ("a", "b"))
    for record in (mine / "lopd.json", *sorted((mine / "log").iterdir())):
        data = record.read_bytes()
        record.write_bytes((other / record.relative_to(mine)).read_bytes())
        assert noticed(mine), record
        record.write_bytes(data)
    for kind in ("rollouts-*.lance", "scores.teacher-*.lance", "unscored.ref-*.lance"):
        ours, theirs = (next(store.glob(kind)) for store in (mine, other))
        kept = ours.rename(tmp_path / "kept")
        shutil.copytree(theirs, ours)
        assert any("checksum of its line" in said for said in noticed(mine)), kind
        shutil.rmtree(ours)
        kept.rename(ours)
    # a record too many
    extra = mine / "log" / f"{len(list((mine / 'log').iterdir())):010d}.json"
    shutil.copy(other / "log/0000000003.json", extra)
    assert "does not follow the record before it" in noticed(mine)[0]
    extra.unlink()
    assert noticed(mine) == []


def test_rows_that_went_back_are_noticed_by_a_store_that_is_open_and_nothing_is_built_on_them(filled: LanceStore) -> None:
    store = reopened(filled)
    filled.append(many(10, 1))
    newest("rollouts-*/_versions/*.manifest", filled).unlink()
    shutil.rmtree(newest("rollouts-*/_versions/latest_version_hint.json", filled), ignore_errors=True)
    for call in (store.refresh, lambda: store.append(many(20, 1)), lambda: reopened(filled)):
        with pytest.raises(CorruptStoreError, match="has 4 rows, expected at least 5, for that many were written"):
            call()


def test_an_old_store_notices_missing_files_once_it_was_added_to(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(Path(__file__).parent / "data/lance.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "lance"
    store = LanceStore.open(path)
    assert not (path / "log").exists()
    assert_whole(store)
    before = store.history()
    stale = LanceStore.open(path)
    store.begin_generation(7, ModelId("policy", "seven", "float32"))
    stale.begin_generation(8, ModelId("policy", "eight", "float32"))
    assert LanceStore.open(path).history()[: len(before)] == before
    assert set(LanceStore.open(path).generations) == {*store.generations, 8}
    for file in sorted({*path.glob("*/*.json"), path / "rollouts.json"} - {path / "generations/update-lopd.json"}):
        kept = file.rename(tmp_path / "kept")
        assert noticed(path), file
        kept.rename(file)
    shutil.copy(path / "columns/ref.json", path / "columns/more.json")
    assert "an older lopd wrote columns/more.json after a newer one went on with the store; update lopd everywhere" in noticed(path)[0]
    (path / "columns/more.json").replace(path / "columns/spare.json")
    assert "columns/spare.json is not the file that was there when the log began" in noticed(path)[0]
    assert len(ROLLOUTS) >= len(store)


# Maintenance


def test_a_table_that_is_about_to_be_a_columns_is_left_alone_however_old_it_looks(
    filled: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, real, rollout = reopened(filled), Catalog.put, filled.read([0])[0].rollout

    def put(catalog: Catalog, kind: Any, document: Any) -> bool:
        if kind == "table":
            monkeypatch.undo()
            for file in (table := next(place(filled).glob("scores.ref-*.lance"))).rglob("*"):
                os.utime(file, (0, 0))
            other.compact(older_than=0.0)
            assert table.exists()
        return real(catalog, kind, document)

    monkeypatch.setattr(Catalog, "put", put)
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollout)])
    assert reopened(filled).read([0], ("ref",))[0].scores["ref"].tolist() == [-1.0] * rollout.response_ids.size
    assert list(reopened(filled).verify()) == []


def test_a_writer_whose_table_is_removed_because_another_was_quicker_says_what_the_other_did(filled: LanceStore, badly: Any) -> None:
    other, rollouts = reopened(filled), [row.rollout for row in filled.read(range(2))]

    def act() -> None:
        other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollouts[0])])
        other.compact(older_than=0.0)

    badly(Database, "create", act)
    filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollout) for rollout in rollouts])
    assert reopened(filled).scored("ref").tolist() == [True, True, False, False]
    assert len(list(place(filled).glob("scores.ref-*.lance"))) == 1
    assert list(reopened(filled).verify()) == []


def test_a_machine_whose_clock_is_ahead_removes_nothing(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = sorted(place(filled).rglob("*.lance")), time.time
    monkeypatch.setattr(time, "time", lambda: real() + 30 * 24 * 3600)
    with pytest.raises(StoreWriteError, match="clock of this machine and that of the storage differ by 2592000 s"):
        filled.compact(older_than=0.0)
    assert sorted(place(filled).rglob("*.lance")) == before


def test_folders_whose_times_are_ahead_change_nothing(filled: LanceStore) -> None:
    ahead = time.time() + 7300
    for path in [*place(filled).rglob("*"), place(filled)]:
        os.utime(path, (ahead, ahead))
    filled.compact(older_than=0.0)
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1"]


def test_compaction_touches_only_what_lopd_made(filled: LanceStore, tmp_path: Path) -> None:
    database = lancedb.connect(place(filled))
    copied = next(place(filled).glob("scores.teacher-*.lance"))
    for name in ("mine", "rollouts-" + "0" * 32, "scores.teacher-" + "0" * 32):
        database.create_table(name, [{"x": 1}])
    shutil.copytree(copied, place(filled) / "scores.copy.lance")
    nested = fill(LanceStore.create(place(filled) / "nested.lance", tiny_manifest()))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (place(filled) / "linked.lance").symlink_to(tmp_path / "elsewhere")
    for file in place(filled).rglob("*"):
        if "nested" in str(file) or "mine" in str(file) or "0" * 32 in str(file) or "linked" in str(file):
            os.utime(file, (0, 0))
    filled.compact(older_than=0.0)
    assert list(filled.verify()) == list(reopened(nested).verify()) == []
    assert (tmp_path / "elsewhere/file").exists()
    for name in ("mine", "rollouts-" + "0" * 32, "scores.teacher-" + "0" * 32):
        assert lancedb.connect(place(filled)).open_table(name).count_rows() == 1
    assert (place(filled) / "scores.copy.lance/data").exists()


def maintain(path: str, pipe: Connection) -> None:
    """Merge, and remove all that it may, until told to stop."""
    store, rounds = LanceStore.open(path), 0
    while not pipe.poll():
        store.compact(older_than=0.0)
        rounds += 1
    pipe.send(rounds)


def patiently(call: Callable[..., object], *args: Any) -> None:
    """Repeat a call whose version was removed while it looked: that is what `older_than=0` means."""
    for attempt in range(20):
        try:
            call(*args)
        except (CorruptStoreError, StoreWriteError) as error:
            if attempt == 19 or "not found" not in str(error).lower():
                raise
        else:
            return


def write_beside(path: str, writer: int, rounds: int, pipe: Connection) -> None:
    store = LanceStore.open(path)
    for i in range(rounds):
        mine = many(1000 * (writer + 1) + 2 * i, 2)
        patiently(store.append, mine)
        # half of the columns are new, and another writer makes the same ones
        patiently(store.append_scores, f"column{i // 2}", tiny_provenance(), [tiny_scores(rollout) for rollout in mine])
    pipe.send(len(store))


def test_writers_beside_a_compaction_that_keeps_nothing_lose_nothing(tmp_path: Path) -> None:
    path, rounds, writers = str(tmp_path / "run.lance"), int(os.environ.get("LOPD_KILLS", "5")), 3
    LanceStore.create(path, tiny_manifest()).append(many(0, 2))
    compactor, pipe = started(maintain, path)
    working = [started(write_beside, path, writer, rounds) for writer in range(writers)]
    for process, _ in working:
        process.join(600)
        assert process.exitcode == 0
    pipe.send("stop")
    compactor.join(60)
    assert compactor.exitcode == 0
    assert pipe.recv() > 1
    store = LanceStore.open(path)
    assert len(store) == 2 + 2 * rounds * writers
    assert sum(int(store.scored(f"column{i}").sum()) for i in range((rounds + 1) // 2)) == 2 * rounds * writers
    assert list(store.verify()) == []


def test_history_and_the_doctor_survive_a_column_that_begins_with_a_quarantine(tmp_path: Path) -> None:
    store = LanceStore.create(tmp_path / "run.lance", tiny_manifest())
    store.append(many(0, 2))
    store.quarantine("judge", tiny_provenance("judge"), {"r0": "too long"})
    store = open_store(tmp_path / "run.lance")
    assert isinstance(store, LanceStore)
    assert [(commit.kind, commit.rows) for commit in store.history()] == [("rollouts", 2), ("quarantine", 1)]
    assert inspect_store(store).rollouts == 2
    assert list(check_store(store)) == list(store.verify()) == []
    store.compact(older_than=0.0)
    assert dict(store.quarantined("judge")) == {0: "too long"}
    assert np.flatnonzero(store.scored("judge")).tolist() == []
