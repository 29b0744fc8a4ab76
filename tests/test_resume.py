"""What a checkpoint keeps of an optimizer and of the steps, which checkpoints stay, and what lies beside them."""

import copy
import json
import shutil
from functools import partial

import accelerate
import numpy as np
import pytest
import torch
from conftest import TOKENIZER_ID
from small_runs import adamw, scored, small, teacher_model  # noqa: F401

from lopd import CausalLMStudent, batches, by_token, load_checkpoint, opd_steps, save_checkpoint
from lopd.errors import ArgumentError, CheckpointError, InvalidRecordError, StoreWriteError, TrainingWarning
from lopd.losses.reference import ReferenceOPDLoss
from lopd.records import Lineage


def fresh(llama, dtype=torch.float32):
    student = CausalLMStudent(copy.deepcopy(llama).to(dtype), TOKENIZER_ID)
    return student, adamw(student)


def step(student, optimizer):
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


NUMBERS = {
    "a tensor": torch.tensor(1e-3),
    "float32": np.float32(1e-3),
    "float64": np.float64(1e-3),
    "int64": np.int64(2),
    "bool": np.bool_(True),
    "an array": np.arange(3.0),
    "infinity": float("inf"),
    "complex": 1 + 2j,
    "None": None,
    "text": "cosine",
    "a tuple in a list in a dict": {"bounds": [(0.9, np.float32(0.5)), (1, None)], 3: {"deep": torch.arange(2)}},
}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert np.array_equal(a, b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_of_any_kind_comes_back_as_it_was_from_groups_and_from_state(kind, small, llama, tmp_path):
    student, optimizer = small
    step(student, optimizer)
    optimizer.param_groups[0]["setting"] = optimizer.state[next(student.parameters())]["entry"] = NUMBERS[kind]
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    other, other_optimizer = fresh(llama)
    assert load_checkpoint(tmp_path, other, other_optimizer) == 1
    assert_same(other_optimizer.param_groups[0]["setting"], NUMBERS[kind])
    assert_same(other_optimizer.state[next(other.parameters())]["entry"], NUMBERS[kind])


@pytest.mark.parametrize("rate", [torch.tensor(1e-3), np.float32(1e-3), np.float64(1e-3)])
def test_a_rate_of_numpy_or_torch_goes_on_bit_for_bit(rate, small, llama, tmp_path):
    whole, optimizer = small
    optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["foreach"] = rate, False
    step(whole, optimizer)
    save_checkpoint(tmp_path, whole, optimizer, next_step=1, lineage=Lineage())
    other, other_optimizer = fresh(llama)
    other_optimizer.param_groups[0]["lr"] = 1e-3
    load_checkpoint(tmp_path, other, other_optimizer)
    for pair in ((whole, optimizer), (other, other_optimizer)):
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_moments_in_float32_of_bfloat16_weights_keep_their_dtype(llama, tmp_path):
    student, optimizer = fresh(llama, torch.bfloat16)
    step(student, optimizer)
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].float() + 1e-4
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    other, other_optimizer = fresh(llama, torch.bfloat16)
    load_checkpoint(tmp_path, other, other_optimizer)
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        assert_same(other_optimizer.state[theirs]["exp_avg"], optimizer.state[mine]["exp_avg"])


class Wrapping(torch.optim.AdamW):
    """Wraps its moments in one dict, as bitsandbytes does with what FSDP should not gather."""

    def state_dict(self):
        whole = super().state_dict()
        return {**whole, "state": {i: {"step": entry.pop("step"), "wrapped": entry} for i, entry in copy.deepcopy(whole["state"]).items()}}

    def load_state_dict(self, whole):
        super().load_state_dict({**whole, "state": {i: {"step": entry["step"], **entry["wrapped"]} for i, entry in whole["state"].items()}})


def test_an_optimizer_that_wraps_its_state_in_a_dict_is_resumed_bit_for_bit(llama, tmp_path):
    pairs = [(student, Wrapping(student.parameters(), lr=1e-3)) for student in (fresh(llama)[0] for _ in range(2))]
    step(*pairs[0])
    save_checkpoint(tmp_path, *pairs[0], next_step=1, lineage=Lineage())
    load_checkpoint(tmp_path, *pairs[1])
    for pair in pairs:
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(*(student.parameters() for student, _ in pairs), strict=True))
    assert_same(pairs[1][1].state_dict()["state"][0], pairs[0][1].state_dict()["state"][0])


