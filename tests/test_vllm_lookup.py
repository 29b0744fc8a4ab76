"""Log-probs of asked ids among those that vLLM gives for a position."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopd.engines.asked import FIRST, IDS
from lopd.engines.vllm.reading import entries, look_up
from lopd.engines.vllm.worker import WorkerExtension
from lopd.errors import EngineError, LopdError


def flat_of(positions):
    """Return the log-probs of positions, each a list of (id, log-prob), as vLLM lays them out."""
    ends = np.cumsum([len(p) for p in positions]).tolist()
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[i for p in positions for i, _ in p],
        logprobs=[v for p in positions for _, v in p],
    )


@given(st.data())
def test_tokens_are_found_by_id_in_whatever_order_and_however_often_they_come(data):
    k = data.draw(st.integers(0, 4))
    positions, tokens, truth = [], [], []
    for _ in range(data.draw(st.integers(1, 4))):
        values = data.draw(st.lists(st.floats(-20, -0.125, width=32), min_size=6, max_size=6, unique=True))
        token = data.draw(st.integers(0, 5))
        best = sorted(range(6), key=lambda i: -values[i])[:k]
        given_ids = [token, *best] if data.draw(st.booleans()) or token not in best else best
        positions.append([(i, values[i]) for i in data.draw(st.permutations(given_ids))])
        tokens.append(token)
        truth.append((values, best))
    logprobs_T, ids_TK, candidates_TK = look_up("r", np.array(tokens), *entries(flat_of([[], *positions]), first=1), top_k=k)
    for t, (values, best) in enumerate(truth):
        assert logprobs_T[t] == np.float32(values[tokens[t]])
        assert ids_TK[t].tolist() == best
        assert candidates_TK[t].tolist() == [np.float32(values[i]) for i in best]


def test_a_sampled_token_beside_the_most_likely_ones_is_not_among_them_for_being_as_likely_as_the_last():
    beside, among = [(9, -2.0), (5, -1.0), (7, -2.0)], [(7, -2.0), (5, -1.0), (7, -2.0)]
    _, ids_TK, _ = look_up("r", np.array([9, 7]), *entries(flat_of([beside, among])), top_k=2)
    assert ids_TK.tolist() == [[5, 7], [5, 7]]


def test_a_token_that_is_not_there_or_too_few_candidates_are_errors():
    flat = flat_of([[(3, -1.0), (4, -2.0)], [(5, -1.0)]])
    with pytest.raises(EngineError, match=r"r: response token 1 is id 6, which is not among"):
        look_up("r", np.array([3, 6]), *entries(flat), top_k=0)
    with pytest.raises(EngineError, match=r"r: response token 1 has 1 candidates, expected at least 2"):
        look_up("r", np.array([3, 5]), *entries(flat), top_k=2)
    assert issubclass(EngineError, LopdError)


def test_a_position_without_entries_is_a_missing_token_and_not_another_ones():
    with pytest.raises(EngineError, match=r"response token 0 is id 3"):
        look_up("r", np.array([3, 3]), *entries(flat_of([[], [(3, -1.0)]])), top_k=0)
    with pytest.raises(EngineError, match=r"response token 0 is id 3"):
        look_up("r", np.array([3]), *entries(flat_of([[]])), top_k=0)


@pytest.mark.parametrize(("start", "rows"), [(0, [0]), (1, [0, 0, 1]), (3, [1, 2]), (2, [0, 1, 2, 3])])
def test_a_worker_takes_of_the_ids_asked_for_those_of_the_part_of_a_prompt_that_it_reads(start, rows):
    ids, tokens = [[1, 2], [3, 4], [5, 6], [7, 8]], torch.zeros(len(rows), 1, dtype=torch.int32)
    # the rest of a long prompt need not be looked at again in each of its parts
    asked = {IDS: [row if i in rows else None for i, row in enumerate(ids)], FIRST: 2}
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=asked), num_computed_tokens=start)
    given = namedtuple("Given", "logprob_token_ids logprobs")
    sampler = SimpleNamespace(gather_logprobs=lambda logprobs, width, tokens: given(tokens, logprobs[:, :width]))
    runner = SimpleNamespace(num_prompt_logprobs={"r": 3}, requests={"r": request}, sampler=sampler)
    runner._get_prompt_logprobs_dict = lambda logprobs: {"r": sampler.gather_logprobs(logprobs, 3, tokens)}
    worker = WorkerExtension()
    worker.model_runner = runner
    assert worker.lopd_read_asked()
    logprobs = torch.randn(len(rows), 9)
    made = runner._get_prompt_logprobs_dict(logprobs)["r"]
    assert made.logprob_token_ids.tolist() == [[0, *ids[row]] for row in rows]
    assert torch.equal(made.logprobs[:, 1:], torch.stack([logprobs[i, ids[row]] for i, row in enumerate(rows)]))
