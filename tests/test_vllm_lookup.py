"""Log-probs of asked ids among those that vLLM gives for a position."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopd.engines.supports import entries, look_up
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
