"""The probe of decoding: which way of continuing texts gives what the whole model gives for each text alone.

Shape suffixes: B rows, P positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd.engines.borders import goes_by_place, stated_borders
from lopd.engines.causal_lm import context_length, evaluating, hidden_states, lm_head, rope_borders, text_config, unwrap
from lopd.engines.hf.texts import Texts, Way
from lopd.engines.probes import refusal
from lopd.engines.structure import is_exact, once
from lopd.errors import ModelWarning
from lopd.records.steps import LMHead
from lopd.records.warn import warn_user

_STEPS, _SMALL = 9, 64
_NO_LIMIT = (0.0, math.inf)


def check_sampling(model: Any, vocab_size: int, *, warn: bool = True) -> Way:
    """Find the first way of decoding that is right: for one row, for rows of unlike length, after rows left, beyond windows and rope borders.

    A few short forwards, once for models of one structure.

    Args:
        model: to be decoded.
        vocab_size: ids of the tokenizer.
        warn: where the way is slow.

    Warns:
        ModelWarning: no cache is right, so each token will be computed from the whole text.

    Raises:
        ModelError: no way is right.
    """
    way, causes = once(("sampling", vocab_size), model, lambda: _first_right(model, vocab_size))
    if warn and way is Way.WHOLE:
        text = f"{causes[-1]}, so each token is computed from the whole text, which is right but slow; sample with vLLM where you can."
        warn_user(f"Model {type(unwrap(model)).__name__}: {text}", ModelWarning)
    return way


@torch.no_grad()
def _first_right(model: Any, vocab_size: int) -> tuple[Way, list[str]]:
    """Return the first way that is right, and why those before it are not."""
    causes: list[str] = []
    for way in Way:
        with evaluating(model):
            cause = _what_is_wrong(model, vocab_size, way)
        if cause is None:
            return way, causes
        causes.append(cause)
    raise refusal(model, "sampling", causes[-1])


def _what_is_wrong(model: Any, vocab_size: int, way: Way) -> str | None:
    """Return why this way is not right for the model, or None where it is."""
    if way is not Way.WHOLE and any(tuple(getattr(m, "time_step_limit", _NO_LIMIT)) != _NO_LIMIT for m in unwrap(model).modules()):
        # whether a text shows it depends on its tokens, so a few forwards need not find it
        return f"decoding {way.value} leaves out the limits of Mamba's time step"
    if way is Way.PADDED and goes_by_place(model, packed=False):
        return f"decoding {way.value} counts the padding in the temperature of attention"
    exact = is_exact(model)
    try:
        distances = list(_distances(model, vocab_size, way))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a family raises that has no such cache, or other arguments, can be anything
        reason = str(error).partition("\n")[0].partition(";")[0]
        return f"decoding {way.value} ends in {type(error).__name__} ({reason:.160})"
    # where rounding is coarse, it can send one token to another expert
    gap = max(max(of_text) if exact else sum(of_text) / len(of_text) for of_text in distances)
    tolerance = 1e-4 if exact else 0.1
    # without a cache the forwards are those of scoring, whose probe has judged them, so what is finite is rounding
    if gap <= tolerance or (way is Way.WHOLE and not exact and math.isfinite(gap)):
        return None
    return f"decoding {way.value} gives other log-probs (by {gap:.2g} of their spread, expected at most {tolerance:.2g})"


def _distances(model: Any, vocab_size: int, way: Way) -> Iterator[list[float]]:
    """Yield for each text how far its log-probs in a batch are from those alone, token by token."""
    head = lm_head(model, vocab_size).float()
    # half of a context that is short, so that there are prompts before them
    steps = min(_STEPS, context_length(model) // 2)
    lengths = [n for n in _lengths(model, steps) for _ in range(2 if way is Way.EQUAL else 1)]
    texts = [_text(model, n, steps, i, vocab_size) for i, n in enumerate(lengths)]
    alone = [head.logits(hidden_states(model, ids[None])[0, n - 1 :]).log_softmax(-1) for n, ids in zip(lengths, texts, strict=True)]
    for batch in [[len(lengths) // 2], *way.batches(model, lengths, len(lengths))]:
        running = way.begin(model, [texts[i][: lengths[i]].cpu().numpy() for i in batch])
        yield from _side_by_side(running, head, [texts[i][lengths[i] :] for i in batch], [alone[i] for i in batch])


def _side_by_side(running: Texts, head: LMHead, forced: list[Tensor], alone: list[Tensor]) -> list[list[float]]:
    """Continue each text by its own next tokens, and compare each step with the text alone; rows leave on the way, and one stays."""
    seen: list[list[float]] = [[] for _ in alone]
    rows = list(range(len(alone)))
    for step in range(min(_STEPS if len(alone) > 1 else 3, len(forced[0]))):
        for i, logprobs_V in zip(rows, head.logits(running.last_hidden()).log_softmax(-1), strict=True):
            seen[i].append(_distance(logprobs_V, alone[i][step]))
        # after every second token one leaves, the first or one amid the others
        going = [k for k in range(len(rows)) if step % 2 == 0 or len(rows) == 1 or k != step // 2 % len(rows)]
        running.extend(torch.stack([forced[i][step] for i in rows]), going)
        rows = [rows[k] for k in going]
    return seen


def _distance(logprobs_V: Tensor, alone_V: Tensor) -> float:
    """Return root mean square difference as a share of the spread over the vocabulary; ids that both rule out agree."""
    if alone_V.isnan().any():
        return 0.0  # sampling refuses such a token by the name of its rollout
    both_V = (logprobs_V == -torch.inf) & (alone_V == -torch.inf)
    difference_V = (logprobs_V - alone_V).masked_fill(both_V, 0.0)
    share = float(difference_V.square().mean().sqrt() / alone_V[alone_V.isfinite()].std().clamp(min=1e-3))
    return math.inf if math.isnan(share) else share


def _lengths(model: Any, steps: int) -> list[int]:
    """Return prompt lengths that are short, that end before each window and rope border, and that begin behind them; none crosses a rope border."""
    borders = stated_borders(model)
    # each small one, and of the large ones that with the longest forward
    around = {n for size in borders if size <= _SMALL or size == borders[-1] for n in (size - steps // 2, size + 2)}
    fitting = {n for n in {1, 2, 3, 5, 7} | around if 0 < n <= context_length(model) - steps}
    return sorted(n for n in fitting if not any(n <= border < n + steps for border in rope_borders(text_config(model))))


def _text(model: Any, length: int, steps: int, place: int, vocab_size: int) -> Tensor:
    """Return (length + steps,) ids, usual and special ones: families that find padding by its id compute something else on a text that has it."""
    config = text_config(model)
    ids = np.random.default_rng(place).integers(vocab_size, size=length + steps)
    special = [i for name in ("pad_token_id", "eos_token_id") if isinstance(i := getattr(config, name, None), int) and 0 <= i < vocab_size]
    ids[length - 1 : length - 1 + len(special)] = special[: steps + 1]
    return torch.from_numpy(ids).to(next(model.parameters()).device)
