"""A store as a dataset of torch, also in the workers of a data loader."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from exchanged import fill, memory  # noqa: F401
from torch.utils.data import DataLoader, Subset

from lopd import collate, label_rollouts
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import ArgumentError, ForkedStoreError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.records import Scores
from lopd.testing import assert_same_rollout, assert_same_top_k, tiny_manifest, tiny_provenance, tiny_top_k
from lopd.tools.interop import TorchDataset


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


def test_rows_leave_out_what_is_in_quarantine(memory: MemoryStore) -> None:
    waiting = [row.rollout.rollout_id for row in memory.read(np.flatnonzero(~memory.scored("teacher")).tolist())]
    memory.quarantine("teacher", memory.columns["teacher"], dict.fromkeys(waiting, "too long"))
    remedy = r"27 rollouts, expected 30 \(3 in quarantine\); leave them out by `rows=np.flatnonzero\(store.scored\('teacher'\)\)`"
    with pytest.raises(MissingScoresError, match=remedy):
        TorchDataset(memory, ["teacher"])
    assert len(TorchDataset(memory, ["teacher"], ["teacher"], np.flatnonzero(memory.scored("teacher")))) == 27
    dataset = TorchDataset(memory, ["teacher"], rows=np.array([4, 2]))
    assert [row.rollout.rollout_id for row in dataset] == [row.rollout.rollout_id for row in memory.read([2, 4])]
    for outside in (2, -1):
        with pytest.raises(NoSuchRowError, match=f"row {outside} was asked for, expected 0 to 1"):
            dataset[outside]
    with pytest.raises(NoSuchRowError, match="row 30 was chosen"):
        TorchDataset(memory, rows=np.array([30]))


def test_what_is_missing_comes_with_what_gives_it(memory: MemoryStore) -> None:
    label_rollouts(memory, lambda _, rollout: 1.0, None, rows=np.arange(4))
    ways = {
        "teacher": "run `score_rollouts",
        "label": "run `label_rollouts",
        "behavior": "sample with an engine that reports its log-probs",
    }
    for column, way in ways.items():
        with pytest.raises(MissingScoresError, match=f"column '{column}' has scores for [0-9]+ rollouts, expected 30; {way}"):
            TorchDataset(memory, [column])


def test_what_a_torch_dataset_is_asked_for_is_a_row_and_several_columns(memory: MemoryStore) -> None:
    for columns, top_k in (("behavior", ()), ((), "behavior")):
        with pytest.raises(ArgumentError, match=r"TorchDataset: it was given a str \('behavior'\), expected a list of texts; pass"):
            TorchDataset(memory, columns, top_k)
    index: Any
    for index in (slice(0, 1), "a", None, [0]):
        with pytest.raises(InvalidRecordError, match="expected a vector of whole numbers"):
            TorchDataset(memory)[index]


def first(batch: Sequence[Any]) -> Sequence[Any]:
    """Return the batch: a `collate_fn` that travels to a spawned worker."""
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
