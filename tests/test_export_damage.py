"""Exports that are damaged, forged, incomplete or without checksums, as parquet and as Hugging Face datasets."""

import json
import os
import random
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attrs import evolve
from exchanged import assert_equal_stores, fill, memory, without_checksums  # noqa: F401

from lopd.backends.memory_store import MemoryStore
from lopd.backends.sealing import seal
from lopd.errors import ArgumentError, CorruptStoreError, LopdError, UncheckedDataWarning
from lopd.records import Scores
from lopd.testing import tiny_manifest, tiny_provenance
from lopd.tools.interop import export_parquet, from_hf_dataset, hf_dataset_manifest, import_parquet, parquet_manifest, to_hf_dataset

datasets.disable_progress_bars()
FLIPS = 6000 if "LOPD_KILLS" in os.environ else 150


def whole_store() -> MemoryStore:
    """Make a store with scores, top-k, a masked response, log-probs of the engine and of the sampler, two rounds, and a quarantine."""
    original, store = fill(MemoryStore(tiny_manifest())), MemoryStore(tiny_manifest())
    store.begin_generation(1, original.generations[1])
    rollouts = [row.rollout for row in original.read(range(30))]
    rollouts[3] = evolve(rollouts[3], sampler_logprobs=[-0.25, 0.0, -3.0])
    store.append(rollouts)
    from_hf_dataset(to_hf_dataset(original), store)
    store.append_scores("a.b-c", tiny_provenance("other"), [Scores.of(rollouts[3], [-1.0, -2.0, -3.0])])
    store.quarantine("teacher", tiny_provenance(top_k=4, drawn=2), {"p29/s0/g1": "too long"})
    return store


def from_parquet(path: Path) -> MemoryStore:
    store = MemoryStore(parquet_manifest(path))
    import_parquet(path, store, rows_per_commit=8)
    return store


def from_dataset(dataset: Any) -> MemoryStore:
    store = MemoryStore(hf_dataset_manifest(dataset))
    from_hf_dataset(dataset, store, rows_per_commit=8)
    return store


def loaded(path: Path) -> Any:
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # what `datasets` raises is its own, and shows that something is wrong
        raise CorruptStoreError(f"Dataset: {error}") from error


def flips(paths: list[Path], seed: int) -> Any:
    """Flip one random bit of these files after another, and put it back."""
    rng, data = random.Random(seed), {path: path.read_bytes() for path in paths}
    for path in rng.choices(paths, [len(some) for some in data.values()], k=FLIPS):
        bit, damaged = rng.randrange(8 * len(data[path])), bytearray(data[path])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield f"bit {bit} of {path.name}"
        path.write_bytes(data[path])


def assert_noticed(imported: Callable[[], MemoryStore], store: MemoryStore, flip: str) -> bool:
    """Return whether there was an error; without one the rows must be those that were exported."""
    try:
        again = imported()
    except (LopdError, UncheckedDataWarning):  # the latter where the name of the column of checksums is damaged
        return True
    try:
        assert_equal_stores(again, store)
    except AssertionError as error:
        pytest.fail(f"{flip} gave something else: {error}")
    return False


def test_a_flipped_bit_of_a_parquet_file_gives_the_very_rows_or_an_error(tmp_path: Path) -> None:
    store, path = whole_store(), tmp_path / "run.parquet"
    export_parquet(store, path, rows_per_group=8)
    noticed = [assert_noticed(lambda: from_parquet(path), store, flip) for flip in flips([path], 20)]
    assert sum(noticed) > FLIPS / 2
    assert_equal_stores(from_parquet(path), store)


def test_a_flipped_bit_of_a_saved_dataset_gives_the_very_rows_or_an_error(tmp_path: Path) -> None:
    store = whole_store()
    to_hf_dataset(store).save_to_disk(tmp_path / "saved")
    noticed = []
    for flip in flips(sorted((tmp_path / "saved").iterdir()), 21):
        noticed.append(assert_noticed(lambda: from_dataset(loaded(tmp_path / "saved")), store, flip))
    assert sum(noticed) > FLIPS / 2
    assert_equal_stores(from_dataset(datasets.load_from_disk(tmp_path / "saved")), store)


