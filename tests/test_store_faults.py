"""What kills, networks, rivals and damaged disks do to stores.  `LOPD_KILLS=300` kills more writers than a default run has time for."""

import os
import random
import re
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from crash_worker import Call, Place, Worker, check, check_rows, die_at, provenance_of, rollout, scores, take_part, write_to
from fault_proxy import ALWAYS, FaultProxy
from s3_server import SIGNED, S3Server

from lopd.backends.files.cloud import ObstoreFiles
from lopd.backends.lance.store import LanceStore
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import CorruptStoreError, LopdError, StoreExistsError, StorePathError, StoreReadError, StoreWriteError
from lopd.testing import tiny_manifest

#: Some seconds are enough for a test of giving up.
IMPATIENT = {"client_max_retries": 2, "client_retry_timeout": 3}
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
    """Where no store is yet: `new_place(backend, "disk" or "s3")`."""

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


# Writers at the same time


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


# The network


def fill(place: Place, first: int = 0, n: int = 4) -> ZarrStore:
    """A store with these rows, scored in both columns, by a connection without faults."""
    store: ZarrStore = place.open_or_create()
    store.append([rollout(i) for i in range(first, first + n)])
    for column in ("teacher", "ref"):
        store.append_scores(column, provenance_of(column), [scores(column, i) for i in range(first, first + n)])
    return store


@pytest.fixture
def place(s3: S3Server) -> Place:
    """In the bucket, by the direct way; nothing is there yet."""
    return Place("zarr", s3.new_url(), s3.storage_options)


@pytest.fixture
def faulty(place: Place, proxy: FaultProxy) -> Place:
    """The same place through the proxy; whoever uses it gives up after seconds."""
    return place.through(proxy.storage_options | IMPATIENT)


Plan = Callable[[FaultProxy, int, str, str], None]

# Those that strike before the server hears of a request, and those that strike after it did what was asked.
BEFORE: dict[str, Plan] = {
    "a 503": lambda proxy, n, method, path: proxy.refuse(n, method, path),
    "a 500": lambda proxy, n, method, path: proxy.refuse(n, method, path, status=500),
    "a slow answer": lambda proxy, n, method, path: proxy.delay(0.3, n, method, path),
    "a cut": lambda proxy, n, method, path: proxy.cut(n, method, path),
}
AFTER: dict[str, Plan] = {
    "a lost answer": lambda proxy, n, method, path: proxy.cut_after(n, method, path),
    "a 503 for what was done": lambda proxy, n, method, path: proxy.refuse_after(n, method, path),
}
WRITES = {"commit": "/commits/", "array": "/token_ids/", "group": "/segments/zarr", "root": "zarr/zarr.json"}


@pytest.mark.s3
@pytest.mark.parametrize("target", WRITES)
@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
def test_a_write_that_meets_a_fault_is_repeated_and_done_once(
    place: Place, faulty: Place, proxy: FaultProxy, fault: str, target: str
) -> None:
    (BEFORE | AFTER)[fault](proxy, 1, "PUT", WRITES[target])
    store = faulty.open_or_create()
    store.append([rollout(i) for i in range(3)])
    assert proxy.pending == 0
    for reader in (store, place.open()):
        check_rows(reader, range(3))
    assert [(commit.kind, commit.rows) for commit in store.history()] == [("rollouts", 3)]
    # One segment is all there is: nothing was written twice.
    assert (
        len({key.split("/segments/")[1].split("/")[0] for key in proxy.server.keys(place.url) if "/segments/" in key} - {"zarr.json"}) == 1
    )
    assert list(place.open().verify()) == []
    store.append_scores("ref", provenance_of("ref"), [scores("ref", i) for i in range(3)])
    assert place.open().scored("ref").all()


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
def test_creating_a_store_when_the_answer_is_late_or_lost_does_not_find_itself_in_the_way(
    faulty: Place, proxy: FaultProxy, fault: str
) -> None:
    (BEFORE | AFTER)[fault](proxy, 1, "PUT", "zarr.json")
    store = ZarrStore.create(faulty.url, tiny_manifest(), storage_options=faulty.storage_options)
    assert proxy.pending == 0
    assert len(store) == 0
    with pytest.raises(StoreExistsError):
        ZarrStore.create(faulty.url, tiny_manifest(), storage_options=faulty.storage_options)


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*AFTER, "a cut"])
@pytest.mark.parametrize("kind", ["scores", "compaction"])
def test_scores_and_compactions_whose_commit_meets_a_fault_are_committed_once(
    place: Place, faulty: Place, proxy: FaultProxy, fault: str, kind: str
) -> None:
    fill(place)
    fill(place, first=4)
    store = faulty.open()
    (BEFORE | AFTER)[fault](proxy, 1, "PUT", "/commits/")
    if kind == "scores":
        store.append([rollout(8)])
        proxy.heal()
        (BEFORE | AFTER)[fault](proxy, 1, "PUT", "/commits/")
        store.append_scores("ref", provenance_of("ref"), [scores("ref", i) for i in range(9)])
        assert [commit.rows for commit in store.history()][-1] == 1
    else:
        store.compact()
        assert [commit.kind for commit in store.history()].count("compaction") == 3
    assert proxy.pending == 0
    for reader in (store, place.open()):
        check_rows(reader, range(9 if kind == "scores" else 8))
        assert list(reader.verify()) == []


