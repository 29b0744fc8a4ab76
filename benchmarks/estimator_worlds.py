"""Models so small that the online gradient is a sum: a table of logits, one row a state, and the state that each token leads to.

Two worlds.  In `mixing` the state is the last token, so a rollout forgets where it began.  In `modes` the first token decides a mode that stays,
so a student that chooses its first token otherwise sees other states ever after.

Every gradient is what lopd's fused loss gives: hidden states are one-hot rows, and the table is the head's weight.

Shape suffixes: S states, V vocabulary, B rollouts, H tokens of each, N = B H, R rows, D drawn.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attrs import frozen
from estimators import Estimator
from torch import Tensor

from lopd import FusedLoss
from lopd.records import Batch, LMHead


@frozen(eq=False)
class World:
    """Where tokens lead.

    Args:
        name: in tables.
        next_SV: int64, the state after a token.
        start_S: probability of the first state.
        horizon: tokens of a rollout.
    """

    name: str
    next_SV: Tensor
    start_S: Tensor
    horizon: int = 32

    def visits(self, policy_SV: Tensor) -> Tensor:
        """Return (S,) how often a rollout of this policy is in a state, on average."""
        at_S, total_S, probs_SV = self.start_S, torch.zeros_like(self.start_S), policy_SV.exp()
        for _ in range(self.horizon):
            total_S = total_S + at_S
            at_S = torch.zeros_like(at_S).index_add(0, self.next_SV.flatten(), (at_S[:, None] * probs_SV).flatten())
        return total_S

    def rollouts(self, policy_SV: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample (B, H) states, and the tokens that were drawn there."""
        probs_SV = policy_SV.exp()
        at_B = self.start_S.multinomial(count, replacement=True, generator=generator)
        states, tokens = [], []
        for _ in range(self.horizon):
            token_B = probs_SV[at_B].multinomial(1, generator=generator)[:, 0]
            states.append(at_B)
            tokens.append(token_B)
            at_B = self.next_SV[at_B, token_B]
        return torch.stack(states, 1), torch.stack(tokens, 1)


def mixing(vocabulary: int = 48) -> World:
    """Make a world whose state is the last token."""
    tokens_V = torch.arange(vocabulary)
    return World("mixing", tokens_V.expand(vocabulary, -1), torch.full((vocabulary,), 1 / vocabulary, dtype=torch.float64))


def modes(vocabulary: int = 16, count: int = 4) -> World:
    """Make a world of a root and several modes; the first token decides the mode, and in a mode the state is the last token."""
    tokens_V = torch.arange(vocabulary)
    inside_MVV = 1 + torch.arange(count)[:, None, None] * vocabulary + tokens_V.expand(vocabulary, -1)
    root_V = inside_MVV[tokens_V % count, 0, tokens_V]
    next_SV = torch.cat([root_V[None], inside_MVV.flatten(0, 1)])
    return World("modes", next_SV, torch.eye(len(next_SV), dtype=torch.float64)[0])


@frozen(eq=False)
class Models:
    """(S, V) log-probs of the policy that sampled, of the teacher, and of the student as it is now."""

    policy: Tensor
    teacher: Tensor
    student: Tensor


def make_models(world: World, seed: int, drift: float) -> Models:
    """Make a policy, a teacher, and a student that has moved from the policy, half of it towards the teacher.

    The moves are the same at every drift.
    """
    generator = torch.Generator().manual_seed(seed)
    policy_SV, to_teacher_SV, elsewhere_SV = torch.randn(3, *world.next_SV.shape, generator=generator, dtype=torch.float64)
    policy_SV = 2.5 * policy_SV
    student_SV = policy_SV + drift * (to_teacher_SV + elsewhere_SV) / 2**0.5
    return Models(*(table.log_softmax(-1) for table in (policy_SV, policy_SV + 1.5 * to_teacher_SV, student_SV)))


def exact(world: World, models: Models, visitor_SV: Tensor) -> Tensor:
    """Return (V, S) the gradient of the reverse KL at every state, weighted by how often rollouts of the visitor are there."""
    table_SV = models.student.clone().requires_grad_()
    student_SV = table_SV.log_softmax(-1)
    kl_S = (student_SV.exp() * (student_SV - models.teacher)).sum(-1)
    (gradient_SV,) = torch.autograd.grad((world.visits(visitor_SV) * kl_S).sum(), table_SV)
    return gradient_SV.T