@pytest.fixture
def prepare(monkeypatch):
    """Wrap an optimizer as accelerate does; it keeps one state for the process, which another test may have made."""
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(accelerate.state.PartialState, "_shared_state", {})
    return accelerate.Accelerator(cpu=True).prepare


def test_an_optimizer_that_accelerate_prepared_is_known_by_what_it_wraps(small, llama, prepare, tmp_path):
    student, optimizer = small
    step(student, optimizer)
    path = save_checkpoint(tmp_path, student, prepare(optimizer), next_step=1, lineage=Lineage()) / "state.json"

    def check():
        other, plain = fresh(llama)
        for own in (plain, prepare(plain)):
            assert load_checkpoint(tmp_path, other, own) == 1
        with pytest.raises(CheckpointError, match=r"its optimizer is A\w+ over .*, expected SGD over .*; make the optimizer as it was"):
            load_checkpoint(tmp_path, other, prepare(torch.optim.SGD(other.parameters())))
        return other

    other = check()
    with pytest.raises(CheckpointError, match=r"its optimizer is AdamW over .*, expected Adam over"):
        load_checkpoint(tmp_path, other, prepare(torch.optim.Adam(other.parameters())))
    state = json.loads(path.read_text())
    state["optimizer"]["class"] = "AcceleratedOptimizer"  # as an older lopd wrote it
    path.write_text(json.dumps(state))
    check()
    with pytest.raises(ArgumentError, match="Optimizer LBFGS: its step needs `closure`"):
        opd_steps(other, [], ReferenceOPDLoss(), prepare(torch.optim.LBFGS(other.parameters())))


class Packed(torch.Tensor):
    """Has no memory of its own, as the low-bit states of torchao."""

    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        return cls(function(args[0].inner, *args[1:], **(kwargs or {})))


def test_a_state_of_a_class_that_wraps_tensors_is_named_and_nothing_is_written(small, tmp_path):
    step(*small)
    small[1].state[next(small[0].parameters())]["exp_avg"] = Packed(torch.ones(3))
    with pytest.raises(InvalidRecordError, match=r"AdamW 0\.exp_avg: it is a Packed, expected a plain tensor; use an optimizer"):
        save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage())
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_saved(small, llama, tmp_path):
    student, optimizer = small
    step(student, optimizer)
    shared = torch.ones(())
    for entry in optimizer.state.values():
        entry["step"] = shared
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    assert load_checkpoint(tmp_path, *fresh(llama)) == 1


def test_what_cannot_be_saved_is_named_and_nothing_is_written(small, tmp_path):
    small[1].param_groups[0]["schedule"] = object()
    with pytest.raises(InvalidRecordError, match="AdamW 'schedule': it holds an object, expected numbers"):
        save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_before_is_read(small, llama, tmp_path):
    """Numbers as plain JSON, tuples as lists, and no settings of the steps: as versions up to 0.2 wrote them."""
    step(*small)
    path = save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage()) / "state.json"
    state = json.loads(path.read_text())
    state["optimizer"]["groups"][0]["betas"] = [0.7, 0.9]
    del state["steps"]
    path.write_text(json.dumps(state))
    other, optimizer = fresh(llama)
    with pytest.warns(TrainingWarning, match=r"its optimizer goes on with betas \(0\.7, 0\.9\) and not \(0\.8, 0\.95\); take another"):
        assert load_checkpoint(tmp_path, other, optimizer) == 1
    assert optimizer.param_groups[0]["betas"] == (0.7, 0.9)
    step(other, optimizer)


