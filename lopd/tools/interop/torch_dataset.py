"""A store as a map-style torch dataset, for training loops that are not ours."""

from collections.abc import Sequence
from typing import final

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lopd.backends.admission import check_rows
from lopd.errors import MissingScoresError
from lopd.protocols import LogprobReader
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import chosen, named, way_to
from lopd.records.checks import several
from lopd.records.rollouts import ScoredRollout
from lopd.records.rows import Rows


def _names(columns: Sequence[str]) -> tuple[str, ...]:
    return several("TorchDataset", columns)


@final
@frozen(eq=False)
class TorchDataset(Dataset[ScoredRollout]):
    """One `ScoredRollout` for each rollout, in the order of the rows: what `lopd.collate` makes a `Batch` of, or your own `collate_fn` anything else.

    Arrays are numpy's: a tensor for each would cost a worker of a `DataLoader` one open file each.  A batch is fetched in one read.  It pickles
    if the reader does.

    >>> from functools import partial
    >>> import torch
    >>> from lopd import MemoryStore, collate
    >>> from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
    >>> store = MemoryStore(tiny_manifest())
    >>> store.append([tiny_rollout("r0", [5, 6, 1])])
    >>> store.append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("r0", [5, 6, 1]))])
    >>> dataset = TorchDataset(store, ["teacher"])
    >>> dataset[0].rollout.response_ids, dataset[0].scores["teacher"]
    (array([5, 6, 1], dtype=int32), array([-1., -1., -1.], dtype=float32))
    >>> (batch,) = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=partial(collate, teacher="teacher"))
    >>> batch.teacher_logprobs
    tensor([-1., -1., -1.])

    Args:
        reader: any store.
        columns: whose log-probs come along; `behavior` is one, and `behavior/sampler`.
        top_k: columns whose top-k support comes along.
        rows: row numbers of the store, ascending and each once; all of them if None.

    Raises:
        ArgumentError: the reader is something else than a store, or `columns` or `top_k` is one text in place of several.
        MissingScoresError: a column is not there, not complete in these rows, or keeps no top-k support.
        NoSuchRowError: a row is not in the store.
        InvalidRecordError: there are no rows, or they are not whole numbers; a mask of rows is not.
    """

    reader: LogprobReader
    columns: Sequence[str] = field(default=(), converter=_names)
    top_k: Sequence[str] = field(default=(), converter=_names)
    rows: NDArray[np.int64] | None = None

    def __attrs_post_init__(self) -> None:
        check_noun(self.reader, LogprobReader)
        if self.rows is not None:
            object.__setattr__(self, "rows", chosen(self.reader, self.rows))
        rows = np.arange(len(self.reader)) if self.rows is None else self.rows
        for column in (*self.columns, *self.top_k):
            done = int(self.reader.scored(column)[rows].sum())
            if done < rows.size:
                aside, remedy = len(self.reader.quarantined(column).keys() & {*rows.tolist()}), way_to(self.reader, column)
                if done + aside == rows.size:
                    remedy = f"leave them out by `rows=np.flatnonzero(store.scored({column!r}))`"
                raise MissingScoresError(
                    f"{named(self.reader)}: column {column!r} has scores for {done} rollouts, expected {rows.size}"
                    f"{f' ({aside} in quarantine)' * bool(aside)}; {remedy}."
                )
        for column in self.top_k:
            if column not in self.reader.columns or not self.reader.columns[column].top_k:
                raise MissingScoresError(
                    f"{named(self.reader)}: column {column!r} has no top-k support; score with a scorer that keeps a top_k."
                )

    def __len__(self) -> int:
        return len(self.reader if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> ScoredRollout:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """Return several rollouts, in the order asked: what a `DataLoader` asks for."""
        if self.rows is not None:
            indices = self.rows[check_rows("TorchDataset", indices, len(self))].tolist()
        return self.reader.read(indices, columns=self.columns, top_k=self.top_k)
