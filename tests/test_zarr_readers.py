"""A `ZarrStore` as others see it: by zarr alone, and with what they add to its metadata."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from test_zarr_upkeep import go_on, grown
from zarr_stores import _quick_disk, filled, many, place, rows_of  # noqa: F401

from lopd.backends.zarr.state import State
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import CorruptStoreError
from lopd.testing import tiny_manifest


def test_a_walk_of_the_hierarchy_finds_the_live_rows_and_what_codes_mean(tmp_path: Path) -> None:
    store = grown(tmp_path / "run", 70)
    root = zarr.open_group(place(store), mode="r")
    for parent in (root["segments"], root["scores/teacher"]):
        groups = dict(parent.groups())
        replaced = {name for group in groups.values() for name in group.attrs["lopd_replaces"]}
        assert sum(group["lines"].shape[0] for group in groups.values()) > 70
        assert sum(group["lines"].shape[0] for name, group in groups.items() if name not in replaced) == 70
    lines = next(iter(root["segments"].groups()))[1]["lines"]
    reason = lines[0, lines.attrs["fields"].index("finish_reason")]
    assert lines.attrs["finish_reasons"][reason] == many(0, 1)[0].finish_reason
    assert lines.attrs["has_behavior_bits"] == ["behavior_logprobs", "sampler_logprobs"]


@pytest.mark.filterwarnings("ignore")
def test_attributes_of_others_and_consolidated_metadata_are_no_damage(filled: ZarrStore) -> None:
    root = zarr.open_group(place(filled), mode="r+")
    root.attrs["mine"] = {"by": "me", "mean_kl": float("nan")}
    root["segments"].attrs["mine"] = 1
    _, segment = next(iter(root["segments"].groups()))
    segment.attrs["mine"] = segment["lines"].attrs["mine"] = segment["token_ids"].attrs["mine"] = -float("inf")
    zarr.consolidate_metadata(place(filled))
    assert "consolidated_metadata" in json.loads((place(filled) / "zarr.json").read_text())
    again = ZarrStore.open(place(filled), tiny_manifest())
    assert rows_of(again) == ["m", "b", "r0", "r1"]
    assert list(again.verify()) == []
    for store in (again, filled):
        store.append(many(9, 1))
        store.append(many(9, 2))
    np.testing.assert_array_equal(ZarrStore.open(place(filled)).find(["r9", "r10"]), [4, 5])


@pytest.mark.filterwarnings("ignore")
def test_metadata_that_others_made_too_large_is_not_damage(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr.consolidate_metadata(place(filled))
    for module in ("records.stored", "backends.root"):
        monkeypatch.setattr(f"lopd.{module}.LARGEST_JSON", 5000)
    with pytest.raises(CorruptStoreError, match=r'zarr.json has \S+ bytes, expected at most 5,000; remove .* "consolidated_metadata"'):
        ZarrStore.open(place(filled))
    zarr.open_group(place(filled), mode="r+", use_consolidated=False).attrs["mine"] = 1
    assert len(ZarrStore.open(place(filled))) == 4


def test_a_read_stands_at_one_state_where_the_store_is_refreshed_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, places = grown(tmp_path / "run", 15), State.places
    reader = ZarrStore.open(place(store))
    go_on(store, 15, 1)  # merges them

    def refreshed(state: State, column: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        found = places(state, column, rows)
        reader.refresh()  # as the thread that trains may, while another reads ahead
        return found

    monkeypatch.setattr(State, "places", refreshed)
    assert [row.scores["teacher"][0] for row in reader.read(range(15), ("teacher",))] == [-i for i in range(15)]
    assert len(reader) == 16
