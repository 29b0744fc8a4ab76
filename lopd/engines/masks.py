"""What is known of a forward, passed to transformers, which would ask the GPU and wait for the answer, or choose a kernel that needs more memory."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor

from lopd.records.devices import has_bfloat16

_Function = Callable[..., Any]
_here, _UNKNOWN = local(), object()


@contextmanager
def known_rows(rollout_BS: Tensor | None = None) -> Iterator[None]:
    """Say which rollout of its row each position belongs to: transformers need not look for borders to mask, in this thread.

    None where rows are not packed, or where the attention gets their lengths.
    """
    _stand_before("masking_utils", "find_packed_sequence_indices", _borders)
    _stand_before("integrations.sdpa_attention", "use_gqa_in_sdpa", _in_groups)
    before = _known()
    _here.rollouts = rollout_BS
    try:
        yield
    finally:
        _here.rollouts = before


def _known() -> Any:
    return getattr(_here, "rollouts", _UNKNOWN)


def _borders(look: _Function, *given: Any, **named: Any) -> Any:
    return look(*given, **named) if (known := _known()) is _UNKNOWN else known


def _in_groups(asks: _Function, attention_mask: Any, key: Any, *others: Any, **named: Any) -> bool:
    """Return whether attention reads heads in groups.  Not on CUDA in float32, or without FlashAttention: what is left for it keeps all scores.

    transformers before 5.13 passes no values.
    """
    wide = key.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cuda")
    kept = key.is_cuda and (wide or not has_bfloat16(key.device))
    return not kept and asks(attention_mask, key, *others, **named)


def _stand_before(module: str, name: str, answer: _Function) -> None:
    """Put an answer before a function of transformers, once; a transformers that has another name for it does without."""
    asked = getattr(sys.modules.get(f"transformers.{module}"), name, None)
    if asked is None or hasattr(asked, "stands_before"):
        return

    def stand(*given: Any, **named: Any) -> Any:
        return answer(asked, *given, **named)

    stand.stands_before = asked  # type: ignore[attr-defined]
    setattr(sys.modules[f"transformers.{module}"], name, stand)
