"""Stores that go out and come back."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from attrs import evolve

from lopd.backends.memory_store import MemoryStore
from lopd.protocols import LogprobReader
from lopd.records import ModelId, Scores
from lopd.testing import assert_same_rollout, assert_same_top_k, tiny_manifest, tiny_provenance, tiny_rollout, tiny_top_k

LATER = ModelId("policy", "rev-1", "float32")


def fill(store: Any, n: int = 30, drawn: int = 2) -> Any:
    """Fill a store: two rounds of sampling, a teacher with a support of most rollouts, drawn tokens among it, and a second column of a few."""
    store.begin_generation(1, LATER)
    items = [tiny_rollout(f"p{i}/s0/g{i % 2}", (np.arange(1 + i % 7) + i) % 300, generation=i % 2) for i in range(n)]
    items[3] = tiny_rollout("masked", loss_mask=[True, False, True], behavior_logprobs=[0.0, -1e-45, -3e38], finish_reason="length")
    store.append(items)
    scores = [Scores.of(r, -np.arange(r.response_ids.size) / 7) for r in items]
    ranked = [evolve(score, top_k=tiny_top_k(score.logprobs.size, start=i, drawn=drawn)) for i, score in enumerate(scores)]
    store.append_scores("teacher", tiny_provenance(top_k=2 + drawn, drawn=drawn), ranked[: n - 3])
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


def without_checksums(table: pa.Table) -> pa.Table:
    """Return a table as programs write it that know the columns and not the checksums."""
    document = json.loads(table.schema.metadata[b"lopd"])
    kept = {key: document[key] for key in ("manifest", "generations", "columns", "quarantined")}
    return table.drop_columns(["checksum"]).replace_schema_metadata({"lopd": json.dumps(kept)})


@pytest.fixture
def memory() -> MemoryStore:
    return fill(MemoryStore(tiny_manifest()))
