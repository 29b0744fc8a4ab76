"""What a phase needs of a card, counted on the code that will run, from a configuration alone: no weight is read or made.

Every phase is run on tensors that have a size and no numbers (torch's fake tensors), with as many rows as are asked for and with one more, and
the bytes that are alive are counted after each operation.  In training and scoring attention is taken to keep no scores, as FlashAttention and
torch's own do; a model that has another needs more.  What a card holds besides (contexts, workspace of kernels, fragments) has the share of it that
is left free.

Shape suffixes: B rows, S positions, N tokens, M tokens that count, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from attrs import evolve, frozen
from torch import Tensor

from lopd.engines.causal_lm import candidate_logprobs, decoder_of, evaluating, hidden_states, lm_head, text_config, unwrap
from lopd.losses.chunking import CHUNK_BYTES
from lopd.records.checks import check_at_least, own_numbers
from lopd.records.manifest import SamplingParams
from lopd.records.steps import LMHead
from lopd.tools.plan.following import ATTENTION, Phase, count, empty, layers_of
from lopd.tools.plan.live import LiveBytes, Need, Stretch


@final
@frozen(kw_only=True)
class Use:
    """How a model is used on a card.

    Args:
        prompt_tokens, response_tokens: of the longest rollout.
        rows: responses that transformers samples side by side (`HFSource.rows_per_batch`).
        tokens_per_batch: of a micro-batch, padding included, in scoring and in training.
        rows_per_chunk: response tokens whose logits a scorer holds at once.
        chunk_bytes: of the buffer of logits in training (`Chunking.chunk_bytes`).
        dtype: of the weights.
        autocast: what layers compute in while they are trained; None for the dtype of the weights.
        lora_rank: of adapters on all linear layers but the head (`lora_config`); 0 trains all weights.
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
    chunk_bytes: int = CHUNK_BYTES
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = torch.bfloat16
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    packed: bool = False
    gpus: int = 1

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Use")
        for name in ("prompt_tokens", "response_tokens", "rows", "tokens_per_batch", "rows_per_chunk", "chunk_bytes", "gpus"):
            check_at_least("Use", name, getattr(self, name), 1)
        check_at_least("Use", "lora_rank", self.lora_rank, 0)

    @property
    def length(self) -> int:
        """Tokens of the longest rollout."""
        return self.prompt_tokens + self.response_tokens

    @property
    def rollouts(self) -> int:
        """The longest rollouts that a micro-batch has; one at least."""
        return max(self.tokens_per_batch // self.length, 1)


def training(config: Any, use: Use) -> Need:
    """Count what a training step needs, by rollouts in a micro-batch; it is not the first of its step, so gradients are there.

    Raises:
        ModelError: the model's code depends on numbers, so its sizes alone do not say what it does.
    """
    needed = _counted(config, use, ATTENTION, use.rollouts, _prepare_training)
    return needed.shared(use.gpus, _gathered(config, use)) if use.gpus > 1 else needed


def scoring(config: Any, use: Use) -> Need:
    """Count what `HFScorer` needs, by rollouts in a micro-batch.

    Raises:
        ModelError: as `training`.
    """
    return _counted(config, evolve(use, lora_rank=0), ATTENTION, use.rollouts, _prepare_scoring)


def sampling(config: Any, use: Use) -> Need:
    """Count what `HFSource` needs, by responses side by side: prompts are read at once, and the last token has the largest cache.

    A student that has adapters is sampled from after they are merged.

    Raises:
        ModelError: as `training`.
    """
    return _counted(config, evolve(use, lora_rank=0), "sdpa", use.rows, _prepare_sampling)


def _counted(config: Any, use: Use, attention: str, rows: int, prepare: Callable[[Any, LiveBytes, Use], Phase]) -> Need:
    return count(
        config, lambda config: empty(config, use.dtype, use.lora_rank, attention), rows, lambda model, live: prepare(model, live, use)
    )


def _prepare_training(model: Any, live: LiveBytes, use: Use) -> Phase:
    model.train()
    if use.gradient_checkpointing:
        unwrap(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
        with torch.autocast("cpu", dtype=use.autocast or torch.bfloat16, enabled=use.autocast is not None):
            if use.packed:
                hidden_ND = hidden_states(model, place_N[None], place_N[None])[0]
            else:
                hidden_ND = hidden_states(model, place_N.view(rows, -1))[row_N, place_N]
            live.filled()
        live.filled()
        live.make("logits")
        weight_VD = _head(model).weight
        buffer = _buffer_bytes(use.rollouts * use.response_tokens, len(weight_VD), use.chunk_bytes)
        total: Tensor = _Head.apply(hidden_ND.narrow(0, 0, rows * use.response_tokens).clone(), weight_VD, buffer)  # type: ignore[no-untyped-call]
        del hidden_ND
        live.make("activations")
        torch.autograd.backward(total)
        # what AdamW divides by is as large as what it trains
        [p.clone() for p in moments[::2]]
        return [live.stretch()]

    return step


class _Head(torch.autograd.Function):
    """What a fused loss holds: a buffer of logits, and float32 sums of the gradients, until they are asked for."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, buffer_bytes: int) -> Tensor:
        ctx.sums = [torch.empty_like(t, dtype=torch.float32) if t.requires_grad else None for t in (hidden_MD, weight_VD)]
        torch.empty(buffer_bytes, dtype=torch.uint8)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _upstream: Tensor) -> tuple[Tensor | None, ...]:
        sums, ctx.sums = ctx.sums, None
        return (*sums, None)


def _buffer_bytes(tokens: int, vocabulary: int, chunk_bytes: int) -> int:
    """Bytes of the float32 logits of one of the equal chunks that fit."""
    logits = 4 * tokens * vocabulary
    return logits // -(-logits // chunk_bytes)


def _prepare_scoring(model: Any, live: LiveBytes, use: Use) -> Phase:
    # the log-probs of a chunk are there until those of the next are
    asked = min(2 * use.rows_per_chunk, use.rollouts * use.response_tokens)

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


def _prepare_sampling(model: Any, live: LiveBytes, use: Use) -> Phase:
    from lopd.engines.hf.decoding import draw

    decoder, sampled = decoder_of(unwrap(model)), SamplingParams(use.response_tokens)
    with torch.no_grad():
        head = _head(model).float()

    def token(rows: int, read: int, cache: Any = None) -> Stretch:
        live.begin()
        live.make("activations")
        mask_BS = torch.ones(rows, use.length - 1 if cache else read, dtype=torch.long)
        given = {"attention_mask": mask_BS, "position_ids": mask_BS.cumsum(-1)[:, -read:] - 1}
        output = decoder(input_ids=mask_BS[:, -read:], past_key_values=cache, use_cache=True, **given)
        live.filled()
        live.make("logits")
        draw(head.logits(output.last_hidden_state[:, -1]), torch.zeros(rows, dtype=torch.float64), sampled)
        return live.stretch()

    @torch.no_grad()
    def step(rows: int) -> list[Stretch]:
        with evaluating(model):
            first = token(rows, use.prompt_tokens)
            live.make("keys and values")
            cache = decoder(input_ids=torch.zeros(rows, use.length - 2, dtype=torch.long), use_cache=True).past_key_values
            return [first, token(rows, 1, cache)]

    return step


def _gathered(config: Any, use: Use) -> int:
    """Bytes of what FSDP2 has whole at a time: what is in no layer, and two layers, with their gradients."""
    model = empty(config, use.dtype, 0, ATTENTION)
    layers: list[int] = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    outside: int = sum(p.numel() for p in model.parameters()) - sum(layers)
    return 2 * int((use.autocast or use.dtype).itemsize) * (outside + 2 * max(layers, default=0))


def _head(model: Any) -> LMHead:
    return lm_head(model, text_config(model).vocab_size)
