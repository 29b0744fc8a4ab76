"""What a run shows of itself at its first step: whether it trains what its author thinks it trains.  Later steps pay nothing for it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from itertools import groupby
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopd.errors import AdvantageWarning, ArgumentError, DriftWarning, EndTokenWarning, ModelError, TrainingWarning
from lopd.guards.watch import judge_loss, judge_ratio
from lopd.protocols import StatesBaseline, StatesCorrection, StatesEnds, StatesLabels
from lopd.records.devices import check_beside
from lopd.records.drift import Drift
from lopd.records.ranks import Ranks, bare, inner, summing
from lopd.records.steps import Batch, Step
from lopd.records.warn import warn_user

#: Nats a token between student and teacher: beyond it the teacher finds a typical token of the student seven times less likely.  After SFT on
#: the teacher's text it is a few tenths.
MAX_DISTANCE = 2.0
#: Share of effective rollouts: before its first update a student is the policy that sampled, and all are effective up to rounding.
MIN_ESS = 0.5
#: Nats a token between student and policy before the first update: far beyond what rounding, or another engine, makes of one model.
MAX_KL = 0.1
#: Nats a token up to which rounding alone may be why few of the long rollouts are effective: ten times what two engines in bfloat16 differ by.
ROUNDING_KL = 0.01
#: Share of the weights with a gradient that one step must change; in bfloat16 at a rate of 1e-5 it is a seventh, in float32 nearly all.
MIN_MOVED = 0.5
#: Below this norm a gradient is rounding, and weights that stay where they are show nothing.
_LEAST_NORM = 1e-3
_SAMPLED, _SHOWN = 4096, 3
_ENDS_NEEDED = 4  # fewer responses do not show which token ends them
_SAME = 1e-3  # relative difference of two rollouts' weights that is rounding

_said: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()


def _warn_once(optimizer: Optimizer, subject: str, message: str, category: type[Warning] = TrainingWarning) -> None:
    """Warn of a subject once for each optimizer: online OPD has a first step in every round."""
    said = _said.setdefault(optimizer, set())
    if subject not in said:
        said.add(subject)
        warn_user(message, category)


def judge_optimizer(optimizer: Optimizer, trained: Mapping[str, Tensor]) -> None:
    """Warn if the optimizer lacks some of the trained parameters, or has others where there are several ranks.

    Raises:
        ArgumentError: its step needs an argument, as that of LBFGS needs a closure; or its state is on another device than a parameter.
    """
    own, kind = bare(optimizer), type(bare(optimizer)).__name__
    step = vars(own).get("step", type(own).step)
    bound = "step" in vars(own) and not hasattr(step, "_wrapped_by_lr_sched")  # that one shows the class's
    takes = [*signature(step, follow_wrapped=not bound).parameters.values()][not bound :]
    needs = [p.name for p in takes if p.default is Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needs:
        raise ArgumentError(f"Optimizer {kind}: its step needs `{needs[0]}`, and lopd passes nothing; use another.")
    check_beside(optimizer, trained)
    theirs = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    others = {key for key, parameter in theirs.items() if parameter.requires_grad} - {id(parameter) for parameter in trained.values()}
    if others and (ranks := Ranks.current().size) > 1:
        _warn_once(
            optimizer,
            "others",
            f"Optimizer {kind}: it has {len(others)} parameters that are not the student's, whose gradients are not summed over "
            f"the {ranks} ranks here, which may go apart; make them parameters of the student before it is wrapped, or sum them yourself.",
        )
    lacking = [name for name, parameter in trained.items() if id(parameter) not in theirs]
    if lacking:
        _warn_once(
            optimizer,
            "optimizer",
            f"Optimizer {kind}: it has {len(trained) - len(lacking)} of the student's {len(trained)} trained parameters, "
            f"expected all; {_some(lacking)} stay as they are: make it over all that require a gradient, or freeze the others.",
        )


def judge_gradients(optimizer: Optimizer, student: object, trained: Mapping[str, Tensor]) -> None:
    """Warn if some trained parameters have no gradient after a whole step: nothing that was computed depends on them.

    Raises:
        ModelError: the student is in DistributedDataParallel, which waits for them, and leaves gradients of others as each rank has them.
    """
    lacking = [name for name, parameter in trained.items() if parameter.grad is None]
    if not lacking:
        return
    found = f"Student: {len(lacking)} of its {len(trained)} trained parameters got no gradient in a whole step; {_some(lacking)}"
    remedy = "or leave them out of the adapters' `target_modules`."
    # no rank asks the others: one that lacks none waits within torch for a rank that does
    if summing(student) is not None:
        raise ModelError(
            f"{found} keep DistributedDataParallel from summing those of others: freeze them (`requires_grad_(False)`) before it wraps the student, "
            f"{remedy}"
        )
    _warn_once(optimizer, "gradients", f"{found} stay as they are: freeze them (`requires_grad_(False)`), {remedy}")


def judge_distance(optimizer: Optimizer, loss: object, step: Step, reverse_kl: float) -> None:
    """Warn if the student is far from its teacher.

    Of advantages below 0 under a loss that states that it is `uncorrected`, `lopd.guards.watch` warns where it sees the policy's log-probs.

    Args:
        optimizer: whose first step it is.
        loss: the step's.
        step: a run that was resumed begins after step 0, in which such a loss was judged.
        reverse_kl: nats a token.
    """
    first = step.batches[0]
    # `judge_loss` has a ref column; without one `batches` judges what the policy reported, and no steps with a support
    seen = first.ref_logprobs is not None or (first.behavior_logprobs is not None and first.top_k_ids is None)
    watched = reverse_kl > 0 and isinstance(loss, StatesCorrection) and loss.uncorrected and (seen or step.index > 0)
    if abs(reverse_kl) > MAX_DISTANCE and not watched:
        _warn_once(
            optimizer,
            "distance",
            f"Student: it is {abs(reverse_kl):.3g} nats a token from its teacher in step {step.index}, expected at most {MAX_DISTANCE:g}; most of "
            f"its advantages are {'below' if reverse_kl > 0 else 'above'} 0: look whether both read what they should, and train it longer on the "
            "teacher's text first.",
            AdvantageWarning,
        )


def judge_policy(optimizer: Optimizer, step: Step, drift: Drift | None) -> None:
    """Warn if the student is not the policy that sampled, though it has had no update.

    Args:
        optimizer: whose first step it is.
        step: later ones than step 0 pass, as that of a run that was resumed.
        drift: before the step's update, from the reference policy, or from what the policy reported; None where it was not measured.
    """
    if step.index or drift is None:
        return
    # without a ref column nothing forms a ratio, and rounding by another engine leaves few long rollouts effective
    few = step.batches[0].ref_logprobs is not None and drift.ess < MIN_ESS and not drift.kl <= ROUNDING_KL
    found = f"it is {drift.kl:.3g} nats a token from the policy's log-probs, expected at most {MAX_KL:g} in the first step"
    if few:
        found = f"{drift.ess:.0%} of the {drift.rollouts} rollouts are effective in the first step, expected at least {MIN_ESS:.0%}"
    if few or drift.kl > MAX_KL:  # of one or two rollouts at least half are effective
        _warn_once(
            optimizer,
            "policy",
            f"Student: {found}; it is not the policy that sampled, or has moved far from it: start from "
            "that policy's weights and dtype, or sample again.",
            DriftWarning,
        )


def judge_baseline(optimizer: Optimizer, loss: object, batches: Sequence[Batch]) -> None:
    """Warn if a loss states that it is `baselined`, and rollouts of different lengths have the same weight, as `by_rollout` gives them."""
    if not (isinstance(loss, StatesBaseline) and loss.baselined):
        return
    counted = [(batch.segment_ids[batch.counted].cpu(), batch.weight[batch.counted].cpu()) for batch in batches]
    lengths_B = torch.cat([segments_M.bincount() for segments_M, _ in counted])
    weights_B = torch.cat([segments_M.bincount(weight_M) for segments_M, weight_M in counted])[lengths_B > 0]
    lengths_B = lengths_B[lengths_B > 0]
    if not lengths_B.numel():  # a rank that only keeps step
        return
    if bool((lengths_B != lengths_B[0]).any()) and bool((weights_B - weights_B[0]).abs().max() < _SAME * weights_B[0]):
        _warn_once(
            optimizer,
            "baseline",
            f"Loss {type(loss).__name__}: it has a baseline, and the weight of a token depends on the length of its response, so the "
            "baseline changes the expected gradient; pass `weighting=by_token` to `batches`, or leave the baseline out.",
        )


def judge_labels(optimizer: Optimizer, loss: object, batches: Sequence[Batch]) -> None:
    """Warn if batches bring labels to a loss that states that it ignores them."""
    if isinstance(loss, StatesLabels) and loss.ignores_labels and any(batch.label_values is not None for batch in batches):
        _warn_once(
            optimizer,
            "labels",
            f"Loss {type(loss).__name__}: it reads no labels, so it trains as without `batches(label=...)`; pass a transform that does "
            "(`add_labels` or `weigh_labels` of `lopd.losses.variants`), or leave `label` out.",
        )


def judge_ends(optimizer: Optimizer, student: object, batches: Sequence[Batch]) -> None:
    """Warn if most responses of SFT are taught one end at which a student that states its ends will not stop: it learns to draw that token, and then
    goes on.
    """
    texts = [batch for batch in batches if batch.teacher_logprobs is None and batch.label_values is None]
    if not isinstance(student, StatesEnds) or not texts:
        return
    own, lasts, count = set(student.stop_ids), Counter[int](), 0
    for batch in texts:
        tokens = zip(batch.segment_ids[batch.counted].tolist(), batch.targets[batch.counted].tolist(), strict=True)
        for _, response in groupby(tokens, itemgetter(0)):
            taught = [token for _, token in response]
            lasts.update(taught[-1:] if own.isdisjoint(taught) else ())
            count += 1
    end = next((token for token, times in lasts.most_common(1) if count >= _ENDS_NEEDED and 2 * times > count), None)
    if end is not None:
        _warn_once(
            optimizer,
            "ends",
            f"Student: {lasts[end]} of the {count} responses of the first step end with token {end}, and its own end with {sorted(own)}; it will "
            f"not stop where its text does: call `student.stop_at({end})` before it is exported, or sample with `SamplingParams(stop_ids=...)`.",
            EndTokenWarning,
        )


def at_full_rate(optimizer: Optimizer) -> bool:
    """Return whether a step moves weights as far as it is meant to: a warm-up begins, and a decay ends, with rates that are lower, or 0.

    They are lower than `initial_lr`, by the name that schedulers of torch write into an optimizer.  Adafactor's own are None.
    """
    rates = [(float(group.get("lr", 1.0) or 0.0), float(group.get("initial_lr", 0.0))) for group in optimizer.param_groups]
    return all(rate > 0 and rate >= initial / 2 for rate, initial in rates)


def watch_movement(optimizer: Optimizer, grad_norm: float) -> Callable[[], None]:
    """Return what to call after the step: it warns if too few weights changed, because updates are smaller than their rounding.

    It keeps up to 4,096 weights of each parameter with a gradient, evenly spaced; none where the gradient is rounding alone.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]] if grad_norm > _LEAST_NORM else []
    parts = []
    for parameter in parameters:
        if parameter.grad is not None:
            sizes = _sample(parameter.grad).abs().float()
            chosen = sizes > 0.1 * sizes.mean()
            parts.append((parameter, chosen, _sample(parameter)[chosen].clone(), parameter.numel()))

    def judge() -> None:
        sizes, moved = 0, 0.0
        for parameter, chosen, before, size in parts:
            if before.numel():
                sizes += size
                moved += size * float((_sample(parameter)[chosen] != before).float().mean())
        if sizes and moved / sizes < MIN_MOVED:
            dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter, *_ in parts})
            rate = max(float(group.get("lr", 1.0)) for group in optimizer.param_groups)
            narrow = not {"float32", "float64"} & set(dtypes)
            remedy = "keep the weights in float32 (`autocast=` computes in less)" if narrow else "raise the learning rate"
            _warn_once(
                optimizer,
                "movement",
                f"Student: {moved / sizes:.0%} of its weights with a gradient moved in a step at rate {rate:g} in {', '.join(dtypes)}, "
                f"expected at least {MIN_MOVED:.0%}; the others are rounded away: {remedy}, unless the optimizer keeps a copy of them.",
            )

    return judge


