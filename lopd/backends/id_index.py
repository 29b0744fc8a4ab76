"""Rollout ids -> rows, in 24 bytes a rollout."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from lopd.backends.files import Piece
from lopd.errors import ArgumentError
from lopd.records.checks import a_kind, several

#: Type of a hashed id: 128 bits, which two ids never share in practice.
ID_HASH = np.dtype("V16")
_Block = tuple[NDArray[np.uint64], NDArray[np.int64]]
# What is made of names on the way is some hundred bytes a name.
_NAMES_AT_ONCE = 1 << 16


def encode_ids(rollout_ids: Sequence[str]) -> list[bytes]:
    """Return UTF-8; lone surrogates, which JSON can carry, survive.

    Raises:
        ArgumentError: one is not text.
    """
    try:
        return [str.encode(rollout_id, "utf-8", "surrogatepass") for rollout_id in rollout_ids]
    except TypeError as error:
        wrong = next(one for one in rollout_ids if not isinstance(one, str))
        raise ArgumentError(f"Rollout id: it is {a_kind(wrong)}, expected text; pass a str.") from error


def decode_id(data: bytes) -> str:
    """Return the inverse of `encode_ids`, for one."""
    return data.decode("utf-8", "surrogatepass")


def hash_ids(ids: Sequence[Piece]) -> NDArray[np.void]:
    """Return (n,): the hash of each encoded id."""
    return np.frombuffer(b"".join(map(xxh3_128_digest, ids)), ID_HASH)


@final
class IdIndex:
    """Sorted blocks of hashed ids.  Each block is larger than the next, so that adding one by one stays cheap, and there are few."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def add(self, id_hashes: NDArray[np.void], first_row: int) -> None:
        """Add the (n,) hashes of the ids of n more rows."""
        blocks, block = [*self._blocks], (_halves(id_hashes), np.arange(first_row, first_row + len(id_hashes)))
        while blocks and len(blocks[-1][1]) <= len(block[1]):
            older = blocks.pop()
            block = np.concatenate([older[0], block[0]]), np.concatenate([older[1], block[1]])
        order = np.argsort(block[0][:, 0], kind="stable")
        # all at once: what an interrupt took out on the way would not be added again
        self._blocks = [*blocks, (block[0][order], block[1][order])]

    def find(self, rollout_ids: Sequence[str]) -> NDArray[np.int64]:
        """Return (n,): the row of each id, -1 where it is not known."""
        names = several("Rollout ids", rollout_ids)
        parts = [self._rows(names[first : first + _NAMES_AT_ONCE]) for first in range(0, len(names), _NAMES_AT_ONCE)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _rows(self, names: Sequence[str]) -> NDArray[np.int64]:
        hashes = _halves(hash_ids(encode_ids(names)))
        rows = np.full(len(hashes), -1, np.int64)
        for known, places in self._blocks:
            at = np.searchsorted(known[:, 0], hashes[:, 0])
            looking = np.arange(len(hashes))
            # Nearly always one round: more only where two ids share the first half of their hash.
            while looking.size:
                looking = looking[at[looking] < len(known)]
                looking = looking[known[at[looking], 0] == hashes[looking, 0]]
                hit = known[at[looking], 1] == hashes[looking, 1]
                rows[looking[hit]] = places[at[looking[hit]]]
                looking = looking[~hit]
                at[looking] += 1
        return rows


def _halves(id_hashes: NDArray[np.void]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(id_hashes).view("<u8").reshape(-1, 2)
