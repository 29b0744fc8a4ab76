"""The steps of a run: which rollouts are in step k, how a step is split, and what is refused."""

import pickle
import threading
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from attrs import evolve, fields
from helpers import BigramLM, make_rollout, make_store, random_records, scored
from hypothesis import given
from named_batches import PLAIN, VOCAB, numbered_records, numbered_stream, quick, rows_of, weightings
from torch import Tensor

from lopd import ConsistencyPolicy, SamplingParams, batches, collate, opd_steps
from lopd.backends.memory_store import MemoryStore
from lopd.errors import InvalidRecordError, MissingScoresError, RepeatedRolloutsWarning
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.protocols import OPDLoss
from lopd.records import Batch, Prompt, ScoredRollout, Step, StepMetrics, Weighting, by_rollout, by_token
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.verbs import loader
from lopd.verbs.columns import Columns

# --- which rollouts are in step k --------------------------------------------------------------------------------------------------------


def same_steps(left: Step, right: Step) -> bool:
    pairs = zip(left.batches, right.batches, strict=True)
    columns = [(getattr(a, f.name), getattr(b, f.name)) for a, b in pairs for f in fields(Batch)]
    return left.index == right.index and all(a is b is None or torch.equal(a, b) for a, b in columns)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))
repeating = pytest.mark.filterwarnings("ignore::lopd.errors.RepeatedRolloutsWarning")
pytestmark = pytest.mark.filterwarnings("ignore::lopd.errors.DriftWarning")  # the log-probs are random


@repeating
@given(sizes, st.integers(0, 2**31), st.integers(0, 12))
@quick
def test_starting_at_step_k_gives_what_iterating_to_it_gives(size: tuple[int, int], seed: int, k: int) -> None:
    reached = next(islice(numbered_stream(*size, seed=seed), k, None))
    started = next(iter(numbered_stream(*size, seed=seed, start=k)))
    assert reached.index == k
    assert same_steps(reached, started)
    assert same_steps(reached, numbered_stream(*size, seed=seed).step(k))