def test_every_bit_of_a_description_counts(tmp_path: Path) -> None:
    dataset = to_hf_dataset(whole_store())
    text = dataset.info.description.encode()
    for bit in range(0, 8 * len(text), 3):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        dataset.info.description = bytes(damaged).decode(errors="surrogateescape")
        with pytest.raises(CorruptStoreError, match="description"):
            hf_dataset_manifest(dataset)


def other(value: Any) -> Any:
    """Return a value of the same type that is still allowed."""
    if isinstance(value, list):
        return [other(value[0]), *value[1:]]
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    return {"stop": "length", "length": "stop"}.get(value, value + "x") if isinstance(value, str) else type(value)(not value)


@pytest.mark.parametrize("name", to_hf_dataset(whole_store()).column_names)
def test_every_value_of_a_row_is_checked(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    export_parquet(whole_store(), path)
    table = pq.read_table(path)
    values = table[name].to_pylist()
    values[3] = other(values[3])
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path)
    with pytest.raises(CorruptStoreError, match=r"run\.parquet: row 3, rollout 'maskedx?', does not match"):
        from_parquet(path)
    dataset = to_hf_dataset(whole_store())
    with pytest.raises(CorruptStoreError, match="Dataset: row 3, rollout"):
        from_dataset(dataset.map(lambda row, i: {name: values[3] if i == 3 else row[name]}, with_indices=True, features=dataset.features))


def test_a_damaged_page_is_said_with_the_file_and_the_first_row_that_it_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    export_parquet(whole_store(), path, rows_per_group=8)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(5)
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"run\.parquet, from row 16: it cannot be read .*CRC"):
        from_parquet(path)


def test_rows_that_are_missing_are_noticed(tmp_path: Path) -> None:
    store = whole_store()
    export_parquet(store, tmp_path / "run.parquet")
    table = pq.read_table(tmp_path / "run.parquet")
    pq.write_table(table.slice(0, 20), tmp_path / "run.parquet")
    empty = MemoryStore(tiny_manifest())
    with pytest.raises(CorruptStoreError, match=r"it has 20 rows, expected the 30 that were exported; .* filtered .*`batches\(rows="):
        import_parquet(tmp_path / "run.parquet", empty)
    assert (len(empty), [*empty.generations]) == (0, [0])
    dataset = to_hf_dataset(store)
    cut = datasets.Dataset(dataset.data.slice(0, 20), info=dataset.info, fingerprint=dataset._fingerprint)
    with pytest.raises(CorruptStoreError, match="it has 20 rows, expected the 30 that were exported"):
        from_dataset(cut)
    assert len(from_dataset(dataset.select(range(20)))) == 20


def test_exports_that_were_joined_are_sent_one_by_one(memory: MemoryStore) -> None:
    joined = datasets.concatenate_datasets([to_hf_dataset(memory), to_hf_dataset(fill(MemoryStore(tiny_manifest()), 9))])
    with pytest.raises(CorruptStoreError, match=r"description cannot be read .*; several exports were joined: import one after the other"):
        hf_dataset_manifest(joined)


