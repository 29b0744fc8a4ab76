"""Drawing one token a row from logits and a uniform number: nothing else is random, so a seed decides a rollout.

Shape suffixes: B rows, V vocabulary, J blocks of the vocabulary, W ids of a block.
"""

import torch
from torch import Tensor

from lopd.manifest import SamplingParams

_BLOCK = 256
_BELOW_ONE = 1 - 2.0**-53


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at a uniform number, and its log-prob (nats) at temperature 1, uncut.

    Args:
        logits_BV: (B, V) float32.
        uniforms_B: (B,) float64 in [0, 1).
        sampling: temperature (0 takes the most likely token) and top_p.
    """
    logprobs_BV = logits_BV.log_softmax(-1)
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        probs_BV = logprobs_BV.exp() if sampling.temperature == 1 else (logits_BV / sampling.temperature).softmax(-1)
        ids_B = _invert(probs_BV if sampling.top_p == 1 else _nucleus(probs_BV, sampling.top_p), uniforms_B)
    return ids_B, logprobs_BV.gather(-1, ids_B[:, None]).squeeze(-1)


def _invert(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """(B,) ids at which the cumulative distribution passes the uniform numbers.

    In two levels, blocks and then ids inside one block: a float64 running sum over the whole vocabulary took a third of a decoding step.
    """
    blocks_BJW = torch.nn.functional.pad(probs_BV, (0, -probs_BV.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    block_B, rest_B = _pass_point(blocks_BJW.sum(-1, dtype=torch.float64), uniforms_B)
    within_B, _ = _pass_point(blocks_BJW[torch.arange(len(block_B), device=block_B.device), block_B].double(), rest_B)
    return block_B * _BLOCK + within_B


def _pass_point(masses_BJ: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) first place with mass whose running sum passes the uniform share of the total, and how far into its mass, in [0, 1)."""
    cumulative_BJ = masses_BJ.cumsum(-1)
    targets_B1 = (uniforms_B * cumulative_BJ[:, -1])[:, None]
    places_B1 = torch.searchsorted(cumulative_BJ, targets_B1, right=True)
    mass_B1 = masses_BJ.gather(-1, places_B1)
    into_B1 = (targets_B1 - (cumulative_BJ.gather(-1, places_B1) - mass_B1)) / mass_B1
    return places_B1.squeeze(-1), into_B1.squeeze(-1).clamp(0, _BELOW_ONE)


def _nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Probabilities with all but the smallest set of most likely tokens that holds `top_p` set to 0."""
    ordered_BV, order_BV = probs_BV.sort(-1, descending=True)
    ordered_BV[ordered_BV.cumsum(-1) - ordered_BV >= top_p] = 0
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, ordered_BV)
