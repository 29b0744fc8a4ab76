"""Stores, sources, scorers and students of one's own, in runs of the verbs: what keeps the contract is taken, and other answers are a sentence."""

from collections.abc import Sequence

import pytest
from table_engines import TableScorer, TableSource

from lopd import MemoryStore, Prompt, SamplingParams, collect_rollouts, label_rollouts, score_rollouts
from lopd.errors import MissingScoresError
from lopd.records import Rows

SOURCE = TableSource(SamplingParams(max_new_tokens=4, samples_per_prompt=2))
PROMPTS = [Prompt(f"p{i}", [4 + i, 9]) for i in range(3)]


class LooksFirst(MemoryStore):
    """It refuses a column that is not there, whatever rows it is asked for."""

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Rows:
        if not set(columns) <= set(self.columns):
            raise MissingScoresError(f"Store: columns {sorted(columns)} are not all there.")
        return super().read(indices, columns, top_k)


def test_a_store_that_looks_for_the_column_before_the_rows_is_scored_and_labelled() -> None:
    store = LooksFirst(SOURCE.manifest)
    collect_rollouts(SOURCE, PROMPTS, store)
    assert score_rollouts(store, TableScorer(), column="again").rollouts == 6
    assert label_rollouts(store, lambda *_: 1.0, PROMPTS).rollouts == 6
