"""The suites of sources and scorers against what is wrong on purpose."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from served_table import TOKENIZER as TABLE
from suite_cases import TABLE_CONTEXT, broken_clauses, clauses, filler, some_prompts, some_rollouts
from table_engines import (
    TABLE_VV,
    WORK,
    Change,
    TableScorer,
    TableSource,
    as_if_all_were_wrong,
    ids_modulo_the_vocabulary,
    ids_that_make_do,
    nameless,
    refuse_prompts,
    refuse_responses,
    refuse_rollouts,
    support_of,
    tempered,
    unchecked,
)
from vllm_stub import VOCAB

from lopd.engines.inputs import asked_ids
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records import Manifest, Prompt, Rollout, SamplingParams, Scores, TokenizerId, TopK
from lopd.testing import ScorerConformance, SourceConformance


class TableSourceSuite(SourceConformance):
    make_source: Callable[..., Any] = TableSource

    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        return type(self).make_source(sampling, generation)

    def prompts(self) -> Sequence[Prompt]:
        return some_prompts(VOCAB)

    def too_long(self) -> Prompt | None:
        return Prompt("filler", [2] * TABLE_CONTEXT)

    def scorer(self) -> TeacherScorer | None:
        return TableScorer()

    def work(self) -> int | None:
        return len(WORK)


class TableScorerSuite(ScorerConformance):
    make_scorer: Callable[[], Any] = TableScorer

    def make(self) -> TeacherScorer:
        return type(self).make_scorer()

    def tokenizer(self) -> TokenizerId:
        return TABLE

    def rollouts(self) -> Sequence[Rollout]:
        return some_rollouts(VOCAB)

    def too_long(self) -> Rollout | None:
        return filler(TABLE_CONTEXT + 1)

    def work(self) -> int | None:
        return len(WORK)


class TableTopKSuite(TableScorerSuite):
    make_scorer = staticmethod(lambda: TableScorer(3))


class TableCandidatesSuite(TableScorerSuite):
    make_scorer = staticmethod(lambda: TableScorer(3, candidates=4, drawn=2))


@pytest.mark.parametrize(
    ("suite", "lacks"),
    [
        (TableSourceSuite, ()),
        (TableScorerSuite, ("most_likely", "candidate")),
        (TableTopKSuite, ("candidate",)),
        (TableCandidatesSuite, ()),
    ],
)
def test_the_suites_accept_what_is_right(suite: type, lacks: tuple[str, ...]) -> None:
    left_out: list[str] = []
    assert broken_clauses(suite(), left_out) == []
    assert all(any(word in name for word in lacks) for name in left_out), "all that a suite can ask is asked here"


def resampled(source: TableSource, prompts: Sequence[Prompt], **fields: Any) -> list[Rollout]:
    """Return what a source with other settings would give, under the names of this one."""
    other = TableSource(evolve(source.sampling, **fields)).sample(prompts)
    return [evolve(r, rollout_id=r.rollout_id.replace("/g0", f"/g{source.generation}"), generation=source.generation) for r in other]


def before_top_p(rollout: Rollout, temperature: float) -> Any:
    rows_TV = tempered(TABLE_VV[np.concatenate([rollout.prompt_ids[-1:], rollout.response_ids[:-1]])], temperature)
    return rows_TV[np.arange(len(rows_TV)), rollout.response_ids]


CALLS = itertools.count()
AS_ASKED = "test_tokens_and_their_log_probs_are_of_the_distribution_that_was_asked_for"
SOURCE_MISTAKES: dict[str, tuple[Change, str]] = {
    "copies of the first sample": (
        lambda s, p, rs: [evolve(rs[i - i % 4], rollout_id=r.rollout_id) for i, r in enumerate(rs)] if len(rs) > 4 else rs,
        "test_samples_of_a_prompt_are_no_copies_of_each_other",
    ),
    "samples in another order": (lambda s, p, rs: rs[::-1], "test_each_prompt_has_its_samples_in_order"),
    "no token counts": (
        lambda s, p, rs: [evolve(r, loss_mask=np.zeros_like(r.loss_mask)) for r in rs],
        "test_each_prompt_has_its_samples_in_order",
    ),
    "the stop id does not count": (
        lambda s, p, rs: [r if r.finish_reason == "length" else evolve(r, loss_mask=[*r.loss_mask[:-1], False]) for r in rs],
        "test_a_stop_id_ends_a_response_and_is_kept",
    ),
    "one lost": (lambda s, p, rs: rs[:-1], "test_each_prompt_has_its_samples_in_order"),
    "the sampler's log-probs where they are the policy's own": (
        lambda s, p, rs: [evolve(r, sampler_logprobs=r.behavior_logprobs) for r in rs],
        "test_log_probs_of_the_sampler_come_where_it_draws_from_another_distribution",
    ),
    "the policy's log-probs where they are the sampler's": (
        lambda s, p, rs: rs if s.sampling.neutral else [evolve(r, sampler_logprobs=r.behavior_logprobs) for r in rs],
        AS_ASKED,
    ),
    "log-probs of the sampler before top-p": (
        lambda s, p, rs: [r if s.sampling.top_p == 1 else evolve(r, sampler_logprobs=before_top_p(r, s.sampling.temperature)) for r in rs],
        AS_ASKED,
    ),
    "temperature and top-p are forgotten": (lambda s, p, rs: resampled(s, p, temperature=1.0, top_p=1.0), AS_ASKED),
    "top-p is forgotten": (lambda s, p, rs: resampled(s, p, top_p=1.0), AS_ASKED),
    "at another temperature": (lambda s, p, rs: resampled(s, p, temperature=s.sampling.temperature / 3), AS_ASKED),
    "the round is forgotten": (lambda s, p, rs: [evolve(r, generation=0) for r in rs], "test_each_prompt_has_its_samples_in_order"),
    "the round has no numbers of its own": (
        lambda s, p, rs: resampled(s, p),
        "test_each_seed_and_each_round_has_random_numbers_of_its_own",
    ),
    "the seed is forgotten": (lambda s, p, rs: resampled(s, p, seed=0), "test_each_seed_and_each_round_has_random_numbers_of_its_own"),
    "another answer each time": (lambda s, p, rs: resampled(s, p, seed=next(CALLS)), "test_the_same_call_gives_the_same_rollouts"),
    "too long": (
        lambda s, p, rs: resampled(s, p, max_new_tokens=s.sampling.max_new_tokens + 1),
        "test_no_response_is_longer_than_asked_for",
    ),
    "stop ids are forgotten": (lambda s, p, rs: resampled(s, p, stop_ids=()), "test_a_stop_id_ends_a_response_and_is_kept"),
    "the stop id is cut off": (
        lambda s, p, rs: [
            evolve(r, response_ids=r.response_ids[:-1], loss_mask=r.loss_mask[:-1], behavior_logprobs=None)
            if r.finish_reason == "stop" and r.response_ids.size > 1
            else evolve(r, behavior_logprobs=None)
            for r in rs
        ],
        "test_a_stop_id_ends_a_response_and_is_kept",
    ),
    "log-probs at the temperature of sampling": (
        lambda s, p, rs: [evolve(r, behavior_logprobs=r.behavior_logprobs / s.sampling.temperature) for r in rs],
        "test_reported_log_probs_are_of_the_whole_distribution_at_temperature_1",
    ),
    "ids of padding rows": (
        lambda s, p, rs: [evolve(r, response_ids=r.response_ids + VOCAB) for r in rs],
        "test_ids_are_within_the_vocabulary",
    ),
    "no prompts are too few": (lambda s, p, rs: [rs[0], *rs[1:]], "test_no_prompts_give_no_rollouts"),
    "another answer from each source": (
        lambda s, p, rs: resampled(s, p, seed=id(s)),
        "test_what_it_gives_can_be_collected_and_collecting_again_changes_nothing",
    ),
    "log-probs of some": (
        lambda s, p, rs: [evolve(r, behavior_logprobs=None) if i % 2 else r for i, r in enumerate(rs)],
        "test_reported_log_probs_are_of_the_whole_distribution_at_temperature_1",
    ),
}


def rekept(change: Change) -> Change:
    """Change the candidates, where there are some; `change` gets the source, the rollout, and the table's log-probs at each token."""

    def changed(source: TableSource, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Rollout]:
        rows = [TABLE_VV[np.concatenate([r.prompt_ids[-1:], r.response_ids[:-1]])] for r in rollouts]
        return [evolve(r, candidates=r.candidates and change(source, r, rows_TV)) for r, rows_TV in zip(rollouts, rows, strict=True)]

    return changed


