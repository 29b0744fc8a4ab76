"""Probes of a model: short forwards that show whether lopd computes what the model itself does, whatever its class.

Shape suffixes: N tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch

from lopd.engines.causal_lm import evaluating, lm_head, packed_hidden_states, unwrap
from lopd.errors import ModelError

_PROBE_IDS = (1, 2, 3, 5, 8, 13, 21)


@torch.no_grad()
def check_scoring(model: Any, vocab_size: int) -> None:
    """Compare the cut model on two packed sequences with the whole model on each alone.

    This finds what no list of model classes can: another scale or cap on the logits, attention across packed rollouts, positions that
    do not restart.  A few milliseconds for a small model, one short forward for a large one.

    Raises:
        ModelError: the two disagree.
    """
    base = unwrap(model)
    device = next(base.parameters()).device
    short, long = (torch.tensor([i % vocab_size for i in ids], device=device) for ids in (_PROBE_IDS[:3], _PROBE_IDS))
    with evaluating(model):
        positions = torch.cat([torch.arange(len(long)), torch.arange(len(short))]).to(device)
        packed_ND = packed_hidden_states(model, torch.cat([long, short]), positions)
        cut_NV = lm_head(model, vocab_size).logits(packed_ND)
        whole_NV = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0, :, :vocab_size].float() for ids in (long, short)])
    # a head may rule tokens out: where both say -inf they agree, where only one does the difference is infinite, the tolerance never
    both_NV = (cut_NV == -torch.inf) & (whole_NV == -torch.inf)
    size = float(whole_NV.masked_fill(~whole_NV.isfinite(), 0.0).abs().max())
    difference = float((cut_NV - whole_NV).masked_fill(both_NV, 0.0).abs().max())
    tolerance = (1e-3 if next(base.parameters()).dtype == torch.float32 else 5e-2) * max(size, 1e-6)
    if not difference <= tolerance:
        raise ModelError(
            f"Model {type(base).__name__}: cut below its head and packed, its logits differ by {difference:.3g} from its own, expected at most "
            f"{tolerance:.3g}; it scales its logits or lets packed rollouts attend to each other, so lopd cannot train it."
        )


def check_training(model: Any, vocab_size: int) -> None:
    """Check that a model can be trained: what `check_scoring` checks, on rollouts that are packed as a student packs them.

    Raises:
        ModelError: likewise.
    """
    check_scoring(model, vocab_size)
