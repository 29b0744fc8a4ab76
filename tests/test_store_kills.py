"""Writers that are killed, and writers at the same time.  `LOPD_KILLS=300` kills more than a default run has time for."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_worker import Call, Place, Worker, check, check_rows, die_at, take_part, write_to
from fault_proxy import ALWAYS, FaultProxy
from s3_server import S3Server

WRITERS = 8
BACKENDS = [
    pytest.param("zarr", "disk", id="zarr on disk"),
    pytest.param("lance", "disk", id="lance on disk"),
    pytest.param("zarr", "s3", marks=pytest.mark.s3, id="zarr on s3"),
    pytest.param("lance", "s3", marks=pytest.mark.s3, id="lance on s3"),
]
_DEFAULT_KILLS = {("zarr", "disk"): 40, ("lance", "disk"): 15, ("zarr", "s3"): 8, ("lance", "s3"): 4}


@pytest.fixture
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], Place]:
    """Return `new_place(backend, "disk" or "s3")`, a place where no store is yet."""

    def make(backend: str, where: str) -> Place:
        if where == "disk":
            return Place(backend, str(tmp_path / f"{len(os.listdir(tmp_path))}.{backend}"))  # noqa: PTH208  # a number is all we want
        server: S3Server = request.getfixturevalue("s3")
        return Place(backend, server.new_url(f".{backend}"), server.storage_options)

    return make


def kills_of(backend: str, where: str) -> int:
    return int(os.environ.get("LOPD_KILLS", _DEFAULT_KILLS[backend, where]))


# Killed writers


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_a_writer_that_is_killed_at_any_instant_loses_nothing_it_acknowledged_and_leaves_nothing_torn(
    backend: str, where: str, new_place: Callable[[str, str], Place], record_property: Callable[[str, object], None]
) -> None:
    rng, kills, calls = random.Random(2), kills_of(backend, where), 0
    acknowledged: list[Call] = []
    for kill in range(kills):
        if kill % 25 == 0:
            # A young store again: it is what is checked after each kill, and its creation is an instant too.
            place, acknowledged = new_place(backend, where), []
        worker = Worker(write_to, place)
        worker.wait_for(rng.randrange(8))
        time.sleep(rng.choice((0.0, 0.01, 0.05, 0.3)) * rng.random())
        acknowledged += worker.kill()
        calls += len(worker.acknowledged)
        check(place, acknowledged)
    record_property("kills", kills)
    print(f"{kills} kills, {calls} calls returned, {check(place, acknowledged)} batches in the last store")
    assert calls >= kills


def test_a_writer_that_is_killed_before_each_of_its_file_operations_leaves_whole_calls(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kills, step = 0, 1 if "LOPD_KILLS" in os.environ else 15
    while True:
        place = Place("zarr", str(tmp_path / str(kills)))
        worker = Worker(die_at, place, 1 + kills * step, 5)
        acknowledged = worker.join()
        check(place, acknowledged)
        if worker.process.exitcode == 0:
            break
        kills += 1
        # What is left behind is in nobody's way.
        if kills % 8 == 0:
            again = Worker(write_to, place, 5)
            assert check(place, [*acknowledged, *again.join()]) == 5
            assert again.process.exitcode == 0
    record_property("kills", kills)
    print(f"{kills} kills, one before every {step}th file operation")
    assert kills * step > 100


@pytest.mark.s3
@pytest.mark.timeout(3600)
def test_a_writer_that_is_killed_at_any_of_its_requests_leaves_whole_calls(
    s3: S3Server, proxy: FaultProxy, record_property: Callable[[str, object], None]
) -> None:
    def work(until: int) -> tuple[int, int | None]:
        place = Place("zarr", s3.new_url(), s3.storage_options)
        seen = Counter[str]()

        def count() -> None:
            seen["requests"] += 1
            if seen["requests"] == until:
                worker.process.kill()

        proxy.heal()
        proxy.call(count, ALWAYS, after=True)
        worker = Worker(write_to, place.through(proxy.storage_options), 5)
        check(place, worker.join())
        return seen["requests"], worker.process.exitcode

    total, exitcode = work(until=0)
    assert exitcode == 0
    kills = min(int(os.environ.get("LOPD_KILLS", "8")), total)
    for kill in range(kills):
        # Requests side by side come in any order, so a kill at the very last may come too late.
        assert work(until=1 + kill * total // kills)[1] in (-signal.SIGKILL, 0)
    record_property("kills", kills)
    print(f"{kills} kills, spread over {total} requests")


@pytest.mark.parametrize("where", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_what_killed_writers_left_behind_can_be_swept_and_the_store_stays_as_it_was(
    where: str, new_place: Callable[[str, str], Place]
) -> None:
    place, acknowledged = new_place("zarr", where), []
    for _ in range(4):
        worker = Worker(write_to, place)
        worker.wait_for(8)
        acknowledged += worker.kill()
    before = check(place, acknowledged)
    place.open().sweep(older_than=-60)
    assert check(place, acknowledged) == before
    again = Worker(write_to, place)
    again.wait_for(4)
    assert check(place, [*acknowledged, *again.kill()]) >= before


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_eight_processes_that_append_and_score_at_once_lose_nothing_and_write_nothing_twice(
    backend: str, where: str, new_place: Callable[[str, str], Place], request: pytest.FixtureRequest
) -> None:
    rounds = 6 if where == "disk" else 2
    place = new_place(backend, where)
    if where == "s3":
        # The server behind checks whether an object is there, and then makes it; S3 does both in one go, and so does the proxy.
        place = place.through(request.getfixturevalue("proxy").storage_options)
    reader = place.open_or_create()
    workers = [Worker(take_part, place, writer, rounds) for writer in range(WRITERS)]
    while any(worker.process.is_alive() for worker in workers):
        # A reader beside them sees whole calls, and never fewer than before.
        before = len(reader)
        reader.refresh()
        assert len(reader) >= before
        check_rows(reader)
    for worker in workers:
        assert len(worker.join()) == 1
        assert worker.process.exitcode == 0
    store = place.open()
    numbers = [int(row.rollout.rollout_id[1:]) for row in store.read(range(len(store)))]
    expected = {1000 * (writer + 1) + i for writer in range(WRITERS) for i in range(2 * rounds)} | set(range(rounds))
    assert Counter(numbers) == Counter(expected)
    assert store.scored("ref").all()
    check_rows(store, numbers)
    assert list(store.verify()) == []
    committed = Counter[str]()
    for commit in store.history():
        committed[commit.kind] += commit.rows
    assert committed["rollouts"] == committed["scores"] == len(expected)
