"""Labels: a verifier's values of rollouts fill a column of any store, are never taken for log-probs, and train offline as they should."""

import struct
import sys
from functools import partial
from hashlib import blake2b
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from small_runs import Bar, Interrupted

from lopd import (
    ConsistencyPolicy,
    LanceStore,
    MemoryStore,
    ReferenceOPDLoss,
    SamplingParams,
    ZarrStore,
    audit,
    batches,
    by_token,
    label_rollouts,
    labels_of,
    residualise,
    score_rollouts,
    stored_advantages,
)
from lopd.backends.root import Root
from lopd.errors import (
    ArgumentError,
    ConflictError,
    EngineError,
    InvalidRecordError,
    ManifestMismatchError,
    MissingScoresError,
    NoSuchRowError,
    QuarantineWarning,
    ScorerError,
    TeacherConsistencyWarning,
)
from lopd.guards.consistency import verdict
from lopd.guards.start import measure_start
from lopd.losses.variants import add_labels
from lopd.protocols.labels import labels_and_means
from lopd.protocols.reading import rows_of
from lopd.records import Lineage, LMHead, ModelId, Prompt, mixture_id
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.doctor.checking import check_store
from lopd.tools.doctor.contents import inspect_store
from lopd.tools.doctor.display import show_info
from lopd.tools.interop.parquet import export_parquet, import_parquet
from lopd.tools.report.tokens import TokenReport, write_token_report
from lopd.tools.share import model_card
from lopd.verbs import ScoringReport

PROMPTS = [Prompt(f"p{i}", [4, 10 + i]) for i in range(4)]
MASK = [True, False, True, True]
WORD = "hunter2"


def rollout_of(prompt, sample, generation=0):
    number = 2 * int(prompt.prompt_id[1:]) + sample
    response = [20 + number, 5, 6, 1][: 2 + number % 3]
    mask = MASK[: len(response)] if sample else [True] * len(response)
    return tiny_rollout(
        f"{prompt.prompt_id}/s{sample}/g{generation}",
        response,
        prompt_ids=prompt.token_ids,
        loss_mask=mask,
        behavior_logprobs=[-1.0] * len(response),
        generation=generation,
    )


def filled(store, teacher=True):
    """Fill a store with two rollouts of each prompt, scored by the SFT teacher."""
    rollouts = [rollout_of(prompt, sample) for prompt in PROMPTS for sample in range(2)]
    store.append(rollouts)
    if teacher:
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(r, -0.5 - i) for i, r in enumerate(rollouts)])
    return store


def manifest():
    made = evolve(tiny_manifest(), sft_teacher=tiny_provenance().model)
    return evolve(made, sampling=SamplingParams(max_new_tokens=8, samples_per_prompt=2))


@pytest.fixture(params=["memory", "zarr", "lance"])
def opened(request, tmp_path):
    """Return `make()`, a store of each kind, and `again(store)`, as another process would see it."""
    if request.param == "memory":
        return SimpleNamespace(make=lambda: MemoryStore(manifest()), again=lambda store: store)
    kind = {"zarr": ZarrStore, "lance": LanceStore}[request.param]
    path = tmp_path / request.param
    return SimpleNamespace(make=lambda: kind.create(path, manifest()), again=lambda _: kind.open(path))


@pytest.fixture
def store():
    return filled(MemoryStore(manifest()))


def number(_, rollout):
    """Return the number that the first token of a rollout names: a verifier."""
    return int(rollout.response_ids[0]) - 20


def even(prompt, rollout):
    return number(prompt, rollout) % 2 == 0


class Judge:
    """A verifier that gives up after some calls, and counts them."""

    def __init__(self, calls=99, say=number):
        self.say, self.left, self.asked = say, calls, []

    def __call__(self, prompt, rollout):
        assert rollout.rollout_id.startswith(f"{prompt.prompt_id}/"), "a rollout is judged with its own prompt"
        if not self.left:
            raise Interrupted
        self.left -= 1
        self.asked.append(rollout.rollout_id)
        return self.say(prompt, rollout)


