"""Our sources and scorers against the suites that other people's are judged by, and the suites against what is wrong on purpose."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tenacity
from _pytest.outcomes import Skipped
from attrs import evolve, frozen
from conftest import CONTEXT, TOKENIZER_ID, build_model, build_tokenizer
from vllm_stub import EOS, VOCAB, Stub

from lopd.engines import http_pool
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.http_pool import Servers
from lopd.engines.server import ServerScorer, ServerSource
from lopd.errors import InvalidRecordError
from lopd.identity import ModelId, TokenizerId
from lopd.manifest import Manifest, Provenance, SamplingParams
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.testing import ScorerConformance, SourceConformance
from lopd.types import Prompt, Rollout, Scores, TopK, rollout_id

TABLE = TokenizerId("table-vocabulary", VOCAB, EOS, None, None, "")
MODEL = ModelId("table", "1", "float32")
TOKENIZER = build_tokenizer()
SIZES = ((1, 1), (3, 7), (6, 4), (2, 12))


def some_rollouts(vocab_size: int) -> list[Rollout]:
    rng = np.random.default_rng(5)
    return [
        Rollout(f"r{i}", rng.integers(0, vocab_size, p), rng.integers(0, vocab_size, t), np.ones(t, bool), "length")
        for i, (p, t) in enumerate(SIZES)
    ]


def some_prompts(vocab_size: int) -> list[Prompt]:
    rng = np.random.default_rng(6)
    return [Prompt(f"p{i}", rng.integers(1, vocab_size, 1 + 2 * i)) for i in range(5)]


def filler(length: int) -> Rollout:
    return Rollout("filler", [2] * (length - 1), [3], [True], "length")


class TestHFSource(SourceConformance):
    kind = "llama_tied"

    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        return HFSource(build_model(self.kind, seed=2), TOKENIZER, sampling, generation=generation, rows_per_batch=3)

    def prompts(self) -> Sequence[Prompt]:
        return some_prompts(TOKENIZER_ID.vocab_size)

    def too_long(self) -> Prompt | None:
        return Prompt("filler", [2] * CONTEXT)

    def scorer(self) -> TeacherScorer | None:
        return HFScorer(build_model(self.kind, seed=2), TOKENIZER)


class TestHFSourceWithAPaddedHead(TestHFSource):
    kind = "qwen3_padded"


class TestHFScorer(ScorerConformance):
    kind, top_k = "llama_tied", 0

    def make(self) -> TeacherScorer:
        return HFScorer(build_model(self.kind, seed=2), TOKENIZER, tokens_per_batch=16, rows_per_chunk=5, top_k=self.top_k)

    def tokenizer(self) -> TokenizerId:
        return TOKENIZER_ID

    def rollouts(self) -> Sequence[Rollout]:
        return some_rollouts(TOKENIZER_ID.vocab_size)

    def too_long(self) -> Rollout | None:
        return filler(CONTEXT + 1)


class TestHFScorerWithTopKOfAPaddedHead(TestHFScorer):
    kind, top_k = "qwen3_padded", 7


class Served:
    """Two servers for each test."""

    @pytest.fixture(autouse=True)
    def _servers(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(http_pool, "_BACKOFF", tenacity.wait_fixed(0.01))
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        stubs = [Stub(), Stub()]
        self.servers = Servers([stub.url for stub in stubs], model="table", patience_s=20, timeout_s=20)
        yield
        for stub in stubs:
            stub.close()


class TestServerSource(Served, SourceConformance):
    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        return ServerSource(self.servers, TABLE, MODEL, sampling, (EOS,), generation=generation)

    def prompts(self) -> Sequence[Prompt]:
        return some_prompts(VOCAB)

    def too_long(self) -> Prompt | None:
        return Prompt("filler", [2] * 64)

    def scorer(self) -> TeacherScorer | None:
        return ServerScorer(self.servers, TABLE, MODEL)


class TestServerScorer(Served, ScorerConformance):
    top_k = 0

    def make(self) -> TeacherScorer:
        return ServerScorer(self.servers, TABLE, MODEL, self.top_k, tokens_per_request=24)

    def tokenizer(self) -> TokenizerId:
        return TABLE

    def rollouts(self) -> Sequence[Rollout]:
        return some_rollouts(VOCAB)

    def too_long(self) -> Rollout | None:
        return filler(64 + 1)


class TestServerScorerWithTopK(TestServerScorer):
    top_k = 4


# The suites must catch what is wrong.


def broken_clauses(suite: Any) -> list[str]:
    """The clauses that fail, with all their arguments; those that are left out count as kept."""
    broken = []
    for name in (name for name in dir(suite) if name.startswith("test_")):
        clause = getattr(suite, name)
        marks = [mark.args for mark in getattr(clause, "pytestmark", ()) if mark.name == "parametrize"]
        names = list(inspect.signature(clause).parameters)
        values = [value if isinstance(value, tuple) else (value,) for value in marks[0][1]] if marks else [()]
        for arguments in values:
            try:
                clause(**dict(zip(names, arguments, strict=True)))
            except Skipped:
                pass
            except (Exception, pytest.fail.Exception):  # whatever is raised fails a test
                broken.append(name)
    return sorted(set(broken))


TABLE_VV = np.log(np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.3), VOCAB)).astype(np.float32)
Change = Callable[..., Any]


@frozen
class TableSource:
    """The next token depends on the last one only; `change` makes something else of the rollouts of a call, given the source and the prompts."""

    sampling: SamplingParams
    generation: int = 0
    change: Change = lambda source, prompts, rollouts: rollouts  # the mistakes have these arguments too

    @property
    def manifest(self) -> Manifest:
        return Manifest(TABLE, MODEL, self.sampling, generation=self.generation)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        rows = itertools.product(prompts, range(self.sampling.samples_per_prompt))
        return list(self.change(self, prompts, [self._one(prompt, sample) for prompt, sample in rows]))

    def _one(self, prompt: Prompt, sample: int) -> Rollout:
        if prompt.token_ids.max() >= VOCAB:
            raise InvalidRecordError(f"Prompt {prompt.prompt_id!r}: outside")
        name = rollout_id(prompt.prompt_id, sample, self.generation)
        random = np.random.default_rng([self.sampling.seed, *name.encode()])
        stop_ids, ids, logprobs = self.sampling.stop_ids or (EOS,), [int(prompt.token_ids[-1])], []
        while len(ids) <= self.sampling.max_new_tokens and (len(ids) == 1 or ids[-1] not in stop_ids):
            row = TABLE_VV[ids[-1]].astype(np.float64)
            scaled = np.exp(row / max(self.sampling.temperature, 0.01))
            ids.append(int(random.choice(VOCAB, p=scaled / scaled.sum())))
            logprobs.append(row[ids[-1]])
        reason = "stop" if ids[-1] in stop_ids else "length"
        return Rollout(name, prompt.token_ids, ids[1:], [True] * (len(ids) - 1), reason, logprobs, self.generation)


@frozen
class TableScorer:
    """The same model; `change` makes something else of the scores of a call, given its rollouts."""

    top_k: int = 0
    change: Change = lambda rollouts, scores: scores  # likewise
    name: str = "table"

    @property
    def provenance(self) -> Provenance:
        return Provenance(evolve(MODEL, name=self.name), TABLE.vocab_hash, "table 1.0", top_k=self.top_k, eos_id=EOS)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        return list(self.change(rollouts, [self._one(rollout) for rollout in rollouts]))

    def _one(self, rollout: Rollout) -> Scores:
        if rollout.response_ids.max() >= VOCAB:
            raise InvalidRecordError(f"Rollout {rollout.rollout_id!r}: outside")
        rows_TV = TABLE_VV[np.concatenate([rollout.prompt_ids[-1:], rollout.response_ids[:-1]])]
        ids_TK = np.argsort(-rows_TV, axis=1, kind="stable")[:, : self.top_k]
        among_TK = np.take_along_axis(rows_TV, ids_TK, axis=1)
        support = TopK(ids_TK, among_TK, np.clip(1 - np.exp(among_TK).sum(1), 0, 1)) if self.top_k else None
        return Scores.of(rollout, rows_TV[np.arange(len(rows_TV)), rollout.response_ids], top_k=support)


class TableSourceSuite(SourceConformance):
    make_source: Callable[..., Any] = TableSource

    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        return type(self).make_source(sampling, generation)

    def prompts(self) -> Sequence[Prompt]:
        return some_prompts(VOCAB)

    def scorer(self) -> TeacherScorer | None:
        return TableScorer()


class TableScorerSuite(ScorerConformance):
    make_scorer: Callable[[], Any] = TableScorer

    def make(self) -> TeacherScorer:
        return type(self).make_scorer()

    def tokenizer(self) -> TokenizerId:
        return TABLE

    def rollouts(self) -> Sequence[Rollout]:
        return some_rollouts(VOCAB)


def test_the_suites_accept_what_is_right() -> None:
    assert broken_clauses(TableSourceSuite()) == []
    for top_k in (0, 3):
        suite = TableScorerSuite()
        type(suite).make_scorer = staticmethod(lambda k=top_k: TableScorer(k))
        assert broken_clauses(suite) == []


def resampled(source: TableSource, prompts: Sequence[Prompt], **fields: Any) -> list[Rollout]:
    """What a source with other settings would give, under the names of this one."""
    other = TableSource(evolve(source.sampling, **fields)).sample(prompts)
    return [evolve(r, rollout_id=r.rollout_id.replace("/g0", f"/g{source.generation}"), generation=source.generation) for r in other]


CALLS = itertools.count()

SOURCE_MISTAKES: dict[str, tuple[Change, str]] = {
    "copies of the first sample": (
        lambda s, p, rs: [evolve(rs[i - i % 4], rollout_id=r.rollout_id) for i, r in enumerate(rs)] if len(rs) > 4 else rs,
        "test_samples_of_a_prompt_are_no_copies_of_each_other",
    ),
    "samples in another order": (lambda s, p, rs: rs[::-1], "test_each_prompt_has_its_samples_in_order"),
    "one lost": (lambda s, p, rs: rs[:-1], "test_each_prompt_has_its_samples_in_order"),
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
    "log-probs of some": (
        lambda s, p, rs: [evolve(r, behavior_logprobs=None) if i % 2 else r for i, r in enumerate(rs)],
        "test_reported_log_probs_are_of_the_whole_distribution_at_temperature_1",
    ),
}


@pytest.mark.parametrize(("change", "clause"), SOURCE_MISTAKES.values(), ids=SOURCE_MISTAKES)
def test_the_suite_rejects_a_source_that_is_wrong(change: Change, clause: str) -> None:
    class Suite(TableSourceSuite):
        make_source = staticmethod(lambda sampling, generation: TableSource(sampling, generation, change))

    assert clause in broken_clauses(Suite())


def rescored(change: Change) -> Change:
    """Of each rollout alone."""
    return lambda rollouts, scores: [
        evolve(score, logprobs=change(rollout, score.logprobs)) for rollout, score in zip(rollouts, scores, strict=True)
    ]


SCORER_MISTAKES: dict[str, tuple[int, Change, str]] = {
    "one too late": (0, rescored(lambda r, x: np.roll(x, 1)), "test_a_score_stands_at_its_own_token"),
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
        lambda rs, ss: [
            evolve(s, top_k=TopK(s.top_k.ids[:, 1:], s.top_k.logprobs[:, 1:], 1 - np.exp(s.top_k.logprobs[:, 1:]).sum(1))) for s in ss
        ],
        "test_the_most_likely_tokens_are_those_that_the_provenance_promises",
    ),
    "support of the next token": (
        3,
        lambda rs, ss: [
            evolve(s, top_k=TopK(*(np.roll(part, 1, 0) for part in (s.top_k.ids, s.top_k.logprobs, s.top_k.tail)))) for s in ss
        ],
        "test_the_most_likely_tokens_are_those_that_the_provenance_promises",
    ),
}


@pytest.mark.parametrize(("top_k", "change", "clause"), SCORER_MISTAKES.values(), ids=SCORER_MISTAKES)
def test_the_suite_rejects_a_scorer_that_is_wrong(top_k: int, change: Change, clause: str) -> None:
    class Suite(TableScorerSuite):
        make_scorer = staticmethod(lambda: TableScorer(top_k, change))

    assert clause in broken_clauses(Suite())


def test_the_suite_rejects_a_scorer_whose_name_changes() -> None:
    class Suite(TableScorerSuite):
        make_scorer = staticmethod(lambda: TableScorer(name=f"table {next(CALLS)}"))

    assert "test_the_provenance_says_the_same_each_time_and_names_the_vocabulary" in broken_clauses(Suite())
