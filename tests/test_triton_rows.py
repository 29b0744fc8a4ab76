"""Triton's row kernels: run by its interpreter on the CPU against plain torch, and compiled ahead of time for three kinds of GPU.

Where there is a CUDA device the same tests run on it.  They need Triton (`make test-triton`) and are skipped without it.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fused_losses import SMALL, broken_clauses
from torch import Tensor

from lopd.losses import chunked, chunking
from lopd.losses.beside import EntropyBonus
from lopd.losses.divergences import forward_kl, reverse_kl
from lopd.losses.fused import FusedLoss
from lopd.losses.objective import Objective, OPDObjective
from lopd.losses.reference import ReferenceLoss
from lopd.losses.rows import in_front
from lopd.losses.top_k import TopKObjective

if not find_spec("triton"):
    pytest.skip("Triton is not installed: run `make test-triton`", allow_module_level=True)

from lopd.losses.triton_rows import TritonRows  # conftest asks for the interpreter where there is no CUDA

# by the interpreter of Triton 3.5
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [(1, 1, 1), (3, 1, 2), (2, 5, 1), (5, 1003, 3), (4, 4096, 1), (3, 4097, 5), (2, 9000, 16)]
CAPS = [None, 2.5]


def problem(rows: int, vocabulary: int, k: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Make logits, ids and coefficients."""
    random = torch.Generator().manual_seed(rows * vocabulary + k)
    logits = 3 * torch.randn(rows, vocabulary, generator=random) + shift
    ids = torch.randint(0, vocabulary, (rows, k), generator=random)
    return logits.to(DEVICE), ids.to(DEVICE), torch.randn(rows, k, generator=random).to(DEVICE)


