"""Real servers of objects on loopback, each in a process of its own: those that `make test-servers` installs.

    with running("seaweedfs", tmp_path) as server:
        ZarrStore.create(server.url("run.zarr"), manifest, storage_options=server.storage_options)

A server that is not installed is skipped by name.  They are looked for in `.servers` (or `LOPD_SERVERS`), then on the path.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any, final
from uuid import uuid4

import pytest
from attrs import field, frozen
from botocore.session import get_session
from crash_worker import Place, provenance_of, rollout, scores
from s3_server import MOTO, stop_server

from lopd.errors import LopdError

BUCKET = "lopd"
HOME = Path(os.environ.get("LOPD_SERVERS", Path(__file__).resolve().parents[1] / ".servers"))
_PATIENCE = 60.0
# What s3rver insists on; the others take any key.
_KEY = "S3RVER"
# The account that every emulator of Azure has, with the key that its documentation prints.
_ACCOUNT = "devstoreaccount1"
_ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@final
@frozen
class RealServer:
    """A server that listens, with an empty bucket.

    Args:
        name, version: name and version of the server.
        scheme: scheme of its URLs.
        storage_options: lead to it.
    """

    name: str
    version: str
    scheme: str
    storage_options: Mapping[str, Any] = field(repr=False)

    def url(self, name: str) -> str:
        """Return a place in the bucket."""
        return f"{self.scheme}://{BUCKET}/{name}"

    def new_url(self, suffix: str = ".zarr") -> str:
        """Return a place where nothing is yet."""
        return self.url(uuid4().hex + suffix)


@frozen
class _Kind:
    """How a server is started: `command` gets its folder, its port and three more; `ready` is asked until it succeeds."""

    program: str
    version: Callable[[str], str]
    command: Callable[[str, Path, Sequence[int]], Sequence[str]]
    ready: Callable[[int], None]
    scheme: str
    options: Callable[[int], Mapping[str, Any]]


def _ports(n: int) -> list[int]:
    """Return ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]
    finally:
        for taken in sockets:
            taken.close()


def _said(*arguments: str) -> Callable[[str], str]:
    """Return a function that reads the version which a program prints."""

    def ask(program: str) -> str:
        printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60).stdout
        found = re.search(r"\d+\.\d[\w.]*", printed.replace("8000GB", ""))
        return found[0] if found else "unknown"

    return ask


def _in_package(program: str) -> str:
    """Return the version in a package.json beside the program."""
    package = next(folder / "package.json" for folder in Path(program).resolve().parents if (folder / "package.json").exists())
    return str(json.loads(package.read_text())["version"])


def _request(port: int, method: str, path: str, headers: Mapping[str, str]) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def _make_bucket(port: int) -> None:
    """Put a bucket, signed as S3 wants it."""
    client = get_session().create_client(
        "s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id=_KEY, aws_secret_access_key=_KEY
    )
    with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
        client.create_bucket(Bucket=BUCKET)
    client.list_objects_v2(Bucket=BUCKET)