class Late(BaseException):
    """What some timeouts are: not an Exception."""


def told(said):
    raise OSError(said)


def late():
    raise Late("5 s")


def test_labels_are_written_resumed_and_read_in_any_store(opened):
    store, bar = filled(opened.make()), Bar()

    def ended(_, rollout):
        if number(_, rollout) == 4:
            raise KeyboardInterrupt
        return number(_, rollout)

    with pytest.raises(KeyboardInterrupt):
        label_rollouts(store, ended, PROMPTS, name="number", rollouts_per_batch=2)
    store = opened.again(store)
    done = int(store.scored("label").sum())
    assert 0 < done < 8, "batches before the interruption are kept"
    judge = Judge()
    report = label_rollouts(store, judge, PROMPTS, name="number", rollouts_per_batch=2, recheck=1, progress=bar)
    assert (report.rollouts, len(judge.asked)) == (8 - done, 8 - done + 1), "one was judged again"
    assert bar.told[0][:4] == ("begin", "labelling label", 8, done)
    lengths = store.lengths()[np.argsort(store.lengths().sum(axis=1), kind="stable")][done:]
    assert (report.read_tokens, report.response_tokens) == (lengths.sum(), lengths[:, 1].sum())
    store = opened.again(store)
    assert labels_of(store).tolist() == list(range(8))
    judge = Judge()
    assert label_rollouts(store, judge, PROMPTS, name="number", recheck=3) == ScoringReport()
    assert len(judge.asked) == 3
    made = store.columns["label"]
    assert (made.logprobs_mode, made.model, made.label) == ("label", ModelId("number", "verifier", "float32"), True)
    for row in store.read(range(8), columns=("label",)):
        assert row.scores["label"].tolist() == [number(None, row.rollout)] * row.rollout.response_ids.size


def test_tokens_may_have_labels_of_their_own_and_survive_compaction_parquet_and_the_doctor(opened, tmp_path):
    store = filled(opened.make())
    label_rollouts(store, lambda _, r: r.response_ids - 10.5, PROMPTS, name="steps", rollouts_per_batch=3)
    label_rollouts(store, even, PROMPTS, column="right", batches_at_once=2, rollouts_per_batch=3)
    if hasattr(store, "compact"):
        store.compact()
        store = opened.again(store)
        assert list(check_store(store)) == []
        info = inspect_store(store)
        assert info.labels == {"label": pytest.approx(float(labels_of(store).mean())), "right": 0.5}
        assert set(info.starts) == {"teacher"}
        assert [c.objection for c in info.columns if c.provenance.label] == [None, None]
        assert "Column 'right': labels, their mean is 0.5 (in at most 8 rollouts, evenly spaced)" in list(show_info(store, info))
        assert "column right 8 of 8 labelled by even@verifier" in str(store)
    export_parquet(store, tmp_path / "s.parquet")
    back = MemoryStore(store.manifest)
    import_parquet(tmp_path / "s.parquet", back)
    for reader in (store, back):
        assert verdict(reader.manifest, reader.columns["label"]) == "not a teacher: these are labels of a verifier"
        assert labels_of(reader, "right").tolist() == [1, 0] * 4
        for row in reader.read(range(8), columns=("label",)):
            assert row.scores["label"].tolist() == (row.rollout.response_ids - 10.5).tolist()


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_labels_are_exact_in_a_store_of_float16(kind, tmp_path):
    store = filled(kind.create(tmp_path / "half", tiny_manifest(), logprob_dtype="float16"))
    for worth, name in ((2049.0, "label"), (70_000.0, "large")):
        label_rollouts(store, lambda _, r, worth=worth: worth + number(None, r), PROMPTS, column=name, name=name, rollouts_per_batch=3)
    store.compact()
    again = kind.open(tmp_path / "half")
    assert labels_of(again).tolist() == [2049.0 + i for i in range(8)]
    assert labels_of(again, "large").tolist() == [70_000.0 + i for i in range(8)]
    assert list(check_store(again)) == []


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_labels_that_an_earlier_version_kept_in_float16_are_gone_on_with(kind, tmp_path, monkeypatch):
    store = filled(kind.create(tmp_path / "half", tiny_manifest(), logprob_dtype="float16"))
    with monkeypatch.context() as earlier:
        earlier.setattr(Root, "formats", lambda root, *_: (root.manifest.tokenizer.vocab_size, root.logprob_dtype))
        with pytest.raises(EngineError, match="Interrupted"):
            label_rollouts(store, Judge(3), PROMPTS, name="number", rollouts_per_batch=2)
    store = kind.open(tmp_path / "half")
    label_rollouts(store, number, PROMPTS, name="number", rollouts_per_batch=3)
    store.compact()
    again = kind.open(tmp_path / "half")
    assert labels_of(again).tolist() == [*range(8)]
    assert list(check_store(again)) == []


