"""VERB `opd_steps`: the one training loop.  SFT, Lightning OPD and online OPD differ only in what is wired into it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from time import perf_counter

import torch
from attrs import evolve
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from lopd.errors import ArgumentError, InvalidRecordError, TrainingDivergedError
from lopd.guards.consistency import check_vocabulary
from lopd.guards.first_step import FirstSteps, judge_optimizer
from lopd.protocols import OPDLoss, Student
from lopd.protocols.doors import check_noun
from lopd.records.checks import a_kind, check_kind, check_number, to_real
from lopd.records.drift import TokenLogprobs, measure_step
from lopd.records.identity import TokenizerId
from lopd.records.ranks import Ranks, bare, check_summed, gathering, inner, summing, whole
from lopd.records.steps import Batch, LossOutput, Step, StepMetrics
from lopd.verbs.parameters import trained_parameters


def opd_steps(
    student: Student | DistributedDataParallel,
    steps: Iterable[Step],
    loss: OPDLoss,
    optimizer: Optimizer,
    *,
    max_grad_norm: float | None = 1.0,
) -> Iterator[StepMetrics]:
    """Train, one optimizer step for each `Step`, and give its metrics after it.

    An iterator: logging, evaluation, checkpoints and schedules are plain Python in the caller's loop.  The weight of the whole step is
    known before the first backward and divides every micro-batch's sum, so how a step is split changes nothing.

    Steps that bring a ref column beside the teacher's (`batches(..., ref="behavior")`) have their drift measured: see `lopd.watch_drift`.

    Several processes train together once torch.distributed is initialised: put the student in `DistributedDataParallel` first, or call
    `fully_shard` on each layer and then on it.  `batches` gives each rank its share of a step; weights, gradients and metrics are those of one
    process on all of it, up to rounding.  Ranks meet once more at the end of their steps: leave the loop on all alike, or the others wait there.

    On a GPU nothing waits between the first forward of a step and the end of its last backward: what is reported of a step comes to the host
    there, in one copy, before the optimizer's step, as a gradient that is not finite must not reach the weights.  The guards of the first steps
    ask more.  Gradients stay until the next step; `optimizer.zero_grad()` frees them before.

    Args:
        student: its trained parameters are those that require a gradient.
        steps: from `batches`, or any others.
        loss: what a micro-batch costs.
        optimizer: over the student's parameters.
        max_grad_norm: gradients are scaled down to this norm, more than 0; None leaves them.

    Warns:
        SamplerWarning: the rollouts were drawn at another temperature or top-p than 1, and the loss states that it has no importance ratio.
        TrainingWarning: the optimizer lacks trained parameters, or has others than the student's on several ranks; or in the first step some get no
            gradient, or most weights stay where they are, because updates are smaller than their rounding; or the loss has a baseline that the
            weights `by_rollout` make biased, or reads no labels though the steps bring them.
        EndTokenWarning: most responses of a first step without scores end with a token at which the student will not stop.
        AdvantageWarning: in the first step the student is far from its teacher; or the second has many advantages far below 0, and the loss states
            that it has no importance ratio (`lopd.guards.watch`).
        DriftWarning: in step 0 few rollouts are effective, or the student's log-probs are far from the policy's: the student is not the policy that
            sampled.

    Raises:
        ArgumentError: student, its tokenizer, steps, loss or optimizer are something else, such as a model that is not in a student; the step of the
            optimizer needs an argument, or its state is on another device; raised by the call itself.
        TokenizerMismatchError: a step states that its ids are of another vocabulary than the student's; the weights are those of the step before.
        TrainingDivergedError: a gradient is not finite; the weights are those of the step before.
        InvalidRecordError: no token of a step counts, the optimizer has none of the student's trained parameters, ranks have shares of different
            steps, the same share, more steps, or other numbers of micro-batches than they can meet in; the loss gave another thing than the
            `LossOutput` of a batch, or `max_grad_norm` makes no sense.
        ModelError: there are several ranks, and nothing sums the gradients of the student; or it is wrapped so that torch would lose them, as
            DistributedDataParallel does where a trained parameter gets none in the first step.
    """
    ranks = Ranks.current()
    for value, noun in ((student, Student), (loss, OPDLoss), (optimizer, Optimizer)):
        check_noun(value, noun)
    check_kind(
        "Student's tokenizer", inner(student).tokenizer, TokenizerId, "fingerprint it: `lopd.records.fingerprint_tokenizer(tokenizer)`"
    )
    if not isinstance(steps, Iterable):
        raise ArgumentError(f"Steps: it is {a_kind(steps)}, expected steps one after the other; pass `batches(store)[:150]`.")
    most = math.inf if max_grad_norm is None else to_real("Training", "max_grad_norm", max_grad_norm)
    check_number("Training", "max_grad_norm", max_grad_norm, most > 0, "more than 0")
    check_summed(student, ranks)
    trained = trained_parameters(student)
    if not _updated(optimizer, trained.values()):
        raise InvalidRecordError(
            f"Optimizer {type(bare(optimizer)).__name__}: it has none of the student's {len(trained)} trained parameters; make it over "
            "`student.parameters()` of this student, after wrapping or loading it."
        )
    judge_optimizer(optimizer, trained)
    return _train(student, steps, loss, optimizer, most)


def _train(
    student: Student | DistributedDataParallel, steps: Iterable[Step], loss: OPDLoss, optimizer: Optimizer, max_grad_norm: float
) -> Iterator[StepMetrics]:
    ranks, trained = Ranks.current(), trained_parameters(student)
    guard = FirstSteps(student, loss, optimizer, trained)
    for step in steps:
        started = perf_counter()
        check_kind("Step", step, Step, "pass `batches(store)[:150]`")
        if step.vocab_hash is not None:
            check_vocabulary(f"Step {step.index}", step, "the student's", inner(student).tokenizer)
        total, labelled, labels, unlike, rollouts, read_tokens, response_tokens = _summed(student, ranks, step)
        guard.judge_batches(step)
        if total <= 0:
            raise InvalidRecordError(f"Step {step.index}: the weight of its tokens is {total}, expected more than 0; check the loss masks.")
        optimizer.zero_grad(set_to_none=True)
        # those that the optimizer lacks would pile up from step to step
        for parameter in trained.values():
            parameter.grad = None
        said = _backward(student, step, loss, ranks, total)
        norm = whole(clip_grad_norm_(_updated(optimizer, trained.values()), max_grad_norm))
        # a GPU is waited for here alone: whether the norm is finite must be known before the weights change, and all else comes along
        grad_norm, sums, known = _fetch(norm, step.batches, said, first=guard.steps == 0)
        if not math.isfinite(grad_norm):
            raise TrainingDivergedError(
                f"Step {step.index}: the gradient norm is {grad_norm}, expected a finite number; lower the learning rate or look at the data."
            )
        judge_update = guard.judge_gradients(grad_norm)
        optimizer.step()
        judge_update()
        # what lies on a GPU: the caller may need the memory for something else before the next step
        del norm, said, judge_update
        drift = measure_step(ranks.gather(known))
        taught = any(batch.teacher_logprobs is not None for batch in step.batches)
        mean_loss, reverse_kl, clip_fraction = (ranks.sum(sums) / total).tolist()
        guard.judge_metrics(step, reverse_kl, drift)
        yield StepMetrics(
            step=step.index,
            loss=mean_loss,
            reverse_kl=reverse_kl,
            clip_fraction=clip_fraction,
            grad_norm=grad_norm,
            rollouts=int(rollouts),
            read_tokens=int(read_tokens),
            drift=drift if taught and all(batch.ref_logprobs is not None for batch in step.batches) else None,
            response_tokens=int(response_tokens),
            seconds=perf_counter() - started,
            mean_label=labels / labelled if labelled else None,
            unlike_group=unlike / labelled if labelled else None,
        )
    _summed(student, Ranks.current(), None)  # the caller may have ended the group


def _backward(student: Student | DistributedDataParallel, step: Step, loss: OPDLoss, ranks: Ranks, total: float) -> list[LossOutput]:
    """Add the gradient of each micro-batch, as a share of the step's total weight, and return what the loss gave of each, detached."""
    said: list[LossOutput] = []
    device = next(iter(trained_parameters(student).values())).device.type
    # the student moves each to where it computes, so a GPU holds one of them at a time
    for place, batch in enumerate(step.batches, 1):
        # a product in an autocast that the caller is in would round gradients; a student has its own
        with gathering(student, last=place == len(step.batches)), torch.autocast(device, enabled=False):
            output = student(batch, loss)
            _check_output(loss, output, batch)
            # torch averages gradients over ranks, and a step is a sum
            (output.loss_sum * ranks.size / total).backward()
        said.append(evolve(output, loss_sum=output.loss_sum.detach()))
        del output
    return said


