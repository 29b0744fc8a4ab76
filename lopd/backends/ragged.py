"""Log-probs in the type of a store."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError
from lopd.records.arrays import Float32Array

LogprobDtype = Literal["float32", "float16"]


def to_stored(values: Sequence[Float32Array | None], owners: Sequence[str], dtype: str) -> tuple[list[NDArray[Any] | None], float]:
    """Return log-probs in the type of a store, and the largest error in nats by which one was rounded.

    Raises:
        InvalidRecordError: one is beyond what float16 can hold; it names the rollout.
    """
    if dtype == "float32":
        return list(values), 0.0
    stored: list[NDArray[Any] | None] = []
    largest = 0.0
    for owner, full in zip(owners, values, strict=True):
        if full is None:
            stored.append(None)
            continue
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if np.isinf(half).any():
            raise InvalidRecordError(
                f"Rollout {owner!r}: a value is {full[np.isinf(half)][0]}, expected at least -65504 and at most 65504 in a store of float16; "
                "store float32, or floor it with `lopd.floor_logprobs`."
            )
        stored.append(half)
        largest = max(largest, float(np.abs(half.astype(np.float32) - full).max(initial=0.0)))
    return stored, largest
