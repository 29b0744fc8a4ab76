"""Checkpoints: resumed bit for bit, refused when of another run, and whole when a save is interrupted."""

import copy
import errno
import gc
import json
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import TOKENIZER_ID
from small_runs import Interrupted, adamw, assert_same_state, plain_sgd, scored, small, state_of, teacher_model  # noqa: F401

import lopd.verbs.checkpoint
from lopd import batches, load_checkpoint, opd_steps, save_checkpoint
from lopd.engines.student import CausalLMStudent
from lopd.errors import CheckpointError, InvalidRecordError, StoreWriteError
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import Lineage, Ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*of its advantages are below:lopd.errors.AdvantageWarning")  # the models are random


def momentum(student):
    return torch.optim.SGD(student.parameters(), lr=1e-2, momentum=0.9)


def advance(student, optimizer, store, start, stop):
    steps = batches(store, rollouts_per_step=5, tokens_per_batch=40, seed=3)[start:stop]
    return [m.loss for m in opd_steps(student, steps, ReferenceOPDLoss(), optimizer)]


@pytest.mark.filterwarnings("ignore:.*nats a token from the policy's log-probs:lopd.errors.DriftWarning")  # another model sampled
@pytest.mark.parametrize("kind", ["gpt2_dropout", "llama_tied"])
@pytest.mark.parametrize("make_optimizer", [adamw, momentum, plain_sgd])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(kind, make_optimizer, make_model, scored, tmp_path):
    def fresh(seed):
        student = CausalLMStudent(make_model(kind, seed), TOKENIZER_ID)
        return student, make_optimizer(student)

    whole, whole_optimizer = fresh(1)
    torch.manual_seed(9)
    losses = advance(whole, whole_optimizer, scored, 0, 6)

    first, first_optimizer = fresh(1)
    torch.manual_seed(9)
    head = advance(first, first_optimizer, scored, 0, 3)
    save_checkpoint(tmp_path, first, first_optimizer, next_step=3, lineage=Lineage())

    second, second_optimizer = fresh(2)  # other weights and another random state: all must come from the checkpoint
    torch.manual_seed(1234)
    start = load_checkpoint(tmp_path, second, second_optimizer)
    assert start == 3
    tail = advance(second, second_optimizer, scored, start, 6)
    assert head + tail == losses
    assert_same_state(state_of(second, second_optimizer), state_of(whole, whole_optimizer))
    if kind == "gpt2_dropout":
        other, other_optimizer = fresh(1)
        torch.manual_seed(10)
        assert advance(other, other_optimizer, scored, 0, 6) != losses, "without dropout the random state would not be tested"


def test_each_rank_draws_on_and_those_of_another_number_draw_apart(small, tmp_path, monkeypatch):
    def drawn(rank, size):
        monkeypatch.setattr(Ranks, "current", lambda: Ranks(rank, size))
        torch.manual_seed(3)
        assert load_checkpoint(tmp_path, *small) == 1
        return torch.rand(3).tolist()

    states, wanted = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({"rng.cpu": torch.get_rng_state()})
        wanted.append(torch.rand(3).tolist())
    monkeypatch.setattr(Ranks, "gather", lambda ranks, mine: [states[0], states[1]] if isinstance(mine[0], dict) else mine * ranks.size)
    save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage())
    assert [drawn(0, 2), drawn(1, 2)] == wanted
    three = [drawn(rank, 3) for rank in range(3)]
    assert three[0] == wanted[0] == drawn(0, 1)
    assert len({*map(tuple, [*three, *wanted])}) == 4
    assert three == [drawn(rank, 3) for rank in range(3)]


def test_what_a_gpu_draws_goes_on(small, tmp_path, monkeypatch):
    states = {torch.device("cuda", 1): torch.arange(16, dtype=torch.uint8), torch.device("cuda", 0): torch.ones(16, dtype=torch.uint8)}
    now = dict(states)
    monkeypatch.setattr("lopd.verbs.training_state._cards", lambda _: [*states])
    monkeypatch.setattr(torch.cuda, "get_rng_state", now.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, card: now.update({card: state}))
    save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage())
    now.clear()
    load_checkpoint(tmp_path, *small)
    assert all(torch.equal(now[card], state) for card, state in states.items())


def test_a_checkpoint_is_found_by_its_own_folder_too(small, tmp_path):
    path = save_checkpoint(tmp_path / "run", *small, next_step=7, lineage=Lineage())
    assert load_checkpoint(path, *small) == load_checkpoint(tmp_path / "run", *small) == 7