def forced_in(source: TableSource, rollout: Rollout, rows_TV: Any) -> TopK:
    """Put the sampled token in the place of the least likely candidate, unless it is one."""
    ids_TK = rollout.candidates.ids.copy()
    outside_T = ~(ids_TK == rollout.response_ids[:, None]).any(1)
    ids_TK[outside_T, source.sampling.candidates - 1] = rollout.response_ids[outside_T]
    return support_of(rows_TV, ids_TK, source.sampling.drawn)


def cooled(source: TableSource, rollout: Rollout, rows_TV: Any) -> TopK:
    """Draw at the temperature of sampling."""
    cold = tempered(rows_TV, source.sampling.temperature)
    drawn_TD = source._keep(cold, rollout.rollout_id).ids[:, source.sampling.candidates :]
    return support_of(
        rows_TV, np.concatenate([rollout.candidates.ids[:, : source.sampling.candidates], drawn_TD], 1), source.sampling.drawn
    )


def drawn_cooled(source: TableSource, rollout: Rollout, rows_TV: Any) -> TopK:
    """Give drawn candidates alone the log-probs at the temperature of sampling."""
    kept, cold = rollout.candidates, support_of(tempered(rows_TV, source.sampling.temperature), rollout.candidates.ids)
    first = source.sampling.candidates
    return evolve(kept, logprobs=np.concatenate([kept.logprobs[:, :first], cold.logprobs[:, first:]], 1))