READS = {
    "root": "/zarr.json",
    "list": "prefix=",
    "commit": r"/commits/\d",
    "lines": "/lines/",
    "tokens": "/token_ids/",
    "scores": "/logprobs/",
}


@pytest.mark.s3
@pytest.mark.parametrize("fault", [*BEFORE, "half an answer"])
@pytest.mark.parametrize("target", READS)
def test_a_read_that_meets_a_fault_is_repeated(place: Place, faulty: Place, proxy: FaultProxy, fault: str, target: str) -> None:
    fill(place)
    if fault == "half an answer":
        proxy.cut_within(1, "GET", READS[target])
    else:
        BEFORE[fault](proxy, 1, "GET", READS[target])
    store = faulty.open()
    check_rows(store, range(4))
    assert list(store.verify()) == []
    assert proxy.pending == 0


@pytest.mark.s3
def test_refusals_are_answered_with_pauses_that_grow(place: Place, proxy: FaultProxy) -> None:
    store = fill(place.through(proxy.storage_options))
    moments: list[float] = []
    proxy.call(lambda: moments.append(time.monotonic()), 5, "PUT", "/token_ids/", status=503)
    store.append([rollout(4)])
    pauses = [after - before for before, after in pairwise(moments)]
    # The pauses are drawn at random, from a range that doubles: all that can be said of one is that it is there.
    assert len(pauses) == 4
    assert sum(pauses) > 0.1
    check_rows(place.open(), range(5))


OPERATIONS: dict[str, Callable[[Any], object]] = {
    "append": lambda store: store.append([rollout(i) for i in range(4, 7)]),
    "append_scores": lambda store: store.append_scores("ref", provenance_of("ref"), [scores("ref", i) for i in range(4)]),
    "compact": lambda store: store.compact(),
    "refresh": lambda store: store.refresh(),
    "find": lambda store: store.find(["r0"]),
    "lengths": lambda store: store.lengths(),
    "scored": lambda store: store.scored("ref"),
    "read": lambda store: store.read(range(4), ("teacher",)),
    "history": lambda store: store.history(),
    "begin_generation": lambda store: store.begin_generation(1, tiny_manifest().policy),
}


