"""Which rows and columns a run trains on: chosen rows, several teachers by prompt, and a reference policy for each round."""

import warnings

import numpy as np
import pytest
import torch
from attrs import evolve
from helpers import OTHER_TEACHER, POLICY, SFT_TEACHER, make_manifest, make_provenance, make_rollout, make_store, scored

from lopd import LanceStore, MemoryStore, SamplingParams, ZarrStore, batches, collect_rollouts, label_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import (
    AdvantageWarning,
    ArgumentError,
    InvalidRecordError,
    MissingScoresError,
    NoSuchRowError,
    QuarantineWarning,
    TeacherConsistencyError,
    TeacherConsistencyWarning,
)
from lopd.guards import ConsistencyPolicy
from lopd.guards.consistency import verdict
from lopd.protocols.labels import labels_and_means
from lopd.protocols.reading import rows_of
from lopd.records import Lineage, ModelId, Prompt, Scores, mixture_id
from lopd.records.rollouts import rollout_id
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.verbs.columns import choose

PARAMS = SamplingParams(max_new_tokens=4, samples_per_prompt=2, stop_ids=(0, 5))
BOTH = ("near", "other")


@pytest.fixture(scope="module")
def teachers(near_teacher, llama, tokenizer):
    return HFScorer(near_teacher, tokenizer, top_k=3), HFScorer(llama, tokenizer, top_k=3)


@pytest.fixture(params=["memory", "zarr", "lance"])
def store(request, llama, tokenizer, prompts, teachers, tmp_path):
    """Return a store of two rounds of one policy under two names, and two columns."""
    lineage = Lineage(sft_teacher=teachers[0].provenance.model)
    sources = [
        HFSource(llama, tokenizer, PARAMS, lineage, generation=g, identity=ModelId("student", f"step-{g}", "float32")) for g in (0, 1)
    ]
    made = {
        "memory": lambda: MemoryStore(sources[0].manifest),
        "zarr": lambda: ZarrStore.create(str(tmp_path / "s.zarr"), sources[0].manifest),
        "lance": lambda: LanceStore.create(str(tmp_path / "s.lance"), sources[0].manifest),
    }[request.param]()
    for source in sources:
        collect_rollouts(source, prompts, made)
    for column, teacher in zip(BOTH, teachers, strict=True):
        score_rollouts(made, teacher, column=column)
    return made


def mixed(store, prompts, **options):
    return batches(
        store,
        teacher={"near": prompts[:3], "other": prompts[3:]},
        ref="behavior",
        consistency=ConsistencyPolicy.WARN,
        **options,
    )


def scores_of(step):
    return torch.cat([batch.teacher_logprobs[batch.weight > 0] for batch in step.batches])


