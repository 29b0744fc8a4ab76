"""The columns of the lines of a segment: what each means, and which values it can have."""

from collections.abc import Mapping

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.records.rollouts import VIRTUAL_COLUMNS, FinishReason

REASONS: tuple[FinishReason, ...] = ("stop", "length")
ROLLOUT_FIELDS = (
    "prompt_length",
    "response_length",
    "token_start",
    "response_start",
    "id_start",
    "id_length",
    "finish_reason",
    "generation",
    "has_behavior",
    "masked",
    "id_hash_0",
    "id_hash_1",
    "content_hash_0",
    "content_hash_1",
    "token_checksum",
    "mask_checksum",
    "behavior_checksum",
    "line_checksum",
)
SCORE_FIELDS = (
    "row",
    "length",
    "start",
    "floored",
    "content_hash_0",
    "content_hash_1",
    "logprobs_checksum",
    "top_k_checksum",
    "line_checksum",
)
#: What an engine reported of a rollout.  Bits of `has_behavior`, from the lowest on, mark which of them there are, and `behavior_checksum` goes
#: over those: so a line without the second is what it was before there was one.
REPORTED = tuple(VIRTUAL_COLUMNS.values())
#: The arrays of a support, in the order in which its checksum goes over them.
TOP_K_ARRAYS = ("top_k_ids", "top_k_logprobs", "top_k_tail")
#: Column numbers of a rollout's line, and of a score's.
R = {name: i for i, name in enumerate(ROLLOUT_FIELDS)}
S = {name: i for i, name in enumerate(SCORE_FIELDS)}
#: What binds scores to a rollout, in its line and in theirs: the length of the response, and the content hash.
BOUND_BY = tuple(
    [fields[length], fields["content_hash_0"], fields["content_hash_1"]] for fields, length in ((R, "response_length"), (S, "length"))
)
LENGTHS = slice(R["prompt_length"], R["response_length"] + 1)
ID_HALVES = slice(R["id_hash_0"], R["id_hash_1"] + 1)

# The leading columns of a line are counts, codes or bits; sums of counts below 2^50 fit 64 bits.
_COUNT = (1 << 50) - 1


@frozen(eq=False)
class Limits:
    """What the lines of one segment can be.

    Args:
        never: (c,), the bits that each of the leading columns has never set; that of the sign is one of them.
        sums: (c, k), which columns add up to a place in an array.
        most: (k,), the size of that array.
        fields: number of columns.
    """

    never: NDArray[np.int64]
    sums: NDArray[np.int64]
    most: NDArray[np.int64]
    fields: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> "Limits":
        """Return those of a segment of rollouts, or of scores; `sizes` has how many values each of its arrays has along its first dimension."""
        parts: dict[tuple[str, ...], tuple[str, ...]]
        if "token_ids" not in sizes:
            parts = {("start", "length"): ("logprobs", *TOP_K_ARRAYS)}
            known, columns = [_COUNT] * 4, S
        else:
            bits = sum(1 << i for i, name in enumerate(REPORTED) if name in sizes)
            # the codes of two reasons are one bit
            known, columns = [*[_COUNT] * 6, len(REASONS) - 1, _COUNT, bits, int("loss_mask" in sizes)], R
            parts = {
                ("token_start", "prompt_length", "response_length"): ("token_ids",),
                ("id_start", "id_length"): ("rollout_ids",),
                ("response_start", "response_length"): ("loss_mask", *REPORTED),
            }
        sums = np.zeros((len(known), len(parts)), np.int64)
        for i, names in enumerate(parts):
            sums[[columns[name] for name in names], i] = 1
        most = [min((sizes[name] for name in arrays if name in sizes), default=4 * _COUNT) for arrays in parts.values()]
        return cls(~np.array(known, np.int64), sums, np.array(most), len(columns))

    def misfit(self, lines: NDArray[np.int64]) -> int | None:
        """Return the place of the first line that no writer makes: one that has a negative or unknown value, or points beyond an array."""
        if lines.shape[1] != self.fields:
            return 0 if len(lines) else None
        head = lines[:, : self.never.size]
        unknown, beyond = head & self.never, head @ self.sums > self.most
        if not (unknown.any() or beyond.any()):
            return None
        return int(np.argmax(unknown.any(axis=1) | beyond.any(axis=1)))