def _summed(student: Student | DistributedDataParallel, ranks: Ranks, step: Step | None) -> list[float]:
    """Return sizes of a step, summed over the ranks, which must all be at shares of one step, or all at the end of theirs (None).

    Otherwise some rollouts would count twice and others never, or the ranks would wait for each other for ever.
    """
    read = step.batches[: len(step.batches) - step.idle] if step else ()
    sizes = [(float(b.weight.sum(dtype=torch.float64)), *b.label_sums(), len(b.lengths), b.inputs.numel(), len(b.counted)) for b in read]
    mine = torch.tensor([(0.0,) * 7, *sizes], dtype=torch.float64, device="cpu").sum(0)
    found = ranks.gather([(step and evolve(step, batches=()), len(step.batches) if step else 0, mine)])
    if ranks.size > 1:
        _check_shares([one for one, _, _ in found])
        _check_counts(found[0][0], [count for _, count, _ in found], summing(student) is not None)
    return reduce(torch.add, [own for _, _, own in found]).tolist()


def _check_shares(found: list[Step | None]) -> None:
    first, taken = found[0], set[Ranks | None]()
    for rank, step in enumerate(found):
        if step is None or first is None:
            if step is not first:
                ended, other = (0, rank) if first is None else (rank, 0)
                raise InvalidRecordError(
                    f"Steps: rank {ended} has come to their end, and rank {other} has another; give each as many, and leave out the same on each."
                )
            continue
        if (step.index, step.shares) != (first.index, first.shares):
            raise InvalidRecordError(
                f"Step {step.index}: rank {rank} has a share of step {step.index} ({step.shares}), expected one of rank 0's step {first.index} "
                f"({first.shares}); open the store on every rank once it is written, give all the same `rows`, `seed`, `rollouts_per_step` and "
                "`tokens_per_batch`, and leave out the same steps on each."
            )
        if (mine := step.ranks) and (mine.size != len(found) or mine in taken):
            raise InvalidRecordError(
                f"Step {step.index}: rank {rank} has share {mine.rank} of {mine.size}, expected one of {len(found)} that no other rank has; make the "
                "steps after the process group, or leave `ranks` of `batches` out; where you shared the step out yourself, pass "
                "`evolve(step, ranks=None)` (of attrs)."
            )
        taken.add(mine)


