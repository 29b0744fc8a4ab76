"""What vLLM's answers hold of the machine's memory: calls are cut where they would be too much, and no answer outlives its call."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from test_candidates import with_candidates
from test_vllm_life import fake, folder, scorer_of  # noqa: F401

from lopd.engines.vllm import VLLMScorer, VLLMSettings, VLLMSource, nouns, reading
from lopd.errors import EngineError
from lopd.records import Prompt, SamplingParams


class Answer(SimpleNamespace):
    """What one prompt gets; weak references to it are possible."""


def test_scores_come_in_as_many_calls_as_their_log_probs_need_and_no_answer_outlives_its_call(fake, folder, rollouts, monkeypatch):
    real, answers, alive = fake.answer, [], []

    def answer(ids, params):
        made = Answer(**vars(real(ids, params)))
        made.prompt_logprobs.logprobs = [-float(token + len(ids)) for token in ids[1:]]
        answers.append(weakref.ref(made))
        alive.append(sum(one() is not None for one in answers))
        return made

    monkeypatch.setattr(fake, "answer", answer)
    whole = scorer_of(folder).score(rollouts)
    assert (fake.requests, max(alive)) == ([7], 7)
    fake.requests.clear()
    alive.clear()
    monkeypatch.setattr(reading, "_ENTRIES", 3 * max(map(len, rollouts)))
    parts = scorer_of(folder).score(rollouts)
    assert sum(fake.requests) == 7
    assert len(fake.requests) > 1
    assert max(alive) == max(fake.requests) < 7
    assert [(s.rollout_id, s.logprobs.tolist()) for s in parts] == [(s.rollout_id, s.logprobs.tolist()) for s in whole]
    # a token has 5 entries: its own, the 3 ids that are asked for, and its own among those
    fake.requests.clear()
    with pytest.raises(EngineError, match="vLLM gave log-probs of other ids"):
        VLLMScorer.from_folder(folder, candidates=3).score([with_candidates(rollout) for rollout in rollouts])
    assert fake.requests == [1]


@pytest.mark.parametrize(("side_by_side", "calls"), [(2, [3, 3, 3, 3]), (5, [6, 6]), (13, [12])])
def test_rollouts_come_in_as_many_calls_as_their_log_probs_need_with_vllm_full_in_each(side_by_side, calls, fake, folder, monkeypatch):
    answers, alive = [], []

    def answer(_ids, params):
        # a token that says whose random stream drew it, and the most likely one
        flat = SimpleNamespace(start_indices=[0], end_indices=[2], token_ids=[10 + params.seed % 20, 9], logprobs=[-2.0, -0.5])
        completion = SimpleNamespace(token_ids=flat.token_ids[:1], logprobs=flat, finish_reason="length")
        made = Answer(prompt_token_ids=_ids, outputs=[completion])
        answers.append(weakref.ref(made))
        alive.append(sum(one() is not None for one in answers))
        return made

    monkeypatch.setattr(fake, "answer", answer)
    sampling = SamplingParams(max_new_tokens=8, samples_per_prompt=4, candidates=1)
    source = VLLMSource.from_folder(folder, sampling, VLLMSettings(options={"max_num_seqs": side_by_side}))
    prompts = [Prompt(f"p{i}", [5 + i]) for i in range(3)]
    whole = source.sample(prompts)
    assert fake.requests == [12]
    fake.requests.clear()
    alive.clear()
    # 12 rollouts of up to 8 tokens with 2 entries each
    monkeypatch.setattr(nouns, "_ENTRIES", 60)
    parts = source.sample(prompts)
    assert fake.requests == calls
    assert max(alive) == max(calls)
    assert [r.rollout_id for r in parts] == [r.rollout_id for r in whole]
    assert len({r.response_ids.item() for r in whole}) > 4
    for part, one in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(part.response_ids, one.response_ids)
        np.testing.assert_array_equal(part.candidates.ids, one.candidates.ids)