def test_settings_of_an_optimizer_that_a_checkpoint_replaces_are_warned_of_once(small, llama, tmp_path):
    student, optimizer = small
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    other, _ = fresh(llama)
    first, *rest = other.parameters()
    with pytest.raises(CheckpointError, match="over"):  # before any is compared
        load_checkpoint(tmp_path, other, torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=1.0))
    changed = torch.optim.AdamW(other.parameters(), lr=0.5, betas=(0.8, 0.95), weight_decay=0, foreach=False)
    said = r"its optimizer goes on with lr 0\.003 and not 0\.5, weight_decay 0\.01 and not 0; take another folder for another run, or set these in"
    with pytest.warns(TrainingWarning, match=said) as caught:
        assert load_checkpoint(tmp_path, other, changed) == 1
    assert [warning.filename for warning in caught] == [__file__]
    assert changed.param_groups[0]["lr"] == 3e-3
    changed.param_groups[0]["foreach"] = None
    assert load_checkpoint(tmp_path, other, changed) == 1


SCHEDULES = {
    "by torch": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    "with its momentum": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 9),
    "by hand": lambda optimizer: optimizer.param_groups[0].update(initial_lr=3e-3) or None,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_of_a_schedule_is_compared_by_its_first_one(schedule, small, llama, tmp_path):
    student, optimizer = small
    scheduler = SCHEDULES[schedule](optimizer)
    step(student, optimizer)
    if scheduler:
        scheduler.step()
    else:
        optimizer.param_groups[0]["lr"] = 1e-3
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    other, own = fresh(llama)
    SCHEDULES[schedule](own)
    assert load_checkpoint(tmp_path, other, own) == 1
    assert_same(own.param_groups[0]["lr"], optimizer.param_groups[0]["lr"])


