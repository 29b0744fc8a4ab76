"""What `cloud` knows of buckets: what options mean, what obstore raises in our words, and how much of what is written is under way at once."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Condition
from typing import final

from lopd.backends.files.contract import StorageOptions
from lopd.errors import StorePathError
from lopd.records.paths import without_secrets

#: Of a download that ended before all of it was there.
CUT_OFF = "its download was cut off, so pass a longer `timeout` and `client_retry_timeout` if the link is slow"
_NOT_OPENED = {
    "Account must be specified": "its URL names no account, expected that of Azure; set AZURE_STORAGE_ACCOUNT_NAME, or write "
    "abfss://container@account/path",
    "Unable to open service account file": "the file that GOOGLE_APPLICATION_CREDENTIALS or an option names cannot be opened, expected one of "
    "credentials; check its path and permissions",
}
_METADATA_HOST = "169.254.169.254"
# Of the environment alone, and goes before what is passed.
_ENDPOINT_FIRST = "aws_endpoint_url_s3"
_ENDPOINTS = ("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url")
_YES = ("true", "1", "on", "yes")
_LONGEST_S = 1e6


def is_yes(value: object) -> bool:
    """Return whether the value of an option means yes."""
    return str(value).lower() in _YES


def number_of(name: str, shown: str, options: StorageOptions) -> float:
    """Return the value of an option that is a number.

    Raises:
        StorePathError: it is not one, or not within bounds.
    """
    with suppress(TypeError, ValueError):
        if 0 <= (number := float(options[name])) <= _LONGEST_S:
            return number
    raise StorePathError(f"Store {shown}: the option `{name}` is not a number from 0 to {_LONGEST_S:.0f}; pass one.")


def check_http(url: str, shown: str, options: StorageOptions) -> None:
    """Refuse plain http that was not allowed: object_store would repeat for a minute what it never sends, and not report why.

    Args:
        url: that of the store.
        shown: the same without secrets, for the message.
        options: what was passed; the environment has the rest.

    Raises:
        StorePathError: the endpoint is http.
    """
    if not url.startswith("s3"):
        return  # the endpoint in the environment is not that of other clouds
    environment = {name.lower(): value for name, value in os.environ.items() if name.upper().startswith("AWS_")}
    given = environment | {name: str(value) for name, value in options.items()}
    names = (_ENDPOINT_FIRST, *sorted(_ENDPOINTS, key=lambda name: name not in options))
    endpoint = next((given[name] for name in names if name in given), "")
    if endpoint.startswith("http://") and not is_yes(given.get("allow_http", given.get("aws_allow_http", ""))):
        raise StorePathError(
            f"Store {shown}: its endpoint is {without_secrets(endpoint)}, expected https; set AWS_ALLOW_HTTP=true (or the option `allow_http`) if "
            "plain http is meant."
        )


def not_opened(error: BaseException, prefix: str | None) -> str:
    """Return why obstore opens no bucket, without the URL and the values of options.

    Args:
        error: what it raises.
        prefix: begin of the names of the variables that it reads; None where options were given.
    """
    if known := next((why for words, why in _NOT_OPENED.items() if words in str(error)), None):
        return known
    expected = "storage options of object_store; check their names"
    if prefix:
        expected = f"a URL and an environment of object_store; check the URL, and the variables that begin with {prefix}"
    return f"it cannot be opened ({type(error).__name__}), expected {expected}"


def said(error: Exception, *, late: bool = False) -> str:
    """Return an error of obstore in a few words: neither XML nor a query, which may carry a signature.

    Args:
        error: what it raises.
        late: whether the storage has answered before, so that a request whose time is over was too slow.
    """
    text = str(error)
    host, code, status = (re.search(p, text) for p in (r"https?://([^/\s?]+)", r"<Code>(\w+)", r"status code: (\d+ [\w ]*\w)"))
    if host is None:
        return CUT_OFF if "response body" in text else text.split("\n", 1)[0][:300]
    if host[1] == _METADATA_HOST:
        return f"no credentials were given, and {host[1]}, which machines in the cloud have them from, does not help"
    if re.search(r"redirect without LOCATION|the region \S+ is wrong", text):
        return f"{host[1]} answers that the bucket is in another region than AWS_REGION (or the option `aws_region`) names"
    if code is not None and code[1] == "ExpiredToken":
        return f"{host[1]} answers that the credentials have expired ({code[1]}), so set fresh ones and start again"
    if answer := code or status:
        return f"{host[1]} answers {answer[1]}"
    slow = late and "kind: Timeout" in text and "Connect" not in text
    return f"{host[1]} does not answer" + (" in time, so pass a longer `timeout` if the link is slow" if slow else "")


@final
class Uplink:
    """A link that several threads share; on a slow one, each has its part of the time that a request may take."""

    def __init__(self, most: int) -> None:
        """Keep how many bytes may be under way at once."""
        self._free, self._changed = most, Condition()

    @contextmanager
    def share(self, size: int) -> Iterator[None]:
        """Wait until so many bytes may be sent, at most all that may be under way at once, and count them while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
