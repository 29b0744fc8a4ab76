r"""Estimators at states of real rollouts, over a vocabulary of tens of thousands, beside the exact reverse KL at these states.

Sampled tokens and drawn ids are drawn, many times at each state.  lopd's objective gives the derivative by the log-probs it asked for; that by the
logits is \(g = \mathrm{scatter}(S, f') - (\sum f')\,\mathrm{softmax}\), as in the fused loss, which `check_fused` compares.  What is judged is the
gradient by a matrix in front of the head, the mean over states of \(W^\top g_s h_s^\top\): it stands for the layers below, which see g through the
head's weight W.  All states share it, so noise averages out over tokens, and bias does not.  What states share is a small part of what each has:
it takes hundreds of them to measure it.

That an estimator has no bias is not left to draws: at some states every token of the vocabulary is taken as the sampled one, with its probability.

Shape suffixes: S states, V vocabulary, D hidden size, M sampled tokens at one state, K ids.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from estimators import Estimator
from torch import Tensor

from lopd import FusedLoss, ZarrStore, batches
from lopd.engines.causal_lm import lm_head, packed_hidden_states
from lopd.losses.tokens import Tokens
from lopd.records import Batch, LMHead

#: Sampled tokens that are looked at together where all are.
ROWS = 8192


@frozen(eq=False)
class States:
    """A student at states that its policy visited.

    Args:
        policy: (S, V) log-probs of the policy that sampled.
        teacher: (S, V) of the teacher.
        student: (S, V) of the student as it is now.
        hidden: (S, D) the student's hidden states.
        mean_rows: (S, D) the mean row of the head's weight under the student.
        head: the student's, without bias, cap and scale.
        sampled: (S,) int64, the tokens that the policy sampled there.
        float16: whether stored log-probs and tails were rounded to it.
    """

    policy: Tensor
    teacher: Tensor
    student: Tensor
    hidden: Tensor
    mean_rows: Tensor
    head: LMHead
    sampled: Tensor
    float16: bool = False

    def rows(self, rows: Tensor | slice) -> "States":
        """Return some of the states."""
        tables = {name: getattr(self, name)[rows] for name in ("policy", "teacher", "student", "hidden", "mean_rows", "sampled")}
        return evolve(self, **tables)

    def some(self, count: int) -> "States":
        """Return so many of the states, evenly spread."""
        return self.rows(torch.linspace(0, len(self.sampled) - 1, min(count, len(self.sampled))).long())

    def columns(self, support: dict[str, Tensor], targets_R: Tensor, drawn_RD: Tensor) -> dict[str, Tensor]:
        """Return the columns of a batch with one token at each state, or several at the only one."""
        policy_RV, teacher_RV = (table.expand(len(targets_R), -1) for table in (self.policy, self.teacher))
        columns = {name: column.expand(len(targets_R), *column.shape[1:]) for name, column in support.items()}
        columns["weight"] = torch.ones(len(targets_R))
        columns["teacher_logprobs"] = teacher_RV.gather(-1, targets_R[:, None])[:, 0]
        columns["ref_logprobs"] = policy_RV.gather(-1, targets_R[:, None])[:, 0]
        if drawn_RD.shape[1]:
            drawn = {"drawn_logprobs": teacher_RV.gather(-1, drawn_RD), "drawn_ref_logprobs": policy_RV.gather(-1, drawn_RD)}
            columns |= {"drawn_ids": drawn_RD, **drawn}
        if self.float16:
            columns = {name: column.half().float() if column.is_floating_point() else column for name, column in columns.items()}
        return columns

    def draws(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (S, count) ids from the policy."""
        return self.policy.exp().multinomial(count, replacement=True, generator=generator)

    def batch(self, estimator: Estimator, generator: torch.Generator) -> Batch:
        """Return a batch of the sampled tokens, each a rollout of its own."""
        drawn_SD = self.draws(estimator.support.drawn + 1, generator)[:, 1:]
        return as_batch(self.sampled, self.columns(estimator.support.columns(self.policy, self.teacher), self.sampled, drawn_SD))


def random_states(states: int, vocabulary: int, size: int, seed: int = 0, drift: float = 0.3) -> States:
    """Make states at random, without a model: to try things out."""
    generator = torch.Generator().manual_seed(seed)
    hidden_SD = torch.randn(states, size, generator=generator)
    weight_VD = 2 * torch.randn(vocabulary, size, generator=generator) / size**0.5
    tables = [weight_VD + move * torch.randn(vocabulary, size, generator=generator) / size**0.5 for move in (drift, 1.0, 0.0)]
    policy_SV, teacher_SV, student_SV = (LMHead(table).logits(hidden_SD).log_softmax(-1) for table in tables)
    sampled_S = policy_SV.exp().multinomial(1, generator=generator)[:, 0]
    return States(policy_SV, teacher_SV, student_SV, hidden_SD, student_SV.exp() @ weight_VD, LMHead(weight_VD), sampled_S)


