"""How many requests reading and opening a store take."""

import random
import re
from collections import Counter

import pytest
from crash_worker import Place, provenance_of, rollout, scores
from fault_places import fill, place  # noqa: F401
from fault_proxy import FaultProxy


@pytest.mark.s3
@pytest.mark.parametrize("segments", [1, 3])
def test_reading_whole_segments_takes_at_most_four_gets_for_each_of_them(place: Place, proxy: FaultProxy, segments: int) -> None:
    # One segment of rollouts, and one of scores in each column, for each round; plain rows, without masks and behavior log-probs.
    numbers = [i for i in range(200) if i % 3 and i % 4][: 20 * segments]
    store = place.open_or_create()
    for i in range(segments):
        part = numbers[20 * i : 20 * i + 20]
        store.append([rollout(n) for n in part])
        for column in ("teacher", "ref"):
            store.append_scores(column, provenance_of(column), [scores(column, n) for n in part])
    reader = place.through(proxy.storage_options).open()
    proxy.forget()
    rows = reader.read(range(len(numbers)), ("teacher", "ref"))
    assert [row.rollout.rollout_id for row in rows] == [f"r{n}" for n in numbers]
    assert proxy.count() == proxy.count("GET")
    gets = Counter(
        path.group(1) for request in proxy.requests if (path := re.search(r"/((?:segments|scores/[a-z]+)/[0-9a-f]{32})/", request.path))
    )
    assert len(gets) == 3 * segments
    assert sum(gets.values()) == proxy.count()
    assert max(gets.values()) <= 4, dict(gets)


@pytest.mark.s3
def test_random_rows_are_read_with_as_few_requests_as_a_whole_segment(place: Place, proxy: FaultProxy) -> None:
    numbers = [i for i in range(400) if i % 3 and i % 4][:100]
    place.open_or_create().append([rollout(n) for n in numbers])
    reader = place.through(proxy.storage_options).open()
    proxy.forget()
    reader.read(random.Random(4).sample(range(100), 40))
    assert proxy.count("GET") <= 4
    assert proxy.count("PUT|POST|DELETE") == 0


@pytest.mark.s3
def test_opening_a_store_asks_for_no_data(place: Place, proxy: FaultProxy) -> None:
    fill(place)
    proxy.forget()
    place.through(proxy.storage_options).open()
    assert proxy.count("", "/(segments|scores)/") == 0
    assert proxy.count() <= 8
