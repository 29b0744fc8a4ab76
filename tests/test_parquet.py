"""Stores in parquet: what goes out comes back equal, and a file of another kind is refused."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attrs import evolve
from exchanged import assert_equal_stores, fill, memory, without_checksums  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import (
    ConflictError,
    CorruptStoreError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    MissingDependencyError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreReadError,
    StoreWriteError,
    UncheckedDataWarning,
)
from lopd.protocols import LogprobReader, reading
from lopd.records import ModelId, Rollout
from lopd.testing import rollouts, scores_for, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.tools.interop import arrow_table, export_parquet, from_hf_dataset, import_parquet, parquet_manifest, to_hf_dataset


def round_trip(store: LogprobReader, path: Path, **sizes: int) -> MemoryStore:
    export_parquet(store, path, rows_per_group=sizes.get("group", 1024))
    again = MemoryStore(parquet_manifest(path))
    import_parquet(path, again, rows_per_commit=sizes.get("commit", 1024))
    return again


@pytest.mark.parametrize(("group", "commit"), [(1024, 1024), (7, 4), (1, 100)])
def test_a_store_comes_back_equal_from_parquet(memory: MemoryStore, tmp_path: Path, group: int, commit: int) -> None:
    assert_equal_stores(round_trip(memory, tmp_path / "run.parquet", group=group, commit=commit), memory)


def test_a_row_is_weighed_once_however_many_are_in_a_group(memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = list[int]()

    class Counted(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            weighed.extend(key if isinstance(key, list) else [])
            return super().__getitem__(key)

    lengths = MemoryStore.lengths
    monkeypatch.setattr(MemoryStore, "lengths", lambda self: lengths(self).view(Counted))
    monkeypatch.setattr(arrow_table, "parts", lambda reader, rows: reading.parts(reader, 2))
    export_parquet(memory, tmp_path / "run.parquet", rows_per_group=2 * len(memory))
    assert sorted(weighed) == list(range(len(memory)))


def test_any_rollouts_and_scores_come_back_equal_from_parquet(tmp_path: Path) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(items=st.lists(rollouts(), max_size=5, unique_by=lambda rollout: rollout.rollout_id), data=st.data())
    def check(items: list[Rollout], data: st.DataObject) -> None:
        store = MemoryStore(tiny_manifest())
        store.append(items)
        for column, k in (("teacher", 0), ("ranked", 3)):
            chosen = [item for item in items if data.draw(st.booleans())]
            scores = [evolve(data.draw(scores_for(item)), floored=0) for item in chosen]
            scores = [evolve(s, top_k=tiny_top_k(s.logprobs.size, k, drawn=k)) for s in scores] if k else scores
            store.append_scores(column, tiny_provenance(column, 2 * k, k), scores)
            refused = [item.rollout_id for item in items if data.draw(st.booleans())]
            store.quarantine(column, tiny_provenance(column, 2 * k, k), dict.fromkeys(refused, "too long"))
        again = round_trip(store, tmp_path / uuid4().hex, group=data.draw(st.integers(1, 4)), commit=data.draw(st.integers(1, 4)))
        assert_equal_stores(again, store)

    check()


def test_parquet_and_zarr_hold_the_same(memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    store = ZarrStore.create(tmp_path / "run.zarr", parquet_manifest(tmp_path / "run.parquet"))
    for _ in range(2):
        import_parquet(tmp_path / "run.parquet", store, rows_per_commit=8)
        assert_equal_stores(ZarrStore.open(tmp_path / "run.zarr"), memory)
    export_parquet(store, tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(tmp_path / "run.parquet"), check_metadata=True)


def test_an_import_that_was_interrupted_is_resumed_by_running_it_again(memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")

    class KilledError(Exception):
        pass

    class Dying:
        left = 3

        def __init__(self, store: MemoryStore) -> None:
            self.store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self.store, name)

        def append_scores(self, *arguments: Any) -> None:
            Dying.left -= 1
            if not Dying.left:
                raise KilledError
            self.store.append_scores(*arguments)

    again = MemoryStore(tiny_manifest())
    with pytest.raises(KilledError):
        import_parquet(tmp_path / "run.parquet", Dying(again), rows_per_commit=4)
    assert 0 < len(again) < 30
    import_parquet(tmp_path / "run.parquet", again, rows_per_commit=4)
    assert_equal_stores(again, memory)


def test_parquet_is_written_in_row_groups_and_reads_as_plain_columns(memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet", rows_per_group=8)
    file = pq.ParquetFile(tmp_path / "run.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8, 8, 8, 6]
    row = file.read().to_pylist()[3]
    assert (row["rollout_id"], row["loss_mask"], row["response_ids"]) == ("masked", [True, False, True], [5, 6, 1])
    assert (len(row["logprobs/teacher"]), len(row["top_k_ids/teacher"]), row["logprobs/a.b-c"]) == (3, 12, None)
    assert file.read().to_pylist()[-1]["logprobs/teacher"] is None


def test_few_rows_move_at_once_where_their_values_are_many(memory: MemoryStore, tmp_path: Path, monkeypatch: Any) -> None:
    export_parquet(memory, tmp_path / "whole.parquet")
    assert pq.ParquetFile(tmp_path / "whole.parquet").num_row_groups == 1
    values = int(memory.lengths().sum()) * (4 + 9 + 1)
    for module in (reading, arrow_table):
        monkeypatch.setattr(module, "VALUES_AT_ONCE", values // 6)
    export_parquet(memory, tmp_path / "cut.parquet")
    assert pq.read_table(tmp_path / "cut.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert 3 < pq.ParquetFile(tmp_path / "cut.parquet").num_row_groups < len(memory)
    for name in ("cut", "whole"):
        path, appended, append = tmp_path / f"{name}.parquet", list[int](), MemoryStore.append
        monkeypatch.setattr(MemoryStore, "append", lambda self, new, n=appended, a=append: n.append(len(new)) or a(self, new))
        import_parquet(path, again := MemoryStore(parquet_manifest(path)))
        assert 3 < len(appended) < len(memory)
        assert_equal_stores(again, memory)


def test_an_import_that_is_repeated_asks_no_table_for_which_rows_of_all_have_scores(
    memory: MemoryStore, tmp_path: Path, monkeypatch: Any
) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    scored, asked = MemoryStore.scored, list[str]()
    monkeypatch.setattr(MemoryStore, "scored", lambda self, column: asked.append(column) or scored(self, column))
    import_parquet(tmp_path / "run.parquet", memory, rows_per_commit=4)
    assert asked == []


def test_rows_are_read_many_at_a_time_and_stay_in_order_where_every_other_one_has_scores(tmp_path: Path, monkeypatch: Any) -> None:
    store, read, reads = MemoryStore(tiny_manifest()), MemoryStore.read, list[int]()
    items = [tiny_rollout(f"p{i}/s0/g0") for i in range(150)]
    store.append(items)
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(item) for item in items[::2]])
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **asked: reads.append(len(rows)) or read(self, rows, **asked))
    export_parquet(store, tmp_path / "run.parquet", rows_per_group=100)
    assert reads == [32, 32, 32, 32, 11, 11]
    rows = pq.read_table(tmp_path / "run.parquet").to_pylist()
    assert [row["rollout_id"] for row in rows] == [item.rollout_id for item in items]
    assert [row["logprobs/teacher"] is None for row in rows] == [False, True] * 75


def test_an_empty_store_goes_to_parquet_and_back(tmp_path: Path) -> None:
    assert_equal_stores(round_trip(MemoryStore(tiny_manifest()), tmp_path / "run.parquet"), MemoryStore(tiny_manifest()))


def test_parquet_goes_wherever_fsspec_goes(memory: MemoryStore) -> None:
    path = f"memory://{uuid4().hex}/run.parquet"
    export_parquet(memory, path)
    again = MemoryStore(parquet_manifest(path))
    import_parquet(path, again)
    assert_equal_stores(again, memory)
    fsspec.filesystem("memory").rm(path)


def test_an_export_overwrites_nothing(memory: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "run.parquet").write_bytes(b"mine")
    with pytest.raises(StoreExistsError, match=r"run\.parquet"):
        export_parquet(memory, tmp_path / "run.parquet")
    assert (tmp_path / "run.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("failure", "expected"), [(StoreReadError("Store: down."), StoreReadError), (OSError("No space left on device"), StoreWriteError)]
)
def test_an_export_that_fails_leaves_no_file_behind(
    failure: OSError, expected: type[Exception], memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MemoryStore.read

    def read(self: MemoryStore, rows: Sequence[int], **asked: Any) -> Any:
        if 20 in rows:
            raise failure
        return original(self, rows, **asked)

    monkeypatch.setattr(MemoryStore, "read", read)
    with pytest.raises(expected):
        export_parquet(memory, tmp_path / "run.parquet", rows_per_group=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [0, -1, 1.5, "3", None])
def test_a_number_of_rows_that_makes_no_sense_is_refused(rows: Any, memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    for refused in (
        lambda: export_parquet(memory, tmp_path / "again.parquet", rows_per_group=rows),
        lambda: import_parquet(tmp_path / "run.parquet", MemoryStore(tiny_manifest()), rows_per_commit=rows),
        lambda: from_hf_dataset(to_hf_dataset(memory), MemoryStore(tiny_manifest()), rows_per_commit=rows),
    ):
        with pytest.raises(InvalidRecordError, match="rows_per_"):
            refused()
    assert not (tmp_path / "again.parquet").exists()


def test_an_id_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout("fine"), tiny_rollout("not \ud800")])
    with pytest.raises(InvalidRecordError, match="lone surrogate at 4"):
        export_parquet(store, tmp_path / "run.parquet")
    assert list(tmp_path.iterdir()) == []


def rewritten(store: LogprobReader, path: Path, change: Any) -> None:
    """Rewrite a file as another program would that wrote one thing wrong."""
    export_parquet(store, path)
    table = without_checksums(pq.read_table(path))
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def put(name: str, values: Any) -> Any:
    def change(table: pa.Table) -> pa.Table:
        column = table.column(name).to_pylist()
        column[5] = values
        return table.set_column(table.schema.get_field_index(name), name, pa.array(column, table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("response_ids", [7] * 6), "'p5/s0/g1' has content hash"),
        (put("prompt_ids", [5]), "'p5/s0/g1' has content hash"),
        (put("content_hash", None), "'p5/s0/g1' has content hash"),
        (put("response_ids", None), "Token ids"),
        (put("loss_mask", [True]), "'p5/s0/g1'.*loss_mask"),
        (put("finish_reason", "eos"), "'p5/s0/g1'.*finish_reason"),
        (put("logprobs/teacher", [-1.0]), "'p5/s0/g1'.*logprobs"),
        (put("logprobs/teacher", [float("nan")] * 6), "'p5/s0/g1'.*nan"),
        (put("top_k_ids/teacher", [1]), "'p5/s0/g1' has a top-k support of another size"),
        (put("top_k_logprobs/teacher", [-1.0]), "'p5/s0/g1' has a top-k support of another size"),
        (put("top_k_tail/teacher", None), "'p5/s0/g1' has a top-k support of another size"),
        (put("top_k_tail/teacher", [0.1] * 6), "Top-k"),
        (lambda table: table.drop_columns(["logprobs/teacher"]), "do not fit"),
        (lambda table: table.set_column(0, "rollout_id", pa.array([[i] for i in range(30)])), "do not fit"),
    ],
)
def test_a_row_that_is_not_what_was_exported_is_refused(change: Any, message: str, memory: MemoryStore, tmp_path: Path) -> None:
    rewritten(memory, tmp_path / "run.parquet", change)
    with pytest.raises(LopdError, match=message), pytest.warns(UncheckedDataWarning, match="has no checksums"):
        import_parquet(tmp_path / "run.parquet", MemoryStore(tiny_manifest()))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("finish_reason", "length"),
        ("behavior_logprobs", [-0.5] * 6),
        ("logprobs/teacher", [-0.5] * 6),
        ("top_k_ids/teacher", [1, 2, 1, 1] * 6),
        ("logprobs/a.b-c", [-0.5] * 6),
    ],
)
def test_values_that_were_edited_are_not_taken_for_those_that_are_there(
    name: str, values: Any, memory: MemoryStore, tmp_path: Path
) -> None:
    rewritten(memory, tmp_path / "run.parquet", put(name, values))
    message = rf"rollout 'p5/s0/g1' is there with.* {name}, and an import replaces nothing"
    with pytest.raises(ConflictError, match=message), pytest.warns(UncheckedDataWarning):
        import_parquet(tmp_path / "run.parquet", memory)


def test_a_row_that_comes_twice_in_a_file_is_taken_once_where_it_is_the_same_and_refused_where_it_is_not(
    memory: MemoryStore, tmp_path: Path
) -> None:
    rewritten(memory, tmp_path / "same.parquet", lambda table: pa.concat_tables([table, table.slice(5, 1)]))
    edit = put("logprobs/teacher", [-0.5] * 6)
    rewritten(memory, tmp_path / "other.parquet", lambda table: pa.concat_tables([table, edit(table).slice(5, 1)]))
    store = MemoryStore(tiny_manifest())
    with pytest.warns(UncheckedDataWarning):
        import_parquet(tmp_path / "same.parquet", store)
    assert_equal_stores(memory, store)
    with pytest.raises(ConflictError, match=r"'p5/s0/g1' comes twice, with other logprobs/teacher"), pytest.warns(UncheckedDataWarning):
        import_parquet(tmp_path / "other.parquet", MemoryStore(tiny_manifest()))


@pytest.mark.parametrize("kept", [lambda table: table, lambda table: table.drop_columns(["checksum"])])
@pytest.mark.filterwarnings("ignore::lopd.errors.UncheckedDataWarning")
def test_rows_that_come_twice_do_not_stand_for_those_that_are_missing(kept: Any, memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    table, store = pq.read_table(tmp_path / "run.parquet"), MemoryStore(tiny_manifest())
    half = kept(table).slice(0, 15)
    pq.write_table(pa.concat_tables([half, half]), tmp_path / "run.parquet")
    for _ in range(2):  # as much when it is resumed
        with pytest.raises(CorruptStoreError, match="it has 15 different rollouts in 30 rows, expected the 30 that were exported"):
            import_parquet(tmp_path / "run.parquet", store, rows_per_commit=10)


def test_a_store_of_another_manifest_is_refused(memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    other = MemoryStore(tiny_manifest(301))
    with pytest.raises(ManifestMismatchError, match="vocab_size is 301, expected 300"):
        import_parquet(tmp_path / "run.parquet", other)
    assert len(other) == 0


def test_other_content_under_an_id_is_a_conflict(memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    other = MemoryStore(tiny_manifest())
    other.append([tiny_rollout("masked", [9])])
    with pytest.raises(ConflictError, match="masked"):
        import_parquet(tmp_path / "run.parquet", other)


def test_a_round_of_another_policy_is_a_conflict_and_nothing_is_added(tmp_path: Path) -> None:
    theirs, ours = MemoryStore(tiny_manifest()), MemoryStore(tiny_manifest())
    for number, policy in ((1, "theirs"), (2, "theirs")):
        theirs.begin_generation(number, ModelId("policy", policy, "float32"))
        theirs.append([tiny_rollout(f"r{number}", generation=number)])
    ours.begin_generation(2, ModelId("policy", "ours", "float32"))
    export_parquet(theirs, tmp_path / "run.parquet")
    with pytest.raises(ConflictError, match=r"generation 2 was sampled by policy@ours, expected policy@theirs"):
        import_parquet(tmp_path / "run.parquet", ours)
    with pytest.raises(ConflictError, match="generation 2"):
        from_hf_dataset(to_hf_dataset(theirs), ours)
    assert (len(ours), [*ours.generations]) == (0, [0, 2])


def test_what_is_no_export_of_lopd_is_one_typed_error_that_names_the_file(memory: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    with pytest.raises(StoreNotFoundError, match=r"run\.parquet"):
        parquet_manifest(path)
    for data in (b"", b"no parquet", b"PAR1" * 9):
        path.write_bytes(data)
        with pytest.raises(CorruptStoreError, match=r"run\.parquet"):
            parquet_manifest(path)
    for metadata in (None, {"lopd": "{"}, {"lopd": "[]"}, {"lopd": '{"manifest": {}}'}, {"lopd": '{"manifest": {"schema_version": 1}}'}):
        pq.write_table(pa.table({"a": [1]}, metadata=metadata), path)
        with pytest.raises(CorruptStoreError, match=r"run\.parquet"):
            import_parquet(path, memory)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(path)
    with pytest.raises(
        CorruptStoreError, match=r"run\.parquet: it has no description of a store, so lopd did not export it; export the store with"
    ):
        import_parquet(path, memory)
    with pytest.raises(StorePathError, match="nosuchthing"):
        parquet_manifest("nosuchthing://bucket/run.parquet")
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(LopdError, match=str(tmp_path)):
            parquet_manifest(special)


def test_a_damaged_part_of_a_parquet_file_is_one_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    export_parquet(fill(MemoryStore(tiny_manifest())), path, rows_per_group=8)
    data = bytearray(path.read_bytes())
    data[100:2000] = b"\xff" * 1900
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"run\.parquet"):
        import_parquet(path, MemoryStore(tiny_manifest()))


@pytest.mark.parametrize("package", ["pyarrow", "pyarrow.parquet", "fsspec.core", "datasets"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = package.partition(".")[0]
    for module in (name, package):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{name} is not installed.*lopd\[hf\]"):
        to_hf_dataset(memory) if package == "datasets" else export_parquet(memory, "memory://never")


def test_importing_the_package_loads_no_optional_package() -> None:
    import subprocess

    optional = "{'pyarrow', 'datasets', 'fsspec', 'rich', 'zarr', 'lancedb'}"
    script = f"import sys, lopd.tools.interop, lopd.tools.doctor; print(*{optional} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
