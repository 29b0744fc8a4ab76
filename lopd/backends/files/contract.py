"""Where a store's files are: a folder on a local disk, or a prefix in a bucket.  Files are written once and never changed."""

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lopd.errors import ForkedStoreError, LopdError, StorePathError, StoreReadError, StoreWriteError
from lopd.records.paths import local_path, path_text

StorePath = str | os.PathLike[str]
StorageOptions = Mapping[str, Any]
Bytes = NDArray[np.uint8]
Piece = bytes | memoryview
T = TypeVar("T")
#: Calls functions, side by side where they wait for a network, and returns their answers.
Run = Callable[[Sequence[Callable[[], Any]]], list[Any]]
_DOMAIN = r"\.(?:blob|dfs)\.(?P<domain>core\.windows\.net|fabric\.microsoft\.com)"
_AZURE_USER = re.compile(rf"(?i:abfss?|adl|azure|az|wasbs?)://(?P<container>[^/@:]+)@(?P<account>[^/@:.]+)(?:{_DOMAIN})?(?=/|$)")
_AZURE_HOST = re.compile(rf"(?i:https)://(?P<account>[^/@:.]+){_DOMAIN}/(?P<container>[^/?#]+)")
_SAME_SCHEME = {"abfs": "az", "abfss": "az", "adl": "az", "azure": "az", "s3a": "s3"}
# What a local disk answers about a file that is damaged, or is not one; and how Lance's messages end then.
_BAD = (errno.EIO, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
_BAD_WORDS = re.compile(rf"\(os error ({'|'.join(map(str, _BAD))})\)")
#: The folder that storage is tried in; `names` leaves it out.
PROBES = ".probes"


class Files(Protocol):
    """Files under one root; paths are relative to it, with forward slashes.

    Every method raises OSError when the storage refuses (after retries, where there is a network), FileNotFoundError when a file is missing.
    """

    @property
    def url(self) -> str:
        """The root, for messages; it carries no credentials."""
        ...

    @property
    def options(self) -> StorageOptions:
        """What it was opened with, credentials among them; none for a local disk."""
        ...

    def read(self, path: str, /) -> bytes:
        """Return a whole file."""
        ...

    def read_ranges(self, path: str, starts: Sequence[int], ends: Sequence[int], /) -> Sequence[Piece]:
        """Return parts of one file, from `starts` up to but not including `ends`; near ones are fetched together, and what is behind its end is
        missing.
        """
        ...

    def run(self, calls: Sequence[Callable[[], T]], /) -> list[T]:
        """Return what each call gives; side by side where they wait for a network."""
        ...

    def write(self, files: Mapping[str, Bytes], /) -> None:
        """Write new files, durable on return; FileNotFoundError where their folder was removed at the same moment."""
        ...

    def put_if_absent(self, path: str, data: bytes, /) -> bool:
        """Return whether this call made the file.  No two calls with different bytes make the same file; it appears whole.

        Raises:
            StoreWriteError: the file was made, but may not survive a power cut.
            StorePathError: the storage has no means to let one writer make it; it is not made.
        """
        ...

    def mark(self, folder: str, number: int, /) -> None:
        """Make an empty file named by this number, and remove the one before it, if that is allowed: the highest counts.

        Of a folder, only the first need survive a power cut.
        """
        ...

    def settle(self, folder: str, /) -> None:
        """Make the entries of a folder durable that another process may have made a moment ago."""
        ...

    def names(self, folder: str, /) -> list[str]:
        """Return sorted names of the files and folders in a folder; empty if it is not there, NotADirectoryError if it is a file."""
        ...

    def age(self, folder: str, /) -> float:
        """Return seconds since the newest file in a folder was written: this machine's clock less what the storage's showed then, so that a
        difference of the two shows in it.
        """
        ...

    def remove(self, paths: Iterable[str], /) -> None:
        """Remove files, and folders with all that is in them but not what links lead to; what is not there does not matter."""
        ...


def read_spans(read: Callable[[list[int], list[int]], list[bytes]], starts: Sequence[int], ends: Sequence[int], gap: int) -> list[bytes]:
    """Return parts of one file from as few reads as there need be where gaps up to this many bytes are read along; empty parts need none.

    Args:
        read: gives the bytes from places up to others, or fewer at the end of the file.
        starts: first byte of each part.
        ends: byte after each part.
        gap: bytes.
    """
    found = [b""] * len(starts)
    begin, stop = np.array(starts, np.int64), np.array(ends, np.int64)
    order = np.argsort(begin, kind="stable")
    order = order[stop[order] > begin[order]]
    if not order.size:
        return found
    begin, stop = begin[order], stop[order]
    reach = np.maximum.accumulate(stop)
    new = np.concatenate([[True], begin[1:] - reach[:-1] > gap])
    firsts, span = begin[new], np.cumsum(new) - 1
    spans = read(firsts.tolist(), reach[np.append(np.flatnonzero(new)[1:], order.size) - 1].tolist())
    begin, stop = begin - firsts[span], stop - firsts[span]
    # copies, not views: the garbage collector follows views, and many of them cost more than their bytes
    for place, k, i, j in zip(order.tolist(), span.tolist(), begin.tolist(), stop.tolist(), strict=True):
        found[place] = spans[k][i:j]
    return found


@contextmanager
def reading(owner: str, what: str, hint: str = "check the storage and try again") -> Iterator[None]:
    """Turn what a storage raises while a store reads into an error of ours; `what` states what the store was doing.

    Raises:
        StoreReadError: the storage refused.
    """
    try:
        yield
    except LopdError:
        raise
    except OSError as error:
        raise StoreReadError(f"{owner}: {what} failed with {error}; {hint}.") from error


def is_damage(place: str, error: OSError | LopdError) -> bool:
    """Return whether an error of reading shows that a store is damaged: a bad sector of a local disk does, a storage that refuses does not.

    Args:
        place: the store's URL, or a name with it.
        error: what reading raised.
    """
    if isinstance(error, LopdError) and not isinstance(error, StoreReadError | ForkedStoreError):
        return True
    cause = error.__cause__ if isinstance(error, StoreReadError) else error
    return "://" not in place and (getattr(cause, "errno", None) in _BAD or _BAD_WORDS.search(str(cause)) is not None)


def problem(files: Files, error: OSError | LopdError) -> str:
    """Return an error of reading as a problem of the store, for `verify`.

    Raises:
        StoreReadError: the storage refused, or did not answer.
        ForkedStoreError: this process may not read it.
    """
    if is_damage(files.url, error):
        return str(error)
    if isinstance(error, LopdError):
        raise error
    raise StoreReadError(f"Store {files.url}: reading it failed with {error}; check the storage and try again.") from error


@contextmanager
def writing(owner: str, what: str = "the write") -> Iterator[None]:
    """Raise the same errors while it writes.

    Raises:
        StoreWriteError: the storage refused; or it has made what was asked for, and only its durability is in doubt.
    """
    try:
        yield
    except LopdError:
        raise
    except OSError as error:
        raise StoreWriteError(
            f"{owner}: {what} failed with {error}, expected a place that can be written to; nothing of this call was committed, "
            "so check the path, its permissions and the free space, and repeat it."
        ) from error


def names_in(files: Files) -> list[str]:
    """Return what is in the root; the root itself where it is a file.

    Raises:
        StoreReadError: the storage refused to answer.
    """
    way = ", credentials, endpoint, proxies and certificates" if "://" in files.url else " and its permissions"
    with reading(f"Store {files.url}", "looking for it", f"check the path{way}"):
        try:
            return files.names("")
        except NotADirectoryError:
            return [files.url]


def in_doubt(url: str, path: str, error: OSError) -> StoreWriteError:
    """Make the error for a put that may have been done: what belongs to it must stay."""
    return StoreWriteError(
        f"{url}/{path}: the storage did not report whether it is written ({error}); "
        "open the store again when the storage is back, and repeat the call, which is safe."
    )


def local_folder(path: StorePath) -> Path | None:
    """Return the local folder that a path or a `file://` URL names, None for any other URL.

    Raises:
        StorePathError: it is not a path, `Path` has taken a URL's second slash, or a `file://` URL names a host.
    """
    text = path_text("Store", path, StorePathError)
    if "://" in text and not text.startswith("file://"):
        return None
    local = text.removeprefix("file://")
    if local != text and not local.startswith("/"):
        raise StorePathError("Store: the path is a file:// URL that does not go on with a slash; write file:///folder, or a path.")
    return local_path("Store", local, StorePathError)


def bucket_url(url: str) -> str:
    """Return the URL by which both obstore and LanceDB know a place in a bucket; one that is not in a bucket as it is.

    >>> bucket_url("abfss://container@account/run"), bucket_url("https://account.blob.core.windows.net/container/run")
    ('abfss://container@account.dfs.core.windows.net/run', 'abfss://container@account.dfs.core.windows.net/run')
    >>> bucket_url("azure://container/run"), bucket_url("memory://run")
    ('az://container/run', 'memory://run')
    """
    for form in (_AZURE_USER, _AZURE_HOST):
        if found := form.match(url):
            return f"abfss://{found['container']}@{found['account']}.dfs.{found['domain'] or 'core.windows.net'}{url[found.end() :]}"
    scheme, separator, rest = url.partition("://")
    return f"{_SAME_SCHEME.get(scheme.lower(), scheme.lower())}://{rest}" if separator else url