MOST_LIKELY, FOLLOW = (
    "test_candidates_are_the_most_likely_tokens_at_temperature_1",
    "test_drawn_candidates_follow_the_policy_at_temperature_1_each_token_for_itself",
)
CANDIDATE_MISTAKES: dict[str, tuple[Change, str]] = {
    "candidates are forgotten": (
        rekept(lambda s, r, rows: None),
        "test_keeping_candidates_changes_no_token_and_the_same_call_keeps_the_same",
    ),
    "keeping candidates changes the tokens": (
        lambda s, p, rs: resampled(s, p, seed=s.sampling.candidates + s.sampling.drawn),
        "test_keeping_candidates_changes_no_token_and_the_same_call_keeps_the_same",
    ),
    "candidates without log-probs": (
        lambda s, p, rs: [r if r.candidates is None else evolve(r, behavior_logprobs=None) for r in rs],
        "test_what_it_gives_can_be_collected_and_collecting_again_changes_nothing",
    ),
    "the sampled token is put in by force": (rekept(forced_in), MOST_LIKELY),
    "log-probs of candidates at the temperature of sampling": (
        rekept(lambda s, r, rows: support_of(tempered(rows, s.sampling.temperature), r.candidates.ids, r.candidates.drawn)),
        MOST_LIKELY,
    ),
    "log-probs of drawn ones at the temperature of sampling": (rekept(drawn_cooled), MOST_LIKELY),
    "drawn at the temperature of sampling": (rekept(cooled), FOLLOW),
    "all tokens share their draws": (
        rekept(
            lambda s, r, rows: support_of(rows, np.concatenate([r.candidates.ids[:, :1], np.tile(np.arange(16), (len(rows), 1))], 1), 16)
        ),
        FOLLOW,
    ),
}


class SourceThatForgetsItsRound(TableSource):
    @property
    def manifest(self) -> Manifest:
        return evolve(TableSource.manifest.fget(self), generation=0)


class SourceThatChecksOneByOne(TableSource):
    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        return [rollout for prompt in prompts for rollout in TableSource.sample(self, [prompt])]


NO_ROOM, OUTSIDE = (
    "test_a_prompt_that_leaves_no_room_is_refused_and_named",
    "test_an_id_outside_the_vocabulary_is_refused_and_its_prompt_named",
)
WRONG_SOURCES: dict[str, tuple[Change, str]] = {
    **{name: (partial(TableSource, change=change), clause) for name, (change, clause) in (SOURCE_MISTAKES | CANDIDATE_MISTAKES).items()},
    "the manifest forgets the round": (SourceThatForgetsItsRound, "test_the_manifest_says_what_was_asked_for"),
    "long prompts are sampled": (partial(TableSource, refuse=unchecked), NO_ROOM),
    "which prompt is too long is not said": (partial(TableSource, refuse=nameless(refuse_prompts)), NO_ROOM),
    "a long prompt ends the run": (partial(TableSource, refuse=as_if_all_were_wrong(refuse_prompts)), NO_ROOM),
    "ids are not checked": (partial(TableSource, refuse=unchecked), OUTSIDE),
    "which prompt has a strange id is not said": (partial(TableSource, refuse=nameless(refuse_prompts)), OUTSIDE),
    "a strange id ends the run": (partial(TableSource, refuse=as_if_all_were_wrong(refuse_prompts)), OUTSIDE),
    "it samples what comes before the refused one": (SourceThatChecksOneByOne, "test_a_call_that_is_refused_samples_nothing"),
}


