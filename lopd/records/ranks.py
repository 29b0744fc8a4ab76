"""The processes that train one student together, as torch.distributed has them; a process on its own is rank 0 of 1."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lopd.errors import InvalidRecordError, LopdError, ModelError
from lopd.records.checks import own_numbers

_Item = TypeVar("_Item")


@frozen
class Ranks:
    """Which of how many.

    Args:
        rank: 0 up to `size`.
        size: processes that each train on their share of a step.

    Raises:
        InvalidRecordError: there is no such rank, or one of them is not a whole number.
    """

    rank: int = 0
    size: int = 1

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Ranks")
        if not 0 <= self.rank < self.size:
            raise InvalidRecordError(f"Ranks: (rank, size) is {(self.rank, self.size)}, expected 0 <= rank < size; count from 0.")

    @classmethod
    def current(cls) -> "Ranks":
        """Return the ranks of the default process group; without a group, this process alone."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def sum(self, values: Tensor) -> Tensor:
        """Return each value summed over the ranks; every rank must call."""
        if self.size == 1:
            return values
        # objects travel whatever backend there is, where NCCL knows no memory but a GPU's; one order of adding, so the same bits on each rank
        return reduce(torch.add, self.gather([values.cpu()])).to(values.device)

    def gather(self, mine: list[_Item]) -> list[_Item]:
        """Return what all ranks have, in the order of ranks; every rank must call."""
        if self.size == 1:
            return mine
        parts: list[list[_Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, mine)
        return list(chain.from_iterable(parts))

    def each(self, act: Callable[[], _Item]) -> list[_Item]:
        """Return what this gives on each rank, in the order of ranks; every rank must call, and raises the first error that one of them met.

        Raises:
            LopdError: whichever the action raised.
        """
        mine: list[_Item | LopdError] = []
        try:
            mine.append(act())
        except LopdError as error:
            if self.size == 1:
                raise
            mine.append(error)
        found: list[_Item] = []
        for answer in self.gather(mine):
            if isinstance(answer, LopdError):
                raise answer
            found.append(answer)
        return found

    def first(self, act: Callable[[], None]) -> None:
        """Let rank 0 act; every rank must call, and goes on when that is done, or raises the error that rank 0 met.

        Raises:
            LopdError: whichever the action raised.
        """
        self.each(act if self.rank == 0 else lambda: None)


def peeled(wrapped: Any, parallel: type[Any] | tuple[type[Any], ...] = DistributedDataParallel) -> Iterator[Any]:
    """Yield a student or a model with each wrapper around it, the outermost first: that of torch.compile, and these of data parallelism."""
    yield wrapped
    if "_orig_mod" in getattr(wrapped, "_modules", ()):  # its attribute shows through a model of peft
        yield from peeled(wrapped._orig_mod, parallel)
    elif isinstance(wrapped, parallel):
        yield from peeled(wrapped.module, parallel)


def inner(student: Any) -> Any:
    """Return the student inside DistributedDataParallel and torch.compile, in any order, or the student itself."""
    *_, own = peeled(student)
    return own


def summing(student: Any) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel that sums the gradients of a student over ranks, be it compiled, or None."""
    return next((layer for layer in peeled(student) if isinstance(layer, DistributedDataParallel)), None)


def bare(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside what accelerate prepared, or the optimizer itself; other wrappers may compute something of their own."""
    inside = getattr(optimizer, "optimizer", None) if type(optimizer).__module__.startswith("accelerate.") else None
    return inside if isinstance(inside, Optimizer) else optimizer


def check_summed(student: Any, ranks: Ranks) -> None:
    """Refuse a student of several ranks that go apart, because nothing sums their gradients, and a wrapper that would lose them.

    Raises:
        ModelError: it is neither in DistributedDataParallel nor sharded; or in a way in which torch looks for tensors in its output and finds none.
    """
    own, parallel = inner(student), summing(student)
    name = type(own).__name__
    if parallel is not None:
        if option := next((option for option in ("static_graph", "find_unused_parameters") if getattr(parallel, option)), None):
            raise ModelError(
                f"Student {name}: its DistributedDataParallel has {option}=True, which finds no tensor in a `LossOutput`; freeze what gets no "
                "gradient, and leave the option out."
            )
        return
    if ranks.size == 1 and not (isinstance(own, torch.nn.Module) and sharded(own)):
        return
    from torch.distributed.fsdp import FSDPModule  # a second of imports that one process has no use for

    if ranks.size > 1 and not isinstance(own, FSDPModule):
        raise ModelError(
            f"Student {name}: it is trained by {ranks.size} ranks and nothing sums its gradients; wrap it in DistributedDataParallel, or call "
            "`fully_shard` on each layer and then on it, before `opd_steps`."
        )
    prepare_sharded(own)


def prepare_sharded(student: torch.nn.Module) -> None:
    """Keep what FSDP2 shards with the student, and in no layer, gathered until the backward pass; refuse one that is sharded as one.

    Raises:
        ModelError: no gradient would reach its weights.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(student, FSDPModule):
        return
    # FSDP2 learns of a backward pass from tensors that its modules gave, and finds those of layers
    if sum(isinstance(module, FSDPModule) for module in student.modules()) == 1:
        raise ModelError(
            f"Student {type(student).__name__}: it is sharded as one, and would get no gradient; call `fully_shard` on each layer first, and then on "
            "the student."
        )
    # the backward pass would read freed memory
    student.set_reshard_after_forward(False, recurse=False)


def gathering(student: Any, *, last: bool) -> AbstractContextManager[None]:
    """Return where gradients of a micro-batch are made; DistributedDataParallel sums them over ranks once, with the last."""
    return nullcontext() if last or (parallel := summing(student)) is None else parallel.no_sync()


def sharded(module: torch.nn.Module) -> bool:
    """Return whether this rank holds only a part of some parameter."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together, on every rank; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return these put together one after the other, in the memory of rank 0's CPU; nothing on other ranks, which must call all the same."""
    first, found = Ranks.current().rank == 0, {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if first:
            found[name] = together.cpu().contiguous()
    return found


def alike(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded as this one is, or as it is if that one is whole."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)  # noqa: S101 (what else has a `full_tensor`)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
