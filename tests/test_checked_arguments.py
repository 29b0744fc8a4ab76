"""What is passed to a record, a store, a prompt file, a checkpoint or an export is checked where it is passed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from chat_tokenizers import byte_tokenizer
from hub_stub import hub  # noqa: F401
from small_runs import adamw, make_store, scored, small, teacher_model  # noqa: F401

from lopd import (
    ConsistencyPolicy,
    FusedOPDLoss,
    LanceStore,
    MemoryStore,
    ModelId,
    Prompt,
    ZarrStore,
    batches,
    load_checkpoint,
    make_prompts,
    opd_steps,
    open_store,
    read_prompts,
    save_checkpoint,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, load_model
from lopd.errors import (
    ArgumentError,
    CheckpointError,
    EngineError,
    InvalidRecordError,
    PromptError,
    StoreExistsError,
    StorePathError,
)
from lopd.records import Lineage, Scores, StoreId
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.tools.share import pull_store

TEACHER = ModelId("teacher", "1", "float32")


def test_a_lineage_is_never_written_over_a_store(scored, tmp_path):
    for kind in (ZarrStore, LanceStore):
        path = tmp_path / kind.__name__
        kind.create(path, scored.manifest)
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(InvalidRecordError, match="the folder is a store, expected a model's"):
            Lineage().write(path)
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    for work in (Lineage().write, Lineage.read):
        with pytest.raises(InvalidRecordError, match="there is no such folder"):
            work(tmp_path / "typo")
    for name, kind in {"sft_teacher": "ModelId", "store": "StoreId"}.items():
        with pytest.raises(InvalidRecordError, match=f"{name} is 'qwen', expected a {kind}"):
            Lineage(**{name: "qwen"})


def test_a_lineage_that_is_written_into_an_export_leaves_it_an_export(small, tokenizer, tmp_path):
    student, _ = small
    for lineage in (Lineage(), Lineage(TEACHER, store=StoreId(8, "a"))):
        student.export(tmp_path / "out", tokenizer, lineage)
        Lineage(sft_teacher=TEACHER).write(tmp_path / "out")
        assert Lineage.read(tmp_path / "out") == Lineage(sft_teacher=TEACHER)


@pytest.mark.parametrize("below", ["", "logs"])
def test_an_export_does_not_take_the_working_directory_away(below, small, tokenizer, monkeypatch, tmp_path):
    student, _ = small
    place = tmp_path / "run" / below
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    with pytest.raises(StoreExistsError, match=f"it is the working directory, or holds it.*written to {tmp_path / 'run-export'}"):
        student.export(tmp_path / "run", tokenizer, Lineage())
    assert Path.cwd().samefile(place)
    assert load_model(tmp_path / "run-export")


def test_an_export_needs_no_working_directory(small, tokenizer, monkeypatch, tmp_path):
    student, _ = small
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    for _ in range(2):
        student.export(tmp_path / "out", tokenizer, Lineage())


@pytest.mark.parametrize("norm", [-1.0, 0, float("nan"), "1", True])
def test_a_norm_that_would_turn_or_spoil_gradients_is_refused(norm, small, scored):
    student, optimizer = small
    with pytest.raises(InvalidRecordError, match="max_grad_norm is"):
        opd_steps(student, batches(scored, rollouts_per_step=4, ref="behavior")[:1], FusedOPDLoss(), optimizer, max_grad_norm=norm)


def test_a_list_of_teachers_is_no_teacher(scored):
    with pytest.raises(ArgumentError, match="Teacher: it is a list, expected the name of a column"):
        batches(scored, teacher=["teacher"])


@pytest.mark.parametrize("top_k", [20, 1, None, "20"])
def test_how_many_likely_tokens_come_along_is_not_asked(top_k, scored):
    with pytest.raises(ArgumentError, match=rf"Steps: top_k is {top_k!r}, expected True or False; pass `top_k=True`, how many"):
        batches(scored, top_k=top_k)


@pytest.mark.filterwarnings("ignore::lopd.errors.TeacherConsistencyWarning")
def test_a_truth_of_numpy_is_one():
    store, rollouts = MemoryStore(tiny_manifest()), [tiny_rollout("p/s0/g0")]
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(r), top_k=tiny_top_k(3)) for r in rollouts])
    for truth in (True, False):
        steps = batches(store, top_k=np.bool_(truth), consistency=ConsistencyPolicy.WARN)
        assert steps.settings["top_k"] is truth
        assert (steps.step(1).batches[0].top_k_ids is not None) is truth


@pytest.mark.parametrize("wrong", [{"text": 3}, {"answer": 3}, {"answer": 1.0}])
def test_a_text_or_answer_that_no_response_equals_is_refused(wrong):
    with pytest.raises(InvalidRecordError, match=r"Prompt 'p': (text|answer) is an? \w+, expected a str"):
        Prompt("p", [1], **wrong)


def test_the_name_of_a_consistency_policy_is_not_one(scored):
    with pytest.raises(ArgumentError, match="Consistency: it is 'error', expected a ConsistencyPolicy"):
        batches(scored, consistency="error")


def test_records_from_a_generator_are_written_and_others_are_refused(make_store, scored):
    rows = list(scored.read(range(4), columns=["teacher"]))
    store, provenance = make_store(scored.manifest), scored.columns["teacher"]
    store.append(row.rollout for row in rows)
    store.append_scores("teacher", provenance, (Scores.of(row.rollout, row.scores["teacher"]) for row in rows))
    assert (len(store), int(store.scored("teacher").sum())) == (4, 4)
    with pytest.raises(InvalidRecordError, match=r"it was given a Rollout, expected a list of Rollout objects; pass `\[...\]`"):
        store.append(rows[0].rollout)
    with pytest.raises(InvalidRecordError, match="it was given a str, expected a list of Rollout objects"):
        store.append(["a"])
    with pytest.raises(InvalidRecordError, match="it was given an int, expected a list of Scores objects"):
        store.append_scores("teacher", provenance, 3)


def test_paths_names_and_dtypes_of_another_type_are_one_sentence(scored, teacher_model, tokenizer):
    for path in (3, None, b"run.zarr"):
        with pytest.raises(StorePathError, match="expected text or a Path"):
            open_store(path)
    with pytest.raises(InvalidRecordError, match="the column name is 3"):
        score_rollouts(scored, HFScorer(teacher_model, tokenizer), column=3)
    with pytest.raises(EngineError, match=r"dtype is .flot., expected a torch\.dtype"):
        load_model("anywhere", "flot")


def test_steps_and_lineage_of_a_checkpoint_are_what_they_must_be(small, scored, tmp_path):
    student, optimizer = small
    steps = batches(scored, rollouts_per_step=4, ref="behavior")[:2]
    with pytest.raises(ArgumentError, match="Steps: it is a list, which has no `lineage`"):
        save_checkpoint(tmp_path, student, optimizer, next_step=1, steps=list(steps))
    with pytest.raises(ArgumentError, match="Lineage: it is a str"):
        save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage="teacher")
    assert not list(tmp_path.iterdir())
    made = save_checkpoint(tmp_path, student, optimizer, next_step=1, steps=steps)
    with pytest.raises(ArgumentError, match="Steps: it is a list, which has no `lineage`"):
        load_checkpoint(tmp_path, student, optimizer, steps=list(steps))
    shutil.rmtree(made)
    with pytest.raises(CheckpointError, match="there is no such folder; check the path"):
        load_checkpoint(made, student, optimizer, steps=steps)
    assert load_checkpoint(tmp_path / "new", student, optimizer, steps=steps) == 0


@pytest.mark.parametrize(
    "value", [np.zeros((0, 3)), np.array(3), np.complex64(1 + 2j), np.arange(2, dtype=np.complex128), torch.bfloat16], ids=str
)
def test_arrays_and_dtypes_of_an_optimizer_come_back_as_they_were(value, llama, small, scored, tmp_path):
    student, optimizer = small
    optimizer.param_groups[0]["extra"] = value
    save_checkpoint(tmp_path, student, optimizer, next_step=0, lineage=Lineage())
    fresh = adamw(student)
    load_checkpoint(tmp_path, student, fresh)
    found = fresh.param_groups[0]["extra"]
    assert type(found) is type(value)
    assert repr(found) == repr(value)
    assert getattr(found, "shape", None) == getattr(value, "shape", None)


@pytest.mark.parametrize("value", [np.longdouble(0.1), torch.eye(2).to_sparse()], ids=["long", "sparse"])
def test_what_a_checkpoint_cannot_hold_is_refused_by_name(value, small, tmp_path):
    student, optimizer = small
    optimizer.param_groups[0]["extra"] = value
    with pytest.raises(InvalidRecordError, match=r"Checkpoint of step 0, AdamW .*expected"):
        save_checkpoint(tmp_path, student, optimizer, next_step=0, lineage=Lineage())
    assert not list(tmp_path.iterdir())


DEEP = []
for _ in range(3000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contents": [{"prompt": "a", "answer": DEEP}]}, "Prompt number 0: it holds values that are nested too deep"),
        ({"template": None}, "`template` is None, expected text"),
        ({"field": ["prompt"]}, r"`field` is \['prompt'\], expected text"),
        ({"max_tokens": "5"}, "max_tokens is '5', expected a whole number"),
        ({"ids": (str(i) for i in range(1))}, "the ids are a generator, expected a list"),
        ({"answers": "a"}, "the answers are a str, expected a list"),
    ],
)
def test_arguments_of_prompts_are_checked(arguments, message):
    with pytest.raises((PromptError, InvalidRecordError), match=message):
        make_prompts(**{"contents": ["a"], "tokenizer": byte_tokenizer(), **arguments})


def test_a_turn_without_a_content_is_refused_unless_an_assistant_calls_a_tool(tmp_path):
    turns = [{"role": "user", "name": "ann", "content": None}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}]
    with pytest.raises(PromptError, match="Prompt number 0, message 0: its content is None, expected text"):
        make_prompts([turns], byte_tokenizer())
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": ' + "[" * 900 + "]" * 900 + "}\n")
    with pytest.raises(PromptError, match=r"line 1: it holds values that are nested too deep|is not JSON"):
        read_prompts(path, byte_tokenizer())


def test_a_store_in_the_place_of_what_makes_one_is_refused_before_a_download(hub):
    for store in (MemoryStore(tiny_manifest()), "run.zarr"):
        with pytest.raises(ArgumentError, match=r"Repository me/rollouts .*: store is a .*; pass `lambda manifest: ZarrStore"):
            pull_store("me/rollouts", store=store)
    assert hub.requests == []
