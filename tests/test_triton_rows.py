"""Triton's row kernels: run by its interpreter on the CPU against plain torch, and compiled ahead of time for two kinds of GPU.

Where there is a CUDA device the same tests run on it.  They need Triton (`make test-triton`) and are skipped without it.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fused_losses import SMALL, broken_clauses
from torch import Tensor

from lopd.losses import chunked
from lopd.losses.divergences import forward_kl, reverse_kl
from lopd.losses.entropy import EntropyBonus
from lopd.losses.fused import FusedLoss
from lopd.losses.objective import Objective, OPDObjective
from lopd.losses.reference import ReferenceLoss
from lopd.losses.top_k import TopKObjective

if not find_spec("triton"):
    pytest.skip("Triton is not installed: run `make test-triton`", allow_module_level=True)

from lopd.losses import triton_rows  # conftest asks for the interpreter where there is no CUDA

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = [(1, 1, 1), (3, 1, 2), (2, 5, 1), (5, 1003, 3), (4, 4096, 1), (3, 4097, 5), (2, 9000, 16)]
CAPS = [None, 2.5]


def problem(rows: int, vocabulary: int, k: int, dtype: torch.dtype, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and coefficients."""
    random = torch.Generator().manual_seed(rows * vocabulary + k)
    logits = (3 * torch.randn(rows, vocabulary, generator=random) + shift).to(dtype)
    ids = torch.randint(0, vocabulary, (rows, k), generator=random)
    return logits.to(DEVICE), ids.to(DEVICE), torch.randn(rows, k, generator=random).to(DEVICE)


def expected(logits: Tensor, ids: Tensor, coefficients: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient by the logits, in float64."""
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else softcap * (leaf / softcap).tanh()
    logprobs = capped.log_softmax(-1).gather(-1, ids)
    return logprobs.detach(), torch.autograd.grad((coefficients.double() * logprobs).sum(), leaf)[0]


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_probs_and_gradients_are_those_of_float64(shape: tuple[int, int, int], dtype: torch.dtype, softcap: float | None) -> None:
    logits, ids, coefficients = problem(*shape, dtype)
    logprobs, gradient = expected(logits, ids, coefficients, softcap)
    rows = triton_rows.TritonRows(logits, softcap)
    place = slice(0, shape[0])
    found = rows.logprobs(place, ids)
    assert (found.logprobs <= 0).all()
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows.gradients(place, ids, found, coefficients), torch.ones(shape[0], device=DEVICE))
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(logits.double(), gradient, rtol=tolerance, atol=tolerance * float(coefficients.abs().max()))


@pytest.mark.parametrize("softcap", CAPS)
def test_entropies_are_those_of_float64(softcap: float | None) -> None:
    logits, ids, _ = problem(3, 5000, 2, torch.float32)
    capped = logits.double() if softcap is None else softcap * (logits.double() / softcap).tanh()
    truth = torch.special.entr(capped.softmax(-1)).sum(-1)
    found = triton_rows.TritonRows(logits, softcap).logprobs(slice(0, 3), ids, entropy=True)
    assert found.entropies is not None
    torch.testing.assert_close(found.entropies.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_that_are_all_far_from_zero_change_nothing(shift: float) -> None:
    logits, ids, coefficients = problem(3, 5000, 2, torch.float32, shift)
    logprobs, _ = expected(logits, ids, coefficients, None)
    found = triton_rows.TritonRows(logits, None).logprobs(slice(0, 3), ids)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-6, atol=1e-4)


def test_ruled_out_tokens_get_no_probability_and_no_gradient_even_if_they_come_first() -> None:
    logits, ids, coefficients = problem(2, 5000, 1, torch.float32)
    logits[:, :4500] = -torch.inf
    ids.fill_(4700)
    logprobs, gradient = expected(logits, ids, coefficients, None)
    rows = triton_rows.TritonRows(logits, None)
    found = rows.logprobs(slice(0, 2), ids)
    rows.gradients(slice(0, 2), ids, found, coefficients)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_an_id_that_occurs_twice_in_a_row_gets_both_coefficients() -> None:
    logits, _, coefficients = problem(3, 100, 4, torch.float32)
    ids = torch.full((3, 4), 42, device=DEVICE)
    _, gradient = expected(logits, ids, coefficients, None)
    rows = triton_rows.TritonRows(logits, None)
    rows.gradients(slice(0, 3), ids, rows.logprobs(slice(0, 3), ids), coefficients)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_rows_that_are_part_of_a_wider_buffer_leave_the_rest_of_it_alone() -> None:
    logits, ids, coefficients = problem(4, 700, 1, torch.float32)
    wide = torch.full((6, 1000), 7.0, device=DEVICE)
    wide[1:5, :700] = logits
    rows = triton_rows.TritonRows(wide[:, :700], None)
    found = rows.logprobs(slice(1, 5), ids)
    rows.gradients(slice(1, 5), ids, found, coefficients)
    torch.testing.assert_close(wide[1:5, :700].double(), expected(logits, ids, coefficients, None)[1], rtol=1e-5, atol=1e-6)
    assert (wide[[0, 5]] == 7).all()
    assert (wide[:, 700:] == 7).all()


@pytest.mark.skipif(CUDA, reason="the suite makes its cases on the CPU, where kernels run only in the interpreter")
@pytest.mark.parametrize(
    "objective",
    [OPDObjective(), TopKObjective(forward_kl), TopKObjective(reverse_kl, residual=True), EntropyBonus(OPDObjective(clip=5.0))],
    ids=["lightning", "top-k", "residual", "bonus"],
)
def test_a_fused_loss_on_these_kernels_passes_the_suite_in_float32(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_for(buffer: Tensor, softcap: float | None, dtype: torch.dtype) -> Any:
        return triton_rows.TritonRows(buffer, softcap) if dtype == torch.float32 else chunked.TorchRows(buffer, softcap, dtype)

    monkeypatch.setattr(chunked, "rows_for", rows_for)
    assert broken_clauses(FusedLoss(objective, SMALL), ReferenceLoss(objective)) == []


COMPILE = """
import os, re, subprocess, sys, tempfile
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lopd.losses import triton_rows as rows

capability, dtype, capped = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
common = dict(vocabulary="i32", row_stride="i64", softcap="fp32", K="i32", CAPPED="constexpr", BLOCK="constexpr")
common |= dict(logits="*" + dtype, ids="*i64", largest="*fp32", selected="*fp32")
kernels = {
    rows.statistics_kernel: dict(rests="*fp32"),
    rows.gradient_kernel: dict(factors="*fp32", slopes="*fp32"),
}
for kernel, own in kernels.items():
    signature = {name: (common | own)[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(CAPPED=capped, BLOCK=rows.BLOCK))
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": rows.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
    print("RESULT", kernel.__name__, registers, stack, made.metadata.shared)
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capped", [False, True])
def test_kernels_compile_for_the_gpu_without_spilling_a_register(capability: int, dtype: str, capped: bool) -> None:
    # in a process of its own: with the interpreter on, nothing can be compiled
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-c", COMPILE, str(capability), dtype, str(capped)]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = re.findall(r"RESULT (\w+) (\d+) (\d+) (\d+)", done.stdout)
    assert len(results) == 2
    for name, registers, stack, shared in results:
        print(f"sm_{capability} {dtype} capped={capped} {name}: {registers} registers, {shared} bytes of shared memory")
        assert int(stack) == 0, f"{name} spills {stack} bytes"
        assert int(shared) <= 48 * 1024
