"""transformers as a RolloutSource and as a TeacherScorer: the engine that runs anywhere, and the truth that faster engines are compared with.

Shape suffixes: B rows, S positions, M response tokens of a batch, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import transformers
from attrs import define, field, frozen
from numpy.typing import NDArray
from torch import Tensor

from lopd.causal_lm import check_cut, context_length, evaluating, hidden_states, lm_head, token_logprobs, unwrap
from lopd.engines.draw import draw
from lopd.errors import ContextOverflowError, InvalidRecordError
from lopd.manifest import Lineage, Manifest, ModelId, Provenance, SamplingParams, TokenizerId, fingerprint_tokenizer, hash_weights
from lopd.types import Prompt, Rollout, Scores, rollout_id

ENGINE = f"transformers {transformers.__version__}"


def model_id(model: Any) -> ModelId:
    """The identity of a loaded model, by a hash of its weights."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name = Path(str(getattr(unwrap(model).config, "_name_or_path", "") or type(model).__name__)).name
    return ModelId(name, hash_weights(model.named_parameters()), dtype)


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or hub name; `dtype=None` keeps the dtype of the stored weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # only eager attention applies a cap on attention scores, and the choice is not saved with the weights
        model.set_attn_implementation("eager")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@final
@frozen(eq=False)
class HFSource:
    """Samples from a transformers model, in batches with a KV cache.

    Each (seed, prompt, sample, generation) has its own stream of uniform numbers, so a rollout does not depend on what it was batched
    with (up to the rounding of the matrix products).

    Args:
        model: a causal LM in eval mode.
        tokenizer: its own.
        sampling: how to draw.
        policy: identity of the model; by default a hash of its weights, taken when first asked for.
        lineage: what the model was trained on; `from_folder` reads it from beside the weights.
        generation: round of sampling.
        rows_per_batch: responses that are sampled side by side; this bounds memory.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    sampling: SamplingParams = field(factory=SamplingParams)
    lineage: Lineage = field(factory=Lineage)
    policy: ModelId | None = None
    generation: int = 0
    rows_per_batch: int = 64

    @classmethod
    def from_folder(cls, folder: str | Path, sampling: SamplingParams, dtype: torch.dtype | None = None) -> "HFSource":
        """A source on a model that `CausalLMStudent.export` (or anybody) wrote, with the SFT teacher that is recorded there."""
        model, tokenizer = load_model(folder, dtype)
        return cls(model, tokenizer, sampling, Lineage.read(Path(folder)))

    def __attrs_post_init__(self) -> None:
        check_cut(self.model, fingerprint_tokenizer(self.tokenizer).vocab_size)

    @property
    def manifest(self) -> Manifest:
        """What a store of these rollouts must say; the policy is identified once, so make a new source (`attrs.evolve`) after training."""
        return self._manifest

    @cached_property
    def _manifest(self) -> Manifest:
        policy = self.policy or model_id(self.model)
        return Manifest(fingerprint_tokenizer(self.tokenizer), policy, self.sampling, self.lineage.sft_teacher, self.generation)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """`samples_per_prompt` rollouts for each prompt, in their order."""
        context = context_length(self.model)
        for prompt in prompts:
            _check_ids(f"Prompt {prompt.prompt_id!r}", prompt.token_ids, self.manifest.tokenizer)
            if prompt.token_ids.size >= context:
                raise ContextOverflowError(
                    f"Prompt {prompt.prompt_id!r}: it has {prompt.token_ids.size} tokens, expected fewer than the model's context of {context}; "
                    "shorten it or drop it."
                )
        rows = [(prompt, sample) for prompt in prompts for sample in range(self.sampling.samples_per_prompt)]
        order = sorted(range(len(rows)), key=lambda i: rows[i][0].token_ids.size)
        rollouts: dict[int, Rollout] = {}
        for first in range(0, len(rows), self.rows_per_batch):
            part = order[first : first + self.rows_per_batch]
            rollouts.update(zip(part, self._sample_batch([rows[i] for i in part]), strict=True))
        return [rollouts[i] for i in range(len(rows))]

    def _sample_batch(self, rows: Sequence[tuple[Prompt, int]]) -> list[Rollout]:
        with torch.inference_mode(), evaluating(self.model):
            drawn = _Sampler(self, rows).run(self._uniforms(rows))
        return [self._rollout(prompt, sample, *tokens) for (prompt, sample), tokens in zip(rows, drawn, strict=True)]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's and the tokenizer's EOS."""
        if self.sampling.stop_ids:
            return frozenset(self.sampling.stop_ids)
        configured = getattr(unwrap(self.model).generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def _uniforms(self, rows: Sequence[tuple[Prompt, int]]) -> NDArray[np.float64]:
        """(B, max_new_tokens) uniform numbers, row by row from the row's own seed."""
        keys = [f"{self.sampling.seed}|{rollout_id(prompt.prompt_id, sample, self.generation)}" for prompt, sample in rows]
        seeds = [int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little") for key in keys]
        return np.stack([np.random.default_rng(seed).random(self.sampling.max_new_tokens) for seed in seeds])

    def _rollout(self, prompt: Prompt, sample: int, ids: list[int], logprobs: list[float]) -> Rollout:
        return Rollout(
            rollout_id=rollout_id(prompt.prompt_id, sample, self.generation),
            prompt_ids=prompt.token_ids,
            response_ids=np.array(ids, np.int32),
            loss_mask=np.ones(len(ids), np.bool_),
            finish_reason="stop" if ids[-1] in self.stop_ids else "length",
            behavior_logprobs=np.array(logprobs, np.float32),
        )


@define(eq=False)
class _Sampler:
    """One batch being sampled: left padding, one cache, rows leave as they finish."""

    source: HFSource
    rows: Sequence[tuple[Prompt, int]]

    def run(self, uniforms_BT: NDArray[np.float64]) -> list[tuple[list[int], list[float]]]:
        """Sampled ids and their log-probs at temperature 1, nats, for each row."""
        model, sampling = self.source.model, self.source.sampling
        head, device = lm_head(model, self.source.manifest.tokenizer.vocab_size), next(model.parameters()).device
        ids_BS, mask_BS = (t.to(device) for t in _pad_left([prompt.token_ids for prompt, _ in self.rows]))
        drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in self.rows]
        room = np.array([min(sampling.max_new_tokens, context_length(model) - prompt.token_ids.size) for prompt, _ in self.rows])
        live = np.arange(len(self.rows))
        cache, positions = transformers.DynamicCache(config=unwrap(model).config), (mask_BS.cumsum(-1) - 1).clamp(min=0)
        for t in range(int(room.max())):
            logits_BV = head.logits(hidden_states(model, ids_BS, positions, mask_BS=mask_BS, cache=cache)[:, -1])
            self._check(live, t, logits_BV)
            next_B, logprobs_B = draw(logits_BV, torch.from_numpy(uniforms_BT[live, t]).to(device), sampling)
            for row, token, logprob in zip(live, next_B.tolist(), logprobs_B.tolist(), strict=True):
                drawn[row][0].append(token)
                drawn[row][1].append(logprob)
            going = np.array([drawn[r][0][-1] not in self.source.stop_ids and t + 1 < room[r] for r in live])
            if not going.any():
                break
            keep = torch.from_numpy(np.flatnonzero(going)).to(device)
            if len(keep) < len(live):
                cache.batch_select_indices(keep)
            live = live[going]
            ids_BS, positions = next_B[keep, None], positions[keep, -1:] + 1
            mask_BS = torch.cat([mask_BS[keep], mask_BS.new_ones(len(keep), 1)], dim=1)
        return drawn

    def _check(self, live: NDArray[np.int64], t: int, logits_BV: Tensor) -> None:
        # the largest logit is NaN if any is, so one pass finds what would otherwise end as an index outside the vocabulary
        bad = np.flatnonzero(~logits_BV.amax(-1).isfinite().cpu().numpy())
        if bad.size:
            prompt, sample = self.rows[int(live[bad[0]])]
            raise InvalidRecordError(
                f"Rollout {rollout_id(prompt.prompt_id, sample, self.source.generation)!r}: the logits of token {t} are not finite, expected "
                "numbers; check the weights, or compute in another dtype."
            )


def _pad_left(rows: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """(B, S) ids, and the mask of those that are real; generation continues at the right edge of every row."""
    width = max(r.size for r in rows)
    ids_BS = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BS = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BS[i, width - row.size :] = torch.from_numpy(row.astype(np.int64))
        mask_BS[i, width - row.size :] = 1
    return ids_BS, mask_BS


def _check_ids(owner: str, ids: NDArray[np.int32], tokenizer: TokenizerId) -> None:
    outside = np.flatnonzero(ids >= tokenizer.vocab_size)
    if outside.size:
        raise InvalidRecordError(
            f"{owner}: token {outside[0]} is id {ids[outside[0]]}, expected an id below the vocabulary's {tokenizer.vocab_size}; "
            "tokenise with this model's tokenizer."
        )


@final
@define(eq=False, slots=False)
class HFScorer:
    """Reads rollouts with a transformers model: length-sorted batches under a token budget, float32 log-softmax in chunks of rows.

    Memory beyond the model: activations of `tokens_per_batch` positions, and `rows_per_chunk` * V logits; never a (B, S, V) tensor.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its own.
        tokens_per_batch: padded positions of one forward pass.
        rows_per_chunk: response tokens whose logits exist at once.
        identity: of the model; by default a hash of its weights.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    tokens_per_batch: int = 8192
    rows_per_chunk: int = 512
    identity: ModelId | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None, tokens_per_batch: int = 8192) -> "HFScorer":
        """A scorer on a model folder or hub name."""
        model, tokenizer = load_model(folder, dtype)
        return cls(model, tokenizer, tokens_per_batch)

    def __attrs_post_init__(self) -> None:
        check_cut(self.model, self._tokenizer_id.vocab_size)

    @cached_property
    def _tokenizer_id(self) -> TokenizerId:
        return fingerprint_tokenizer(self.tokenizer)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are."""
        return self._provenance

    @cached_property
    def _provenance(self) -> Provenance:
        return Provenance(self.identity or model_id(self.model), self._tokenizer_id.vocab_hash, ENGINE)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """(T_i,) log-probs, nats, of each rollout's response tokens, in the order given."""
        context = context_length(self.model)
        for rollout in rollouts:
            owner = f"Rollout {rollout.rollout_id!r}"
            if len(rollout) > context:
                raise ContextOverflowError(
                    f"{owner}: it has {len(rollout)} tokens, expected at most the context of {context}; use a teacher with a longer one."
                )
            _check_ids(owner, rollout.prompt_ids, self._tokenizer_id)
            _check_ids(owner, rollout.response_ids, self._tokenizer_id)
        order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i]))
        scores: dict[int, Scores] = {}
        for part in self._budgeted(order, [len(r) for r in rollouts]):
            for i, logprobs_T in zip(part, self._score_batch([rollouts[i] for i in part]), strict=True):
                scores[i] = Scores.of(rollouts[i], logprobs_T)
        return [scores[i] for i in range(len(rollouts))]

    def _budgeted(self, order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Runs of similar length whose padded size stays within the budget."""
        parts: list[list[int]] = []
        for i in order:
            if parts and (len(parts[-1]) + 1) * lengths[i] <= self.tokens_per_batch:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    @torch.inference_mode()
    def _score_batch(self, rollouts: Sequence[Rollout]) -> list[NDArray[np.float32]]:
        """Padding is on the right, where causal attention never looks: no mask is needed."""
        device = next(self.model.parameters()).device
        ids_BS = torch.zeros(len(rollouts), max(len(r) for r in rollouts), dtype=torch.long)
        predicts_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for i, r in enumerate(rollouts):
            ids_BS[i, : len(r)] = torch.from_numpy(np.concatenate([r.prompt_ids, r.response_ids]).astype(np.int64))
            predicts_BS[i, r.prompt_ids.size - 1 : len(r) - 1] = True
        targets_M = torch.cat([torch.from_numpy(r.response_ids.astype(np.int64)) for r in rollouts]).to(device)
        with evaluating(self.model):
            hidden_MD = hidden_states(self.model, ids_BS.to(device))[predicts_BS.to(device)]
        logprobs_M = token_logprobs(hidden_MD, lm_head(self.model, self._tokenizer_id.vocab_size), targets_M, self.rows_per_chunk)
        values: NDArray[np.float32] = logprobs_M.cpu().numpy()
        return np.split(values, np.cumsum([r.response_ids.size for r in rollouts])[:-1])
