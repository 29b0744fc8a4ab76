"""How a transformers model continues texts, one token at a time: with a cache or without one, in batches of which prompts.

Shape suffixes: B rows, S positions, N tokens, D hidden size.
"""

from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from lopd.engines.causal_lm import decoder_of, rope_borders, row_hidden_states, text_config, unwrap
from lopd.errors import ModelError

Ids = NDArray[np.int32]
#: What families call the cache that they return and take.  The first that is there is it: transformers 5.24 has `cache` under the older names too.
_CACHES = ("cache", "past_key_values", "cache_params", "state")


class Way(Enum):
    """A way to continue texts.  `check_sampling` finds the first that is right for a model."""

    PADDED = "with a cache (prompts padded on the left)"
    EQUAL = "with a cache (prompts of one length)"
    WHOLE = "without a cache"

    def begin(self, model: Any, prompts: Sequence[Ids]) -> "Texts":
        """Put prompts of one batch before the model; nothing is computed yet."""
        return _WholeTexts(model, prompts) if self is Way.WHOLE else _CachedTexts(model, prompts, self is Way.PADDED)

    def batches(self, model: Any, lengths: Sequence[int], rows: int) -> list[list[int]]:
        """Cut prompts of these lengths into batches of at most `rows` indices, shortest first; prompts that must not meet never do."""
        borders = rope_borders(text_config(model))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        parts = [list(part) for _, part in groupby(order, lambda i: lengths[i] if self is Way.EQUAL else bisect_left(borders, lengths[i]))]
        return [part[first : first + rows] for part in parts for first in range(0, len(part), rows)]


class _CachedTexts:
    """Texts whose earlier tokens the model keeps in a cache of its own making: families differ in its class and its name."""

    def __init__(self, model: Any, prompts: Sequence[Ids], padded: bool) -> None:
        self._decoder = decoder_of(unwrap(model))
        device = next(model.parameters()).device
        texts = [torch.from_numpy(ids.astype(np.int64)) for ids in prompts]
        # generation continues at the right edge of every row
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        self._ids_BS, mask_BS = pad(texts).to(device), pad([torch.ones_like(ids) for ids in texts]).to(device)
        self._padding = {"attention_mask": mask_BS, "position_ids": (mask_BS.cumsum(-1) - 1).clamp(min=0)} if padded else {}
        self._cache: dict[str, Any] = {}

    def last_hidden(self) -> Tensor:
        """Compute the (B, D) hidden states of the last token of each row."""
        output = self._decoder(input_ids=self._ids_BS, use_cache=True, **self._padding, **self._cache)
        self._cache = next(({name: cache} for name in _CACHES if (cache := getattr(output, name, None)) is not None), {})
        if not self._cache:
            raise ModelError(f"Model {type(self._decoder).__name__}: it returns no cache; compute each token from the whole text.")
        hidden_BD: Tensor = output.last_hidden_state[:, -1]
        return hidden_BD

    def extend(self, ids_B: Tensor, going: Sequence[int]) -> None:
        """Append one token to each row, and keep only the rows `going`."""
        keep = torch.tensor(going, dtype=torch.long, device=ids_B.device)
        if len(going) < len(ids_B):
            self._cache = select_rows(self._cache, keep, len(ids_B))
        self._ids_BS = ids_B[keep, None]
        if self._padding:
            mask_BS, positions_BS = self._padding["attention_mask"][keep], self._padding["position_ids"][keep]
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(keep), 1)], dim=1)
            self._padding = {"attention_mask": mask_BS, "position_ids": positions_BS[:, -1:] + 1}


class _WholeTexts:
    """Texts that are computed again for each token, as a scorer computes them: slow, and right for every model that can be scored."""

    def __init__(self, model: Any, prompts: Sequence[Ids]) -> None:
        device = next(model.parameters()).device
        self._model, self._rows = model, [torch.from_numpy(ids.astype(np.int64)).to(device) for ids in prompts]

    def last_hidden(self) -> Tensor:
        lengths = [len(ids) for ids in self._rows]
        positions_N = torch.cat([torch.arange(len(ids), device=ids.device) for ids in self._rows])
        ends_B = torch.tensor(lengths, device=positions_N.device).cumsum(0) - 1
        return row_hidden_states(self._model, torch.cat(self._rows), positions_N, lengths)[ends_B]

    def extend(self, ids_B: Tensor, going: Sequence[int]) -> None:
        self._rows = [torch.cat([self._rows[i], ids_B[i, None]]) for i in going]


Texts = _CachedTexts | _WholeTexts


def select_rows(state: Any, keep: Tensor, rows: int, dim: int = 0) -> Any:
    """Keep these rows of every tensor in a cache of `rows` rows: keys, values, states of convolutions and recurrences, whatever holds them.

    Raises:
        ModelError: a tensor does not have a row for each text.
    """
    if isinstance(state, Tensor):
        # what has fewer dimensions is a number of the layer, or keys that are not there yet
        if state.ndim < 2:
            return state
        if state.shape[dim] != rows:
            raise ModelError(
                f"Cache: it holds a tensor of shape {tuple(state.shape)}, expected {rows} rows; compute each token from the whole text."
            )
        return state[:, keep] if dim else state[keep]
    if isinstance(state, dict):
        # positions in time, height and width are (3, rows, length); by their name, since there may be three rows too
        dims = {name: int(str(name).endswith("position_ids") and getattr(part, "ndim", 0) == 3) for name, part in state.items()}
        return {name: select_rows(part, keep, rows, dims[name]) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return [select_rows(part, keep, rows) for part in state]
    if isinstance(state, Cache | CacheLayerMixin | LinearAttentionCacheLayerMixin):
        vars(state).update(select_rows(vars(state), keep, rows))
    return state