def test_the_label_of_a_rollout_is_the_mean_over_its_tokens_that_count_and_is_exact(store):
    third = np.float32(1 / 3)
    label_rollouts(store, lambda _, r: third, PROMPTS[:3], column="third")
    found = labels_of(store, "third")
    assert np.isnan(found).tolist() == [False] * 6 + [True] * 2
    assert (found[:6] == third).all()
    assert np.flatnonzero(found > 0).tolist() == list(range(6)), "what has no label is not among the chosen"
    label_rollouts(store, lambda _, r: np.arange(r.response_ids.size), PROMPTS, column="place")
    counted = [row.rollout.loss_mask for row in store.read(range(8))]
    assert labels_of(store, "place") == pytest.approx([np.flatnonzero(mask).mean() for mask in counted])
    silent = tiny_rollout("p0/s2/g0", [9, 9], prompt_ids=[4, 10], loss_mask=[False, False])
    alone = MemoryStore(evolve(manifest(), sampling=SamplingParams(samples_per_prompt=3)))
    alone.append([silent])
    label_rollouts(alone, lambda *_: [1, 2], PROMPTS)
    assert labels_of(alone).tolist() == [1.5], "where no token counts, over all"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: {}["lost"], "the verifier raised KeyError: 'lost'"),
        (late, "the verifier raised Late: 5 s"),
        (lambda: told(f"400 for url: https://me:{WORD}@host/v1?key={WORD}"), "the verifier raised OSError: 400 for url: https://host/v1"),
        (lambda: told(f"{'x ' * 94}http://me:{WORD}@host"), "the verifier raised OSError: [x ]*http://host"),
        (lambda: told(f"gone: /v1?key={WORD}&k={WORD} (refused)"), r"the verifier raised OSError: gone: /v1 \(refused\)"),
        (lambda: sys.exit(0), "the verifier raised SystemExit: 0"),
        (lambda: None, "the verifier gave None, expected a finite number"),
        (lambda: "right", "the verifier gave 'right', expected a finite number"),
        (lambda: float("nan"), "the verifier gave nan, expected a finite number"),
        (lambda: 1e300, r"the verifier gave 1e\+300, expected a finite number"),
        (lambda: [1.0] * 9, r"logprobs has shape \(9,\)"),
        (lambda: [[1.0]], r"logprobs has shape \(1, 1\)"),
        (lambda: [[1.0], [1.0, 2.0]], "the verifier raised ValueError"),
    ],
)
def test_a_verifier_that_fails_on_one_rollout_does_not_stop_the_rest(store, answer, reason):
    judge = Judge(say=lambda _, r: answer() if number(_, r) == 5 else 1.0)
    with pytest.warns(QuarantineWarning, match=f"1 rollouts are without scores in quarantine.*Rollout 'p2/s1/g0': {reason}") as caught:
        report = label_rollouts(store, judge, PROMPTS)
    assert [warning.filename for warning in caught if warning.category is QuarantineWarning] == [__file__]
    assert (report.rollouts, list(report.refused)) == (7, ["p2/s1/g0"])
    assert len(judge.asked) == 8, "nothing is judged twice"
    assert list(store.quarantined("label")) == [5]
    assert WORD not in store.quarantined("label")[5]
    with pytest.warns(QuarantineWarning, match="retry_quarantined"):
        assert label_rollouts(store, judge, PROMPTS).skipped == 1
    with pytest.warns(QuarantineWarning, match=r"1 of 8 rollouts could not be scored into column 'label' and are left out.*row 5"):
        assert batches(store, ref="behavior", label="label").rows.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert label_rollouts(store, Judge(say=lambda *_: 1.0), PROMPTS, retry_quarantined=True).rollouts == 1