def test_an_optimizer_of_another_model_and_a_loss_that_is_a_class_are_refused_before_the_first_step(small, scored, llama):
    student, optimizer = small
    strange = adamw(CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID))
    with pytest.raises(InvalidRecordError, match=r"Optimizer AdamW: it has none of the student's \d+ trained parameters"):
        next(opd_steps(student, batches(scored), ReferenceOPDLoss(), strange))
    with pytest.raises(InvalidRecordError, match=r"it is the class ReferenceOPDLoss, expected an object; call it: ReferenceOPDLoss\(\)"):
        next(opd_steps(student, batches(scored), ReferenceOPDLoss, optimizer))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(student.model.parameters(), llama.parameters(), strict=True))


def test_saving_leaves_one_checkpoint_and_its_lineage(small, scored, tmp_path):
    lineage = batches(scored).lineage
    assert lineage.opd_teacher == scored.columns["teacher"].model
    for step in (3, 12):
        path = save_checkpoint(tmp_path / "run", *small, next_step=step, lineage=lineage)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [path.name] == ["step-00000012.0"]
    assert Lineage.read(path) == lineage
    assert load_checkpoint(tmp_path / "run", *small) == 12


def test_the_umask_decides_who_may_read_a_checkpoint(small, tmp_path):
    before = os.umask(0o022)
    try:
        path = save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == dict.fromkeys(
        ("parameters.safetensors", "optimizer.safetensors", "state.json", "lopd.json"), 0o644
    )


def test_without_a_checkpoint_a_run_starts_at_step_zero(small, tmp_path):
    before = state_of(*small)
    assert load_checkpoint(tmp_path / "none", *small) == 0
    assert_same_state(state_of(*small), before)


