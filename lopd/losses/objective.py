r"""What a loss needs of the student's log-probs, apart from how they are computed: the plain and the fused paths share it.

A variant of Lightning OPD is a function `Signal -> Signal` (`lopd.losses.variants`): it changes advantages and weights, never the path.

Shape suffixes: M counted tokens of a batch, K selected ids each.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, cast, final

import torch
from attrs import field, fields, frozen
from torch import Tensor

from lopd.errors import ArgumentError, InvalidRecordError
from lopd.losses import functional
from lopd.losses.divergences import reverse_kl
from lopd.losses.tokens import Tokens as Tokens  # noqa: PLC0414 (a public name of this module)
from lopd.losses.tokens import check_per_token
from lopd.records.checks import a_kind, check_bound, check_call, check_number, name_of, unwrapped
from lopd.records.steps import LossOutput


@frozen(eq=False)
class Signal:
    r"""What a variant changes: the loss of a token has the gradient \(-w A \nabla\ell_\theta\), and nothing here carries that of the student.

    Args:
        advantages: \(A\), (M,) nats.
        weight: \(w\), (M,).
        student_logprobs: \(\ell_\theta\), (M,) nats, detached.
        tokens: what is known of these tokens.
    """

    advantages: Tensor
    weight: Tensor
    student_logprobs: Tensor
    tokens: Tokens


Transform = Callable[[Signal], Signal]
_Function = TypeVar("_Function", bound=Callable[..., Signal])


def _mark(transform: _Function, mark: str) -> _Function:
    try:
        setattr(transform, mark, True)
    except AttributeError:  # a method, for example, takes none
        return _mark(cast("_Function", partial(transform)), mark)
    return transform


def per_token(transform: _Function) -> _Function:
    """Mark a transform that looks at each token alone, so that a fused loss may apply it chunk by chunk.

    One without the mark sees all counted tokens of a batch at once, at the price of a fourth matrix product.  It may use whole rollouts (they are
    never split), but not the batch: how a step is split must not matter.  Use what is returned: a method is marked in a partial of it.
    """
    return _mark(transform, "per_token")


def with_entropy(transform: _Function) -> _Function:
    """Mark a transform that reads `signal.tokens.entropies()`; whole rollouts are then seen, at the price of a fourth matrix product."""
    return _mark(transform, "with_entropy")


def uncorrected(transform: _Function) -> _Function:
    """Mark a transform that is neither an importance ratio nor another answer to drift, so that guards warn as they do without it."""
    return _mark(transform, "uncorrected")


def baselined(transform: _Function) -> _Function:
    """Mark a transform that adds a baseline to advantages, so that guards warn where a weight depends on later tokens."""
    return _mark(transform, "baselined")


def with_labels(transform: _Function) -> _Function:
    """Mark a transform that reads `signal.tokens.labels()`; guards assume so of each that is not lopd's own."""
    return _mark(transform, "with_labels")


def with_ratio(transform: _Function) -> _Function:
    """Mark a transform that multiplies weights by the token's own importance ratio, so that a loss which has one already is refused."""
    return _mark(transform, "with_ratio")


def replacing(transform: _Function) -> _Function:
    """Mark a transform that replaces the advantage so far, so that a loss is refused whose baseline, or whose transform before it, it would drop."""
    return changing(_mark(transform, "replacing"))


def changing(transform: _Function) -> _Function:
    """Mark a transform that makes another advantage of the one so far, so that a loss is refused in which a later one replaces it."""
    return _mark(transform, "changing")


def _to_transforms(transforms: Iterable[Transform]) -> tuple[Transform, ...]:
    if not isinstance(transforms, Iterable):
        raise ArgumentError(f"Transforms: it is {a_kind(transforms)}, expected several; pass a tuple, of one: `(...,)`.")
    several = tuple(transforms)
    for transform in several:
        check_call("Transform", transform, "signal")
    return several


def _is_marked(transform: Any, mark: str) -> bool:
    # the outermost that has the mark: a partial may have its own, or that of its function
    return bool(next((getattr(part, mark) for part in unwrapped(transform) if hasattr(part, mark)), False))


def _surely_lacks(transform: Any, mark: str) -> bool:
    # another's may do what the mark is of without having it
    return getattr(unwrapped(transform)[-1], "__module__", "") == "lopd.losses.variants" and not _is_marked(transform, mark)


