"""Rounds: Lightning and online OPD are their two ends, what is between samples when it should, and a killed run resumes in its round."""

import copy
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import asdict, evolve
from conftest import TOKENIZER_ID
from small_runs import Interrupted, Stopping

from lopd import (
    MemoryStore,
    ReferenceOPDLoss,
    SamplingParams,
    ZarrStore,
    batches,
    collect_rollouts,
    opd_steps,
    refresh_every,
    refresh_when,
    sample_round,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.student import CausalLMStudent
from lopd.errors import ConflictError, InvalidRecordError, TrainingWarning
from lopd.protocols.reading import rows_of
from lopd.records import Lineage

LOSS = ReferenceOPDLoss(ratio_to_ref=True)
PARAMS = SamplingParams(max_new_tokens=4, samples_per_prompt=3, stop_ids=(0, 5))


class Run:
    """A student on its way, and the rounds it makes: each samples all prompts with the weights of its moment."""

    def __init__(self, llama, near_teacher, tokenizer, prompts, store=None):
        self.student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-3)
        self.teacher, self.tokenizer, self.prompts = HFScorer(near_teacher, tokenizer), tokenizer, prompts
        self.store = store(self.source(0).manifest) if store else MemoryStore(self.source(0).manifest)
        self.rounds = []

    def source(self, generation):
        lineage = Lineage(sft_teacher=self.teacher.provenance.model)
        return HFSource(self.student.model, self.tokenizer, PARAMS, lineage, generation=generation)

    def make_round(self, generation, start):
        self.rounds.append((generation, start))
        rows = sample_round(self.source(generation), self.teacher, self.prompts, self.store)
        steps = batches(self.store, rows=rows, rollouts_per_step=7, seed=5, ref="behavior")[start:]
        return opd_steps(self.student, steps, LOSS, self.optimizer)

    def weights(self):
        return {name: value.detach().clone() for name, value in self.student.named_parameters()}


@pytest.fixture
def new_run(llama, near_teacher, tokenizer, prompts):
    return lambda **options: Run(llama, near_teacher, tokenizer, prompts, **options)


def plain(metrics):
    return [{name: value for name, value in asdict(m).items() if name != "seconds"} for m in metrics]


