"""What is known of the rows of a forward, said to transformers, which would ask the GPU and wait for the answer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

_here = local()


@contextmanager
def one_rollout_a_row() -> Iterator[None]:
    """Rows are not packed, or the attention is told their lengths: transformers need not look for borders to mask, in this thread."""
    _answer_for(sys.modules.get("transformers.masking_utils"))
    before = _is_known()
    _here.known = True
    try:
        yield
    finally:
        _here.known = before


def _is_known() -> bool:
    return getattr(_here, "known", False)


def _answer_for(masks: Any) -> None:
    """Stand before the function that looks for borders, once; a transformers that has another name for it waits, and is right."""
    look = getattr(masks, "find_packed_sequence_indices", None)
    if look is None or hasattr(look, "stands_before"):
        return

    def find(position_ids_BS: Any) -> Any:
        return None if _is_known() else look(position_ids_BS)

    find.stands_before = look  # type: ignore[attr-defined]
    masks.find_packed_sequence_indices = find
