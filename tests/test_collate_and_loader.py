"""From ragged records to the batches of a step: what is aligned with what, what it weighs, and in which order it comes."""

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from attrs import evolve, fields
from helpers import (
    OTHER_TEACHER,
    POLICY,
    SFT_TEACHER,
    BigramLM,
    make_manifest,
    make_provenance,
    make_rollout,
    make_store,
    random_records,
    scored,
)
from hypothesis import given, settings
from torch import Tensor

from lopd import batches, collate, opd_steps
from lopd.backends.memory_store import MemoryStore
from lopd.errors import (
    InvalidRecordError,
    MissingScoresError,
    RepeatedRolloutsWarning,
    TeacherConsistencyError,
    TeacherConsistencyWarning,
)
from lopd.guards import ConsistencyPolicy
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.protocols import OPDLoss
from lopd.records import Batch, Lineage, LMHead, ModelId, Rollout, ScoredRollout, Step, StepMetrics, Weighting, by_rollout, by_token
from lopd.testing import tiny_top_k
from lopd.verbs import StepStream

POSITIONS, VOCAB = 12, 5
PLAIN = ReferenceOPDLoss(clip=None)
weightings = pytest.mark.parametrize("weighting", [by_rollout, by_token])
quick = settings(deadline=None, max_examples=40)


# --- alignment ---------------------------------------------------------------------------------------------------------------------------


def named_scores(rollout: Rollout) -> list[float]:
    """Scores that say which token of the rollout they belong to, exactly representable in float32."""
    start = rollout.prompt_ids.size
    return [-(16 * (start + t) + token) / 1024 for t, token in enumerate(rollout.response_ids.tolist())]


def named(value: float) -> tuple[int, int]:
    """The inverse: (position, token)."""
    return divmod(round(-1024 * value), 16)


def position_table_PV() -> Tensor:
    """Log-probs of a model that knows nothing but where a token stands; no two positions are alike."""
    return torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


def position_scores(rollout: Rollout) -> list[float]:
    """What that model says about each response token, counted from the start of the prompt."""
    start = rollout.prompt_ids.size
    return [float(position_table_PV()[start + t, token]) for t, token in enumerate(rollout.response_ids.tolist())]


def disagreement(batch: Batch) -> float:
    """The largest gradient of the plain loss where the model of the scores is also the student; 0 if all tokens meet their own score."""
    hidden_NP = torch.nn.functional.one_hot(batch.position_ids + 1, POSITIONS).double().requires_grad_()
    PLAIN(hidden_NP, LMHead(position_table_PV().T), batch).loss_sum.backward()
    assert hidden_NP.grad is not None
    return float(hidden_NP.grad.abs().max())


def records_scored_by(
    scorer: Callable[[Rollout], Sequence[float]], seed: int, count: int = 4, longest: int = 5, masked: float = 0.3
) -> list[ScoredRollout]:
    return [scored(r.rollout, {"teacher": scorer(r.rollout)}) for r in random_records(seed, count, VOCAB, longest, masked)]


@given(st.integers(0, 2**24), st.integers(1, 4), st.integers(1, 5))
@quick
def test_pain_02_each_score_stands_at_the_entry_that_predicts_its_token(seed: int, count: int, longest: int) -> None:
    batch = collate(records_scored_by(named_scores, seed, count, longest), by_token, teacher="teacher")
    assert batch.teacher_logprobs is not None
    rows = zip(batch.position_ids.tolist(), batch.targets.tolist(), batch.weight.tolist(), batch.teacher_logprobs.tolist(), strict=True)
    assert all(named(score) == (position + 1, target) for position, target, weight, score in rows if weight > 0)


@given(st.integers(0, 2**24), st.integers(1, 4), st.integers(1, 5))
@quick
def test_pain_02_a_student_that_is_the_teacher_finds_no_gap_at_any_token(seed: int, count: int, longest: int) -> None:
    assert disagreement(collate(records_scored_by(position_scores, seed, count, longest), by_token, teacher="teacher")) < 1e-6


def roll(values_N: Tensor | None, by: int) -> Tensor:
    assert values_N is not None
    return values_N.roll(by)


