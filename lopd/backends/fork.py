"""Libraries whose threads do not survive a fork: a child of a process that used one would wait for ever."""

import os

from lopd.errors import ForkedStoreError

# by name of a library, the process that has used it
_USED_BY: dict[str, int] = {}


def check_fork(library: str, owner: str) -> None:
    """Refuse a library to processes that were forked from one that has used it; call before each use.

    Args:
        library: its name.
        owner: how messages name the store.

    Raises:
        ForkedStoreError: this process was forked.
    """
    used_by = _USED_BY.setdefault(library, os.getpid())
    if used_by != os.getpid():
        raise ForkedStoreError(
            f"{owner}: process {os.getpid()} was forked from {used_by}, which used {library}, expected a process started afresh; "
            "start workers with the 'spawn' or 'forkserver' method (DataLoader(multiprocessing_context='forkserver'))."
        )
