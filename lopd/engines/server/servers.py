"""Several servers of one model as one engine, whatever their protocol.

Requests are spread, bounded, sent again when that may help, and dropped together.  A server that fails is left alone and asked how it is, with
growing pauses; when it answers, and still serves the same model, it is used again.  Nothing outlives a call: its connections and threads end
with it, so a `Servers` can be pickled and forked.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from threading import Event, Lock
from time import monotonic
from typing import Any, Literal, TypeVar, final
from weakref import WeakSet

import httpx2
from attrs import Factory, define, field

from lopd.engines.pool import Pool
from lopd.engines.server.access import Key, bases, certificates, check_cause, check_urls, key_in, variable
from lopd.engines.server.answers import NotANumberError, Trouble, accepted, received, reported, rest_of
from lopd.engines.server.completions import Completions
from lopd.engines.server.dialect import WORDS, Costs, Dialect, Probe, Served
from lopd.engines.server.sglang import SGLang
from lopd.engines.server.vllm import VLLM
from lopd.engines.workers import Down, Request
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.checks import check_at_least, check_kind, check_number, own_numbers, own_texts
from lopd.records.paths import asked
from lopd.records.waiting import QUIET_S

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Speech = Literal["vllm", "sglang", "openai"]
_DIALECTS: Mapping[str, Dialect] = {"vllm": VLLM(), "sglang": SGLang(), "openai": Completions()}
_CHECK_S, _CONNECT_S = 30.0, 10.0
# uvicorn closes a connection that was idle for 5 s; one that is closed while a request is on its way costs a try
_IDLE_S = 3.0
_CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")
# two minutes after a machine vanished without a word its connections fail; on macOS TCP_KEEPALIVE is what TCP_KEEPIDLE is elsewhere
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


def _speech(speaks: Speech) -> Speech:
    if speaks not in _DIALECTS:
        raise InvalidRecordError(f"Servers: speaks is {speaks!r}, expected one of {', '.join(map(repr, _DIALECTS))}.")
    return speaks


@final
@define(eq=False, slots=False)
class Servers:
    """Servers of one model, all of the same version and context.

    A server that answers 429 is left alone for as long as it asks (`Retry-After`, or the `x-ratelimit-reset-...` of what is used up), and so is one
    that reports that nothing is left (`x-ratelimit-remaining-...: 0`).  Such an answer is not one of the `attempts` until `patience_s` is over.

    Args:
        urls: one or several, with or without `/v1`.
        model: the name it is served under.
        concurrency: requests at a time to each server, of one call.
        attempts: how often one request is sent before its failure ends the call; time in which no server answers does not count.
        patience_s: how long a server may be down before it is given up; when all are, the call ends.
        first_contact_s: how long to try until one answers for the first time; give more where servers start beside the program.
        timeout_s: longest silence of a request; a response arrives in one piece, so this bounds the time it takes to sample one.
        context: positions of a sequence; by default the servers' own (`max_model_len`).
        api_key: by default what the `key_variable` of the environment holds.
        speaks: "vllm" for vLLM's extensions of the OpenAI completions, "sglang" for SGLang's own API, or "openai" for the completions with `echo` and
            `logprobs` that a hosted model may have; the last can score only.
        key_variable: name of the environment variable with the key, in capitals; by default VLLM_API_KEY, SGLANG_API_KEY or OPENAI_API_KEY.
        extra: fields added to each request, of the server's own; they do not replace what lopd asks for.  By default nothing, or for "openai"
            `return_tokens_as_token_ids`.  `ServerSource` refuses those that change what is drawn, such as `logit_bias`.

    Raises:
        ArgumentError: a URL or the key is not text.
        InvalidRecordError: there is no URL, one is not an http URL or carries a password or a query, a number makes no sense, `speaks` is something
            else, or `key_variable` is not the name of a variable that is set.
    """

    urls: tuple[str, ...] = field(converter=bases)
    model: str
    concurrency: int = 32
    attempts: int = 5
    patience_s: float = 600.0
    timeout_s: float = 3600.0
    context: int | None = None
    speaks: Speech = field(default="vllm", kw_only=True, converter=_speech)
    key_variable: str | None = field(default=None, kw_only=True, converter=variable)
    api_key: str | None = field(
        default=Factory(lambda self: key_in(self.key_variable, self.dialect.key_variable), takes_self=True), repr=False
    )
    first_contact_s: float = field(default=10.0, kw_only=True)
    extra: Mapping[str, Any] = field(default=Factory(lambda self: self.dialect.extra, takes_self=True), kw_only=True, repr=False)
    _spent: list[Costs] = field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Servers", concurrency=1, attempts=1)
        own_texts(self, "Servers")
        check_at_least("Servers", "number of urls", len(self.urls), 1)
        for name in ("patience_s", "timeout_s", "first_contact_s"):
            check_number("Servers", name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        check_urls(self.urls)
        check_kind("Servers: extra", self.extra, Mapping, "pass a dictionary of the fields of a request")
        _ = self.key  # one that cannot be sent is refused here

    @property
    def key(self) -> Key:
        """What they are shown."""
        return Key(self.key_variable or self.dialect.key_variable, self.api_key)

    @property
    def dialect(self) -> Dialect:
        """What they are asked, and how they are understood."""
        return _DIALECTS[self.speaks]

    @property
    def costs(self) -> Costs:
        """What all calls so far were answered, probes included.  A pickled copy counts on by itself."""
        return sum(self._spent, Costs())

    @cached_property
    def served(self) -> Served:
        """What they serve.  All that are up are asked, once.

        Raises:
            EngineError: one serves something else than the others, none is up within `first_contact_s` with a certificate that is trusted; or
                too many files are open.
        """
        with self._pool(None, None) as pool:
            served: Served = pool.identify()
        return served

    def ask(self, requests: Sequence[Request[T]], probe: Probe | None = None) -> list[T]:
        """Return what the requests give, in their order.  The first error ends the call, and what is under way is cancelled.

        Raises:
            EngineError: a request failed `attempts` times, or was refused; no server was up for `patience_s`; or too many files are open.
            InvalidRecordError: all answer the probe with a NaN.
        """
        if not requests:
            return []
        with self._pool(self.served, probe) as pool:
            return pool.run(requests)

    @contextmanager
    def _pool(self, served: Served | None, probe: Probe | None) -> Iterator[Pool]:
        patience_s = self.patience_s if served else min(self.first_contact_s, self.patience_s)
        turn = Lock()
        endpoints = [_Endpoint(url, self, probe, patience_s, turn, first=served is None) for url in self.urls]
        pool = Pool("Servers", endpoints, self.attempts, slots=self.concurrency, patience_s=patience_s, expected=served)
        try:
            yield pool
        finally:
            pool.close()
            # one append for each call: calls may end at the same time
            self._spent.append(sum((cost for endpoint in endpoints for cost in endpoint.spent), Costs()))


@final
class _Endpoint:
    """A worker of the pool that is a server.

    Args:
        url: the server's URL.
        servers: the group that it belongs to.
        probe: the test that it must pass.
        patience_s: for which it is tried.
        turn: to read an answer: the objects of one may take several times its bytes, and Python reads no two at the same time.
        first: whether it was never heard of before.

    Raises:
        EngineError: the environment names a proxy or certificates that cannot be used.
    """

    def __init__(self, url: str, servers: Servers, probe: Probe | None, patience_s: float, turn: Lock, *, first: bool) -> None:
        self._url, self._servers, self._probe = url, servers, probe
        self._stopped, self._rests_until, self.spent = Event(), 0.0, list[Costs]()
        self._patience_s, self._turn, self._first = patience_s, turn, first
        self._check_s = min(_CHECK_S, patience_s) if first else _CHECK_S
        self.name = f"Server {url}"
        self._sockets: WeakSet[socket.socket] = WeakSet()
        proxies = " ".join(value for name, value in os.environ.items() if name.lower().endswith("_proxy"))
        try:
            self._client = asked(proxies, partial(_client, servers))
        except OSError as error:
            raise EngineError(
                f"{self.name}: no client can be made for it ({error}), expected usable proxies and certificates; look at HTTP_PROXY, HTTPS_PROXY, "
                "ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR of the environment."
            ) from error

    def start(self) -> Served:
        """Return what it serves, if it is healthy and passes the probe."""
        try:
            servers = self._servers
            served = servers.dialect.served(self.name, servers.model, servers.context, self._get)
            if self._probe:
                first = not (self.spent or servers.costs.requests)
                answers = [self._complete(self.name, body, lambda answer: answer, first=first) for body in self._probe.bodies]
                self._probe.judge(self.name, *answers)
        except NotANumberError as nan:
            # others may compute the same text; if none does, it is refused as a rollout is, and who calls can leave it out
            raise Down(str(nan), nan, final=True) from None
        except Trouble as trouble:
            remedy = (
                "check the URL, whether it is started, and HTTP_PROXY, HTTPS_PROXY and ALL_PROXY of the environment, or wait for longer "
                "(`first_contact_s`)."
                if self._first
                else "look at its log, start it again, and run this again: what is committed stays."
            )
            error = EngineError(f"{self.name}: {trouble}, expected an answer within {self._patience_s:.0f} s; {remedy}")
            raise Down(str(trouble), error, trouble.pause, busy=trouble.busy) from None
        return served

    def unlike(self, identity: Served, expected: Served, whose: str) -> EngineError:
        """Return the first setting in which it differs."""
        name = next(name for name in WORDS if getattr(identity, name) != getattr(expected, name))
        return EngineError(
            f"{self.name}: its {WORDS[name]} is {getattr(identity, name)!r}, expected {getattr(expected, name)!r} as of "
            f"{whose.removeprefix('Server ')}; serve one model with one version and the same settings everywhere."
        )

    def work(self, request: Request[T]) -> Sequence[T]:
        """Return the results of a completion."""
        try:
            return self._complete(request.owner, request.body, request.read)
        except Trouble as trouble:
            error = EngineError(
                f"{request.owner}: {trouble}, at last of {self._servers.attempts} attempts; {trouble.remedy}, and run this "
                "again: what is committed stays."
            )
            raise Down(str(trouble), error, trouble.pause, busy=trouble.busy) from None

    def stop(self) -> None:
        """Drop all connections: the server then gives up what is under way, and callers that wait for it go on."""
        self._stopped.set()
        for connection in list(self._sockets):
            _shut(connection)
        self._client.close()

    def _complete(self, owner: str, body: Mapping[str, Any], read: Callable[[Any], T], *, first: bool = False) -> T:
        """Return what is read in the answer to a request, when the server has room for it."""
        if self._stopped.wait(max(self._rests_until - monotonic(), 0.0)):
            raise Trouble(f"{self.name} is not asked any more")
        path, asked_for = self._servers.dialect.addressed(self._servers.model, body)
        url = self._url + path
        response = self._send("POST", url, json={**self._servers.extra, **asked_for})
        if response.is_success and (rest := min(rest_of(response), self._patience_s)):
            self._rests_until = monotonic() + rest
            if rest > QUIET_S:
                _LOG.warning("%s rests for %.0f s: it reports that nothing is left of its limit", self.name, rest)
        with self._turn:
            if self._stopped.is_set():
                raise Trouble(f"{self.name} is not asked any more")
            answer = accepted(owner, url, response, self._servers.key, first=first)
            self.spent.append(self._servers.dialect.costs(answer))
            return read(answer)

    def _get(self, path: str, missing: Any, *, must: bool = True) -> Any:
        """Return what the server reports at a path, or `missing`."""
        response = self._send("GET", url := self._url + path, timeout=self._check_s)
        return reported(self.name, url, response, self._servers.key, missing, must=must, first=self._first)

    def _send(self, method: str, url: str, *, json: Any = None, timeout: Any = httpx2.USE_CLIENT_DEFAULT) -> httpx2.Response:
        """Return the answer, whatever its status."""
        started = monotonic()
        try:
            with self._client.stream(method, url, json=json, timeout=timeout, extensions={"trace": self._remember}) as response:
                return received(url, response, started, None if method == "POST" else self._check_s)
        except httpx2.RequestError as error:
            check_cause(self.name, error)
            raise Trouble(f"{url} fails with {type(error).__name__}") from None  # no more: the text of the error may quote headers

    def _remember(self, event: str, info: Mapping[str, Any]) -> None:
        """Keep the socket of a new connection, for to close a client does not wake those who read from it, and let it ask whether its peer lives."""
        if event in _CONNECTED:
            connection = info["return_value"].get_extra_info("socket")
            self._sockets.add(connection)
            with suppress(OSError):  # it is closed already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name in filter(partial(hasattr, socket), _KEEPALIVE):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _KEEPALIVE[name])
            if self._stopped.is_set():
                _shut(connection)


def _client(servers: Servers) -> httpx2.Client:
    return httpx2.Client(
        verify=certificates(),
        timeout=httpx2.Timeout(servers.timeout_s, connect=_CONNECT_S),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S),
        headers={"Authorization": f"Bearer {servers.api_key}"} if servers.api_key else {},
    )


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
