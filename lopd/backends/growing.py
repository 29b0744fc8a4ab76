"""An array that grows at its end, at a price that does not grow with it."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray


@final
class Growing:
    """Values of one type, with room for more: each value is moved at most about once while others come.

    Args:
        dtype: type of the values.
        width: values a row; None for an array of one dimension.
    """

    def __init__(self, dtype: Any, width: int | None = None) -> None:
        self._room: NDArray[Any] = np.empty((0,) if width is None else (0, width), dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, values: NDArray[Any]) -> None:
        """Add (n,) or (n, width) values; views that were given before keep what they show."""
        end = self._size + len(values)
        if end > len(self._room):
            larger = np.empty((max(end, 2 * len(self._room)), *self._room.shape[1:]), self._room.dtype)
            larger[: self._size] = self._room[: self._size]
            self._room = larger
        self._room[self._size : end] = values
        self._size = end

    def view(self) -> NDArray[Any]:
        """Return all values, not copied."""
        return self._room[: self._size]