@pytest.fixture
def half_scored(place: Place) -> Place:
    """Four rows in two segments, all scored in one column, and two in the other."""
    store = place.open_or_create()
    for i in (0, 2):
        store.append([rollout(i), rollout(i + 1)])
        store.append_scores("teacher", provenance_of("teacher"), [scores("teacher", i), scores("teacher", i + 1)])
    # With a gap, so that nobody knows without asking which rows are scored.
    store.append_scores("ref", provenance_of("ref"), [scores("ref", 0), scores("ref", 2)])
    return place


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["a 503", "a cut"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_storage_that_stays_away_ends_each_call_in_one_clear_error_and_nothing_is_changed(
    half_scored: Place, proxy: FaultProxy, operation: str, fault: str
) -> None:
    s3 = proxy.server
    store = half_scored.through(proxy.storage_options | IMPATIENT).open()
    commits = [key for key in s3.keys(half_scored.url) if "/commits/" in key]
    BEFORE[fault](proxy, ALWAYS, "", "")
    with pytest.raises((StoreReadError, StoreWriteError)) as caught:
        OPERATIONS[operation](store)
    proxy.heal()
    assert half_scored.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert s3.storage_options["aws_secret_access_key"] not in str(caught.value)
    assert [key for key in s3.keys(half_scored.url) if "/commits/" in key] == commits
    # The same store works on when the storage is back.
    OPERATIONS[operation](store)
    check_rows(half_scored.open())
    assert list(half_scored.open().verify()) == []


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["a 503", "a cut"])
@pytest.mark.parametrize("make", ["create", "open", "open_or_create"])
def test_a_storage_that_stays_away_when_a_store_is_opened_is_one_clear_error(
    faulty: Place, proxy: FaultProxy, make: str, fault: str
) -> None:
    BEFORE[fault](proxy, ALWAYS, "", "")
    with pytest.raises((StoreReadError, StoreWriteError), match=re.escape(faulty.url)):
        getattr(ZarrStore, make)(faulty.url, tiny_manifest(), storage_options=faulty.storage_options)


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["a 503", "a cut"])
@pytest.mark.parametrize("operation", ["append", "append_scores", "compact"])
def test_a_write_that_fails_between_its_first_object_and_its_commit_is_an_error_and_can_be_repeated(
    half_scored: Place, proxy: FaultProxy, operation: str, fault: str
) -> None:
    store = half_scored.through(proxy.storage_options | IMPATIENT).open()
    BEFORE[fault](proxy, ALWAYS, "PUT", "/commits/")
    with pytest.raises(StoreWriteError):
        OPERATIONS[operation](store)
    proxy.heal()
    check_rows(half_scored.open(), range(4))
    OPERATIONS[operation](store)
    check_rows(half_scored.open(), range(7 if operation == "append" else 4))
    assert list(half_scored.open().verify()) == []


@pytest.mark.s3
@pytest.mark.parametrize("operation", ["append", "append_scores", "compact"])
@pytest.mark.parametrize("loss", AFTER)
@pytest.mark.parametrize("then", ["a 503", "a cut"])
def test_a_commit_whose_fate_the_writer_cannot_learn_is_there_with_all_its_data(
    half_scored: Place, proxy: FaultProxy, operation: str, loss: str, then: str
) -> None:
    store = half_scored.through(proxy.storage_options | IMPATIENT).open()

    def lose() -> None:
        # From the commit's own answer on, nothing comes through any more.
        BEFORE[then](proxy, ALWAYS, "", "")

    proxy.call(lose, 1, "PUT", "/commits/", after=True, **({"cut": True} if loss == "a lost answer" else {"status": 503}))
    with pytest.raises((StoreReadError, StoreWriteError)) as caught:
        OPERATIONS[operation](store)
    assert "nothing of this call was committed" not in str(caught.value)
    proxy.heal()
    reader = half_scored.open()
    check_rows(reader, range(7 if operation == "append" else 4))
    assert list(reader.verify()) == []
    commits = len(reader.history())
    OPERATIONS[operation](store)
    check_rows(store, range(len(reader)))
    if operation != "compact":
        assert len(half_scored.open().history()) == commits


@pytest.mark.s3
@pytest.mark.parametrize("cut", [False, True])
def test_a_rival_that_commits_first_is_not_taken_for_a_lost_answer(place: Place, faulty: Place, proxy: FaultProxy, *, cut: bool) -> None:
    rival = fill(place)
    store = faulty.open()
    proxy.call(lambda: rival.append([rollout(5), rollout(4)]), 1, "PUT", "/commits/", cut=cut)
    store.append([rollout(4), rollout(6)])
    assert proxy.pending == 0
    for reader in (store, place.open()):
        check_rows(reader, [0, 1, 2, 3, 5, 4, 6])
        assert list(reader.verify()) == []
    assert [commit.rows for commit in store.history() if commit.kind == "rollouts"] == [4, 2, 1]


