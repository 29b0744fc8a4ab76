"""A store that forgets: for online OPD, where rollouts live one step, and for tests."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.manifest import Manifest, Provenance
from lopd.types import BEHAVIOR_COLUMN, Float32Array, Rollout, ScoredRollout, Scores


@final
class MemoryStore:
    """A `LogprobStore` in lists and dicts: nothing is copied, and nothing outlives the process.

    The virtual column `behavior` reads the rollouts' own `behavior_logprobs`; `columns` does not list it, and it cannot be written to.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Empty."""
        self._manifest = manifest
        self._rollouts: list[Rollout] = []
        self._rows: dict[str, int] = {}
        self._columns: dict[str, Provenance] = {}
        self._scores: dict[str, dict[int, Float32Array]] = {}

    def __repr__(self) -> str:
        """How messages name it."""
        return "MemoryStore"

    @property
    def manifest(self) -> Manifest:
        """What all rollouts have in common."""
        return self._manifest

    @property
    def columns(self) -> Mapping[str, Provenance]:
        """Score columns and who computed them."""
        return MappingProxyType(dict(self._columns))

    def __len__(self) -> int:
        """Rollouts that are there."""
        return len(self._rollouts)

    def __contains__(self, rollout_id: object, /) -> bool:
        """Whether a rollout with this id is there."""
        return rollout_id in self._rows

    def lengths(self) -> NDArray[np.int64]:
        """(len, 2): prompt and response tokens of each rollout."""
        pairs = [(rollout.prompt_ids.size, rollout.response_ids.size) for rollout in self._rollouts]
        return np.array(pairs, np.int64).reshape(-1, 2)

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """(len,): which rollouts have scores in this column."""
        if column == BEHAVIOR_COLUMN:
            return np.array([rollout.behavior_logprobs is not None for rollout in self._rollouts], np.bool_)
        mask = np.zeros(len(self), np.bool_)
        mask[list(self._scores.get(column, ()))] = True
        return mask

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = ()) -> list[ScoredRollout]:
        """These rollouts with these columns, in the order asked."""
        return [self._read_row(row, columns) for row in ragged.check_rows("MemoryStore", indices, len(self))]

    def _read_row(self, row: int, columns: Sequence[str]) -> ScoredRollout:
        rollout = self._rollouts[row]
        return ScoredRollout(rollout, {column: self._column(row, rollout, column) for column in columns})

    def _column(self, row: int, rollout: Rollout, column: str) -> Float32Array:
        found = rollout.behavior_logprobs if column == BEHAVIOR_COLUMN else self._scores.get(column, {}).get(row)
        if found is None:
            raise ragged.missing_scores("MemoryStore", rollout.rollout_id, column)
        return found

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts; those already there are skipped."""
        for rollout in ragged.new_rollouts("MemoryStore", rollouts, self._manifest.tokenizer.vocab_size, self._find_hash):
            self._rows[rollout.rollout_id] = len(self._rollouts)
            self._rollouts.append(rollout)

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores; rows already scored are skipped."""
        ragged.check_column("MemoryStore", column)
        ragged.check_provenance("MemoryStore", column, self._columns.get(column), provenance)
        done = self._scores.get(column, {})
        new = ragged.new_scores("MemoryStore", scores, self._find, lambda rollout_id: self._rows[rollout_id] in done)
        if new:
            self._columns[column] = provenance
            self._scores.setdefault(column, {}).update({self._rows[score.rollout_id]: score.logprobs for score in new})

    def _find(self, rollout_id: str) -> tuple[bytes, int] | None:
        row = self._rows.get(rollout_id)
        return None if row is None else (self._rollouts[row].content_hash, self._rollouts[row].response_ids.size)

    def _find_hash(self, rollout_id: str) -> bytes | None:
        found = self._find(rollout_id)
        return None if found is None else found[0]
