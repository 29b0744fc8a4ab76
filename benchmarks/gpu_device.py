"""What the parts of `gpu.py` share: a device with a clock and a count of bytes, and rows and goals of the result."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from attrs import frozen
from roofline import CARDS, Card

Row = dict[str, Any]


@frozen
class Device:
    """Where a part runs.

    Args:
        name: "cuda" or "cpu".
        tiny: sizes that a processor computes in a second.
    """

    name: str
    tiny: bool

    @property
    def on_card(self) -> bool:
        """Whether it has a clock and a count of its own."""
        return self.name.startswith("cuda")

    @property
    def card(self) -> Card | None:
        """Its maker's figures, if they are known here."""
        name = torch.cuda.get_device_name() if self.on_card else ""
        return next((card for known, card in CARDS.items() if known in name), None)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return how long the call keeps the device busy."""
        if not self.on_card:
            begun = perf_counter()
            call()
            return perf_counter() - begun
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_gb(self, call: Callable[[], Any]) -> float | None:
        """Return the peak of allocated 10^9 bytes while the call runs; None where nothing counts them."""
        if not self.on_card:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9


def in_turns(device: Device, calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, after one turn that warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            seconds = device.seconds(call)
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def goal(name: str, wanted: str, measured: Any, met: bool) -> Row:
    """Return one line of the goals."""
    return {"name": name, "goal": wanted, "measured": measured, "met": bool(met)}


#: What a part gives: rows and goals.
Found = tuple[list[Row], list[Row]]


def worst(values: Sequence[float]) -> float:
    """Return the largest value; 0 for an empty list."""
    return max(values, default=0.0)
