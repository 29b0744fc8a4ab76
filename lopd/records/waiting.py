"""A message during a long wait: what is waited for."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from lopd.errors import printable

_LOG = logging.getLogger("lopd")
#: Seconds of silence.
QUIET_S = 10.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Log a warning, once, if the block is not over after `QUIET_S` seconds.

    Args:
        what: is waited for, as a sentence without its full stop.
    """
    timer = Timer(QUIET_S, _LOG.warning, ["%s", printable(what)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
