r"""Estimators at states of real rollouts, over a vocabulary of tens of thousands, beside the exact reverse KL at these states.

The student's log-probs at a state are known for the whole vocabulary, so the expected gradient of an estimator is a sum over the token that was
sampled: every token of the vocabulary is taken once, with its probability under the policy.  Drawn ids are drawn, many times.
lopd's objective gives the derivative by the log-probs it asked for; that by the logits is \(\mathrm{scatter}(S, f') - (\sum f')\,\mathrm{softmax}\),
as in the fused loss, which `check_fused` compares.

What is judged is the gradient by the weight of the head, the mean over states of \(g_s h_s^\top\): all states share it, so noise averages out
over tokens, and bias does not.  What states share is a small part of what each has: it takes a thousand of them to measure it.

Shape suffixes: S states, V vocabulary, D hidden size, M sampled tokens or repetitions at one state, K ids.
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

#: Sampled tokens that are looked at together.
ROWS = 8192


@frozen(eq=False)
class States:
    """A student at states that its policy visited.

    Args:
        policy: (S, V) log-probs of the policy that sampled.
        teacher: (S, V) of the teacher.
        student: (S, V) of the student as it is now.
        hidden: (S, D) the student's hidden states.
        head: the student's.
        sampled: (S,) int64, the tokens that the policy sampled there.
        float16: whether stored log-probs and tails were rounded to it.
    """

    policy: Tensor
    teacher: Tensor
    student: Tensor
    hidden: Tensor
    head: LMHead
    sampled: Tensor
    float16: bool = False

    def some(self, count: int) -> "States":
        """So many of them, evenly spread."""
        rows = torch.linspace(0, len(self.sampled) - 1, min(count, len(self.sampled))).long()
        tables = {name: getattr(self, name)[rows] for name in ("policy", "teacher", "student", "hidden", "sampled")}
        return evolve(self, **tables)

    def columns(self, estimator: Estimator, state: int | slice, targets_M: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The columns of a batch whose tokens are at one state, or one at each."""
        place = slice(state, state + 1) if isinstance(state, int) else state
        policy_RV, teacher_RV = (table.expand(len(targets_M), -1) for table in (self.policy[place], self.teacher[place]))
        sampled = {
            "weight": torch.ones(len(targets_M)),
            "teacher_logprobs": teacher_RV.gather(-1, targets_M[:, None])[:, 0],
            "ref_logprobs": policy_RV.gather(-1, targets_M[:, None])[:, 0],
        }
        found = estimator.support.columns(self.policy[place], self.teacher[place])
        columns = {name: column.expand(len(targets_M), *column.shape[1:]) for name, column in found.items()}
        if estimator.support.drawn:
            drawn_MD = (
                self.policy[place]
                .exp()
                .multinomial(estimator.support.drawn * (len(targets_M) // len(self.policy[place])), replacement=True, generator=generator)
            )
            drawn_MD = drawn_MD.view(len(targets_M), estimator.support.drawn)
            columns["drawn_ids"] = drawn_MD
            columns |= {"drawn_logprobs": teacher_RV.gather(-1, drawn_MD), "drawn_ref_logprobs": policy_RV.gather(-1, drawn_MD)}
        columns |= sampled
        if self.float16:
            columns = {name: column.half().float() if column.is_floating_point() else column for name, column in columns.items()}
        return columns


def random_states(states: int, vocabulary: int, size: int, seed: int = 0, drift: float = 0.3) -> States:
    """Of no model: to try things out."""
    generator = torch.Generator().manual_seed(seed)
    hidden_SD = torch.randn(states, size, generator=generator)
    weight_VD = 2 * torch.randn(vocabulary, size, generator=generator) / size**0.5
    tables = [weight_VD + move * torch.randn(vocabulary, size, generator=generator) / size**0.5 for move in (drift, 1.0, 0.0)]
    policy_SV, teacher_SV, student_SV = (LMHead(table).logits(hidden_SD).log_softmax(-1) for table in tables)
    sampled_S = policy_SV.exp().multinomial(1, generator=generator)[:, 0]
    return States(policy_SV, teacher_SV, student_SV, hidden_SD, LMHead(weight_VD), sampled_S)


def exact(states: States) -> Tensor:
    """(S, V) the gradient of the reverse KL by the logits."""
    gaps_SV = states.student - states.teacher
    probs_SV = states.student.exp()
    return probs_SV * (gaps_SV - (probs_SV * gaps_SV).sum(-1, keepdim=True))


@frozen(eq=False)
class Moments:
    """Of the gradient by the logits at each state, over what was sampled and drawn there.

    Args:
        means: two (S, V), over disjoint draws; the same one twice where they are exact.
        squares: (S,) the mean squared norm.
    """

    means: tuple[Tensor, Tensor]
    squares: Tensor


def derivatives(estimator: Estimator, student_V: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(M, K) ids, and the derivatives of the objective by their log-probs."""
    ids_MK = estimator.objective.ids(tokens)
    leaf_MK = student_V[ids_MK].requires_grad_()
    (gradient_MK,) = torch.autograd.grad(estimator.objective(leaf_MK, tokens).loss.sum(), leaf_MK)
    return ids_MK, gradient_MK


def enumerated(states: States, estimator: Estimator) -> Moments:
    """Exact: every token as the one that was sampled."""
    count, vocabulary = states.student.shape
    mean_SV, squares_S = torch.zeros(count, vocabulary), torch.zeros(count)
    # where the sampled token plays no part, any is every one
    every_V = torch.arange(vocabulary if estimator.sampled else 1)
    unused = torch.Generator()
    for state in range(count):
        student_V, policy_V = states.student[state], states.policy[state].exp() if estimator.sampled else torch.ones(1)
        probs_V, total = student_V.exp(), 0.0
        for targets_M in every_V.split(ROWS):
            columns = states.columns(estimator, state, targets_M, unused)
            ids_MK, gradient_MK = derivatives(estimator, student_V, as_tokens(targets_M, columns))
            weight_M, sums_M = policy_V[targets_M], gradient_MK.sum(-1)
            mean_SV[state].index_add_(0, ids_MK.flatten(), (weight_M[:, None] * gradient_MK).flatten())
            total += float(weight_M @ sums_M)
            # |scatter - sum p|^2; only the sampled token, the first id, may be another one's equal
            same_MK = ids_MK[:, 1:] == ids_MK[:, :1]
            scattered_M = (gradient_MK**2).sum(-1) + 2 * gradient_MK[:, 0] * (same_MK * gradient_MK[:, 1:]).sum(-1)
            crossed_M = (gradient_MK * probs_V[ids_MK]).sum(-1)
            squares_S[state] += weight_M @ (scattered_M - 2 * sums_M * crossed_M + sums_M**2 * (probs_V @ probs_V))
        mean_SV[state] -= total * probs_V
    return Moments((mean_SV, mean_SV), squares_S)


def drawn(states: States, estimator: Estimator, repetitions: int, generator: torch.Generator) -> Moments:
    """Of so many repetitions at each state, half of them for either mean."""
    count, vocabulary = states.student.shape
    means, squares_S = [torch.zeros(count, vocabulary) for _ in range(2)], torch.zeros(count)
    for state in range(count):
        student_V = states.student[state]
        targets_M = states.policy[state].exp().multinomial(repetitions, replacement=True, generator=generator)
        columns = states.columns(estimator, state, targets_M, generator)
        ids_MK, gradient_MK = derivatives(estimator, student_V, as_tokens(targets_M, columns))
        dense_MV = torch.zeros(repetitions, vocabulary).scatter_add_(-1, ids_MK, gradient_MK)
        dense_MV -= gradient_MK.sum(-1, keepdim=True) * student_V.exp()
        squares_S[state] = (dense_MV**2).sum(-1).mean()
        for mean_SV, part_MV in zip(means, dense_MV.chunk(2), strict=True):
            mean_SV[state] = part_MV.mean(0)
    return Moments((means[0], means[1]), squares_S)


def as_tokens(targets_M: Tensor, columns: dict[str, Tensor]) -> Tokens:
    """All of them count, each a rollout of its own."""
    return Tokens.counted(as_batch(targets_M, columns))


def as_batch(targets_M: Tensor, columns: dict[str, Tensor]) -> Batch:
    """One token of each rollout."""
    return Batch(targets_M, targets_M, torch.zeros_like(targets_M), torch.arange(len(targets_M)), **columns)


@frozen(eq=False)
class Judge:
    """Holds estimators to the exact gradient at these states.

    Args:
        states: where those with a bias are judged.
        held: of these, where those that claim to have none are held to it, state by state: every sampled token is taken at each.
        step_tokens: of a step.
        repetitions: at each state, of what is drawn.
    """

    states: States
    held: int
    step_tokens: int
    repetitions: int
    norm2: float = field(init=False)
    size: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        truth_SV, hidden_SS = exact(self.states), self.states.hidden @ self.states.hidden.T
        object.__setattr__(self, "norm2", between(truth_SV @ truth_SV.T * hidden_SS))
        object.__setattr__(self, "size", mean_size(truth_SV, self.states))

    def judge(self, estimator: Estimator, generator: torch.Generator) -> dict[str, float]:
        """Bias, spread and root mean square error of a step, relative to the norm of the exact gradient.

        Sums over states leave out products of a state with itself, which would count the variety of states as bias; what they hold is noise of
        a step.  `state_bias` is the root mean square over states of the bias at each, relative to the same of the exact gradient; `bias_z` the
        squared bias over its standard deviation where the bias is 0, of what was drawn; `variance` that of one token.
        """
        states = self.states.some(self.held) if estimator.unbiased else self.states
        truth_SV, random = exact(states), estimator.support.drawn > 0
        moments = drawn(states, estimator, self.repetitions, generator) if random else enumerated(states, estimator)
        first_SV, second_SV = (mean_SV - truth_SV for mean_SV in moments.means)
        products_SS = first_SV @ second_SV.T * (states.hidden @ states.hidden.T)
        bias2, noise = between(products_SS) / self.norm2, between(products_SS**2) ** 0.5 / len(truth_SV) / self.norm2
        mean_SV = (moments.means[0] + moments.means[1]) / 2
        # the mean squared distance of one gradient from the truth, over the mean square of that: so few states may all be large ones
        apart_S = moments.squares - 2 * (mean_SV * truth_SV).sum(-1) + (truth_SV**2).sum(-1)
        apart = float((apart_S * (states.hidden**2).sum(-1)).mean()) / mean_size(truth_SV, states) * self.size / self.norm2
        variance = max(apart - bias2, 0.0)
        return {
            "bias": max(bias2, 0.0) ** 0.5,
            "bias_z": bias2 / noise if random else 0.0,
            "bias_noise": noise**0.5 if random else 0.0,
            "state_bias": max(float((first_SV * second_SV).sum() / (truth_SV**2).sum()), 0.0) ** 0.5,
            "variance": variance,
            "sd": (variance / self.step_tokens) ** 0.5,
            "rmse": max(bias2 + variance / self.step_tokens, 0.0) ** 0.5,
        }


def mean_size(gradient_SV: Tensor, states: States) -> float:
    """The mean over states of the squared norm of the gradient by the weight."""
    return float(((gradient_SV**2).sum(-1) * (states.hidden**2).sum(-1)).mean())


def between(products_SS: Tensor) -> float:
    """The mean over pairs of two different states."""
    count, products_SS = len(products_SS), products_SS.double()
    return float(products_SS.sum() - products_SS.diagonal().sum()) / (count * (count - 1))


def check_fused(states: States, estimator: Estimator, generator: torch.Generator) -> float:
    """How far the fused loss is from what is judged, on the tokens that were sampled: relative difference of the gradient by the weight."""
    columns = states.columns(estimator, slice(None), states.sampled, generator)
    batch = as_batch(states.sampled, columns)
    tokens, weight_VD = Tokens.counted(batch), states.head.weight.clone().requires_grad_()
    FusedLoss(estimator.objective)(states.hidden, evolve(states.head, weight=weight_VD), batch).loss_sum.backward()
    ids_SK = estimator.objective.ids(tokens)
    leaf_SK = states.student.gather(-1, ids_SK).requires_grad_()
    (gradient_SK,) = torch.autograd.grad(estimator.objective(leaf_SK, tokens).loss.sum(), leaf_SK)
    dense_SV = -gradient_SK.sum(-1, keepdim=True) * states.student.exp()
    expected_VD = dense_SV.scatter_add_(-1, ids_SK, gradient_SK).T @ states.hidden
    assert weight_VD.grad is not None  # noqa: S101
    return float((weight_VD.grad - expected_VD).norm() / expected_VD.norm())


def prepare(folder: Path) -> None:
    """A finished part of the quickstart in this folder, with fewer rollouts: teacher, SFT student, its rollouts and scores, and OPD."""
    import quickstart
    from phases import Run

    settings, run, store = quickstart.Settings(opd_prompts=64), Run(folder), str(folder / "store.zarr")
    teacher_dir, student_dir, _ = quickstart.prepare(run, settings)
    sft_prompts, opd_prompts, _ = quickstart.split_prompts(settings, teacher_dir)
    run.phase("teacher writes SFT text", lambda: quickstart.sample_once(teacher_dir, sft_prompts, str(folder / "sft.zarr"), settings))
    run.phase("SFT", lambda: quickstart.sft(run, student_dir, settings))
    run.phase("student rollouts", lambda: quickstart.sample_once(folder / "sft", opd_prompts, store, settings))
    run.phase("teacher scores", lambda: quickstart.score_once(teacher_dir, store, settings))
    run.phase("Lightning OPD", lambda: quickstart.lightning_opd(run, store, settings))


def real_states(folder: Path, count: int, moves: Sequence[float]) -> Iterator[tuple[float, States]]:
    """SmolLM2's: students on the straight line from the SFT student to that after OPD, 0 being the former and 1 the latter."""
    from lopd.engines.hf import load_model

    micro = batches(ZarrStore.open(folder / "store.zarr"), rollouts_per_step=32, tokens_per_batch=1024, ref="behavior").step(0).batches
    total = sum(int((batch.weight > 0).sum()) for batch in micro)
    chosen_S = torch.linspace(0, total - 1, count).long()
    sampled_S = torch.cat([batch.targets[batch.weight > 0] for batch in micro])[chosen_S]

    def read(model: Any, vocabulary: int) -> tuple[Tensor, LMHead, Tensor]:
        with torch.no_grad():
            hidden = [packed_hidden_states(model, batch.inputs, batch.position_ids)[batch.weight > 0] for batch in micro]
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
        yield move, States(policy_SV, teacher_SV, student_SV, hidden_SD, head, sampled_S)
