"""What a phase needs of a card, counted on the code that will run, from a configuration alone; weights are not read or made.

Every phase is run on tensors that have a size and no numbers (torch's fake tensors), with as many rows as are asked for and with one more, and
the bytes that are alive are counted after each operation.  In training and scoring attention is taken to keep no scores, as FlashAttention and
torch's own do; a model that has another needs more.  What a card holds besides (contexts, workspace of kernels, fragments) has the share of it that
is left free.

Shape suffixes: B rows, S positions, N tokens, M tokens that count, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.engines.causal_lm import candidate_logprobs, context_length, evaluating, hidden_states, lm_head, recompute_layers, text_config
from lopd.engines.conditions import check_trained_dtype
from lopd.errors import ContextOverflowError, ModelError
from lopd.losses.chunking import sum_dtype
from lopd.records.checks import check_number, own_numbers
from lopd.records.manifest import SamplingParams
from lopd.records.optional import need
from lopd.records.steps import LMHead
from lopd.tools.plan.following import ATTENTION, Phase, count, empty, layers_of
from lopd.tools.plan.live import LiveBytes, Need, Stretch, chunk_size

if TYPE_CHECKING:
    from lopd.engines.hf.texts import Texts, Way

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@final
@frozen(kw_only=True)
class Use:
    """How a model is used on a card.

    Args:
        prompt_tokens, response_tokens: lengths of the longest rollout.
        rows: responses that transformers samples side by side (`HFSource.rows_per_batch`).
        tokens_per_batch: tokens of a micro-batch, padding included, in scoring and in training.
        rows_per_chunk: response tokens whose logits a scorer holds at once.
        chunk_bytes: bytes of the buffer of logits in training (`Chunking.chunk_bytes`).  None is what the losses take on a card: 4,096 rows, or fewer
            where little is free; a batch fits if there is room for 2,048.
        dtype: type of the weights.
        autocast: what layers compute in while they are trained; None for the dtype of the weights.
        lora_rank: rank of adapters on all linear layers but the head (`lora_config`); 0 trains all weights.
        gradient_checkpointing: activations are computed again.
        packed: a micro-batch is one row (FlashAttention, FlexAttention), not padded rows.
        gpus: cards that share weights, gradients and moments (FSDP2).

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    prompt_tokens: int = 512
    response_tokens: int = 3072
    rows: int = 64
    tokens_per_batch: int = 8192
    rows_per_chunk: int = 512
    chunk_bytes: int | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = torch.bfloat16
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    packed: bool = False
    gpus: int = 1

    def __attrs_post_init__(self) -> None:
        counts = ("prompt_tokens", "response_tokens", "rows", "tokens_per_batch", "rows_per_chunk", "gpus", "chunk_bytes")
        own_numbers(self, "Use", **dict.fromkeys(counts, 1), lora_rank=0)
        check_number("Use", "dtype", self.dtype, self.dtype in _DTYPES, "torch.float32, torch.bfloat16, torch.float16 or torch.float64")
        for name in ("gradient_checkpointing", "packed"):
            check_number("Use", name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        check_number("Use", "autocast", self.autocast, self.autocast in (None, torch.bfloat16), "None or torch.bfloat16")

    @property
    def length(self) -> int:
        """Tokens of the longest rollout."""
        return self.prompt_tokens + self.response_tokens

    @property
    def rollouts(self) -> float:
        """The longest rollouts of which a full micro-batch has the positions, a part of one too, since shorter ones fill it; one at least."""
        return max(self.tokens_per_batch / self.length, 1.0)


def training(config: Any, use: Use, room_gb: float | None = None) -> Need:
    """Count what a training step needs, by rollouts in a micro-batch; it is not the first of its step, so gradients are there.

    Args:
        config: a transformers configuration.
        use: how the model is used.
        room_gb: 10^9 bytes that there are, which decide how large a chunk of logits is; None for enough.

    Raises:
        ContextOverflowError: rollouts are longer than the model's context.
        InvalidRecordError: the longest rollout is longer than `tokens_per_batch`, which `batches` refuses.
        ModelError: the model cannot be run, has quantised weights, or would be trained in float16; or its code depends on numbers, so that its
            sizes alone do not show what it does.
    """
    tokens, least = use.tokens_per_batch, use.length - 1
    check_number("Use", "tokens_per_batch", tokens, tokens >= least, f"at least {least}, the longest rollout's positions")
    row_bytes: list[int] = []

    def prepare(model: Any, live: LiveBytes, use: Use) -> Phase:
        check_trained_dtype(model, use.autocast)
        row_bytes.append(_row_bytes(_head(model)))
        return _prepare_training(model, live, use)

    needed = _counted(config, use, int(use.rollouts), (ATTENTION, prepare), (None, prepare))
    needed = needed.shared(use.gpus, _gathered(config, use)) if use.gpus > 1 else needed
    chunk = partial(chunk_size, row_bytes=row_bytes[-1], tokens=use.response_tokens, limit=use.chunk_bytes, room_gb=room_gb)
    return evolve(needed, chunk=chunk)


def scoring(config: Any, use: Use) -> Need:
    """Count what `HFScorer` needs, by rollouts in a micro-batch.

    Raises:
        ContextOverflowError: as `training`.
        ModelError: as `training`.
    """
    return _counted(config, evolve(use, lora_rank=0), int(use.rollouts), (ATTENTION, _prepare_scoring), (None, _prepare_scoring))


def sampling(config: Any, use: Use) -> Need:
    """Count what `HFSource` needs, by responses side by side: prompts are read at once, and the last token has the largest cache.

    A student that has adapters is sampled from after they are merged.

    Raises:
        ContextOverflowError: as `training`.
        ModelError: as `training`; or the model keeps no cache.
    """
    need("transformers", "Plan")
    from lopd.engines.hf.texts import Way

    ways = [(None, partial(_prepare_sampling, way=way)) for way in (Way.PADDED, Way.EQUAL)]
    return _counted(config, evolve(use, lora_rank=0), use.rows, *ways)


def _counted(config: Any, use: Use, rows: int, *ways: tuple[str | None, Callable[[Any, LiveBytes, Use], Phase]]) -> Need:
    """Count with the first attention and code of a phase that the model can be run with."""
    (attention, prepare), *others = ways
    # a single row takes a short cut in some models, which is not what two rows less one are
    counted = max(rows, 2)
    try:
        return count(config, lambda config: _made(config, use, attention), counted, lambda model, live: prepare(model, live, use))
    except ModelError:
        if not others:
            raise
    return _counted(config, use, rows, *others)


def _made(config: Any, use: Use, attention: str | None) -> Any:
    """Make the model, whose weights are nowhere, unless its context is too short for the longest rollout."""
    model = empty(config, use.dtype, use.lora_rank, attention)
    if use.length > (longest := context_length(model)):
        raise ContextOverflowError(
            f"Use: prompt_tokens + response_tokens is {use.length}, expected at most {longest}, the context of this {type(config).__name__}; "
            "pass the lengths of rollouts that it can have."
        )
    return model


def _prepare_training(model: Any, live: LiveBytes, use: Use) -> Phase:
    model.train()
    for module in model.modules():
        # it would throw dice for each layer; with all of them there is the most to hold
        if hasattr(module, "layerdrop"):
            module.training = False
    if use.gradient_checkpointing:
        recompute_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    live.make("gradients")
    for p in trained:
        p.grad = torch.empty_like(p)
    live.make("moments")
    moments = [torch.empty_like(p) for p in trained for _ in range(2)]

    def step(rows: int) -> list[Stretch]:
        live.begin()
        live.make("activations")
        place_N = torch.arange(use.length).repeat(rows)
        row_N = torch.arange(rows).repeat_interleave(use.length, output_size=len(place_N))
        with torch.autocast("cpu", dtype=use.autocast or torch.bfloat16, enabled=use.autocast is not None, cache_enabled=False):
            if use.packed:
                hidden_ND = hidden_states(model, place_N[None], place_N[None])[0]
            else:
                hidden_ND = hidden_states(model, place_N.view(rows, -1))[row_N, place_N]
            live.filled()
        live.filled()
        total: Tensor = _Head.apply(hidden_ND.narrow(0, 0, rows * use.response_tokens).clone(), _head(model).weight, live)  # type: ignore[no-untyped-call]
        del hidden_ND
        torch.autograd.backward(total)
        computed = live.stretch()
        # what AdamW divides by is as large as what it trains, and each card has its share of it
        live.make("moments")
        live.begin()
        live.enter()
        _roots = [p.clone() for p in moments[::2]]
        live.filled()
        return [computed, live.stretch()]

    return step


class _Head(torch.autograd.Function):
    """What a fused loss holds: a buffer of logits (`chunk_size`), and float32 sums of the gradients, until they are asked for."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, live: LiveBytes) -> Tensor:
        ctx.sums = [torch.empty_like(t, dtype=torch.float32) if t.requires_grad else None for t in (hidden_MD, weight_VD)]
        live.make("logits")
        torch.empty(1, dtype=torch.uint8)
        live.make("activations")
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _upstream: Tensor) -> tuple[Tensor | None, ...]:
        sums, ctx.sums = ctx.sums, None
        return (*sums, None)


def _row_bytes(head: LMHead) -> int:
    """Return bytes of the logits of a token, as `ChunkedHead` has them."""
    return len(head.weight) * sum_dtype(head.weight).itemsize * (1 if head.softcap is None else 2)


def _prepare_scoring(model: Any, live: LiveBytes, use: Use) -> Phase:
    asked = min(use.rows_per_chunk, int(use.rollouts) * use.response_tokens)

    @torch.no_grad()
    def step(rows: int) -> list[Stretch]:
        live.begin()
        with evaluating(model):
            live.make("logits")
            head = _head(model).float()
            live.make("activations")
            ids_BS = torch.zeros(rows, use.length, dtype=torch.long)
            hidden_MD = hidden_states(model, ids_BS)[:, : use.response_tokens].flatten(0, 1)
            live.filled()
            live.make("logits")
            candidate_logprobs(hidden_MD.narrow(0, 0, asked), head, torch.zeros(asked, 1, dtype=torch.long), 0, use.rows_per_chunk)
        return [live.stretch()]

    return step


def _prepare_sampling(model: Any, live: LiveBytes, use: Use, way: "Way") -> Phase:
    from lopd.engines.hf.decoding import draw

    sampled = SamplingParams(use.response_tokens)
    with torch.no_grad():
        head = _head(model).float()

    def begin(rows: int, tokens: int) -> "Texts":
        return way.begin(model, [np.zeros(tokens, np.int32)] * rows)

    def token(texts: "Texts", rows: int) -> Stretch:
        live.begin()
        live.make("activations")
        hidden_BD = texts.last_hidden()
        live.filled()
        live.make("logits")
        draw(head.logits(hidden_BD), torch.zeros(rows, dtype=torch.float64), sampled)
        return live.stretch()

    @torch.no_grad()
    def step(rows: int) -> list[Stretch]:
        with evaluating(model):
            first = token(begin(rows, use.prompt_tokens), rows)
            live.make("keys and values")
            read = max(use.length - 3, 1)
            texts = begin(rows, read)
            # a sliding window keeps what was read at once until the next token takes its place
            for _ in range(read, max(use.length - 1, 2)):
                texts.last_hidden()
                texts.extend(torch.zeros(rows, dtype=torch.long), range(rows))
            return [first, token(texts, rows)]

    return step


def _gathered(config: Any, use: Use) -> int:
    """Return bytes of what FSDP2 has whole at a time: what is in no layer, and two layers, with gradients of what is trained."""
    model = empty(config, use.dtype, use.lora_rank, None)
    sizes: list[int] = [sum(p.nbytes * (1 + p.requires_grad) for p in part.parameters()) for part in (model, *layers_of(model))]
    whole, *layers = sizes
    return whole - sum(layers) + 2 * max(layers, default=0)


def _head(model: Any) -> LMHead:
    return lm_head(model, text_config(model).vocab_size)
