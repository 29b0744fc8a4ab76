"""Bytes that are alive after each operation.  On tensors that have sizes and no numbers, a model's own code says what it needs within seconds.

Shape suffixes: T operations, P parts.
"""

import weakref
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What is there before a phase begins, and what it makes.
STAYING, MADE = ("weights", "gradients", "moments", "keys and values"), ("logits", "activations")
PARTS = (*STAYING, *MADE)
_GIGA = 1e9


@final
@frozen(eq=False)
class Stretch:
    """What was alive during a phase.

    Args:
        after: (T, P) bytes after each operation.
        deep: from the beginning of the second layer until all layers were computed, and from then to the end of its backward pass.
        full: (2, P) bytes when all layers had been computed, and when what only computing needed was freed.
    """

    after: NDArray[np.int64]
    deep: tuple[slice, slice]
    full: NDArray[np.int64]

    def with_layers(self, other: "Stretch", times: int) -> NDArray[np.int64]:
        """Return (T, P) with the second layer so many times more.

        Args:
            other: the same with the second layer once more.
            times: how many more there are.
        """
        staying_P = other.after[0] - self.after[0]
        after_TP: NDArray[np.int64] = self.after + times * staying_P
        # what a layer keeps is there while those above it are computed, forwards and backwards
        for deep, more_P in zip(self.deep, other.full - self.full - staying_P, strict=True):
            after_TP[deep] += times * more_P
        return after_TP


@final
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, part by part, after each operation in it.

    What an operation needs only while it runs is not counted, and tensors on "meta" hold nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive, self._part = [0] * len(PARTS), 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self.begin()

    def make(self, part: str) -> None:
        """Count what is made from now on as this part."""
        self._part = PARTS.index(part)

    def begin(self) -> None:
        """Forget what was seen; what is alive is where a phase begins."""
        self._after = [tuple(self._alive)]
        self._enter: int | None = None
        self._leave: int | None = None
        self._full: list[tuple[int, tuple[int, ...]]] = []

    def filled(self) -> None:
        """All layers have been computed; and once more, when what only computing needed is freed."""
        self._full.append((len(self._after), tuple(self._alive)))

    def enter(self) -> None:
        """The second layer begins."""
        self._enter = len(self._after) if self._enter is None else self._enter

    def leave(self) -> None:
        """Its backward pass has ended."""
        self._leave = len(self._after)

    def stretch(self) -> Stretch:
        """Return what was seen since `begin`."""
        (turn, first), (_, second) = self._full[0], self._full[-1]
        deep = slice(self._enter, turn), slice(turn, self._leave)
        return Stretch(np.array(self._after, np.int64), deep, np.array([first, second], np.int64))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count what it made."""
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in ((made,) if isinstance(made, Tensor) else tree_leaves(made)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._add(tensor)
        if tensors:
            self._after.append(tuple(self._alive))
        return made

    def _add(self, tensor: Tensor) -> None:
        storage, part = tensor.untyped_storage(), self._part
        key, size = id(storage), storage.nbytes()
        if key in self._storages or tensor.device.type == "meta":
            return

        def freed(_: Any) -> None:
            del self._storages[key]
            self._alive[part] -= size

        self._storages[key] = weakref.ref(storage, freed)
        self._alive[part] += size


@final
@frozen(eq=False)
class Need:
    """What a phase needs, for any number of rows: every tensor has as many bytes more for each.

    Args:
        stretches: of a phase, each as two arrays (T, P): bytes after each operation without rows, and more bytes for each row.
    """

    stretches: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]

    @classmethod
    def of(cls, rows: int, some: Sequence[NDArray[np.int64]], more: Sequence[NDArray[np.int64]]) -> "Need":
        """Make it of what the same operations leave alive with so many rows, and with one more."""
        return cls(tuple((a_TP - rows * (b_TP - a_TP), b_TP - a_TP) for a_TP, b_TP in zip(some, more, strict=True)))

    def shared(self, gpus: int, whole: int) -> "Need":
        """Return what one of several cards needs, that share what stays and gather so many bytes of it at a time."""
        stretches = []
        for none_TP, each_TP in self.stretches:
            shared_TP = none_TP.copy()
            shared_TP[:, : len(STAYING)] //= gpus
            shared_TP[:, 0] += whole
            stretches.append((shared_TP, each_TP))
        return Need(tuple(stretches))

    def gigabytes(self, rows: int) -> dict[str, float]:
        """Return 10^9 bytes of each part when most are alive."""
        bytes_TP = max((none_TP + rows * each_TP for none_TP, each_TP in self.stretches), key=lambda of: of.sum(axis=1).max())
        most_P = bytes_TP[bytes_TP.sum(axis=1).argmax()] / _GIGA
        # what takes the place of something that was there, such as keys and values with one more token, is still that
        found = {**dict(zip(PARTS, most_P, strict=True)), **dict(zip(STAYING, bytes_TP[0] / _GIGA, strict=False))}
        found["activations"] += float(most_P.sum()) - sum(found.values())
        return {part: float(size) for part, size in found.items() if size > 0}

    def most_rows(self, room_gb: float) -> int:
        """Return the largest number of rows for which there is room; 0 if there is none."""
        least = np.inf
        for none_TP, each_TP in self.stretches:
            free_T, each_T = room_gb * _GIGA - none_TP.sum(axis=1), each_TP.sum(axis=1)
            grows_T = each_T > 0
            least = min(least, float((free_T[grows_T] // each_T[grows_T]).min()), 0 if (free_T < 0).any() else np.inf)
        return max(int(least), 0)
