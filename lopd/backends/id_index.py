"""Rollout ids -> rows, in 24 bytes a rollout."""

from typing import final

import numpy as np
from numpy.typing import NDArray

_Block = tuple[NDArray[np.uint64], NDArray[np.int64]]


@final
class IdIndex:
    """Sorted blocks of hashed ids.  Each block is larger than the next, so that adding one by one stays cheap, and there are few."""

    def __init__(self) -> None:
        """Empty."""
        self._blocks: list[_Block] = []

    def add(self, hashes: NDArray[np.uint64], first_row: int) -> None:
        """(n, 2) hashes of the ids of n more rows."""
        block = hashes, np.arange(first_row, first_row + len(hashes))
        while self._blocks and len(self._blocks[-1][1]) <= len(block[1]):
            older = self._blocks.pop()
            block = np.concatenate([older[0], block[0]]), np.concatenate([older[1], block[1]])
        order = np.argsort(block[0][:, 0], kind="stable")
        self._blocks.append((block[0][order], block[1][order]))

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(n,): the row of each hash, -1 where it is not known."""
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
