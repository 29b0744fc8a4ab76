"""The random states of all ranks in a checkpoint: dropout goes on, on each rank, with what it would have drawn there."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor

from lopd.protocols import Student
from lopd.records.ranks import Ranks

#: The state of rank 0, which is all that older checkpoints have; that of rank 3 has ".3" behind it.
RNG, _CUDA = "rng.cpu", "rng.cuda"


def random_states(student: Student) -> dict[str, Tensor]:
    """Return the states of all ranks by name, of the CPU and of the GPUs that hold parameters; every rank must call."""
    cards = _cards(student)
    mine = {RNG: torch.get_rng_state()} | ({_CUDA: torch.stack([torch.cuda.get_rng_state(card) for card in cards])} if cards else {})
    return {_of(name, rank): state for rank, states in enumerate(Ranks.current().gather([mine])) for name, state in states.items()}


def restore_random(student: Student, saved: Mapping[str, Tensor]) -> None:
    """Draw on from this rank's state; what has none there, as of another number of ranks, is seeded by that of rank 0."""
    ranks, cards = Ranks.current(), _cards(student)
    torch.manual_seed(int(sha256(saved[RNG].numpy().tobytes() + str(ranks.rank).encode()).hexdigest()[:15], 16))
    if ranks.rank > 0 and sum(name.startswith(RNG) for name in saved) != ranks.size:
        return
    torch.set_rng_state(saved[_of(RNG, ranks.rank)])
    for card, state in zip(cards, saved.get(_of(_CUDA, ranks.rank), ()), strict=False):
        torch.cuda.set_rng_state(state, card)


def _of(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def _cards(student: Student) -> list[torch.device]:
    return [*dict.fromkeys(p.device for _, p in student.named_parameters() if p.is_cuda)]
