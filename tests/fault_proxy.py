"""A proxy in front of the S3 server that does to requests what a network does, on demand, and remembers all of them.

    proxy.refuse(2, "PUT", "/commits/")        the next two answer 503 and never reach the server
    proxy.refuse_after(1, "PUT", "/commits/")  the server does it, and the answer is 503 all the same
    proxy.cut(1, "GET")                        the connection dies before the server hears of it
    proxy.cut_after(1, "PUT", "/commits/")     the connection dies after the server did it
    proxy.delay(0.5, 3)                        three answers come late
    proxy.deaf("range")                        the server never hears of this header
    proxy.count("GET", "/segments/")           how many there were since the last `forget`

Of several faults that fit a request, the one that was planned first strikes.
"""

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final
from urllib.parse import unquote

import pytest
from attrs import define, frozen
from s3_server import S3Server

ALWAYS = 1 << 30
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>It was planned.</Message></Error>'
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@frozen
class Request:
    """One request as the client sent it: path and query are unquoted, `range` is None unless it asked for a part."""

    method: str
    path: str
    range: str | None


@define
class _Fault:
    left: int
    method: re.Pattern[str]
    path: re.Pattern[str]
    before: Callable[["_Handler"], bool]
    after: Callable[["_Handler"], bool]


def _pass(_: "_Handler") -> bool:
    return False


