"""How much of what is written is under way at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import final


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
