"""URLs of servers as users write them: what requests are sent to, and what is refused without repeating a secret."""

import re
from collections.abc import Iterable, Sequence

import httpx2

from lopd.errors import InvalidRecordError
from lopd.records.checks import texts_of

_SECRETS = {"@": "one with a user or password", "?": "one with a query", "#": "one with a fragment"}
# A password whose host was forgotten; not a port, and not an address in brackets.
_PASSWORD = re.compile(r"(?s)(://[^/\[:]*:)(?!\d+(/|$)).*")


def bases(urls: str | Iterable[str]) -> tuple[str, ...]:
    """Return what paths are added to."""
    several = texts_of("Servers: urls", [urls] if isinstance(urls, str) else urls)
    return tuple(url.rstrip("/").removesuffix("/v1").rstrip("/") for url in several)


def check_urls(urls: Sequence[str]) -> None:
    """Refuse what is not an http URL of a host, or carries a secret.

    Raises:
        InvalidRecordError: one does.
    """
    for i, url in enumerate(urls):
        secret = next((what for sign, what in _SECRETS.items() if sign in url), None)
        if secret or not _has_host(url):
            shown = secret or repr(_PASSWORD.sub(r"\1...", url))
            raise InvalidRecordError(f"Servers: url {i} is {shown}, expected http:// or https:// and a host; pass keys as `api_key=`.")


def _has_host(url: str) -> bool:
    try:
        return url.startswith(("http://", "https://")) and bool(httpx2.URL(url).host)
    except httpx2.InvalidURL:
        return False