@frozen(eq=False)
class TokenLosses:
    """Weighted, per token.

    Args:
        loss: (M,) carries the gradient.
        reverse_kl, clipped: (M,) detached; see `LossOutput`.
        logprobs: (M,) detached, nats, not weighted: the student's, of the targets.
    """

    loss: Tensor
    reverse_kl: Tensor
    clipped: Tensor
    logprobs: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TokenLosses"], empty: Tensor) -> "TokenLosses":
        """Return those of all parts in their order; `empty`, of shape (0,), gives device and dtype where there are 0 parts."""
        return cls(*(torch.cat([empty, *(getattr(part, f.name).to(empty) for part in parts)]) for f in fields(cls)))

    def sums(self) -> LossOutput:
        """Return the result for the loop."""
        return LossOutput(self.loss.sum(), self.reverse_kl.sum(), self.clipped.sum(), logprobs=self.logprobs)


class Objective(Protocol):
    """A loss as a function of log-probs of stored ids."""

    @property
    def per_token(self) -> bool:
        """Whether a token's loss depends on nothing but the log-probs and the entropy of that token."""
        ...

    @property
    def wants_entropy(self) -> bool:
        """Whether the tokens must come with the student's entropies."""
        ...

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return (M, K) int64: the ids whose log-probs it needs."""
        ...

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """Return the weighted losses; their gradient goes through `logprobs_MK`."""
        ...


def _check_cap(owner: "OPDSettings", _: Any, cap: Any) -> None:
    name = type(owner).__name__
    check_number(name, "ratio_cap", cap, cap is None or cap > 0, "None, or more than 0")
    if cap is not None and not owner.ratio_to_ref:
        raise InvalidRecordError(f"{name}: ratio_cap is {cap!r}, expected None without an importance ratio; pass `ratio_to_ref=True` too.")


@frozen
class OPDSettings:
    r"""The settings of the Lightning OPD loss, the same for its objective, its plain and its fused form.

    \(\sum_t w_t\, (-A_t\, \ell_\theta(a_t))\), \(A_t = \mathrm{clip}(\ell_T - \mathrm{sg}[\ell_\theta], \pm\tau)\).

    Args:
        clip: \(\tau\) in nats, finite and more than 0; or None for no clipping.
        ratio_to_ref: multiply by the per-token importance ratio (`functional.lightning_with_ratio`), with the gradient through it: to what drew
            the tokens (`Batch.sampler_logprobs`), which is the `ref` column where temperature and top-p are 1.  The paper's loss has none; start
            with it all the same: as good where the paper's works, and it holds where that one fails (`benchmarks/RESULTS.md`).
        transforms: variants of advantages and weights, in their order (`lopd.losses.variants`); the clip comes after them.
        advantage: a constant in the place of teacher minus student, then no teacher is needed; 1 is supervised fine-tuning.
        kl_baseline: add \(KL(\pi_\theta, \pi_T)\), over the teacher's top-k and the tail, to the advantage before the transforms; needs
            `batches(top_k=True)`.  Online and with weights `by_token` the expected gradient is the same, with less variance (vOPD, arXiv 2605.07865);
            `by_rollout`, where 1/T depends on later tokens, the push towards longer responses is lost (`lopd.by_rollout`), and `opd_steps` warns.
        ratio_cap: \(c\), more than 0: a ratio of more counts as c, and keeps its gradient (`functional.bounded_ratio`).  A smaller cap has less
            variance, and more bias where the student has moved.  None leaves ratios as they are up to \(e^{20}\) (`functional.MAX_LOG_RATIO`).

    Raises:
        InvalidRecordError: `clip` or `ratio_cap` is out of its range, or the cap is without a ratio; or two parts have the ratio; or one replaces the
            advantage (`extrapolate`, `power`, `entropy_advantage`) beside another, `kl_baseline`, or behind `add_labels` or `log_compress`.
        ArgumentError: `transforms` are not several functions of a `Signal`.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 2, 4 and algorithm 1.
    """

    clip: float | None = field(default=10.0, validator=check_bound)
    ratio_to_ref: bool = False
    transforms: tuple[Transform, ...] = field(default=(), converter=_to_transforms)
    advantage: float | None = None
    kl_baseline: bool = False
    ratio_cap: float | None = field(default=None, validator=_check_cap, kw_only=True)

    def __attrs_post_init__(self) -> None:
        owner = type(self).__name__
        for setting, mark, why in (
            ("ratio_to_ref", "with_ratio", "the ratio would count twice"),
            ("kl_baseline", "replacing", "the last replaces the advantage"),
        ):
            named = [setting] * bool(getattr(self, setting)) + [name_of(t) for t in self.transforms if _is_marked(t, mark)]
            if len(named) > 1:
                raise InvalidRecordError(f"{owner}: it has {' and '.join(named)}, expected one of them, since {why}; leave one out.")
        changing = [transform for transform in self.transforms if _is_marked(transform, "changing")]
        for late in (transform for transform in changing[1:] if _is_marked(transform, "replacing")):
            wrong = f"{owner}: {name_of(late)} is behind {name_of(changing[0])}, and replaces the advantage that it makes"
            raise InvalidRecordError(f"{wrong}; change their order.")

    @property
    def uncorrected(self) -> bool:
        """Whether it has neither an importance ratio, nor a constant advantage but 0, nor a transform but those marked `uncorrected`."""
        # with 0 transforms alone decide what is learnt, labels for example
        return not (self.ratio_to_ref or self.advantage) and all(_is_marked(transform, "uncorrected") for transform in self.transforms)

    @property
    def ratioless(self) -> bool:
        """Whether it surely has neither an importance ratio nor a constant advantage but 0 (`lopd.protocols.StatesRatio`)."""
        lacks = (_is_marked(t, "uncorrected") or _surely_lacks(t, "with_ratio") for t in self.transforms)
        return not (self.ratio_to_ref or self.advantage) and all(lacks)

    @property
    def baselined(self) -> bool:
        """Whether it has `kl_baseline`, or a transform marked `baselined` (`lopd.protocols.StatesBaseline`)."""
        return self.kl_baseline or any(_is_marked(transform, "baselined") for transform in self.transforms)

    @property
    def ignores_labels(self) -> bool:
        """Whether all of its transforms are lopd's own, and none is marked `with_labels` (`lopd.protocols.StatesLabels`)."""
        return all(_surely_lacks(transform, "with_labels") for transform in self.transforms)

    def objective(self) -> "OPDObjective":
        """Return the objective that has these settings."""
        return OPDObjective(self.clip, self.ratio_to_ref, self.transforms, self.advantage, self.kl_baseline, ratio_cap=self.ratio_cap)


