"""Whether the phases of a run fit on a card, and what to change where one does not."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, final

from attrs import evolve, frozen

from lopd.errors import MissingDependencyError, ModelError
from lopd.records.checks import check_number, to_real
from lopd.tools.plan.live import Need
from lopd.tools.plan.memory import Use, sampling, scoring, training

#: Share of a card that a phase may take; it is what vLLM takes, too.
ROOM = 0.85
_RANK, _MOST_GPUS = 64, 64


@final
@frozen
class PhaseFit:
    """What one phase takes.

    Args:
        name: sampling, scoring or training.
        parts: 10^9 bytes by what they hold, when most are alive.
        unit: "rows", or "tokens_per_batch".
        most: the largest that fits; 0 if none does.
        fits: whether what was asked does.
    """

    name: str
    parts: Mapping[str, float]
    unit: str
    most: int
    fits: bool

    @property
    def gb(self) -> float:
        """10^9 bytes in all."""
        return sum(self.parts.values())


@final
@frozen
class Fit:
    """What a card has room for.

    Args:
        room_gb: 10^9 bytes that a phase may take.
        phases: one model at a time is on the card.
        advice: sentences on what to change; none where everything fits.
    """

    room_gb: float
    phases: tuple[PhaseFit, ...]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return all(phase.fits for phase in self.phases)


def fits(student: Any, use: Use | None = None, *, card_gb: float, teacher: Any = None) -> Fit:
    """Say what sampling from the student, scoring with the teacher and training the student take, with transformers as the engine of all three.

    Args:
        student: a transformers configuration.
        use: how it is used; the teacher is too, in the dtype that the student's layers compute in.
        card_gb: memory of the card, 10^9 bytes, of which 0.85 count.
        teacher: a transformers configuration; None leaves scoring out.

    Raises:
        InvalidRecordError: `card_gb` is not finite and more than 0; or as `training`.
        ArgumentError: a model is not a configuration.
        ContextOverflowError: rollouts are longer than the context of a model.
        ModelError: as `training`.
        MissingDependencyError: transformers is not installed, or peft where there are adapters.
    """
    use, card_gb = use or Use(), to_real("Fit", "card_gb", card_gb)
    check_number("Fit", "card_gb", card_gb, 0 < card_gb < math.inf, "finite and more than 0")
    room = ROOM * card_gb
    sampled = sampling(student, use)
    rows = sampled.most_rows(room)
    phases = [PhaseFit("sampling", sampled.gigabytes(use.rows), "rows", rows, use.rows <= rows)]
    if teacher is not None:
        phases.append(_by_tokens("scoring", scoring(teacher, evolve(use, dtype=use.autocast or use.dtype)), use, room))
    phases.append(_by_tokens("training", training(student, use, room), use, room))
    advice = [f"{phase.name}: {sentence}" for phase in phases if not phase.fits for sentence in _advice(phase, student, use, room)]
    return Fit(room, tuple(phases), tuple(advice))


def _by_tokens(name: str, needed: Need, use: Use, room: float) -> PhaseFit:
    tokens = needed.most_rows(room, use.length)
    most = tokens if tokens >= use.length else 0
    return PhaseFit(name, needed.gigabytes(use.rollouts), "tokens_per_batch", most, use.tokens_per_batch <= most)


def _advice(phase: PhaseFit, config: Any, use: Use, room: float) -> Iterator[str]:
    """Yield what would make it fit, the least change first."""
    if phase.most:
        yield f"{phase.unit}={phase.most} fits"
    found = False
    for changes in _changes(use) if phase.name == "training" else ():
        changed = evolve(use, **changes)
        try:
            other = _by_tokens("training", training(config, changed, room), changed, room)
        except (ModelError, MissingDependencyError):  # a family without checkpointing or adapters, or peft is not there
            continue
        if other.most:
            found = True
            tokens = min(use.tokens_per_batch, other.most)
            words = ", ".join(f"{name}={value}" for name, value in changes.items())
            yield f"{words} fits with tokens_per_batch={tokens}"
            if "gpus" in changes:
                break
    if not (phase.most or found):
        yield "take shorter rollouts, a smaller model or a larger card"


def _changes(use: Use) -> Iterator[dict[str, Any]]:
    again = {} if use.gradient_checkpointing else {"gradient_checkpointing": True}
    if again:
        yield again
    if not use.lora_rank:
        yield {**again, "lora_rank": _RANK, "dtype": use.autocast or use.dtype, "autocast": None}
    gpus = 2 * use.gpus
    while gpus <= _MOST_GPUS:
        yield {**again, "gpus": gpus}
        gpus *= 2