def _make_container(port: int) -> None:
    """Put a container, signed as Azure wants it."""
    date, path = formatdate(usegmt=True), f"/{_ACCOUNT}/{BUCKET}"
    text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:2021-12-02\n/{_ACCOUNT}{path}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(_ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02", "Authorization": f"SharedKey {_ACCOUNT}:{signature}", "Content-Length": "0"}
    status = _request(port, "PUT", f"{path}?restype=container", headers)
    assert status in (201, 409), status


def _s3_options(port: int) -> dict[str, Any]:
    return {
        "aws_access_key_id": _KEY,
        "aws_secret_access_key": _KEY,
        "aws_region": "us-east-1",
        "aws_endpoint": f"http://127.0.0.1:{port}",
        "allow_http": "true",
    }


def _azure_options(port: int) -> dict[str, Any]:
    return {
        "azure_storage_account_name": _ACCOUNT,
        "azure_storage_account_key": _ACCOUNT_KEY,
        "azure_storage_endpoint": f"http://127.0.0.1:{port}/{_ACCOUNT}",
        "allow_http": "true",
    }


def _weed(program: str, folder: Path, ports: Sequence[int]) -> list[str]:
    s3, *others = ports
    parts = ("master", "master.port.grpc", "volume", "volume.port.grpc", "filer", "filer.port.grpc", "s3.port.grpc")
    named = [f"-{part if 'grpc' in part else f'{part}.port'}={port}" for part, port in zip(parts, others, strict=True)]
    return [
        program,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.port={s3}",
        *named,
        "-volume.max=10",
        "-master.volumeSizeLimitMB=64",
    ]


def _rclone(program: str, folder: Path, ports: Sequence[int]) -> list[str]:
    return [program, "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{ports[0]}", "--auth-key", f"{_KEY},{_KEY}", str(folder)]


def _s3rver(program: str, folder: Path, ports: Sequence[int]) -> list[str]:
    return [program, "-d", str(folder), "-a", "127.0.0.1", "-p", str(ports[0]), "--silent", "--configure-bucket", BUCKET]


def _moto(_: str, __: Path, ports: Sequence[int]) -> list[str]:
    return [sys.executable, "-W", "ignore", str(MOTO), "-H", "127.0.0.1", "-p", str(ports[0])]


def _azurite(program: str, folder: Path, ports: Sequence[int]) -> list[str]:
    return [program, "--blobHost", "127.0.0.1", "--blobPort", str(ports[0]), "--location", str(folder), "--silent", "--skipApiVersionCheck"]


KINDS: dict[str, _Kind] = {
    "moto": _Kind("moto_server", lambda _: version("moto"), _moto, _make_bucket, "s3", _s3_options),
    "seaweedfs": _Kind("weed", _said("version"), _weed, _make_bucket, "s3", _s3_options),
    "azurite": _Kind("azurite-blob", _in_package, _azurite, _make_container, "az", _azure_options),
    "rclone": _Kind("rclone", _said("version"), _rclone, _make_bucket, "s3", _s3_options),
    "s3rver": _Kind("s3rver", _in_package, _s3rver, _make_bucket, "s3", _s3_options),
}


def find(name: str) -> str:
    """Return the program of a server; the test is skipped where it is not installed."""
    # not those of the machine, which may be of any version
    places = os.pathsep.join([str(HOME / "bin"), str(HOME / "node_modules/.bin"), str(Path(sys.executable).parent)])
    program = shutil.which(KINDS[name].program, path=places)
    if program is None:
        pytest.skip(f"{name} is not installed: `make test-servers` installs it")
    return program


@contextmanager
def running(name: str, folder: Path) -> Iterator[RealServer]:
    """Run a server with an empty bucket in this folder, until the block is left."""
    kind, program, ports = KINDS[name], find(name), _ports(8)
    data, log = folder / "data", folder / "server.log"
    data.mkdir(parents=True)
    # the profile of whoever runs the tests may not be there for the server
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AZURE_"))} | {"HOME": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            kind.command(program, data, ports),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                kind.ready(ports[0])
                break
            except Exception as error:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"{name}: it did not listen: {error}: {log.read_text()[-2000:]}") from error
                time.sleep(0.2)
        yield RealServer(name, kind.version(program), kind.scheme, kind.options(ports[0]))
    finally:
        stop_server(process)


@frozen
class Trial:
    """What four writers saw, and what of it is in the store.

    Args:
        acknowledged: calls that returned.
        lost: acknowledged calls that the store does not hold.
        problems: what `verify` finds.
        errors: what ended a writer.
    """

    acknowledged: int
    lost: int
    problems: list[str]
    errors: list[str]


def write_some(place: Place, writer: int, calls: int) -> tuple[list[int], str]:
    """Append rows and score each of them; the numbers of those whose calls both returned, and the error that ended it, if there was one."""
    done: list[int] = []
    try:
        store = place.open_or_create()
        for i in range(1000 * writer, 1000 * writer + calls):
            store.append([rollout(i)])
            store.append_scores("teacher", provenance_of("teacher"), [scores("teacher", i)])
            done.append(i)
    except LopdError as error:
        return done, f"{type(error).__name__}: {error}"
    return done, ""


def four_writers(place: Place, pool: Executor, calls: int = 6) -> Trial:
    """Let four processes create one store and write to it; each call is acknowledged or lost."""
    found = list(pool.map(write_some, [place] * 4, range(4), [calls] * 4))
    done, errors = [i for numbers, _ in found for i in numbers], [error for _, error in found if error]
    if not done:
        return Trial(0, 0, [], errors)
    store = place.open()
    rows = store.find([f"r{i}" for i in done])
    there = (rows >= 0) & store.scored("teacher")[rows]
    return Trial(2 * len(done), int((~there).sum()), list(store.verify()), errors)