@pytest.mark.parametrize(("make", "clause"), WRONG_SOURCES.values(), ids=WRONG_SOURCES)
def test_the_suite_rejects_a_source_that_is_wrong(make: Change, clause: str) -> None:
    class Suite(TableSourceSuite):
        make_source = staticmethod(make)

    assert clause in broken_clauses(Suite())


def rescored(change: Change) -> Change:
    """Change the scores of each rollout alone."""
    return lambda rollouts, scores: [
        evolve(score, logprobs=change(rollout, score.logprobs)) for rollout, score in zip(rollouts, scores, strict=True)
    ]


def resupported(change: Change) -> Change:
    """Change the support of each rollout, given the call."""
    return lambda rollouts, scores: [
        evolve(score, top_k=TopK(*change(rollouts, score.top_k.ids, score.top_k.logprobs, score.top_k.tail))) for score in scores
    ]


def with_tail(ids: Any, logprobs: Any) -> tuple[Any, Any, Any]:
    return ids, logprobs, 1 - np.exp(logprobs).sum(1)


def one_too_early(rollout: Rollout, logprobs: Any) -> Any:
    """Score the token before each one, as wrong bounds of a slice do; whether prompts and responses are cut changes nothing."""
    ids, length = np.concatenate([rollout.prompt_ids[:1], rollout.prompt_ids, rollout.response_ids]), len(logprobs)
    return TABLE_VV[ids[-length - 2 : -2], ids[-length - 1 : -1]]


SCORER_MISTAKES: dict[str, tuple[int, Change, str]] = {
    "one too late": (0, rescored(lambda r, x: np.roll(x, 1)), "test_a_score_stands_at_its_own_token"),
    "one too early": (0, rescored(one_too_early), "test_a_score_stands_at_its_own_token"),
    "not normalised": (0, rescored(lambda r, x: x - 0.1), "test_probabilities_of_all_tokens_add_up_to_1"),
    "the mean over the response": (0, rescored(lambda r, x: np.full_like(x, x.mean())), "test_a_score_stands_at_its_own_token"),
    "masked tokens get 0": (0, rescored(lambda r, x: np.where(r.loss_mask, x, 0)), "test_masked_tokens_are_read_and_scored_like_others"),
    "depends on the company": (
        0,
        lambda rs, ss: [evolve(s, logprobs=s.logprobs - 0.01 * len(rs)) for s in ss],
        "test_the_same_tokens_have_the_same_scores_alone_in_company_and_next_time",
    ),
    "in another order": (0, lambda rs, ss: ss[::-1], "test_each_rollout_has_its_scores_in_order"),
    "one lost": (0, lambda rs, ss: ss[1:], "test_each_rollout_has_its_scores_in_order"),
    "of other tokens": (0, lambda rs, ss: [evolve(s, content_hash=b"?" * 16) for s in ss], "test_each_rollout_has_its_scores_in_order"),
    "no support": (
        3,
        lambda rs, ss: [evolve(s, top_k=None) for s in ss],
        "test_the_most_likely_tokens_are_those_that_the_provenance_promises",
    ),
    "support of one token fewer": (
        3,
        resupported(lambda rs, ids, logprobs, tail: with_tail(ids[:, 1:], logprobs[:, 1:])),
        "test_the_most_likely_tokens_are_those_that_the_provenance_promises",
    ),
    "no rollouts are too few": (0, lambda rs, ss: [ss[0], *ss[1:]], "test_no_rollouts_give_no_scores"),
    "log-probs of the support in another order than its ids": (
        3,
        resupported(lambda rs, ids, logprobs, tail: (ids, logprobs[:, ::-1], tail)),
        "test_each_of_the_most_likely_tokens_has_the_log_prob_that_it_has_as_a_response",
    ),
    "support that depends on the company": (
        3,
        resupported(lambda rs, ids, logprobs, tail: with_tail(ids, logprobs - 0.01 * len(rs))),
        "test_the_most_likely_tokens_are_as_likely_alone_as_in_company",
    ),
    "a tail that is a little too small": (
        3,
        resupported(lambda rs, ids, logprobs, tail: (ids, logprobs, np.where(tail > 0.005, tail - 0.005, tail))),
        "test_the_most_likely_tokens_are_those_that_the_provenance_promises",
    ),
    "support of the next token": (
        3,
        resupported(lambda rs, *parts: [np.roll(part, 1, 0) for part in parts]),
        "test_the_most_likely_tokens_are_those_that_the_provenance_promises",
    ),
}


