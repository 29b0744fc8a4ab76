"""Other people's tools: what goes out comes back equal, and what cannot be vouched for is said."""

import pickle
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
import torch
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from lopd import collate
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import (
    ConflictError,
    CorruptStoreError,
    ForkedStoreError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    MissingDependencyError,
    MissingScoresError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreReadError,
    StoreWriteError,
    TokenizerMismatchError,
)
from lopd.protocols import LogprobReader
from lopd.records import ModelId, Provenance, Rollout, Scores, fingerprint_tokenizer
from lopd.testing import (
    assert_same_rollout,
    assert_same_top_k,
    rollouts,
    scores_for,
    tiny_manifest,
    tiny_provenance,
    tiny_rollout,
    tiny_top_k,
)
from lopd.tools.interop import (
    TorchDataset,
    export_parquet,
    from_hf_dataset,
    hf_dataset_manifest,
    import_authors_parquet,
    import_parquet,
    parquet_manifest,
    to_hf_dataset,
)

LATER = ModelId("policy", "rev-1", "float32")


def fill(store: Any, n: int = 30) -> Any:
    """Two rounds of sampling, a teacher with a top-k support of most rollouts, and a second column of a few."""
    store.begin_generation(1, LATER)
    items = [tiny_rollout(f"p{i}/s0/g{i % 2}", (np.arange(1 + i % 7) + i) % 300, generation=i % 2) for i in range(n)]
    items[3] = tiny_rollout("masked", loss_mask=[True, False, True], behavior_logprobs=[0.0, -1e-45, -3e38], finish_reason="length")
    store.append(items)
    scores = [Scores.of(r, -np.arange(r.response_ids.size) / 7) for r in items]
    ranked = [evolve(score, top_k=tiny_top_k(score.logprobs.size, start=i)) for i, score in enumerate(scores)]
    store.append_scores("teacher", tiny_provenance(top_k=2), ranked[: n - 3])
    store.append_scores("a.b-c", tiny_provenance("other"), scores[2:9:3])
    return store


def assert_equal_stores(left: LogprobReader, right: LogprobReader) -> None:
    assert (left.manifest, dict(left.generations), dict(left.columns)) == (right.manifest, dict(right.generations), dict(right.columns))
    assert len(left) == len(right)
    for mine, theirs in zip(left.read(range(len(left))), right.read(range(len(right))), strict=True):
        assert_same_rollout(mine.rollout, theirs.rollout)
    for column, provenance in left.columns.items():
        np.testing.assert_array_equal(left.scored(column), right.scored(column))
        assert dict(left.quarantined(column)) == dict(right.quarantined(column))
        rows, top_k = np.flatnonzero(left.scored(column)).tolist(), [column] if provenance.top_k else []
        for mine, theirs in zip(left.read(rows, [column], top_k), right.read(rows, [column], top_k), strict=True):
            np.testing.assert_array_equal(mine.scores[column], theirs.scores[column])
            for name in top_k:
                assert_same_top_k(mine.top_k[name], theirs.top_k[name])


@pytest.fixture
def memory() -> MemoryStore:
    return fill(MemoryStore(tiny_manifest()))


# torch


def test_a_torch_dataset_gives_each_rollout_as_a_dict_of_arrays(memory: MemoryStore) -> None:
    scored = MemoryStore(tiny_manifest())
    items = [row.rollout for row in memory.read([0, 2, 4])]
    scored.append(items)
    scored.append_scores(
        "teacher",
        tiny_provenance(top_k=2),
        [evolve(Scores.of(r, [-1.0] * r.response_ids.size), top_k=tiny_top_k(r.response_ids.size)) for r in items],
    )
    dataset = TorchDataset(scored, ["teacher"], ["teacher"])
    assert len(dataset) == 3
    for row, rollout in zip(dataset, items, strict=True):
        assert_same_rollout(row.rollout, rollout)
        assert row.scores["teacher"].tolist() == [-1.0] * rollout.response_ids.size
        assert_same_top_k(row.top_k["teacher"], tiny_top_k(rollout.response_ids.size))


def test_a_torch_dataset_without_complete_columns_is_refused_before_it_is_read(memory: MemoryStore) -> None:
    for columns, top_k, message in (
        (["teacher"], [], "27 rollouts, expected 30"),
        (["nobody"], [], "0 rollouts"),
        ([], ["teacher"], "27 rollouts"),
    ):
        with pytest.raises(MissingScoresError, match=message):
            TorchDataset(memory, columns, top_k)
    memory.append_scores(
        "plain", tiny_provenance("plain"), [Scores.of(r.rollout, r.rollout.response_ids * 0) for r in memory.read(range(30))]
    )
    with pytest.raises(MissingScoresError, match="no top-k support"):
        TorchDataset(memory, [], ["plain"])