def test_weights_can_be_loaded_without_the_optimizer(small, make_model, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=4, lineage=Lineage())
    other = CausalLMStudent(make_model("llama_tied", 5), TOKENIZER_ID)
    random_state = torch.get_rng_state()
    assert load_checkpoint(tmp_path, other) == 4
    assert torch.equal(torch.get_rng_state(), random_state)
    for (name, a), (_, b) in zip(other.named_parameters(), small[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("what", ["names", "shapes", "dtype", "frozen", "optimizer", "groups"])
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(what, small, make_model, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=4, lineage=Lineage())
    model = make_model("mistral_window" if what == "names" else "llama_tied", 5)
    if what == "shapes":
        model.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    if what == "dtype":
        model.to(torch.bfloat16)
    student = CausalLMStudent(make_model("llama_tied", 5), TOKENIZER_ID)
    student.model = model
    if what == "frozen":
        model.model.norm.weight.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = momentum(student) if what == "optimizer" else torch.optim.AdamW(trained, lr=1e-3)
    if what == "groups":
        optimizer = torch.optim.AdamW([{"params": trained[:3]}, {"params": trained[3:]}], lr=1e-3)
    before = state_of(student, optimizer)
    match = {"names": "lm_head", "shapes": r"norm.weight.*\(32,\).*\(33,\)", "dtype": "bfloat16", "frozen": "norm.weight"}
    with pytest.raises(CheckpointError, match=match.get(what, "optimizer")):
        load_checkpoint(tmp_path, student, optimizer)
    assert_same_state(state_of(student, optimizer), before)


@pytest.mark.parametrize("kept", ["q_proj.weight", "model.norm.weight", "lora_A", "k_proj.base_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_on_other_parameters_that_are_not_trained_is_refused(kept, dtype, make_model, tmp_path):
    def student(dtype=dtype):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(make_model("llama_tied").to(dtype), config)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        made = CausalLMStudent(adapted, TOKENIZER_ID)
        return made, torch.optim.AdamW([p for p in made.parameters() if p.requires_grad])

    path = save_checkpoint(tmp_path, *student(), next_step=4, lineage=Lineage())
    other, optimizer = student()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_((1.1 if dtype == torch.bfloat16 and "base_layer" in kept else 1.005) if kept in name else 1.0)
    before = state_of(other, optimizer)
    with pytest.raises(
        CheckpointError, match=f"parameter '.*{re.escape(kept)}.*', which is not trained, has other values .*same base.*`changed=.*`load_ch"
    ):
        load_checkpoint(tmp_path, other, optimizer)
    assert_same_state(state_of(other, optimizer), before)
    for restored in (None, optimizer):
        assert load_checkpoint(tmp_path, other, restored, changed=["untrained"]) == 4
    # rounding passes: a base in 16 bits, or one that adapters were merged into for a while; so does a checkpoint without such values
    rounded = student(torch.bfloat16)
    rounded[0].model.merge_adapter()
    rounded[0].model.unmerge_adapter()
    assert load_checkpoint(tmp_path, *rounded) == 4
    state = json.loads((path / "state.json").read_text())
    assert all(state.pop("untrained").values())
    (path / "state.json").write_text(json.dumps(state))
    assert load_checkpoint(tmp_path, other, optimizer) == 4


def frozen_base(model, scaled=1.0):
    """Return a student with adapters of seed 0 on a model whose keys are scaled, and its optimizer."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(scaled)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    made = CausalLMStudent(adapted, TOKENIZER_ID, autocast=torch.bfloat16)
    return made, torch.optim.AdamW([p for p in made.parameters() if p.requires_grad])


@pytest.mark.parametrize(("saved", "resumed"), [(1.003, 1.0), (1.0, 1.003)])
def test_a_base_in_32_bits_whose_files_have_16_is_compared_as_one_of_32(saved, resumed, make_model, tmp_path):
    def student(scaled):  # as one that SFT adapters were merged into
        return frozen_base(make_model("llama_tied").to(torch.bfloat16).float(), scaled)

    save_checkpoint(tmp_path, *student(saved), next_step=4, lineage=Lineage())
    assert load_checkpoint(tmp_path, *student(saved)) == 4
    with pytest.raises(CheckpointError, match=r"k_proj.base_layer.weight', which is not trained, has other values"):
        load_checkpoint(tmp_path, *student(resumed))


@pytest.mark.parametrize("keep_types", [True, False])
@pytest.mark.parametrize("resumed", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_is_resumed_on_in_each_type(saved, resumed, keep_types, make_model, tmp_path):
    def student(dtype, scaled=1.0):
        return frozen_base(make_model("llama_tied").to(dtype), scaled)

    path = save_checkpoint(tmp_path, *student(saved), next_step=4, lineage=Lineage())
    state = json.loads((path / "state.json").read_text())
    if not keep_types and state.pop("untrained_types", None):  # as before they were saved
        (path / "state.json").write_text(json.dumps(state))
    assert load_checkpoint(tmp_path, *student(resumed)) == 4
    with pytest.raises(CheckpointError, match="has other values"):
        load_checkpoint(tmp_path, *student(resumed, scaled=1.003 if torch.bfloat16 not in (saved, resumed) else 1.05))


def test_a_parameter_that_is_not_trained_and_not_finite_is_compared_with_nothing(small, tmp_path):
    student, _ = small
    frozen, *trained = student.parameters()
    frozen.requires_grad_(False)
    frozen.data.fill_(float("nan"))
    optimizer = torch.optim.AdamW(trained)
    save_checkpoint(tmp_path, student, optimizer, next_step=4, lineage=Lineage())
    assert load_checkpoint(tmp_path, student, optimizer) == 4


def test_an_optimizer_with_the_same_parameters_in_another_order_is_refused(small, tmp_path):
    student, optimizer = small
    save_checkpoint(tmp_path, student, optimizer, next_step=4, lineage=Lineage())
    # two matrices of one shape change places: nothing but their names tells them apart
    named = dict(student.named_parameters())
    names = list(named)
    first, second = (names.index(f"model.model.layers.{i}.self_attn.q_proj.weight") for i in (0, 1))
    names[first], names[second] = names[second], names[first]
    other = torch.optim.AdamW([named[name] for name in names], lr=3e-3)
    before = state_of(student, other)
    with pytest.raises(CheckpointError, match=rf"parameter {first} of optimizer group 0 is 'model.*layers.0.*expected 'model.*layers.1"):
        load_checkpoint(tmp_path, student, other)
    assert_same_state(state_of(student, other), before)


def test_an_optimizer_over_parameters_of_another_model_is_refused_when_saving(small, make_model, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    strangers = CausalLMStudent(make_model("llama_tied", 5), TOKENIZER_ID)
    with pytest.raises(CheckpointError, match="parameter 0 of optimizer group 0 is not one of the student's"):
        save_checkpoint(tmp_path, small[0], adamw(strangers), next_step=5, lineage=Lineage())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.0"]


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"{}" + b"\xff" * 20, None])
def test_a_damaged_or_missing_file_of_a_checkpoint_is_named_and_nothing_is_changed(name, damage, small, scored, tmp_path):
    path = save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage()) / name
    advance(*small, scored, 3, 4)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    before, random_state = state_of(*small), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint(tmp_path, *small)
    assert_same_state(state_of(*small), before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("lacking", ["next_step", "trained", "optimizer"])
def test_a_state_file_that_lacks_something_says_what(lacking, small, tmp_path):
    path = save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage()) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != lacking}))
    with pytest.raises(CheckpointError, match=rf"state\.json.*lacks '{lacking}'"):
        load_checkpoint(tmp_path, *small)


@pytest.mark.parametrize("write", [1, 2])
def test_an_interrupted_save_leaves_the_checkpoint_before_it(write, small, scored, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    saved = state_of(*small)
    advance(*small, scored, 3, 5)
    whole, writes = lopd.verbs.checkpoint.save_file, []

    def save_file(tensors, path):
        writes.append(path)
        if len(writes) == write:
            Path(path).write_bytes(b"half of a")
            raise Interrupted
        whole(tensors, path)

    monkeypatch.setattr(lopd.verbs.checkpoint, "save_file", save_file)
    with pytest.raises(Interrupted):
        save_checkpoint(tmp_path, *small, next_step=5, lineage=Lineage())
    student = CausalLMStudent(copy.deepcopy(small[0].model), TOKENIZER_ID)
    optimizer = adamw(student)
    assert load_checkpoint(tmp_path, student, optimizer) == 3
    assert_same_state(state_of(student, optimizer), saved)
    monkeypatch.undo()
    save_checkpoint(tmp_path, *small, next_step=5, lineage=Lineage())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005.0"]


@pytest.mark.parametrize("step", [3, 5])
def test_of_two_processes_that_save_into_one_folder_each_checkpoint_is_of_one_of_them(step, small, scored, monkeypatch, tmp_path):
    """One saves while the other is between its parameters and its optimizer."""
    other = CausalLMStudent(copy.deepcopy(small[0].model), TOKENIZER_ID)
    others = (other, adamw(other))
    advance(*others, scored, 0, 2)
    whole = lopd.verbs.checkpoint.save_file

    def save_file(tensors, path):
        whole(tensors, path)
        monkeypatch.undo()
        if path.name == "parameters.safetensors":
            save_checkpoint(tmp_path, *others, next_step=3, lineage=Lineage())

    mine, theirs = state_of(*small), state_of(*others)
    monkeypatch.setattr(lopd.verbs.checkpoint, "save_file", save_file)
    if step == 3:
        with pytest.raises(
            StoreWriteError, match=r"another process writes or removes files in this folder .*; give each run a folder of its own\.$"
        ):
            save_checkpoint(tmp_path, *small, next_step=step, lineage=Lineage())
    else:
        save_checkpoint(tmp_path, *small, next_step=step, lineage=Lineage())
    assert load_checkpoint(tmp_path, *small) == step
    assert_same_state(state_of(*small), theirs if step == 3 else mine)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_a_save_of_an_earlier_step_that_fails_leaves_later_checkpoints_where_they_were(error, small, monkeypatch, tmp_path):
    for step in (60, 90):
        save_checkpoint(tmp_path, *small, next_step=step, lineage=Lineage(), keep=2)
    rename = Path.rename

    def failing(path, target):
        if "partial" in path.name:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StoreWriteError):
        save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000060.0", "step-00000090.0"]


def test_a_file_in_the_place_of_the_folder_is_not_taken_for_another_process(small, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(
        StoreWriteError, match=r"the disk refused .*File exists.*run'\); free space or mend permissions, or save elsewhere\.$"
    ):
        save_checkpoint(tmp_path / "run", *small, next_step=3, lineage=Lineage())


def test_a_run_that_went_back_goes_on_where_it_was_saved_though_what_it_left_is_half_removed(small, monkeypatch, tmp_path):
    for step in (60, 150):
        save_checkpoint(tmp_path, *small, next_step=step, lineage=Lineage(), keep=None)

    def half(folder, **_):
        for state in sorted(Path(folder).rglob("state.json")):
            state.unlink()
            raise Interrupted

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Interrupted):
        save_checkpoint(tmp_path, *small, next_step=70, lineage=Lineage())
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, *small) == 70
    save_checkpoint(tmp_path, *small, next_step=80, lineage=Lineage())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000080.0"]


def test_an_interrupted_save_of_the_same_step_again_leaves_a_checkpoint(small, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())

    def rename(*_):
        raise Interrupted

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Interrupted):
        save_checkpoint(tmp_path, *small, next_step=3, lineage=Lineage())
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, *small) == 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it lists what is mapped")
@pytest.mark.parametrize("make_optimizer", [adamw, momentum])
def test_nothing_of_a_checkpoint_stays_mapped_that_was_loaded(make_optimizer, small, tmp_path):
    """Over NFS its folder could not be removed when it is superseded."""
    student, _ = small
    optimizer = make_optimizer(student)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    assert load_checkpoint(tmp_path, student, optimizer, steps=None) == 1
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_superseded_checkpoint_that_cannot_be_removed_ends_no_run(small, tmp_path, monkeypatch):
    real = shutil.rmtree

    def busy(path, ignore_errors=False):
        if Path(path).name.startswith("step-") and not ignore_errors:
            raise OSError(39, "Directory not empty")
        if not Path(path).name.startswith("step-"):
            real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2):
        save_checkpoint(tmp_path, *small, next_step=step, lineage=Lineage())
    assert load_checkpoint(tmp_path, *small, steps=None) == 2
