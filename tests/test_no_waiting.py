"""Nothing asks a GPU for a value inside a step; on the CPU it is counted what would have asked one, and on a GPU torch raises."""

import ast
import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from conftest import TOKENIZER_ID
from flash_stub import take_flash, take_flex
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_step import inside_steps

import lopd.verbs.train
from lopd import CausalLMStudent, opd_steps
from lopd.losses.beside import EntropyBonus, WindowRatio
from lopd.losses.divergences import entropy_gated, forward_kl, generalised_kl, jensen_shannon, reverse_kl, reverse_kl_renormalised
from lopd.losses.fused import FusedLoss, FusedOPDLoss, FusedSFTLoss
from lopd.losses.objective import Objective, OPDObjective
from lopd.losses.reference import ReferenceLoss, ReferenceOPDLoss, SFTLoss, WeightedLoss
from lopd.losses.top_k import TopKObjective
from lopd.losses.variants import (
    drift_gate,
    entropy_advantage,
    extrapolate,
    importance_ratio,
    log_compress,
    lowest_logprobs,
    position_weights,
    power,
    ppo_clip,
    prefix_fraction,
    window_ratio,
)
from lopd.protocols import OPDLoss
from lopd.records import Batch, LossOutput, Step
from lopd.testing import loss_case

pytestmark = pytest.mark.filterwarnings(
    "ignore::lopd.errors.AdvantageWarning",
    "ignore::lopd.errors.DriftWarning",
    "ignore:.*it reads no labels:lopd.errors.TrainingWarning",  # the batches have every column
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: What a GPU answers by a number or a shape, so that the host waits; and what brings numbers from the host while the host waits.
_ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "lift_fresh"}
_ASKS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
_TAKES = {"cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__int__", "__float__", "__index__"}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.counting = found, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in (args[1] if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple) else ()) if i is not None]
        asks = any(i.dtype in (torch.bool, torch.uint8) for i in masks if isinstance(i, Tensor))
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if self.counting and (name in _ASKS or asks or repeats):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Methods that reach no operation on the CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found, self.counting = found, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.counting and name in _TAKES and args and isinstance(args[0], Tensor):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def asked(on: Callable[[Callable[[bool], None]], None] | None = None) -> Iterator[list[str]]:
    """Record what the host waits for within the block; `on` is given a switch, which is on without it."""
    found: list[str] = []
    operations, methods = _Operations(found), _Methods(found)

    def switch(counting: bool) -> None:
        operations.counting = methods.counting = counting
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if counting else "default")

    with operations, methods:
        switch(on is None)
        if on is not None:
            on(switch)
        try:
            yield found
        finally:
            switch(False)


def a_batch(seed: int = 0, lengths: tuple[int, ...] = (9, 1, 17)) -> Batch:
    """Make a batch with every column."""
    return loss_case("a step", lengths, vocab=96, seed=seed, heated=True, drawn=3).rounded(torch.float32).batch


def objectives() -> dict[str, Objective]:
    transforms = [importance_ratio, ppo_clip, log_compress, window_ratio, position_weights, drift_gate, lowest_logprobs, entropy_advantage]
    transforms += [partial(extrapolate, scale=1.5), partial(power, alpha=0.5), partial(prefix_fraction, fraction=0.5)]
    made: dict[str, Objective] = {
        getattr(transform, "func", transform).__name__: OPDObjective(transforms=(transform,)) for transform in transforms
    }
    for divergence in (forward_kl, reverse_kl, generalised_kl, reverse_kl_renormalised, jensen_shannon, entropy_gated):
        made[divergence.__name__] = TopKObjective(divergence)
    for divergence in (reverse_kl, generalised_kl):
        made[f"{divergence.__name__} with its residual"] = TopKObjective(divergence, residual=True, clip=5.0, ratio_cap=4.0)
    made["a baseline"] = OPDObjective(kl_baseline=True, ratio_to_ref=True, ratio_cap=3.0)
    made["an entropy bonus"] = EntropyBonus(OPDObjective(clip=5.0))
    made["a window"] = WindowRatio(TopKObjective(reverse_kl, residual=True))
    return made