def expected(logits: Tensor, ids: Tensor, coefficients: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Return log-probs, and the gradient by the logits, in float64."""
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else softcap * (leaf / softcap).tanh()
    logprobs = capped.log_softmax(-1).gather(-1, ids)
    return logprobs.detach(), torch.autograd.grad((coefficients.double() * logprobs).sum(), leaf)[0]


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probs_and_gradients_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype, softcap: float | None) -> None:
    logits, ids, coefficients = problem(*shape)
    logprobs, gradient = expected(logits, ids, coefficients, softcap)
    rows = TritonRows(logits, softcap, dtype)
    place = slice(0, shape[0])
    found = rows.logprobs(place, ids)
    assert (found.logprobs <= 0).all()
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows.gradients(place, ids, found, coefficients), torch.ones(shape[0], device=DEVICE))
    # a GPU rounds to the nearest number, and the interpreter towards zero
    relative = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if CUDA else 2**-7}[dtype]
    made = in_front(logits, dtype)
    assert made.dtype == dtype
    torch.testing.assert_close(made.double(), gradient, rtol=relative, atol=1e-6 * float(coefficients.abs().max()))


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("order", ["random", "rising", "falling", "ruled out first"])
def test_entropies_and_their_gradient_are_those_of_float64(order: str, softcap: float | None) -> None:
    logits, ids, coefficients = problem(3, 9000, 2)
    if order in {"rising", "falling"}:  # so that the largest logit of each block is another
        logits = logits.sort(-1, descending=order == "falling").values
    if order == "ruled out first":
        logits[:, :4500] = -torch.inf
        ids = ids % 4500 + 4500
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else softcap * (leaf / softcap).tanh()
    logprobs = capped.log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs.clamp(min=-1000)).sum(-1)
    entropy_coefficients = torch.tensor([0.5, -2.0, 0.0], device=DEVICE)
    loss = (entropy_coefficients * entropies).sum() + (coefficients * logprobs.gather(-1, ids)).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    rows, place = TritonRows(logits, softcap, torch.float32), slice(0, 3)
    found = rows.logprobs(place, ids, entropy=True)
    assert found.entropies is not None
    torch.testing.assert_close(found.entropies.double(), entropies.detach(), rtol=1e-6, atol=1e-6)
    rows.gradients(place, ids, found, coefficients, entropy_coefficients)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_that_are_all_far_from_zero_change_nothing(shift: float) -> None:
    logits, ids, coefficients = problem(3, 5000, 2, shift)
    logprobs, _ = expected(logits, ids, coefficients, None)
    found = TritonRows(logits, None, torch.float32).logprobs(slice(0, 3), ids)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-6, atol=1e-4)


def test_ruled_out_tokens_get_no_probability_and_no_gradient_even_if_they_come_first() -> None:
    logits, ids, coefficients = problem(2, 5000, 1)
    logits[:, :4500] = -torch.inf
    ids.fill_(4700)
    logprobs, gradient = expected(logits, ids, coefficients, None)
    rows = TritonRows(logits, None, torch.float32)
    found = rows.logprobs(slice(0, 2), ids)
    rows.gradients(slice(0, 2), ids, found, coefficients)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_an_id_that_occurs_twice_in_a_row_gets_both_coefficients() -> None:
    logits, _, coefficients = problem(3, 100, 4)
    ids = torch.full((3, 4), 42, device=DEVICE)
    _, gradient = expected(logits, ids, coefficients, None)
    rows = TritonRows(logits, None, torch.float32)
    rows.gradients(slice(0, 3), ids, rows.logprobs(slice(0, 3), ids), coefficients)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_rows_that_are_part_of_a_wider_buffer_leave_the_rest_of_it_alone() -> None:
    logits, ids, coefficients = problem(4, 700, 1)
    wide = torch.full((6, 1000), 7.0, device=DEVICE)
    wide[1:5, :700] = logits
    rows = TritonRows(wide[:, :700], None, torch.float32)
    found = rows.logprobs(slice(1, 5), ids)
    rows.gradients(slice(1, 5), ids, found, coefficients)
    torch.testing.assert_close(wide[1:5, :700].double(), expected(logits, ids, coefficients, None)[1], rtol=1e-5, atol=1e-6)
    assert (wide[[0, 5]] == 7).all()
    assert (wide[:, 700:] == 7).all()


def test_a_kernel_is_launched_on_the_card_that_its_tensors_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], list[int]()

    def exchange(card: int) -> int:
        before, current[0] = current[0], card if card >= 0 else current[0]
        return before if card >= 0 else -1

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    logits, ids, _ = problem(3, 100, 2)
    there: Any = SimpleNamespace(shape=logits.shape, is_cuda=True, get_device=lambda: 1)
    kernel = {(3,): lambda *_, **__: launched.append(current[0])}
    TritonRows(logits, None, torch.float32)._run(kernel, ids, (there,), (100,))
    assert launched == [1]
    assert current == [0]


@pytest.mark.skipif(CUDA, reason="the suite is run on the device there")
@pytest.mark.parametrize(
    "objective",
    [OPDObjective(), TopKObjective(forward_kl), TopKObjective(reverse_kl, residual=True), EntropyBonus(OPDObjective(clip=5.0))],
    ids=["lightning", "top-k", "residual", "bonus"],
)
def test_a_fused_loss_on_these_kernels_passes_the_suite_as_on_cuda(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_for(buffer: Tensor, softcap: float | None, dtype: torch.dtype) -> Any:
        return (TritonRows if buffer.dtype == torch.float32 else chunked.TorchRows)(buffer, softcap, dtype)

    monkeypatch.setattr(chunked, "rows_for", rows_for)
    monkeypatch.setattr(chunking, "multiplies", lambda *_: True)
    assert broken_clauses(FusedLoss(objective, SMALL), ReferenceLoss(objective), rounding=True) == []


COMPILE = """
import os, re, subprocess, sys, tempfile
from itertools import product
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lopd.losses import triton_rows as rows

capability = int(sys.argv[1])
common = dict(vocabulary="i32", row_stride="i64", gradient_stride="i64", softcap="fp32", K="i32", ids="*i64", logits="*fp32")


def judge(kernel, aligned, pointers, **constants):
    signature = {name: "constexpr" if name.isupper() and name != "K" else common.get(name, "*fp32") for name in kernel.arg_names}
    # where memory, and a vocabulary that is a multiple of 16, let it read and write more at once
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if aligned and kind not in ("constexpr", "fp32")}
    source = ASTSource(fn=kernel, signature=signature | pointers, constexprs=dict(BLOCK=rows.BLOCK, **constants), attrs=attributes)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": rows.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
    # in the order of the program, which that of PTX is not
    text = made.asm["ttgir"]
    places = [text.rfind("tt.load"), max(map(text.find, ("ttg.barrier", "gpu.barrier"))), text.find("tt.store")]
    places.append(made.asm["ptx"].count("bar.sync"))
    options = ",".join(map(str, (aligned, *pointers.values(), *constants.values())))
    print("RESULT", kernel.__name__, options, registers, stack, made.metadata.shared, *places)


for aligned, capped, other in product((False, True), repeat=3):
    judge(rows.statistics_kernel, aligned, {}, CAPPED=capped, ENTROPY=other)
    judge(rows.gradient_kernel, aligned, {"gradients": "*bf16" if other else "*fp32"}, CAPPED=capped)
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_the_gpu_without_spilling_a_register(capability: int) -> None:
    # in a process of its own: with the interpreter on, nothing can be compiled
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability)], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = re.findall(r"RESULT (\w+) (\S+)" + 7 * r" (-?\d+)", done.stdout)
    assert len(results) == 16
    for name, options, registers, stack, shared, *places in results:
        print(f"sm_{capability} {name} {options}: {registers} registers, {shared} bytes of shared memory")
        assert int(stack) == 0, f"{name} spills {stack} bytes"
        assert int(shared) <= 48 * 1024
        # without a barrier between, a thread would write a narrow gradient over logits that another has yet to read
        last_load, barrier, first_store, barriers = map(int, places)
        assert name != "gradient_kernel" or (last_load < barrier < first_store and barriers > 0)
