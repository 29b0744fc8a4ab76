"""JSON documents that notice damage to themselves."""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.records.stored import LARGEST_JSON, parse


def checksum(data: Any) -> str:
    """Return what a byte string is recognised by: XXH3, which notices damage and not malice."""
    return xxhash.xxh3_128_hexdigest(data)


def dump(document: Mapping[str, Any]) -> bytes:
    """Return JSON with no spare byte, so that any flipped bit breaks it or changes its content."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the document as JSON, with a checksum of itself.

    Raises:
        InvalidRecordError: it is larger than `unseal` reads.
    """
    body = dict(document)
    sealed = dump({**body, "checksum": checksum(dump(body))})
    if len(sealed) > LARGEST_JSON:
        raise InvalidRecordError(f"Record: it has {len(sealed):,} bytes, expected at most {LARGEST_JSON:,}; write less in one call.")
    return sealed


def unseal(data: bytes) -> dict[str, Any] | None:
    """Return the inverse of `seal`; None if a single bit differs from what `seal` gave."""
    try:
        sealed = parse(data)
        body = {key: value for key, value in sealed.items() if key != "checksum"}
        return body if seal(body) == data else None
    except (ValueError, AttributeError, RecursionError):  # to write takes more room than to read
        return None


def unsealed(owner: str, path: str, data: bytes) -> dict[str, Any]:
    """Return the document in a file's bytes.

    Raises:
        CorruptStoreError: they are not what was sealed.
    """
    document = unseal(data)
    if document is None:
        raise damaged(owner, path)
    return document


def damaged(owner: str, path: str) -> CorruptStoreError:
    """Return the error for a document that is not what was sealed."""
    return CorruptStoreError(f"{owner}: {path} is damaged, expected bytes that match its checksum; restore it from a backup.")
