"""Losses on the teacher's K most likely tokens (`batches(top_k=True)`): one objective for every divergence."""

from typing import final

import torch
from attrs import frozen
from torch import Tensor

from lopd.losses.divergences import Divergence
from lopd.losses.objective import TokenLosses
from lopd.losses.tokens import Tokens


@final
@frozen
class TopKObjective:
    """A divergence between teacher and student at every counted token: `FusedLoss(TopKObjective(forward_kl))`.

    Args:
        divergence: one of `lopd.losses.divergences`, with its options through `functools.partial`, or your own.
    """

    divergence: Divergence

    per_token = True  # a divergence looks at each token alone
    wants_entropy = False

    def ids(self, tokens: Tokens, /) -> Tensor:
        """(M, 1 + K): the sampled token, whose log-prob is only reported, and the teacher's most likely ones."""
        return torch.cat([tokens.targets[:, None], tokens.top_k().ids], dim=-1)

    def __call__(self, logprobs_MK: Tensor, tokens: Tokens, /) -> TokenLosses:
        """See the class."""
        top_k, sampled_M = tokens.top_k(), logprobs_MK[:, 0].detach()
        loss_M = self.divergence(logprobs_MK[:, 1:], top_k.logprobs.to(logprobs_MK.dtype), top_k.tail.to(logprobs_MK.dtype))
        return TokenLosses(tokens.weight * loss_M, tokens.weight * (sampled_M - tokens.teacher()), torch.zeros_like(sampled_M), sampled_M)