def assert_same(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_an_end_of_the_round_it_is_lightning_exactly(new_run):
    refreshed, lightning = new_run(), new_run()
    got = plain(islice(refresh_every(10**9, refreshed.make_round), 6))
    collect_rollouts(lightning.source(0), lightning.prompts, lightning.store)
    score_rollouts(lightning.store, lightning.teacher)
    steps = batches(lightning.store, rollouts_per_step=7, seed=5, ref="behavior")[:6]
    assert got == plain(opd_steps(lightning.student, steps, LOSS, lightning.optimizer))
    assert_same(refreshed.weights(), lightning.weights())


def test_a_round_for_every_step_is_online_opd_exactly(new_run):
    refreshed, online = new_run(), new_run()
    got = plain(islice(refresh_every(1, refreshed.make_round), 4))
    expected = []
    for k in range(4):
        source = online.source(k)
        store = MemoryStore(source.manifest)
        collect_rollouts(source, online.prompts, store)
        score_rollouts(store, online.teacher, preflight=None)
        steps = batches(store, rollouts_per_step=7, seed=5, ref="behavior")[k : k + 1]
        expected += plain(opd_steps(online.student, steps, LOSS, online.optimizer))
    assert got == expected
    assert_same(refreshed.weights(), online.weights())
    assert [m["drift"]["chi2"] < 1e-6 for m in got] == [True] * 4, "fresh rollouts have not drifted"


def test_every_few_steps_a_new_round_of_the_weights_of_its_moment_begins(new_run):
    run = new_run()
    metrics = list(islice(refresh_every(3, run.make_round), 8))
    assert [m.step for m in metrics] == list(range(8))
    assert run.rounds == [(0, 0), (1, 3), (2, 6)]
    assert len({policy.revision for policy in run.store.generations.values()}) == 3
    fresh = [m.drift.kl < 1e-6 for m in metrics]
    assert fresh == [True, False, False, True, False, False, True, False], "the ratio is one to the policy of the rollout's own round"


@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("refresh", [refresh_every, lambda steps, *rest: refresh_when(lambda m: m.step % steps == steps - 1, *rest)])
def test_a_round_that_ends_by_itself_is_refused_and_not_sampled_again(refresh, ends):
    rounds = []

    def make_round(generation, start):
        rounds.append(start)
        return [SimpleNamespace(step=step) for step in range(start, 4 * ends)]

    with pytest.raises(
        InvalidRecordError, match=r"round 1 ended before step 4, .*`stop=`" if ends == 1 else r"round 2 ended before step 8, "
    ):
        list(refresh(4 if ends == 2 else 3, make_round))
    assert len(rounds) == ends + 1


@pytest.mark.parametrize("refresh", [refresh_every, lambda steps, *rest, **stop: refresh_when(stale_after(steps - 1), *rest, **stop)])
def test_a_round_that_counts_its_steps_from_0_is_refused_at_its_first(refresh):
    steps = refresh(3, lambda generation, start: (SimpleNamespace(step=step) for step in count()), stop=6)
    assert [metrics.step for metrics in islice(steps, 3)] == [0, 1, 2]
    with pytest.raises(
        InvalidRecordError, match=r"round 1 gave step 0, expected step 3( or a later one)?; give a round `batches\(\.\.\.\)\[start:\]`"
    ):
        next(steps)


def test_a_round_ends_with_the_first_step_that_finds_it_stale(new_run):
    run = new_run()
    metrics = list(islice(refresh_when(lambda m: m.step in {1, 4, 5}, run.make_round), 8))
    assert [m.step for m in metrics] == list(range(8))
    assert run.rounds == [(0, 0), (1, 2), (2, 5), (3, 6)]


def test_drift_can_say_when_to_refresh(new_run):
    run = new_run()
    metrics = list(islice(refresh_when(lambda m: m.drift.ess < 0.97, run.make_round), 12))
    assert 1 < len(run.rounds) < 12
    for (_, start), (_, following) in zip(run.rounds, run.rounds[1:], strict=False):
        ess = [metrics[k].drift.ess for k in range(start, following)]
        assert ess[-1] < 0.97 <= min(ess[:-1], default=1.0)


@pytest.mark.parametrize("killed_after", [3, 4, 5])
def test_a_run_that_was_killed_in_a_round_resumes_as_if_it_had_not_been(killed_after, new_run, tmp_path):
    whole = new_run()
    expected = plain(islice(refresh_every(3, whole.make_round), 8))
    first = new_run(store=lambda manifest: ZarrStore.create(str(tmp_path / "rounds.zarr"), manifest))
    got = plain(islice(refresh_every(3, first.make_round), killed_after))
    second = new_run()
    second.store = ZarrStore.open(tmp_path / "rounds.zarr")
    second.student.load_state_dict(first.student.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    got += plain(islice(refresh_every(3, second.make_round, start=killed_after), 8 - killed_after))
    assert got == expected
    assert len(second.store) == len(whole.store)


def stale_after(*steps):
    return lambda metrics: metrics.step in steps


def every_three(run, **options):
    return refresh_every(3, run.make_round, **options)


def after_two_or_five(run, **options):
    return refresh_when(stale_after(2, 5), run.make_round, **options)


@pytest.mark.parametrize("refresh", [every_three, after_two_or_five])
@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_steps_end_before_the_stop_and_no_round_is_sampled_for_it(stop, refresh, new_run):
    run = new_run()
    assert [m.step for m in refresh(run, stop=stop)] == list(range(stop))
    assert run.rounds == [(0, 0), (1, 3)][: 1 + (stop > 3)]
    assert sorted(run.store.generations) == list(range(len(run.rounds)))


@pytest.mark.parametrize("refresh", [every_three, after_two_or_five])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (4, 4), (3, 3), (7, 2)])
def test_a_run_that_has_reached_its_stop_samples_nothing(start, stop, refresh, new_run):
    run = new_run()
    assert list(refresh(run, start=start, stop=stop)) == []
    assert run.rounds == []
    assert len(run.store) == 0


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_that_was_stopped_and_started_again_there_equals_an_unbroken_one(stop, new_run):
    whole, parts = new_run(), new_run()
    expected = plain(every_three(whole, stop=7))
    assert plain(every_three(parts, stop=stop)) + plain(every_three(parts, start=stop, stop=7)) == expected
    assert_same(parts.weights(), whole.weights())
    assert len(parts.store) == len(whole.store)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_so_does_one_that_is_told_its_round(stop, new_run):
    whole, parts = new_run(), new_run()
    expected = plain(after_two_or_five(whole, stop=7))
    got = list(after_two_or_five(parts, stop=stop))
    generation = max(parts.store.generations) + stale_after(2, 5)(got[-1])
    assert plain(got) + plain(after_two_or_five(parts, start=stop, stop=7, generation=generation)) == expected
    assert_same(parts.weights(), whole.weights())
    assert len(parts.store) == len(whole.store)


def test_without_a_stop_steps_do_not_end(new_run):
    assert [len(list(islice(refresh(new_run()), 9))) for refresh in (every_three, after_two_or_five)] == [9, 9]


