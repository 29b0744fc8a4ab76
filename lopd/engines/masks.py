"""What is known of the rows of a forward, passed to transformers, which would ask the GPU and wait for the answer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import Tensor

_here, _UNKNOWN = local(), object()


@contextmanager
def known_rows(rollout_BS: Tensor | None = None) -> Iterator[None]:
    """Say which rollout of its row each position belongs to: transformers need not look for borders to mask, in this thread.

    None where rows are not packed, or where the attention gets their lengths.
    """
    _answer_for(sys.modules.get("transformers.masking_utils"))
    before = _known()
    _here.rollouts = rollout_BS
    try:
        yield
    finally:
        _here.rollouts = before


def _known() -> Any:
    return getattr(_here, "rollouts", _UNKNOWN)


def _answer_for(masks: Any) -> None:
    """Stand before the function that looks for borders, once; a transformers that has another name for it waits, and is right."""
    look = getattr(masks, "find_packed_sequence_indices", None)
    if look is None or hasattr(look, "stands_before"):
        return

    def find(position_ids_BS: Any) -> Any:
        return look(position_ids_BS) if (known := _known()) is _UNKNOWN else known

    find.stands_before = look  # type: ignore[attr-defined]
    masks.find_packed_sequence_indices = find
