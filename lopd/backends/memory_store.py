"""A store that forgets: for online OPD, where rollouts live one step, and for tests."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

import numpy as np
from numpy.typing import NDArray

from lopd.backends import admission
from lopd.protocols.reading import describe
from lopd.records.checks import several
from lopd.records.glance import Glance, Glanced
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import VIRTUAL_COLUMNS, Rollout, Scores
from lopd.records.rows import Rows


@final
class MemoryStore(Glanced):
    """A `LogprobStore` in lists and dicts: nothing is copied, and nothing outlives the process.

    The virtual columns `behavior` and `behavior/sampler` read the rollouts' own log-probs; `columns` does not list them, and they cannot be
    written to.
    """

    name = "MemoryStore"

    def __init__(self, manifest: Manifest) -> None:
        admission.check_manifest("MemoryStore", manifest)
        self._manifest = manifest
        self._rollouts: list[Rollout] = []
        self._rows: dict[str, int] = {}
        self._lengths = np.zeros((0, 2), np.int64)
        self._columns: dict[str, Provenance] = {}
        self._scores: dict[str, dict[int, Scores]] = {}
        self._quarantined: dict[str, dict[int, str]] = {}
        self._generations = {manifest.generation: manifest.policy}

    def _glance(self) -> Glance:
        return describe(self, {column: len(scores) for column, scores in self._scores.items()})

    def __bool__(self) -> bool:
        """Return True, also while it is empty: `if store` asks whether there is a store."""
        return True

    @property
    def manifest(self) -> Manifest:
        """What all rollouts have in common."""
        return self._manifest

    @property
    def columns(self) -> Mapping[str, Provenance]:
        """Score columns and who computed them."""
        return MappingProxyType(dict(self._columns))

    def __len__(self) -> int:
        return len(self._rollouts)

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Rounds of sampling, and the policy of each."""
        return MappingProxyType(dict(self._generations))

    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]:
        """Return rows of rollouts, -1 for one that is not there."""
        return np.array([self._rows.get(rollout_id, -1) for rollout_id in several("Rollout ids", rollout_ids)], np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Return (len, 2): prompt and response tokens of each rollout."""
        new = [(rollout.prompt_ids.size, rollout.response_ids.size) for rollout in self._rollouts[len(self._lengths) :]]
        self._lengths = np.concatenate([self._lengths, np.array(new, np.int64).reshape(-1, 2)]) if new else self._lengths
        return self._lengths

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """Return (len,): which rollouts have scores in this column."""
        if column in VIRTUAL_COLUMNS:
            return np.array([getattr(rollout, VIRTUAL_COLUMNS[column]) is not None for rollout in self._rollouts], np.bool_)
        mask = np.zeros(len(self), np.bool_)
        mask[list(self._scores.get(column, ()))] = True
        return mask

    def quarantined(self, column: str, /) -> Mapping[int, str]:
        """Return rows that the column's model could not score, and why."""
        done = self._scores.get(column, {})
        return {row: reason for row, reason in sorted(self._quarantined.get(column, {}).items()) if row not in done}

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Rows:
        """Return these rollouts with these columns, in the order asked."""
        rows = admission.check_rows("MemoryStore", indices, len(self)).tolist()
        columns, top_k, names = admission.check_asked("MemoryStore", columns, top_k, self._columns)
        scores = {name: self._scores_of(rows, name) for name in names}
        read = Rows.joined(
            [self._rollouts[row] for row in rows],
            {name: [score.logprobs for score in found] for name, found in scores.items()},
            {name: [score.top_k for score in scores[name] if score.top_k is not None] for name in top_k if rows},
        )
        return admission.with_columns("MemoryStore", read, columns, self._columns)

    def _scores_of(self, rows: Sequence[int], column: str) -> list[Scores]:
        there = self._scores.get(column, {})
        for row in rows:
            if row not in there:
                raise admission.missing_scores("MemoryStore", self._rollouts[row].rollout_id, column)
        return [there[row] for row in rows]

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        """Say which policy samples in another round."""
        admission.check_generation("MemoryStore", generation, self._generations.get(generation), policy)
        self._generations[generation] = policy

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts; those already there are skipped."""
        rollouts = admission.listed("MemoryStore", rollouts, Rollout)
        known = {r.rollout_id: self._rollouts[self._rows[r.rollout_id]].content_hash for r in rollouts if r.rollout_id in self._rows}
        vocab_size = self._manifest.tokenizer.vocab_size
        for rollout in admission.new_rollouts("MemoryStore", rollouts, vocab_size=vocab_size, generations=self._generations, known=known):
            self._rows[rollout.rollout_id] = len(self._rollouts)
            self._rollouts.append(rollout)

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores; rows already scored are skipped."""
        scores = admission.listed("MemoryStore", scores, Scores)
        admission.check_provenance("MemoryStore", column, self._columns, provenance)
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
        admission.check_provenance("MemoryStore", column, self._columns, provenance)
        rows, known = self.find(list(reasons)).tolist(), self.quarantined(column)
        new = admission.new_quarantine(
            "MemoryStore", reasons, rows=rows, done=set(np.flatnonzero(self.scored(column)).tolist()), known=known
        )
        if new:
            self._columns.setdefault(column, provenance)
            self._quarantined.setdefault(column, {}).update(new)