def test_steps_made_and_looked_at_in_inference_mode_are_trained_on_later() -> None:
    with torch.inference_mode():
        steps = [numbered_stream(5, 3).step(0), *numbered_stream(5, 3)[1:2]]
        assert "tokens that count" in str(steps[0].batches[0])
        assert not steps[0].batches[0].to("meta").inputs.is_inference()
    metrics = train(steps, SFTLoss())[1]
    assert [step.step for step in metrics] == [0, 1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend that there is a GPU, which a thread reads ahead for; return the threads in which memory was pinned."""
    threads: list[str] = []

    def pin(values: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return values.clone()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return threads


def test_steps_that_a_thread_reads_ahead_are_the_same(gpu: list[str]) -> None:
    stream = numbered_stream(7, 3)
    assert all(same_steps(step, stream.step(index)) for index, step in enumerate(islice(stream, 9)))
    assert gpu
    assert "MainThread" not in gpu
    assert [step.index for step in stream[4:7]] == [4, 5, 6]
    assert list(stream[3:3]) == []


def test_a_card_that_this_process_does_not_use_pins_nothing(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stream = iter(numbered_stream(7, 3))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # it is asked when the run begins, and not when the stream is made
    assert [next(stream).index for _ in range(3)] == [0, 1, 2]
    assert gpu == []


class Reads:
    """A store that records in which thread it is read and how many read at once, and cannot be where it is one of these rows."""

    def __init__(self, store: MemoryStore, damaged: set[int]) -> None:
        self._store, self._damaged = store, damaged
        self.threads: list[str] = []
        self.under_way: list[str] = []
        self.at_once = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def read(self, rows: Sequence[int], /, **columns: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        self.under_way.append(self.threads[-1])
        self.at_once = max(self.at_once, len(self.under_way))
        time.sleep(0.005)
        self.under_way.pop()
        if set(rows) == self._damaged:
            raise MissingScoresError("it cannot be read")
        return self._store.read(rows, **columns)


def test_an_error_of_the_thread_comes_with_its_step_and_no_thread_is_left(gpu: list[str]) -> None:
    stream = numbered_stream(12, 3)
    store = Reads(make_store(numbered_records(12)), damaged=set(rows_of(stream.step(3))))
    reached: list[int] = []

    def read() -> None:
        for step in evolve(stream, store=store):
            reached.append(step.index)

    with pytest.raises(MissingScoresError, match="it cannot be read"):
        read()
    assert reached == [0, 1, 2]
    assert "MainThread" not in store.threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lopd-overlap")]


def test_a_run_that_ends_early_ends_the_thread_and_reads_at_most_two_steps_ahead(gpu: list[str]) -> None:
    store = Reads(make_store(numbered_records(7)), damaged=set())
    steps = iter(evolve(numbered_stream(7, 3), store=store))
    next(steps)
    del steps
    assert 1 <= len(store.threads) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lopd-overlap")]


def test_one_thread_at_a_time_reads_the_store(gpu: list[str]) -> None:
    store = Reads(make_store(numbered_records(12)), damaged=set())
    assert len(list(evolve(numbered_stream(12, 3), store=store)[:9])) == 9
    assert store.at_once == 1


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


@pytest.mark.parametrize("first", [3, 10, 2**40])
def test_rows_that_begin_with_a_step_are_each_trained_on_once_in_their_first_epoch(first: int) -> None:
    store = make_store(numbered_records(40), columns=("teacher",))
    stream = batches(store, rows=np.arange(40), first=first, rollouts_per_step=4, seed=5)
    begun = [rows_of(step) for step in stream[first : first + 10]]
    assert sorted(row for rows in begun for row in rows) == list(range(40))
    assert [step.index for step in islice(stream, 2)] == [first, first + 1]
    assert same_steps(stream.step(first + 7), next(iter(stream[first + 7 :])))
    assert begun != [rows_of(step) for step in batches(store, rollouts_per_step=4, seed=5)[:10]], "each round has an order of its own"
    assert stream[:first].stop == first
    assert list(stream[:first]) == []


def test_without_a_first_step_the_order_is_that_of_before() -> None:
    store = make_store(numbered_records(10), columns=("teacher",))
    places = [np.random.default_rng((5, epoch)).permutation(10).tolist() for epoch in range(2)]
    for stream in (batches(store, rollouts_per_step=5, seed=5), batches(store, rollouts_per_step=5, seed=5, first=0)):
        assert [sorted(rows_of(stream.step(k))) for k in range(4)] == [sorted(epoch[i : i + 5]) for epoch in places for i in (0, 5)]


@pytest.mark.parametrize("ask", [lambda stream: stream[3:], lambda stream: stream.step(3)])
def test_a_step_before_the_first_one_is_refused(ask: Any) -> None:
    stream = batches(make_store(numbered_records(7), columns=("teacher",)), rollouts_per_step=2, first=4)
    with pytest.raises(InvalidRecordError, match=r"Steps on rows that begin with step 4 \(`first`\): \w+ is 3, expected at least 4"):
        ask(stream)
    with pytest.raises(InvalidRecordError, match="Steps: first is -1"):
        batches(stream.store, first=-1)


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


def test_a_step_with_very_many_values_is_read_a_few_micro_batches_at_a_time_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = numbered_stream(9, 7, tokens_per_batch=6)
    whole, reads, original = stream.step(2), list[int](), MemoryStore.read
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **names: reads.append(len(rows)) or original(self, rows, **names))
    monkeypatch.setattr(loader, "VALUES_AT_ONCE", 12)
    assert same_steps(stream.step(2), whole)
    assert 1 < len(reads) < len(whole.batches)
    assert sum(reads) == 7
    support, columns, item = MemoryStore(tiny_manifest()), Columns(("teacher",), None, top_k=True), tiny_rollout("p0/s0/g0")
    support.append([item])
    support.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(item), top_k=tiny_top_k(3))])
    assert columns.width(support) == 2
    assert evolve(columns, top_k=False).width(support) == 1


def test_no_step_asks_the_store_for_the_lengths_of_all_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, asked, original = numbered_stream(9, 7, tokens_per_batch=6), list[int](), MemoryStore.lengths
    monkeypatch.setattr(MemoryStore, "lengths", lambda self: asked.append(len(self)) or original(self))
    assert len(list(pickle.loads(pickle.dumps(stream))[:10])) == len(list(stream[:10])) == 10  # noqa: S301 (its own)
    assert asked == []


@pytest.mark.filterwarnings("ignore::lopd.errors.TeacherConsistencyWarning")
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_policy_may_be_one_of_several_teachers(seed: int) -> None:
    policy = tiny_manifest().policy
    store, rollouts = MemoryStore(tiny_manifest()), [tiny_rollout(f"p{i}/s0/g0") for i in range(6)]
    store.append(rollouts)
    for column, model in (("A", tiny_provenance("A", 2).model), ("P", policy)):
        provenance = evolve(tiny_provenance(column, 2), model=model)
        logprob = -1.0 if column == "A" else -2.0
        store.append_scores(column, provenance, [evolve(tiny_scores(r, logprob), top_k=tiny_top_k(3)) for r in rollouts])
    prompts = [Prompt(f"p{i}", [4]) for i in range(6)]
    teachers = {"A": prompts[:3], "P": prompts[3:]}
    stream = batches(store, teacher=teachers, ref="P", top_k=True, seed=seed, consistency=ConsistencyPolicy.WARN)
    (batch,) = stream.step(0).batches
    assert sorted(batch.teacher_logprobs.tolist()) == [-2.0] * 9 + [-1.0] * 9
    assert batch.ref_logprobs.tolist() == [-2.0] * 18
    assert batch.top_k_ids.shape == (18, 2)


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
    """Return the parameters of a float64 student after plain gradient descent on these steps, and what the loop reported."""
    student = BigramLM(VOCAB, 3, seed=0)
    metrics = list(opd_steps(student, steps, loss, torch.optim.SGD(student.parameters(), lr=lr), max_grad_norm=None))
    return torch.cat([p.detach().flatten() for p in student.parameters()]), metrics


def train_on(records: list[ScoredRollout], weighting: Weighting, cap: int, loss: OPDLoss = PLAIN) -> tuple[Tensor, list[StepMetrics]]:
    """Train one step over all records, through a store."""
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
        assert (a.step, a.rollouts, a.read_tokens) == (b.step, b.rollouts, b.read_tokens)
        assert [a.loss, a.reverse_kl, a.clip_fraction, a.grad_norm] == pytest.approx([b.loss, b.reverse_kl, b.clip_fraction, b.grad_norm])


# made-up scores of the reference policy are far from any model's
@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning")
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
    """Return for each counted token the gradient of half its squared gap to the teacher, one backward pass per token."""
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


@pytest.mark.parametrize(("wanted", "offered"), [({"teacher": "nobody"}, "'teacher'"), ({"ref": "nobody"}, "'teacher', 'behavior'")])
def test_a_column_that_is_not_there_is_refused(wanted: dict[str, Any], offered: str) -> None:
    with pytest.raises(MissingScoresError, match=rf"column 'nobody' is absent, expected one of \[{offered}\]"):
        batches(make_store(numbered_records(3), columns=("teacher",)), **wanted)


def test_a_rollout_longer_than_the_cap_is_refused_and_one_as_long_as_the_cap_is_not() -> None:
    store = make_store(numbered_records(4), columns=("teacher",))
    step = batches(store, tokens_per_batch=5, rollouts_per_step=4).step(0)
    assert max(batch.inputs.numel() for batch in step.batches) == 5
    with pytest.raises(InvalidRecordError, match=r"Rollout .*: it has 5 positions, expected at most tokens_per_batch = 4"):
        batches(store, tokens_per_batch=4)


def test_the_longest_response_that_is_sampled_by_default_fits_a_batch_by_default() -> None:
    longest = SamplingParams().max_new_tokens
    store = make_store([ScoredRollout(make_rollout("a", [1] * 1000, [2] * longest, [True] * longest), {})])
    assert batches(store, teacher=None).step(0).batches[0].inputs.numel() == 999 + longest


@pytest.mark.parametrize("index", [-1, 2.0, "3"])
def test_a_step_that_is_none_is_refused(index: Any) -> None:
    with pytest.raises(InvalidRecordError, match="Steps: index is"):
        batches(make_store(numbered_records(3)), teacher=None).step(index)


def test_a_step_in_which_no_token_counts_is_refused() -> None:
    batch = collate([scored(make_rollout("a", [1], [2], [False]), {"teacher": [-1.0]})], teacher="teacher")
    with pytest.raises(InvalidRecordError, match="Step 4: the weight of its tokens is 0"):
        train([Step(4, (batch,))])


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


@pytest.mark.parametrize(
    "weighting", [lambda mask: np.ones(len(mask) + 1), lambda mask: -by_token(mask), lambda mask: by_token(mask) * np.nan]
)
def test_a_weighting_that_gives_no_weights_is_refused_and_the_rollout_named(weighting: Weighting) -> None:
    (record,) = numbered_records(1)
    with pytest.raises(InvalidRecordError, match=repr(record.rollout.rollout_id)):
        collate([record], weighting, teacher="teacher")
