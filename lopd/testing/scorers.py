"""The contract of a `TeacherScorer`, one test a clause: whether its numbers are log-probs of one model, each at its own token.

Shape suffixes: T response tokens, K candidates a token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from lopd.backends.memory_store import MemoryStore
from lopd.errors import ContextOverflowError, InvalidRecordError
from lopd.protocols import TeacherScorer
from lopd.records.identity import ModelId, TokenizerId
from lopd.records.manifest import Manifest, Provenance, SamplingParams
from lopd.records.rollouts import Rollout, Scores, policy_column
from lopd.records.support import TopK
from lopd.verbs.scoring import score_rollouts

_LARGEST_VOCABULARY = 4096


class ScorerConformance:
    """Every clause of the `TeacherScorer` contract, as one test each.  Subclass it, and supply `make`, `tokenizer` and `rollouts`.

    A scorer whose provenance has `candidates` or `drawn` is given made-up candidates, more than it asks for.

    Attributes:
        tolerance: nats by which the log-probs of the same tokens may differ, in the mean, from one call to another.
    """

    tolerance: float = 1e-3

    def make(self) -> TeacherScorer:
        """Return a new scorer of one and the same model; called several times in one test."""
        raise NotImplementedError

    def tokenizer(self) -> TokenizerId:
        """Return whose ids it reads."""
        raise NotImplementedError

    def rollouts(self) -> Sequence[Rollout]:
        """Return at least three, of unlike lengths, the longest with four tokens of response or more."""
        raise NotImplementedError

    def too_long(self) -> Rollout | None:
        """Return a rollout that is longer than the model's context; None where there is no limit."""
        return None

    def work(self) -> int | None:
        """Return how much all that `make` gave has computed so far, in any unit (forward passes, requests); None if it is not counted."""
        return None

    def _given(self, scorer: TeacherScorer) -> list[Rollout]:
        """Return the rollouts, with the candidates that the scorer reads."""
        return [self._with_candidates(rollout, scorer) for rollout in self.rollouts()]

    def _with_candidates(self, rollout: Rollout, scorer: TeacherScorer) -> Rollout:
        wanted, vocab_size = scorer.provenance, self.tokenizer().vocab_size
        if not wanted.candidates + wanted.drawn:
            return rollout
        random, width = np.random.default_rng(len(rollout)), min(wanted.candidates + 1, vocab_size)
        ids_TC = np.stack([random.choice(vocab_size, width, replace=False) for _ in rollout.response_ids])
        drawn_TD = random.integers(0, vocab_size, (rollout.response_ids.size, wanted.drawn + 1))
        # what was drawn may be drawn again, and be among the most likely
        drawn_TD[:, -2:] = ids_TC[:, :1]
        ids_TK = np.concatenate([ids_TC, drawn_TD], axis=1)
        logprobs_TK, tail_T = np.full(ids_TK.shape, -np.log(width + 1)), np.full(len(ids_TK), 1 / (width + 1))
        return evolve(rollout, candidates=TopK(ids_TK, logprobs_TK, tail_T, wanted.drawn + 1))

    def _longest(self, scorer: TeacherScorer) -> Rollout:
        return max(self._given(scorer), key=lambda rollout: rollout.response_ids.size)

    def _assert_near(self, got: Sequence[Scores], expected: Sequence[NDArray[np.float32]], when: str) -> None:
        for score, logprobs in zip(got, expected, strict=True):
            gap = float(np.abs(score.logprobs.astype(np.float64) - logprobs).mean())
            assert gap <= self.tolerance, f"{score.rollout_id}: {gap} nats a token {when}"

    def test_the_provenance_says_the_same_each_time_and_names_the_vocabulary(self) -> None:
        provenance = self.make().provenance
        assert provenance == self.make().provenance, "a column is continued by the model that began it, or by none"
        assert provenance == Provenance.from_json(provenance.to_json())
        assert self.tokenizer().same_vocabulary(provenance)

    def test_each_rollout_has_its_scores_in_order(self) -> None:
        scorer = self.make()
        given = self._given(scorer)
        rollouts = [evolve(rollout, rollout_id=f"r{i}") for i, rollout in enumerate([*given, *reversed(given)])]
        scores = scorer.score(rollouts)
        assert [(s.rollout_id, s.content_hash, s.logprobs.shape) for s in scores] == [
            (r.rollout_id, r.content_hash, r.response_ids.shape) for r in rollouts
        ]

    def test_no_rollouts_give_no_scores(self) -> None:
        assert list(self.make().score([])) == []

    def test_the_same_tokens_have_the_same_scores_alone_in_company_and_next_time(self) -> None:
        scorer = self.make()
        rollouts = self._given(scorer)
        expected = [score.logprobs for score in scorer.score(rollouts)]
        self._assert_near([scorer.score([rollout])[0] for rollout in rollouts], expected, "from alone to in company")
        self._assert_near(scorer.score(rollouts[::-1])[::-1], expected, "from one order to another")
        self._assert_near(self.make().score(rollouts), expected, "from one scorer to the next")

    def test_a_score_stands_at_its_own_token(self) -> None:
        scorer = self.make()
        whole = self._longest(scorer)
        (scores,), length = scorer.score([whole]), whole.response_ids.size
        begun = [_cut(whole, stop=stop) for stop in range(1, length)]
        self._assert_near(self.make().score(begun), [scores.logprobs[: r.response_ids.size] for r in begun], "if the response ends earlier")
        moved = [_cut(whole, start=start) for start in range(1, length)]
        self._assert_near(self.make().score(moved), [scores.logprobs[-r.response_ids.size :] for r in moved], "if the prompt ends later")
        last, vocab_size = int(whole.response_ids[-1]), self.tokenizer().vocab_size
        others = [(last + i * vocab_size // 7) % vocab_size for i in range(1, 7)]
        ended = scorer.score([evolve(whole, rollout_id=f"ends with {i}", response_ids=[*whole.response_ids[:-1], i]) for i in others])
        before = [evolve(score, logprobs=score.logprobs[:-1], top_k=None) for score in ended]
        self._assert_near(before, [scores.logprobs[:-1]] * len(before), "if the response ends with another token")
        own = [float(score.logprobs[-1]) for score in (scores, *ended)]
        assert vocab_size == 1 or np.ptp(own) > self.tolerance, "another last token has no other score"

    def test_masked_tokens_are_read_and_scored_like_others(self) -> None:
        scorer = self.make()
        whole = self._longest(scorer)
        masked = evolve(whole, loss_mask=np.arange(whole.response_ids.size) % 2 == 0)
        plain, scores = scorer.score([whole, masked])
        assert scores.content_hash == masked.content_hash
        self._assert_near([scores], [plain.logprobs], "under another loss mask")

    def test_probabilities_of_all_tokens_add_up_to_1(self) -> None:
        scorer, vocab_size = self.make(), self.tokenizer().vocab_size
        if vocab_size > _LARGEST_VOCABULARY:
            pytest.skip(f"{vocab_size} rollouts would be scored; test it with a small model of the same kind")
        first = _cut(self._longest(scorer), stop=1)
        nexts = [evolve(first, response_ids=[token], rollout_id=f"next {token}") for token in range(vocab_size)]
        total = float(np.exp([float(score.logprobs[0]) for score in scorer.score(nexts)]).sum())
        assert abs(total - 1) <= max(self.tolerance, 1e-3), f"they add up to {total}"

    def test_the_most_likely_tokens_are_those_that_the_provenance_promises(self) -> None:
        scorer = self.make()
        rollouts = self._given(scorer)
        for rollout, score in zip(rollouts, scorer.score(rollouts), strict=True):
            assert (score.top_k is None) == (scorer.provenance.top_k == 0), rollout.rollout_id
            if score.top_k is not None:
                self._check_top_k(rollout, score, score.top_k, scorer.provenance)

    def _check_top_k(self, rollout: Rollout, score: Scores, top_k: TopK, wanted: Provenance) -> None:
        assert (top_k.ids.shape, top_k.drawn) == ((rollout.response_ids.size, wanted.top_k), wanted.drawn)
        distinct = top_k.distinct
        if rollout.candidates is not None:
            asked, drawn = rollout.candidates.ids[:, : wanted.candidates], rollout.candidates.ids[:, -wanted.drawn :]
            assert (top_k.ids[:, : wanted.candidates] == asked).all(), "its first candidates, in their order"
            assert not wanted.drawn or (top_k.ids[:, distinct:] == drawn).all(), (
                "its last drawn ones, in their order, each as often as drawn"
            )
        assert all(len(set(ids)) == distinct for ids in top_k.ids[:, :distinct].tolist()), "each token once"
        assert 0 <= top_k.ids.min() <= top_k.ids.max() < self.tokenizer().vocab_size
        mass_T = np.exp(top_k.logprobs[:, :distinct].astype(np.float64)).sum(axis=1) + top_k.tail
        # `TopK` itself allows ten times as much
        assert (np.abs(mass_T - 1) <= max(self.tolerance, 1e-3)).all(), "the tail is not what the most likely tokens leave"
        among_TK = top_k.ids == rollout.response_ids[:, None]
        outside_T = ~among_TK[:, :distinct].any(axis=1)
        own_TK = top_k.logprobs[:, wanted.candidates : distinct]
        assert not own_TK.size or (score.logprobs[outside_T] <= own_TK.min(axis=1)[outside_T] + self.tolerance).all(), (
            "a likelier one is left out"
        )
        gaps = np.abs(top_k.logprobs - score.logprobs[:, None])[among_TK]
        assert not gaps.size or gaps.mean() <= self.tolerance, "the sampled token has two log-probs"

    def test_each_of_the_most_likely_tokens_has_the_log_prob_that_it_has_as_a_response(self) -> None:
        scorer = self.make()
        if not scorer.provenance.top_k:
            pytest.skip("it keeps no most likely tokens")
        whole = self._longest(scorer)
        top_k = _support(scorer.score([whole])[0])
        for place in (0, whole.response_ids.size - 1):
            here = _cut(whole, start=place, stop=place + 1)
            nexts = [evolve(here, response_ids=[token], rollout_id=f"next {token} at {place}") for token in top_k.ids[place].tolist()]
            self._assert_near(scorer.score(nexts), list(top_k.logprobs[place][:, None]), "from among the most likely to sampled")

    def test_the_most_likely_tokens_are_as_likely_alone_as_in_company(self) -> None:
        scorer = self.make()
        rollouts = self._given(scorer)
        if not scorer.provenance.top_k:
            pytest.skip("it keeps no most likely tokens")
        for rollout, score in zip(rollouts, scorer.score(rollouts), strict=True):
            # which of two equally likely tokens comes last may depend on rounding
            alone, company = (_support(one) for one in (scorer.score([rollout])[0], score))
            gap = np.abs(np.sort(alone.logprobs).astype(np.float64) - np.sort(company.logprobs)).mean()
            assert gap <= self.tolerance, f"{rollout.rollout_id}: {gap} nats a token from alone to in company"
            assert np.abs(alone.tail.astype(np.float64) - company.tail).mean() <= self.tolerance, rollout.rollout_id

    def test_a_rollout_longer_than_the_context_is_refused_and_named(self) -> None:
        scorer, rollout = self.make(), self.too_long()
        if rollout is None:
            pytest.skip("it has no limit")
        with pytest.raises(ContextOverflowError, match=f"'{rollout.rollout_id}'"):
            scorer.score([*self._given(scorer), self._with_candidates(rollout, scorer)])

    def _outside(self, scorer: TeacherScorer, field: str) -> Rollout:
        """Return a rollout whose prompt begins, or whose response ends, with an id outside the vocabulary."""
        whole, outside = self._longest(scorer), self.tokenizer().vocab_size
        prompt_ids, response_ids = [outside, *whole.prompt_ids[1:]], [*whole.response_ids[:-1], outside]
        changed: dict[str, Any] = {field: prompt_ids if field == "prompt_ids" else response_ids}
        return evolve(whole, rollout_id="outside", **changed)

    @pytest.mark.parametrize("field", ["prompt_ids", "response_ids"])
    def test_an_id_outside_the_vocabulary_is_refused_and_its_rollout_named(self, field: str) -> None:
        scorer = self.make()
        with pytest.raises(InvalidRecordError, match="'outside'"):
            scorer.score([*self._given(scorer), self._outside(scorer, field)])

    @pytest.mark.parametrize("place", [0, -1])
    def test_a_candidate_outside_the_vocabulary_is_refused_and_its_rollout_named(self, place: int) -> None:
        scorer = self.make()
        whole = self._longest(scorer)
        if whole.candidates is None or not (scorer.provenance.drawn if place else scorer.provenance.candidates):
            pytest.skip("it reads no such candidates")
        ids_TK = whole.candidates.ids.copy()
        ids_TK[-1, place] = self.tokenizer().vocab_size
        strange = evolve(whole, rollout_id="outside", candidates=evolve(whole.candidates, ids=ids_TK))
        with pytest.raises(InvalidRecordError, match="'outside'"):
            scorer.score([*self._given(scorer), strange])

    def test_a_rollout_without_the_candidates_is_refused_and_named(self) -> None:
        scorer = self.make()
        whole = self._longest(scorer)
        if whole.candidates is None:
            pytest.skip("it reads no candidates")
        with pytest.raises(InvalidRecordError, match="'without'"):
            scorer.score([*self._given(scorer), evolve(whole, rollout_id="without", candidates=None)])

    def test_a_call_that_is_refused_computes_nothing(self) -> None:
        scorer, before = self.make(), self.work()
        if before is None:
            pytest.skip("what it computes is not counted")
        too_long = self.too_long()
        overflowing = [] if too_long is None else [self._with_candidates(too_long, scorer)]
        for rollout in (*overflowing, self._outside(scorer, "prompt_ids"), self._outside(scorer, "response_ids")):
            with pytest.raises((ContextOverflowError, InvalidRecordError)):
                scorer.score([*self._given(scorer), rollout])
        assert self.work() == before, "the rollouts before the refused one were scored, and paid for"
        scorer.score(self._given(scorer))
        assert (self.work() or 0) > before, "`work` does not count"

    def test_a_store_is_scored_once(self) -> None:
        scorer = self.make()
        rollouts = [evolve(rollout, rollout_id=f"r{i}", generation=0) for i, rollout in enumerate(self._given(scorer))]
        tokenizer, policy = self.tokenizer(), ModelId("policy", "made up", "float32")
        store = MemoryStore(Manifest(tokenizer, policy, SamplingParams()))
        store.append(rollouts)
        support = rollouts[0].candidates
        if support is not None:
            provenance = Provenance(policy, tokenizer.vocab_hash, "made up", top_k=support.ids.shape[1], drawn=support.drawn)
            scores = [Scores.of(r, np.zeros(r.response_ids.size), top_k=r.candidates) for r in rollouts]
            store.append_scores(policy_column(0), provenance, scores)
        assert score_rollouts(store, scorer).rollouts == len(rollouts)
        records = store.read(range(len(rollouts)), columns=("teacher",))
        self._assert_near(self.make().score(rollouts), [record.scores["teacher"] for record in records], "from what was stored")
        assert score_rollouts(store, self.make()).rollouts == 0


def _support(score: Scores) -> TopK:
    assert score.top_k is not None, f"{score.rollout_id} has no most likely tokens"
    return score.top_k


def _cut(rollout: Rollout, start: int = 0, stop: int | None = None) -> Rollout:
    """Return the response from `start` to `stop`; what comes before is prompt."""
    ids = rollout.response_ids
    return Rollout(
        rollout_id=f"{rollout.rollout_id} {start}:{stop}",
        prompt_ids=np.concatenate([rollout.prompt_ids, ids[:start]]),
        response_ids=ids[start:stop],
        loss_mask=rollout.loss_mask[start:stop],
        finish_reason="length",
        candidates=None if rollout.candidates is None else rollout.candidates[start:stop],
    )