def reordered(change: Change) -> Change:
    """Reorder the support of a scorer with four candidates, three of its own and two drawn ones."""
    order = change([*range(9)])
    return lambda rs, ss: [
        evolve(s, top_k=TopK(s.top_k.ids[:, order], s.top_k.logprobs[:, order], s.top_k.tail, s.top_k.drawn)) for s in ss
    ]


PROMISES = "test_the_most_likely_tokens_are_those_that_the_provenance_promises"
CANDIDATE_SCORER_MISTAKES: dict[str, tuple[Change, str]] = {
    "its own come first": (partial(TableScorer, 3, reordered(lambda n: [*n[4:7], *n[:4], *n[7:]]), candidates=4, drawn=2), PROMISES),
    "candidates in another order": (partial(TableScorer, 3, reordered(lambda n: [*n[3::-1], *n[4:]]), candidates=4, drawn=2), PROMISES),
    "each drawn token once": (
        partial(
            TableScorer, 3, reordered(lambda n: [*n[:7], 7, 7]), ask=lambda r, c, d: asked_ids(r, c, d + 1)[:, :-1], candidates=4, drawn=2
        ),
        PROMISES,
    ),
    "it makes do without candidates": (
        partial(TableScorer, candidates=4, ask=ids_that_make_do),
        "test_a_rollout_without_the_candidates_is_refused_and_named",
    ),
    "strange candidates are taken for others": (
        partial(TableScorer, candidates=4, ask=ids_modulo_the_vocabulary),
        "test_a_candidate_outside_the_vocabulary_is_refused_and_its_rollout_named",
    ),
    "strange draws are taken for others": (
        partial(TableScorer, drawn=2, ask=ids_modulo_the_vocabulary),
        "test_a_candidate_outside_the_vocabulary_is_refused_and_its_rollout_named",
    ),
}


class ScorerThatChecksOneByOne(TableScorer):
    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        return [scores for rollout in rollouts for scores in TableScorer.score(self, [rollout])]


def renamed() -> TableScorer:
    return TableScorer(name=f"table {next(CALLS)}")


OVERFLOW, STRANGE = "test_a_rollout_longer_than_the_context_is_refused_and_named", OUTSIDE.replace("prompt", "rollout")
WRONG_SCORERS: dict[str, tuple[Change, str]] = {
    **{name: (partial(TableScorer, top_k, change), clause) for name, (top_k, change, clause) in SCORER_MISTAKES.items()},
    **CANDIDATE_SCORER_MISTAKES,
    "the name changes": (renamed, "test_the_provenance_says_the_same_each_time_and_names_the_vocabulary"),
    "a column cannot be continued": (renamed, "test_a_store_is_scored_once"),
    "long rollouts are scored": (partial(TableScorer, refuse=unchecked), OVERFLOW),
    "which rollout is too long is not said": (partial(TableScorer, refuse=nameless(refuse_rollouts)), OVERFLOW),
    "a long rollout ends the run": (partial(TableScorer, refuse=as_if_all_were_wrong(refuse_rollouts)), OVERFLOW),
    "ids of prompts are not checked": (partial(TableScorer, refuse=refuse_responses), STRANGE),
    "which rollout has a strange id is not said": (partial(TableScorer, refuse=nameless(refuse_rollouts)), STRANGE),
    "a strange id ends the run": (partial(TableScorer, refuse=as_if_all_were_wrong(refuse_rollouts)), STRANGE),
    "it scores what comes before the refused one": (ScorerThatChecksOneByOne, "test_a_call_that_is_refused_computes_nothing"),
}


@pytest.mark.parametrize(("make", "clause"), WRONG_SCORERS.values(), ids=WRONG_SCORERS)
def test_the_suite_rejects_a_scorer_that_is_wrong(make: Change, clause: str) -> None:
    class Suite(TableScorerSuite):
        make_scorer = staticmethod(make)

    assert clause in broken_clauses(Suite())


@pytest.mark.parametrize(("suite", "wrong"), [(SourceConformance, WRONG_SOURCES), (ScorerConformance, WRONG_SCORERS)])
def test_every_clause_is_one_that_something_wrong_breaks(suite: type, wrong: dict[str, tuple[Change, str]]) -> None:
    assert {clause for _, clause in wrong.values()} == set(clauses(suite))


@pytest.mark.parametrize("suite", [TableSourceSuite, TableScorerSuite])
def test_a_count_that_stands_still_is_rejected(suite: Any) -> None:
    class Suite(suite):
        def work(self) -> int | None:
            return 0

    (broken,) = broken_clauses(Suite())
    assert broken.startswith("test_a_call_that_is_refused_")