class Counting(torch.optim.SGD):
    """Keeps its own numbers with its settings, as optimizers without a schedule do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.param_groups[0].update(k=0, lr_max=-1.0)


def test_numbers_that_an_optimizer_keeps_among_its_settings_are_its_own(small, llama, tmp_path):
    student, other = small[0], fresh(llama)[0]
    optimizer, own = Counting(student.parameters()), Counting(other.parameters())
    optimizer.param_groups[0].update(k=7, lr_max=0.1)
    save_checkpoint(tmp_path, student, optimizer, next_step=1, lineage=Lineage())
    assert load_checkpoint(tmp_path, other, own) == 1
    assert own.param_groups[0]["k"] == 7


@pytest.mark.filterwarnings("ignore:.*of its advantages are below:lopd.errors.AdvantageWarning")
def test_a_run_that_is_over_is_warned_of_where_it_is_trained_on(small, scored, tmp_path):
    steps = batches(scored, **ASKED)
    save_checkpoint(tmp_path, *small, next_step=4, steps=steps[:4])
    with pytest.warns(
        TrainingWarning, match=r"its run is over, as the steps to go on with end before step 4, so nothing is left .*, or more steps"
    ):
        assert load_checkpoint(tmp_path, *small, steps=steps[:4]) == 4
    for more in (steps, steps[:5]):
        assert load_checkpoint(tmp_path, *small, steps=more) == 4
    assert load_checkpoint(tmp_path, small[0], steps=steps[:4]) == 4


@pytest.mark.parametrize(
    "name", ["step-00000001.0.bak", "step-00000001.bak", "step-best.keep", "step-00000001.0 (copy)", "keep-step-1", "step-1.0"]
)
def test_a_copy_beside_checkpoints_is_left_alone_and_is_loaded_by_its_own_name(name, small, llama, tmp_path):
    first = save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage())
    shutil.copytree(first, tmp_path / name)
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "step-00000009.0").write_text("a file")
    save_checkpoint(tmp_path, *small, next_step=2, lineage=Lineage())
    assert load_checkpoint(tmp_path, *fresh(llama)) == 2
    assert load_checkpoint(tmp_path / name, *fresh(llama)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {name, ".DS_Store", "step-00000009.0", "step-00000002.0"}


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (3, [3, 4, 5]), (np.int64(2), [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_as_many_checkpoints_stay_as_are_asked_for(keep, left, small, tmp_path):
    for next_step in range(1, 6):
        save_checkpoint(tmp_path, *small, next_step=next_step, lineage=Lineage(), keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{next_step:08d}.0" for next_step in left]
    with pytest.raises(InvalidRecordError, match="keep is 0, expected at least 1"):
        save_checkpoint(tmp_path, *small, next_step=6, lineage=Lineage(), keep=0)


def test_a_run_that_goes_back_leaves_no_later_checkpoint_to_be_taken_for_the_newest(small, tmp_path):
    for next_step in (1, 2, 3):
        save_checkpoint(tmp_path, *small, next_step=next_step, lineage=Lineage(), keep=None)
    with pytest.warns(TrainingWarning, match=r"step-00000003\.0 is of a later step and stays") as caught:
        save_checkpoint(tmp_path, *small, next_step=2, lineage=Lineage(), keep=None)
    assert caught[0].filename == __file__
    save_checkpoint(tmp_path, *small, next_step=2, lineage=Lineage(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002.1", "step-00000002.2"]


def test_a_disk_that_refuses_is_one_sentence_and_the_checkpoint_before_stays(small, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=1, lineage=Lineage())

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lopd.verbs.checkpoint.save_file", refuse)
    with pytest.raises(StoreWriteError, match=r"Checkpoint .*step-00000002\.0: .*No space left"):
        save_checkpoint(tmp_path, *small, next_step=2, lineage=Lineage())
    assert load_checkpoint(tmp_path, *small) == 1


ASKED = {"teacher": None, "rollouts_per_step": 4, "seed": 1}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", 2),
        ("rollouts_per_step", 5),
        ("rows", np.arange(9)),
        ("weighting", by_token),
        ("ref", "behavior"),
        ("teacher", "teacher"),
        ("first", 2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*of its advantages are below:lopd.errors.AdvantageWarning")
def test_steps_that_were_made_otherwise_are_refused_by_name_unless_they_are_meant(name, other, small, scored, tmp_path):
    steps, changed = batches(scored, **ASKED), batches(scored, **{**ASKED, name: other})
    save_checkpoint(tmp_path, *small, next_step=2, steps=steps)
    before = [parameter.detach().clone() for parameter in small[0].parameters()]
    with pytest.raises(CheckpointError, match=rf"{name} of its steps is .*, expected .*; .*`changed=\['{name}'\]`"):
        load_checkpoint(tmp_path, *small, steps=changed)
    assert all(torch.equal(a, b) for a, b in zip(before, small[0].parameters(), strict=True))
    with pytest.raises(ArgumentError, match=rf"Checkpoint: changed: it was given a str \('{name}_and_more'\), expected a list of texts"):
        load_checkpoint(tmp_path, *small, steps=changed, changed=f"{name}_and_more")
    assert load_checkpoint(tmp_path, *small, steps=changed, changed=[name]) == 2


def first(mask, by, count):
    return by(mask) * (np.arange(mask.size) < count)


def test_another_argument_of_a_weighting_is_refused_by_name(small, scored, tmp_path):
    three, also, one = (batches(scored, **ASKED, weighting=partial(first, by=by_token, count=count)) for count in (3, 3, 1))
    save_checkpoint(tmp_path, *small, next_step=2, steps=three)
    with pytest.raises(CheckpointError, match=r"weighting of its steps is 'first\(by=<function by_token>, count=3\)', expected .*count=1"):
        load_checkpoint(tmp_path, *small, steps=one)
    assert load_checkpoint(tmp_path, *small, steps=also) == 2
    assert batches(scored, **ASKED).settings["weighting"] == "by_rollout"


def test_the_same_steps_are_the_same_however_they_are_split_and_wherever_they_end(small, scored, tmp_path):
    path = save_checkpoint(tmp_path, *small, next_step=2, steps=batches(scored, **ASKED)[:3])
    assert Lineage.read(path) == batches(scored, **ASKED).lineage
    assert load_checkpoint(tmp_path, *small, steps=batches(scored, **ASKED, tokens_per_batch=50)[2:9]) == 2


def test_settings_that_are_compared_with_nothing_are_said(small, scored, tmp_path):
    save_checkpoint(tmp_path, *small, next_step=2, steps=batches(scored, **ASKED))
    with pytest.warns(TrainingWarning, match="are compared with nothing; pass `steps=`") as caught:
        assert load_checkpoint(tmp_path, *small) == 2
    assert caught[0].filename == __file__
    assert load_checkpoint(tmp_path, small[0]) == 2, "weights alone go on with no steps"


def test_a_checkpoint_needs_a_lineage(small, tmp_path):
    with pytest.raises(CheckpointError, match="there is no lineage; pass `steps=`"):
        save_checkpoint(tmp_path, *small, next_step=1)
