"""Bytes that are alive after each operation.  On tensors that have sizes and no numbers, a model's own code shows what it needs within seconds.

Shape suffixes: T operations, P parts.
"""

import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopd.errors import ModelError
from lopd.losses.chunking import GPU_ROWS, Chunking, card_chunk_bytes, chunk_rows

#: What is there before a phase begins, and what it makes.
STAYING, MADE = ("weights", "gradients", "moments", "keys and values"), ("logits", "activations")
PARTS = (*STAYING, *MADE)
_LOGITS = PARTS.index("logits")
_GIGA = 1e9
#: Products of groups of rows, by experts; not every version of torch has it.
_GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)


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
        """Note that all layers have been computed; and again, when what only computing needed is freed."""
        self._full.append((len(self._after), tuple(self._alive)))

    def enter(self) -> None:
        """Note that the second layer begins."""
        self._enter = len(self._after) if self._enter is None else self._enter

    def leave(self) -> None:
        """Note that its backward pass has ended."""
        self._leave = len(self._after)

    def stretch(self) -> Stretch:
        """Return what was seen since `begin`."""
        (turn, first), (_, second) = self._full[0], self._full[-1]
        deep = slice(self._enter, turn), slice(turn, self._leave)
        return Stretch(np.array(self._after, np.int64), deep, np.array([first, second], np.int64))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes_alone = func.overloadpacket is _GROUPED and isinstance(args[0], FakeTensor)
        made = (_grouped if sizes_alone else func)(*args, **(kwargs or {}))
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


def _grouped(left: Tensor, right: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return what products of groups of rows fill (experts), for any dtype: without numbers, torch's own takes bfloat16 alone."""
    rows = left.shape[:-1] if right.ndim == 3 else (len(offsets), left.shape[0])
    return left.new_empty(*rows, right.shape[-1])


def chunk_size(rows: float, alive: float | None, *, row_bytes: int, tokens: int, limit: int | None, room_gb: float | None) -> int:
    """Return bytes of the buffer of logits in training; they depend on what else is in memory, so one byte stands for it while bytes are counted.

    Args:
        rows: how many.
        alive: bytes of all else; None for a buffer as large as a card needs to be fast.
        row_bytes: bytes of the logits of one token.
        tokens: tokens that count, in each row.
        limit: bytes; None for what the losses take on a card.
        room_gb: what there is in all, 10^9 bytes; None for enough.
    """
    free = np.inf if room_gb is None or alive is None else room_gb * _GIGA - alive
    usual = GPU_ROWS * row_bytes if alive is None else card_chunk_bytes(row_bytes, free)
    return row_bytes * chunk_rows(Chunking(limit or usual), math.ceil(rows * tokens), row_bytes, torch.device("cpu"))


@final
@frozen(eq=False)
class Need:
    """What a phase needs, for any number of rows: every tensor has as many bytes more for each.

    Args:
        stretches: the parts of a phase, each as two arrays (T, P): bytes after each operation without rows, and more bytes for each row.
        chunk: gives the bytes that the byte of logits stands for (`chunk_size`); None where all are counted.
    """

    stretches: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    chunk: Callable[[float, float | None], int] | None = None

    @classmethod
    def of(cls, rows: int, some: Sequence[NDArray[np.int64]], more: Sequence[NDArray[np.int64]]) -> "Need":
        """Make it of what the same operations leave alive with so many rows, and with one more.

        Raises:
            ModelError: they are not the same operations.
        """
        if [a_TP.shape for a_TP in some] != [b_TP.shape for b_TP in more]:
            raise ModelError("Plan: the model's code does something else with one row more; measure it on the card.")
        return cls(tuple((a_TP - rows * (b_TP - a_TP), b_TP - a_TP) for a_TP, b_TP in zip(some, more, strict=True)))

    def shared(self, gpus: int, whole: int) -> "Need":
        """Return what one of several cards needs, that share what stays and gather so many bytes of it at a time."""
        stretches = []
        for none_TP, each_TP in self.stretches:
            shared_TP = none_TP.copy()
            shared_TP[:, : len(STAYING)] //= gpus
            shared_TP[:, 0] += whole
            stretches.append((shared_TP, each_TP))
        return evolve(self, stretches=tuple(stretches))

    def gigabytes(self, rows: float) -> dict[str, float]:
        """Return 10^9 bytes of each part when most are alive."""
        bytes_TP = max(self._filled(rows), key=lambda of: of.sum(axis=1).max())
        most_P = bytes_TP[bytes_TP.sum(axis=1).argmax()] / _GIGA
        # what takes the place of something that was there, such as keys and values with one more token, is still that
        found = {**dict(zip(PARTS, most_P, strict=True)), **dict(zip(STAYING, bytes_TP[0] / _GIGA, strict=False))}
        found["activations"] += float(most_P.sum()) - sum(found.values())
        return {part: float(size) for part, size in found.items() if size > 0}

    def _filled(self, rows: float, *, least: bool = False) -> list[NDArray[Any]]:
        """Return (T, P) bytes of each stretch with so many rows, the chunk in the place of its byte."""
        filled = [none_TP + rows * each_TP for none_TP, each_TP in self.stretches]
        for bytes_TP in filled:
            here_T = bytes_TP[:, _LOGITS] > 0
            if self.chunk is not None and here_T.any():
                bytes_TP[here_T, _LOGITS] = self.chunk(rows, None if least else float(bytes_TP[here_T].sum(axis=1).max()))
        return filled

    def most_rows(self, room_gb: float, parts: int = 1) -> int:
        """Return the largest number of rows for which there is room, and for a chunk that is not too small; 0 where one has no room.

        Args:
            room_gb: 10^9 bytes.
            parts: count parts of rows, of which each has so many.
        """
        most = np.inf
        for none_TP, each_TP in self.stretches:
            free_T, each_T = room_gb * _GIGA - none_TP.sum(axis=1), each_TP.sum(axis=1)
            grows_T = each_T > 0
            most = min(most, float((free_T[grows_T] / each_T[grows_T]).min()), 0 if (free_T < 0).any() else np.inf)

        def too_much(count: int) -> bool:
            return any((bytes_TP.sum(axis=1) > room_gb * _GIGA).any() for bytes_TP in self._filled(count / parts, least=True))

        return max(bisect_left(range(max(int(most * parts), 0) + 1), True, key=too_much) - 1, 0)
