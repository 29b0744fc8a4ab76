"""Stores as Hugging Face datasets: what goes out comes back equal."""

from pathlib import Path

import datasets
import pytest
from exchanged import assert_equal_stores, memory  # noqa: F401

from lopd.backends.memory_store import MemoryStore
from lopd.errors import CorruptStoreError
from lopd.protocols import reading
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout
from lopd.tools.interop import from_hf_dataset, hf_dataset_manifest, to_hf_dataset


def test_a_store_comes_back_equal_from_a_hugging_face_dataset(memory: MemoryStore, tmp_path: Path) -> None:
    made = to_hf_dataset(memory)
    made.save_to_disk(tmp_path / "saved")
    for dataset in (made, datasets.load_from_disk(tmp_path / "saved")):
        again = MemoryStore(hf_dataset_manifest(dataset))
        for _ in range(2):
            from_hf_dataset(dataset, again, rows_per_commit=7)
        assert_equal_stores(again, memory)


def test_few_rows_are_imported_at_once_where_their_values_are_many(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, appended, append = to_hf_dataset(memory), list[int](), MemoryStore.append
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", int(memory.lengths().sum()) * (4 + 9 + 1) // 6)
    monkeypatch.setattr(MemoryStore, "append", lambda self, new: appended.append(len(new)) or append(self, new))
    from_hf_dataset(dataset, again := MemoryStore(hf_dataset_manifest(dataset)))
    assert 3 < len(appended) < len(memory)
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
    for said in ("", "A card in words."):
        dataset = datasets.Dataset.from_dict({"text": ["a"]}, info=datasets.DatasetInfo(description=said))
        with pytest.raises(CorruptStoreError, match="Dataset: it has no description of a store"):
            from_hf_dataset(dataset, memory)