@final
class FaultProxy:
    """Listens on loopback from the moment it is made until `close`.

    Args:
        server: where requests go that no fault stops.
    """

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._requests: list[Request] = []
        self.unheard: set[str] = set()
        # A check and a put in one go, as S3 promises: the server behind does them one after the other, and two clients may meet between.
        self.conditional = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.proxy = self
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and drop the connections that are open."""
        self._listener.shutdown()
        self._thread.join()
        self._listener.drop_connections()
        self._listener.server_close()

    @property
    def storage_options(self) -> dict[str, Any]:
        """Those of the server, but through the proxy."""
        host, port = self._listener.server_address[:2]
        return self.server.storage_options | {"aws_endpoint": f"http://{host!s}:{port}"}

    def refuse(self, n: int = 1, method: str = "", path: str = "", status: int = 503, code: str = "SlowDown") -> None:
        """Answer the next `n` requests that match both expressions (found anywhere in them) with this status; the server hears nothing."""
        self._plan(n, method, path, before=lambda handler: handler.answer(status, code))

    def refuse_after(self, n: int = 1, method: str = "", path: str = "", status: int = 503) -> None:
        """Do as `refuse`, but the server has done what was asked."""
        self._plan(n, method, path, after=lambda handler: handler.answer(status))

    def cut(self, n: int = 1, method: str = "", path: str = "") -> None:
        """Reset the connection; the server hears nothing."""
        self._plan(n, method, path, before=lambda handler: handler.reset())

    def cut_after(self, n: int = 1, method: str = "", path: str = "") -> None:
        """Reset the connection when the server has done what was asked, in place of its answer."""
        self._plan(n, method, path, after=lambda handler: handler.reset())

    def cut_within(self, n: int = 1, method: str = "GET", path: str = "") -> None:
        """Send half of the answer's body, then reset the connection."""
        self._plan(n, method, path, after=lambda handler: handler.half())

    def delay(self, seconds: float, n: int = 1, method: str = "", path: str = "") -> None:
        """Answer late."""

        def wait(_: "_Handler") -> bool:
            time.sleep(seconds)
            return False

        self._plan(n, method, path, after=wait)

    def call(
        self,
        work: Callable[[], object],
        n: int = 1,
        method: str = "",
        path: str = "",
        *,
        after: bool = False,
        status: int | None = None,
        cut: bool = False,
    ) -> None:
        """Do something (kill a client, commit a rival's rows) before the server hears of a request, or else before the client is answered.

        Args:
            work: what to do; it gets nothing.
            n, method, path: as for `refuse`.
            after: when the server has done what was asked.
            status, cut: refuse or cut the request as well.
        """

        def run(handler: "_Handler") -> bool:
            work()
            return handler.answer(status) if status is not None else cut and handler.reset()

        self._plan(n, method, path, **{"after" if after else "before": run})

    def _plan(self, n: int, method: str, path: str, before: Callable[..., bool] = _pass, after: Callable[..., bool] = _pass) -> None:
        with self._lock:
            self._faults.append(_Fault(n, re.compile(method), re.compile(path), before, after))

    def deaf(self, header: str) -> None:
        """Keep this header of every request from the server."""
        self.unheard.add(header.lower())

    def heal(self) -> None:
        """Remove all planned faults."""
        with self._lock:
            self._faults.clear()
            self.unheard.clear()

    @property
    def pending(self) -> int:
        """Faults that were planned and have not struck yet."""
        with self._lock:
            return sum(fault.left for fault in self._faults)

    @property
    def requests(self) -> list[Request]:
        """All requests since the last `forget`, those that a fault struck included."""
        with self._lock:
            return list(self._requests)

    def forget(self) -> None:
        """Begin to count from nothing."""
        with self._lock:
            self._requests.clear()

    def count(self, method: str = "", path: str = "") -> int:
        """Count the requests that matched."""
        return sum(1 for request in self.requests if re.search(method, request.method) and re.search(path, request.path))

    def arrived(self, request: Request) -> _Fault | None:
        """Take down a request, and take the fault that is meant for it."""
        with self._lock:
            self._requests.append(request)
            for fault in self._faults:
                if fault.left > 0 and fault.method.search(request.method) and fault.path.search(request.path):
                    fault.left -= 1
                    return fault
        return None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.open: set[socket.socket] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: clients go away on purpose here."""

    def drop_connections(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body in one packet, and no waiting for more: keep-alive connections are slow otherwise.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)
        upstream = self.server.proxy.server
        self.upstream = http.client.HTTPConnection(upstream.host, upstream.port, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        self.server.open.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if len(body) < int(self.headers.get("content-length", 0)):
            # The client died while it was sending; S3 makes no object of half a body.
            self.close_connection = True
            return
        fault = self.server.proxy.arrived(Request(self.command, unquote(self.path), self.headers.get("range")))
        if fault is not None and fault.before(self):
            return
        if self.command == "PUT" and "if-none-match" in self.headers:
            with self.server.proxy.conditional:
                self.forward(body)
        else:
            self.forward(body)
        if fault is not None and fault.after(self):
            return
        self.send(self.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = relay

    def forward(self, body: bytes) -> None:
        unheard = _HOP_BY_HOP | self.server.proxy.unheard
        headers = {name: value for name, value in self.headers.items() if name.lower() not in unheard}
        for attempt in (0, 1):
            try:
                self.upstream.request(self.command, self.path, body or None, headers)
                response = self.upstream.getresponse()
                break
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                # The server closed a connection that it had kept open; nothing was done.
                self.upstream.close()
                if attempt:
                    raise
        self.status, self.reason, self.body = response.status, response.reason, response.read()
        self.answered = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
        # To HEAD, the server answers how long the body would be.
        self.length = response.getheader("content-length") if self.command == "HEAD" else str(len(self.body))

    def send(self, body: bytes) -> None:
        self.send_response_only(self.status, self.reason)
        for name, value in self.answered:
            self.send_header(name, value)
        if self.length is not None:
            self.send_header("Content-Length", self.length)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def answer(self, status: int, code: str = "SlowDown") -> bool:
        self.status, self.reason, self.answered = status, "Slow Down", [("Content-Type", "application/xml")]
        self.body = b"" if self.command == "HEAD" else _ERROR.format(code).encode()
        self.length = str(len(self.body))
        self.send(self.body)
        return True

    def half(self) -> bool:
        with suppress(OSError):
            self.send(self.body[: len(self.body) // 2])
        return self.reset()

    def reset(self) -> bool:
        # Unsent data is thrown away, and the client sees a reset and not an end.
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
        return True


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """Start a proxy without faults; `proxy.storage_options` lead through it."""
    made = FaultProxy(s3)
    try:
        yield made
    finally:
        made.close()
