"""Several servers of one model as one: requests are spread, bounded, sent again when that may help, and cancelled together.

A server that fails is left alone and asked how it is, with growing pauses; when it answers, and still serves the same model, it is used
again.  Nothing outlives a call: connections, tasks and the thread they run in end with it, so a `Servers` can be pickled and forked.
"""

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache, cached_property
from typing import Any, Generic, TypeVar, final

from attrs import define, field, frozen

from lopd.engines.server.answers import Trouble
from lopd.engines.server.endpoint import Endpoint, Served
from lopd.errors import EngineError, InvalidRecordError, LopdError, MissingDependencyError
from lopd.records.checks import check_at_least, check_number

try:
    import httpx2
    import tenacity
    from anyio.from_thread import start_blocking_portal
except ImportError as error:
    raise MissingDependencyError(
        f"Served engine: {error.name} is not installed, expected it for requests to servers; pip install 'lopd[server]'."
    ) from error

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_KEY_VARIABLE = "VLLM_API_KEY"
_CONNECT_S, _FIRST_LOOK_S = 10.0, 1.0
# uvicorn closes a connection that was idle for 5 s; one that is closed while a request is on its way costs a try
_IDLE_S = 3.0
_BACKOFF = tenacity.wait_exponential(multiplier=0.25, max=15) + tenacity.wait_random(0, 0.25)


@final
@frozen(eq=False)
class Request(Generic[T]):
    """Completions that are asked for together.

    Args:
        owner: how an error names them.
        body: all of the request but the model's name.
        read: makes something of the answer; its errors end the call, but for `Trouble`, after which the request is sent again.
        parts: the same, one by one, to be asked for if they cannot be had together: an error then names the one at fault.
    """

    owner: str
    body: Mapping[str, Any]
    read: Callable[[Any], Sequence[T]]
    parts: "Sequence[Request[T]]" = ()


@final
@frozen(eq=False)
class Probe:
    """What is asked of each server before it is used, and again after it was down.

    Args:
        bodies: of completions.
        judge: takes the server's name and the answers, and raises if they are not as they must be.
    """

    bodies: tuple[Mapping[str, Any], ...]
    judge: Callable[..., None]


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _bases(urls: str | Iterable[str]) -> tuple[str, ...]:
    return tuple(map(_base, [urls] if isinstance(urls, str) else urls))


@final
@define(eq=False, slots=False)
class Servers:
    """Servers of one model, all of the same version and context.

    Args:
        urls: one or several, with or without `/v1`.
        model: the name it is served under.
        concurrency: requests at a time to each server, of one call.
        attempts: how often one request is sent before its failure ends the call; time in which no server answers does not count.
        patience_s: how long a server may be down before it is given up; when all are, the call ends.
        timeout_s: longest silence of a request; a response arrives in one piece, so this bounds the time it takes to sample one.
        context: positions of a sequence; by default what the servers say (`max_model_len`).
        api_key: by default VLLM_API_KEY of the environment.

    Raises:
        InvalidRecordError: there is no URL, one is no http URL or carries a password, or a number makes no sense.
    """

    urls: tuple[str, ...] = field(converter=_bases)
    model: str
    concurrency: int = 32
    attempts: int = 5
    patience_s: float = 600.0
    timeout_s: float = 3600.0
    context: int | None = None
    api_key: str | None = field(factory=lambda: os.environ.get(_KEY_VARIABLE), repr=False)

    def __attrs_post_init__(self) -> None:
        check_at_least("Servers", "number of urls", len(self.urls), 1)
        for name in ("concurrency", "attempts"):
            check_at_least("Servers", name, getattr(self, name), 1)
        for name in ("patience_s", "timeout_s"):
            check_number("Servers", name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        for i, url in enumerate(self.urls):
            if not url.startswith(("http://", "https://")) or "@" in url:
                shown = "one with a user or password" if "@" in url else repr(url)
                raise InvalidRecordError(f"Servers: url {i} is {shown}, expected http:// or https:// and a host; pass keys as `api_key=`.")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip() == self.api_key
        ):
            raise InvalidRecordError("Servers: api_key has spaces or unprintable characters, expected a header's value; strip it.")

    @cached_property
    def served(self) -> Served:
        """What they serve.  All that are up are asked, once.

        Raises:
            EngineError: one serves something else than the others, or none is up within `patience_s`.
        """
        return self._call(lambda pool: pool.inspect(), None, None)

    def ask(self, requests: Sequence[Request[T]], probe: Probe | None = None) -> list[T]:
        """What the requests give, in their order.  The first error ends the call, and what is under way is cancelled.

        Raises:
            EngineError: a request failed `attempts` times, or was refused; or no server was up for `patience_s`.
        """
        served = self.served
        return self._call(lambda pool: pool.run(requests), served, probe) if requests else []

    def _call(self, work: "Callable[[_Pool], Awaitable[T]]", served: Served | None, probe: Probe | None) -> T:
        """Run it in a thread with an event loop of its own: a notebook's loop runs already, and Ctrl-C must cancel what is under way."""

        async def main() -> T:
            async with self._client() as client:
                return await work(_Pool(self, client, served, probe))

        try:
            with start_blocking_portal() as portal:
                return portal.call(main)
        except BaseExceptionGroup as group:
            first = group.exceptions[0]
        raise first from first.__cause__

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            verify=_certificates(),
            timeout=httpx2.Timeout(self.timeout_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S),
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
        )


@cache
def _certificates() -> ssl.SSLContext:
    """Made once: reading all certificates takes longer than many a call."""
    return httpx2.create_ssl_context()