MISTAKES: dict[str, Callable[[Batch], Batch]] = {
    "scores one too late": lambda b: evolve(b, teacher_logprobs=roll(b.teacher_logprobs, 1)),
    "scores one too early": lambda b: evolve(b, teacher_logprobs=roll(b.teacher_logprobs, -1)),
    "targets not shifted": lambda b: evolve(b, targets=b.inputs),
    "weights one too early": lambda b: evolve(b, weight=b.weight.roll(-1)),
    "positions run on over the rollouts": lambda b: evolve(b, position_ids=torch.arange(b.inputs.numel()) % (POSITIONS - 1)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_pain_02_the_check_sees_every_shift_by_one(mistake: Callable[[Batch], Batch]) -> None:
    batch = collate(records_scored_by(position_scores, seed=3), by_token, teacher="teacher")
    assert disagreement(mistake(batch)) > 0.1


def test_two_packed_rollouts_look_like_this() -> None:
    first = scored(make_rollout("a", [10, 11, 12], [13, 14], [True, False]), {"t": [-1.0, -2.0], "r": [-3.0, -4.0]})
    second = scored(make_rollout("b", [20], [21, 22, 23], [True, True, True]), {"t": [-5.0, -6.0, -7.0], "r": [-8.0, -9.0, 0.0]})
    batch = collate([first, second], by_token, teacher="t", ref="r")
    assert batch.inputs.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert batch.targets.tolist() == [11, 12, 13, 14, 21, 22, 23]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.segment_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.weight.tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert batch.teacher_logprobs is not None
    assert batch.teacher_logprobs.tolist() == [0, 0, -1, -2, -5, -6, -7]
    assert batch.ref_logprobs is not None
    assert batch.ref_logprobs.tolist() == [0, 0, -3, -4, -8, -9, 0]


def test_a_batch_has_int64_ids_and_float32_values() -> None:
    records = [evolve(r, top_k={"teacher": tiny_top_k(r.rollout.response_ids.size)}) for r in random_records(0, 2)]
    batch = collate(records, teacher="teacher", ref="ref", top_k="teacher")
    assert {f.name: str(getattr(batch, f.name).dtype).removeprefix("torch.") for f in fields(Batch)} == {
        **dict.fromkeys(["inputs", "targets", "position_ids", "segment_ids", "top_k_ids"], "int64"),
        **dict.fromkeys(["weight", "teacher_logprobs", "ref_logprobs", "top_k_logprobs", "top_k_tail"], "float32"),
    }


def test_pain_02_one_prompt_token_and_one_response_token_give_one_prediction() -> None:
    batch = collate([scored(make_rollout("a", [7], [9]), {"t": [-0.5]})], teacher="t")
    assert batch.teacher_logprobs is not None
    columns = (batch.inputs, batch.targets, batch.position_ids, batch.weight, batch.teacher_logprobs)
    assert [column.tolist() for column in columns] == [[7], [9], [0], [1.0], [-0.5]]


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]])
@pytest.mark.parametrize("mask", [[True, False, False, True, True], [False, True, False, True, False], [False, False, False, False, True]])
def test_pain_21_masked_tokens_inside_a_response_do_not_shift_scores(prompt: list[int], mask: list[bool]) -> None:
    rollout = make_rollout("multi-turn", prompt, [4, 0, 3, 1, 2], mask)
    batch = collate([scored(rollout, {"teacher": named_scores(rollout)})], by_token, teacher="teacher")
    assert batch.teacher_logprobs is not None
    counted = [named(score) for score, weight in zip(batch.teacher_logprobs.tolist(), batch.weight.tolist(), strict=True) if weight > 0]
    tokens = [*prompt, 4, 0, 3, 1, 2]
    assert counted == [(len(prompt) + t, tokens[len(prompt) + t]) for t, counts in enumerate(mask) if counts]


def test_pain_21_a_masked_token_is_still_read_as_context() -> None:
    batch = collate([scored(make_rollout("multi-turn", [1], [2, 3, 4], [True, False, True]), {})])
    assert batch.inputs.tolist() == [1, 2, 3]


def test_by_rollout_gives_each_rollout_weight_one_shared_by_its_counted_tokens() -> None:
    records = [scored(make_rollout("a", [1, 1], [2, 3, 4, 4], [True, False, True, False]), {}), scored(make_rollout("b", [1], [2]), {})]
    assert collate(records, by_rollout).weight.tolist() == [0, 0.5, 0, 0.5, 0, 1]


def test_by_token_gives_each_counted_token_weight_one() -> None:
    records = [scored(make_rollout("a", [1, 1], [2, 3, 4, 4], [True, False, True, False]), {}), scored(make_rollout("b", [1], [2]), {})]
    assert collate(records, by_token).weight.tolist() == [0, 1, 0, 1, 0, 1]