def losses() -> dict[str, OPDLoss]:
    made: dict[str, OPDLoss] = {
        "lightning": ReferenceOPDLoss(),
        "sft": SFTLoss(),
        "fused": FusedOPDLoss(),
        "fused ratio": FusedOPDLoss(ratio_to_ref=True),
        "fused sft": FusedSFTLoss(),
        "weighted": WeightedLoss([(1.0, FusedOPDLoss()), (0.1, FusedSFTLoss())]),
    }
    for name, objective in objectives().items():
        made |= {name: FusedLoss(objective), f"{name}, reference": ReferenceLoss(objective)}
    return made


@pytest.fixture(scope="module")
def student(llama):
    return CausalLMStudent(copy.deepcopy(llama).to(DEVICE), TOKENIZER_ID)


@pytest.mark.parametrize("loss", losses().values(), ids=losses().keys())
def test_no_loss_asks_the_gpu(student, loss):
    batch = a_batch().to(DEVICE)
    student(batch, loss).loss_sum.backward()  # what is computed once is not counted
    with asked() as found:
        student(batch, loss).loss_sum.backward()
    assert found == []


def steps_of(count: int, drift: bool = True) -> Iterator[Step]:
    for index in range(count):
        batches = [a_batch(2 * index), a_batch(2 * index + 1, (5, 30))]
        batches = [batch if drift else evolve(batch, ref_logprobs=None) for batch in batches]
        # what is asked of a batch on the CPU is not a question to a GPU
        assert all(batch.counts for batch in batches)
        yield Step(index, tuple(batches))


