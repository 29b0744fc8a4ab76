"""Residualisation: planted habits are found and taken out, knowledge and consistent teachers are left alone, and no prompt explains itself."""

import numpy as np
import pytest
from attrs import evolve

from lopd import ConsistencyPolicy, LanceStore, MemoryStore, ZarrStore, batches, residualise
from lopd.errors import ConflictError, InvalidRecordError, MissingScoresError, NoSuchRowError, TeacherConsistencyError
from lopd.guards import Residualiser
from lopd.guards.consistency import inconsistencies
from lopd.records import ModelId, Scores, prompt_id_of
from lopd.records.manifest import RESIDUAL
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout
from lopd.tools.interop.parquet import export_parquet, import_parquet

TOKENS = 40


def make_rollouts(prompts=300, seed=0, samples=2):
    """Make random tokens; the reference policy's surprisals are spread over all bins."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for prompt in range(prompts):
        for sample in range(samples):
            length = int(rng.integers(5, 60))
            ids = rng.integers(5, TOKENS, length)
            mask = rng.random(length) < 0.9
            ref = -(10 ** rng.uniform(-3, 1, length)).astype(np.float32)
            rollouts.append(
                tiny_rollout(f"p{prompt}/s{sample}/g0", ids, loss_mask=mask, behavior_logprobs=ref),
            )
    return rollouts


def filled(rollouts, gap, store=None):
    """Fill a store whose teacher is the reference policy plus a gap (rollout -> (T,) nats), as far as log-probs allow."""
    store = MemoryStore(tiny_manifest()) if store is None else store
    store.append(rollouts)
    scores = [Scores.of(r, np.minimum(r.behavior_logprobs + gap(r), 0)) for r in rollouts]
    store.append_scores("teacher", tiny_provenance("other"), scores)
    return store


def columns_of(store, names=("teacher", "behavior", "teacher-residual")):
    return [[r.scores[name].astype(np.float64) for name in names] for r in store.read(range(len(store)), columns=names)]


def brute_force(store, how):
    """Return the offsets of every token, written without tables: loops over all tokens of all other folds."""
    records = store.read(range(len(store)), columns=("teacher", "behavior"))
    tokens = []
    for i, r in enumerate(records):
        length, on = r.rollout.response_ids.size, r.rollout.loss_mask
        for t in np.flatnonzero(on):
            gap = float(r.scores["teacher"][t]) - float(r.scores["behavior"][t])
            surprisal = -r.scores["behavior"][t]
            context = (t * how.positions // length, sum(surprisal >= b for b in np.array([0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0])))
            tokens.append((i, how.fold(r), int(r.rollout.response_ids[t]), context, gap, 1 / on.sum(), t))
    found = [np.zeros(r.rollout.response_ids.size) for r in records]
    for i, fold, token, context, _, _, t in tokens:
        others = [x for x in tokens if x[1] != fold]
        weight, total = sum(x[5] for x in others), sum(x[4] * x[5] for x in others)
        mean, extra = total / weight, how.prior * weight / len(others)
        for key, value in ((2, token), (3, context)):
            group = [x for x in others if x[key] == value]
            found[i][t] += (sum(x[4] * x[5] for x in group) + extra * mean) / (sum(x[5] for x in group) + extra) / 2
    return found


def test_it_is_the_formula_token_by_token():
    rng = np.random.default_rng(1)
    store = filled(make_rollouts(prompts=8), lambda r: rng.normal(-1, 1, r.response_ids.size))
    how = Residualiser(folds=3, positions=4, prior=7.0)
    residualise(store, how=how)
    for (teacher, _, residual), offset in zip(columns_of(store), brute_force(store, how), strict=True):
        np.testing.assert_allclose(teacher - residual, offset, atol=2e-6)


@pytest.mark.parametrize("habit", ["token", "context"])
def test_a_planted_habit_is_taken_out_by_half_from_either_table(habit):
    """The offset is the mean of both tables: a habit that only one of them sees is halved, and one that both see is gone."""
    of_token = np.linspace(-2.0, 2.0, TOKENS)

    def gap(r):
        if habit == "token":
            return of_token[r.response_ids] - 3
        late = np.arange(r.response_ids.size) * 10 // r.response_ids.size >= 5
        return np.where(late, -4.0, -2.0)

    rollouts = [evolve(r, behavior_logprobs=r.behavior_logprobs - 3) for r in make_rollouts(prompts=600)]
    store = filled(rollouts, gap)
    residualise(store, how=Residualiser(prior=0.0))
    errors = []
    for r, (_, ref, residual) in zip(rollouts, columns_of(store), strict=True):
        planted = gap(r)
        left = (residual - ref)[r.loss_mask]
        expected = ((planted + 3) / 2)[r.loss_mask]
        errors.append(left - expected)
    # what is left beside one half of the habit is the error of two means, of a few thousand tokens in about a hundred groups
    assert np.sqrt(np.mean(np.concatenate(errors) ** 2)) < 0.25


def test_a_constant_habit_is_taken_out_whole():
    rollouts = [evolve(r, behavior_logprobs=r.behavior_logprobs - 3) for r in make_rollouts()]
    store = filled(rollouts, lambda r: np.full(r.response_ids.size, 1.5))
    report = residualise(store)
    for r, (_, ref, residual) in zip(rollouts, columns_of(store), strict=True):
        np.testing.assert_allclose(residual[r.loss_mask], ref[r.loss_mask], atol=1e-5)
    assert report.offset == pytest.approx(1.5, abs=1e-5)
    assert (report.beyond_before, report.beyond_after) == (1.0, 0.0)
    assert report.spread == pytest.approx(0, abs=1e-4)


def test_a_consistent_teacher_is_left_alone():
    """Gaps without a habit: what is subtracted is noise of the size that the counts allow."""
    rng = np.random.default_rng(5)
    rollouts = [evolve(r, behavior_logprobs=r.behavior_logprobs - 8) for r in make_rollouts(prompts=600)]
    store = filled(rollouts, lambda r: rng.normal(0, 1, r.response_ids.size))
    report = residualise(store)
    groups = TOKENS - 5 + 10 * 9
    assert report.spread < 2 * np.sqrt(groups / report.tokens)
    assert abs(report.offset) < 0.05
    assert report.beyond_after == pytest.approx(report.beyond_before, abs=0.01)


def test_no_prompt_explains_itself():
    """One prompt has a token of its own, far off: no other prompt has it, so all that is known of it is the mean of all."""
    rollouts = make_rollouts(prompts=50)
    own = tiny_rollout("alone/s0/g0", [100] * 6, behavior_logprobs=[-1.0] * 6)
    store = filled([*rollouts, own], lambda r: np.full(r.response_ids.size, -60.0 if r is own else 0.0))
    residualise(store, how=Residualiser(prior=0.0))
    teacher, _, residual = columns_of(store)[-1]
    np.testing.assert_allclose(teacher - residual, 0.0, atol=1e-6)


def test_samples_of_one_prompt_are_in_one_fold_whatever_else_is_there():
    how, rollouts = Residualiser(), make_rollouts(prompts=40)
    records = filled(rollouts, lambda r: np.zeros(r.response_ids.size)).read(range(80))
    folds = [how.fold(record) for record in records]
    assert folds[::2] == folds[1::2]
    assert set(folds) == set(range(5))


def test_masked_tokens_are_neither_fitted_nor_changed():
    rollouts = make_rollouts(prompts=60)
    store = filled(rollouts, lambda r: np.where(r.loss_mask, 0.0, -50.0))
    residualise(store)
    for r, (teacher, _, residual) in zip(rollouts, columns_of(store), strict=True):
        np.testing.assert_array_equal(residual[~r.loss_mask], teacher[~r.loss_mask])
        np.testing.assert_allclose(residual[r.loss_mask], teacher[r.loss_mask], atol=1e-6)


@pytest.fixture(params=["memory", "zarr", "lance"])
def new_store(request, tmp_path):
    kinds = {"zarr": ZarrStore, "lance": LanceStore}

    def make(name="s"):
        if request.param == "memory":
            return MemoryStore(tiny_manifest())
        return kinds[request.param].create(str(tmp_path / f"{name}.{request.param}"), tiny_manifest())

    return make


def test_a_run_that_was_stopped_is_completed_and_says_what_it_made(new_store):
    rng = np.random.default_rng(2)
    store = filled(make_rollouts(prompts=30), lambda r: rng.normal(-1, 1, r.response_ids.size), new_store())
    whole = MemoryStore(tiny_manifest())
    whole.append([r.rollout for r in store.read(range(60))])
    whole.append_scores(
        "teacher",
        tiny_provenance("other"),
        [Scores.of(r.rollout, r.scores["teacher"]) for r in store.read(range(60), columns=("teacher",))],
    )
    residualise(whole)
    calls, append = [], store.append_scores

    class Stopped(Exception):  # noqa: N818
        pass

    class Stopping:
        def __getattr__(self, name):
            return getattr(store, name)

        def __len__(self):
            return len(store)

        def append_scores(self, *arguments):
            calls.append(arguments)
            if len(calls) == 4:
                raise Stopped
            append(*arguments)

    with pytest.raises(Stopped):
        residualise(Stopping(), rollouts_per_batch=16)
    assert 0 < store.scored("teacher-residual").sum() < 60
    report = residualise(store, rollouts_per_batch=1)
    assert report.rollouts == 60 - 32
    for mine, theirs in zip(columns_of(store), columns_of(whole), strict=True):
        np.testing.assert_allclose(mine[2], theirs[2], atol=1e-6)
    made = store.columns["teacher-residual"]
    assert (made.logprobs_mode, made.model) == (RESIDUAL, store.columns["teacher"].model)
    assert "teacher less offsets against behavior, 5 folds" in made.engine
    assert residualise(store).rollouts == 0


def test_a_fit_on_other_rollouts_is_another_column(new_store):
    store = filled(make_rollouts(prompts=10), lambda r: np.full(r.response_ids.size, -1.0), new_store())
    residualise(store)
    more = [evolve(r, rollout_id=f"more{r.rollout_id}") for r in make_rollouts(prompts=3, seed=9)]
    filled(more, lambda r: np.full(r.response_ids.size, -2.0), store)
    with pytest.raises(ConflictError, match="'teacher-residual' was scored with engine"):
        residualise(store)
    assert residualise(store, into="again").rollouts == len(store)


def test_a_residual_column_goes_through_parquet(tmp_path):
    store = filled(make_rollouts(prompts=5), lambda r: np.full(r.response_ids.size, -1.0))
    residualise(store)
    export_parquet(store, tmp_path / "s.parquet")
    back = MemoryStore(store.manifest)
    import_parquet(tmp_path / "s.parquet", back)
    for mine, theirs in zip(columns_of(back), columns_of(store), strict=True):
        np.testing.assert_array_equal(mine[2], theirs[2])


def test_rollouts_in_quarantine_stay_there_and_missing_ones_are_named():
    store = filled(make_rollouts(prompts=5), lambda r: np.full(r.response_ids.size, -1.0))
    late = tiny_rollout("late/s0/g0", behavior_logprobs=[-1.0] * 3)
    store.append([late])
    with pytest.raises(MissingScoresError, match="'teacher' has scores for 10 rollouts, expected 11"):
        residualise(store)
    store.quarantine("teacher", tiny_provenance("other"), {"late/s0/g0": "too long"})
    residualise(store)
    assert store.quarantined("teacher-residual") == {10: "column 'teacher': too long"}
    with pytest.raises(MissingScoresError, match="'nobody' is absent"):
        residualise(store, "nobody")
    with pytest.raises(InvalidRecordError, match="is a residual already"):
        residualise(store, "teacher-residual", into="twice")
    with pytest.raises(InvalidRecordError, match="what the policy itself reported"):
        residualise(store, "behavior")


def test_without_the_log_probs_of_the_policy_it_says_how_to_get_them():
    store = MemoryStore(tiny_manifest())
    rollouts = [evolve(r, behavior_logprobs=None) for r in make_rollouts(prompts=2)]
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance("other"), [Scores.of(r, np.full(r.response_ids.size, -1.0)) for r in rollouts])
    message = r"'behavior' has scores for 0 rollouts, expected 4; sample with an engine that .* another column and pass `ref=`\.$"
    with pytest.raises(MissingScoresError, match=message):
        residualise(store)


def test_one_teacher_of_several_is_fitted_on_its_own_rollouts_alone(new_store):
    rng = np.random.default_rng(3)
    rollouts = make_rollouts(prompts=20)
    gaps = {r.rollout_id: rng.normal(-1, 1, r.response_ids.size) for r in rollouts}
    alone = filled(rollouts[:20], lambda r: gaps[r.rollout_id])
    store = filled(rollouts[:20], lambda r: gaps[r.rollout_id], new_store())
    store.append(rollouts[20:])
    store.quarantine("teacher", tiny_provenance("other"), {rollouts[-1].rollout_id: "too long"})
    with pytest.raises(MissingScoresError, match=r"20 rollouts, expected 40; run .*, or pass the rows of its own prompts as `rows=`\.$"):
        residualise(store)
    assert residualise(store, rows=np.arange(20)) == residualise(alone)
    assert store.quarantined("teacher-residual") == {}
    assert np.flatnonzero(store.scored("teacher-residual")).tolist() == list(range(20))
    for mine, theirs in zip(store.read(range(20), columns=("teacher-residual",)), columns_of(alone), strict=True):
        np.testing.assert_array_equal(mine.scores["teacher-residual"], theirs[2])
    with pytest.raises(NoSuchRowError, match="row 40 was chosen"):
        residualise(store, rows=np.array([40]))


@pytest.mark.parametrize("numbers", [{"folds": 1}, {"positions": 0}, {"prior": -1.0}, {"prior": float("nan")}])
def test_numbers_that_make_no_sense_are_refused(numbers):
    with pytest.raises(InvalidRecordError, match="Residualiser"):
        Residualiser(**numbers)


def test_only_a_residual_of_another_teacher_may_be_trained_on_under_that_policy():
    store = MemoryStore(evolve(tiny_manifest(), sft_teacher=tiny_provenance("sft").model))
    filled(make_rollouts(prompts=20), lambda r: np.where(r.response_ids % 2, 0.0, -1.0), store)
    (wrong,) = inconsistencies(store.manifest, [store.columns["teacher"]])
    assert "its SFT teacher is" in wrong
    options = {"ref": "behavior", "consistency": ConsistencyPolicy.RESIDUALISE}
    with pytest.raises(TeacherConsistencyError, match=r"its scores are raw, expected a residual: write one with `lopd.residualise`"):
        batches(store, **options)
    with pytest.raises(
        TeacherConsistencyError, match=r"a residual of its scores \(`lopd.residualise`\) and pass `consistency=Con.*RESIDUALISE`, or"
    ):
        batches(store, ref="behavior")
    residualise(store)
    with pytest.raises(TeacherConsistencyError, match=r"; pass `consistency=ConsistencyPolicy.RESIDUALISE`, as the teacher's habits "):
        batches(store, teacher="teacher-residual", ref="behavior")
    step = batches(store, teacher="teacher-residual", tokens_per_batch=100, **options).step(0)
    assert any((batch.teacher_logprobs > 0).any() for batch in step.batches)


def test_a_consistent_teacher_passes_under_every_policy():
    same = tiny_provenance("other")
    store = MemoryStore(evolve(tiny_manifest(), sft_teacher=same.model))
    filled(make_rollouts(prompts=5), lambda r: np.full(r.response_ids.size, -0.5), store)
    for policy in ConsistencyPolicy:
        batches(store, ref="behavior", consistency=policy)
    unknown = MemoryStore(evolve(tiny_manifest(), sft_teacher=None, policy=ModelId("p", "1", "float32")))
    filled(make_rollouts(prompts=5), lambda r: np.full(r.response_ids.size, -0.5), unknown)
    with pytest.raises(TeacherConsistencyError, match=r"not recorded.*find out who wrote the SFT text \(`lopd.audit`\)"):
        batches(unknown, ref="behavior")


def test_the_prompt_of_a_rollout():
    assert [prompt_id_of(name) for name in ("a/b/s0/g1", "p/s12/g3", "r7", "a/b/c", "a/sx/g0")] == ["a/b", "p", "r7", "a/b/c", "a/sx/g0"]