@pytest.mark.s3
def test_a_request_that_hangs_is_given_up_and_repeated(place: Place, proxy: FaultProxy) -> None:
    fill(place)
    proxy.delay(3.0, 1, "GET", "/token_ids/")
    proxy.delay(3.0, 1, "PUT", "/commits/")
    store = place.through(proxy.storage_options | {"timeout": "1s", "client_retry_timeout": 20}).open()
    check_rows(store, range(4))
    store.append([rollout(4)])
    assert proxy.count("GET", "/token_ids/") > 1
    check_rows(place.open(), range(5))
    assert [commit.rows for commit in place.open().history() if commit.kind == "rollouts"] == [4, 1]


@pytest.mark.s3
def test_a_key_that_is_refused_is_an_error_at_once_and_not_repeated(place: Place, faulty: Place, proxy: FaultProxy) -> None:
    fill(place)
    proxy.refuse(ALWAYS, status=403)
    with pytest.raises(StoreReadError):
        faulty.open()
    assert proxy.count() == 1


# Damage


def _class_of(key: str) -> str:
    """What kind of object this is: its key without the names that are drawn at random."""
    return re.sub(r"\d{10}", "#", re.sub(r"[0-9a-f]{32}", "*", key.split("/", 1)[1]))


def everything(place: Place) -> None:
    """Eight rows after a compaction, in a store that holds no object that it does not need."""
    fill(place)
    store = fill(place, first=4)
    store.compact()
    store.sweep(older_than=-60)


def one_of_each_kind(s3: S3Server, place: Place) -> list[tuple[str, str]]:
    """Kinds of objects that are not empty, and the key of one of that kind."""
    kinds = {_class_of(key): key for key in s3.keys(place.url) if s3.read(key)}
    assert len(kinds) > 30
    return sorted(kinds.items())


def noticed(place: Place) -> bool:
    """Whether a reader of everything, or `verify`, says that something is wrong; rows that are read are the right ones all the same."""
    try:
        store = place.open()
        check_rows(store, range(8))
        return list(store.verify()) != []
    except LopdError:
        return True


@pytest.mark.s3
def test_a_flipped_bit_in_any_kind_of_object_gives_the_right_rows_or_an_error_and_is_found_by_verify(s3: S3Server, place: Place) -> None:
    everything(place)
    rng, unnoticed = random.Random(3), []
    for kind, key in one_of_each_kind(s3, place):
        data = s3.read(key)
        for _ in range(3 if "LOPD_KILLS" in os.environ else 1):
            bit = rng.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            s3.write(key, bytes(flipped))
            if not noticed(place):
                unnoticed.append(kind)
        s3.write(key, data)
    assert not noticed(place)
    # Groups are for Zarr readers; lopd never looks at them.
    assert [kind for kind in unnoticed if not re.fullmatch(r"(segments|scores|scores/\w+)(/\*)?/zarr.json", kind)] == []


@pytest.mark.s3
def test_a_lost_object_of_any_kind_gives_the_right_rows_or_an_error(s3: S3Server, place: Place) -> None:
    everything(place)
    # Without the last record the store is what it was before it.
    last = max(key for key in s3.keys(place.url) if "/commits/" in key)
    for key in [key for _, key in one_of_each_kind(s3, place) if key != last]:
        data = s3.read(key)
        s3.delete([key])
        noticed(place)
        s3.write(key, data)
    assert not noticed(place)


