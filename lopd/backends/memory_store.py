"""A store that forgets: for online OPD, where rollouts live one step, and for tests."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.records.arrays import Float32Array
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, Rollout, ScoredRollout, Scores, TopK


@final
class MemoryStore:
    """A `LogprobStore` in lists and dicts: nothing is copied, and nothing outlives the process.

    The virtual column `behavior` reads the rollouts' own `behavior_logprobs`; `columns` does not list it, and it cannot be written to.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Empty."""
        admission.check_manifest("MemoryStore", manifest)
        self._manifest = manifest
        self._rollouts: list[Rollout] = []
        self._rows: dict[str, int] = {}
        self._columns: dict[str, Provenance] = {}
        self._scores: dict[str, dict[int, Scores]] = {}
        self._quarantined: dict[str, dict[int, str]] = {}
        self._generations = {manifest.generation: manifest.policy}

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

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Rounds of sampling, and the policy of each."""
        return MappingProxyType(dict(self._generations))

    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]:
        """Rows of rollouts, -1 where there is none."""
        return np.array([self._rows.get(rollout_id, -1) for rollout_id in rollout_ids], np.int64)

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

    def quarantined(self, column: str, /) -> Mapping[int, str]:
        """Rows that the column's model could not score, and why."""
        done = self._scores.get(column, {})
        return {row: reason for row, reason in sorted(self._quarantined.get(column, {}).items()) if row not in done}

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> list[ScoredRollout]:
        """These rollouts with these columns, in the order asked."""
        return [self._read_row(row, columns, top_k) for row in admission.check_rows("MemoryStore", indices, len(self))]

    def _read_row(self, row: int, columns: Sequence[str], top_k: Sequence[str]) -> ScoredRollout:
        rollout = self._rollouts[row]
        logprobs = {column: self._logprobs(row, rollout, column) for column in columns}
        return ScoredRollout(rollout, logprobs, {column: self._top_k(row, rollout, column) for column in top_k})

    def _logprobs(self, row: int, rollout: Rollout, column: str) -> Float32Array:
        if column != BEHAVIOR_COLUMN:
            return self._score(row, rollout, column).logprobs
        if rollout.behavior_logprobs is None:
            raise admission.missing_scores("MemoryStore", rollout.rollout_id, column)
        return rollout.behavior_logprobs

    def _top_k(self, row: int, rollout: Rollout, column: str) -> TopK:
        if column == BEHAVIOR_COLUMN or (found := self._score(row, rollout, column).top_k) is None:
            raise admission.missing_top_k("MemoryStore", column)
        return found

    def _score(self, row: int, rollout: Rollout, column: str) -> Scores:
        found = self._scores.get(column, {}).get(row)
        if found is None:
            raise admission.missing_scores("MemoryStore", rollout.rollout_id, column)
        return found

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        """Say which policy samples in another round."""
        admission.check_generation("MemoryStore", generation, self._generations.get(generation), policy)
        self._generations[generation] = policy

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts; those already there are skipped."""
        known = {r.rollout_id: self._rollouts[self._rows[r.rollout_id]].content_hash for r in rollouts if r.rollout_id in self._rows}
        vocab_size = self._manifest.tokenizer.vocab_size
        for rollout in admission.new_rollouts("MemoryStore", rollouts, vocab_size=vocab_size, generations=self._generations, known=known):
            self._rows[rollout.rollout_id] = len(self._rollouts)
            self._rollouts.append(rollout)

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores; rows already scored are skipped."""
        admission.check_column("MemoryStore", column)
        admission.check_provenance("MemoryStore", column, self._columns.get(column), provenance)
        there = {s.rollout_id: self._rollouts[self._rows[s.rollout_id]] for s in scores if s.rollout_id in self._rows}
        new = admission.new_scores(
            "MemoryStore",
            scores,
            provenance=provenance,
            vocab_size=self._manifest.tokenizer.vocab_size,
            known={name: (rollout.content_hash, rollout.response_ids.size) for name, rollout in there.items()},
            done={name for name in there if self._rows[name] in self._scores.get(column, {})},
        )
        if new:
            self._columns.setdefault(column, provenance)
            self._scores.setdefault(column, {}).update({self._rows[score.rollout_id]: score for score in new})

    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        """Say which rollouts this model cannot score, and why."""
        admission.check_column("MemoryStore", column)
        admission.check_provenance("MemoryStore", column, self._columns.get(column), provenance)
        rows, known = self.find(list(reasons)).tolist(), self.quarantined(column)
        new = admission.new_quarantine("MemoryStore", reasons, rows=rows, scored=self.scored(column), known=known)
        if new:
            self._columns.setdefault(column, provenance)
            self._quarantined.setdefault(column, {}).update(new)
