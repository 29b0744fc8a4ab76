"""What `bench_estimators.py` compares: every way from stored log-probs to the gradient of the reverse KL, and the bytes that it stores.

Shape suffixes: R rows (a token of a rollout, or a state), K ids of a support, D drawn ids, V vocabulary.
"""

from typing import Any

import torch
from attrs import asdict, evolve, frozen
from torch import Tensor

from lopd import TopKObjective, WindowRatio
from lopd.losses.divergences import generalised_kl, reverse_kl
from lopd.losses.objective import Objective, OPDObjective

#: Bytes of a stored log-prob (float16), of an id of a vocabulary of at most 65,536, and of a tail; `make bench-supports` measures them.
NUMBER, ID, TAIL = 2, 2, 4


@frozen
class Support:
    """Which ids have stored log-probs beside the sampled token.

    Args:
        policy: so many of the policy's most likely ones.
        teacher: so many of the teacher's most likely ones, outside of those.
        drawn: so many drawn from the policy, with replacement.
    """

    policy: int = 0
    teacher: int = 0
    drawn: int = 0

    @property
    def bytes(self) -> int:
        """Bytes a token: the teacher's column, and that of the policy where it kept any, each with ids, log-probs and a tail."""
        widths = [self.policy + self.teacher + self.drawn, self.policy + self.drawn]
        own = NUMBER if self.policy + self.drawn else 0
        return sum(width * (ID + NUMBER) + TAIL for width in widths if width) + own

    def ids(self, policy_RV: Tensor, teacher_RV: Tensor) -> Tensor:
        """Return (R, K) distinct ids; they do not depend on the sampled token."""
        policy_RK = policy_RV.topk(self.policy, dim=-1).indices
        others_RV = teacher_RV.scatter(-1, policy_RK, float("-inf"))
        return torch.cat([policy_RK, others_RV.topk(self.teacher, dim=-1).indices], dim=-1)

    def columns(self, policy_RV: Tensor, teacher_RV: Tensor) -> dict[str, Tensor]:
        """Return these columns of a batch, without those of drawn tokens.

        An empty support has no columns, and next to drawn tokens alone the tail holds all mass.
        """
        if not self.policy + self.teacher + self.drawn:
            return {}
        ids_RK = self.ids(policy_RV, teacher_RV)
        logprobs_RK = teacher_RV.gather(-1, ids_RK)
        # what the others have, added up: 1 minus a sum of float32 is noise where little is left
        tail_R = teacher_RV.double().exp().scatter(-1, ids_RK, 0.0).sum(-1).to(logprobs_RK.dtype)
        return {"top_k_ids": ids_RK, "top_k_logprobs": logprobs_RK, "top_k_tail": tail_R}


@frozen
class Estimator:
    """One way to the gradient.

    Args:
        family: what is the same at every size of its support: a line of the plot.
        objective: lopd's.
        support: what it needs beside the sampled token.
        unbiased: whether it claims to have the expected gradient of the reverse KL at every stored state.
        sampled: whether the sampled token plays a part.
        fresh: the rollouts are the student's own, and not those of the policy.
    """

    family: str
    objective: Objective
    support: Support = Support()
    unbiased: bool = False
    sampled: bool = True
    fresh: bool = False

    @property
    def name(self) -> str:
        """Of the family, with the sizes of the support."""
        shown = " + ".join(str(size) for size in (self.support.policy, self.support.teacher, self.support.drawn) if size)
        return f"{self.family}, {shown}" if shown else self.family

    @property
    def bytes(self) -> int:
        """Bytes a token beside its id: log-probs of the sampled one under teacher and policy, which every store has, and the support."""
        return 2 * NUMBER + self.support.bytes

    def describe(self) -> dict[str, Any]:
        """Return the fields that describe the estimator in rows of the result."""
        return {"estimator": self.name, "family": self.family, "bytes": self.bytes, **asdict(self.support), "unbiased": self.unbiased}


PLAIN = Estimator("Lightning, no ratio", OPDObjective(clip=None))
RATIO = Estimator("ratio", OPDObjective(clip=None, ratio_to_ref=True), unbiased=True)
ONLINE = Estimator("online, sampled anew", OPDObjective(clip=None), fresh=True)
BUCKET, RESIDUAL = TopKObjective(reverse_kl), TopKObjective(reverse_kl, residual=True)
GENERALISED = TopKObjective(generalised_kl, residual=True)


def whole(vocabulary: int) -> Estimator:
    """Return the exact sum over a vocabulary small enough to be stored."""
    return Estimator("whole vocabulary", BUCKET, Support(teacher=vocabulary - 1), unbiased=True, sampled=False)


def supported(size: int) -> list[Estimator]:
    """Return all estimators with a support of this size."""
    half = size // 2
    halves, mixed = Support(policy=size - half, teacher=half), Support(policy=size - half, drawn=half)
    return [
        Estimator("teacher's top K", BUCKET, Support(teacher=size), sampled=False),
        Estimator("candidates", BUCKET, Support(policy=size), sampled=False),
        Estimator("teacher's top K + residual", RESIDUAL, Support(teacher=size), unbiased=True),
        Estimator("candidates + residual", RESIDUAL, Support(policy=size), unbiased=True),
        Estimator("candidates, generalised KL + residual", GENERALISED, Support(policy=size), unbiased=True),
        Estimator("union + residual", RESIDUAL, halves, unbiased=True),
        Estimator("drawn", RESIDUAL, Support(drawn=size), unbiased=True),
        Estimator("candidates + drawn", RESIDUAL, mixed, unbiased=True),
    ]


def windowed(sizes: tuple[int, ...]) -> list[Estimator]:
    """Return some estimators that also weigh the states, by the ratio of the tokens before; they need whole rollouts."""
    chosen = [RATIO, *(estimator for size in sizes for estimator in supported(size) if estimator.objective is RESIDUAL)]
    names = ("ratio", "teacher's top K + residual", "candidates + residual")
    return [
        evolve(estimator, family=f"{estimator.family}, window of 8", objective=WindowRatio(estimator.objective), unbiased=False)
        for estimator in chosen
        if estimator.family in names
    ]


def estimators(sizes: tuple[int, ...]) -> list[Estimator]:
    """Return all estimators at these sizes."""
    return [PLAIN, RATIO, *(estimator for size in sizes for estimator in supported(size))]