def _check_counts(step: Step | None, counts: list[int], wrapped: bool) -> None:
    """Refuse ranks that would wait for each other within a step: DistributedDataParallel meets once in it, sharded layers in each micro-batch."""
    least, most = min(counts), max(counts)
    if step is not None and least < most and not (wrapped and least):
        raise InvalidRecordError(
            f"Step {step.index}: rank {counts.index(least)} has {least} micro-batches and rank {counts.index(most)} has {most}, expected as many on "
            "each rank; add some whose tokens weigh nothing, as `batches` does (`Step.idle`)."
        )


def _check_output(loss: OPDLoss, output: object, batch: Batch) -> None:
    """Refuse what cannot be made a step of, before its backward, by types and shapes alone: a GPU would be waited for with any value."""
    owner = f"Loss {type(loss).__name__}"
    if not isinstance(output, LossOutput):
        raise InvalidRecordError(f"{owner}: it gave {a_kind(output)}, expected a LossOutput; give its sums over the batch.")

    def described(shape: tuple[int, ...], gradient: bool) -> str:
        return f"a tensor of shape {tuple(shape)} {'with' if gradient else 'without'} a gradient"

    for name, shape in (("loss_sum", ()), ("reverse_kl_sum", ()), ("clipped_sum", ()), ("logprobs", (len(batch.counted),))):
        value, wanted = getattr(output, name), described(shape, name == "loss_sum")
        got = described(value.shape, value.requires_grad) if isinstance(value, Tensor) else a_kind(value)
        if got != wanted and not (name == "logprobs" and value is None):
            raise InvalidRecordError(
                f"{owner}: its {name} is {got}, expected {wanted}; give sums, and log-probs of `batch.counted`, and detach all but loss_sum."
            )


def _updated(optimizer: Optimizer, trained: Iterable[Tensor]) -> list[Tensor]:
    """Return those of the trained parameters that the optimizer has: the others would have a share in the norm that it clips."""
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in trained if id(parameter) in theirs]


def _policy_of(batch: Batch) -> Tensor | None:
    return batch.behavior_logprobs if batch.ref_logprobs is None else batch.ref_logprobs


def _fetch(norm: Tensor, batches: Sequence[Batch], said: Sequence[LossOutput], *, first: bool) -> tuple[float, Tensor, list[TokenLogprobs]]:
    """Copy a step's numbers to the host at once: the gradient norm, the (3,) sums of the losses' results, and log-probs for the drift."""
    # rewards alone have no teacher: in its place the first step has the policy, from which it judges how far the student is
    if first and all(batch.teacher_logprobs is None and batch.label_values is not None for batch in batches):
        batches = [evolve(batch, teacher_logprobs=_policy_of(batch)) for batch in batches]
    measured = [
        (batch, output.logprobs)
        for batch, output in zip(batches, said, strict=True)
        if output.logprobs is not None and batch.teacher_logprobs is not None and _policy_of(batch) is not None
    ]
    reported = ((output.loss_sum, output.reverse_kl_sum, output.clipped_sum) for output in said)
    # a loss may have made one of them on the CPU
    sums = [torch.stack([value.to(values[0].device) for value in values]) for values in reported]
    parts = [norm.detach().reshape(1), *sums, *(logprobs_M for _, logprobs_M in measured)]
    on_host = torch.cat([part.to(norm.device) for part in parts]).cpu().double()
    grad_norm, *rest = on_host.split([1, 3 * len(said), *(len(logprobs_M) for _, logprobs_M in measured)])
    known = list[TokenLogprobs]()
    for (batch, _), logprobs_M in zip(measured, rest[1:], strict=True):
        columns = (batch.teacher_logprobs, _policy_of(batch), batch.weight, batch.segment_ids, batch.sampler_logprobs)
        stored = [column[batch.counted].cpu().numpy() for column in columns if column is not None]
        known.append(TokenLogprobs(logprobs_M.numpy(), *stored))
    return float(grad_norm), rest[0].view(-1, 3).sum(0), known