def test_rollouts_share_the_weight_alike_unless_told_otherwise() -> None:
    record = scored(make_rollout("a", [1], [2, 3]), {})
    assert collate([record]).weight.tolist() == [0.5, 0.5]
    assert batches(make_store([record]), teacher=None, rollouts_per_step=1).step(0).batches[0].weight.tolist() == [0.5, 0.5]


@weightings
def test_a_rollout_in_which_no_token_counts_weighs_nothing(weighting: Weighting) -> None:
    assert collate([scored(make_rollout("a", [1, 2], [3, 4], [False, False]), {})], weighting).weight.tolist() == [0, 0, 0]


def test_a_step_says_shapes_and_no_thousands_of_numbers() -> None:
    step = numbered_stream(4, 4).step(0)
    (batch,) = step.batches
    assert f"inputs=({batch.inputs.numel()},)" in repr(step)
    assert "ref_logprobs=None" in repr(step)
    assert len(repr(step)) < 400


def test_columns_that_were_not_asked_for_are_none() -> None:
    batch = collate(random_records(0, 2))
    assert batch.teacher_logprobs is None
    assert batch.ref_logprobs is None


def test_no_records_make_no_batch() -> None:
    with pytest.raises(InvalidRecordError, match="0 rollouts"):
        collate([])


@pytest.mark.parametrize("columns", [{"teacher": "big"}, {"ref": "big"}])
def test_a_record_without_the_column_is_named(columns: dict[str, Any]) -> None:
    records = [scored(make_rollout("has it", [1], [2]), {"big": [-1.0]}), scored(make_rollout("has it not", [1], [2]), {"small": [-1.0]})]
    with pytest.raises(MissingScoresError, match="'has it not': column 'big'"):
        collate(records, **columns)


# --- which rollouts are in step k --------------------------------------------------------------------------------------------------------


def numbered_records(count: int) -> list[ScoredRollout]:
    """Rollouts of different lengths whose first token is their row."""
    return [scored(make_rollout(f"r{i}", [i, 0], [1] * (1 + i % 4)), {"teacher": [-1.0] * (1 + i % 4)}) for i in range(count)]


def numbered_stream(count: int, per_step: int, seed: int = 0, start: int = 0, tokens_per_batch: int = 1000) -> StepStream:
    store = make_store(numbered_records(count), columns=("teacher",))
    return batches(store, rollouts_per_step=per_step, tokens_per_batch=tokens_per_batch, seed=seed)[start:]


def rows_of(step: Step) -> list[int]:
    return [row for batch in step.batches for row in batch.inputs[batch.position_ids == 0].tolist()]


def same_steps(left: Step, right: Step) -> bool:
    pairs = zip(left.batches, right.batches, strict=True)
    columns = [(getattr(a, f.name), getattr(b, f.name)) for a, b in pairs for f in fields(Batch)]
    return left.index == right.index and all(a is b is None or torch.equal(a, b) for a, b in columns)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))


repeating = pytest.mark.filterwarnings("ignore::lopd.errors.RepeatedRolloutsWarning")


@repeating
@given(sizes, st.integers(0, 2**31), st.integers(0, 12))
@quick
def test_starting_at_step_k_gives_what_iterating_to_it_gives(size: tuple[int, int], seed: int, k: int) -> None:
    reached = next(islice(numbered_stream(*size, seed=seed), k, None))
    started = next(iter(numbered_stream(*size, seed=seed, start=k)))
    assert reached.index == k
    assert same_steps(reached, started)
    assert same_steps(reached, numbered_stream(*size, seed=seed).step(k))


def test_iterating_twice_gives_the_same_steps_twice() -> None:
    stream = numbered_stream(7, 3)
    assert all(same_steps(a, b) for a, b in zip(islice(stream, 5), islice(stream, 5), strict=True))


