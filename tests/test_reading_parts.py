"""Parts and samples of a store: every row once, with the columns that it has."""

import numpy as np
import pytest
from attrs import evolve
from test_doctor import rollout

from lopd.backends.memory_store import MemoryStore
from lopd.protocols.reading import evenly, parts
from lopd.records import Scores
from lopd.testing import tiny_manifest, tiny_provenance, tiny_top_k


def test_parts_cover_every_row_once_with_all_columns_it_has_in_one_read_for_all_alike() -> None:
    store = MemoryStore(tiny_manifest())
    items = [rollout(i) for i in range(23)]
    store.append(items)
    for column, k, rows in (("a", 0, range(3, 20)), ("b", 2, [0, 1, 7, 8, 9, 22])):
        scores = [Scores.of(items[i], np.full(items[i].response_ids.size, -1.0)) for i in rows]
        scores = [evolve(s, top_k=tiny_top_k(s.logprobs.size)) for s in scores] if k else scores
        store.append_scores(column, tiny_provenance(column, k), scores)
    whole = parts(store, 4)
    assert [list(part.rows) for part in whole[:5]] == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert sorted(row for part in whole for row in part.rows) == list(range(23))
    assert max(len(part.rows) for part in whole) == 4
    assert [list(part.rows) for part in parts(store, 20)] == [[0, 1], [2], [3, 4, 5, 6, *range(10, 20)], [7, 8, 9], [20, 21], [22]]
    for part in whole:
        for row in part.rows:
            assert set(part.columns) == {name for name in "ab" if store.scored(name)[row]}
        assert part.top_k == tuple(name for name in part.columns if name == "b")
        assert [r.rollout.rollout_id for r in part.read(store)] == [items[i].rollout_id for i in part.rows]
    assert parts(MemoryStore(tiny_manifest())) == []


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 11])
def test_an_even_sample_has_no_row_twice(count: int) -> None:
    rows = evenly(np.arange(100, 110), count).tolist()
    assert len(set(rows)) == len(rows) == min(count, 10)
    assert set(rows) <= set(range(100, 110))