def first(batch: Sequence[Any]) -> Sequence[Any]:
    """A `collate_fn` that travels to a spawned worker."""
    return batch


def test_a_batch_is_one_read(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = list[list[int]](), MemoryStore.read
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **kw: calls.append(list(rows)) or original(self, rows, **kw))
    loaded = list(DataLoader(TorchDataset(memory), batch_size=8, collate_fn=first))
    assert [len(batch) for batch in loaded] == [len(call) for call in calls] == [8, 8, 8, 6]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_workers_of_a_data_loader_read_a_zarr_store(start: str, tmp_path: Path) -> None:
    store = fill(ZarrStore.create(tmp_path / "run.zarr", tiny_manifest()))
    store.read([0])
    loader = DataLoader(
        TorchDataset(store), batch_size=4, num_workers=2, collate_fn=first, multiprocessing_context=start, shuffle=True, timeout=100
    )
    read = {row.rollout.rollout_id: row.rollout.response_ids.tolist() for batch in loader for row in batch}
    assert read == {row.rollout.rollout_id: row.rollout.response_ids.tolist() for row in store.read(range(30))}


def test_workers_of_a_data_loader_make_the_batches_that_training_takes(tmp_path: Path) -> None:
    store = fill(ZarrStore.create(tmp_path / "run.zarr", tiny_manifest()))
    rows = np.flatnonzero(store.scored("teacher"))
    dataset = Subset(TorchDataset(store), rows.tolist())
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate, multiprocessing_context="fork", timeout=100)
    for first_row, batch in zip(range(0, len(rows), 4), loader, strict=True):
        expected = collate(store.read(rows[first_row : first_row + 4].tolist()))
        torch.testing.assert_close(batch.inputs, expected.inputs, rtol=0, atol=0)
        torch.testing.assert_close(batch.weight, expected.weight, rtol=0, atol=0)


def test_a_forked_worker_refuses_a_lance_store_in_one_sentence(tmp_path: Path) -> None:
    store = fill(LanceStore.create(tmp_path / "run.lance", tiny_manifest()))
    loader = DataLoader(TorchDataset(store), batch_size=4, num_workers=1, collate_fn=first, multiprocessing_context="fork", timeout=60)
    with pytest.raises(ForkedStoreError, match="spawn"):
        list(loader)


def test_a_torch_dataset_pickles_with_its_reader(tmp_path: Path) -> None:
    dataset = TorchDataset(fill(ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())))
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301  # our own bytes, made a moment ago
    assert again[29].rollout.rollout_id == dataset[29].rollout.rollout_id == "p29/s0/g1"


# parquet


def round_trip(store: LogprobReader, path: Path, **sizes: int) -> MemoryStore:
    export_parquet(store, path, rows_per_group=sizes.get("group", 1024))
    again = MemoryStore(parquet_manifest(path))
    import_parquet(path, again, rows_per_commit=sizes.get("commit", 1024))
    return again


@pytest.mark.parametrize(("group", "commit"), [(1024, 1024), (7, 4), (1, 100)])
def test_a_store_comes_back_equal_from_parquet(memory: MemoryStore, tmp_path: Path, group: int, commit: int) -> None:
    assert_equal_stores(round_trip(memory, tmp_path / "run.parquet", group=group, commit=commit), memory)


def test_any_rollouts_and_scores_come_back_equal_from_parquet(tmp_path: Path) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(items=st.lists(rollouts(), max_size=5, unique_by=lambda rollout: rollout.rollout_id), data=st.data())
    def check(items: list[Rollout], data: st.DataObject) -> None:
        store = MemoryStore(tiny_manifest())
        store.append(items)
        for column, k in (("teacher", 0), ("ranked", 3)):
            chosen = [item for item in items if data.draw(st.booleans())]
            scores = [evolve(data.draw(scores_for(item)), floored=0) for item in chosen]
            scores = [evolve(s, top_k=tiny_top_k(s.logprobs.size, k)) for s in scores] if k else scores
            store.append_scores(column, tiny_provenance(column, k), scores)
            refused = [item.rollout_id for item in items if data.draw(st.booleans())]
            store.quarantine(column, tiny_provenance(column, k), dict.fromkeys(refused, "too long"))
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
    assert (len(row["logprobs/teacher"]), len(row["top_k_ids/teacher"]), row["logprobs/a.b-c"]) == (3, 6, None)
    assert file.read().to_pylist()[-1]["logprobs/teacher"] is None


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


def test_an_id_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout("fine"), tiny_rollout("not \ud800")])
    with pytest.raises(InvalidRecordError, match="lone surrogate at 4"):
        export_parquet(store, tmp_path / "run.parquet")
    assert list(tmp_path.iterdir()) == []