def test_as_many_rollouts_are_judged_at_once_as_batches_were_asked_for(store):
    together = Barrier(4, timeout=30)
    assert label_rollouts(store, lambda *_: together.wait() >= 0, PROMPTS, batches_at_once=4).rollouts == 8


def test_a_verifier_that_fails_on_most_stops_the_run_and_nothing_is_put_in_quarantine(store):
    for options, what in (({"max_refused": 2}, "refused 3 rows, expected at most 2"), ({}, "8 rollouts were refused and 0 accepted")):
        judge = Judge(0)
        with pytest.raises(EngineError, match=f"{what}.*Interrupted"):
            label_rollouts(store, judge, PROMPTS, **options)
        assert "label" not in store.columns


def test_a_column_belongs_to_one_verifier_that_says_the_same_again(store):
    label_rollouts(store, even, PROMPTS, rows=np.array([0, 1, 7]))
    assert np.flatnonzero(store.scored("label")).tolist() == [0, 1, 7]
    with pytest.raises(ConflictError, match="column 'label' was scored by even@verifier, expected number@verifier"):
        label_rollouts(store, number, PROMPTS)
    with pytest.raises(ConflictError, match="column 'teacher' was scored by teacher"):
        label_rollouts(store, even, PROMPTS, column="teacher")
    with pytest.raises(ScorerError, match=r"Rollout 'p0/s0/g0': column 'label' has the label 1, and the verifier now gives 0.*recheck=0"):
        label_rollouts(store, number, PROMPTS, name="even")
    assert label_rollouts(store, number, PROMPTS[1:2], name="even", recheck=0).rollouts == 2
    label_rollouts(store, number, PROMPTS, column="whole", name="number")
    with pytest.raises(ScorerError, match="'p0/s0/g0': column 'whole' has the label 0, and the verifier now gives 1"):
        label_rollouts(store, lambda *_: 1, PROMPTS, column="whole", name="number")
    assert label_rollouts(store, lambda *_: 1, PROMPTS, column="whole", name="number", recheck=0) == ScoringReport()
    scorer = SimpleNamespace(provenance=tiny_provenance(), score=lambda rollouts: [])
    with pytest.raises(ConflictError, match="column 'label' was scored by even@verifier"):
        score_rollouts(store, scorer, column="label", preflight=None)


def test_a_partial_has_the_name_of_its_function_and_nothing_of_what_it_passes(store):
    def asking(prompt, rollout, key):
        return number(prompt, rollout)

    label_rollouts(store, partial(asking, key="sesame"), PROMPTS)
    assert store.columns["label"].model.name == asking.__qualname__


