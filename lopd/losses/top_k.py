"""Losses on a stored support (`batches(top_k=True)`), the teacher's most likely tokens or the policy's candidates: one objective for all.

Shape suffixes: M counted tokens, K of the support each, D drawn ones each, E = 1 + D draws each, the sampled token first.
"""

import math
from typing import final

import torch
from attrs import field, frozen
from torch import Tensor

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses import functional
from lopd.losses.divergences import Divergence, tail_advantages
from lopd.losses.objective import TokenLosses
from lopd.losses.tokens import Tokens, check_per_token
from lopd.records.checks import check_bound, check_call, name_of


@final
@frozen
class TopKObjective:
    r"""A divergence between teacher and student at every counted token: `FusedLoss(TopKObjective(reverse_kl, residual=True))`.

    A divergence on a support is biased, as it does not see how the models divide the tail.  For the reverse KL the residual removes the bias: of a
    draw \(a \sim q\) that lies outside the support S,

    \[ -r\,(A - b), \qquad r = \pi_\theta(a) / q(a), \quad A = \log\pi_T(a) - \log\pi_\theta(a), \quad b = \log(p_{T,tail} / p_{\theta,tail}) \]

    with the gradient through r; b is 0 for `generalised_kl`, which has no bucket for the tail.  On the stored states the expected gradient is then
    that of the reverse KL over the whole vocabulary, whatever the K; and with `reverse_kl` so is the expected value.

    Draws are the sampled token, and those that the policy drew besides (`Batch.drawn_ids`), if there are any: the residual is their mean.  The
    sampled token is left out of a mean where another distribution drew it.  With a support of 0 tokens the residual is the whole estimate.

    It is unbiased only if S was chosen without looking at the draw.  In a support that the sampled token was forced into, it is always inside: its
    residual is 0, and the bias stays.  Tokens that top-p cut off were never drawn, so the residual of sampled tokens lacks their share.

    The weight of a token must not depend on what was drawn either.  Under `by_rollout`, where it is 1 over the length of a response, the residual of
    the sampled token has a bias; under `by_token` it has not, nor has that of tokens that the policy drew besides.

    Args:
        divergence: one of `lopd.losses.divergences`, with its options through `functools.partial`, or your own.
        residual: add the residual; for `reverse_kl` and `generalised_kl`.
        clip: bound of \(\lvert A - b\rvert\) in nats, or None.  The residual is unbiased where the bound is not met.
        ratio_cap: upper bound of r, or None, with the same caveat.  r is at most \(e^{20}\) in any case (`functional.bounded_ratio`).

    Raises:
        InvalidRecordError: a bound is not finite and more than 0, or is given without a residual; or the divergence has no residual.
        ArgumentError: the divergence is not a function of the student's and the teacher's log-probs, and the teacher's tail.

    Source: exact terms on a support plus a score-function term for the rest, as in NeMo-RL's pull request 3608; the control variate b is lopd's.
    """

    divergence: Divergence
    residual: bool = False
    clip: float | None = field(default=None, validator=check_bound)
    ratio_cap: float | None = field(default=None, validator=check_bound)

    per_token = True  # a divergence looks at each token alone
    wants_entropy = False
    ignores_labels = True

    def __attrs_post_init__(self) -> None:
        check_call("TopKObjective: divergence", self.divergence, "student,teacher,tail")
        if self.residual:
            tail_advantages(self.divergence, torch.zeros(0, 0), torch.zeros(0))
        elif (self.clip, self.ratio_cap) != (None, None):
            raise InvalidRecordError(
                "TopKObjective: clip and ratio_cap bound a residual, and residual is False; pass residual=True, or neither."
            )

    def ids(self, tokens: Tokens, /) -> Tensor:
        """Return (M, 1 + K): the sampled token, and the support; (M, 1 + K + D) with those that were drawn, where a residual needs them."""
        support_MK = tokens.top_k().ids
        if not self.residual and support_MK.shape[1] == 0:
            raise MissingScoresError(
                "Batch: top_k_ids has 0 tokens, expected at least 1 for a divergence without a residual; pass residual=True."
            )
        drawn = [tokens.drawn().ids] if self._uses_drawn(tokens) else []
        return torch.cat([tokens.targets[:, None], support_MK, *drawn], dim=-1)

    def _uses_drawn(self, tokens: Tokens) -> bool:
        return self.residual and tokens.drawn_ids is not None

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        top_k, sampled_M = tokens.top_k(), logprobs_MK[:, 0].detach()
        student_MK = logprobs_MK[:, 1 : 1 + top_k.ids.shape[1]]
        teacher_MK, tail_M = (column.to(logprobs_MK.dtype) for column in (top_k.logprobs, top_k.tail))
        loss_M, clipped_M = self.divergence(student_MK, teacher_MK, tail_M), torch.zeros_like(sampled_M)
        check_per_token(f"Divergence {name_of(self.divergence)}: its result", loss_M, tokens)
        if self.residual:
            residual_M, clipped_M = self._residual(logprobs_MK, tokens, tail_advantages(self.divergence, student_MK, tail_M))
            loss_M = loss_M + residual_M
        return TokenLosses(tokens.weight * loss_M, tokens.weight * tokens.reverse_kl(sampled_M), tokens.weight * clipped_M, sampled_M)

    def _residual(self, logprobs_MK: Tensor, tokens: Tokens, tail_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return (M,) the mean over draws, and which share of them was clipped; draws inside the support have a share of 0."""
        columns = [column_M[:, None] for column_M in (tokens.targets, logprobs_MK[:, 0], tokens.teacher(), tokens.sampler())]
        share_ME = torch.ones_like(columns[1])
        if self._uses_drawn(tokens):
            drawn = tokens.drawn()
            count = drawn.ids.shape[1]
            # per token, so that how a step is split changes nothing
            own_M1 = (tokens.sampler() == tokens.ref()).to(logprobs_MK.dtype)[:, None]
            share_ME = torch.cat([own_M1, torch.ones_like(drawn.logprobs)], -1) / (own_M1 + count)
            more = (drawn.ids, logprobs_MK[:, -count:], drawn.logprobs, drawn.ref_logprobs)
            columns = [torch.cat([one, others], -1) for one, others in zip(columns, more, strict=True)]
        ids_ME, student_ME, teacher_ME, sampler_ME = columns
        outside_ME = (ids_ME[:, :, None] != tokens.top_k().ids[:, None]).all(-1)
        share_ME = share_ME * outside_ME
        advantages_ME = teacher_ME - student_ME.detach() - tail_M[:, None]
        clipped_ME = functional.clip_advantages(advantages_ME, self.clip)
        losses_ME = functional.lightning_with_ratio(student_ME, clipped_ME, sampler_ME, self.ratio_cap)
        beyond_ME = advantages_ME.abs() > (math.inf if self.clip is None else self.clip)
        return (share_ME * losses_ME).sum(-1), (share_ME * beyond_ME).sum(-1)
