"""Rows of LanceDB tables -> rollouts and scores, each verified by its checksums."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lopd.backends.id_index import decode_id, hash_ids
from lopd.backends.lance.encode import (
    ID,
    LINE_CHECKSUM,
    ROLLOUT_DATA,
    SCORE_DATA,
    TOP_K_DATA,
    checksum,
    line_checksums,
)
from lopd.errors import CorruptStoreError, LopdError
from lopd.records.arrays import Float32Array, read_only
from lopd.records.rollouts import Rollout, TopK


@contextmanager
def decoding(owner: str) -> Iterator[None]:
    """Damage that Lance did not notice may leave values that no array can be made of."""
    try:
        yield
    except LopdError:
        raise
    except (ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise damaged(owner, "a row", f"values cannot be decoded ({error}), expected those that were written") from error


def read_lines(owner: str, table: Any, line: np.dtype[Any]) -> NDArray[np.void]:
    """The lines of an Arrow table that has `line_columns`.

    Raises:
        CorruptStoreError: one is not what was written; it names the rollout, or its row.
    """
    lines = np.zeros(len(table), line)
    with decoding(owner):
        for name in line.names or ():
            lines[name] = hash_ids(_cells(table, ID)) if name == "id_hash" else _numbers(owner, table, name, line[name])
        found, wanted = line_checksums(lines), _numbers(owner, table, LINE_CHECKSUM, np.dtype("<u8"))
    for i in np.flatnonzero(found != wanted)[:1]:
        raise damaged(owner, _name_of(table, int(i), lines), f"checksum of its line is {found[i]:016x}, expected {wanted[i]:016x}")
    return lines


def _name_of(table: Any, i: int, lines: NDArray[np.void]) -> str:
    return (
        f"rollout {_cells(table, ID)[i].decode(errors='backslashreplace')!r}"
        if ID in table.column_names
        else f"scores of row {lines['row'][i]}"
    )


def damaged(owner: str, name: str, what: str) -> CorruptStoreError:
    """The error for stored values that are not those that were written."""
    return CorruptStoreError(f"{owner}: {name}: the {what}; restore the store from a backup.")


def _numbers(owner: str, table: Any, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    column = table.column(name).chunk(0)
    if column.null_count:
        raise damaged(owner, f"column {name!r}", f"number of empty cells is {column.null_count}, expected 0")
    if dtype.kind == "V":
        return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _cells(table: Any, name: str) -> list[Any]:
    return list(table.column(name).to_pylist())


class _Lists(NamedTuple):
    """A column of lists: all values end to end, where each list ends and the next begins, and which are there."""

    values: NDArray[Any]
    ends: list[int]
    there: list[bool]

    @classmethod
    def of(cls, table: Any, name: str) -> "_Lists":
        column = table.column(name).chunk(0)
        return cls(column.values.to_numpy(), column.offsets.to_numpy().tolist(), column.is_valid().to_pylist())

    def converted(self, dtype: Any) -> "_Lists":
        return self._replace(values=read_only(self.values.astype(dtype, copy=False)))

    def get(self, i: int) -> NDArray[Any] | None:
        return self.values[self.ends[i] : self.ends[i + 1]] if self.there[i] else None

    def all(self) -> list[NDArray[Any]]:
        return [self.values[start:end] for start, end in pairwise(self.ends)]


def decode_rollouts(owner: str, table: Any, lines: NDArray[np.void]) -> list[Rollout]:
    """The rollouts of an Arrow table that has their ids and values, in its order; `lines` are theirs.

    Raises:
        CorruptStoreError: one is not what was written; it names the rollout.
    """
    with decoding(owner):
        return _decode_rollouts(owner, table, lines)


def _decode_rollouts(owner: str, table: Any, lines: NDArray[np.void]) -> list[Rollout]:
    stored_ids, reasons = _cells(table, ID), _cells(table, "finish_reason")
    for i in np.flatnonzero(hash_ids(stored_ids) != lines["id_hash"])[:1]:
        raise damaged(owner, f"rollout {stored_ids[i].decode(errors='backslashreplace')!r}", f"id is not the one of row {lines['row'][i]}")
    ids = [decode_id(data) for data in stored_ids]
    stored = tokens, masks, behaviors = [_Lists.of(table, name) for name in ROLLOUT_DATA[1:]]
    for i, wanted in enumerate(lines["data_checksum"].tolist()):
        if checksum(reasons[i].encode(), *(column.get(i) for column in stored)) != wanted:
            raise damaged(owner, f"rollout {ids[i]!r}", "checksum of its tokens is another than the one that was written")
    token_ids, masks, behaviors = tokens.converted(np.int32).all(), masks.converted(np.bool_), behaviors.converted(np.float32)
    prompts, responses = lines["prompt_length"].tolist(), lines["response_length"].tolist()
    all_count = read_only(np.ones(max(responses), np.bool_))
    return [
        Rollout.from_store(
            rollout_id=ids[i],
            prompt_ids=token_ids[i][: prompts[i]],
            response_ids=token_ids[i][prompts[i] :],
            loss_mask=all_count[: responses[i]] if (mask := masks.get(i)) is None else mask,
            finish_reason=reasons[i],
            behavior_logprobs=behaviors.get(i),
            generation=generation,
            content_hash=content_hash,
        )
        for i, (generation, content_hash) in enumerate(zip(lines["generation"].tolist(), lines["content_hash"].tolist(), strict=True))
    ]


def decode_scores(owner: str, table: Any, lines: NDArray[np.void]) -> list[Float32Array]:
    """The log-probs of an Arrow table, in its order; `lines` are theirs.

    Raises:
        CorruptStoreError: one is not what was written; it names the row.
    """
    with decoding(owner):
        logprobs = _Lists.of(table, SCORE_DATA[0])
        _check_data(owner, lines, "data_checksum", [(values,) for values in logprobs.all()])
        return logprobs.converted(np.float32).all()


def decode_top_k(owner: str, table: Any, lines: NDArray[np.void], k: int) -> list[TopK]:
    """The top-k supports of the same table."""
    with decoding(owner):
        stored = list(zip(*(_Lists.of(table, name).all() for name in TOP_K_DATA), strict=True))
        _check_data(owner, lines, "top_k_checksum", stored)
        return [TopK.from_store(ids.reshape(-1, k), logprobs.reshape(-1, k), tail) for ids, logprobs, tail in stored]


def _check_data(owner: str, lines: NDArray[np.void], name: str, stored: Sequence[Sequence[Any]]) -> None:
    for row, wanted, parts in zip(lines["row"].tolist(), lines[name].tolist(), stored, strict=True):
        if checksum(*parts) != wanted:
            raise damaged(owner, f"scores of row {row}", f"{name} of its log-probs is another than the one that was written")