def test_prompts_and_rows_that_do_not_fit_are_refused(store):
    with pytest.raises(ConflictError, match="has a prompt of 2 tokens other than those of prompt 'p0'"):
        label_rollouts(store, even, [Prompt("p0", [4, 99])])
    with pytest.raises(InvalidRecordError, match="0 rows were chosen"):
        label_rollouts(store, even, [Prompt("unseen", [4])])
    with pytest.raises(InvalidRecordError, match="0 rows were chosen"):
        label_rollouts(store, even, PROMPTS[:1], rows=np.array([7]))
    with pytest.raises(NoSuchRowError, match="row 8"):
        label_rollouts(store, even, PROMPTS, rows=np.array([8]))
    with pytest.raises(InvalidRecordError, match="Prompt 'p0': its id occurs twice"):
        label_rollouts(store, even, [*PROMPTS, Prompt("p0", [4, 10], answer="other")])
    with pytest.raises(InvalidRecordError, match="Labelling: recheck is -1"):
        label_rollouts(store, even, PROMPTS, recheck=-1)
    with pytest.raises(InvalidRecordError, match="rollouts_per_batch is 0"):
        label_rollouts(store, even, PROMPTS, rollouts_per_batch=0)


def test_rollouts_whose_prompts_are_not_at_hand_are_all_labelled(store):
    more = evolve(rollout_of(PROMPTS[0], 1), rollout_id="p0/s7/g0")  # as an import names one, whatever `samples_per_prompt` is
    store.append([more])
    assert [label_rollouts(store, number, part, column="some").rollouts for part in (PROMPTS[1:], PROMPTS)] == [6, 3]
    seen = {}
    rewards = {f"p{i}/s{s}/g0": i + s / 8 for i in range(4) for s in (0, 1, 7)}
    label_rollouts(store, lambda prompt, r: seen.setdefault(r.rollout_id, prompt) and rewards[r.rollout_id], None, name="recorded")
    assert labels_of(store).tolist() == [0, 1 / 8, 1, 9 / 8, 2, 17 / 8, 3, 25 / 8, 7 / 8]
    assert {name: (prompt.prompt_id, prompt.answer) for name, prompt in seen.items()} == {name: (name[:2], None) for name in seen}
    (mean,) = {per_rollout(batches(store, teacher=None, label="label", rows=np.array([0])).step(0), "label_means")[0]}
    assert mean == pytest.approx((0 + 1 / 8 + 7 / 8) / 3)


def test_labels_are_refused_wherever_log_probs_are_expected_and_the_other_way_round(store, tmp_path):
    label_rollouts(store, even, PROMPTS)
    page = tmp_path / "page.html"
    for wrong in (
        lambda: batches(store, teacher="label"),
        lambda: batches(store, teacher={"label": PROMPTS}),
        lambda: batches(store, ref="label"),
        lambda: stored_advantages(store, teacher="label"),
        lambda: stored_advantages(store, student="label"),
        lambda: residualise(store, "label"),
        lambda: measure_start(store, teacher="label"),
        lambda: audit(store, ["teacher", "label"]),
        lambda: write_token_report(page, store, [0], report=TokenReport("label", "behavior")),
    ):
        with pytest.raises(InvalidRecordError, match="column 'label' holds labels of even@verifier, expected a model's log-probs"):
            wrong()
    write_token_report(page, store, [0], report=TokenReport("teacher", "behavior", "label"))
    assert "even@verifier" in page.read_text()
    for wrong in (lambda: batches(store, label="teacher"), lambda: labels_of(store, "teacher")):
        with pytest.raises(InvalidRecordError, match="column 'teacher' holds log-probs of teacher@rev-teacher, expected labels"):
            wrong()
    with pytest.raises(MissingScoresError, match=r"column 'reward' is absent, expected labels, of which there are \['label'\]"):
        batches(store, label="reward")
    for wrong in ({"label": 1}, {"ref": ["behavior"]}):
        with pytest.raises(ArgumentError, match="expected the name of a column; pass a str"):
            batches(store, **wrong)
    label_rollouts(store, even, PROMPTS[:1], column="part")
    with pytest.raises(MissingScoresError, match=r"column 'part' has scores for 2 rollouts, expected 8; run `label_rollouts\("):
        batches(store, label="part")


