"""A real S3 server on loopback, in a process of its own, with one bucket in it; it holds everything in memory.

    @pytest.mark.s3
    def test_x(s3: S3Server) -> None:
        ZarrStore.create(s3.url("run.zarr"), manifest, storage_options=s3.storage_options)

It checks no signatures, so the helpers speak plain HTTP: `keys`, `read`, `write` and `delete` are what a damaged disk is made with.
"""

import http.client
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final
from urllib.parse import quote, urlencode
from uuid import uuid4

import pytest
from attrs import frozen

BUCKET = "lopd"
# The signature is not checked, but without one a request is a stranger's.
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"}
_PATIENCE = 60.0
_NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


@final
@frozen
class S3Server:
    """Where the server is, and hands on its objects.

    Args:
        host, port: where the server listens.
        bucket: there already.
    """

    host: str
    port: int
    bucket: str = BUCKET

    @property
    def endpoint(self) -> str:
        """For clients that are told where to go."""
        return f"http://{self.host}:{self.port}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What `ZarrStore.create` and its kin take; a new dict each time, so that a test may add to it."""
        return {
            "aws_access_key_id": "testing",
            "aws_secret_access_key": "testing",
            "aws_region": "us-east-1",
            "aws_endpoint": self.endpoint,
            "allow_http": "true",
        }

    def url(self, name: str) -> str:
        """Return a place in the bucket."""
        return f"s3://{self.bucket}/{name}"

    def new_url(self, suffix: str = ".zarr") -> str:
        """Return a place where nothing is yet: the server outlives the test."""
        return self.url(uuid4().hex + suffix)

    def key(self, url: str) -> str:
        """Return the key that a URL of this bucket names."""
        return url.removeprefix(f"s3://{self.bucket}/")

    def keys(self, prefix: str = "") -> list[str]:
        """Return the sorted keys of all objects that begin with this; a URL will do as well."""
        found, query = [], {"list-type": "2", "prefix": self.key(prefix)}
        while True:
            root = ET.fromstring(self._ask("GET", f"/{self.bucket}?{urlencode(query)}"))  # noqa: S314  # our own server's
            found += [str(node.text) for node in root.iter(f"{_NAMESPACE}Key")]
            token = root.findtext(f"{_NAMESPACE}NextContinuationToken")
            if token is None:
                return sorted(found)
            query["continuation-token"] = token

    def read(self, key: str) -> bytes:
        """Read an object."""
        return self._ask("GET", self._path(key))

    def write(self, key: str, data: bytes) -> None:
        """Put an object, whatever is there."""
        self._ask("PUT", self._path(key), data)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        for key in keys:
            self._ask("DELETE", self._path(key))

    def _path(self, key: str) -> str:
        return f"/{self.bucket}/{quote(self.key(key))}"

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_PATIENCE)
        try:
            connection.request(method, path, body, SIGNED)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        assert response.status < 300, f"{method} {path}: {response.status} {data[:300]!r}"
        return data


#: Starts moto.
MOTO = Path(__file__).with_name("moto_server.py")


def start_server(log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server on a port that the system chooses, and return both: it prints when it listens, and where."""
    command = [sys.executable, "-W", "ignore", str(MOTO), "-H", "127.0.0.1", "-p", "0"]
    # the profile of whoever runs the tests may not be there for the server, which then answers nothing
    environment = {name: value for name, value in os.environ.items() if name != "AWS_PROFILE"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(rb"Running on http://127\.0\.0\.1:(\d+)", log.read_bytes()):
            return process, int(found[1])
        time.sleep(0.05)
    stop_server(process)
    raise RuntimeError(f"S3 server: it did not listen within {_PATIENCE:.0f} s: {log.read_text()[-2000:]}")


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """Stop this process and no other."""
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return the server of this session, with an empty bucket."""
    process, port = start_server(tmp_path_factory.mktemp("s3") / "server.log")
    try:
        server = S3Server("127.0.0.1", port)
        server._ask("PUT", f"/{BUCKET}")
        yield server
    finally:
        stop_server(process)
