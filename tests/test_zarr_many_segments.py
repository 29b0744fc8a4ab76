"""A `ZarrStore` of many segments: what it looks at to find rows grows with the rows, and not with rows times segments."""

import pickle
from itertools import compress
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from zarr_stores import _quick_disk, many  # noqa: F401

from lopd.backends import id_index
from lopd.backends.files.local import LocalFiles
from lopd.backends.zarr import compaction, scattered
from lopd.backends.zarr.scattered import LINE_BITS, Scattered, _Block
from lopd.backends.zarr.segment import Segment
from lopd.backends.zarr.store import ZarrStore
from lopd.testing import tiny_manifest, tiny_provenance, tiny_scores

SEGMENTS, ROWS = 60, 240


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Count what is searched for, what is sorted, and how many files are asked for together."""
    counts: dict[str, list[int]] = {"searchsorted": [], "argsort": [], "run": []}
    for owner, name, at in ((np, "searchsorted", 1), (np, "argsort", 0), (LocalFiles, "run", 1)):
        real: Any = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _r=real, _n=name, _at=at, **k: counts[_n].append(np.size(a[_at])) or _r(*a, **k))
    return counts


def score(store: ZarrStore, *rows: int) -> None:
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(many(row, 1)[0], -row) for row in rows])


def segment(*rows: int) -> Any:
    return Mock(meta=Mock(dense=False, first_row=rows[0], last_row=rows[-1]), keys=lambda *_: np.array(rows))


def run(calls: Any) -> list[Any]:
    return [call() for call in calls]


@pytest.fixture
def interleaved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZarrStore:
    """Make a store of large appends, which are never merged, of rollouts and of scores; rows lie in the segments of those anywhere."""
    monkeypatch.setattr(compaction, "_LARGE_TOKENS", 1)
    monkeypatch.setattr(compaction, "_MOST_BYTES", 1)
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for first in range(0, ROWS, ROWS // SEGMENTS):
        store.append(many(first, ROWS // SEGMENTS))
    for k in range(SEGMENTS):
        score(store, k, SEGMENTS + k, 3 * SEGMENTS - 1 - k)
    return ZarrStore.open(tmp_path / "run")


def test_which_rows_have_scores_is_asked_for_together_and_looked_up_in_few_sorted_blocks(interleaved: ZarrStore, count: Any) -> None:
    assert np.flatnonzero(interleaved.scored("teacher")).tolist() == [*range(3 * SEGMENTS)]
    assert count["run"] == [SEGMENTS], "files that are asked for together"
    assert sum(count["searchsorted"]) < 4 * ROWS
    read = interleaved.read(range(3 * SEGMENTS), ("teacher",))
    assert [row.scores["teacher"][0] for row in read] == [-row for row in range(3 * SEGMENTS)]
    interleaved.find(["r0"])
    count["argsort"].clear()
    for row in range(3 * SEGMENTS, 3 * SEGMENTS + 20, 2):
        score(interleaved, row, row + 20)
        assert interleaved.scored("teacher").sum() == row + 2
    assert max(count["argsort"]) <= 20, "what was sorted stays as it is beside the few rows that come"


def test_a_row_is_looked_for_in_no_segment_whose_range_it_is_not_in(interleaved: ZarrStore, count: Any) -> None:
    score(interleaved, 200, 205)
    score(interleaved, 210, 215)
    count["run"].clear()
    assert interleaved._snapshot.scored_rows("teacher", np.array([216, 211, 210])).tolist() == [False, False, True]
    assert count["run"] == [1]


@pytest.mark.parametrize("asked", [(5,), (9, 0, 5), (0, 9, 5)])
def test_of_two_segments_with_one_row_the_first_has_it_whichever_was_looked_into_first(asked: tuple[int, ...]) -> None:
    first, second = segment(0, 2, 5), segment(5, 7, 9)
    found = Scattered([first, second])
    for row in asked:
        place = found.places(np.array([row]), run).tolist()
    assert place == [2]
    after = Scattered([second, segment(0, 2, 5, 8)], found)
    assert after.places(np.array([5, 8, 6]), run).tolist() == [0, (1 << LINE_BITS) + 3, -1]


def test_a_reader_that_stands_before_a_merge_reads_which_rows_have_scores_once(
    interleaved: ZarrStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = pickle.dumps(interleaved)
    assert interleaved._writer._merge("teacher", interleaved._state.segments_of("teacher")[-4:], 1 << 62)
    interleaved.sweep(older_than=-60)
    reader, asked, real = pickle.loads(late), list[Segment](), Segment.keys  # noqa: S301
    monkeypatch.setattr(Segment, "keys", lambda self, *rest: asked.append(self) or real(self, *rest))
    for most in (2 * SEGMENTS, 1, 1):
        asked.clear()
        assert [row.scores["teacher"][0] for row in reader.read(range(3 * SEGMENTS), ("teacher",))] == [-row for row in range(3 * SEGMENTS)]
        assert len(asked) <= most, "of those that are gone, one is asked for again"
    asked.clear()
    assert reader.scored("teacher").sum() == 3 * SEGMENTS
    assert len(asked) == 1


def test_two_threads_that_ask_one_column_first_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Scattered([segment(0, 2, 4), segment(6, 7, 9)])
    other, looked, ended = Thread(target=lambda: found.places(np.array([7]), run)), Event(), Event()
    make, calls = _Block.of, list[int]()

    def of(parts: Any) -> _Block:
        if current_thread() is not other:
            other.start()
            assert looked.wait(60)
        return make(parts)

    def compressed(*args: Any) -> list[Any]:
        if current_thread() is other:
            calls.append(1)
            if len(calls) == 2:  # it has what it read, and will say what it has not
                looked.set()
                assert ended.wait(60)
        return [*compress(*args)]

    with monkeypatch.context() as patch:
        patch.setattr(_Block, "of", of)
        patch.setattr(scattered, "compress", compressed)
        assert found.places(np.array([2]), run).tolist() == [1]
        ended.set()
        other.join()
    assert found.places(np.array([2, 7, 3]), run).tolist() == [1, (1 << LINE_BITS) + 1, -1]


def test_names_are_asked_for_together_and_looked_up_in_few_sorted_blocks(
    interleaved: ZarrStore, count: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segment, "lines", lambda *_: pytest.fail("hashed ids have a file of their own"))
    monkeypatch.setattr("lopd.backends.id_index._NAMES_AT_ONCE", 50)
    rows = np.random.default_rng(0).permutation(ROWS + 30)
    np.testing.assert_array_equal(interleaved.find([f"r{row}" for row in rows]), np.where(rows < ROWS, rows, -1))
    assert count == {"run": [SEGMENTS], "argsort": [ROWS], "searchsorted": [50] * 5 + [20]}
    interleaved.append(many(ROWS, 4))
    assert interleaved.find([f"r{ROWS + 3}"]).tolist() == [ROWS + 3]
    assert max(count["argsort"][1:]) == 4, "what was sorted stays as it is beside the few rows that come"


def test_names_that_share_the_first_half_of_their_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = id_index.xxh3_128_digest
    monkeypatch.setattr(id_index, "xxh3_128_digest", lambda name: bytes(8) + real(name)[8:])
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    for first in range(0, 20, 5):
        store.append(many(first, 5))
    assert store.find([f"r{row}" for row in range(24, -1, -1)]).tolist() == [-1] * 5 + [*range(19, -1, -1)]


def test_rows_are_found_while_writers_merge_their_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_FAN_IN", 3)
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    store.append(many(0, 100))
    there = np.zeros(100, np.bool_)
    for n, rows in enumerate(np.random.default_rng(0).permutation(100)[:90].reshape(-1, 2)):
        score(store, *rows.tolist())
        there[rows] = True
        if n % 2:
            np.testing.assert_array_equal(store.scored("teacher"), there)
            known = np.flatnonzero(there)
            assert [row.scores["teacher"][0] for row in store.read(known, ("teacher",))] == [-row for row in known]
