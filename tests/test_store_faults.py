"""What networks and rivals do to stores in a bucket."""

import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from crash_worker import Place, check_rows, provenance_of, rollout, scores
from fault_places import fill, place  # noqa: F401
from fault_proxy import ALWAYS, FaultProxy

from lopd.backends import retry
from lopd.backends.files import cloud
from lopd.backends.files.cloud import ObstoreFiles
from lopd.backends.lance.store import LanceStore
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import StoreExistsError, StorePathError, StoreReadError, StoreWriteError
from lopd.testing import tiny_manifest

#: Some seconds are enough for a test of giving up.
IMPATIENT = {"client_max_retries": 2, "client_retry_timeout": 3}


# The network


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two requests passes a tenth of the time; how often they are repeated stays."""
    shortest = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(seconds=1.5), "base": 2}
    make = obstore.store.from_url
    monkeypatch.setattr(
        obstore.store, "from_url", lambda *args, retry_config, **kw: make(*args, retry_config={"backoff": shortest, **retry_config}, **kw)
    )
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 10)))


@pytest.fixture
def faulty(place: Place, proxy: FaultProxy, short_pauses: None) -> Place:
    """Return the same place through the proxy, with time-outs of seconds."""
    return place.through(proxy.storage_options | IMPATIENT)


def test_a_pause_takes_nothing_from_the_random_numbers_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append))

    def fail() -> None:
        raise OSError

    for _ in range(2):
        random.seed(0)
        state = random.getstate()
        with pytest.raises(OSError):
            retry.repeat(fail, lambda _: True, seconds=9.0, times=3, pause=1.0, longest=9.0)
        assert random.getstate() == state
    assert len({*pauses}) == 6, "two processes of one seed wait alike"


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
def half_scored(place: Place, short_pauses: None) -> Place:
    """Four rows in two segments, all scored in one column, and two in the other."""
    store = place.open_or_create()
    for i in (0, 2):
        store.append([rollout(i), rollout(i + 1)])
        store.append_scores("teacher", provenance_of("teacher"), [scores("teacher", i), scores("teacher", i + 1)])
    # With a gap, so that only a read shows which rows are scored.
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


@pytest.mark.s3
def test_a_session_token_that_ends_is_named_at_once_and_what_is_said_of_the_commit_is_true(
    place: Place, faulty: Place, proxy: FaultProxy
) -> None:
    fill(place)
    store = faulty.open()
    proxy.forget()
    proxy.refuse(ALWAYS, "PUT", "/commits/", status=400, code="ExpiredToken")
    with pytest.raises(StoreWriteError, match=r"credentials have expired \(ExpiredToken\).*nothing of this call was committed"):
        store.append([rollout(4)])
    assert proxy.count("PUT", "/commits/") == 1
    proxy.refuse(ALWAYS, status=400, code="ExpiredToken")
    for read in (store.refresh, lambda: store.read([0]), faulty.open):
        with pytest.raises(StoreReadError, match="the credentials have expired"):
            read()
    proxy.heal()
    check_rows(place.open(), range(4))


@pytest.mark.s3
def test_a_put_that_came_too_slowly_is_repeated_though_that_is_a_400_too(place: Place, faulty: Place, proxy: FaultProxy) -> None:
    fill(place)
    proxy.refuse(1, "PUT", "/commits/", status=400, code="RequestTimeout")
    faulty.open().append([rollout(4)])
    assert proxy.pending == 0
    check_rows(place.open(), range(5))


# The proxy itself


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


@pytest.mark.s3
@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_options_may_be_named_as_in_the_environment(kind: Any, proxy: FaultProxy) -> None:
    options = {name.upper() if name.startswith("aws_") else f"AWS_{name.upper()}": value for name, value in proxy.storage_options.items()}
    options |= {"pool_idle_timeout": "10s", "Client_Max_Retries": 1}
    store = kind.create(proxy.server.new_url(), tiny_manifest(), storage_options=options)
    store.append([rollout(0)])
    assert (len(store), store._files._max_retries) == (1, 1)


def test_a_panic_of_the_package_below_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cloud, "_CLIENT_OPTION", re.compile("(none)"))
    with pytest.raises(StorePathError, match=r"cannot be opened \(PanicException\), expected storage options"):
        ObstoreFiles("s3://bucket/run", {"pool_idle_timeout": "10s"})
    # Rust's panics are printed where they happen.
    capfd.readouterr()
