"""What opens a server, as users write it: its URLs, its key and whom to trust, in the environment or passed.  No message repeats a secret."""

import errno
import os
import re
import resource
import ssl
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from socket import gaierror
from urllib.request import getproxies

import httpx2
from attrs import field, frozen

from lopd.engines.workers import Down
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.checks import texts_of

_FULL = (errno.EMFILE, errno.ENFILE)
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


def variable(name: str | None) -> str | None:
    """Return the name of a variable of the environment.

    Raises:
        InvalidRecordError: it is not one; a key that is passed in its place would be shown.
    """
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise InvalidRecordError("Servers: key_variable is not the name of a variable in capitals; pass keys as `api_key=`.")
    return name


def key_in(asked: str | None, usual: str) -> str | None:
    """Return the key in the variable that was asked for, or in the usual one.

    Raises:
        InvalidRecordError: the variable that was asked for is not set.
    """
    key = os.environ.get(asked or usual)
    if asked is not None and not key:
        raise InvalidRecordError(f"Servers: {asked} is not set in the environment, expected the key; set it.")
    return key


def certificates() -> ssl.SSLContext:
    """Return the certificates that the environment names; a file that was amended is read again.

    Raises:
        OSError: they cannot be read.
    """
    file = os.environ.get("SSL_CERT_FILE")
    found = Path(file).stat() if file else None
    return _certificates(file, os.environ.get("SSL_CERT_DIR"), found and (found.st_mtime_ns, found.st_size))


@cache
def _certificates(*_named: object) -> ssl.SSLContext:
    """Return the certificates, made once: reading them all takes longer than many a call."""
    return httpx2.create_ssl_context()


def check_cause(name: str, error: BaseException | None) -> None:
    """Refuse an error of this server's client that to ask again does not mend.

    Raises:
        Down: the server's certificate is not trusted.
        EngineError: this process may open no more files.
    """
    while error:
        if isinstance(error, ssl.SSLCertVerificationError):
            what = f"its certificate is not trusted ({error.verify_message})"
            remedy = "expected a valid one of an authority that is known here; set SSL_CERT_FILE to the authority's file."
            raise Down(what, EngineError(f"{name}: {what}, {remedy}"), final=True) from None
        # where no file may be opened, names of hosts are not known
        if isinstance(error, OSError) and (error.errno in _FULL or (isinstance(error, gaierror) and not _may_open())):
            allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise EngineError(
                f"{name}: it cannot be asked, for too many files are open here ({allowed} are allowed to a process); raise `ulimit -n`, or lower "
                "`concurrency`, and run this again: what is committed stays."
            ) from None
        error = error.__cause__ or error.__context__


def _may_open() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True


@frozen
class Key:
    """What a server is shown.

    Args:
        variable: the environment variable that may hold it.
        value: the key; None or "" for no key.

    Raises:
        ArgumentError: it is not text.
        InvalidRecordError: it cannot be the value of a header.
    """

    variable: str = "VLLM_API_KEY"
    value: str | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        key = texts_of("Servers: api_key", [self.value or ""])[0]
        if not (key.isascii() and key.isprintable() and key.strip() == key):
            raise InvalidRecordError("Servers: api_key has spaces or unprintable characters, expected a header's value; strip it.")

    @property
    def refused(self) -> str:
        """The remedy where a server refuses the key."""
        if not self.value:
            return f"it needs a key, and the request had none; pass `api_key=` or set {self.variable}"
        if self.value == os.environ.get(self.variable):
            return f"the key in {self.variable} was refused; set another, or pass `api_key=`"
        return f"the key in `api_key=` was refused; pass another, or set {self.variable}"

    @property
    def forbidden(self) -> str:
        """The remedy where a server, or a proxy in its place, refuses what the key may do."""
        proxies = ", and look at HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY of the environment" if getproxies().keys() - {"no"} else ""
        return f"the key, or what it may do, was refused; pass one that may do this as `api_key=` or set {self.variable}{proxies}"