def test_each_rollout_learns_from_the_teacher_of_its_prompt(store, prompts):
    with pytest.warns(TeacherConsistencyWarning):
        stream = mixed(store, prompts, rollouts_per_step=len(store), top_k=True)
    rows = stream.rows
    step = stream.step(0)
    one = {column: batches_of(store, column, len(store)).step(0) for column in BOTH}
    own = {}
    for column, mine in (("near", prompts[:3]), ("other", prompts[3:])):
        own |= dict.fromkeys(rows_of(store, mine).tolist(), column)
    order = np.random.default_rng((0, 0)).permutation(len(rows))
    order = order[np.argsort(-store.lengths()[rows][order].sum(axis=1), kind="stable")]
    expected = {column: segments(one[column]) for column in BOTH}
    got = segments(step)
    assert set(own.values()) == set(BOTH)
    for place, row in enumerate(order.tolist()):
        for a, b in zip(got[place], expected[own[row]][place], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def batches_of(store, column, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TeacherConsistencyWarning)
        return batches(store, rollouts_per_step=count, teacher=column, ref="behavior", top_k=True, consistency=ConsistencyPolicy.WARN)


def segments(step):
    """Return (scores, top-k ids, ratio column) of each rollout."""
    found = []
    for batch in step.batches:
        for i in batch.segment_ids.unique().tolist():
            on = (batch.segment_ids == i) & (batch.weight > 0)
            found.append((batch.teacher_logprobs[on], batch.top_k_ids[on], batch.ref_logprobs[on]))
    return found


def test_a_student_of_two_teachers_records_both_and_each_is_judged(store, prompts, teachers):
    with pytest.warns(TeacherConsistencyWarning) as caught:
        stream = mixed(store, prompts)
    assert len(caught) == 1, "one of the two is the SFT teacher"
    near, other = (teacher.provenance.model for teacher in teachers)
    assert set(stream.lineage.opd_teacher.revision.split(" + ")) == {near.revision, other.revision}
    with pytest.raises(TeacherConsistencyError, match=str(other)):
        batches(store, teacher={"near": prompts[:3], "other": prompts[3:]}, ref="behavior")
    alone = batches(store, teacher={"near": prompts}, ref="behavior")
    assert alone.lineage.opd_teacher == near


def test_a_mixture_of_teachers_is_the_sft_teacher_of_all_of_them_together_and_of_none_alone(store, prompts, teachers):
    near, other = (teacher.provenance.model for teacher in teachers)
    # in another order and under another name: weights decide
    sft_teacher = mixture_id([other, evolve(near, name="renamed", dtype="bfloat16")])
    mixed_store = MemoryStore(evolve(store.manifest, sft_teacher=sft_teacher))
    records = [row.rollout for row in store.read(rows_of(store, prompts, [0]).tolist())]
    mixed_store.append(records)
    for column, teacher in zip(BOTH, teachers, strict=True):
        score_rollouts(mixed_store, teacher, column=column)
    options = {"ref": "behavior", "teacher": {"other": prompts[3:], "near": prompts[:3]}}
    lineage = batches(mixed_store, **options).lineage
    assert lineage.opd_teacher.same_weights(lineage.sft_teacher)
    for column in BOTH:
        with pytest.raises(TeacherConsistencyError, match=r"let each of them score the rollouts of its own prompts"):
            batches(mixed_store, teacher=column, ref="behavior")
        assert verdict(mixed_store.manifest, mixed_store.columns[column]).startswith("consistent on its own prompts: it is one of")
    three = MemoryStore(evolve(store.manifest, sft_teacher=mixture_id([sft_teacher, ModelId("third", "1", "bfloat16")])))
    three.append(records)
    for column, teacher in zip(BOTH, teachers, strict=True):
        score_rollouts(three, teacher, column=column)
    batches(three, **options)


MATH, CODE = ([Prompt(f"{kind}-{i}", [i]) for i in range(3)] for kind in ("math", "code"))


def of_two_kinds(**changes):
    """Return rollouts of both kinds of prompts, and a column for each kind with scores of all: 9 nats below the policy on the other kind."""
    records = [
        scored(
            evolve(make_rollout(rollout_id(prompt.prompt_id, 0, 0), prompt.token_ids, [1, 2]), behavior_logprobs=[-1.0, -1.0]),
            {"math": [math] * 2, "code": [code] * 2},
        )
        for prompts, math, code in ((MATH, -1.0, -10.0), (CODE, -10.0, -1.0))
        for prompt in prompts
    ]
    manifest = make_manifest(mixture_id([SFT_TEACHER, OTHER_TEACHER]))
    made = {"math": make_provenance(SFT_TEACHER), "code": evolve(make_provenance(OTHER_TEACHER), **changes)}
    return make_store(records, columns=[*made], manifest=manifest, provenance=made.__getitem__)


def test_each_teacher_is_judged_on_the_rollouts_that_learn_from_it():
    store = of_two_kinds()
    batches(store, teacher={"math": MATH, "code": CODE})
    with pytest.warns(AdvantageWarning, match=r"MemoryStore, column 'math': 66\.7% of its advantages are below -5") as caught:
        batches(store, teacher={"math": [*MATH[:1], *CODE[1:]], "code": CODE[:1]})
    assert [warning.filename for warning in caught] == [__file__]


def test_text_beside_teachers_is_refused():
    with pytest.raises(ArgumentError, match="Teacher: one of several is None, expected the name of a column"):
        batches(of_two_kinds(), teacher={"math": MATH, None: CODE})


def test_one_of_several_sft_teachers_passes_where_it_was_given_its_prompts():
    store = of_two_kinds()
    assert batches(store, teacher={"math": MATH}).lineage.opd_teacher == SFT_TEACHER
    with pytest.raises(TeacherConsistencyError, match="let each of them score the rollouts of its own prompts"):
        batches(store, teacher="math", ref="behavior")
    outside = of_two_kinds(model=POLICY)
    with pytest.raises(TeacherConsistencyError, match=rf"and the scoring teacher is {POLICY}, .*; score with the SFT teacher"):
        batches(outside, teacher={"math": MATH, "code": CODE})
    privileged = of_two_kinds(logprobs_mode="privileged 00")
    with pytest.warns(TeacherConsistencyWarning, match="the scoring teacher is one of the SFT teachers after other prompts"):
        batches(privileged, teacher={"code": CODE})


def test_only_the_chosen_rows_are_trained_on(store, prompts):
    rows = rows_of(store, prompts[:2], [1])
    stream = batches(store, teacher="near", rows=rows, ref="behavior", rollouts_per_step=4)
    assert stream.rows.tolist() == rows.tolist()
    expected = torch.cat([torch.from_numpy(r.scores["near"].copy()) for r in store.read(rows.tolist(), columns=("near",))])
    assert scores_of(stream.step(3)).sort().values.tolist() == expected.sort().values.tolist()
    assert batches(store, teacher=None, rows=rows[::-1].copy()).rows.tolist() == rows.tolist()


def test_the_sft_teacher_of_a_student_is_who_sampled_the_rounds_that_it_was_trained_on(store, prompts):
    first, second = store.generations.values()
    chosen = [rows_of(store, prompts, [0]), rows_of(store, prompts, [1]), rows_of(store, prompts[:2])]
    assert [batches(store, teacher=None, rows=rows).lineage.sft_teacher for rows in chosen] == [first, second, mixture_id([first, second])]


def test_rows_that_are_not_chosen_need_no_scores_and_do_not_warn(store, prompts, tokenizer, teachers):
    record = store.read([0])[0].rollout
    late = evolve(record, rollout_id="late", generation=1)
    bad = evolve(record, rollout_id="bad", generation=1)
    store.append([late, bad])
    store.quarantine("near", teachers[0].provenance, {"bad": "too long"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(store, teacher="near", rows=rows_of(store, prompts), ref="behavior")
    with pytest.raises(MissingScoresError, match="column 'near' has scores for"):
        batches(store, teacher="near", ref="behavior")
    both = store.find(["bad", record.rollout_id])
    with pytest.warns(QuarantineWarning, match="1 of 2 rollouts") as caught:
        stream = batches(store, teacher="near", rows=both, ref="behavior")
    assert caught[0].filename == __file__
    assert stream.rows.tolist() == [0]


def test_a_reference_column_is_of_the_policy_of_every_round_that_is_read(store, prompts, llama, tokenizer):
    scorer = HFScorer(llama, tokenizer, identity=ModelId("student", "step-1", "float32"))
    score_rollouts(store, scorer, column="ref-1")
    with pytest.raises(InvalidRecordError, match=r"'ref-1' was scored by student@step-1, expected the policy that sampled, student@step-0"):
        batches(store, teacher="near", ref="ref-1")
    batches(store, teacher="near", ref="ref-1", rows=rows_of(store, prompts, [1])).step(0)
    with pytest.raises(InvalidRecordError, match="expected the policy that sampled"):
        batches(store, teacher="near", ref="ref-1", rows=rows_of(store, prompts, [0])).step(0)


def test_labels_of_rounds_that_are_not_trained_on_are_not_read(monkeypatch):
    store, read, asked = MemoryStore(tiny_manifest()), MemoryStore.read, set()
    store.begin_generation(1, ModelId("policy", "rev-p2", "float32"))
    store.append([tiny_rollout(f"p{i}/s{s}/g{g}", generation=g) for g in range(2) for i in range(3) for s in range(2)])
    label_rollouts(store, lambda _, rollout: float("/s1/" in rollout.rollout_id), None)
    monkeypatch.setattr(
        MemoryStore, "read", lambda self, rows, **options: asked.update(rows if options else ()) or read(self, rows, **options)
    )
    (batch,) = batches(store, teacher=None, label="label", rows=np.array([6, 9])).step(0).batches
    assert batch.label_means[batch.weight > 0].unique().tolist() == [0.5], "others of the group count"
    assert asked == {6, 7, 8, 9}


@pytest.mark.parametrize("names", [("p/s1/g0", "p/s2/g0"), ("p/s7/g1", "p/s8/g1")], ids=["another round", "a gap"])
def test_a_group_whose_ids_are_of_another_form_has_all_its_members(names):
    store = MemoryStore(tiny_manifest())
    store.begin_generation(1, ModelId("policy", "rev-p2", "float32"))
    store.append([tiny_rollout("p/s0/g0"), *(tiny_rollout(name, generation=1) for name in names)])
    label_rollouts(store, lambda _, rollout: float(rollout.rollout_id == names[0]), None)
    labels, means = labels_and_means(store, "label", np.array([2]))
    assert means is not None
    assert (labels[2], means[2]) == (0.0, 0.5)


@pytest.mark.parametrize(("other", "said"), [((3, 0), "3 tokens, 0 of them drawn, expected 2 and 0"), ((2, 1), "2 tokens, 1 of them")])
def test_teachers_whose_supports_do_not_fit_together_are_refused_before_the_first_step(other, said):
    store, prompts = MemoryStore(tiny_manifest()), [Prompt("p0", [4]), Prompt("p1", [4])]
    rollouts = [tiny_rollout(f"p{i}/s0/g0") for i in range(2)]
    store.append(rollouts)
    for column, rollout, (k, drawn) in zip(BOTH, rollouts, ((2, 0), other), strict=True):
        scores = evolve(Scores.of(rollout, [-1.0] * 3), top_k=tiny_top_k(3, k - drawn, drawn=drawn))
        store.append_scores(column, tiny_provenance(column, k, drawn), [scores])
    teacher = dict(zip(BOTH, ([prompt] for prompt in prompts), strict=True))
    with pytest.raises(InvalidRecordError, match=f"column 'other' keeps {said}.* as in column 'near'; .* with a support like the other's"):
        choose(store, teacher, None, None, top_k=True, label=None)
    assert len(choose(store, teacher, None, None, top_k=False, label=None)[1]) == 2


@pytest.mark.parametrize("lasts", [False, True])
def test_labels_of_one_domain_are_completed_by_a_constant_for_the_others(lasts, tmp_path):
    store = ZarrStore.create(tmp_path / "s.zarr", tiny_manifest()) if lasts else MemoryStore(tiny_manifest())
    prompts = [Prompt("p0", [4]), Prompt("p1", [4])]
    rollouts = [tiny_rollout(f"p{i}/s{s}/g0") for i in range(2) for s in range(2)]
    store.append(rollouts)
    for column, mine in zip(BOTH, (rollouts[:2], rollouts[2:]), strict=True):
        store.append_scores(column, tiny_provenance(column), [tiny_scores(rollout) for rollout in mine])
    label_rollouts(store, lambda _, rollout: float("/s1/" in rollout.rollout_id), prompts[:1], name="judge")
    elsewhere = r", or `store.refresh\(\)` if another handle or process did" * lasts
    chosen = {"teacher": {"near": prompts[:1], "other": prompts[1:]}, "ref": None, "rows": None, "label": "label", "top_k": False}
    with pytest.raises(MissingScoresError, match=rf"\)` also for the others, with a constant where nothing can judge them{elsewhere}\.$"):
        choose(store, **chosen)
    label_rollouts(store, lambda prompt, rollout: 0.0, prompts[1:], name="judge")
    columns, rows = choose(store, **chosen)
    assert rows.tolist() == [0, 1, 2, 3]
    assert (columns.labels - columns.means).tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_the_rest_of_a_store_is_read_once_for_all_teachers(monkeypatch):
    store, read, looked = MemoryStore(tiny_manifest()), MemoryStore.read, []
    rollouts = [tiny_rollout(f"p{i}/s{s}/g0") for i in range(6) for s in (0, 2)]
    store.append(rollouts)
    teacher = {f"t{i}": [Prompt(f"p{i}", [4])] for i in range(6)}
    for i, column in enumerate(teacher):
        store.append_scores(column, tiny_provenance(column), [tiny_scores(rollout) for rollout in rollouts[2 * i : 2 * i + 2]])
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: looked.append(len(rows)) or read(self, rows, **options))
    columns, rows = choose(store, teacher, None, None, label=None, top_k=False)
    assert columns.place.tolist() == [i for i in range(6) for _ in range(2)]
    assert rows.tolist() == [*range(12)]
    assert sum(looked) <= 24


def test_what_cannot_be_chosen_is_refused(store, prompts):
    with pytest.raises(NoSuchRowError, match=f"row {len(store)} was chosen"):
        batches(store, teacher="near", rows=np.array([0, len(store)]))
    with pytest.raises(NoSuchRowError, match="row -1 was chosen"):
        batches(store, teacher="near", rows=np.array([-1]))
    with pytest.raises(InvalidRecordError, match="0 rows were chosen"):
        batches(store, teacher="near", rows=np.zeros(0, np.int64))
    with pytest.raises(InvalidRecordError, match="two teachers"):
        batches(store, teacher={"near": prompts, "other": prompts[:1]})
    with pytest.raises(InvalidRecordError, match="column 'other' was given prompts with 0 rollouts"):
        batches(store, teacher={"near": prompts, "other": []})
    with pytest.raises(InvalidRecordError, match="there are 0 teachers"):
        batches(store, teacher={})


def test_a_handle_that_is_older_than_the_scores_is_told_to_refresh(tmp_path):
    older, made = ZarrStore.create(tmp_path / "s.zarr", tiny_manifest()), [tiny_rollout(f"{i}/s0/g0") for i in range(2)]
    older.append(made)
    newer = ZarrStore.open(tmp_path / "s.zarr")
    for rollout, said in zip(made, ("'teacher' is absent", "has scores for 1 rollouts, expected 2"), strict=True):
        newer.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout)])
        with pytest.raises(MissingScoresError, match=rf"{said}.* run `.*`, or `store.refresh\(\)` if another handle or process did\.$"):
            batches(older, teacher=None, ref="teacher")
        older.refresh()
    assert older.scored("teacher").all()