def old(tmp_path: Path) -> tuple[MemoryStore, Path, Any]:
    """Return what lopd 0.2 exported: the store, its parquet file and its dataset."""
    with tarfile.open(Path(__file__).parent / "data" / "exports.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    store = fill(MemoryStore(tiny_manifest()), drawn=0)
    store.quarantine("teacher", tiny_provenance(top_k=2), {"p29/s0/g1": "too long é"})
    return store, tmp_path / "run.parquet", datasets.load_from_disk(tmp_path / "hf")


def test_what_was_exported_without_checksums_is_imported_and_one_warning_says_so(tmp_path: Path) -> None:
    store, path, dataset = old(tmp_path)
    for imported, name in ((lambda: from_parquet(path), "run.parquet"), (lambda: from_dataset(dataset), "data-00000-of-00001.arrow")):
        with pytest.warns(UncheckedDataWarning) as warned:
            assert_equal_stores(imported(), store)
        (one,) = warned
        assert f"{name}: it has no checksums" in str(one.message)
        assert one.filename == __file__


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_values_may_be_edited_where_the_column_of_checksums_is_taken_out(kind: str, memory: MemoryStore, tmp_path: Path) -> None:
    path, column = tmp_path / "run.parquet", "behavior_logprobs"
    export_parquet(memory, path)
    table = pq.read_table(path).drop_columns(["checksum"]).append_column("note", pa.array(["mine"] * 30))
    edited = [None if values is None else [-0.5] * len(values) for values in table[column].to_pylist()]
    field = table.schema.field(column)
    pq.write_table(table.set_column(table.column_names.index(column), field, pa.array(edited, field.type)), path)
    dataset = to_hf_dataset(memory).remove_columns("checksum")
    with pytest.warns(UncheckedDataWarning, match="it has no checksums") as warned:
        store = from_parquet(path) if kind == "parquet" else from_dataset(dataset)
    assert len(warned) == 1
    if kind == "dataset":
        assert_equal_stores(store, memory)
        return
    found = [row.rollout.behavior_logprobs for row in store.read(range(len(memory)))]
    assert [None if values is None else values.tolist() for values in found] == edited
    pq.write_table(pq.read_table(path).slice(0, 20), path)
    with pytest.warns(UncheckedDataWarning), pytest.raises(CorruptStoreError, match="it has 20 rows, expected the 30"):
        from_parquet(path)


@pytest.mark.parametrize("name", ["logprobs/b", "top_k_ids/b"])
def test_scores_that_were_added_to_an_export_are_not_dropped_in_silence(name: str, memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    table, values = pq.read_table(tmp_path / "run.parquet"), [[-0.5]] * 30
    pq.write_table(table.append_column(name, pa.array(values)), tmp_path / "run.parquet")
    for imported in (lambda: from_parquet(tmp_path / "run.parquet"), lambda: from_dataset(to_hf_dataset(memory).add_column(name, values))):
        with pytest.raises(CorruptStoreError, match=rf"whose scores the columns \['{name}'\] are; drop them, .*`store.append_scores`"):
            imported()


def test_a_file_of_another_program_is_imported_with_the_warning(memory: MemoryStore, tmp_path: Path) -> None:
    export_parquet(memory, tmp_path / "run.parquet")
    pq.write_table(without_checksums(pq.read_table(tmp_path / "run.parquet")), tmp_path / "own.parquet")
    with pytest.warns(UncheckedDataWarning, match=r"own\.parquet: it has no checksums"):
        assert_equal_stores(from_parquet(tmp_path / "own.parquet"), memory)


def test_other_programs_read_an_export(tmp_path: Path) -> None:
    store, path = whole_store(), tmp_path / "run.parquet"
    export_parquet(store, path, rows_per_group=8)
    rows = pq.read_table(path, page_checksum_verification=True).to_pylist()
    again = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=tmp_path / "cache")
    assert again.to_list() == rows == to_hf_dataset(store).to_list()
    with pytest.raises(CorruptStoreError, match=r"its description is lost, as `load_dataset`, pandas .* with `import_parquet`"):
        from_dataset(again)
    pandas = pytest.importorskip("pandas").read_parquet(path)
    for name in ("response_ids", "logprobs/teacher", "top_k_ids/teacher"):
        assert pandas[name][4].tolist() == rows[4][name]


def test_duckdb_reads_an_export(tmp_path: Path) -> None:
    export_parquet(whole_store(), tmp_path / "run.parquet")
    found = pytest.importorskip("duckdb").read_parquet(str(tmp_path / "run.parquet"))
    assert [dict(zip(found.columns, values, strict=True)) for values in found.fetchall()] == pq.read_table(
        tmp_path / "run.parquet"
    ).to_pylist()


def forged(change: Callable[[dict[str, Any]], None]) -> Any:
    """Make a dataset whose description was changed by somebody who computed its checksum."""
    dataset = to_hf_dataset(whole_store())
    document = json.loads(dataset.info.description)
    del document["checksum"]
    change(document)
    dataset.info.description = seal(document).decode()
    return dataset


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["columns"][name] = document["columns"].pop("teacher")
        document["order"] = [name, "a.b-c"]
        document["quarantined"] = {}

    return change


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = path_and_value

    def change(document: dict[str, Any]) -> None:
        for key in path:
            document = document[key]
        document[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(renamed(name) for name in ("../../x", "/etc/x", "..", "", "a/b", "behavior", "a\0b", "zarr.json", "\x1b[31m", "x" * 1000)),
        *(put("rows", value) for value in (-1, 29, 31, 10**30, "30", True, 30.0)),
        *(put("columns", "teacher", "top_k", value) for value in (-1, 1, 3, 301, 10**12, 10**30, "2", 2.5, None, True)),
        *(put("columns", "teacher", "model", value) for value in (None, [], "x", {"name": "a"})),
        *(put("columns", "teacher", value) for value in (None, [], "x", {})),
        *(
            put("quarantined", value)
            for value in (None, [], 3, {"teacher": 3}, {"teacher": {"p29/s0/g1": 3}}, {"nobody": {"p29/s0/g1": "x"}})
        ),
        *(put("generations", value) for value in (None, [], {"x": {}}, {"1": None}, {"1": {"name": 1}})),
        *(put("generations", number, {"name": "a", "revision": "b", "dtype": "c"}) for number in ("-1", "9" * 30, "1.5", "9" * 9000)),
        *(put("order", value) for value in (None, 3, ["nobody"], [[]])),
        *(put("manifest", value) for value in (None, [], {}, {"schema_version": 1})),
        *(put("manifest", "tokenizer", value) for value in (None, {}, [])),
        *(put("manifest", "sampling", value) for value in (None, 3, {"stop_ids": "x"})),
        *(put("manifest", "sampling", "temperature", value) for value in ("hot", -1, None)),
        put("manifest", "generation", "x"),
        put("sampler", "yes"),
    ],
)
def test_a_forged_description_is_a_typed_error(change: Any) -> None:
    with pytest.raises(LopdError, match=r"Dataset|Rollout"):
        from_dataset(forged(change))


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 3, "3", "null", '"x"', "\ud800", '{"manifest":' * 9999, None, 3, b"\xff"])
def test_a_description_that_is_not_one_is_a_typed_error(text: Any) -> None:
    dataset = to_hf_dataset(whole_store())
    dataset.info.description = text
    with pytest.raises(CorruptStoreError, match="Dataset"):
        from_dataset(dataset)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("response_ids", pa.string(), "abc"),
        ("response_ids", pa.list_(pa.int32()), [5, None]),
        ("response_ids", pa.list_(pa.int64()), [2**40]),
        ("response_ids", pa.list_(pa.float64()), [0.5]),
        ("response_ids", pa.list_(pa.list_(pa.int32())), [[5]]),
        ("loss_mask", pa.list_(pa.bool_()), [True, None]),
        ("logprobs/teacher", pa.list_(pa.float32()), [None]),
        ("logprobs/teacher", pa.list_(pa.string()), ["-1"]),
        ("top_k_ids/teacher", pa.list_(pa.int32()), [None, None]),
        ("generation", pa.int64(), None),
        ("generation", pa.int64(), -1),
        ("generation", pa.int64(), 2**62),
        ("generation", pa.string(), "x"),
        ("rollout_id", pa.string(), None),
        ("finish_reason", pa.string(), None),
        ("content_hash", pa.binary(), b""),
        ("content_hash", pa.int64(), 3),
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_a_value_of_another_type_is_a_typed_error(name: str, kind: Any, value: Any, checked: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    export_parquet(whole_store(), path)
    table = pq.read_table(path)
    if not checked:
        table = without_checksums(table)
    values = pa.array([value] * len(table), kind)
    pq.write_table(table.set_column(table.schema.get_field_index(name), pa.field(name, kind), values), path)
    expected = r"run\.parquet|Rollout|Scores|Token ids|Loss mask|Log-probs|Top-k"
    with nullcontext() if checked else pytest.warns(UncheckedDataWarning), pytest.raises(LopdError, match=expected):
        from_parquet(path)


@pytest.mark.parametrize("what", [None, "run", {"train": 1}, datasets.DatasetDict()])
def test_what_is_not_a_dataset_is_refused(what: Any) -> None:
    with pytest.raises(ArgumentError, match=r"expected a `datasets\.Dataset`"):
        hf_dataset_manifest(what)