@final
class _Pool:
    """The servers during one call."""

    def __init__(self, servers: Servers, client: httpx2.AsyncClient, served: Served | None, probe: Probe | None) -> None:
        self._servers, self._probe = servers, probe
        self._served, self._whose = served, "the others"
        self._endpoints = [Endpoint(url, servers.model, servers.context, client) for url in servers.urls]
        self._changed = asyncio.Event()

    async def inspect(self) -> Served:
        """What is served: each server is tried, and one has to be up."""
        async with self._watched():
            await self._all_tried()
            await self._until(lambda endpoint: endpoint.up)
        assert self._served is not None  # noqa: S101  # a server that is up has said so
        return self._served

    async def run(self, requests: Sequence[Request[T]]) -> list[T]:
        """What the requests give, in their order."""
        results: dict[int, Sequence[T]] = {}
        todo = iter(enumerate(requests))

        async def work() -> None:
            for i, request in todo:
                results[i] = await self._ask(request)

        async with self._watched() as group:
            with suppress(TimeoutError):  # a moment for all to answer: else the first would get everything
                await asyncio.wait_for(self._all_tried(), _FIRST_LOOK_S)
            slots = self._servers.concurrency * len(self._endpoints)
            await asyncio.gather(*(group.create_task(work()) for _ in range(min(slots, len(requests)))))
        return [result for i in range(len(requests)) for result in results[i]]

    async def _all_tried(self) -> None:
        await asyncio.gather(*(endpoint.tried.wait() for endpoint in self._endpoints))

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[asyncio.TaskGroup]:
        async with asyncio.TaskGroup() as group:
            watchers = [group.create_task(self._watch(endpoint)) for endpoint in self._endpoints]
            yield group
            for watcher in watchers:
                watcher.cancel()

    async def _until(self, fits: Callable[[Endpoint], bool]) -> Endpoint:
        """The least busy server that fits, as soon as there is one."""
        while not (fitting := [endpoint for endpoint in self._endpoints if fits(endpoint)]):
            self._changed.clear()
            await self._changed.wait()
        return min(fitting, key=lambda endpoint: endpoint.busy)

    async def _watch(self, endpoint: Endpoint) -> None:
        """Bring it up, and again each time it fails, until it stays down for too long."""
        while not endpoint.lost:
            await asyncio.sleep(self._bounded(endpoint.pause))
            try:
                await self._again(tenacity.stop_after_delay(self._servers.patience_s), self._patiently)(self._check, endpoint)
            except Trouble as trouble:
                endpoint.lost = True
                _LOG.warning("Server %s is given up: %s", endpoint.url, trouble)
                if all(other.lost for other in self._endpoints):
                    raise EngineError(
                        f"Server {endpoint.url}: {trouble}, expected an answer within {self._servers.patience_s:.0f} s; "
                        "look at its log, start it again, and run this again: what is committed stays."
                    ) from trouble.__cause__
                return
            endpoint.failed.clear()  # by requests of before: it has just been found well
            endpoint.up = True
            self._changed.set()
            await endpoint.failed.wait()

    async def _check(self, endpoint: Endpoint) -> None:
        """It is healthy, serves what the others serve, and passes the probe."""
        try:
            served = await endpoint.served()
            if self._served is None:
                self._served, self._whose = served, endpoint.url
            _check_same(endpoint.url, served, self._whose, self._served)
            if self._probe:
                answers = [await endpoint.complete(f"Server {endpoint.url}", body) for body in self._probe.bodies]
                self._probe.judge(f"Server {endpoint.url}", *answers)
        finally:
            endpoint.tried.set()

    async def _ask(self, request: Request[T]) -> Sequence[T]:
        """Its results, together or, if there is something wrong with one of them, one by one."""
        try:
            return await self._persist(request)
        except LopdError:
            if not request.parts:
                raise
        return [result for part in request.parts for result in await self._persist(part)]

    async def _persist(self, request: Request[T]) -> Sequence[T]:
        """Its results, from whichever server is up; sent again while that may help."""
        attempts = self._servers.attempts
        try:
            return await self._again(tenacity.stop_after_attempt(attempts), self._pause)(self._attempt, request)
        except Trouble as trouble:
            raise EngineError(
                f"{request.owner}: {trouble}, at last of {attempts} attempts, expected an answer; look at the server's log, and run this again: "
                "what is committed stays."
            ) from trouble.__cause__

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Another server may be asked at once."""
        return 0.0 if any(endpoint.up for endpoint in self._endpoints) else _BACKOFF(state)

    async def _attempt(self, request: Request[T]) -> Sequence[T]:
        endpoint = await self._until(lambda endpoint: endpoint.up and endpoint.busy < self._servers.concurrency)
        endpoint.busy += 1
        try:
            return request.read(await endpoint.complete(request.owner, request.body))
        except Trouble as trouble:
            endpoint.fail(trouble)
            raise
        finally:
            endpoint.busy -= 1
            self._changed.set()

    def _patiently(self, state: tenacity.RetryCallState) -> float:
        """Growing pauses, and those that the server asks for."""
        trouble = state.outcome.exception() if state.outcome else None
        return max(_BACKOFF(state), self._bounded(trouble.pause) if isinstance(trouble, Trouble) else 0.0)

    def _bounded(self, pause: float) -> float:
        return min(pause, self._servers.patience_s)

    def _again(self, stop: Any, wait: Any) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Trouble), stop=stop, wait=wait, sleep=asyncio.sleep, reraise=True
        )


def _check_same(url: str, served: Served, whose: str, expected: Served) -> None:
    for name, what in (("version", "version"), ("root", "model's root"), ("context", "max_model_len")):
        mine, theirs = getattr(served, name), getattr(expected, name)
        if mine != theirs:
            raise EngineError(
                f"Server {url}: its {what} is {mine!r}, expected {theirs!r} as of {whose}; serve one model with one version of vLLM everywhere."
            )