def found_in_steps(student: CausalLMStudent, loss: OPDLoss, drift: bool, count: int = 4) -> list[str]:
    """Return what the host waits for in a step, from the third on.

    It is measured from the first forward to the one fetch of all that is reported of the step.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    switches: list[Callable[[bool], None]] = []
    forwards, place = [], [-1]

    def switch(on: bool) -> None:
        switches[0](on and place[0] >= 2)
        forwards.extend([place[0]] if on else [])

    def numbered() -> Iterator[Step]:
        for step in steps_of(count, drift):
            place[0] = step.index
            yield step

    with asked(switches.append) as found, inside_steps(student, switch):
        metrics = list(opd_steps(student, numbered(), loss, optimizer))
    assert len(metrics) == count
    assert all((m.drift is not None) == drift for m in metrics)
    assert forwards == [index for index in range(count) for _ in range(2)]
    return found


@pytest.mark.parametrize("drift", [True, False], ids=["drift", "no drift"])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "qwen3_padded"])
def test_no_step_asks_the_gpu_before_it_ends(kind, models, drift):
    loss = FusedOPDLoss(ratio_to_ref=True) if drift else ReferenceOPDLoss(ratio_to_ref=True)
    student = CausalLMStudent(copy.deepcopy(models(kind)).to(DEVICE), TOKENIZER_ID, gradient_checkpointing=kind == "llama_tied")
    assert found_in_steps(student, loss, drift) == []


@pytest.mark.skipif(DEVICE.type == "cuda", reason="its attention computes on the CPU")
@pytest.mark.parametrize("take", [take_flash, take_flex])
def test_no_step_of_packed_rollouts_asks_the_gpu_before_it_ends(take, llama):
    model = copy.deepcopy(llama)
    with take(model):
        assert found_in_steps(CausalLMStudent(model, TOKENIZER_ID), FusedOPDLoss(ratio_to_ref=True), drift=True) == []


def test_what_is_told_of_a_step_comes_in_one_copy(student, monkeypatch):
    copies = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self) or cpu(self))
    batch = a_batch()
    columns = [batch.weight.data_ptr()]
    list(opd_steps(student, [Step(5, (batch, batch))], FusedOPDLoss(ratio_to_ref=True), torch.optim.SGD(student.parameters(), lr=0.0)))
    fetched = [values for values in copies if values.numel() == 1 + 2 * (3 + len(batch.counted))]
    assert len(fetched) == 1
    assert columns == [batch.weight.data_ptr()]


def test_a_gpu_holds_one_batch_of_a_step_at_a_time_and_nothing_of_a_step_that_is_told(student, monkeypatch):
    there, said = list[weakref.ref[Any]](), list[weakref.ref[Any]]()
    at_once, to, loss = [], Batch.to, FusedOPDLoss(ratio_to_ref=True)

    def moved(self: Batch, device: torch.device) -> Batch:
        found = to(self, device)
        there.append(weakref.ref(found))
        at_once.append(sum(batch() is not None for batch in there))
        return found

    def told(*given: Any) -> LossOutput:
        output = loss(*given)
        said.extend(weakref.ref(part) for part in (output.loss_sum, output.logprobs))
        return output

    monkeypatch.setattr(Batch, "to", moved)
    batches = tuple(a_batch(seed) for seed in range(3))
    steps = opd_steps(student, [Step(0, batches), Step(1, batches)], told, torch.optim.SGD(student.parameters(), lr=0.0))
    for _ in steps:
        assert not [kept for kept in (*there, *said) if kept() is not None]
    assert at_once == 6 * [1]
    assert len(said) == 12


def test_the_counter_counts():
    values = torch.arange(6.0)
    with asked() as found:
        _ = values[values > 2], values.nonzero(), float(values.sum()), values.tolist(), torch.tensor([1.0]), bool(values.any())
        values[values > 2] = values[:3].clone()
        _ = values.long().repeat_interleave(values.long()), values.unique(), values.numpy(), values.cpu()
    names = [
        "index",
        "nonzero",
        "_local_scalar_dense",
        "tolist",
        "lift_fresh",
        "index_put",
        "repeat_interleave",
        "_unique2",
        "numpy",
        "cpu",
    ]
    assert all(any(name in one for one in found) for name in names), found


def test_what_follows_from_a_batch_is_computed_once_and_comes_along():
    batch = a_batch()
    assert batch.counted.tolist() == (batch.weight > 0).nonzero().squeeze(-1).tolist()
    assert batch.lengths == (9, 1, 17)
    assert batch.counts == tuple(int((batch.weight[batch.segment_ids == i] > 0).sum()) for i in range(3))
    moved = batch.to(torch.device("meta"))
    assert (moved.lengths, moved.counts) == (batch.lengths, batch.counts)
    assert moved.counted.is_meta
    assert moved.counted.shape == batch.counted.shape
    without = evolve(moved.to(torch.device("meta")), weight=torch.zeros_like(batch.weight), segment_ids=batch.segment_ids)
    assert without.counted.tolist() == [], "a changed batch knows nothing of the one that it was made of"
    assert evolve(without, position_ids=batch.position_ids).counts == (0, 0, 0)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_padded"])
def test_the_default_device_changes_nothing(kind, models):
    """Whatever is made inside a step is made where its data are: on a GPU, anything else is an error, or a copy that waits."""

    made = list(steps_of(3))

    def trained(device: str) -> tuple[Any, list[Tensor]]:
        student = CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID)
        steps = opd_steps(student, made, FusedOPDLoss(ratio_to_ref=True), torch.optim.SGD(student.parameters(), lr=0.1))
        with torch.device(device):
            return [evolve(m, seconds=0.0) for m in steps], [parameter.detach() for parameter in student.parameters()]

    (metrics, weights), (expected, expected_weights) = trained("meta"), trained("cpu")
    assert metrics == expected
    assert all(torch.equal(weight, other) for weight, other in zip(weights, expected_weights, strict=True))


_MAKE = {"tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"}
#: Cases of losses are made on the CPU and moved; an objective tries its divergence on tensors of no values; the planner does it once for all.
_ANYWHERE = {"testing/loss_cases.py", "losses/top_k.py", "tools/plan/following.py", "tools/plan/memory.py"}


def test_every_tensor_that_lopd_makes_says_where() -> None:
    root = Path(lopd.verbs.train.__file__).parents[1]
    silent = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch":
                says = {keyword.arg for keyword in node.keywords} & {"device", None}
                if node.func.attr in _MAKE and not says and path.relative_to(root).as_posix() not in _ANYWHERE:
                    silent.append(f"{path.relative_to(root)}:{node.lineno}")
    assert silent == []
