"""Converters of fields that are arrays: read-only on the way in, refused where a value would be lost.

Shape suffixes: T response tokens of one rollout, K candidates a token.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError
from lopd.records.checks import a_kind

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view."""
    array = array.view()
    array.flags.writeable = False
    return array


def _array(what: str, value: Any, dtype: Any = None) -> NDArray[Any]:
    """Return the value as an array; what numpy cannot read (ragged lists, text, tensors on a device) is refused."""
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidRecordError(f"{what}: numpy cannot read {a_kind(value)} ({error}); pass a list or an array of numbers.") from error


def check_ids(value: Any, dimensions: int) -> NDArray[Any]:
    """Return token ids as they came, if int32 can hold them; anything that would lose a value on the way is refused."""
    array = _array("Token ids", value)
    if array.ndim != dimensions or (array.size and array.dtype.kind not in "iu"):
        shape = {1: "a vector", 2: "a matrix"}[dimensions]
        raise InvalidRecordError(
            f"Token ids: the value has dtype {array.dtype} and shape {array.shape}, expected {shape} of integers; pass the sampled ids."
        )
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise InvalidRecordError(
            f"Token ids: the range is [{array.min()}, {array.max()}], expected 0 to 2**31 - 1; drop padding markers before making the record."
        )
    return array


def to_ids(value: Any) -> Int32Array:
    """Return token ids as a read-only int32 vector."""
    return read_only(check_ids(value, 1).astype(np.int32))


def to_candidates(value: Any) -> Int32Array:
    """Return token ids as a read-only int32 matrix."""
    return read_only(check_ids(value, 2).astype(np.int32, order="C"))


def to_floats(value: Any) -> Float32Array:
    """Return a read-only float32 copy."""
    return read_only(_array("Log-probs", value, np.float32).copy())


def to_mask(value: Any) -> BoolArray:
    """Return a read-only bool copy of bools, or of integers that are 0 or 1: whether a label such as -100 counts is not known."""
    array = _array("Loss mask", value)
    if array.size and array.dtype.kind not in "biu":
        raise InvalidRecordError(
            f"Loss mask: the value has dtype {array.dtype} and shape {array.shape}, expected bools, or integers that are 0 or 1; "
            "pass True where a token counts."
        )
    wrong = np.argwhere((array != 0) & (array != 1))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise InvalidRecordError(
            f"Loss mask: entry {', '.join(map(str, place))} is {array[place]}, expected True, False, 1 or 0; pass True where a token counts."
        )
    return read_only(array.astype(np.bool_))


def check_logprobs(owner: str, name: str, logprobs: Float32Array, shape: tuple[int, ...], *, signed: bool = False) -> None:
    """Refuse what is not a log-prob, or not one for each token.

    Args:
        owner: for the message.
        name: for the message.
        logprobs: what there is.
        shape: that it must have.
        signed: these are residuals or labels (`Scores.signed`), so that more than 0 is a value like any other.

    Raises:
        InvalidRecordError: another shape; or NaN, an infinity, or more than 0 nats of a log-prob.
    """
    if logprobs.shape != shape:
        raise InvalidRecordError(
            f"{owner}: {name} has shape {logprobs.shape}, expected {shape} (response_ids has {shape[0]} tokens); "
            "pass one value per response token."
        )
    good = np.isfinite(logprobs) & (signed | (logprobs <= 0))
    if not good.all():
        place = tuple(int(i) for i in np.argwhere(~good)[0])
        found = f"{owner}: {name}[{', '.join(map(str, place))}] is {logprobs[place]}"
        if signed:
            raise InvalidRecordError(f"{found}, expected a finite number; check what it was made of.")
        raise InvalidRecordError(
            f"{found}, expected a finite log-prob of at most 0 nats; "
            "check the engine (an exact -inf may be stored with `lopd.floor_logprobs`, which counts it)."
        )