def _sample(tensor: Any) -> Tensor:
    """Return (up to 4,096,) evenly spaced values, of this rank's part where it is sharded."""
    values: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().reshape(-1)
    return values[:: max(values.numel() // _SAMPLED, 1)][:_SAMPLED]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


class FirstSteps:
    """What `opd_steps` asks of its steps, each judgement at its moment; `steps` have been judged.

    Args:
        student, loss, optimizer: as in `opd_steps`.
        trained: the student's parameters that require a gradient, by name.
    """

    def __init__(self, student: object, loss: object, optimizer: Optimizer, trained: Mapping[str, Tensor]) -> None:
        self._student, self._loss, self._optimizer, self._trained, self.steps, self._moved = student, loss, optimizer, trained, 0, False

    def judge_batches(self, step: Step) -> None:
        """Judge what the first step brings, before it is read."""
        if self.steps == 0:
            judge_ratio(self._loss, step.batches)
            judge_baseline(self._optimizer, self._loss, step.batches)
            judge_labels(self._optimizer, self._loss, step.batches)
            judge_ends(self._optimizer, inner(self._student), step.batches)

    def judge_gradients(self, grad_norm: float) -> Callable[[], None]:
        """Judge the gradients of the first step, and return what to call after the update, which judges what the first one at the full rate moved."""
        if self.steps == 0:
            judge_gradients(self._optimizer, self._student, self._trained)
        if self._moved or not at_full_rate(self._optimizer):
            return lambda: None
        self._moved = True
        return watch_movement(self._optimizer, grad_norm)

    def judge_metrics(self, step: Step, reverse_kl: float, drift: Drift | None) -> None:
        """Judge what was measured of a step, its drift from what it was compared with."""
        if self.steps == 0:
            judge_distance(self._optimizer, self._loss, step, reverse_kl)
            judge_policy(self._optimizer, step, drift)
        # from the second step on rollouts are older than the student; online OPD never has one on the same rollouts
        if self.steps == 1 and drift is not None:
            judge_loss(self._loss, drift.advantages)
        self.steps += 1