def rewritten(store: LogprobReader, path: Path, change: Any) -> None:
    """An export with one table changed, and the description that it had."""
    export_parquet(store, path)
    table = pq.read_table(path)
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
    with pytest.raises(LopdError, match=message):
        import_parquet(tmp_path / "run.parquet", MemoryStore(tiny_manifest()))


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
    with pytest.raises(StorePathError, match="nosuchthing"):
        parquet_manifest("nosuchthing://bucket/run.parquet")
    with pytest.raises(LopdError, match=str(tmp_path)):
        parquet_manifest(tmp_path)


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
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package.split('.', maxsplit=1)[0]} is not installed.*lopd\[hf\]"):
        to_hf_dataset(memory) if package == "datasets" else export_parquet(memory, "memory://never")


def test_importing_the_package_loads_no_optional_package() -> None:
    import subprocess

    optional = "{'pyarrow', 'datasets', 'fsspec', 'rich', 'zarr', 'lancedb'}"
    script = f"import sys, lopd.tools.interop, lopd.tools.doctor; print(*{optional} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Hugging Face datasets


def test_a_store_comes_back_equal_from_a_hugging_face_dataset(memory: MemoryStore, tmp_path: Path) -> None:
    made = to_hf_dataset(memory)
    made.save_to_disk(tmp_path / "saved")
    for dataset in (made, datasets.load_from_disk(tmp_path / "saved")):
        again = MemoryStore(hf_dataset_manifest(dataset))
        for _ in range(2):
            from_hf_dataset(dataset, again, rows_per_commit=7)
        assert_equal_stores(again, memory)


def test_a_selection_of_a_hugging_face_dataset_is_imported_in_its_order(memory: MemoryStore) -> None:
    store = MemoryStore(tiny_manifest())
    from_hf_dataset(to_hf_dataset(memory).select([9, 3, 5]), store)
    assert [row.rollout.rollout_id for row in store.read(range(3))] == ["p9/s0/g1", "masked", "p5/s0/g1"]
    assert store.scored("teacher").all()


def test_a_selection_brings_the_quarantine_of_its_own_rows_and_no_others() -> None:
    full, part = MemoryStore(tiny_manifest()), MemoryStore(tiny_manifest())
    full.append([tiny_rollout(f"r{i}") for i in range(4)])
    full.quarantine("teacher", tiny_provenance(), {"r1": "too long", "r3": "a NaN"})
    from_hf_dataset(to_hf_dataset(full).select([3, 0]), part)
    assert dict(part.quarantined("teacher")) == {0: "a NaN"}


def test_an_empty_store_goes_to_a_hugging_face_dataset_and_back() -> None:
    dataset = to_hf_dataset(MemoryStore(tiny_manifest()))
    assert len(dataset) == 0
    store = MemoryStore(hf_dataset_manifest(dataset))
    from_hf_dataset(dataset, store)
    assert len(store) == 0


def test_a_hugging_face_dataset_of_somebody_else_is_refused(memory: MemoryStore) -> None:
    with pytest.raises(CorruptStoreError, match="description"):
        from_hf_dataset(datasets.Dataset.from_dict({"text": ["a"]}), memory)


# the authors' rows


@pytest.fixture
def teacher(tokenizer: Any) -> Provenance:
    return evolve(tiny_provenance(), vocab_hash=fingerprint_tokenizer(tokenizer).vocab_hash)


@pytest.fixture
def empty(tokenizer: Any) -> MemoryStore:
    return MemoryStore(evolve(tiny_manifest(), tokenizer=fingerprint_tokenizer(tokenizer)))


def authors_row(prompt: str = "<|user|>hi<|eos|><|assistant|>", response: Sequence[int] = (10, 11, 12), **metadata: Any) -> dict[str, Any]:
    values = {
        "is_lightning_opd": True,
        "response_tokens": list(response),
        "loss_mask": [1] * len(response),
        "response": "text",
        "teacher_log_probs": [-0.5] * len(response),
    }
    return {"prompt": prompt, "label": "0", "metadata": {**values, **metadata}}