@final
@frozen
class OPDObjective(OPDSettings):
    r"""\(-w A\,\ell_\theta(a_t)\), or \(-w A \min(\exp(\ell_\theta - \ell_q), c)\); A and w went through the transforms, then A is clipped."""

    @classmethod
    def sft(cls) -> "OPDObjective":
        """Return the fields of supervised fine-tuning: advantage 1."""
        return cls(clip=None, advantage=1.0)

    @property
    def per_token(self) -> bool:
        """Whether all transforms are."""
        return not self.wants_entropy and all(_is_marked(transform, "per_token") for transform in self.transforms)

    @property
    def wants_entropy(self) -> bool:
        """Whether a transform does."""
        return any(_is_marked(transform, "with_entropy") for transform in self.transforms)

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return (M, 1): the sampled token; with a baseline (M, 1 + K), the teacher's most likely ones too."""
        sampled_M1 = tokens.targets[:, None]
        return torch.cat([sampled_M1, tokens.top_k().ids], dim=-1) if self.kl_baseline else sampled_M1

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        student_M, signal = logprobs_MK[:, 0], self._signal(logprobs_MK.detach(), tokens)
        clipped_M = functional.clip_advantages(signal.advantages, self.clip)
        if self.ratio_to_ref:
            loss_M = functional.lightning_with_ratio(student_M, clipped_M, tokens.sampler(), self.ratio_cap)
        else:
            loss_M = functional.lightning(student_M, clipped_M)
        kl_M = torch.zeros_like(signal.student_logprobs) if self.advantage is not None else tokens.reverse_kl(signal.student_logprobs)
        beyond_M = torch.zeros_like(kl_M) if self.clip is None else (signal.advantages.abs() > self.clip).to(kl_M.dtype)
        return TokenLosses(signal.weight * loss_M, tokens.weight * kl_M, tokens.weight * beyond_M, signal.student_logprobs)

    def _signal(self, logprobs_MK: Tensor, tokens: Tokens) -> Signal:
        student_M, given = logprobs_MK[:, 0], self.advantage
        advantages_M = functional.advantages(tokens.teacher(), student_M, None) if given is None else torch.full_like(student_M, given)
        if self.kl_baseline:
            top_k = tokens.top_k()
            advantages_M = advantages_M + reverse_kl(logprobs_MK[:, 1:], top_k.logprobs, top_k.tail)
        signal = Signal(advantages_M, tokens.weight, student_M, tokens)
        for transform in self.transforms:
            signal = transform(signal)
            for part in ("advantages", "weight"):
                check_per_token(f"Transform {name_of(transform)}: {part}", getattr(signal, part, None), tokens)
        return signal
