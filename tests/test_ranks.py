"""Training on several ranks: weights, gradients and metrics of one process, whatever wraps the student and however a step is shared out."""

import json
import math
import re
import subprocess
import sys
from functools import partial

import accelerate_worker
import forked
import numpy as np
import peft
import pytest
import ranks_worker
import torch
import torch.distributed as dist
from attrs import evolve
from ranks_worker import CASES, STEPS, Case, make_optimizer, make_store, make_student, train
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lopd import CausalLMStudent, batches, load_checkpoint, opd_steps, save_checkpoint
from lopd.engines.hf import load_model
from lopd.errors import InvalidRecordError, ModelError, ModelWarning, TrainingWarning
from lopd.losses.fused import FusedOPDLoss
from lopd.records import Lineage, Ranks
from lopd.records.ranks import check_summed, gathering, summing
from lopd.records.steps import Step
from lopd.verbs.train import _check_shares

# the models are random, and so are the log-probs of the reference policy
pytestmark = pytest.mark.filterwarnings(
    "ignore::lopd.errors.AdvantageWarning",
    "ignore::lopd.errors.DriftWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # torch's own, where a layer is compiled
)


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    """Return what so many processes found, and the folder in which they worked."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    train(Case(), stop=2, checkpoints=folder / "checkpoints-single")
    logs = [folder / f"log{rank}" for rank in range(request.param)]
    running = [forked.start(ranks_worker.main, log, rank, request.param, str(folder)) for rank, log in enumerate(logs)]
    for process in running:
        process.join(280)
    codes = [process.exitcode for process in running]
    assert codes == [0] * len(codes), [log.read_text()[-2000:] for log in logs]
    return torch.load(folder / "found.pt", weights_only=False), folder


@pytest.fixture(scope="module")
def alone():
    """Return the same by one process; wrapping means nothing there."""
    return {case: train(evolve(case, wrap="none")) for case in CASES}


def assert_same(found, expected, *, rough=False):
    """Check equality up to rounding, which of bfloat16 layers is that of bfloat16: other rollouts share a matrix product."""
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-3 if rough else 1e-6)
    assert len(found["history"]) == len(expected["history"])
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        for name in ("step", "rollouts", "read_tokens"):
            assert ours[name] == theirs[name], name
        for name in ("loss", "reverse_kl", "clip_fraction", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=3e-2 if rough else 1e-5, abs=1e-6), name
        assert (ours["drift"] is None) == (theirs["drift"] is None)
        if ours["drift"] is not None:
            for name in ("rollouts", "tokens", "ratio_mean", "ess", "kl"):
                assert ours["drift"][name] == pytest.approx(theirs["drift"][name], rel=5e-2 if rough else 1e-4, abs=1e-6), name
            # exponential in the tokens of a rollout
            bounds = [math.log1p(drift["gap_bound"]) for drift in (ours["drift"], theirs["drift"])]
            assert bounds[0] == pytest.approx(bounds[1], rel=5e-2 if rough else 1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_ranks_whose_steps_are_not_shares_of_one_are_refused(wrap, several):
    said = several[0][f"{wrap} seeds of their own"]
    assert said.startswith("Step 0: rank 1 has a share of step 0 (")
    assert "), expected one of rank 0's step 0 (" in said


UNLIKE = {
    "one share": r"Step 0: rank 1 has share 0 of (\d), expected one of \1 that no other rank has; .*`evolve\(step, ranks=None\)`",
    "made before the group": r"Step 0: rank 0 has share 0 of 1, expected one of \d that no other rank has",
    "another left out": r"Step 2: rank 1 has a share of step 2 .*, expected one of rank 0's step 1 .*leave out the same steps on each",
    "one more": "Steps: rank 1 has come to their end, and rank 0 has another; give each as many",
    "more batches": r"Step 0: rank 1 has 1 micro-batches and rank 0 has 2, expected as many on each rank; .*`Step\.idle`",
    "no batches": "Step 0: rank 1 has 0 micro-batches and rank 0 has 1, expected as many",
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("unlike", UNLIKE)
def test_steps_of_ranks_that_do_not_belong_together_are_refused(unlike, wrap, several):
    found = several[0][f"{wrap} {unlike}"]
    if (unlike, wrap) == ("more batches", "ddp"):
        assert found == 1, "DistributedDataParallel meets once a step"
    else:
        assert re.match(UNLIKE[unlike], found), found


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_ranks_that_find_different_checkpoints_are_refused(wrap, several):
    found, folder = several
    said = f"Checkpoint {folder / f'checkpoints-{wrap}'}: the newest that rank 1 finds there is none, expected step-00000002.0 as on rank 0"
    assert found[f"{wrap} different folders"].startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_each_rank_that_is_resumed_draws_what_it_would_have_drawn(wrap, several):
    drawn = several[0][f"{wrap} drawn"]
    assert all(again == first for first, again in drawn)
    assert len({tuple(first) for first, _ in drawn}) == len(drawn)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_ranks_train_as_one_process_does(case, several, alone):
    found, _ = several
    assert_same(found[case.name], alone[case], rough=case.autocast)


@pytest.mark.slow
def test_a_student_and_an_optimizer_prepared_by_accelerate_train_as_one_process_does(tmp_path, alone):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        accelerate_worker.__file__,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    processes, found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert processes == 2
    assert_same(found, alone[Case()])


@pytest.mark.slow
def test_the_cases_learn_something_and_differ(alone):
    start = make_student(Case(), Ranks()).state_dict()
    plain, ratio = alone[Case()], alone[Case(model="qwen3_padded", ratio=True)]
    assert any(not torch.equal(plain["weights"][name], start[name]) for name in start)
    assert plain["history"][-1]["loss"] != ratio["history"][-1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_run_is_resumed_on_another_number_of_ranks(wrap, several, alone):
    found, folder = several
    whole = alone[Case(wrap)]
    half = {**whole, "history": whole["history"][2:]}
    # begun by one process, ended by several
    assert_same(found[f"{wrap} second half of one process"], half)
    # begun by several, ended by one
    student = make_student(Case(), Ranks())
    assert load_checkpoint(folder / f"checkpoints-{wrap}", student) == 2
    for name, weight in student.state_dict().items():
        torch.testing.assert_close(weight, found[f"{wrap} first half"]["weights"][name], rtol=0, atol=0)
    assert_same(train(Case(), start=2, stop=STEPS, checkpoints=folder / f"checkpoints-{wrap}"), half)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_student_of_several_ranks_is_exported_whole(wrap, several):
    _, folder = several
    model, _ = load_model(folder / f"export-{wrap}", torch.float32)
    expected = make_student(Case(), Ranks()).model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert Lineage.read(folder / f"export-{wrap}") == Lineage()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("per_step", [1, 5, 11])
def test_the_shares_of_a_step_are_the_step(size, per_step):
    store = make_store(per_step)
    streams = [
        batches(store, rollouts_per_step=per_step, tokens_per_batch=50, ref="behavior", ranks=Ranks(rank, size)) for rank in range(size)
    ]
    for index in range(4):
        expected = batches(store, rollouts_per_step=per_step, tokens_per_batch=600, ref="behavior").step(index).batches
        shares = [stream.step(index).batches for stream in streams]
        assert len({len(share) for share in shares}) == 1, "every rank goes through as many micro-batches"
        weighed = [batch for share in shares for batch in share if batch.weight.any()]
        tokens = np.concatenate([batch.targets[batch.weight > 0].numpy() for batch in weighed] or [np.zeros(0)])
        assert sorted(tokens.tolist()) == sorted(torch.cat([b.targets[b.weight > 0] for b in expected]).tolist())
        total = sum(float(batch.weight.sum()) for batch in weighed)
        assert total == pytest.approx(sum(float(batch.weight.sum()) for batch in expected))


def test_shares_are_of_like_sizes():
    store = make_store(11)
    sizes = []
    for rank in range(3):
        stream = batches(store, rollouts_per_step=11, tokens_per_batch=50, ref="behavior", ranks=Ranks(rank, 3))
        sizes.append(sum(batch.inputs.numel() for batch in stream.step(0).batches if batch.weight.any()))
    assert max(sizes) < 1.6 * min(sizes)


def test_one_rank_of_one_is_what_a_process_is_on_its_own():
    assert Ranks.current() == Ranks(0, 1)
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(Ranks().sum(values), values)
    assert Ranks().gather([1, 2]) == [1, 2]


def test_sums_over_ranks_need_no_backend_for_the_cpu(monkeypatch):
    def refuse(*_):
        raise RuntimeError("No backend type associated with device type cpu")

    def gathered(parts, mine):
        parts[:] = [mine, [torch.tensor([0.25, -1.0])]]

    monkeypatch.setattr(dist, "get_backend", lambda: "xccl")
    monkeypatch.setattr(dist, "all_reduce", refuse)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    assert Ranks(0, 2).sum(torch.tensor([1.0, 2.0])).tolist() == [1.25, 1.0]


@pytest.mark.parametrize(("rank", "size"), [(-1, 1), (1, 1), (2, 2), (0, 0)])
def test_a_rank_that_there_is_not_is_refused(rank, size):
    with pytest.raises(InvalidRecordError, match="count from 0"):
        Ranks(rank, size)


def test_a_student_whose_gradients_nobody_sums_is_refused():
    student = make_student(Case(), Ranks())
    check_summed(student, Ranks())
    with pytest.raises(ModelError, match=r"trained by 2 ranks and nothing sums its gradients; wrap it .*before `opd_steps`"):
        check_summed(student, Ranks(1, 2))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters"])
def test_a_wrapper_that_looks_for_tensors_in_the_output_is_refused(option, group):
    student = DistributedDataParallel(make_student(Case(), Ranks()), **{option: True})
    with pytest.raises(ModelError, match=rf"Student CausalLMStudent: its DistributedDataParallel has {option}=True.*leave the option out"):
        opd_steps(student, [], FusedOPDLoss(), make_optimizer(student))


def compile_layer(student):
    student.model.model.layers[0] = torch.compile(student.model.model.layers[0], backend="eager")
    return student


COMPILED = {
    "alone": partial(torch.compile, backend="eager"),
    "around": lambda student: torch.compile(DistributedDataParallel(student), backend="eager"),
    "within": lambda student: DistributedDataParallel(torch.compile(student, backend="eager")),
    "a layer": compile_layer,
}


@pytest.mark.parametrize("wrap", COMPILED)
def test_a_student_in_torch_compile_is_trained_and_resumed_as_the_student_itself(wrap, group, tmp_path):
    own = make_student(Case(), Ranks())
    compiled = COMPILED[wrap](own)
    optimizer = make_optimizer(compiled)
    steps = batches(make_store(5), rollouts_per_step=5, tokens_per_batch=50, ref="behavior")[:2]
    with torch.compiler.set_stance("force_eager"):
        assert len(list(opd_steps(compiled, steps, FusedOPDLoss(), optimizer))) == 2
    if wrap in ("around", "within"):
        with gathering(compiled, last=False):
            assert not summing(compiled).require_backward_grad_sync
    path = save_checkpoint(tmp_path, compiled, optimizer, next_step=1, steps=steps)
    plain = make_student(Case(), Ranks())
    assert load_checkpoint(tmp_path, plain, make_optimizer(plain), steps=steps) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), own.parameters(), strict=True))
    # as older versions wrote them, with names of torch.compile
    state = json.loads((path / "state.json").read_text())
    state["trained"] = [[f"_orig_mod.{label}" for label in group] for group in state["trained"]]
    (path / "state.json").write_text(json.dumps(state))
    weights = {f"_orig_mod.{name}": weight for name, weight in load_file(path / "parameters.safetensors").items()}
    save_file(weights, path / "parameters.safetensors")
    for student in (plain, compiled):
        assert load_checkpoint(tmp_path, student, make_optimizer(student), steps=steps) == 1


def test_a_wrapped_student_that_trains_what_gets_no_gradient_is_refused_before_its_weights_change(group):
    """DistributedDataParallel leaves the sums of others undone, and its next step is an error of its own."""
    student = make_student(Case(), Ranks())
    student.unused = torch.nn.Parameter(torch.ones(3))
    wrapped = DistributedDataParallel(student)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    steps = batches(make_store(1), rollouts_per_step=1, tokens_per_batch=50, ref="behavior")[:1]
    with pytest.raises(ModelError, match=r"1 of its \d+ trained .*'module\.unused' keep .*`requires_grad_\(False\)`\) before it wraps"):
        next(opd_steps(wrapped, steps, FusedOPDLoss(), make_optimizer(wrapped)))
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())


def test_parameters_that_are_not_the_students_are_warned_of_where_there_are_several_ranks(group, monkeypatch):
    wrapped, own = DistributedDataParallel(make_student(Case(), Ranks())), torch.nn.Parameter(torch.ones(3))
    optimizers = [torch.optim.SGD([*wrapped.parameters(), other], lr=0.1) for other in (own, own.detach())]
    for optimizer in optimizers:
        opd_steps(wrapped, [], FusedOPDLoss(), optimizer)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    opd_steps(wrapped, [], FusedOPDLoss(), optimizers[1])
    with pytest.warns(TrainingWarning, match=r"Optimizer SGD: it has 1 parameters that are not the student's, .* over the 2 ranks here"):
        opd_steps(wrapped, [], FusedOPDLoss(), optimizers[0])


def test_a_student_is_sharded_after_its_layers(group):
    """On the student alone the backward pass would go unnoticed."""
    alone = fully_shard(make_student(Case(), Ranks()))
    (batch,) = batches(make_store(1), rollouts_per_step=1, tokens_per_batch=50, ref="behavior").step(0).batches
    for act in (lambda: opd_steps(alone, [], FusedOPDLoss(), make_optimizer(alone)), lambda: alone(batch, FusedOPDLoss())):
        with pytest.raises(ModelError, match="call `fully_shard` on each layer first, and then on the student"):
            act()
    student = make_student(Case(), Ranks())
    for layer in student.model.model.layers:
        fully_shard(layer)
    check_summed(fully_shard(student), Ranks(1, 2))


def test_a_head_that_is_sharded_by_itself_is_refused(group):
    student = make_student(Case(model="qwen3_padded"), Ranks())
    for module in (*student.model.model.layers, student.model.lm_head, student):
        fully_shard(module)
    (batch,) = batches(make_store(1), rollouts_per_step=1, tokens_per_batch=50, ref="behavior").step(0).batches
    with pytest.raises(ModelError, match=r"its head is sharded in another group than the student's.*; leave `fully_shard` of the head out"):
        student(batch, FusedOPDLoss())


def test_adapters_on_a_base_that_was_changed_are_refused_at_the_export_though_they_are_sharded(group, make_model, tokenizer, tmp_path):
    make_model("llama_tied").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    torch.nn.init.constant_(model.model.norm.weight, 2)
    with pytest.warns(ModelWarning, match=r"'model\.norm\.weight' under its adapters is not as in "):
        student = CausalLMStudent(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])), tokenizer)
    for module in (*model.model.layers, student):
        fully_shard(module)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' under its adapters is not as in .*; export it merged"):
        student.export(tmp_path / "out", tokenizer, Lineage())


def test_shares_of_many_ranks_are_compared_once_each_and_of_none_where_they_are_not_stated(monkeypatch):
    compared, equal = [], Ranks.__eq__
    monkeypatch.setattr(Ranks, "__eq__", lambda one, other: compared.append(1) or equal(one, other))
    _check_shares([Step(0, (), ranks=Ranks(rank, 300)) for rank in range(300)])
    assert len(compared) <= 300
    for shares in ([Ranks(1, 2)] * 2, [Ranks()] * 2):
        found = [Step(0, (), ranks=share) for share in shares]
        with pytest.raises(InvalidRecordError, match=r"expected one of 2 that no other rank has; .*`evolve\(step, ranks=None\)`"):
            _check_shares(found)
        _check_shares([evolve(step, ranks=None) for step in found])


def test_a_step_without_weight_anywhere_is_refused():
    store = make_store(1)
    student = make_student(Case(), Ranks())
    stream = batches(store, rollouts_per_step=1, tokens_per_batch=50, ref="behavior")[:1]
    (step,) = stream
    nothing = evolve(step, batches=tuple(evolve(batch, weight=torch.zeros_like(batch.weight)) for batch in step.batches))
    with pytest.raises(InvalidRecordError, match="expected more than 0"):
        next(opd_steps(student, [nothing], FusedOPDLoss(), make_optimizer(student)))


def test_an_idle_micro_batch_leaves_gradients_of_nothing_everywhere():
    """FSDP sums what there is, so ranks must agree on which parameters have gradients."""
    student = make_student(Case(), Ranks())
    stream = batches(make_store(1), rollouts_per_step=1, tokens_per_batch=50, ref="behavior", ranks=Ranks(1, 2))
    (idle,) = stream.step(0).batches
    assert not idle.weight.any()
    student(idle, FusedOPDLoss()).loss_sum.backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None]
    assert missing == []
    assert all(not p.grad.any() for p in student.parameters())
