"""What Lance raises, in our words."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lopd.errors import CorruptStoreError, LopdError, StoreReadError

_CONFLICTS = ("commit conflict", "was preempted", "incompatible transaction", "contention", "too many concurrent writers")
# Lance's messages on files that a clean-up has removed since they were looked at.
_GONE = ("not found", "no such file", "no longer exists")
# Its messages on a column whose type its 2.0 files do not take, or not without a value: lopd makes no such columns.
_UNSTORABLE = re.compile("does not encode struct validity|has no field encoding")
# The words of a storage or a system that refuses: a list that ends.  Those of Lance on damaged bytes do not, so all else is damage.
_REFUSALS = (errno.EPERM, errno.EACCES, errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ESTALE)
_REFUSED = re.compile(
    "Generic (S3|GCS|MicrosoftAzure) error|error sending request|timed out|lacked the necessary privileges|lacked valid authentication"
    rf"|os error ({'|'.join(map(str, _REFUSALS))})\)"
)
# Unlike other answers of a bucket, this one is of what is stored: a file ends before the bytes that its table places there.
_TOO_SHORT = re.compile("status code: 416")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what Lance raises while it reads into errors of ours."""
    try:
        yield
    except BaseException as error:
        if not is_lance_error(error):
            raise
        said = first_line(error)
        if _REFUSED.search(str(error)) and not _TOO_SHORT.search(str(error)):
            raise StoreReadError(
                f"{what}: reading it failed with {said!r}; check the storage, its permissions and credentials, and try again."
            ) from error
        raise CorruptStoreError(
            f"{what}: LanceDB cannot read it ({said!r}), so a file is damaged or gone; restore it from a backup, or refresh the store "
            "if they are of a version that has been removed since."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the gist of Lance's message; the rest is a stack of Rust."""
    return str(error).split("\n", 1)[0].split(", /", 1)[0][:300]


def remedy(error: BaseException) -> str:
    """Return what to do about a write that failed."""
    another = _UNSTORABLE.search(str(error))
    return "drop that column of another tool (`drop_columns`)" if another else "free space or fix permissions"


def is_lance_error(error: BaseException) -> bool:
    """Return whether LanceDB may have raised it, and not lopd; a panic of its Rust code is not an `Exception`."""
    return (isinstance(error, Exception) and not isinstance(error, LopdError)) or type(error).__name__ == "PanicException"


def is_conflict(error: BaseException) -> bool:
    """Return whether a write failed because another one came first."""
    return any(word in str(error).lower() for word in _CONFLICTS)


def is_gone(error: BaseException) -> bool:
    """Return whether files are not there that were there a moment ago."""
    return any(word in str(error).lower() for word in _GONE)
