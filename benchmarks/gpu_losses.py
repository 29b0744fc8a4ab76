"""Losses on a card: whether they are right there, and what they cost beside others."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from attrs import evolve
from gpu_device import Device, Found, goal, in_turns
from loss_paths import make_problem, paths_on
from roofline import loss_floor

from lopd import Chunking, FusedLoss, FusedOPDLoss, FusedSFTLoss, ReferenceLoss, ReferenceOPDLoss, SFTLoss, TopKObjective
from lopd.losses.beside import EntropyBonus, WindowRatio
from lopd.losses.divergences import forward_kl, generalised_kl, jensen_shannon, reverse_kl
from lopd.losses.objective import OPDObjective, Signal
from lopd.protocols import OPDLoss
from lopd.testing import LossCase, LossConformance, loss_cases

_SMALL = Chunking(chunk_bytes=1)


def whole_rollouts(signal: Signal) -> Signal:
    """Double the weight; the transform does not look at each token alone, so its loss computes logits twice."""
    return evolve(signal, weight=2 * signal.weight)


#: Objectives, whose fused loss is judged beside the plain one.
_OBJECTIVES = {
    "forward KL": TopKObjective(forward_kl),
    "Jensen-Shannon": TopKObjective(jensen_shannon),
    "generalised KL, residual": TopKObjective(generalised_kl, residual=True),
    "reverse KL, residual": TopKObjective(reverse_kl, residual=True),
    "entropy bonus": EntropyBonus(OPDObjective(clip=5.0), 0.05),
    "entropy bonus of a support": EntropyBonus(TopKObjective(reverse_kl, residual=True), 1.0),
    "window of ratios": WindowRatio(TopKObjective(reverse_kl, residual=True), window=3),
}
#: Name -> what is judged, and the same in plain torch.
LOSSES: dict[str, tuple[OPDLoss, OPDLoss]] = {
    "reverse KL": (FusedLoss(TopKObjective(reverse_kl), _SMALL), ReferenceLoss(TopKObjective(reverse_kl))),
    "Lightning": (FusedOPDLoss(chunking=_SMALL), ReferenceOPDLoss()),
    "Lightning, ratio": (FusedOPDLoss(clip=1.0, ratio_to_ref=True, chunking=_SMALL), ReferenceOPDLoss(clip=1.0, ratio_to_ref=True)),
    "Lightning, recomputed": (
        FusedOPDLoss(transforms=(whole_rollouts,), chunking=_SMALL),
        ReferenceOPDLoss(transforms=(whole_rollouts,)),
    ),
    "Lightning, KL baseline": (FusedOPDLoss(kl_baseline=True, chunking=_SMALL), ReferenceOPDLoss(kl_baseline=True)),
    "SFT": (FusedSFTLoss(_SMALL), SFTLoss()),
    **{name: (FusedLoss(objective, _SMALL), ReferenceLoss(objective)) for name, objective in _OBJECTIVES.items()},
}


def broken_clauses(loss: OPDLoss, plain: OPDLoss, on: torch.device, cases: Callable[[], Sequence[LossCase]] = loss_cases) -> list[str]:
    """Return the clauses of `LossConformance` that a loss breaks on the device, with the first line of why."""

    class Suite(LossConformance):
        device = on

        def make(self) -> OPDLoss:
            return loss

        def reference(self) -> OPDLoss:
            return plain

        def cases(self) -> Sequence[LossCase]:
            return cases()

    broken = []
    for name in (name for name in dir(Suite) if name.startswith("test_")):
        try:
            getattr(Suite(), name)()
        except Exception as error:  # whatever is raised breaks the clause
            broken.append(f"{name}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}")
    return broken


def conformance(device: Device) -> Found:
    """Judge every loss in float64, float32 and bfloat16 on the device against float64 there."""
    losses = dict(list(LOSSES.items())[:1]) if device.tiny else LOSSES
    cases = (lambda: loss_cases()[:4]) if device.tiny else loss_cases
    rows = []
    for name, (loss, plain) in losses.items():
        rows.append({"loss": name, "broken": broken_clauses(loss, plain, torch.device(device.name), cases)})
    broken = sum(map(len, (row["broken"] for row in rows)))
    return rows, [goal(f"clauses of LossConformance that {len(rows)} losses break", "0", broken, broken == 0)]


def race(device: Device) -> Found:
    """Measure the loss and its gradients beside full logits and other libraries: seconds, peak memory and share of the roofline."""
    tokens, vocabulary, sizes, dtype = (32, 97, (8,), torch.float32) if device.tiny else (4096, 151_936, (1024, 2048, 4096), torch.bfloat16)
    rows, paths = list[dict[str, Any]](), paths_on(device.name)
    for size in sizes:
        problem = make_problem(tokens, vocabulary, size, dtype, device=device.name)

        def run(name: str, problem: Any = problem) -> None:
            problem.hidden.grad = problem.weight.grad = None
            paths[name](problem).backward()

        calls, shape = dict[str, Callable[[], None]](), {"tokens": tokens, "shape": f"{vocabulary}x{size}"}
        for name, path in paths.items():
            if path.package is not None and not find_spec(path.package):
                rows.append({**shape, "path": name, "not_run": f"{path.package} is not installed"})
                continue
            try:
                run(name)
                calls[name] = partial(run, name)
            except Exception as error:  # another library's path may not run on this card or with these versions
                rows.append({**shape, "path": name, "not_run": f"{type(error).__name__}: {str(error)[:200]}"})
        seconds = in_turns(device, calls, 1 if device.tiny else 5)
        floor = loss_floor(tokens, size, vocabulary, device.card) if device.card else None
        for name, call in calls.items():
            share = {} if floor is None else {"share_of_roofline": floor / seconds[name]}
            rows.append({**shape, "path": name, "seconds": seconds[name], "peak_gb": device.peak_gb(call), **share})
    ours = [row for row in rows if row["path"] == "fused"]
    full = {row["shape"]: row for row in rows if row["path"] == "full logits" and "seconds" in row}
    ratios = [row["seconds"] / full[row["shape"]]["seconds"] for row in ours if "seconds" in row and row["shape"] in full]
    if device.tiny or not ratios:
        return rows, []
    return rows, [goal("fused over full logits, seconds, the worst size", "< 1", max(ratios), max(ratios) < 1)]