def test_a_round_that_was_stopped_while_it_sampled_is_completed(new_run):
    run, source = new_run(), None
    source = run.source(0)
    collect_rollouts(source, run.prompts[:2], run.store)
    rows = sample_round(source, run.teacher, run.prompts, run.store)
    assert rows.tolist() == list(range(len(run.prompts) * 3))
    assert run.store.scored("teacher").all()


def test_a_part_of_a_round_that_another_policy_sampled_is_scored_and_said(new_run):
    run = new_run()
    source = run.source(0)
    collect_rollouts(source, run.prompts[:2], run.store)
    resumed = evolve(source, identity=evolve(source.manifest.policy, revision="weights:recomputed/0"))
    with pytest.warns(
        TrainingWarning, match=rf"round 0 has 6 of these rollouts, expected {3 * len(run.prompts)}; .* was stopped"
    ) as caught:
        rows = sample_round(resumed, run.teacher, run.prompts, run.store)
    assert [warning.filename for warning in caught] == [__file__]
    assert rows.tolist() == list(range(6))
    assert run.store.scored("teacher").all()
    with pytest.raises(ConflictError, match=r"round 0 has 0 of these rollouts, expected 3; .* give the round a number of its own"):
        sample_round(resumed, run.teacher, run.prompts[2:3], run.store)


@pytest.mark.parametrize("form", ["{}/s0/g0", "{}/s7/g0", "{}"])
def test_a_round_that_was_imported_is_found_however_its_rollouts_are_numbered(form, new_run):
    sampled, run = new_run(), new_run()
    collect_rollouts(sampled.source(0), sampled.prompts, sampled.store)
    for row, prompt in zip((0, 3), run.prompts[:2], strict=True):
        (record,) = sampled.store.read([row])
        run.store.append([evolve(record.rollout, rollout_id=form.format(prompt.prompt_id))])
    source = run.source(0)
    other = evolve(source, identity=evolve(source.manifest.policy, revision="weights:recomputed/0"))
    with pytest.warns(TrainingWarning, match="round 0 has 2 of these rollouts, expected 6; "):
        assert sample_round(other, run.teacher, run.prompts[:2], run.store).tolist() == [0, 1]
    assert run.store.scored("teacher").all()


@pytest.mark.parametrize(
    ("refresh", "old"),
    [
        (lambda run: refresh_every(2, run.make_round, stop=6), [0, 1]),
        (lambda run: refresh_every(4, run.make_round, start=6, stop=9), [1]),
        (lambda run: refresh_when(stale_after(6, 7), run.make_round, start=6, stop=9, generation=0), [0, 1]),
    ],
)
def test_whole_rounds_of_an_earlier_run_are_trained_on_with_a_warning(refresh, old, new_run):
    """The newest round is where a run was stopped, and its student may be computed otherwise, so that one draws none."""
    first = new_run()
    list(refresh_every(2, first.make_round, stop=6))
    other = new_run(store=lambda manifest: first.store)
    with torch.no_grad():
        next(other.student.parameters()).mul_(1.01)
    with pytest.warns(TrainingWarning) as caught:
        list(refresh(other))
    said = [str(warning.message) for warning in caught]
    assert [text.split(" sampled ")[1].split(", so")[0] for text in said] == [f"round {i}, and round 2 is there too" for i in old]
    assert all(f"student ({other.source(0).manifest.policy.name}@" in text for text in said)


def test_a_run_that_resumes_within_an_older_round_is_right_and_the_warning_leaves_it_open(new_run):
    whole = new_run()
    steps = refresh_every(2, whole.make_round, stop=6)
    next(steps)
    weights, moments = copy.deepcopy(whole.student.state_dict()), copy.deepcopy(whole.optimizer.state_dict())
    expected = plain(islice(steps, 2))  # it is killed in round 1
    resumed = new_run(store=lambda manifest: whole.store)
    resumed.student.load_state_dict(weights)
    resumed.optimizer.load_state_dict(moments)
    with pytest.warns(
        TrainingWarning, match=r"if this run goes on from a checkpoint of before round 1, this is right; if it is another"
    ) as caught:
        assert plain(refresh_every(2, resumed.make_round, start=1, stop=3)) == expected
    assert len(caught) == 1


def test_a_run_that_resumes_without_its_round_is_told_which_it_begins_with():
    rounds = []

    def make_round(generation, start):
        rounds.append(generation)
        return (SimpleNamespace(step=step) for step in count(start))

    with pytest.warns(TrainingWarning, match="start is 16, and `generation` is not given, so this run begins with round 0; ") as caught:
        list(refresh_when(stale_after(17), make_round, start=16, stop=20))
    assert [warning.filename for warning in caught] == [__file__]
    list(refresh_when(stale_after(17), make_round, start=16, stop=20, generation=0))
    assert rounds == [0, 1] * 2


