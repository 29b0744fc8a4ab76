"""Stores, sources, scorers and students of one's own, in runs of the verbs: what keeps the contract is taken, and other answers are a sentence."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attrs import frozen
from table_engines import TableScorer, TableSource

from lopd import (
    MemoryStore,
    Prompt,
    ReferenceOPDLoss,
    SamplingParams,
    collect_rollouts,
    evaluate,
    evaluate_reverse_kl,
    label_rollouts,
    opd_steps,
    score_rollouts,
)
from lopd.errors import ArgumentError, MissingScoresError, ScorerError, SourceError
from lopd.records import Rows
from lopd.verbs import Preflight

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


@frozen
class Wrong:
    """A source, or a scorer, whose answers are made something else."""

    right: Any
    change: Any

    @property
    def manifest(self) -> Any:
        return self.right.manifest

    @property
    def provenance(self) -> Any:
        return self.right.provenance

    def sample(self, prompts: Sequence[Any], /) -> Any:
        return self.change(self.right.sample(prompts))

    def score(self, rollouts: Sequence[Any], /) -> Any:
        return self.change(self.right.score(rollouts))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: None, "it gave None, expected Rollouts"),
        (lambda found: [found[:2], found[2:]], "it gave a list, expected Rollouts"),
        (lambda found: found[0], "it gave a Rollout, expected Rollouts"),
        (lambda found: [found[1], found[0], *found[2:]], "rollout 0 of 6 is 'p0/s1/g0', expected 'p0/s0/g0'"),
    ],
)
def test_what_a_source_gives_in_place_of_its_rollouts_is_named(change: Any, said: str) -> None:
    wrong, store = Wrong(SOURCE, change), MemoryStore(SOURCE.manifest)
    for ask in (
        lambda: collect_rollouts(wrong, PROMPTS, store),
        lambda: evaluate(wrong, PROMPTS, lambda *_: 1.0),
        lambda: evaluate_reverse_kl(wrong, TableScorer(), PROMPTS),
    ):
        with pytest.raises(SourceError, match=rf"^Source: {said}; `sample` gives .*, in order, in one flat list\.$"):
            ask()
    assert len(store) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: None, "it gave None, expected Scores"),
        (lambda found: [score.logprobs for score in found], "it gave an ndarray, expected Scores"),
        (lambda found: found[::-1], r"score 0 of \d is of '.*', expected '.*'"),
        (lambda found: [found[0], found[0], *found[2:]], r"score 1 of \d is of '(.*)', expected '(?!\1').*'"),
        (lambda found: found[:-1], r"score (\d) of \1 is of None, expected '.*'"),
        (lambda found: [*found, found[-1]], r"score 6 of 7 is of '.*', expected None"),
    ],
)
@pytest.mark.parametrize("preflight", [None, Preflight()])
def test_what_a_scorer_gives_in_place_of_its_scores_is_named(change: Any, said: str, preflight: Preflight | None) -> None:
    wrong, store = Wrong(TableScorer(), change), MemoryStore(SOURCE.manifest)
    collect_rollouts(SOURCE, PROMPTS, store)
    for ask in (
        lambda: score_rollouts(store, wrong, column="again", preflight=preflight),
        lambda: evaluate_reverse_kl(SOURCE, wrong, PROMPTS),
    ):
        with pytest.raises(ScorerError, match=rf"^Scorer: {said}; `score` gives one for each rollout, in order, made with `Scores\.of"):
            ask()
    assert not store.scored("again").any()


def test_a_student_whose_tokenizer_is_no_fingerprint_is_refused_before_a_step(tokenizer: Any) -> None:
    class Careless(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.tokenizer = tokenizer

    student, kind = Careless(), type(tokenizer).__name__
    with pytest.raises(ArgumentError, match=rf"^Student's tokenizer: it is a {kind}, which .*`lopd\.records\.fingerprint_tokenizer"):
        opd_steps(student, [], ReferenceOPDLoss(), torch.optim.SGD(student.parameters(), 0.1))