@pytest.mark.s3
@pytest.mark.parametrize("size", ["all but one byte", "half"])
def test_an_object_cut_short_gives_the_right_rows_or_an_error(s3: S3Server, place: Place, size: str) -> None:
    everything(place)
    for _, key in one_of_each_kind(s3, place):
        data = s3.read(key)
        s3.write(key, data[: -1 if size == "all but one byte" else len(data) // 2])
        noticed(place)
        s3.write(key, data)
    key = next(key for key in s3.keys(place.url) if key.endswith("/token_ids/c.0"))
    s3.write(key, s3.read(key)[:-1])
    store = place.open()
    with pytest.raises(CorruptStoreError, match="token_ids"):
        store.read(range(8))


# Requests


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


# The proxy itself


@pytest.fixture
def fetch(s3: S3Server, proxy: FaultProxy) -> Iterator[Callable[..., bytes]]:
    """One request through the proxy, by a client that repeats nothing."""
    endpoint = proxy.storage_options["aws_endpoint"]

    def ask(key: str, method: str = "GET", data: bytes | None = None, **headers: str) -> bytes:
        every = SIGNED | {"Content-Type": "binary/octet-stream"} | headers
        request = urllib.request.Request(f"{endpoint}/{s3.bucket}/{key}", data, every, method=method)  # noqa: S310  # loopback
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  # loopback
            return bytes(response.read())

    return ask


@pytest.mark.s3
def test_the_proxy_passes_on_bytes_ranges_and_statuses_and_remembers_requests(
    s3: S3Server, proxy: FaultProxy, fetch: Callable[..., bytes]
) -> None:
    fetch("proxy%20a", "PUT", b"0123456789")
    assert s3.read("proxy a") == fetch("proxy%20a") == b"0123456789"
    assert fetch("proxy%20a", Range="bytes=2-4") == b"234"
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch("proxy-none")
    caught.value.close()
    assert caught.value.code == 404
    assert [(r.method, r.path, r.range) for r in proxy.requests][:3] == [
        ("PUT", f"/{s3.bucket}/proxy a", None),
        ("GET", f"/{s3.bucket}/proxy a", None),
        ("GET", f"/{s3.bucket}/proxy a", "bytes=2-4"),
    ]
    assert proxy.count("GET", "proxy a") == 2
    proxy.forget()
    assert proxy.count() == 0


@pytest.mark.s3
@pytest.mark.parametrize(("plan", "done"), [("refuse", False), ("cut", False), ("refuse_after", True), ("cut_after", True)])
def test_a_fault_strikes_as_often_as_planned_before_or_after_the_server_did_its_work(
    s3: S3Server, proxy: FaultProxy, fetch: Callable[..., bytes], plan: str, *, done: bool
) -> None:
    key = f"proxy-{plan}"
    getattr(proxy, plan)(1, "PUT", key)
    fetch("proxy-other", "PUT", b"1")
    with pytest.raises((urllib.error.URLError, OSError)) as caught:
        fetch(key, "PUT", b"1")
    if isinstance(caught.value, urllib.error.HTTPError):
        assert (caught.value.code, b"SlowDown" in caught.value.read()) == (503, True)
        caught.value.close()
    assert (key in s3.keys("proxy-")) == done
    fetch(key, "PUT", b"2")
    assert s3.read(key) == b"2"
    assert proxy.pending == 0


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
@pytest.mark.parametrize("place", ["options", "environment"])
def test_plain_http_that_nobody_allowed_is_refused_at_once_and_not_after_minutes_of_repetition(kind, place, monkeypatch):
    options = {"aws_endpoint": "http://somebody:secret@127.0.0.1:9", "aws_access_key_id": "a", "aws_secret_access_key": "b"}
    if place == "environment":
        for name, value in options.items():
            monkeypatch.setenv(name.upper(), value)
    with pytest.raises(StorePathError, match=r"its endpoint is http://127.0.0.1:9, expected https; set AWS_ALLOW_HTTP=true"):
        kind.open("s3://bucket/run", storage_options=options if place == "options" else None)


def test_an_endpoint_of_s3_says_nothing_about_other_clouds(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    assert ObstoreFiles("gs://bucket/run", {}).url == "gs://bucket/run"
    with pytest.raises(StorePathError, match="expected https"):
        ObstoreFiles("s3://bucket/run", {})
    assert ObstoreFiles("s3://bucket/run", {"allow_http": "true"}).url == "s3://bucket/run"
