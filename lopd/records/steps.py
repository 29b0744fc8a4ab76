"""What a step of training is made of: packed batches, the head that reads them, the result of a loss, and the numbers of the step.

Shape suffixes: N tokens of a packed batch, M of them that count, B rollouts, D hidden size, V vocabulary, K tokens of a support.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import evolve, fields, frozen
from torch import Tensor

from lopd.records.drift import Drift, below, known_numbers
from lopd.records.glance import ROWS, Glance, Glanced
from lopd.records.ranks import Ranks


@frozen(eq=False, repr=False)
class Batch(Glanced):
    """Several rollouts in one row of N tokens, packed: no padding, positions restart with each rollout.

    Everything is aligned with `targets`: entry n is about predicting `targets[n]` from the tokens up to `inputs[n]` of the same segment.

    `counted`, `lengths` and `counts` follow from the tensors.  They are read where these are, once, and come along to another device: asked of
    a GPU, they would make the host wait for everything that it has in hand.

    Args:
        inputs: (N,) int64.
        targets: (N,) int64, the inputs of the same rollout shifted by one.
        position_ids: (N,) int64, the position within the rollout.
        segment_ids: (N,) int64, which rollout of this batch.
        weight: (N,) float32, how much a token counts; 0 for prompt tokens and masked tokens.
        teacher_logprobs: (N,) float32, nats, meaningful where weight > 0 (0 elsewhere); None if no such column was asked for.
        ref_logprobs: (N,) float32, nats, the same of the reference policy at temperature 1: drift is measured from these.
        top_k_ids: (N, K) int64, the distinct tokens of the teacher's support: those that it finds most likely, or the policy's candidates.  None
            if they were not asked for, like the next five.
        top_k_logprobs: (N, K) float32, nats, of the teacher's whole distribution.
        top_k_tail: (N,) float32, the probability that the teacher gives to all other tokens.
        sampler_logprobs: (N,) float32, nats, in the distribution that drew the tokens: importance ratios are to these.  None where
            `ref_logprobs` are the same (temperature and top-p are 1), or where they were not recorded.
        drawn_ids: (N, D) int64, tokens that were drawn from the policy at temperature 1, with replacement; None where the support has none.
        drawn_logprobs: (N, D) float32, nats, of the teacher.
        drawn_ref_logprobs: (N, D) float32, nats, of the policy that drew them; None where `ref` is not the column that keeps them.
        label_values: (N,) float32, a verifier's value of the rollout or of this token; None if it was not asked for.
        label_means: (N,) float32, the mean over the rollouts of the same prompt and policy; None also where each prompt has one rollout.
        behavior_logprobs: (N,) float32, nats, what the policy that sampled reported; in step 0 alone, and where `ref_logprobs` were not asked for:
            no loss reads them, and the loop compares the student with that policy.
    """

    inputs: Tensor
    targets: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    weight: Tensor
    teacher_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    top_k_ids: Tensor | None = None
    top_k_logprobs: Tensor | None = None
    top_k_tail: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    drawn_ids: Tensor | None = None
    drawn_logprobs: Tensor | None = None
    drawn_ref_logprobs: Tensor | None = None
    label_values: Tensor | None = None
    label_means: Tensor | None = None
    behavior_logprobs: Tensor | None = None

    @cached_property
    def counted(self) -> Tensor:
        """(M,) int64, the places of tokens whose weight is above 0, in their order: index with these, not with a mask."""
        # it stays, so a look at the batch in a validation must leave it good for training
        with torch.inference_mode(False):
            return (self.weight > 0).nonzero().squeeze(-1)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """(B,), the tokens of each rollout."""
        starts_B = (self.position_ids == 0).nonzero().squeeze(-1)
        return tuple(torch.diff(starts_B, append=starts_B.new_tensor([len(self.position_ids)])).tolist())

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """(B,), the tokens of each rollout whose weight is above 0."""
        return tuple(self.segment_ids[self.counted].bincount(minlength=len(self.lengths)).tolist())

    def label_sums(self) -> tuple[int, float, int]:
        """Return the number of rollouts with a label and tokens that count, the sum of their labels (means over these tokens), and how many of them
        have another label than the mean of their group.
        """
        if self.label_values is None:
            return 0, 0.0, 0
        segments_M, labels_M = self.segment_ids[self.counted].cpu(), self.label_values[self.counted].cpu()
        means_M = labels_M if self.label_means is None else self.label_means[self.counted].cpu()
        sizes_B, sums_B, unlike_B = (
            segments_M.bincount(weights_M) for weights_M in (None, labels_M.double(), (labels_M != means_M).double())
        )
        on_B = sizes_B > 0
        return int(on_B.sum()), float((sums_B / sizes_B)[on_B].sum()), int((unlike_B > 0).sum())

    def _glance(self) -> Glance:
        has = [f.name for f in fields(Batch)[5:] if getattr(self, f.name) is not None]
        support = {} if self.top_k_ids is None else {"top-k": self.top_k_ids.shape[1]}
        facts = {
            "read tokens": self.inputs.numel(),
            "tokens that count": len(self.counted),
            **support,
            "with": ", ".join(has) or "no scores",
        }
        return Glance(f"Batch of {len(self.lengths):,} rollouts", facts)

    def pinned(self) -> "Batch":
        """Return the same batch in memory from which a GPU copies while the host goes on; torch keeps that memory until the copy is done."""
        return self._moved(Tensor.pin_memory)

    def to(self, device: torch.device | str | int) -> "Batch":
        """Return the same batch on another device, which may be named as torch names it; to a GPU it is copied in the background."""
        where = torch.device(device)
        ahead = where.type == "cuda" and not self.inputs.is_cuda
        return self._moved(lambda values: (values.pin_memory() if ahead else values).to(where, non_blocking=ahead))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        columns = {f.name: getattr(self, f.name) for f in fields(Batch)}
        with torch.inference_mode(False):  # as `counted`
            moved = evolve(self, **{name: move(values) for name, values in columns.items() if values is not None})
            for name, known in (("counted", move(self.counted)), ("lengths", self.lengths), ("counts", self.counts)):
                object.__setattr__(moved, name, known)
        return moved


@frozen(eq=False, repr=False)
class Step(Glanced):
    """The micro-batches of one optimizer step.

    Args:
        index: its number in the run.
        batches: at least one.
        vocab_hash: hash of the vocabulary of these ids; `opd_steps` compares it with the student's.  None if it is not known.
        idle: so many of the last batches weigh nothing, and are there for this rank to keep step with others.
        shares: hash of how the whole step is shared among ranks; `opd_steps` compares it between them.  None if it is not known.
        ranks: which share of the whole step this is; on several ranks `opd_steps` refuses a share that another rank has too.  None if it is not
            known.
    """

    index: int
    batches: tuple[Batch, ...]
    vocab_hash: str | None = None
    idle: int = 0
    shares: str | None = None
    ranks: Ranks | None = None

    def _glance(self) -> Glance:
        names = ("rollouts", "read tokens", "tokens that count")
        rows = [(len(batch.lengths), batch.inputs.numel(), len(batch.counted)) for batch in self.batches]
        facts = dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))
        return Glance(f"Step {self.index:,}", {"micro-batches": len(rows), **facts}, names, rows[:ROWS])


@frozen(eq=False)
class LMHead:
    r"""The last layer of a causal LM: \(z = c \tanh(s (W h + b) / c)\), without the tanh if there is no soft-cap \(c\).

    Args:
        weight: (V, D); V is the tokenizer's vocabulary, padding rows already cut off so that no padding id carries mass.
        bias: (V,) or None.
        softcap: c or None.
        scale: s.
        compute_dtype: that a student computes its layers in; None for that of the weight.  A loss may multiply in it, where sums are float32.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    compute_dtype: torch.dtype | None = None

    def float(self) -> "LMHead":
        """Return the same head with float32 weights: convert once where `logits` is called many times and no gradient is wanted."""
        return evolve(self, weight=self.weight.float())

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return (N, V) logits in float32 (float64 if given float64), also under autocast: bf16 logits would cost 0.02 to 0.05 nats."""
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits_NV = torch.nn.functional.linear(hidden_ND.to(dtype), self.weight.to(dtype), bias)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


@frozen(eq=False)
class LossOutput:
    """The result of a loss on one micro-batch: weighted sums, so that any split of a step adds up to the same gradient.

    Args:
        loss_sum: scalar, differentiable: sum over tokens of weight times loss.
        reverse_kl_sum: scalar, detached, nats: sum of weight times ratio times (student - teacher) log-prob; may be negative; 0 for losses that
            see no teacher.  The ratio is that of the student to what drew the tokens.  With weights `by_token` the expected sum is that of
            KL(student, teacher) over the stored states.  With `by_rollout` it is not: 1/T depends on later tokens.  Where a batch has no ref
            column, the ratio is taken for 1, and the sum is off once the student has moved.
        clipped_sum: scalar, detached: sum of weight over tokens whose advantage was clipped.
        neglected_sum: scalar, detached, or None where nothing was left out of the gradient on purpose: at least the sum over tokens of the
            1-norm of the gradient by the logits that was left out.  Times the head's scale and the largest norm of a hidden state it bounds what
            the head's weight lacks (Frobenius norm); times that scale and the largest norm of a row of that weight, what the hidden states lack.
        logprobs: (M,) detached, nats: the student's log-probs of the targets whose weight is more than 0, in their order; None where a loss
            does not state it.  The loop measures drift with them.
    """

    loss_sum: Tensor
    reverse_kl_sum: Tensor
    clipped_sum: Tensor
    neglected_sum: Tensor | None = None
    logprobs: Tensor | None = None


@frozen
class StepMetrics:
    """Plain numbers of one optimizer step; means are weighted by the batch weights of the whole step.

    Args:
        step: its number in the run.
        loss: mean loss, before the update.
        reverse_kl: nats per token: `LossOutput.reverse_kl_sum` divided by the weight of the step, so with `by_token` a one-sample estimate of
            the KL at the stored states; with `by_rollout` the mean over rollouts of their means, which shows a trend and is not an estimate of the
            KL.  Either may be negative: people are shown it as the gap to the teacher.
        clip_fraction: share of clipped advantages.
        grad_norm: before clipping.
        rollouts: in this step.
        read_tokens: positions the student read in this step, prompts included.
        seconds: wall time.
        drift: from the reference policy; None unless the steps bring teacher and ref columns and the loss gives its log-probs.
        response_tokens: those that count, of all rollouts in this step.  Over rounds of fresh rollouts watch their mean a rollout: weights
            `by_rollout` push it up (`lopd.by_rollout`).  0 in metrics that were written before they were counted.
        mean_label: over the rollouts of this step; None unless the steps bring labels.
        unlike_group: share of rollouts whose label is not the mean of their group, None as above: from the others `add_labels` learns nothing.
    """

    step: int
    loss: float
    reverse_kl: float
    clip_fraction: float
    grad_norm: float
    rollouts: int
    read_tokens: int
    seconds: float
    drift: Drift | None = None
    response_tokens: int = 0
    mean_label: float | None = None
    unlike_group: float | None = None

    def __str__(self) -> str:
        """Return one line for people; `repr` has every number.

        >>> print(StepMetrics(step=9, loss=0.5, reverse_kl=0.25, clip_fraction=0.0, grad_norm=2.0, rollouts=8, read_tokens=900, seconds=0.5))
        step    9  loss   0.500  gap to the teacher  0.250  gradient  2.00  1,800 read tokens/s
        """
        drift = "" if self.drift is None else f"ratio {self.drift.ratio_mean:.3f}  effective rollouts {self.drift.ess:4.0%}  "
        # exactly 0 only where no teacher is seen; it may be negative, which a KL cannot
        reverse_kl = f"gap to the teacher {self.reverse_kl:6.3f}  " if self.reverse_kl else ""
        speed = f"{self.read_tokens / max(self.seconds, 1e-9):,.0f} read tokens/s"
        return f"step {self.step:4d}  loss {self.loss:7.3f}  {reverse_kl}gradient {self.grad_norm:5.2f}  {drift}{speed}"

    def numbers(self) -> dict[str, float]:
        """Return every number but `step` by its name, flat, for any logger: `log(metrics.numbers(), step=metrics.step)`.

        Loggers take the step beside the numbers, and some keep that name for themselves.  Those of `drift` begin with drift/; what is None is
        not there.  Quantiles and gains have a name each.  A number may be infinite: the ratio of a student gone wild is.

        >>> metrics = StepMetrics(step=9, loss=0.5, reverse_kl=0.25, clip_fraction=0.0, grad_norm=2.0, rollouts=8, read_tokens=900, seconds=0.5)
        >>> list(metrics.numbers())
        ['loss', 'reverse_kl', 'clip_fraction', 'grad_norm', 'rollouts', 'read_tokens', 'seconds', 'response_tokens']
        """
        values = {f.name: getattr(self, f.name) for f in fields(StepMetrics) if f.name not in {"step", "drift"}}
        own = {name: float(value) for name, value in values.items() if value is not None}
        drift = {} if self.drift is None else self.drift.numbers()
        return own | {f"drift/{name}": value for name, value in drift.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepMetrics":
        """Return the inverse of `attrs.asdict`, also after a way through JSON; and of `{"step": metrics.step, **metrics.numbers()}`.

        Of the latter as a logger keeps it: in another order, beside names of its own, with infinite numbers as text, and in a table with None or
        NaN for the drift of a step that has none.
        """
        nested, flat = data.get("drift"), below("drift", data)
        measured = float(flat.get("rollouts") or 0) > 0
        drift = Drift.from_numbers(flat) if measured else None if nested is None else Drift.from_json(nested)
        # read tokens were called tokens before
        own = {"read_tokens" if name == "tokens" and "read_tokens" not in data else name: value for name, value in data.items()}
        # `attrs.asdict` always has "drift", and no names of others
        return cls(**{**(own if "drift" in data else {}), **known_numbers(cls, {**own, "drift": None}), "drift": drift})
