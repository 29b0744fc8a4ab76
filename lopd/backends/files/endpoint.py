"""What the options of a bucket mean, and where its server is, as they and the environment have it."""

import os
from contextlib import suppress

from lopd.backends.files.contract import StorageOptions
from lopd.errors import StorePathError
from lopd.records.paths import without_secrets

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
