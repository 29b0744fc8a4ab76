"""How many requests reading and opening a store take, and how much of them is under way at once."""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import numpy as np
import pytest
from crash_worker import Place, provenance_of, rollout, scores
from fault_places import fill, place  # noqa: F401
from fault_proxy import FaultProxy
from s3_server import S3Server

from lopd.backends.files import Files, buckets, cloud, open_files

PART, SIZE = 8 << 20, 20_000_000
DATA = np.random.default_rng(0).bytes(SIZE)


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


# Links that are slow


class _Bucket(BaseHTTPRequestHandler):
    """Answers as a bucket whose every object but `small` is `DATA`, and counts what is under way; `slow` is answered after a second."""

    lock, at_once, most, spans, tag = Lock(), Counter[str](), Counter[str](), list[tuple[int, int]](), '"e"'

    @contextmanager
    def counted(self, size: int = 0) -> Iterator[None]:
        with self.lock:
            self.at_once.update({self.command: 1, "bytes": size})
            self.most |= self.at_once
        time.sleep(0.05)
        yield
        with self.lock:
            self.at_once.subtract({self.command: 1, "bytes": size})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "ETag": self.tag,
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        with suppress(OSError):  # it was not waited for
            self.end_headers()
            self.wfile.write(body)

    def do_GET(self) -> None:
        if "slow" in self.path:
            time.sleep(1)
        if self.headers.get("If-Match", "").startswith("W/"):
            self.answer(b"", 412)  # RFC 9110: a weak tag matches nothing here
        elif "whole" in self.path and "Range" not in self.headers:
            self.answer(DATA)
        elif found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2]) + 1, SIZE)
            self.spans.append((start, end))
            with self.counted():
                body = DATA[start:end]
            self.answer(body, 206, Content_Range=f"bytes {start}-{end - 1}/{SIZE}")
        else:
            self.answer(b"small")

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        with self.counted(left):
            while left:
                left -= len(self.rfile.read(min(left, 1 << 20)))
        self.answer(b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        begins = "uploads" in self.path
        what = b"InitiateMultipartUploadResult" if begins else b"CompleteMultipartUploadResult"
        self.answer(b"<%s>%s</%s>" % (what, b"<UploadId>u</UploadId>" if begins else b"<ETag>e</ETag>", what))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def bucket() -> Iterator[str]:
    """Yield the address of a `_Bucket`."""
    for counts in (_Bucket.at_once, _Bucket.most, _Bucket.spans):
        counts.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def opened(endpoint: str, **options: object) -> Files:
    """Return the files of a bucket that has answered."""
    files = open_files(
        "s3://b/run", {"aws_endpoint": endpoint, "allow_http": "true", "aws_access_key_id": "a", "aws_secret_access_key": "b", **options}
    )
    assert files.read("small") == b"small"
    return files


@pytest.mark.parametrize("large", [1, 2, 3, 4, 9])
def test_large_objects_are_written_in_four_parts_at_once(bucket: str, large: int) -> None:
    opened(bucket).write({f"large-{i}": np.zeros((40 if large == 1 else 13) << 20, np.uint8) for i in range(large)})
    assert (_Bucket.most["PUT"], _Bucket.most["bytes"]) == (4, 20 << 20)


@pytest.mark.parametrize("size", [99, 1 << 20, 2 << 20, 4 << 20])
def test_smaller_objects_are_written_side_by_side_up_to_the_bytes_of_four_parts(bucket: str, size: int) -> None:
    opened(bucket).write({f"{i}": np.zeros(size if i < 8 else 9, np.uint8) for i in range(16)})
    assert 8 < _Bucket.most["PUT"] <= 16
    assert 4 * size <= _Bucket.most["bytes"] <= 20 << 20


def test_reads_within_reads_are_not_more_requests_at_once(bucket: str) -> None:
    files, starts = opened(bucket), list(range(0, SIZE, 2_500_000))
    calls = [partial(files.read_ranges, "data", starts, [start + 3 for start in starts]) for _ in range(6)]
    assert [list(parts) for parts in files.run(calls)] == 6 * [[DATA[start : start + 3] for start in starts]]
    assert 8 < _Bucket.most["GET"] <= 16


def test_a_long_span_is_read_by_several_requests(bucket: str) -> None:
    files = opened(bucket)
    assert files.read_ranges("data", [5, SIZE - 7], [SIZE - 9, SIZE + 9]) == [DATA[5 : SIZE - 9], DATA[SIZE - 7 :]]
    assert sorted(_Bucket.spans) == [(5, 5 + PART), (5 + PART, 5 + 2 * PART), (5 + 2 * PART, SIZE)]


@pytest.mark.parametrize("tag", ['"e"', 'W/"e"'])
def test_a_large_object_is_read_in_parts_also_where_its_tag_is_weak(bucket: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Bucket, "tag", tag)
    assert opened(bucket).read("whole") == DATA
    assert len(_Bucket.spans) == 3


@pytest.mark.parametrize("weak", ["", "W/"])
def test_a_large_object_that_is_replaced_while_it_is_read_is_an_error(bucket: str, weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Bucket, "tag", f'{weak}"e"')
    files, real = opened(bucket), _Bucket.answer

    def replaced(self: _Bucket, *answer: Any, **headers: str) -> None:
        real(self, *answer, **headers)
        _Bucket.tag = f'{weak}"f"'

    monkeypatch.setattr(_Bucket, "answer", replaced)
    with pytest.raises(OSError, match=r"run/whole: another object took its place while it was read$"):
        files.read("whole")


@pytest.mark.s3
def test_a_large_object_is_read_in_parts_of_one_version(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(s3.new_url(), s3.storage_options)
    files.write({"data": np.frombuffer(DATA, np.uint8), "even": np.zeros(2 * PART, np.uint8)})
    assert (files.read("data"), files.read("even")) == (DATA, bytes(2 * PART))
    real = cloud._cut

    def replaced(start: int, end: int) -> list[tuple[int, int]]:
        files.write({"data": np.ones(SIZE, np.uint8)})
        return real(start, end)

    monkeypatch.setattr(cloud, "_cut", replaced)
    with pytest.raises(OSError, match="another object took its place"):
        files.read("data")


def test_what_is_read_may_take_as_long_as_bytes_come_and_what_is_written_as_long_as_it_is_sent(bucket: str) -> None:
    files: Any = opened(bucket)
    assert (files._store.client_options["read_timeout"], files._store.client_options["timeout"]) == ("30s", "3600s")
    assert files._puts.client_options["timeout"] == "150s"
    assert "read_timeout" not in files._puts.client_options
    own: Any = opened(bucket, timeout="60s")
    assert own._store.client_options["timeout"] == own._puts.client_options["timeout"] == own._once.client_options["timeout"] == "60s"
    assert "read_timeout" not in own._store.client_options


def test_a_request_whose_time_is_over_names_the_option(bucket: str) -> None:
    files = opened(bucket, timeout="300ms", client_max_retries=0)
    with pytest.raises(OSError, match=r"127.0.0.1:\d+ does not answer in time, so pass a longer `timeout` if the link is slow$"):
        files.read("slow")
    assert buckets.said(ValueError("GET http://h/b Connect kind: Timeout"), late=True) == "h does not answer"
