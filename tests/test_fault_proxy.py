"""The proxy that makes requests fail: what it passes on, and when its faults strike."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from fault_proxy import FaultProxy
from s3_server import SIGNED, S3Server


@pytest.fixture
def fetch(s3: S3Server, proxy: FaultProxy) -> Iterator[Callable[..., bytes]]:
    """Return a function that sends one request through the proxy, by a client that repeats nothing."""
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
