"""A training step of a random Qwen3-like model on a card: tokens a second, share of the card's rate, memory beside the planner's, and waits."""

import statistics
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from attrs import frozen
from gpu_device import Device, Found, goal
from random_rollouts import fill, random_manifest
from roofline import MODELS, layer_flops
from transformers import AutoModelForCausalLM, Qwen3Config

from lopd import CausalLMStudent, Chunking, FusedOPDLoss, MemoryStore, batches, opd_steps
from lopd.records import StepMetrics, TokenizerId
from lopd.tools.plan import ROOM, Use, training

_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_WARM_UP, _TIMED = 2, 3


@frozen
class Size:
    """What is trained: a configuration, and rollouts.

    Args:
        config: of the model.
        prompt, longest: tokens of each prompt, and of the longest response.
        tokens_per_batch: of a micro-batch.
        rollouts_per_step: of a step.
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
        """Of a model's own configuration, or one that a processor trains in a second."""
        if device.tiny:
            return cls({**MODELS[model], **_TINY, "head_dim": 8, "vocab_size": 96}, 4, 28, 64, 4)
        return cls(MODELS[model])


def _attention(layout: str, device: Device) -> str | None:
    """The implementation that reads this layout; None where there is none."""
    if layout == "rows":
        return "sdpa"
    if not device.on_card:
        return None
    return "flash_attention_2" if find_spec("flash_attn") else "flex_attention"


def _steps(size: Size, attention: str, device: Device) -> Iterator[StepMetrics]:
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
    return opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True, chunking=Chunking(size.chunk_bytes)), optimizer)


def train(model: str, layout: str, device: Device) -> Found:
    """Steps of this model, packed or in rows."""
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
    steps = _steps(size, attention, device)
    for _ in range(1 if device.tiny else _WARM_UP):
        next(steps)
    metrics, seconds = list[StepMetrics](), list[float]()
    for _ in range(1 if device.tiny else _TIMED):
        seconds.append(device.seconds(lambda: metrics.append(next(steps))))
    took = statistics.median(seconds)
    tokens = statistics.median(m.read_tokens for m in metrics)
    head = 6 * size.config["hidden_size"] * size.config["vocab_size"] * tokens
    flops = layer_flops(size.config, tokens, round(tokens / size.rollouts_per_step)) + head
    peak = device.peak_gb(partial(next, steps))
    row |= {"tokens": tokens, "seconds": took, "tokens_per_s": tokens / took, "peak_gb": peak, "planned_gb": planned}
    row |= {"flop_utilisation": flops / took / device.card.bfloat16} if device.card else {}
    if peak is None:
        return [row], []
    name = f"planned memory over measured, {model}, {layout}"
    return [row], [goal(name, "0.85 to 1.15", planned / peak, abs(planned / peak - 1) <= 0.15)]


def synchronisations(device: Device) -> Found:
    """How often the host waits for the card in a step, from the third on, and where."""
    row: dict[str, Any] = {"model": "Qwen3-0.6B", "layout": "rows"}
    steps = _steps(Size.of(row["model"], device), "sdpa", device)
    for _ in range(_WARM_UP):
        next(steps)
    if not device.on_card:
        next(steps)
        return [{**row, "not_run": "only a card has something to wait for"}], []
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        next(steps)
    torch.cuda.set_sync_debug_mode("default")
    places = [f"{warning.filename}:{warning.lineno}" for warning in found if "synchroniz" in str(warning.message)]
    return [{**row, "places": places}], [goal("waits for the card in a step", "0", len(places), not places)]
