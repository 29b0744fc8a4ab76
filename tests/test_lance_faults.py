"""What damage, a full disk and a storage that fails do to a `LanceStore`."""

import errno
import os
import random
import resource
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from attrs import evolve
from fault_proxy import ALWAYS, FaultProxy
from lance_stores import filled, reopened, started, table_of  # noqa: F401
from s3_server import S3Server
from zarr_stores import _quick_disk, fill, many, place, rows_of  # noqa: F401

from lopd.backends.lance.encode import encode_scores
from lopd.backends.lance.failures import reading
from lopd.backends.lance.state import table_seed
from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import LanceTable
from lopd.backends.lance.writer import Writer
from lopd.backends.sealing import seal, unseal
from lopd.errors import CorruptStoreError, LopdError, StoreNotFoundError, StoreReadError, StoreWriteError
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def work(*_: object) -> None:
        raise error

    return work


huge = tiny_rollout("huge", np.arange(100_000) % 300)


# Damage


def readable(store: LanceStore) -> list[Any]:
    """Read all that a store holds."""
    rows = store.read(range(len(store)))
    scored = store.read([1, 3], ("teacher",), top_k=("teacher",))
    return [
        [(r.rollout.rollout_id, r.rollout.content_hash, r.rollout.finish_reason, r.rollout.generation) for r in rows],
        [[a.tolist() for a in (r.rollout.prompt_ids, r.rollout.response_ids, r.rollout.loss_mask)] for r in rows],
        [None if (values := r.rollout.behavior_logprobs) is None else values.tolist() for r in rows],
        [None if (values := r.rollout.sampler_logprobs) is None else values.tolist() for r in rows],
        [[*r.scores["teacher"].tolist(), *r.top_k["teacher"].ids.tolist(), *r.top_k["teacher"].logprobs.tolist()] for r in scored],
        store.lengths().tolist(), store.scored("teacher").tolist(), store.scored("behavior").tolist(),
        store.scored("behavior/sampler").tolist(),
        store.find(["m", "b", "r0", "r1", "r2"]).tolist(), dict(store.columns), dict(store.generations), len(store.history()),
    ]  # fmt: skip


def test_a_flipped_bit_in_any_file_is_an_error_or_changes_nothing(filled: LanceStore, capfd: pytest.CaptureFixture[str]) -> None:
    expected, rng, noticed = readable(filled), random.Random(0), 0
    files = [
        path for path in sorted(place(filled).rglob("*")) if path.is_file() and path.stat().st_size and path.parent.name != "_transactions"
    ]
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


def test_a_damaged_line_is_the_error_also_where_scores_of_its_row_are_not_there_or_cannot_be_read(filled: LanceStore) -> None:
    filled.append([tiny_rollout("r2-odd")])
    (path,) = [path for path in place(filled).glob("rollouts-*/data/*") if b"r2-odd" in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(b"r2-odd", b"r2-off"))
    for scores in (None, next(place(filled).glob("scores.*/data/*"))):
        if scores is not None:
            scores.unlink()
        with pytest.raises(CorruptStoreError, match="rollout 'r2-off': the checksum of its line"):
            reopened(filled).read([4], ("teacher",))


def test_a_lost_file_is_an_error(filled: LanceStore) -> None:
    for pattern, words in (
        ("rollouts-*/data/*", "Not found"),
        ("scores.*/_versions", "was not found"),
        ("log/0000000001.json", "0000000001.json is missing"),
    ):
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


@pytest.mark.parametrize(("name", "row"), [("rollouts", 0), ("rollouts", 2), ("scores.teacher", 1)])
def test_rows_that_a_user_updates_are_found_and_later_appends_read_them_no_more(
    name: str, row: int, filled: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, table, real, taken = readable(filled), table_of(filled, name), LanceTable.take, list[int]()
    table.add_columns(pa.schema([pa.field("judge", pa.float64())]))
    table.update(where=f"row = {row}", values={"judge": 0.5})
    filled.refresh()
    store = reopened(filled)
    assert readable(filled) == readable(store) == expected

    def take(self: LanceTable, offsets: Any, columns: Any) -> Any:
        taken.extend(offsets.tolist() if self.name == table.name else ())
        return real(self, offsets, columns)

    monkeypatch.setattr(LanceTable, "take", take)
    for i in (4, 5, 6):
        store.append(many(i, 1))
        store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(many(i, 1)[0]), top_k=tiny_top_k(3))])
    monkeypatch.setattr(LanceTable, "take", real)
    assert min(taken) >= len(table) - 1
    store.compact(older_than=0.0)
    for other in (store, reopened(store)):
        assert [names[0] for names in readable(other)[0]] == ["m", "b", "r0", "r1", "r4", "r5", "r6"]
        assert other.scored("teacher").tolist() == [False, True, False, True, True, True, True]
        assert list(other.verify()) == []


def test_files_of_others_among_the_versions_change_nothing(filled: LanceStore) -> None:
    (versions,) = place(filled).glob("rollouts-*/_versions")
    manifest = max(versions.glob("*.manifest"))
    manifest.with_name(f"._{manifest.name}").write_bytes(b"\0\5\x16\7")
    view = lance.dataset(str(versions.parent))
    lance.LanceDataset.commit(view, lance.LanceOperation.Append([]), read_version=view.version, detached=True)
    assert len(list(versions.glob("d*.manifest"))) == 1
    filled.append(many(10, 2))
    reopened(filled).append(many(12, 1))
    filled.compact(older_than=0.0)
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r10", "r11", "r12"]
    assert list(filled.verify()) == []


