"""A store as a map-style torch dataset, for training loops that are not ours."""

from collections.abc import Sequence
from typing import Any, final

from attrs import asdict, field, frozen
from torch.utils.data import Dataset

from lopd.errors import MissingScoresError
from lopd.protocols import LogprobReader
from lopd.types import ScoredRollout


@final
@frozen(eq=False)
class TorchDataset(Dataset[dict[str, Any]]):
    """One dict for each rollout, in the order of the rows.

    Its keys are `rollout_id`, `generation`, `finish_reason`, `prompt_ids`, `response_ids` and `loss_mask`; `logprobs` and `top_k` hold a
    dict by column.  Arrays are numpy's, read-only: a tensor for each would cost a worker of a `DataLoader` one open file each.  Lengths
    differ, so a `DataLoader` needs a `collate_fn`.  A batch is fetched in one read.  It pickles if the reader does.

    >>> from lopd import MemoryStore
    >>> from lopd.testing import tiny_manifest, tiny_rollout
    >>> store = MemoryStore(tiny_manifest())
    >>> store.append([tiny_rollout("r0", [5, 6, 1])])
    >>> TorchDataset(store)[0]["response_ids"]
    array([5, 6, 1], dtype=int32)

    Args:
        reader: any store.
        columns: whose log-probs come along; `behavior` is one.
        top_k: columns whose top-k support comes along.

    Raises:
        MissingScoresError: a column is not there, not complete, or keeps no top-k support.
    """

    reader: LogprobReader
    columns: Sequence[str] = field(default=(), converter=tuple)
    top_k: Sequence[str] = field(default=(), converter=tuple)

    def __attrs_post_init__(self) -> None:
        for column in (*self.columns, *self.top_k):
            done = int(self.reader.scored(column).sum())
            if done < len(self.reader):
                raise MissingScoresError(
                    f"{self.reader!r}: column {column!r} has scores for {done} rollouts, expected {len(self.reader)}; "
                    f"run `score_rollouts(..., column={column!r})`."
                )
        for column in self.top_k:
            if column not in self.reader.columns or not self.reader.columns[column].top_k:
                raise MissingScoresError(
                    f"{self.reader!r}: column {column!r} has no top-k support, expected one; score with a scorer that keeps a top_k."
                )

    def __len__(self) -> int:
        """Committed rollouts."""
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One rollout."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rollouts, in the order asked: what a `DataLoader` asks for."""
        return [_to_dict(row) for row in self.reader.read(indices, columns=self.columns, top_k=self.top_k)]


def _to_dict(row: ScoredRollout) -> dict[str, Any]:
    names = ("rollout_id", "generation", "finish_reason", "prompt_ids", "response_ids", "loss_mask")
    support = {column: asdict(top_k, recurse=False) for column, top_k in row.top_k.items()}
    return {**{name: getattr(row.rollout, name) for name in names}, "logprobs": dict(row.scores), "top_k": support}