def write_authors(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_authors_rows_become_rollouts_and_a_column_of_scores(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    rows = [
        authors_row(),
        authors_row(response=[20]),
        authors_row("<|user|>you<|eos|><|assistant|>", range(20, 28), loss_mask=[1, 0] * 4, teacher_log_probs=np.arange(-8, 0) / 8),
    ]
    path = write_authors(tmp_path / "opd.parquet", rows)
    for _ in range(2):
        report = import_authors_parquet(path, empty, tokenizer, teacher, rows_per_commit=2)
        assert (report.rollouts, report.response_tokens, report.masked_tokens, report.refused) == (3, 12, 4, ())
        assert report.finish_reasons == {"stop": 2, "length": 1}
        assert len(empty) == 3
    read = empty.read(range(3), ("teacher",))
    assert [row.rollout.rollout_id.split("/")[1] for row in read] == ["s0", "s1", "s0"]
    assert read[0].rollout.rollout_id.split("/")[0] == read[1].rollout.rollout_id.split("/")[0]
    assert tokenizer.convert_ids_to_tokens(read[0].rollout.prompt_ids.tolist()) == ["<|user|>", "h", "i", "<|eos|>", "<|assistant|>"]
    assert read[2].rollout.loss_mask.tolist() == [True, False] * 4
    # with a zero in the mask, the i-th score still belongs to the i-th token
    assert read[2].scores["teacher"].tolist() == (np.arange(-8, 0) / 8).tolist()
    assert (empty.columns["teacher"], empty.scored("behavior").any()) == (teacher, False)


def test_the_report_says_what_the_authors_rows_cannot_vouch_for(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    path = write_authors(tmp_path / "opd.parquet", [authors_row()])
    inferred = import_authors_parquet(path, empty, tokenizer, teacher).not_vouched_for
    for subject in ("token ids", "EOS", "prompt", "teacher", "sampling", "behavior log-probs", "finish reason"):
        assert sum(sentence.startswith(f"{subject}: ") for sentence in inferred) == 1, subject
    assert "inferred" in inferred[-1]
    other = MemoryStore(empty.manifest)
    given_reason = import_authors_parquet(path, other, tokenizer, teacher, column="other", finish_reason="length")
    assert "the caller said" in given_reason.not_vouched_for[-1]
    assert given_reason.finish_reasons == {"length": 1}
    assert other.columns.keys() == {"other"}


@pytest.mark.parametrize(
    "bad",
    [
        (authors_row(loss_mask=[1, 1]), "lengths are.*'loss_mask': 2"),
        (authors_row(loss_mask=[1, 0, 1], teacher_log_probs=[-1.0, -1.0]), "'teacher_log_probs': 2"),
        (authors_row(teacher_log_probs=None), "'teacher_log_probs': None"),
        (authors_row(response=[]), "0 tokens"),
        (authors_row(""), "0 tokens"),
        (authors_row(teacher_log_probs=[-1.0, 0.25, -1.0]), r"logprobs\[1\] is 0.25"),
        (authors_row(teacher_log_probs=[-1.0, -np.inf, -1.0]), r"logprobs\[1\] is -inf"),
        (authors_row(response=[10, 96, 12]), r"response_ids\[1\] is 96"),
        ({**authors_row(), "prompt": None}, "prompt is None"),
        ({**authors_row(), "metadata": None}, "metadata None"),
    ],
)
def test_a_row_of_the_authors_that_disagrees_with_itself_is_refused_by_name(
    bad: tuple[dict[str, Any], str], tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    row, message = bad
    path = write_authors(tmp_path / "opd.parquet", [authors_row("hi"), authors_row("you"), row, authors_row("me")])
    with pytest.raises(InvalidRecordError, match=rf"opd\.parquet, row 2: .*{message}"):
        import_authors_parquet(path, empty, tokenizer, teacher, rows_per_commit=2)
    assert len(empty) == 2
    report = import_authors_parquet(path, empty, tokenizer, teacher, rows_per_commit=2, leave_out_refused=True)
    assert (report.rollouts, len(empty), len(report.refused)) == (3, 3, 1)
    assert "row 2" in report.refused[0]


def test_the_authors_rows_need_one_vocabulary(
    tokenizer: Any, swapped_tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    path = write_authors(tmp_path / "opd.parquet", [authors_row()])
    for other, provenance in ((swapped_tokenizer, teacher), (tokenizer, evolve(teacher, vocab_hash="another"))):
        with pytest.raises(TokenizerMismatchError):
            import_authors_parquet(path, empty, other, provenance)
    assert len(empty) == 0


def test_a_parquet_file_with_other_fields_is_no_file_of_the_authors(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "opd.parquet")
    with pytest.raises(CorruptStoreError, match="fields are"):
        import_authors_parquet(tmp_path / "opd.parquet", empty, tokenizer, teacher)
    with pytest.raises(StoreNotFoundError):
        import_authors_parquet(tmp_path / "none.parquet", empty, tokenizer, teacher)


def test_the_authors_prompts_get_no_special_tokens_added(teacher: Provenance, empty: MemoryStore, tokenizer: Any, tmp_path: Path) -> None:
    class Adding:
        chat_template, eos_token_id, pad_token_id = tokenizer.chat_template, 0, 0

        def get_vocab(self) -> Any:
            return tokenizer.get_vocab()

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return {"input_ids": [0] * add_special_tokens + tokenizer(text, add_special_tokens=False)["input_ids"]}

    path = write_authors(tmp_path / "opd.parquet", [authors_row("hi")])
    import_authors_parquet(path, empty, Adding(), teacher)
    assert empty.read([0])[0].rollout.prompt_ids.tolist() == tokenizer("hi", add_special_tokens=False)["input_ids"]