@repeating
@given(sizes, st.integers(0, 2**31))
@quick
def test_each_epoch_visits_each_rollout_exactly_once(size: tuple[int, int], seed: int) -> None:
    count, per_step = size
    one_by_one = [row for step in islice(numbered_stream(count, 1, seed=seed), 3 * count) for row in rows_of(step)]
    epochs = [one_by_one[e * count : (e + 1) * count] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    for step in islice(numbered_stream(count, per_step, seed=seed), 3 * count // per_step):
        assert sorted(rows_of(step)) == sorted(one_by_one[step.index * per_step : (step.index + 1) * per_step])


@repeating
@given(sizes)
@quick
def test_each_step_has_as_many_rollouts_as_asked_for_even_over_the_end_of_an_epoch(size: tuple[int, int]) -> None:
    assert [len(rows_of(step)) for step in islice(numbered_stream(*size), 4)] == [size[1]] * 4


def test_a_step_larger_than_the_store_draws_a_warning_unless_nobody_asked_for_it() -> None:
    store = make_store(numbered_records(3), columns=("teacher",))
    with pytest.warns(RepeatedRolloutsWarning, match="a step has 4 rollouts, and there are 3 to train on") as caught:
        stream = batches(store, rollouts_per_step=4)
    assert caught[0].filename == __file__
    assert len(rows_of(stream.step(0))) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(rows_of(batches(store).step(0))) == [0, 1, 2]
        assert sorted(rows_of(batches(store, rollouts_per_step=3).step(1))) == [0, 1, 2]


def test_a_step_has_256_rollouts_where_there_are_more() -> None:
    assert len(rows_of(batches(make_store(numbered_records(300), columns=("teacher",))).step(0))) == 256


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = (rows_of(step) for step in islice(numbered_stream(50, 50, seed=0), 2))
    other = rows_of(numbered_stream(50, 50, seed=1).step(0))
    assert len({tuple(rows) for rows in (first, second, other, range(50))}) == 4


def test_a_step_is_one_read_whatever_it_is_split_into(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = numbered_stream(9, 7, tokens_per_batch=6)
    reads, original = list[int](), MemoryStore.read
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **names: reads.append(len(rows)) or original(self, rows, **names))
    assert len(stream.step(2).batches) > 2
    assert reads == [7]


def test_a_run_stops_before_step_stop() -> None:
    store = make_store(numbered_records(3))
    assert [step.index for step in batches(store, teacher=None, rollouts_per_step=2)[2:5]] == [2, 3, 4]


# --- how a step is split -----------------------------------------------------------------------------------------------------------------


@repeating
@given(sizes, st.integers(5, 40), st.integers(0, 100))
@quick
def test_micro_batches_hold_rollouts_of_like_length_as_many_as_fit_longest_first(size: tuple[int, int], cap: int, seed: int) -> None:
    split = numbered_stream(*size, seed=seed, tokens_per_batch=cap).step(0)
    lengths = [batch.segment_ids.bincount().tolist() for batch in split.batches]
    assert all(len(rows) * rows[0] <= cap for rows in lengths)
    assert all((len(rows) + 1) * rows[0] > cap for rows in lengths[:-1]), "a batch is closed only if one more would not fit"
    every = [length for rows in lengths for length in rows]
    assert every == sorted(every, reverse=True)
    assert sorted(rows_of(split)) == sorted(rows_of(numbered_stream(*size, seed=seed).step(0)))


def train(steps: Sequence[Step], loss: OPDLoss = PLAIN, lr: float = 0.1) -> tuple[Tensor, list[StepMetrics]]:
    """The parameters of a float64 student after plain gradient descent on these steps, and what the loop reported."""
    student = BigramLM(VOCAB, 3, seed=0)
    metrics = list(opd_steps(student, steps, loss, torch.optim.SGD(student.parameters(), lr=lr), max_grad_norm=None))
    return torch.cat([p.detach().flatten() for p in student.parameters()]), metrics


def train_on(records: list[ScoredRollout], weighting: Weighting, cap: int, loss: OPDLoss = PLAIN) -> tuple[Tensor, list[StepMetrics]]:
    """One step over all records, through a store."""
    stream = batches(
        make_store(records), rollouts_per_step=len(records), tokens_per_batch=cap, weighting=weighting, teacher="teacher", ref="ref"
    )[:1]
    return train(list(stream), loss)


def assert_same_parameters(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=0.0, atol=tolerance)


@weightings
@pytest.mark.parametrize("loss", [PLAIN, ReferenceOPDLoss(clip=1.0, ratio_to_ref=True), SFTLoss()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("cap", [9, 10, 17, 30])
def test_pain_14_splitting_a_step_into_micro_batches_changes_nothing(weighting: Weighting, loss: OPDLoss, cap: int) -> None:
    records = random_records(5, 9, VOCAB)
    whole, whole_metrics = train_on(records, weighting, 1000, loss)
    split, split_metrics = train_on(records, weighting, cap, loss)
    assert_same_parameters(whole, split)
    without_time = [[evolve(m, seconds=0.0) for m in metrics] for metrics in (whole_metrics, split_metrics)]
    for a, b in zip(*without_time, strict=True):
        assert (a.step, a.rollouts, a.tokens) == (b.step, b.rollouts, b.tokens)
        assert [a.loss, a.reverse_kl, a.clip_fraction, a.grad_norm] == pytest.approx([b.loss, b.reverse_kl, b.clip_fraction, b.grad_norm])


@weightings
@pytest.mark.parametrize("seed", range(3))
def test_pain_14_the_order_of_rollouts_changes_nothing(weighting: Weighting, seed: int) -> None:
    records = random_records(6, 9, VOCAB)
    shuffled = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
    assert_same_parameters(train_on(records, weighting, 20)[0], train_on(shuffled, weighting, 20)[0])


@weightings
def test_pain_14_packing_changes_nothing(weighting: Weighting) -> None:
    records = random_records(7, 9, VOCAB)
    packed = Step(0, (collate(records, weighting, teacher="teacher"),))
    alone = Step(0, tuple(collate([record], weighting, teacher="teacher") for record in records))
    assert_same_parameters(train([packed])[0], train([alone])[0])


@weightings
def test_pain_14_a_rollout_in_which_no_token_counts_takes_nothing_from_the_others(weighting: Weighting) -> None:
    records = random_records(8, 4, VOCAB)
    silent = scored(make_rollout("silent", [1, 2], [3, 4], [False, False]), {"teacher": [-1.0, -2.0]})
    with_it, without = (tuple(collate([r], weighting, teacher="teacher") for r in rs) for rs in ([*records, silent], records))
    assert_same_parameters(train([Step(0, with_it)])[0], train([Step(0, without)])[0])


def gradients_of_tokens(student: BigramLM, record: ScoredRollout) -> list[Tensor]:
    """For each counted token the gradient of half its squared gap to the teacher, one backward pass per token."""
    rollout = record.rollout
    tokens = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
    start = rollout.prompt_ids.size
    out = []
    for t in np.flatnonzero(rollout.loss_mask).tolist():
        gap = student.logprobs_VV()[tokens[start + t - 1], tokens[start + t]] - float(record.scores["teacher"][t])
        out.append(torch.cat([g.flatten() for g in torch.autograd.grad(gap.square() / 2, list(student.parameters()))]))
    return out


@pytest.mark.parametrize("cap", [9, 1000])
def test_pain_14_by_rollout_the_step_is_the_mean_over_rollouts_of_their_token_means(cap: int) -> None:
    records, start = random_records(9, 6, VOCAB), BigramLM(VOCAB, 3, seed=0)
    expected = torch.stack([torch.stack(gradients_of_tokens(start, record)).mean(0) for record in records]).mean(0)
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert_same_parameters(train_on(records, by_rollout, cap)[0], before - 0.1 * expected, tolerance=1e-7)


@pytest.mark.parametrize("cap", [9, 1000])
def test_pain_14_by_token_the_step_is_the_mean_over_all_counted_tokens(cap: int) -> None:
    records, start = random_records(9, 6, VOCAB), BigramLM(VOCAB, 3, seed=0)
    expected = torch.stack([g for record in records for g in gradients_of_tokens(start, record)]).mean(0)
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert_same_parameters(train_on(records, by_token, cap)[0], before - 0.1 * expected, tolerance=1e-7)


def test_pain_14_the_check_sees_a_mean_taken_in_each_micro_batch() -> None:
    def averaged(batch: Batch) -> Batch:
        return evolve(batch, weight=batch.weight / batch.weight.sum())

    records = random_records(7, 9, VOCAB)
    parts = tuple(averaged(collate(part, by_token, teacher="teacher")) for part in (records[:2], records[2:]))
    whole = averaged(collate(records, by_token, teacher="teacher"))
    assert float((train([Step(0, parts)])[0] - train([Step(0, (whole,))])[0]).abs().max()) > 1e-3


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


def test_an_empty_store_is_refused() -> None:
    with pytest.raises(InvalidRecordError, match="0 rollouts"):
        batches(make_store([]))


@pytest.mark.parametrize("wanted", [{"teacher": "teacher"}, {"teacher": None, "ref": "teacher"}])
def test_a_column_with_a_gap_is_refused(wanted: dict[str, Any]) -> None:
    records = numbered_records(3)
    records[1] = ScoredRollout(records[1].rollout, {})
    with pytest.raises(MissingScoresError, match="column 'teacher' has scores for 2 rollouts, expected 3"):
        batches(make_store(records, columns=("teacher",)), **wanted)


@pytest.mark.parametrize("wanted", [{"teacher": "nobody"}, {"ref": "nobody"}])
def test_a_column_that_is_not_there_is_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(MissingScoresError, match=r"column 'nobody' is absent, expected one of \['teacher', 'behavior'\]"):
        batches(make_store(numbered_records(3), columns=("teacher",)), **wanted)


def test_a_rollout_longer_than_the_cap_is_refused_and_one_as_long_as_the_cap_is_not() -> None:
    store = make_store(numbered_records(4), columns=("teacher",))
    step = batches(store, tokens_per_batch=5, rollouts_per_step=4).step(0)
    assert max(batch.inputs.numel() for batch in step.batches) == 5
    with pytest.raises(InvalidRecordError, match=r"Rollout .*: it has 5 positions, expected at most tokens_per_batch = 4"):
        batches(store, tokens_per_batch=4)


def test_a_step_in_which_no_token_counts_is_refused() -> None:
    batch = collate([scored(make_rollout("a", [1], [2], [False]), {"teacher": [-1.0]})], teacher="teacher")
    with pytest.raises(InvalidRecordError, match="Step 4: the weight of its tokens is 0"):
        train([Step(4, (batch,))])


# --- teacher consistency -----------------------------------------------------------------------------------------------------------------


def stream_with(sft_teacher: ModelId | None, scorer: ModelId, consistency: ConsistencyPolicy = ConsistencyPolicy.ERROR) -> StepStream:
    manifest = make_manifest(sft_teacher)
    store = make_store(numbered_records(2), columns=("teacher",), manifest=manifest, provenance=lambda _: make_provenance(scorer))
    return batches(store, consistency=consistency)


def test_the_teacher_that_wrote_the_sft_data_may_score() -> None:
    assert stream_with(SFT_TEACHER, SFT_TEACHER).lineage == Lineage(sft_teacher=SFT_TEACHER, opd_teacher=SFT_TEACHER)


def test_the_same_weights_pass_under_any_name_and_dtype() -> None:
    renamed = ModelId("a mirror of it", SFT_TEACHER.revision, "float8")
    assert stream_with(SFT_TEACHER, renamed).lineage.opd_teacher == renamed


def test_another_teacher_is_refused() -> None:
    with pytest.raises(
        TeacherConsistencyError, match=r"its SFT teacher is big-teacher@teacher-weig, expected .* other-teacher@other-weight"
    ):
        stream_with(SFT_TEACHER, OTHER_TEACHER)


def test_the_same_teacher_in_another_dtype_is_told_so() -> None:
    rounded = ModelId(SFT_TEACHER.name, "weights:rounded", "bfloat16")
    with pytest.raises(
        TeacherConsistencyError, match="if it is that model in bfloat16, score with it in float32, for rounded weights are another"
    ):
        stream_with(evolve(SFT_TEACHER, dtype="float32"), rounded)


def test_other_weights_under_the_same_name_are_refused() -> None:
    with pytest.raises(TeacherConsistencyError, match="SFT teacher is big-teacher"):
        stream_with(SFT_TEACHER, ModelId(SFT_TEACHER.name, "newer-weights", SFT_TEACHER.dtype))


def test_an_unknown_sft_teacher_is_refused() -> None:
    with pytest.raises(TeacherConsistencyError, match="its SFT teacher is not recorded"):
        stream_with(None, SFT_TEACHER)


@pytest.mark.parametrize("sft_teacher", [None, OTHER_TEACHER])
def test_under_the_warn_policy_training_goes_on_with_a_warning_and_an_honest_lineage(sft_teacher: ModelId | None) -> None:
    with pytest.warns(TeacherConsistencyWarning, match="its SFT teacher is") as caught:
        stream = stream_with(sft_teacher, SFT_TEACHER, ConsistencyPolicy.WARN)
    assert [warning.filename for warning in caught] == [__file__]
    assert stream.lineage == Lineage(sft_teacher=sft_teacher, opd_teacher=SFT_TEACHER)
    assert len(rows_of(stream.step(0))) == 2


def test_a_consistent_teacher_draws_no_warning_under_the_warn_policy() -> None:
    stream_with(SFT_TEACHER, SFT_TEACHER, ConsistencyPolicy.WARN)


@pytest.mark.parametrize("sft_teacher", [None, OTHER_TEACHER])
def test_sft_needs_no_scores_and_makes_the_writer_of_the_rollouts_the_sft_teacher(sft_teacher: ModelId | None) -> None:
    stream = batches(make_store(numbered_records(2), columns=(), manifest=make_manifest(sft_teacher)), teacher=None)
    assert stream.lineage == Lineage(sft_teacher=POLICY, opd_teacher=None)
    assert stream.step(0).batches[0].teacher_logprobs is None


def test_a_ref_column_is_read_beside_the_teacher_and_is_no_matter_of_consistency() -> None:
    batch = batches(make_store(random_records(0, 3)), ref="ref", rollouts_per_step=3).step(0).batches[0]
    assert batch.teacher_logprobs is not None
    assert batch.ref_logprobs is not None
    assert not torch.equal(batch.teacher_logprobs, batch.ref_logprobs)


def test_a_ref_column_of_another_model_than_the_policy_is_refused() -> None:
    store = make_store(random_records(0, 3), provenance=lambda _: make_provenance(SFT_TEACHER))
    with pytest.raises(InvalidRecordError, match=r"'ref' was scored by big-teacher.*expected the policy"):
        batches(store, ref="ref", rollouts_per_step=3)


def test_a_store_that_grows_changes_no_step_of_a_run_that_has_begun() -> None:
    store = make_store(numbered_records(4), columns=("teacher",))
    stream = batches(store, rollouts_per_step=3)
    before = rows_of(stream.step(5))
    store.append([record.rollout for record in numbered_records(6)])
    assert rows_of(stream.step(5)) == before


@pytest.mark.parametrize("wrong", [{"rollouts_per_step": 2.0}, {"tokens_per_batch": 1e4}])
def test_a_number_that_is_no_whole_one_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRecordError, match="expected a whole number"):
        batches(make_store(numbered_records(2), columns=("teacher",)), **wrong)


def test_a_slice_is_a_part_of_the_run_by_the_numbers_of_its_steps() -> None:
    stream = batches(make_store(numbered_records(5), columns=("teacher",)), rollouts_per_step=2)
    whole = [rows_of(stream.step(index)) for index in range(9)]
    for part, numbers in (
        (stream[2:5], [2, 3, 4]),
        (stream[:3], [0, 1, 2]),
        (stream[4:][:6], [4, 5]),
        (stream[:6][2:], [2, 3, 4, 5]),
        (stream[3:3], []),
    ):
        steps = list(part)
        assert [step.index for step in steps] == numbers
        assert [rows_of(step) for step in steps] == [whole[index] for index in numbers]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (slice(-1, None), "start is -1, expected at least 0"),
        (slice(None, -2), "stop is -2, expected at least 0"),
        (slice(1.5, None), "start is 1.5, expected a whole number"),
        (slice(None, 1.5), "stop is 1.5, expected a whole number"),
        (slice(0, 9, 2), "a step of 2, expected every step"),
    ],
)
def test_a_slice_that_makes_no_sense_is_refused(part: slice, message: str) -> None:
    stream = batches(make_store(numbered_records(2), columns=("teacher",)))
    with pytest.raises(InvalidRecordError, match=message):
        stream[part]


def test_the_name_of_a_weighting_is_none() -> None:
    with pytest.raises(InvalidRecordError, match="weighting is 'by_token', expected a function"):
        batches(make_store(numbered_records(2), columns=("teacher",)), weighting="by_token")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"rollouts_per_step": 0}, {"seed": -1}, {"tokens_per_batch": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRecordError, match="expected at least"):
        batches(make_store(numbered_records(2), columns=("teacher",)), **wrong)


@pytest.mark.parametrize(
    "weighting", [lambda mask: np.ones(len(mask) + 1), lambda mask: -by_token(mask), lambda mask: by_token(mask) * np.nan]
)
def test_a_weighting_that_gives_no_weights_is_refused_and_the_rollout_named(weighting: Weighting) -> None:
    (record,) = numbered_records(1)
    with pytest.raises(InvalidRecordError, match=repr(record.rollout.rollout_id)):
        collate([record], weighting, teacher="teacher")
