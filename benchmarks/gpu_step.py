"""A training step of a random Qwen3-like model on a card: tokens a second, share of the card's rate, memory beside the planner's, and waits."""

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from attrs import frozen
from gpu_device import Device, Found, goal
from random_rollouts import fill, random_manifest
from roofline import MODELS, layer_flops
from transformers import AutoModelForCausalLM, Qwen3Config

import lopd.verbs.train
from lopd import CausalLMStudent, Chunking, FusedOPDLoss, MemoryStore, batches, opd_steps
from lopd.records import StepMetrics, TokenizerId
from lopd.tools.plan import ROOM, Use, training

_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_WARM_UP, _TIMED = 2, 3


@frozen
class Size:
    """What is trained: a configuration, and rollouts.

    Args:
        config: fields of the model's configuration.
        prompt, longest: tokens of each prompt, and of the longest response.
        tokens_per_batch: tokens of a micro-batch.
        rollouts_per_step: rollouts of a step.
    """

    config: Mapping[str, Any]
    prompt: int = 128
    longest: int = 1920
    tokens_per_batch: int = 16_384
    rollouts_per_step: int = 48

    @property
    def chunk_bytes(self) -> int:
        """Of 2,048 rows of logits, whatever memory is free."""
        return 4 * 2048 * int(self.config["vocab_size"])

    @classmethod
    def of(cls, model: str, device: Device) -> "Size":
        """Return the sizes of a model's own configuration, or of one that a processor trains in a second."""
        if device.tiny:
            return cls({**MODELS[model], **_TINY, "head_dim": 8, "vocab_size": 96}, 4, 28, 64, 4)
        return cls(MODELS[model])


def _attention(layout: str, device: Device) -> str | None:
    """Return the implementation that reads this layout; None where it does not exist."""
    if layout == "rows":
        return "sdpa"
    if not device.on_card:
        return None
    return "flash_attention_2" if find_spec("flash_attn") else "flex_attention"


def begin(size: Size, attention: str, device: Device) -> tuple[CausalLMStudent, Iterator[StepMetrics]]:
    """Make a student and the steps of its training."""
    torch.manual_seed(0)
    config = Qwen3Config(**size.config)
    with torch.device(device.name):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    words = TokenizerId("words", config.vocab_size, eos_id=1, bos_id=None, pad_id=0, template_hash="")
    store = MemoryStore(random_manifest(words, size.longest))
    fill(store, 2 * size.rollouts_per_step, size.prompt, size.longest, typical=size.longest / 4)
    student = CausalLMStudent(model, words, autocast=torch.bfloat16, gradient_checkpointing=True)
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-6)
    steps = batches(store, rollouts_per_step=size.rollouts_per_step, tokens_per_batch=size.tokens_per_batch, ref="behavior")
    return student, opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True, chunking=Chunking(size.chunk_bytes)), optimizer)


def flops(size: Size, tokens: float, response_tokens: float) -> float:
    """Count the operations of a step, without those that are computed again: layers also read prompts, and the head reads responses only."""
    head = 6 * size.config["hidden_size"] * size.config["vocab_size"] * response_tokens
    return layer_flops(size.config, round(tokens), round(tokens / size.rollouts_per_step)) + head


@contextmanager
def inside_steps(student: torch.nn.Module, switch: Callable[[bool], None]) -> Iterator[None]:
    """Call `switch(True)` before each forward of a step, and `switch(False)` after its last backward, where all that is told of it is fetched."""
    fetch = lopd.verbs.train._fetch

    def fetched(*arguments: Any, **named: Any) -> Any:
        switch(False)
        return fetch(*arguments, **named)

    handle = student.register_forward_pre_hook(lambda *_: switch(True))
    try:
        with patch.object(lopd.verbs.train, "_fetch", fetched):
            yield
    finally:
        handle.remove()
        switch(False)


def waits(student: CausalLMStudent, steps: Iterator[StepMetrics], device: Device) -> list[str] | None:
    """Return where the host waits for the card in the next step, from the first forward to the last backward; None without a card."""

    def switch(on: bool) -> None:
        if device.on_card:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")

    with warnings.catch_warnings(record=True) as found, inside_steps(student, switch):
        warnings.simplefilter("always")
        next(steps)
    # the mode announces itself, once a process, in words that are much the same
    waited = (warning for warning in found if "called a synchronizing" in str(warning.message))
    places = [f"{warning.filename}:{warning.lineno}" for warning in waited]
    return places if device.on_card else None


def train(model: str, layout: str, device: Device) -> Found:
    """Measure steps of this model, packed or in rows."""
    size, attention = Size.of(model, device), _attention(layout, device)
    row = {"model": model, "layout": layout, "attention": attention}
    if attention is None:
        return [{**row, "not_run": "FlashAttention and FlexAttention need a card"}], []
    use = Use(
        prompt_tokens=size.prompt,
        response_tokens=size.longest,
        tokens_per_batch=size.tokens_per_batch,
        gradient_checkpointing=True,
        packed=layout == "packed",
        chunk_bytes=size.chunk_bytes,
    )
    planned = sum(training(Qwen3Config(**size.config), use).gigabytes(use.rollouts).values())
    if device.on_card and planned > ROOM * (room := torch.cuda.get_device_properties(0).total_memory / 1e9):
        return [{**row, "planned_gb": planned, "not_run": f"planned to take {planned:.0f} GB, and the card has {room:.0f}"}], []
    student, steps = begin(size, attention, device)
    for _ in range(1 if device.tiny else _WARM_UP):
        next(steps)
    metrics, seconds = list[StepMetrics](), list[float]()
    for _ in range(1 if device.tiny else _TIMED):
        seconds.append(device.seconds(lambda: metrics.append(next(steps))))
    took = statistics.median(seconds)
    tokens, response_tokens = (statistics.median(getattr(m, name) for m in metrics) for name in ("read_tokens", "response_tokens"))
    peak, places = device.peak_gb(partial(next, steps)), waits(student, steps, device)
    row |= {"tokens": tokens, "seconds": took, "tokens_per_s": tokens / took, "peak_gb": peak, "planned_gb": planned, "waits": places}
    row |= {"flop_utilisation": flops(size, tokens, response_tokens) / took / device.card.bfloat16} if device.card else {}
    if peak is None or places is None:
        return [row], []
    memory = f"planned memory over measured, {model}, {layout}"
    return [row], [
        goal(memory, "0.85 to 1.15", planned / peak, abs(planned / peak - 1) <= 0.15),
        goal(f"waits for the card between a step's first forward and last backward, {model}, {layout}", "0", len(places), not places),
    ]
