"""Probes of a model: short forwards that show whether lopd computes what the model itself does, whatever its class.

Each ability has its own: `check_scoring` (rollouts in rows) and `check_training` (packed).  A source adds one for decoding.

Shape suffixes: N tokens, D hidden size, V vocabulary, S positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.engines.borders import goes_by_place, stated_borders
from lopd.engines.causal_lm import (
    attention_of,
    context_length,
    evaluating,
    knows_lengths,
    lm_head,
    packed_hidden_states,
    row_hidden_states,
    unwrap,
)
from lopd.engines.conditions import check_causal_lm, embeddings_kept, keep_caps, randomly, recompute_plainly, warn_of_bfloat16
from lopd.engines.structure import is_exact, once
from lopd.errors import LopdError, ModelError

_PROBE_IDS = (1, 2, 3, 5, 8, 13, 21)
_ENDS = 16
_Hidden = Callable[[Any, Tensor, Tensor, Sequence[int]], Tensor]
# models whose weights gave numbers; whoever computes with them reports what makes them NaN later
_finite: WeakSet[Any] = WeakSet()


def check_scoring(model: Any, vocab_size: int) -> None:
    """Compare the model cut below its head with the whole model, and rollouts in one batch with each alone.

    This finds what no list of model classes can: another scale or cap on the logits, a model that looks ahead, a result that depends on what
    shares the batch, also beyond a window or a rope border.  A few short forwards, once for models of one structure.

    Warns:
        ModelWarning: its attention was set to "eager", since it drops a cap on attention scores; its card has no bfloat16, in which it computes; or
            DataParallel is around it, and has several cards, of which one computes.

    Raises:
        ModelError: the model cannot be scored here; it names the cause and the next step.
    """
    probe = _prepare(model, vocab_size, "scoring")
    once(("scoring", vocab_size), model, lambda: _check(probe))


def check_training(model: Any, vocab_size: int, autocast: torch.dtype | None = None) -> _Hidden:
    """Return `check_scoring` for rollouts that are packed as a student packs them, and once more in training mode and in the student's autocast.

    A model that recomputes does so in torch's other form afterwards, if it was the reentrant one.

    Returns:
        The first way that is right: packed, or, for a hybrid whose other layers know no lengths and for Llama 4, each rollout in a row of its own.

    Warns:
        ModelWarning: that of `check_scoring`.

    Raises:
        ModelError: the model cannot be trained here; it names the cause and the next step.
    """
    probe = _prepare(model, vocab_size, "training", autocast)
    recompute_plainly(model)
    return once(("training", vocab_size, autocast), model, lambda: _find_way(probe, autocast))


def _find_way(probe: "_Probe", autocast: torch.dtype | None) -> _Hidden:
    if knows_lengths(probe.model) and not goes_by_place(probe.model, packed=True):
        with suppress(ModelError):
            _check_training(evolve(probe, hidden=packed_hidden_states), autocast)
            return packed_hidden_states
    _check_training(probe, autocast)
    return row_hidden_states


def _check_training(probe: "_Probe", autocast: torch.dtype | None) -> None:
    _check(probe)
    model = probe.model
    with torch.no_grad(), evaluating(model), randomly(model), refusing(model, "training", _step(probe)), probe.precision():
        ids_S = probe.rows()[0]
        probe.check_mode(ids_S)
        if probe.hidden is packed_hidden_states:
            _check_apart(probe)
        with refusing(model, "training", "leave out `autocast`"), evolve(probe, autocast=autocast).precision():
            probe.cut([ids_S])


@torch.enable_grad()
def _check_apart(probe: "_Probe") -> None:
    """Check that nothing of a packed rollout reaches the next one: what is too small to see with these weights is not with others."""
    ids_S = probe.rows()[-1][: len(_PROBE_IDS)]
    with embeddings_kept(probe.model) as embedded:
        reached = torch.autograd.grad(probe.cut([ids_S, ids_S])[len(ids_S) :].logsumexp(-1).sum(), embedded)
    if any(bool(part.reshape(2, len(ids_S), -1)[0].any()) for part in reached):
        probe.refuse("a packed rollout reaches the next one")


def _prepare(model: Any, vocab_size: int, ability: str, autocast: torch.dtype | None = None) -> "_Probe":
    """Return what has to be looked at in each model: its attention, its head, and whether its weights are numbers."""
    probe = _Probe(model, vocab_size, ability)
    with refusing(model, ability):
        check_causal_lm(model)
        keep_caps(model)
        warn_of_bfloat16(model, autocast)
        lm_head(model, vocab_size)
    if _lacks_16_bits(probe):  # all probes of a student are in its autocast
        probe = evolve(probe, autocast=autocast)
    if unwrap(model) not in _finite:
        with torch.no_grad(), evaluating(model), refusing(model, ability, _step(probe)), probe.precision():
            probe.check_finite(probe.cut(probe.rows()[:1]))
        _finite.add(unwrap(model))
    return probe


def _check(probe: "_Probe") -> None:
    with torch.no_grad(), evaluating(probe.model), refusing(probe.model, probe.ability, _step(probe)), probe.precision():
        rows = probe.rows()
        alone = [probe.whole(ids) for ids in rows]
        longest_SV = probe.cut(rows[-1:])
        probe.check_head(longest_SV, alone[-1])
        probe.check_order(rows[-1], longest_SV)
        together = probe.cut(rows).split([len(logits_SV) for logits_SV in alone])
        for place in range(len(rows)):
            probe.check_alone(rows, place, together[place], alone[place])


@frozen(eq=False)
class _Probe:
    """One model, one ability, and how it computes hidden states for it."""

    model: Any
    vocab_size: int
    ability: str
    hidden: _Hidden = row_hidden_states
    autocast: torch.dtype | None = None

    def precision(self) -> torch.autocast:
        """Return what the forwards of this probe compute in."""
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    @property
    def _exact(self) -> bool:
        """Whether products are in float32 or better."""
        return self.autocast is None and is_exact(self.model)

    def rows(self) -> list[Tensor]:
        """Return two short rollouts, and one beyond each window, chunk and rope border if that is cheap; the longest comes last."""
        context, device = context_length(self.model), next(self.model.parameters()).device
        lengths = {min(n, context) for n in (3, len(_PROBE_IDS), max(stated_borders(self.model), default=0) + 2)}
        ids = [_PROBE_IDS[i % len(_PROBE_IDS)] + i // len(_PROBE_IDS) for i in range(max(lengths))]
        return [torch.tensor(ids[:length], device=device) % self.vocab_size for length in sorted(lengths)]

    def cut(self, rows: Sequence[Tensor]) -> Tensor:
        """Return (N, V) logits of the cut model for rollouts that share a batch, at both ends of each."""
        positions_N = torch.cat([torch.arange(len(ids), device=ids.device) for ids in rows])
        lengths = [len(ids) for ids in rows]
        hidden_ND = self.hidden(self.model, torch.cat(list(rows)), positions_N, lengths)
        return lm_head(self.model, self.vocab_size).logits(torch.cat([_ends(part_SD) for part_SD in hidden_ND.split(lengths)]))

    def whole(self, ids_S: Tensor) -> Tensor:
        """Return (S, V) logits of the whole model for one rollout alone, at both ends, without the autocast that `accelerate` puts around a model."""
        forward = getattr(self.model, "_original_forward", self.model)
        return _ends(forward(input_ids=ids_S[None], use_cache=False).logits[0])[:, : self.vocab_size].float()

    def check_head(self, cut_NV: Tensor, whole_NV: Tensor) -> None:
        """Check that the cut model's logits are the model's own: slope 1, offset 0, and nothing left over.

        Both come from forwards of one shape, so in half precision too they differ by the rounding of a few products, and a regression over
        all of them sees a scale that the largest difference would hide.
        """
        possible_NV = cut_NV != -torch.inf
        if not torch.equal(possible_NV, whole_NV != -torch.inf):
            self.refuse("it rules out tokens that its head does not")
        cut_N, whole_N = cut_NV[possible_NV].double(), whole_NV[possible_NV].double()
        self.check_finite(cut_N, whole_N)
        slope, offset = _fit(cut_N, whole_N)
        size, (fine, coarse) = float(whole_N.abs().max()), self.tolerances
        rest = float((whole_N - slope * cut_N - offset).abs().max())
        if rest > coarse * max(size, 1e-6):
            gap = float((whole_N - cut_N).abs().max())
            self.refuse(
                f"its logits differ by {gap:.3g} from those of its head on the states of its decoder (another cap, or a layer between)"
            )
        if abs(slope - 1) > fine or abs(offset) > fine * size:
            self.refuse(f"its logits are {slope:.5g} times those of its head plus {offset:.3g}, by no field that lopd knows")

    def check_finite(self, *logits: Tensor) -> None:
        """Refuse logits that are NaN or plus infinity; minus infinity is a token that the head rules out."""
        if any(bool((part.isnan() | (part == torch.inf)).any()) for part in logits):
            self.refuse("its logits are not finite", "check its weights, or load it in another dtype")

    def check_order(self, ids_S: Tensor, cut_SV: Tensor) -> None:
        """Check that a later token does not change the logits of an earlier one."""
        changed_S = ids_S.clone()
        changed_S[-1] = (changed_S[-1] + 1) % self.vocab_size
        if not self.same(self.cut([changed_S])[:-1], cut_SV[:-1]):
            self.refuse("a later token changes the logits of an earlier one", "load it with `is_decoder=True`, or use a causal LM")

    def check_alone(self, rows: Sequence[Tensor], place: int, together_SV: Tensor, alone_SV: Tensor) -> None:
        """Check that a rollout in a batch has the logits that it has alone; the cause of a difference is looked for only if there is one."""
        if self.same(together_SV, alone_SV):
            return
        others = [ids if i == place else (ids + 1) % self.vocab_size for i, ids in enumerate(rows)]
        with_others_SV = self.cut(others).split([len(_ends(ids)) for ids in rows])[place]
        if not self.same(with_others_SV, together_SV):
            self.refuse("rollouts of a batch see each other")
        self.refuse(
            f"a rollout of {len(rows[place])} tokens has other logits beside one of {len(rows[-1])} than alone (padding or positions)"
        )

    def check_mode(self, ids_S: Tensor) -> None:
        """Check that in training mode the model computes the same function, dropout apart, and has a gradient."""
        eval_SV = self.cut([ids_S])
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad][:1]
        self.model.train()
        torch.clear_autocast_cache()  # of weights that were cast without gradients
        with torch.set_grad_enabled(bool(trained)):
            first_SV = self.cut([ids_S])
            if trained:
                torch.autograd.grad(first_SV.sum(), trained, allow_unused=True)
        if not self.same(first_SV, eval_SV) and self.same(self.cut([ids_S]), first_SV):
            self.refuse("in training mode its logits are others than in eval mode, and not by chance")

    def same(self, left_SV: Tensor, right_SV: Tensor) -> bool:
        """Return whether logits of two forwards agree, to the rounding of forwards of unlike shape."""
        finite_SV = right_SV != -torch.inf
        if not torch.equal(left_SV != -torch.inf, finite_SV):
            return False
        gap_N, size_N = (left_SV - right_SV)[finite_SV], right_SV[finite_SV]
        if gap_N.numel() == 0:
            return True
        if self._exact:
            return bool(gap_N.abs().max() <= self.tolerances[1] * max(float(size_N.abs().max()), 1e-6))
        # rounding adds up over layers, and the largest of many errors does not measure it
        return bool(gap_N.square().mean().sqrt() <= 6e-2 * max(float(size_N.square().mean().sqrt()), 1e-6))

    @property
    def tolerances(self) -> tuple[float, float]:
        """Of slope and offset, and of what a regression leaves over, in shares of the largest logit."""
        return (1e-4, 3e-4) if self._exact else (4e-3, 2e-2)

    def refuse(self, cause: str, step: str | None = None) -> None:
        """Raise the refusal of this ability."""
        raise refusal(self.model, self.ability, cause, step)


_STEPS = {
    "sampling": "sample with vLLM (`lopd.engines.vllm`); it may still be scored and trained here",
    "scoring": "score with vLLM (`lopd.engines.vllm`)",
    "training": "train another model",
}


def _lacks_16_bits(probe: _Probe) -> bool:
    """Return whether FlashAttention, which takes 16 bits alone, is given the float32 of the weights."""
    return probe.autocast is None and "flash" in attention_of(probe.model) and next(probe.model.parameters()).dtype == torch.float32


def _step(probe: _Probe) -> str | None:
    """Return what helps where a forward raises; None where that is not known."""
    other = "or pass `autocast=torch.bfloat16`" if probe.ability == "training" else "which a student with autocast can use too"
    return f'load it with `attention="sdpa"`, {other}' if _lacks_16_bits(probe) else None


def refusal(model: Any, ability: str, cause: str, step: str | None = None) -> ModelError:
    """Return the error that states what a model cannot do here, why, and what to do instead."""
    return ModelError(f"Model {type(unwrap(model)).__name__}: {ability} is not possible here, because {cause}; {step or _STEPS[ability]}.")


@contextmanager
def refusing(model: Any, ability: str, step: str | None = None) -> Iterator[None]:
    """Turn whatever a model raises into the refusal of an ability."""
    try:
        yield
    except (LopdError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "it gives no reason").splitlines()[0].rstrip(".")
        raise refusal(model, ability, f"it raises {type(error).__name__} ({reason[:300]})", step) from error


def _ends(values_S: Tensor) -> Tensor:
    """Return the first and the last rows of a long tensor, or all of a short one: logits of all would take more memory than the model."""
    return values_S if len(values_S) <= 2 * _ENDS else torch.cat([values_S[:_ENDS], values_S[-_ENDS:]])


def _fit(cut_N: Tensor, whole_N: Tensor) -> tuple[float, float]:
    """Return slope and offset of the least squares line; slope 1 where the logits are all alike."""
    centred_N = cut_N - cut_N.mean()
    spread = float(centred_N.square().sum())
    slope = float((centred_N * whole_N).sum()) / spread if spread > 1e-12 else 1.0
    return slope, float(whole_N.mean() - slope * cut_N.mean())
