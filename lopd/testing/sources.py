"""The contract of a `RolloutSource`, one test a clause: whether an engine samples what training will take it for.

Shape suffixes: T response tokens, K candidates a token, C those of them that are the most likely, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from attrs import evolve
from numpy.typing import NDArray

from lopd.backends.memory_store import MemoryStore
from lopd.errors import ContextOverflowError, InvalidRecordError
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records.manifest import SamplingParams
from lopd.records.rollouts import Prompt, Rollout, rollout_id
from lopd.records.support import TopK
from lopd.verbs.collect import collect_rollouts

_SAMPLING = SamplingParams(max_new_tokens=8, samples_per_prompt=4)
_LARGEST_VOCABULARY = 4096


class SourceConformance:
    """Every clause of the `RolloutSource` contract, as one test each.  Subclass it, and supply `make` and `prompts`.

    The model must be far from certain: of a few dozen responses at temperature 1, some must differ.  A source that cannot keep candidates
    refuses `SamplingParams(candidates=...)`, `drawn`, or both when it is made, with an InvalidRecordError.

    Attributes:
        tolerance: nats by which log-probs may differ, in the mean, between two calls, or from those of `scorer`.
    """

    tolerance: float = 1e-3

    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        """Return a new source of one and the same policy; called several times in one test."""
        raise NotImplementedError

    def prompts(self) -> Sequence[Prompt]:
        """Return at least two prompts that leave room for eight tokens."""
        raise NotImplementedError

    def too_long(self) -> Prompt | None:
        """Return a prompt that leaves no room for a response; None where there is no limit."""
        return None

    def scorer(self) -> TeacherScorer | None:
        """Return a scorer with the very policy in it, to compare reported log-probs with; None if there is none."""
        return None

    def work(self) -> int | None:
        """Return how much all that `make` gave has computed so far, in any unit (forward passes, requests); None if it is not counted."""
        return None

    def _sample(self, sampling: SamplingParams = _SAMPLING, generation: int = 0) -> Sequence[Rollout]:
        return self.make(sampling, generation).sample(self.prompts())

    def test_the_manifest_says_what_was_asked_for(self) -> None:
        sampling = evolve(_SAMPLING, temperature=0.5, seed=7)
        manifest = self.make(sampling, 2).manifest
        assert (manifest.sampling, manifest.generation) == (sampling, 2)
        assert manifest == self.make(sampling, 2).manifest, "a store is opened again with the manifest of a new source"

    def test_each_prompt_has_its_samples_in_order(self) -> None:
        rollouts = self._sample(generation=3)
        expected = [(prompt, rollout_id(prompt.prompt_id, sample, 3)) for prompt in self.prompts() for sample in range(4)]
        assert [(rollout.rollout_id, rollout.generation) for rollout in rollouts] == [(name, 3) for _, name in expected]
        for rollout, (prompt, _) in zip(rollouts, expected, strict=True):
            assert rollout.loss_mask.any(), f"{rollout.rollout_id}: no token counts"
            np.testing.assert_array_equal(rollout.prompt_ids, prompt.token_ids)

    def test_no_prompts_give_no_rollouts(self) -> None:
        assert list(self.make(_SAMPLING, 0).sample([])) == []

    def test_the_same_call_gives_the_same_rollouts(self) -> None:
        source = self.make(_SAMPLING, 0)
        first = source.sample(self.prompts())
        for again in (source.sample(self.prompts()), self._sample()):
            assert _contents(again) == _contents(first)
            assert _mean_gap(again, first) <= self.tolerance

    def test_samples_of_a_prompt_are_no_copies_of_each_other(self) -> None:
        responses = [tuple(rollout.response_ids.tolist()) for rollout in self._sample()]
        samples = _SAMPLING.samples_per_prompt
        assert any(len(set(responses[first : first + samples])) > 1 for first in range(0, len(responses), samples))

    @pytest.mark.parametrize(("seed", "generation"), [(1, 0), (0, 1)])
    def test_each_seed_and_each_round_has_random_numbers_of_its_own(self, seed: int, generation: int) -> None:
        here, there = self._sample(), self._sample(evolve(_SAMPLING, seed=seed), generation)
        assert [rollout.response_ids.tolist() for rollout in here] != [rollout.response_ids.tolist() for rollout in there]

    def test_ids_are_within_the_vocabulary(self) -> None:
        vocab_size = self.make(_SAMPLING, 0).manifest.tokenizer.vocab_size
        assert all(0 <= rollout.response_ids.min() <= rollout.response_ids.max() < vocab_size for rollout in self._sample())

    def test_no_response_is_longer_than_asked_for(self) -> None:
        for most in (1, 3):
            assert {rollout.response_ids.size for rollout in self._sample(evolve(_SAMPLING, max_new_tokens=most))} <= set(
                range(1, most + 1)
            )

    def test_a_stop_id_ends_a_response_and_is_kept(self) -> None:
        # ids that were sampled, so that some response will meet one; not all, so that most do not begin with one
        stop_ids = tuple(sorted({int(rollout.response_ids[-1]) for rollout in self._sample()}))
        rollouts = self._sample(evolve(_SAMPLING, stop_ids=stop_ids))
        for rollout in rollouts:
            *before, last = np.isin(rollout.response_ids, stop_ids).tolist()
            assert not any(before), f"{rollout.rollout_id} went on after a stop id"
            assert last == (rollout.finish_reason == "stop"), rollout.rollout_id
            assert not last or rollout.loss_mask[-1], f"{rollout.rollout_id}: the stop id does not count"
            assert last or rollout.response_ids.size == _SAMPLING.max_new_tokens, f"{rollout.rollout_id} was cut before its time"
        assert any(rollout.finish_reason == "stop" for rollout in rollouts)

    def test_reported_log_probs_are_of_the_whole_distribution_at_temperature_1(self) -> None:
        scorer = self.scorer()
        rollouts = [*self._sample(evolve(_SAMPLING, temperature=0.6)), *self._sample(evolve(_SAMPLING, top_p=0.7))]
        reported = [rollout for rollout in rollouts if rollout.behavior_logprobs is not None]
        assert len(reported) in {0, len(rollouts)}, "of all rollouts or of none"
        if scorer is None or not reported:
            pytest.skip("it reports no log-probs, or there is no scorer to compare them with")
        for rollout, scores in zip(reported, scorer.score(reported), strict=True):
            gap = np.abs(np.asarray(rollout.behavior_logprobs, np.float64) - scores.logprobs).mean()
            assert gap <= self.tolerance, f"{rollout.rollout_id}: {gap} nats"

    def test_log_probs_of_the_sampler_come_where_it_draws_from_another_distribution(self) -> None:
        assert all(rollout.sampler_logprobs is None for rollout in self._sample()), "they would be the behavior_logprobs"
        for sampling in (evolve(_SAMPLING, temperature=0.6), evolve(_SAMPLING, top_p=0.7)):
            drawn = [rollout.sampler_logprobs for rollout in self._sample(sampling)]
            there = [logprobs for logprobs in drawn if logprobs is not None]
            assert len(there) in {0, len(drawn)}, "of all rollouts or of none"

    def test_tokens_and_their_log_probs_are_of_the_distribution_that_was_asked_for(self) -> None:
        sampling = evolve(_SAMPLING, temperature=0.6, top_p=0.9, max_new_tokens=1, samples_per_prompt=64)
        source, scorer = self.make(sampling, 0), self.scorer()
        vocab_size, slack = source.manifest.tokenizer.vocab_size, self.tolerance / sampling.temperature
        if scorer is None or vocab_size > _LARGEST_VOCABULARY:
            pytest.skip("there is no scorer to compare them with, or its vocabulary is large")
        for prompt in self.prompts()[:2]:
            rollouts = source.sample([prompt])
            truth_V = _next_logprobs(scorer, prompt.token_ids, vocab_size) / sampling.temperature
            truth_V -= np.logaddexp.reduce(truth_V)
            own_R = truth_V[[int(rollout.response_ids[0]) for rollout in rollouts]]
            # rounding may take some more tokens than top_p, or some fewer
            most_N, fewest_N = (_nucleus(truth_V, sampling.top_p + off) for off in (slack, -slack))
            assert own_R.min() >= most_N.min(), "a token is drawn that top_p at this temperature leaves out"
            mass = np.exp(most_N).sum()
            mean = (np.exp(most_N) * most_N).sum() / mass
            spread = np.sqrt(len(own_R) * (np.exp(most_N) * (most_N - mean) ** 2).sum() / mass)
            assert abs(own_R.sum() - len(own_R) * mean) <= 5 * spread + 1, "they are drawn from another distribution"
            drawn = [rollout.sampler_logprobs[0] for rollout in rollouts if rollout.sampler_logprobs is not None]
            if drawn:
                low_R, high_R = (own_R - np.logaddexp.reduce(logprobs_N) for logprobs_N in (most_N, fewest_N))
                gap = np.abs(np.array(drawn, np.float64) - np.clip(drawn, low_R, high_R)).mean()
                assert gap <= slack, f"{prompt.prompt_id}: {gap} nats"

    def _keeping(self, sampling: SamplingParams) -> RolloutSource:
        try:
            return self.make(sampling, 0)
        except InvalidRecordError as error:
            pytest.skip(f"it keeps no such candidates: {error}")

    @pytest.mark.parametrize(("candidates", "drawn"), [(3, 0), (0, 5), (2, 3)])
    def test_keeping_candidates_changes_no_token_and_the_same_call_keeps_the_same(self, candidates: int, drawn: int) -> None:
        source = self._keeping(evolve(_SAMPLING, candidates=candidates, drawn=drawn))
        plain, kept, again = self._sample(), source.sample(self.prompts()), source.sample(self.prompts())
        assert _contents(kept) == _contents(plain)
        assert all(rollout.candidates is None for rollout in plain), "they were not asked for"
        for rollout, repeated in zip(kept, again, strict=True):
            support = _support(rollout)
            assert (support.ids.shape, support.drawn) == ((rollout.response_ids.size, candidates + drawn), drawn)
            assert 0 <= support.ids.min() <= support.ids.max() < source.manifest.tokenizer.vocab_size
            np.testing.assert_array_equal(support.ids, _support(repeated).ids)

    @pytest.mark.parametrize(("candidates", "drawn"), [(4, 0), (2, 3)])
    def test_candidates_are_the_most_likely_tokens_at_temperature_1(self, candidates: int, drawn: int) -> None:
        source, scorer = self._keeping(evolve(_SAMPLING, temperature=2.0, candidates=candidates, drawn=drawn)), self.scorer()
        vocab_size = source.manifest.tokenizer.vocab_size
        if scorer is None or vocab_size > _LARGEST_VOCABULARY:
            pytest.skip("there is no scorer to compare them with, or its vocabulary is large")
        rollout = max(source.sample(self.prompts()), key=lambda rollout: rollout.response_ids.size)
        support = _support(rollout)
        for place in (0, rollout.response_ids.size - 1):
            truth_V = _next_logprobs(scorer, np.concatenate([rollout.prompt_ids, rollout.response_ids[:place]]), vocab_size)
            ids_K, logprobs_K = support.ids[place], support.logprobs[place].astype(np.float64)
            assert np.abs(truth_V[ids_K] - logprobs_K).mean() <= self.tolerance, "they have other log-probs than as responses"
            likely_C = logprobs_K[:candidates]
            assert np.abs(np.sort(truth_V)[::-1][:candidates] - likely_C).mean() <= self.tolerance, (
                "a likelier one is left out, or they are not in order"
            )
            assert abs(np.exp(likely_C).sum() + support.tail[place] - 1) <= max(self.tolerance, 1e-3), "the tail is not what they leave"

    def test_drawn_candidates_follow_the_policy_at_temperature_1_each_token_for_itself(self) -> None:
        supports = [_support(r) for r in self._keeping(evolve(_SAMPLING, temperature=0.3, candidates=1, drawn=16)).sample(self.prompts())]
        # the most likely token is drawn as often as the policy's probability
        likely_T = np.concatenate([1 - support.tail.astype(np.float64) for support in supports])
        seen_T = np.concatenate([(support.ids[:, 1:] == support.ids[:, :1]).sum(axis=1) for support in supports])
        spread = np.sqrt(16 * (likely_T * (1 - likely_T)).sum())
        assert abs(seen_T.sum() - 16 * likely_T.sum()) <= 5 * spread + 1, "they are drawn from another distribution"
        draws = [tuple(ids) for support in supports for ids in support.ids[:, 1:].tolist()]
        assert len(set(draws)) > len(draws) / 2, "tokens share their draws"

    def test_a_prompt_that_leaves_no_room_is_refused_and_named(self) -> None:
        prompt = self.too_long()
        if prompt is None:
            pytest.skip("it has no limit")
        with pytest.raises(ContextOverflowError, match=f"'{prompt.prompt_id}'"):
            self.make(_SAMPLING, 0).sample([*self.prompts(), prompt])

    def test_an_id_outside_the_vocabulary_is_refused_and_its_prompt_named(self) -> None:
        source = self.make(_SAMPLING, 0)
        with pytest.raises(InvalidRecordError, match="'outside'"):
            source.sample([*self.prompts(), _outside(source)])

    def test_a_call_that_is_refused_samples_nothing(self) -> None:
        source, before = self.make(_SAMPLING, 0), self.work()
        if before is None:
            pytest.skip("what it computes is not counted")
        for prompt in (self.too_long(), _outside(source)):
            if prompt is not None:
                with pytest.raises((ContextOverflowError, InvalidRecordError)):
                    source.sample([*self.prompts(), prompt])
        assert self.work() == before, "the prompts before the refused one were sampled, and paid for"
        source.sample(self.prompts())
        assert (self.work() or 0) > before, "`work` does not count"

    @pytest.mark.parametrize(("candidates", "drawn"), [(0, 0), (2, 0), (0, 2)])
    def test_what_it_gives_can_be_collected_and_collecting_again_changes_nothing(self, candidates: int, drawn: int) -> None:
        source = self._keeping(evolve(_SAMPLING, candidates=candidates, drawn=drawn))
        store = MemoryStore(source.manifest)
        collect_rollouts(source, self.prompts(), store)
        before = store.read(range(len(store)))
        assert len(before) == len(self.prompts()) * _SAMPLING.samples_per_prompt
        store.append(self._sample())
        assert _contents([row.rollout for row in store.read(range(len(store)))]) == _contents([row.rollout for row in before])


def _next_logprobs(scorer: TeacherScorer, before: NDArray[np.int32], vocab_size: int) -> NDArray[np.float64]:
    """Return (V,): the log-prob of every token after these."""
    nexts = [Rollout(f"next {token}", before, [token], [True], "length") for token in range(vocab_size)]
    return np.array([score.logprobs[0] for score in scorer.score(nexts)], np.float64)


def _nucleus(logprobs_V: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Return (N,): those of the most likely tokens that hold this much probability."""
    sorted_V = np.sort(logprobs_V)[::-1]
    return sorted_V[: int((np.cumsum(np.exp(sorted_V)) - np.exp(sorted_V) < top_p).sum())]


def _support(rollout: Rollout) -> TopK:
    assert rollout.candidates is not None, f"{rollout.rollout_id} has no candidates"
    return rollout.candidates


def _outside(source: RolloutSource) -> Prompt:
    return Prompt("outside", [source.manifest.tokenizer.vocab_size])


def _contents(rollouts: Sequence[Rollout]) -> list[tuple[str, bytes, str]]:
    return [(rollout.rollout_id, rollout.content_hash, rollout.finish_reason) for rollout in rollouts]


def _mean_gap(left: Sequence[Rollout], right: Sequence[Rollout]) -> float:
    names = ("behavior_logprobs", "sampler_logprobs")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names for a, b in zip(left, right, strict=True)]
    assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
    gaps = [np.abs(np.subtract(a, b, dtype=np.float64)) for a, b in pairs if a is not None and b is not None]
    return float(np.concatenate(gaps).mean()) if gaps else 0.0