def batch_of(models: Models, estimator: Estimator, states_BH: Tensor, tokens_BH: Tensor, drawn_ND: Tensor) -> Batch:
    """Make the batch that a store would give; every token of a rollout counts 1, and a rollout its share."""
    count, horizon = states_BH.shape
    state_N, target_N = states_BH.flatten(), tokens_BH.flatten()
    policy_NV, teacher_NV = models.policy[state_N], models.teacher[state_N]
    sampled = {
        "teacher_logprobs": teacher_NV.gather(-1, target_N[:, None])[:, 0],
        "ref_logprobs": policy_NV.gather(-1, target_N[:, None])[:, 0],
    }
    support, drawn_ND = estimator.support, drawn_ND[:, : estimator.support.drawn]
    columns = {name: table_SK[state_N] for name, table_SK in support.columns(models.policy, models.teacher).items()}
    if support.drawn:
        columns["drawn_ids"] = drawn_ND
        columns |= {"drawn_logprobs": teacher_NV.gather(-1, drawn_ND), "drawn_ref_logprobs": policy_NV.gather(-1, drawn_ND)}
    return Batch(
        inputs=state_N,
        targets=target_N,
        position_ids=torch.arange(horizon).repeat(count),
        segment_ids=torch.arange(count).repeat_interleave(horizon),
        weight=torch.full(state_N.shape, 1 / count, dtype=torch.float64),
        **sampled,
        **columns,
    )


def gradient(models: Models, estimator: Estimator, batch: Batch) -> Tensor:
    """Return (V, S) the gradient of the fused loss."""
    hidden_NS = torch.eye(len(models.student), dtype=torch.float64)[batch.inputs]
    weight_VS = models.student.T.clone().requires_grad_()
    FusedLoss(estimator.objective)(hidden_NS, LMHead(weight_VS), batch).loss_sum.backward()
    assert weight_VS.grad is not None  # noqa: S101
    return weight_VS.grad


def found(gradients: Sequence[Tensor], truth_VS: Tensor) -> dict[str, float]:
    r"""Return bias, spread and root mean square error of these gradients, relative to the norm of the truth.

    With d the differences from the truth, the squared bias is the mean product of d of *two* batches: without the noise of one, which would
    add up.  `bias_z` is that mean over its standard deviation where the bias is 0.
    """
    gaps_GP = torch.stack([(gradient_VS - truth_VS).flatten() for gradient_VS in gradients]) / truth_VS.norm()
    products_GG = gaps_GP @ gaps_GP.T
    count = len(gaps_GP)
    pairs = products_GG[~torch.eye(count, dtype=torch.bool)]
    bias2, noise = float(pairs.mean()), float((2 * (pairs**2).mean() / (count * (count - 1))).sqrt())
    variance = float(products_GG.diagonal().mean()) - bias2
    return {
        "bias": max(bias2, 0.0) ** 0.5,
        "bias_z": bias2 / noise if noise else 0.0,
        "bias_noise": noise**0.5,
        "sd": variance**0.5,
        "rmse": (max(bias2, 0.0) + variance) ** 0.5,
    }


def judge(
    world: World, estimators: Sequence[Estimator], drift: float, seed: int, *, batches: int, rollouts: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each estimator, in this world at this drift; all share rollouts and drawn ids, except those that sample fresh ones."""
    models = make_models(world, seed, drift)
    truth_VS, on_stored_VS = (exact(world, models, visitor) for visitor in (models.student, models.policy))
    generator = torch.Generator().manual_seed(seed)
    widest = max(estimator.support.drawn for estimator in estimators)
    made: dict[str, list[Tensor]] = {estimator.name: [] for estimator in estimators}
    for _ in range(batches):
        stored, fresh = (world.rollouts(sampler, rollouts, generator) for sampler in (models.policy, models.student))
        drawn_ND = models.policy.exp()[stored[0].flatten()].multinomial(widest or 1, replacement=True, generator=generator)
        for estimator in estimators:
            batch = batch_of(models, estimator, *(fresh if estimator.fresh else stored), drawn_ND)
            made[estimator.name].append(gradient(models, estimator, batch))
    kl = (models.policy.exp() * (models.policy - models.student)).sum(-1)
    visits_S = world.visits(models.policy)
    where = {"kind": "world", "world": world.name, "seed": seed, "drift": drift, "kl": float(visits_S @ kl / visits_S.sum())}
    for estimator in estimators:
        online = found(made[estimator.name], truth_VS)
        stored_only = found(made[estimator.name], truth_VS if estimator.fresh else on_stored_VS)
        on_stored = {f"stored_{name}": stored_only[name] for name in ("bias", "bias_z", "bias_noise")}
        yield {**where, **estimator.describe(), **online, **on_stored}