def test_rows_that_somebody_added_past_the_store_are_refused(filled: LanceStore) -> None:
    table = table_of(filled, "rollouts")
    table.add(table.to_arrow())
    store = reopened(filled)
    with pytest.raises(CorruptStoreError, match="a row twice"):
        store.append(many(10, 1))
    with pytest.raises(CorruptStoreError, match="a row twice"):
        store.find(["r0"])


def test_scores_of_other_tokens_are_refused_at_read(tmp_path: Path) -> None:
    store = LanceStore.create(tmp_path / "x", tiny_manifest())
    store.append([tiny_rollout("r", [7, 8])])
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("r", [7, 8]))])
    table = table_of(store, "scores.teacher")
    others = [tiny_scores(tiny_rollout("r", [8, 7]))]
    data = encode_scores(others, [0], 300, "float32", commit=0, when=0.0, seed=table_seed(table.name))
    lancedb.connect(tmp_path / "x").create_table(table.name, data, mode="overwrite")
    with pytest.raises(CorruptStoreError, match=r"column 'teacher': scores of rollout 'r' were computed on other tokens"):
        reopened(store).read([0], ("teacher",))


def test_a_record_that_leads_out_of_the_store_is_refused(filled: LanceStore) -> None:
    path = sorted((place(filled) / "log").iterdir())[-1]
    document = unseal(path.read_bytes())
    assert document is not None
    assert document["kind"] == "table"
    for name in ("../elsewhere", "/etc", ".", "a/b"):
        path.write_bytes(seal({**document, "table": name}))
        with pytest.raises(CorruptStoreError, match=r"table is .*expected text like"):
            reopened(filled)


def test_tables_of_killed_writers_are_removed_once_their_column_has_another(filled: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = filled.read([0])[0].rollout
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_flush", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            filled.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollout)])
    (left,) = place(filled).glob("scores.ref-*.lance")
    store = reopened(filled)
    store.compact(older_than=0.0)
    assert left.exists(), "its writer may be about to say that it is the column's"
    store.append_scores("ref", tiny_provenance("ref"), [tiny_scores(rollout)])
    store.compact(older_than=0.0)
    assert not left.exists()
    assert len(list(place(filled).glob("scores.ref-*.lance"))) == 1
    assert list(reopened(filled).verify()) == []


# Failing writes


def write_to_a_full_disk(path: str, pipe: Connection) -> None:
    """Write with a limit on the size of files; a big call fails, a small one does not, and the big one can be repeated."""
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


# A storage that fails


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
@pytest.mark.parametrize("status", [401, 403])
def test_a_storage_that_lets_nobody_in_any_more_is_not_damage(s3: S3Server, proxy: FaultProxy, status: int) -> None:
    store = fill(LanceStore.create(s3.new_url(".lance"), tiny_manifest(), storage_options=s3.storage_options))
    readers = [reopened(store, proxy.storage_options | IMPATIENT) for _ in range(2)]
    readers[1].read([1], ("teacher",))
    proxy.refuse(ALWAYS, status=status)
    for reader in readers:
        with pytest.raises(StoreReadError, match=r"check the storage(, its permissions and credentials,)? and try again"):
            reader.read([0, 1, 3], ())
    with pytest.raises(StoreReadError):
        list(readers[1].verify())
    proxy.heal()
    for reader in readers:
        assert len(reader.read([1], ("teacher",))) == 1


@pytest.mark.s3
def test_a_storage_that_fails_for_a_while_is_given_the_repetitions_that_are_documented(s3: S3Server, proxy: FaultProxy) -> None:
    store = fill(LanceStore.create(s3.new_url(".lance"), tiny_manifest(), storage_options=s3.storage_options))
    writer = reopened(store, proxy.storage_options)
    proxy.refuse(20, "PUT", "/data/", status=500)
    writer.append(many(10, 1))
    assert proxy.pending == 0


@pytest.mark.parametrize(
    "said",
    [
        "LanceError(IO): Generic LocalFileSystem error: Unable to open file /x: Permission denied (os error 13), /home/runner/x.rs:1:2",
        "lance error: LanceError(IO): " + 400 * "x" + ": Too many open files (os error 24)",
        "Unable to access metadata for /x: Input/output error (os error 5)",
        "The operation lacked the necessary privileges to complete for path x: Error performing HEAD http://x",
        "The operation lacked valid authentication credentials for path x: Error performing GET http://x",
    ],
)
def test_what_the_system_or_a_storage_refuses_is_not_damage(said: str) -> None:
    with pytest.raises(StoreReadError, match="Table 'x': reading it failed"), reading("Table 'x'"):
        raise OSError(said)


@pytest.mark.parametrize(
    "said",
    [
        "Object at location /x not found: No such file or directory (os error 2)",
        "Generic LocalFileSystem error: Requested range was invalid",
        "LanceError(IO): failed to decode Protobuf message: Manifest.version_aux_data: invalid wire type",
        "Encountered corrupt file /x/data/os error 13.lance: file size is smaller than 16 bytes",
    ],
)
def test_what_is_gone_cut_or_not_understood_is_damage(said: str) -> None:
    with pytest.raises(CorruptStoreError, match="Table 'x': LanceDB cannot read it"), reading("Table 'x'"):
        raise OSError(said)


@pytest.mark.s3
@pytest.mark.parametrize("path", ["/_versions/", "/data/", "/log/|/rollouts.*head/"])
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
        assert proxy.pending == 0
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
