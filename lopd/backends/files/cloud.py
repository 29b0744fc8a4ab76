"""Files in a bucket: s3, gs, az and their kin, through obstore.

`storage_options` are those of Apache object_store, which LanceDB takes too: `aws_access_key_id`, `aws_secret_access_key`, `aws_region`,
`aws_endpoint`, `allow_http`, ...; what is not given comes from the environment, whose names (`AWS_ALLOW_HTTP`) may be passed as well.
Requests that fail are repeated with growing pauses, within `client_max_retries` (10) and `client_retry_timeout` (180 s).  `timeout` limits one
request ("60s"); where it is not given, a read goes on as long as bytes come, and what is written has 150 s for each 5 MB.
Until the storage has answered once, requests are given up after some seconds.
The file systems of fsspec, which has every other URL, take options of their own (`key`, `secret`, ...).
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from threading import BoundedSemaphore
from typing import Any, final

import numpy as np

from lopd.backends.files.buckets import CUT_OFF, Uplink, check_http, is_yes, not_opened, number_of, said
from lopd.backends.files.contract import PROBES, Bytes, StorageOptions, T, bucket_url, in_doubt, read_spans
from lopd.backends.fork import check_fork
from lopd.backends.retry import repeat
from lopd.errors import StorePathError
from lopd.records.optional import need
from lopd.records.paths import without_secrets
from lopd.records.waiting import waiting

# What obstore takes apart from other options, with the prefix that it may have: all that LanceDB takes too.
_CLIENT_OPTION = re.compile(
    r"\A(?:aws_|azure_|google_)?(allow_(?:http|invalid_certificates)|(?:connect_|read_)?timeout|default_content_type|http[12]_only"
    r"|http2_(?:keep_alive_(?:interval|timeout|while_idle)|max_frame_size)|pool_(?:idle_timeout|max_idle_per_host)"
    r"|proxy_(?:url|ca_certificate|excludes)|randomize_addresses|user_agent)\Z"
)
# LanceDB, whose own defaults are lower, gets them as well.
_RETRIES = {"client_max_retries": 10, "client_retry_timeout": 180}
# Within them, and their sum, a first request fails; well below 20 s together.
_FIRST_S, _FIRST_TIMEOUTS = 5.0, {"connect_timeout": "5s", "timeout": "8s"}
# Later, where no `timeout` is given: a slow link is let finish, and one that is silent is noticed.  A put is silent until all of it is sent; its
# limit is below that of repetitions, so that a connection that broke is made again.
_READ_TIMEOUTS, _PUT_TIMEOUTS = {"timeout": "3600s", "read_timeout": "30s"}, {"timeout": "150s"}
_ENVIRONMENTS = {"gs": "GOOGLE_", "az": "AZURE_", "abfs": "AZURE_"}
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist", "specified container does not exist")
# A put that was answered so is not done, and another would be answered alike, as with a session token that has ended.
_FINAL = re.compile(r"(?s)status code: (501|400(?!.*<Code>RequestTimeout<))")
# Of one object of this class; and of what one call writes, which shares an uplink: four parts of large objects, or as many bytes of small ones.
_REQUESTS_AT_ONCE, _PARTS_AT_ONCE, _PART = 16, 4, 5 << 20
# A request takes as long as a megabyte or so.  More bytes than `_MOST` are read by several, each of which is repeated by itself.
_GAP, _MOST = 1 << 20, 8 << 20


def _prefix(url: str) -> str:
    return next((prefix for scheme, prefix in _ENVIRONMENTS.items() if url.startswith(scheme)), "AWS_")


def _client_options_of_environment(url: str) -> dict[str, str]:
    own = ((_CLIENT_OPTION.fullmatch(name.lower()), value) for name, value in os.environ.items() if name.upper().startswith(_prefix(url)))
    return {found[1]: value for found, value in own if found}


def _cut(start: int, end: int) -> list[tuple[int, int]]:
    """Return the bytes from one place to another as spans that one request reads."""
    return [(first, min(first + _MOST, end)) for first in range(start, end, _MOST)]


@final
class ObstoreFiles:
    """`Files` in a bucket of S3, GCS or Azure; conditional puts make commits safe, strong consistency makes them visible at once."""

    def __init__(self, url: str, options: StorageOptions, *, answered: bool = False) -> None:
        """Keep the settings; a request is made later.

        Raises:
            StorePathError: it refuses the options, the endpoint is http and that was not allowed, or the URL goes on with `?` or `#`, or has `//`
                in its path.
        """
        self._given = url.rstrip("/")  # with the secrets that are in it
        self.url = without_secrets(self._given)
        if re.search("[?#]", self._given):  # obstore drops it, and two stores would be one
            raise StorePathError(
                f"Store {self.url}: its URL has a `?` or `#`, expected none in a bucket; choose another name, or pass a SAS token as the option "
                "`azure_storage_sas_token`."
            )
        if re.search("[^:/]//", self._given):
            raise StorePathError(f"Store {self.url}: its path has `//`, expected a name between two slashes; leave one out.")
        # one form of each name: obstore ends in a panic where a client option has another, and LanceDB reads some in lower case alone
        self.options = _RETRIES | {_CLIENT_OPTION.sub(r"\1", name.lower()): value for name, value in options.items()}
        self._obstore = need("obstore", f"Store {self.url}", "zarr")
        self._final = (self._obstore.exceptions.PermissionDeniedError, self._obstore.exceptions.UnauthenticatedError)
        self._max_retries = int(number_of("client_max_retries", self.url, self.options))
        self._retry_timeout = number_of("client_retry_timeout", self.url, self.options)
        self._answered = answered
        self._slots = BoundedSemaphore(_REQUESTS_AT_ONCE)
        self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return URL and options: connections do not travel to another process."""
        return partial(ObstoreFiles, answered=self._answered), (self._given, self.options)

    @property
    def _patience(self) -> float:
        """Seconds: before the first answer, a mistake is likelier than trouble that passes."""
        return self._retry_timeout if self._answered else min(_FIRST_S, self._retry_timeout)

    def _open(self) -> None:
        obstore = self._obstore
        check_fork("obstore", f"Store {self.url}")
        url = bucket_url(self._given)
        check_http(url, self.url, self.options)
        given = {name: value for name, value in self.options.items() if _CLIENT_OPTION.fullmatch(name)}
        options = {name: value for name, value in self.options.items() if name not in {*given, *_RETRIES}}
        retry = {"max_retries": self._max_retries, "retry_timeout": timedelta(seconds=self._patience)}
        # what is passed takes the place of all that the environment sets
        client = _client_options_of_environment(url) | given
        client = {name: is_yes(value) if name.startswith("allow_") else value for name, value in client.items()}
        reads, puts = ({}, {}) if "timeout" in client else (_READ_TIMEOUTS, _PUT_TIMEOUTS)
        limits = (reads, puts, {}) if self._answered else (_FIRST_TIMEOUTS,) * 3
        try:
            # obstore decides which options there are.
            make = partial(obstore.store.from_url, url, config=options)
            # A conditional put is repeated by `put_if_absent`, which knows what is in vain.
            self._store, self._puts, self._once = (
                make(client_options={**limit, **client} or None, retry_config=retry | more)
                for limit, more in zip(limits, ({}, {}, {"max_retries": 0}), strict=True)
            )
        except BaseException as error:
            # a panic of its Rust code is not an `Exception`
            if type(error).__name__ != "PanicException" and not isinstance(error, obstore.exceptions.BaseError | ValueError | TypeError):
                raise
            why = not_opened(error, None if self.options.keys() - _RETRIES else _prefix(url))
        else:
            return
        # Not in the block above, where Python would chain obstore's error: it has the URL in it, or the value of an option.
        raise StorePathError(f"Store {self.url}: {why}.")

    def _call(self, path: str, work: Callable[[], T]) -> T:
        check_fork("obstore", f"Store {self.url}")
        try:
            with self._slots, waiting(f"Store {self.url}: waiting for its storage to answer, for up to {self._patience:.0f} s"):
                done = work()
        # a ValueError is for a path that no key can have
        except (self._obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
            if any(words in str(error) for words in _NO_BUCKET):
                raise StorePathError(
                    f"Store {self.url}: there is no such bucket; create it, or check its name, the region and the endpoint."
                ) from error
            if isinstance(error, self._obstore.exceptions.NotFoundError | FileNotFoundError):
                self._hear()
                raise FileNotFoundError(f"{self.url}/{path} is not there") from error
            why = said(error, late=self._answered)
            raise (ConnectionError if why == CUT_OFF else OSError)(f"{self.url}/{path}: {why}") from error
        self._hear()
        return done

    def _hear(self) -> None:
        """Note that the storage has answered: from now on it is given time to recover."""
        if not self._answered:
            self._answered = True
            self._open()

    def read(self, path: str, /) -> bytes:
        """Return a whole object; a large one by several requests, which fail where another takes its place."""
        if not self._answered:
            # without its body, which may take longer than a first contact is given
            self._call(path, lambda: self._obstore.get(self._store, path))
        found = self._call(path, partial(self._read_small, path))
        if isinstance(found, bytes):
            return found
        parts = _cut(0, found["size"])
        return b"".join(self.run([partial(self._call, path, partial(self._get, path, found["e_tag"], part)) for part in parts]))

    def _get(self, path: str, tag: str | None, part: tuple[int, int]) -> bytes:
        found = self._obstore.get(self._store, path, options={"range": part})
        # not by If-Match, which some servers ignore; those that keep to the standard refuse it with a weak tag
        if tag and found.meta["e_tag"] not in (tag, None):
            raise OSError(f"{self.url}/{path}: another object took its place while it was read")
        return bytes(found.bytes())

    def _read_small(self, path: str) -> Any:
        """Return an object, or what is known of one that is large."""
        found = self._obstore.get(self._store, path)
        return found.meta if found.meta["size"] > _MOST else bytes(found.bytes())

    def read_ranges(self, path: str, starts: Sequence[int], ends: Sequence[int], /) -> list[bytes]:
        """Return parts of one object; near ones are fetched by one request, and what is behind the end of the object is missing."""

        def read(firsts: list[int], lasts: list[int]) -> list[bytes]:
            spans = list(map(_cut, firsts, lasts))
            found = iter(self.run([partial(self._read_span, path, *span) for cut in spans for span in cut]))
            return [b"".join(islice(found, len(cut))) for cut in spans]

        return read_spans(read, starts, ends, _GAP)

    def _read_span(self, path: str, start: int, end: int) -> bytes:
        try:
            return bytes(self._call(path, lambda: self._obstore.get_range(self._store, path, start=start, end=end)))
        except OSError as error:
            # A server refuses a range that begins behind the end; that the object is too short is for the caller to report.
            if isinstance(error, FileNotFoundError) or self._is_final(error):
                raise
            if self._call(path, lambda: self._obstore.head(self._store, path))["size"] > start:
                raise
            return b""

    def run(self, calls: Sequence[Callable[[], T]], /) -> list[T]:
        """Return what each call gives, some at a time."""
        if len(calls) < 2:
            return [call() for call in calls]
        with ThreadPoolExecutor(min(_REQUESTS_AT_ONCE, len(calls))) as pool:
            return list(pool.map(lambda call: call(), calls))

    def write(self, files: Mapping[str, Bytes], /) -> None:
        """Write new objects, some at a time, small ones first; few bytes are under way at once."""
        uplink, large = Uplink(_PARTS_AT_ONCE * _PART), sum(data.nbytes > _PART for data in files.values())
        parts = math.ceil(_PARTS_AT_ONCE / max(1, large))

        def put(path: str, data: Bytes) -> None:
            with uplink.share(min(data.nbytes, parts * _PART)):
                self._put(path, data, parts)

        self.run([partial(put, path, data) for path, data in sorted(files.items(), key=lambda file: file[1].nbytes)])

    def _put(self, path: str, data: Bytes, parts: int = 1) -> None:
        self._call(path, lambda: self._obstore.put(self._puts, path, data.tobytes(), chunk_size=_PART, max_concurrency=parts))

    def put_if_absent(self, path: str, data: bytes, /) -> bool:
        """Return whether this call made the object.

        Whether a put whose answer was lost was done is not known; the object is read, and its bytes show whose it is.
        """
        lost: list[OSError] = []
        try:
            return self._repeat(partial(self._put_or_compare, path, data, lost))
        except OSError as error:
            if not lost:
                raise
            raise in_doubt(self.url, path, error) from error

    def _put_or_compare(self, path: str, data: bytes, lost: list[OSError]) -> bool:
        try:
            self._call(path, lambda: self._obstore.put(self._once, path, data, mode="create"))
        except OSError as error:
            if self._is_final(error):
                raise  # it was refused, so it is not done
            lost.append(error)
            try:
                return self.read(path) == data
            except FileNotFoundError:
                raise error from error.__cause__
        return True

    def _repeat(self, work: Callable[[], T]) -> T:
        """Repeat what a lost connection cut off: object_store does so for what a server refuses (5xx), and for plain reads, only."""
        return repeat(work, self._passes, seconds=self._patience, times=self._max_retries, pause=0.1, longest=15.0)

    def _passes(self, error: Exception) -> bool:
        return isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not self._is_final(error)

    def _is_final(self, error: OSError) -> bool:
        return isinstance(error.__cause__, self._final) or _FINAL.search(str(error.__cause__)) is not None

    def mark(self, folder: str, number: int, /) -> None:
        """Make an empty object of this number, and remove the one before it, if that is allowed."""
        self._put(f"{folder}/{number:010d}", np.zeros(0, np.uint8))
        with suppress(OSError):
            self.remove([f"{folder}/{number - 1:010d}"] if number else [])

    def settle(self, folder: str, /) -> None:
        """Do nothing: a put is durable when it is answered."""

    def names(self, folder: str, /) -> list[str]:
        """Return sorted names of what is in a folder."""
        prefix = f"{folder}/" if folder else ""
        listed = self._repeat(partial(self._call, folder, lambda: self._obstore.list_with_delimiter(self._store, prefix or None)))
        paths = [*listed["common_prefixes"], *(entry["path"] for entry in listed["objects"])]
        # consoles make a "folder" of an empty object that has its name
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths} - {PROBES, ""})

    def _listed(self, folder: str) -> list[Any]:
        pages = lambda: [entry for page in self._obstore.list(self._store, f"{folder}/") for entry in page]  # noqa: E731 (drawn again each time)
        return self._repeat(partial(self._call, folder, pages))

    def age(self, folder: str, /) -> float:
        """Return seconds since the newest object in a folder was written: this machine's clock less what the server's showed then."""
        newest = max((entry["last_modified"] for entry in self._listed(folder)), default=datetime.now(UTC))
        return float((datetime.now(UTC) - newest).total_seconds())

    def remove(self, paths: Iterable[str], /) -> None:
        """Remove objects, and all objects in folders."""
        for path in paths:
            objects = [entry["path"] for entry in self._listed(path)] or [path]
            with suppress(FileNotFoundError):
                self._call(path, lambda objects=objects: self._obstore.delete(self._store, objects))  # type: ignore[misc]