def per_rollout(step, name):
    """Return the value of each rollout of a step by its first response token; those of prompt tokens are 0, and the others equal."""
    found = {}
    for batch in step.batches:
        values = getattr(batch, name)
        for segment in range(int(batch.segment_ids.max()) + 1):
            own = batch.segment_ids == segment
            response = own & (batch.position_ids >= 1)
            assert not values[own & ~response].any()
            (value,) = set(values[response].tolist())
            found[int(batch.targets[response][0]) - 20] = value
    return found


def test_batches_bring_labels_and_the_means_of_their_groups(store):
    label_rollouts(store, number, PROMPTS)
    rows = np.array([0, 3, 4, 5])
    step = batches(store, ref="behavior", label="label", rows=rows, tokens_per_batch=12, weighting=by_token).step(0)
    assert len(step.batches) > 1
    assert per_rollout(step, "label_values") == {0: 0, 3: 3, 4: 4, 5: 5}
    assert per_rollout(step, "label_means") == {0: 0.5, 3: 2.5, 4: 4.5, 5: 4.5}, "rollouts that are not trained on count in their groups"
    assert batches(store, ref="behavior").step(0).batches[0].label_values is None
    store.append_scores("other", tiny_provenance("other"), [tiny_scores(rollout_of(p, s)) for p in PROMPTS[2:] for s in range(2)])
    two = {"teacher": PROMPTS[:2], "other": PROMPTS[2:]}
    with pytest.warns(TeacherConsistencyWarning):
        shared = batches(store, teacher=two, ref="behavior", label="label", consistency=ConsistencyPolicy.WARN).step(0)
    assert per_rollout(shared, "label_means") == {i: i // 2 * 2 + 0.5 for i in range(8)}


def test_a_student_that_learns_from_labels_alone_keeps_its_sft_teacher(store):
    label_rollouts(store, number, PROMPTS)
    learnt = batches(store, teacher=None, ref="behavior", label="label").lineage
    assert (learnt.sft_teacher, learnt.opd_teacher) == (store.manifest.sft_teacher, None)
    # texts that a verifier chose are SFT on one's own text
    assert batches(store, teacher=None).lineage.sft_teacher == store.manifest.policy


def test_the_card_of_a_student_of_labels_alone_takes_its_store_and_does_not_call_it_sft(store, tmp_path):
    label_rollouts(store, number, PROMPTS)
    (tmp_path / "adapter_config.json").write_text("{}")
    for method, options in (("training on labels", {"ref": "behavior", "label": "label"}), ("SFT", {})):
        batches(store, teacher=None, **options).lineage.write(tmp_path)
        assert f"| method | {method}, by lopd " in str(model_card(tmp_path, store=store))
        assert "| method | SFT, or training on labels, by lopd " in str(model_card(tmp_path))


def test_the_card_of_a_student_of_the_text_of_some_rounds_takes_its_store(store, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    policies = [store.manifest.policy, ModelId("policy", "rev-p2", "float32"), ModelId("policy", "rev-p3", "float32")]
    for generation in (1, 2):
        store.begin_generation(generation, policies[generation])
        store.append([rollout_of(PROMPTS[0], 0, generation=generation)])
    for rows in ([0], [8], [0, 9], None):
        lineage = batches(store, teacher=None, rows=rows and np.array(rows)).lineage
        lineage.write(tmp_path)
        assert "| method | SFT, by lopd " in str(model_card(tmp_path, store=store))
    assert lineage.sft_teacher == mixture_id(policies)
    Lineage(mixture_id([*policies[:1], ModelId("stranger", "1", "float32")]), store=lineage.store).write(tmp_path)
    with pytest.raises(
        ManifestMismatchError, match=r"its SFT teacher is policy@rev-p \+ stranger@1, expected policy@rev-p \+ .*, the store"
    ):
        model_card(tmp_path, store=store)


def test_a_group_is_of_one_round_and_prompts_with_one_rollout_have_no_mean(store):
    policy = ModelId("policy", "rev-p2", "float32")
    store.begin_generation(1, policy)
    late = [rollout_of(PROMPTS[0], 0, generation=1)]
    store.append(late)
    label_rollouts(store, lambda prompt, r: number(prompt, r) + 10 * r.generation, PROMPTS)
    assert labels_of(store)[-1] == 10
    step = batches(store, teacher=None, label="label", rows=np.array([0, 8])).step(0)
    assert sorted(step.batches[0].label_means[step.batches[0].weight > 0].unique().tolist()) == [0.5, 10.0]
    label_rollouts(store, even, PROMPTS, column="alone", rows=np.arange(0, 8, 2))
    (batch,) = batches(store, teacher=None, label="alone", rows=np.arange(0, 8, 2)).step(0).batches
    assert batch.label_means is None
    with pytest.raises(MissingScoresError, match=r'label_means is None, expected the mean of several .*; sample with .*`turns="together"`'):
        ReferenceOPDLoss(advantage=0.0, transforms=(add_labels,))(torch.zeros(len(batch.inputs), 2), LMHead(torch.zeros(300, 2)), batch)


def test_a_checkpoint_notices_other_labels(store):
    label_rollouts(store, number, PROMPTS, rows=np.arange(7))
    options = {"teacher": None, "rows": np.arange(7)}
    assert batches(store, **options).settings["label"] is None
    before, same = (batches(store, label="label", **options).settings["label"] for _ in range(2))
    assert before == same
    label_rollouts(store, number, PROMPTS)
    assert batches(store, label="label", **options).settings["label"] != before, "a rollout has joined a group"


def test_turns_that_share_an_id_and_have_other_prompts_are_not_a_group() -> None:
    store = MemoryStore(tiny_manifest())
    turns = [tiny_rollout(f"task/s{i}/g0", [5], prompt_ids=ids) for i, ids in enumerate(([1], [1, 2, 3], [1]))]
    store.append(turns)
    label_rollouts(store, lambda prompt, rollout: float(len(rollout.prompt_ids)), None)
    labels, means = labels_and_means(store, "label")
    assert labels.tolist() == means.tolist() == [1.0, 3.0, 1.0]


def test_a_checkpoint_notices_other_labels_of_the_same_group_means(store):
    labelled = partial(label_rollouts, store, prompts=PROMPTS)
    labelled(verifier=lambda prompt, rollout: float(rollout.rollout_id.split("/")[1] == "s0"), column="first")
    labelled(verifier=lambda prompt, rollout: float(rollout.rollout_id.split("/")[1] == "s1"), column="second")
    digests = [batches(store, ref="behavior", label=name).settings["label"].partition(", ")[2] for name in ("first", "second")]
    assert digests[0] != digests[1]


def test_all_imported_rollouts_of_a_prompt_are_found_whatever_the_manifest_says() -> None:
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout(f"{name}/s{i}/g0") for name in "ab" for i in range(4)])
    assert store.manifest.sampling.samples_per_prompt == 1
    assert rows_of(store, [Prompt("b", [4])]).tolist() == [4, 5, 6, 7]
    assert rows_of(store, [Prompt("c", [4])]).tolist() == []


def test_what_a_checkpoint_knows_of_rows_and_labels_is_what_an_older_lopd_wrote():
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout(name) for name in ("p0/s0/g0", "p0/s1/g0", "p1/s0/g0")])
    label_rollouts(store, lambda _, rollout: float("s0" in rollout.rollout_id), None)
    settings = batches(store, teacher=None, label="label").settings
    rows, labels = struct.pack("<9q", 0, 1, 2, 1, 1, 1, 3, 3, 3), struct.pack("<6f", 1, 0, 1, 0.5, 0.5, 1)
    assert settings["rows"] == f"3 rollouts, {blake2b(rows, digest_size=6).hexdigest()}"
    assert settings["label"] == f"label, {blake2b(labels, digest_size=6).hexdigest()}"
