r"""How far the offline gradient is from the online one along a run, beside the bound of theorem 3.5 (Lightning OPD, arXiv 2604.13010v2).

Both are measured: the online one on fresh rollouts of the student as it is, the offline one on rollouts of the SFT student, each on two
disjoint halves.  The product of the differences on the halves estimates \(\|\nabla J_{on} - \nabla J_{off}\|^2\) without the bias that
the noise of one sample would add.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from lopd import FusedOPDLoss, MemoryStore, batches, collate, sample_round
from lopd.engines.hf import HFScorer
from lopd.protocols import LogprobReader
from lopd.records.drift import TokenLogprobs, measure_step
from testbed.arms import PLAIN, RATIO, Arm
from testbed.models import TOKENS_PER_BATCH, Setting, prepare
from testbed.runs import Training, offline, scored_rollouts

#: Advantages as the theorem has them: not clipped.  The offline gradient is that of the arm, so with its ratio, if it has one.
_LOSSES = {arm.name: FusedOPDLoss(clip=None, ratio_to_ref=arm is RATIO) for arm in (PLAIN, RATIO)}
_SCORES = 64


def run_gap(setting: Setting, seed: int, folder: Path, arm: Arm, at: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each of these steps of an offline run."""
    bed = prepare(setting, seed, folder, ("A",))
    stored, teacher = scored_rollouts(bed, "A", "A"), HFScorer.from_folder(bed.teachers["A"])
    training, rows = Training.of(bed.students["A"], setting.opd_lr), []
    steps = offline(bed, stored, training, arm.loss)
    for step in range(max(at) + 1):
        if step in at:
            source = training.source(bed.sampling(), generation=step + 1)
            fresh = MemoryStore(source.manifest)
            sample_round(source, teacher, bed.opd_prompts, fresh)
            online, own = _LOSSES[PLAIN.name], _LOSSES[arm.name]
            halves = [_gradient(training, fresh, half, online) - _gradient(training, stored, half, own) for half in (0, 1)]
            gap, drift = max(float(halves[0] @ halves[1]), 0.0) ** 0.5, _drift(training, stored)
            norm = float(_gradient(training, fresh, None, online).norm())
            largest = _largest_score(training, stored)
            rows.append(
                {
                    "setting": setting.name,
                    "seed": seed,
                    "arm": arm.name,
                    "step": step,
                    "gap": gap,
                    "online_gradient": norm,
                    "chi2": drift.chi2,
                    "sigma_times_root_chi2": drift.gap_bound,
                    "largest_score_norm": largest,
                    "bound": largest * drift.gap_bound,
                }
            )
        next(steps, None)
    return rows


def _stream(store: LogprobReader, half: int | None) -> Any:
    """Return one step of all rollouts, or of every other one."""
    rows = np.arange(len(store)) if half is None else np.arange(half, len(store), 2)
    return batches(store, rollouts_per_step=len(rows), tokens_per_batch=TOKENS_PER_BATCH, rows=rows, ref="behavior").step(0)


def _gradient(training: Training, store: LogprobReader, half: int | None, loss: FusedOPDLoss) -> Tensor:
    """Return the gradient of the mean over rollouts of the mean over their tokens, as a vector."""
    step = _stream(store, half)
    total = sum(float(batch.weight.sum()) for batch in step.batches)
    training.student.zero_grad()
    for batch in step.batches:
        (training.student(batch, loss).loss_sum / total).backward()
    return torch.cat([p.grad.flatten() for p in training.student.parameters() if p.grad is not None]).double()


@torch.no_grad()
def _drift(training: Training, store: LogprobReader) -> Any:
    known = []
    for batch in _stream(store, None).batches:
        logprobs_M, on_N = training.student(batch, _LOSSES[PLAIN.name]).logprobs, batch.weight > 0
        columns = (batch.teacher_logprobs, batch.ref_logprobs, batch.weight, batch.segment_ids)
        known.append(TokenLogprobs(logprobs_M.double().numpy(), *(column[on_N].numpy() for column in columns)))
    return measure_step(known)


def _largest_score(training: Training, store: LogprobReader) -> float:
    r"""Return the largest norm of \(\nabla \log \pi_\theta(a_t|s_t)\) over some tokens.

    It is a lower estimate of G, so the bound is stated too small, if at all.
    """
    rng, found = np.random.default_rng(0), 0.0
    for row in rng.choice(len(store), min(_SCORES, len(store)), replace=False).tolist():
        batch = collate(store.read([row], columns=["teacher"]), teacher="teacher")
        one = torch.zeros_like(batch.weight)
        one[int(rng.choice(np.flatnonzero(batch.weight.numpy())))] = 1.0
        training.student.zero_grad()
        training.student(evolve(batch, weight=one), FusedOPDLoss(advantage=1.0)).loss_sum.backward()
        squares = [float(p.grad.double().square().sum()) for p in training.student.parameters() if p.grad is not None]
        found = max(found, sum(squares) ** 0.5)
    training.student.zero_grad()
    return found
