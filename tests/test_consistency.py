"""Teacher consistency: which columns a student may be trained on."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from helpers import OTHER_TEACHER, POLICY, SFT_TEACHER, make_manifest, make_provenance, make_store, random_records
from named_batches import numbered_records, rows_of

from lopd import batches, score_rollouts
from lopd.errors import ConflictError, InvalidRecordError, TeacherConsistencyError, TeacherConsistencyWarning
from lopd.guards import ConsistencyPolicy
from lopd.records import Lineage, ModelId, SamplingParams, Scores, StoreId, mixture_id
from lopd.records.identity import UNKNOWN
from lopd.verbs import StepStream


def stream_with(sft_teacher: ModelId | None, scorer: ModelId, consistency: ConsistencyPolicy = ConsistencyPolicy.ERROR) -> StepStream:
    manifest = make_manifest(sft_teacher)
    store = make_store(numbered_records(2), columns=("teacher",), manifest=manifest, provenance=lambda _: make_provenance(scorer))
    return batches(store, consistency=consistency)


def test_the_teacher_that_wrote_the_sft_data_may_score() -> None:
    assert stream_with(SFT_TEACHER, SFT_TEACHER).lineage == Lineage(sft_teacher=SFT_TEACHER, opd_teacher=SFT_TEACHER)


def test_the_lineage_records_the_rollouts_that_were_there() -> None:
    store = make_store(random_records(0, 5))
    lineage = batches(store, rows=np.arange(2)).lineage
    assert lineage.store == StoreId.of(store.manifest, store.lengths())
    assert lineage.store != StoreId.of(store.manifest, store.lengths()[:4])
    assert lineage.store != StoreId.of(evolve(store.manifest, policy=OTHER_TEACHER), store.lengths())


def test_the_identity_of_rollouts_is_the_one_that_lineages_on_disk_have() -> None:
    manifest, lengths = make_manifest(), np.arange(6).reshape(3, 2)
    plain = StoreId.of(manifest, lengths)
    heated = StoreId.of(evolve(manifest, sampling=SamplingParams(temperature=0.5, stop_ids=(1, 2))), lengths)
    assert (plain.digest, heated.digest) == ("b77386964ee0554a97f5e63a45f1cdc9", "32677c16258377ec74ae93c71c23045d")


def test_the_same_weights_pass_under_any_name_and_dtype() -> None:
    renamed = ModelId("a mirror of it", SFT_TEACHER.revision, "float8")
    assert stream_with(SFT_TEACHER, renamed).lineage.opd_teacher == renamed


def test_another_teacher_is_refused() -> None:
    with pytest.raises(
        TeacherConsistencyError,
        match=r"its SFT teacher is big-teacher@teacher-weig, and the scoring teacher is other-teacher@other-weight, expected the same model",
    ):
        stream_with(SFT_TEACHER, OTHER_TEACHER)


def test_a_teacher_whose_adapters_another_processor_may_have_rounded_is_told_how_to_go_on() -> None:
    first, second = (ModelId("adapters", revision, "float32") for revision in ("weights:1/2", "weights:3/2"))
    note = r"expected .* \(if both are the same adapters, .* another processor rounds otherwise: merge them once"
    with pytest.raises(TeacherConsistencyError, match=note):
        stream_with(first, second)
    store = make_store(numbered_records(2), columns=("teacher",), provenance=lambda _: make_provenance(first))
    with pytest.raises(ConflictError, match=note):
        store.append_scores("teacher", make_provenance(second), [])
    with pytest.raises(TeacherConsistencyError, match=r"lopd 0\.2 recorded one of them: .* in the concepts") as caught:
        stream_with(evolve(first, revision="weights:1"), second)
    assert "identity=" not in str(caught.value), "other weights under the same name are to be refused"


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
    with pytest.raises(
        TeacherConsistencyError, match=r"its SFT teacher is not recorded.*sample again into another store.*ConsistencyPolicy.WARN"
    ):
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


def scoring(sft_teacher: ModelId | None, scorer: ModelId, policy: ModelId = POLICY, column: str = "teacher", **changes: Any) -> None:
    made = make_store(numbered_records(2), columns=(), manifest=evolve(make_manifest(sft_teacher), policy=policy))
    provenance = evolve(make_provenance(scorer), **changes)
    score = lambda rollouts: [Scores.of(r, -np.ones(r.response_ids.size)) for r in rollouts]  # noqa: E731
    for _ in range(2):
        score_rollouts(made, SimpleNamespace(provenance=provenance, score=score), column=column, preflight=None)


@pytest.mark.parametrize("sft_teacher", [None, OTHER_TEACHER, mixture_id([OTHER_TEACHER, POLICY])])
def test_a_scorer_that_training_would_refuse_is_said_once_before_it_scores(sft_teacher: ModelId | None) -> None:
    with pytest.warns(TeacherConsistencyWarning, match="and the scoring teacher is big-teacher@teacher-weig") as caught:
        scoring(sft_teacher, SFT_TEACHER)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(TeacherConsistencyWarning, match="and the scoring teacher is other-teacher"):
        scoring(SFT_TEACHER, OTHER_TEACHER, logprobs_mode="privileged 1")


def test_a_scorer_that_may_be_meant_for_more_than_teaching_draws_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # elsewhere in the tests a teacher that is not recorded is ignored
        scoring(SFT_TEACHER, SFT_TEACHER)
        scoring(mixture_id([OTHER_TEACHER, SFT_TEACHER]), SFT_TEACHER)
        scoring(SFT_TEACHER, POLICY)  # a reference
        scoring(None, POLICY)
        scoring(None, POLICY, logprobs_mode="privileged 1")
        scoring(None, SFT_TEACHER, policy=UNKNOWN)  # an audit of text
        scoring(SFT_TEACHER, OTHER_TEACHER, column="other")  # to be made a residual of


@pytest.mark.parametrize("sft_teacher", [None, OTHER_TEACHER])
def test_sft_needs_no_scores_and_makes_the_writer_of_the_rollouts_the_sft_teacher(sft_teacher: ModelId | None) -> None:
    stream = batches(make_store(numbered_records(2), columns=(), manifest=make_manifest(sft_teacher)), teacher=None)
    assert stream.lineage == Lineage(sft_teacher=POLICY, opd_teacher=None)
    assert stream.step(0).batches[0].teacher_logprobs is None


def test_sft_on_a_round_of_an_unknown_writer_has_no_sft_teacher() -> None:
    store = make_store(numbered_records(2), columns=())
    store.begin_generation(1, UNKNOWN)
    store.append([evolve(store.read([0])[0].rollout, rollout_id="late", generation=1)])
    assert batches(store, teacher=None).lineage == Lineage()
    assert batches(store, teacher=None, rows=np.arange(2)).lineage == Lineage(sft_teacher=POLICY)


def test_a_ref_column_is_read_beside_the_teacher_and_is_no_matter_of_consistency() -> None:
    batch = batches(make_store(random_records(0, 3)), ref="ref", rollouts_per_step=3).step(0).batches[0]
    assert batch.teacher_logprobs is not None
    assert batch.ref_logprobs is not None
    assert not torch.equal(batch.teacher_logprobs, batch.ref_logprobs)


def test_a_ref_column_of_another_model_than_the_policy_is_refused() -> None:
    store = make_store(random_records(0, 3), provenance=lambda _: make_provenance(SFT_TEACHER))
    with pytest.raises(InvalidRecordError, match=r"'ref' was scored by big-teacher.*expected the policy"):
        batches(store, ref="ref", rollouts_per_step=3)
