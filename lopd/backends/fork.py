"""Libraries whose threads do not survive a fork: a child of a process that used one would wait for ever."""

import os
from typing import final

from lopd.errors import ForkedStoreError


@final
class ForkGuard:
    """Refuses a library to processes that were forked from one that has used it.

    Args:
        library: its name.
    """

    def __init__(self, library: str) -> None:
        """Start unused by any process."""
        self._library = library
        self._pid: int | None = None

    def check(self, owner: str) -> None:
        """Call before each use; `owner` is how messages name the store.

        Raises:
            ForkedStoreError: this process was forked.
        """
        self._pid = self._pid or os.getpid()
        if self._pid != os.getpid():
            raise ForkedStoreError(
                f"{owner}: process {os.getpid()} was forked from {self._pid}, which used {self._library}, expected a process started afresh; "
                "start workers with the 'spawn' or 'forkserver' method (DataLoader(multiprocessing_context='forkserver'))."
            )