def test_a_round_that_the_same_weights_sampled_in_another_dtype_is_trained_on(new_run):
    run = new_run()
    rows = sample_round(run.source(0), run.teacher, run.prompts, run.store)
    resumed = evolve(run.source(0), identity=evolve(run.store.manifest.policy, dtype="bfloat16"))
    assert sample_round(resumed, run.teacher, run.prompts, run.store).tolist() == rows.tolist()


@pytest.mark.parametrize("lasts", [False, True])
def test_a_round_that_was_killed_before_its_first_rollouts_is_sampled_whole_by_another_policy(lasts, new_run, tmp_path):
    run = new_run(store=(lambda manifest: ZarrStore.create(tmp_path / "rounds.zarr", manifest)) if lasts else None)
    source = run.source(1)
    with pytest.raises(Interrupted):
        sample_round(Stopping(source, 0), run.teacher, run.prompts, run.store)
    resumed = evolve(source, identity=evolve(source.manifest.policy, revision="weights:recomputed/0"))
    rows = sample_round(resumed, run.teacher, run.prompts, run.store)
    assert rows.tolist() == list(range(3 * len(run.prompts)))
    assert run.store.generations[1] == resumed.manifest.policy


def test_a_round_reads_no_rows_of_other_rounds(new_run, monkeypatch):
    run, read, looked = new_run(), MemoryStore.read, set()
    before = sample_round(run.source(0), run.teacher, run.prompts, run.store)
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: looked.update(rows) or read(self, rows, **options))
    collect = run.source(1)
    rows = sample_round(evolve(collect, identity=evolve(collect.manifest.policy, revision="step-1")), run.teacher, run.prompts, run.store)
    assert looked <= {*rows.tolist()}
    assert not {*before.tolist()} & {*rows.tolist()}


def test_a_round_scores_no_more_than_its_own_rollouts(new_run):
    run = new_run()
    parts = {"math": run.prompts[:2], "code": run.prompts[2:]}
    rows = {name: sample_round(run.source(0), run.teacher, part, run.store, column=name) for name, part in parts.items()}
    for name, mine in rows.items():
        assert np.flatnonzero(run.store.scored(name)).tolist() == mine.tolist()


@pytest.mark.parametrize(("steps", "start"), [(0, 0), (3, -1)])
def test_numbers_that_make_no_sense_are_refused(steps, start, new_run):
    with pytest.raises(InvalidRecordError, match="Refresh"):
        next(refresh_every(steps, new_run().make_round, start=start))
    if start < 0:
        with pytest.raises(InvalidRecordError, match="Refresh"):
            next(refresh_when(lambda _: False, new_run().make_round, start=start))


@pytest.mark.parametrize("refresh", [every_three, after_two_or_five])
@pytest.mark.parametrize(("stop", "said"), [(2.5, "a whole number"), ("10", "a whole number"), (-1, "at least 0")])
def test_a_stop_that_no_step_has_is_refused(stop, said, refresh):
    with pytest.raises(InvalidRecordError, match=f"Refresh: stop is {stop!r}, expected {said}"):
        next(refresh(SimpleNamespace(make_round=lambda generation, start: []), stop=stop))


def test_rows_of_prompts_and_rounds(new_run):
    run = new_run()
    for generation in (0, 1):
        source = evolve(run.source(generation), identity=evolve(run.source(0).manifest.policy, revision=f"step-{generation}"))
        run.store = run.store if generation else MemoryStore(source.manifest)
        collect_rollouts(source, run.prompts, run.store)
    of_first = rows_of(run.store, run.prompts[:1], [1])
    assert [record.rollout.rollout_id for record in run.store.read(of_first)] == [f"{run.prompts[0].prompt_id}/s{s}/g1" for s in range(3)]
    assert len(rows_of(run.store, run.prompts[:1])) == 6
    assert rows_of(run.store, run.prompts).tolist() == list(range(len(run.store)))
    absent = evolve(run.prompts[0], prompt_id="never sampled")
    assert rows_of(run.store, [absent]).size == 0
    assert np.isin(of_first, rows_of(run.store, run.prompts, [1])).all()


def test_steps_may_be_left_out_of_a_round():
    rounds = []

    def make_round(generation, start):
        rounds.append(start)
        return (SimpleNamespace(step=step) for step in count(start) if step % 3)

    assert [m.step for m in islice(refresh_when(lambda m: m.step in {2, 7}, make_round), 6)] == [1, 2, 4, 5, 7, 8]
    assert rounds == [0, 3, 8]
    for stop in (6, 7):
        assert [m.step for m in islice(refresh_when(lambda m: m.step == 2, make_round, stop=stop), 9)] == [1, 2, 4, 5], "6 is left out"
    with pytest.raises(InvalidRecordError, match="round 0 gave step 1, expected step 0; "):
        next(refresh_every(3, make_round))  # which would take the third of them for the end of the round
