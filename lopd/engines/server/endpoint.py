"""One server of a model, during one call."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, final

import httpx2
from attrs import define, field, frozen

from lopd.engines.server.answers import Trouble, accepted, sent
from lopd.errors import EngineError

_CHECK_S = 30.0
_LOG = logging.getLogger(__name__)


@final
@frozen
class Served:
    """What all servers must have in common.

    Args:
        version: of vLLM; "" where a server does not say.
        root: the path or name that the model was loaded from.
        context: positions of a sequence.
    """

    version: str
    root: str | None
    context: int


@final
@define(eq=False)
class Endpoint:
    """One server.

    Args:
        url: of the server.
        model: the name it is asked for.
        context: positions that are wanted, or None for all it has.
        client: whose connections are used.
        busy: requests that are under way.
        up: whether it may be sent requests.
        lost: whether it was given up.
        pause: seconds for which it asks to be left alone.
        tried: set once it was asked what it serves, whatever came of it.
        failed: set when a request failed since it was last found well.
    """

    url: str
    model: str
    context: int | None
    client: httpx2.AsyncClient
    busy: int = 0
    up: bool = False
    lost: bool = False
    pause: float = 0.0
    tried: asyncio.Event = field(factory=asyncio.Event)
    failed: asyncio.Event = field(factory=asyncio.Event)

    def fail(self, trouble: Trouble) -> None:
        """Leave it alone until it was asked how it is."""
        if self.up:
            _LOG.warning("Server %s is left alone for now: %s", self.url, trouble)
        self.up, self.pause = False, trouble.pause
        self.failed.set()

    async def served(self) -> Served:
        """What it serves, if it is healthy.

        Raises:
            Trouble: it is not up, or not healthy.
            EngineError: it serves another model, too short a context, or is no such server.
        """
        await self._get("/health", missing=None)
        version = await self._get("/version", missing={})
        listed = await self._get("/v1/models", missing={})
        try:
            cards = {card["id"]: card for card in listed["data"]}
            said = str(version.get("version") or "")
        except (KeyError, TypeError, AttributeError):
            raise EngineError(f"Server {self.url}: it lists no models, expected /v1/models; check the URL.") from None
        card = cards.get(self.model)
        if card is None:
            raise EngineError(
                f"Server {self.url}: it serves {', '.join(map(repr, cards))}, expected {self.model!r}; pass the name it serves."
            )
        return Served(said, card.get("root"), self._positions(card.get("max_model_len")))

    def _positions(self, said: Any) -> int:
        asked, said = self.context, said if isinstance(said, int) else None
        context = said if asked is None else asked
        if context is None or (said is not None and context > said):
            raise EngineError(
                f"Server {self.url}: its max_model_len is {said}, expected {'a number' if asked is None else f'at least {asked}'}; "
                "pass `context=` that all servers have."
            )
        return context

    async def complete(self, owner: str, body: Mapping[str, Any]) -> Any:
        """The answer to a completion."""
        url = f"{self.url}/v1/completions"
        response = await sent(url, self.client.post(url, json={"model": self.model, **body}))
        return accepted(owner, url, response)

    async def _get(self, path: str, missing: Any) -> Any:
        """The answer, or `missing` where there is no such path."""
        url = self.url + path
        response = await sent(url, self.client.get(url, timeout=_CHECK_S))
        if response.status_code == 404 or (response.is_success and not response.content):
            return missing
        return accepted(f"Server {self.url}", url, response)
