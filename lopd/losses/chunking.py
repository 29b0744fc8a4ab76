"""How a fused path spends memory and precision: rows of a chunk, and the dtype of what is multiplied."""

import torch
from attrs import frozen
from torch import Tensor

from lopd.losses.products import multiplies
from lopd.records.checks import check_number, own_numbers
from lopd.records.steps import LMHead

#: Enough rows of a large vocabulary to keep the matrix products of a CPU busy (240 of 151,936 entries).
CHUNK_BYTES = 144 << 20
_LEAST_ROWS = 16
#: A GPU multiplies this many rows at nearly its best rate; twice as many gain a few per cent.
GPU_ROWS = 2048


@frozen
class Chunking:
    """How a fused path spends memory and precision; what it computes stays the same.

    Args:
        chunk_bytes: for the buffer of logits; at least 16 rows are taken whatever their size.  None is 144 MiB.  On CUDA it is what 4,096 rows of
            logits need where that is at most a quarter of the memory that is free, or else 2,048 rows, 1,024 and so on in half of it.  Another
            size of chunk adds the same terms in another order, so give a number where two runs on CUDA must agree in every bit.
        matmul_dtype: to which the operands of the three matrix products are rounded: hidden states, weight, and gradients by the logits.  Logits,
            statistics and sums are float32 in any case, or float64 where hidden states, weight or this are.  torch.float32 is exact.  None is
            the dtype that the student computes in (`LMHead.compute_dtype`) where that is bfloat16 and the device adds its products in float32,
            as CUDA does from torch 2.10 on; it is exact everywhere else, so on every CPU.

    Raises:
        InvalidRecordError: less than a byte, or a dtype of no use.
    """

    chunk_bytes: int | None = None
    matmul_dtype: torch.dtype | None = None

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Chunking", chunk_bytes=1)
        # float16 cannot hold the small gradients by the logits
        fits = self.matmul_dtype in (None, torch.float32, torch.float64, torch.bfloat16)
        check_number("Chunking", "matmul_dtype", self.matmul_dtype, fits, "None, torch.float32, torch.float64 or torch.bfloat16")


DEFAULT_CHUNKING = Chunking()


def sum_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return what statistics and sums are kept in: float64 if one of the tensors is, float32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def dtypes_of(chunking: Chunking, hidden_MD: Tensor, head: LMHead) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the operands of products, and that of logits, statistics and sums."""
    sums = sum_dtype(hidden_MD, head.weight)
    if chunking.matmul_dtype is not None:
        return chunking.matmul_dtype, torch.promote_types(sums, chunking.matmul_dtype)
    computes = head.compute_dtype or head.weight.dtype
    narrow = computes == torch.bfloat16 and sums == torch.float32 and multiplies(hidden_MD.device, computes, sums)
    return computes if narrow else sums, sums


def chunk_rows(chunking: Chunking, count: int, row_bytes: int, device: torch.device) -> int:
    """Return the rows of equal chunks of so many rows, a multiple of 16 where there are more."""
    chunk_bytes = chunking.chunk_bytes
    if chunk_bytes is None:
        chunk_bytes = card_chunk_bytes(row_bytes, free_bytes(device)) if device.type == "cuda" else CHUNK_BYTES
    fitting = max(chunk_bytes // row_bytes // _LEAST_ROWS * _LEAST_ROWS, _LEAST_ROWS)
    chunks = max(-(-count // fitting), 1)
    return max(min(-(-count // (chunks * _LEAST_ROWS)) * _LEAST_ROWS, count), 1)


def card_chunk_bytes(row_bytes: int, free: float) -> int:
    """Return the bytes of a chunk on CUDA where so many are free (`Chunking.chunk_bytes`)."""
    rows = GPU_ROWS
    if 4 * 2 * rows * row_bytes <= free:
        return 2 * rows * row_bytes
    # powers of two, so that the size seldom depends on what else is in memory
    while rows > _LEAST_ROWS and 2 * rows * row_bytes > free:
        rows //= 2
    return rows * row_bytes


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that nothing uses: what the driver has left, and what torch keeps for itself; nothing waits for it."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