def exact(states: States) -> Tensor:
    """Return (S, V) the gradient of the reverse KL by the logits."""
    gaps_SV = states.student - states.teacher
    probs_SV = states.student.exp()
    return probs_SV * (gaps_SV - (probs_SV * gaps_SV).sum(-1, keepdim=True))


def derivatives(estimator: Estimator, student_RV: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return (R, K) ids, and the derivatives of the objective by their log-probs; one row of log-probs serves all, or each has its own."""
    ids_RK = estimator.objective.ids(tokens)
    leaf_RK = student_RV.expand(len(ids_RK), -1).gather(-1, ids_RK).requires_grad_()
    (gradient_RK,) = torch.autograd.grad(estimator.objective(leaf_RK, tokens).loss.sum(), leaf_RK)
    return ids_RK, gradient_RK


def gradient(states: States, estimator: Estimator, batch: Batch) -> Tensor:
    """Return (S, D) the gradient by the hidden states, for a sampled token at each."""
    ids_SK, gradient_SK = derivatives(estimator, states.student, Tokens.counted(batch))
    rows_SD = torch.einsum("sk,skd->sd", gradient_SK, states.head.weight[ids_SK])
    return rows_SD - gradient_SK.sum(-1, keepdim=True) * states.mean_rows


def bias_by_logits(states: States, estimator: Estimator) -> float:
    """Compute the bias exactly, with every token as the sampled one.

    It is a root mean square over states, relative to that of the exact gradient by the logits.
    """
    count, vocabulary = states.student.shape
    mean_SV = torch.zeros(count, vocabulary)
    for state in range(count):
        at = states.rows(slice(state, state + 1))
        student_V, policy_V, total = at.student[0], at.policy[0].exp(), 0.0
        support = estimator.support.columns(at.policy, at.teacher)
        for targets_M in torch.arange(vocabulary).split(ROWS):
            columns = at.columns(support, targets_M, targets_M[:, None][:, :0])
            ids_MK, gradient_MK = derivatives(estimator, student_V, Tokens.counted(as_batch(targets_M, columns)))
            weighted_MK = policy_V[targets_M, None] * gradient_MK
            mean_SV[state].index_add_(0, ids_MK.flatten(), weighted_MK.flatten())
            total += float(weighted_MK.sum())
        mean_SV[state] -= total * student_V.exp()
    truth_SV = exact(states)
    return float((mean_SV - truth_SV).norm() / truth_SV.norm())


def as_batch(targets_M: Tensor, columns: dict[str, Tensor]) -> Batch:
    """Make a batch of rollouts with one token each."""
    return Batch(targets_M, targets_M, torch.zeros_like(targets_M), torch.arange(len(targets_M)), **columns)


@frozen(eq=False)
class Judge:
    """Holds estimators to the exact gradient at these states.

    Args:
        states: where.
        step_tokens: tokens of a step.
        repetitions: at each state, of what is sampled and drawn; even.
    """

    states: States
    step_tokens: int
    repetitions: int
    truth: Tensor = field(init=False)
    hidden: Tensor = field(init=False)
    norm2: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        truth_SD = exact(self.states) @ self.states.head.weight
        hidden_SS = self.states.hidden @ self.states.hidden.T
        for name, value in (("truth", truth_SD), ("hidden", hidden_SS), ("norm2", between(truth_SD @ truth_SD.T * hidden_SS))):
            object.__setattr__(self, name, value)

    def judge(self, estimator: Estimator, generator: torch.Generator, *, float16: bool = False) -> dict[str, float]:
        """Measure bias, spread and root mean square error of a step, relative to the norm of the exact gradient.

        Sums over states leave out products of a state with itself, which would count the variety of states as bias; what they hold is noise of
        a step.  Squared bias is a product over two halves of the repetitions, and `bias_z` is it over its standard deviation where the bias is
        0.  `state_bias` is the root mean square over states of the bias at each; `variance` that of one token.
        """
        states = evolve(self.states, float16=float16)
        random = estimator.sampled or estimator.support.drawn > 0
        halves = [torch.zeros_like(self.truth) for _ in range(2)]
        squares_S, rounds = torch.zeros(len(self.truth)), self.repetitions if random else 2
        support, each = estimator.support.columns(states.policy, states.teacher), 1 + estimator.support.drawn
        for repeat, draws_SR in enumerate(states.draws(rounds * each, generator).split(each, dim=1)):
            columns = states.columns(support, draws_SR[:, 0], draws_SR[:, 1:])
            apart_SD = gradient(states, estimator, as_batch(draws_SR[:, 0], columns)) - self.truth
            halves[repeat % 2] += apart_SD * (2 / rounds)
            squares_S += (apart_SD**2).sum(-1) / rounds
        products_SS = halves[0] @ halves[1].T * self.hidden
        bias2, noise = between(products_SS) / self.norm2, between(products_SS**2) ** 0.5 / len(self.truth) / self.norm2
        variance = max(float((squares_S * self.hidden.diagonal()).mean()) / self.norm2 - bias2, 0.0)
        return {
            "bias": max(bias2, 0.0) ** 0.5,
            "bias_z": bias2 / noise,
            "bias_noise": noise**0.5,
            "state_bias": max(float((halves[0] * halves[1]).sum() / (self.truth**2).sum()), 0.0) ** 0.5,
            "variance": variance,
            "sd": (variance / self.step_tokens) ** 0.5,
            "rmse": max(bias2 + variance / self.step_tokens, 0.0) ** 0.5,
        }


def between(products_SS: Tensor) -> float:
    """Return the mean over pairs of two different states."""
    count, products_SS = len(products_SS), products_SS.double()
    return float(products_SS.sum() - products_SS.diagonal().sum()) / (count * (count - 1))


def check_fused(states: States, estimator: Estimator, generator: torch.Generator) -> float:
    """Return how far the fused loss is from what is judged, on the sampled tokens.

    That is the relative difference of the gradient by the hidden states.
    """
    batch, hidden_SD = states.batch(estimator, generator), states.hidden.clone().requires_grad_()
    FusedLoss(estimator.objective)(hidden_SD, states.head, batch).loss_sum.backward()
    expected_SD = gradient(states, estimator, batch)
    assert hidden_SD.grad is not None  # noqa: S101
    return float((hidden_SD.grad - expected_SD).norm() / expected_SD.norm())


def prepare(folder: Path) -> None:
    """Run a part of the quickstart in this folder, with fewer rollouts: teacher, SFT student, its rollouts and scores, and OPD."""
    import quickstart

    from lopd.tools.phases import Run

    settings, run, store = quickstart.Settings(opd_prompts=64), Run(folder), str(folder / "store.zarr")
    teacher_dir, student_dir, _ = quickstart.prepare(run, settings)
    sft_prompts, opd_prompts, _ = quickstart.split_prompts(settings, teacher_dir)
    run.phase("teacher writes SFT text", lambda: quickstart.sample_once(teacher_dir, sft_prompts, str(folder / "sft.zarr"), settings))
    run.phase("SFT", lambda: quickstart.sft(run, student_dir, settings))
    run.phase("student rollouts", lambda: quickstart.sample_once(folder / "sft", opd_prompts, store, settings))
    run.phase("teacher scores", lambda: quickstart.score_once(teacher_dir, store, settings))
    run.phase("Lightning OPD", lambda: quickstart.lightning_opd(run, store, settings))


def real_states(folder: Path, count: int, moves: Sequence[float]) -> Iterator[tuple[float, States]]:
    """Yield SmolLM2's states: students on the straight line from the SFT student (0) to the student after OPD (1)."""
    from lopd.engines.hf import load_model

    micro = batches(ZarrStore.open(folder / "store.zarr"), rollouts_per_step=32, tokens_per_batch=1024, ref="behavior").step(0).batches
    total = sum(len(batch.counted) for batch in micro)
    chosen_S = torch.linspace(0, total - 1, count).long()
    sampled_S = torch.cat([batch.targets[batch.counted] for batch in micro])[chosen_S]

    def read(model: Any, vocabulary: int) -> tuple[Tensor, LMHead, Tensor]:
        with torch.no_grad():
            hidden = [packed_hidden_states(model, batch.inputs, batch.position_ids, batch.lengths)[batch.counted] for batch in micro]
            hidden_SD, head = torch.cat(hidden)[chosen_S], lm_head(model, vocabulary)
            return hidden_SD, evolve(head, weight=head.weight.detach()), head.logits(hidden_SD).log_softmax(-1)

    teacher, tokenizer = load_model(folder / "models" / "teacher", torch.float32)
    teacher_SV = read(teacher, len(tokenizer))[2]
    student, _ = load_model(folder / "sft", torch.float32)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    end = load_model(folder / "opd", torch.float32)[0].state_dict()
    policy_SV = read(student, len(tokenizer))[2]
    for move in moves:
        student.load_state_dict({name: torch.lerp(value, end[name], move) for name, value in start.items()})
        hidden_SD, head, student_SV = read(student, len(tokenizer))
        yield move, States(policy_SV, teacher_SV, student_SV, hidden_SD, student_SV.exp() @ head.weight, head, sampled_S)
