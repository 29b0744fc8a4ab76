"""transformers as a RolloutSource: batches in the way that is right for the model, a random stream for each rollout."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from attrs import field, frozen

from lopd.engines.causal_lm import context_length, cut_to_head, evaluating, rope_borders, stated_ends, text_config
from lopd.engines.finding import local_folder
from lopd.engines.hf.decoding import Row, decode
from lopd.engines.hf.loading import load_model
from lopd.engines.hf.probing import check_sampling
from lopd.engines.identity import Identified, check_unchanged, identify, model_name
from lopd.engines.inputs import check_prompts, check_top_k, in_order, make_rollout, stop_ids, stream_seed
from lopd.engines.probes import check_scoring
from lopd.engines.supports import make_support
from lopd.records.checks import check_kind, own_numbers
from lopd.records.identity import ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, SamplingParams
from lopd.records.rollouts import Prompt, Rollout, rollout_id


class OnModel:
    """What a source and a scorer on a model have in common."""

    model: Any
    tokenizer: Any
    identity: ModelId | None

    @cached_property
    def tokenizer_id(self) -> TokenizerId:
        """Whose ids it reads."""
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _known(self) -> TokenizerId:
        return cut_to_head(self.model, self.tokenizer)

    @cached_property
    def _identified(self) -> Identified:
        return identify(self.model, self.identity)


@final
@frozen(eq=False)
class HFSource(OnModel):
    """Samples from a transformers model in batches: with a cache and padding if both are right for the model, which is probed.

    A model whose padding is not right has prompts of one length in each batch; one whose cache is not right computes each token from the whole
    text, with a warning.

    Each (seed, prompt, sample, generation) has its own stream of uniform numbers, so a rollout does not depend on what it was batched
    with (up to the rounding of the matrix products).  Drawn candidates have another stream, so a rollout has the same tokens with and without
    candidates.

    Args:
        model: a causal LM; it is put in eval mode for as long as it computes here.
        tokenizer: its own.
        sampling: how to draw, and which candidates to keep: `candidates` most likely ones and `drawn` ones, with log-probs at temperature 1.
        lineage: what the model was trained on; `from_folder` reads it from beside the weights.
        identity: the model's identity; by default a hash of its function (`lopd.engines.identity.model_id`), taken when first asked for.
        generation: round of sampling.
        rows_per_batch: responses that are sampled side by side; this bounds memory.

    Warns:
        ModelWarning: no cache is right for the model, so sampling is slow; or what `lopd.engines.probes.check_scoring` warns of.

    Raises:
        InvalidRecordError: `rows_per_batch` is less than 1, or `sampling.candidates` is more than the vocabulary has ids.
        ModelError: see `lopd.engines.probes.check_scoring` and `lopd.engines.hf.probing.check_sampling`.
    """

    model: Any = field(repr=model_name)
    tokenizer: Any = field(repr=False)
    sampling: SamplingParams = field(factory=SamplingParams)
    lineage: Lineage = field(factory=Lineage)
    identity: ModelId | None = None
    generation: int = 0
    rows_per_batch: int = 64

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        sampling: SamplingParams,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        *,
        rows_per_batch: int = 64,
    ) -> "HFSource":
        """Return a source on a model folder or hub name, with the SFT teacher that `CausalLMStudent.export` recorded there."""
        model, tokenizer = load_model(folder, dtype, device)
        return cls(model, tokenizer, sampling, Lineage.read(local_folder(folder, weights=False)), rows_per_batch=rows_per_batch)

    def __attrs_post_init__(self) -> None:
        check_kind("HFSource: sampling", self.sampling, SamplingParams, "make it: `SamplingParams(...)`")
        check_kind("HFSource: lineage", self.lineage, Lineage, "pass `Lineage(sft_teacher=...)`, or leave it out")
        own_numbers(self, "HFSource", rows_per_batch=1)
        check_top_k("HFSource", self.sampling.candidates, self._known, "candidates")
        check_scoring(self.model, self._known.vocab_size)
        check_sampling(self.model, self._known.vocab_size)

    @property
    def manifest(self) -> Manifest:
        """The manifest of a store of these rollouts; the policy is identified once, so make a new source (`attrs.evolve`) after training."""
        return Manifest(self.tokenizer_id, self._identified.identity, self.sampling, self.lineage.sft_teacher, self.generation)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """Sample `samples_per_prompt` rollouts for each prompt, in their order.

        Raises:
            ContextOverflowError: a prompt leaves no room for a response, or its rollout could cross a LongRoPE border; nothing is sampled.
            InvalidRecordError: a prompt has an id outside the vocabulary, or the model gives logits that are not finite.
        """
        check_prompts(prompts, self._known, context_length(self.model), rope_borders(text_config(self.model)), self.sampling.max_new_tokens)
        check_unchanged("HFSource", self.model, self._identified)
        way = check_sampling(self.model, self._known.vocab_size, warn=False)
        asked = [(prompt, sample) for prompt in prompts for sample in range(self.sampling.samples_per_prompt)]
        batches = way.batches(self.model, [prompt.token_ids.size for prompt, _ in asked], self.rows_per_batch)
        drawn, stops = list[Row](), self.stop_ids
        for batch in batches:
            rows = [self._row(*asked[i]) for i in batch]
            with evaluating(self.model):
                decode(self.model, rows, self.sampling, vocab_size=self._known.vocab_size, stop_ids=stops, way=way)
            drawn += rows
        return in_order([i for batch in batches for i in batch], [self._rollout(row, stops) for row in drawn])

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's and the tokenizer's EOS."""
        return stop_ids(self.sampling, stated_ends(self.model), self.tokenizer_id)

    def _row(self, prompt: Prompt, sample: int) -> Row:
        """Return a row with its own stream of uniform numbers, whatever it will be batched with."""
        name = rollout_id(prompt.prompt_id, sample, self.generation)
        tokens, draws = (np.random.default_rng(stream_seed(self.sampling, stream, bits=128)) for stream in (name, f"{name}/draws"))
        return Row(name, prompt.token_ids, tokens.random(self.sampling.max_new_tokens), draws)

    def _rollout(self, row: Row, stops: frozenset[int]) -> Rollout:
        support = None
        if row.kept:
            ids_TK, logprobs_TK = (np.stack(part) for part in zip(*row.kept, strict=True))
            support = make_support(f"Rollout {row.rollout_id!r}", ids_TK, logprobs_TK, self.sampling.drawn)
        return make_rollout(
            row.rollout_id,
            row.prompt_ids,
            row.ids,
            row.logprobs,
            None if self.sampling.neutral else row.drawn,
            stops=stops,
            generation=self.generation,
            candidates=support,
        )
