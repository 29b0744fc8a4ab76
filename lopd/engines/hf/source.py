"""transformers as a RolloutSource: batches with a KV cache, a random stream for each rollout."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from attrs import field, frozen

from lopd.engines.causal_lm import context_length, evaluating, unwrap
from lopd.engines.hf.decoding import Row, decode
from lopd.engines.hf.loading import load_model
from lopd.engines.identity import check_unchanged, identify, model_name
from lopd.engines.inputs import check_prompts, in_order, make_rollout, stop_ids, stream_seed
from lopd.engines.probes import check_cut
from lopd.records.checks import check_at_least, own_numbers
from lopd.records.identity import ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.manifest import Lineage, Manifest, SamplingParams
from lopd.records.rollouts import Prompt, Rollout, rollout_id


@final
@frozen(eq=False)
class HFSource:
    """Samples from a transformers model, in batches with a KV cache.

    Each (seed, prompt, sample, generation) has its own stream of uniform numbers, so a rollout does not depend on what it was batched
    with (up to the rounding of the matrix products).

    Args:
        model: a causal LM; it is put in eval mode for as long as it computes here.
        tokenizer: its own.
        sampling: how to draw.
        lineage: what the model was trained on; `from_folder` reads it from beside the weights.
        identity: of the model; by default a hash of its weights, taken when first asked for.
        generation: round of sampling.
        rows_per_batch: responses that are sampled side by side; this bounds memory.

    Raises:
        InvalidRecordError: `rows_per_batch` is less than 1.
        ModelError: see `lopd.engines.probes.check_cut`.
    """

    model: Any = field(repr=model_name)
    tokenizer: Any = field(repr=False)
    sampling: SamplingParams = field(factory=SamplingParams)
    lineage: Lineage = field(factory=Lineage)
    identity: ModelId | None = None
    generation: int = 0
    rows_per_batch: int = 64

    @classmethod
    def from_folder(cls, folder: str | Path, sampling: SamplingParams, dtype: torch.dtype | None = None, device: str = "cpu") -> "HFSource":
        """A source on a model that `CausalLMStudent.export` (or anybody) wrote, with the SFT teacher that is recorded there."""
        model, tokenizer = load_model(folder, dtype, device)
        return cls(model, tokenizer, sampling, Lineage.read(Path(folder)))

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "HFSource")
        check_at_least("HFSource", "rows_per_batch", self.rows_per_batch, 1)
        check_cut(self.model, self.tokenizer_id.vocab_size)

    @cached_property
    def tokenizer_id(self) -> TokenizerId:
        """Whose ids it reads."""
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _identified(self) -> tuple[ModelId, int | None]:
        return identify(self.model, self.identity)

    @property
    def manifest(self) -> Manifest:
        """What a store of these rollouts must say; the policy is identified once, so make a new source (`attrs.evolve`) after training."""
        return Manifest(self.tokenizer_id, self._identified[0], self.sampling, self.lineage.sft_teacher, self.generation)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """`samples_per_prompt` rollouts for each prompt, in their order."""
        check_prompts(prompts, self.tokenizer_id, context_length(self.model))
        check_unchanged("HFSource", self.model, self._identified[1])
        drawn: list[Row] = []
        asked = [(prompt, sample) for prompt in prompts for sample in range(self.sampling.samples_per_prompt)]
        order = sorted(range(len(asked)), key=lambda i: asked[i][0].token_ids.size)
        for first in range(0, len(asked), self.rows_per_batch):
            rows = [self._row(*asked[i]) for i in order[first : first + self.rows_per_batch]]
            with evaluating(self.model):
                decode(self.model, rows, self.sampling, self.tokenizer_id.vocab_size, self.stop_ids)
            drawn += rows
        return in_order(
            order,
            [
                make_rollout(row.rollout_id, row.prompt_ids, row.ids, row.logprobs, stops=self.stop_ids, generation=self.generation)
                for row in drawn
            ],
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's and the tokenizer's EOS."""
        configured = getattr(unwrap(self.model).generation_config, "eos_token_id", None)
        return stop_ids(self.sampling, configured, self.tokenizer_id)

    def _row(self, prompt: Prompt, sample: int) -> Row:
        """A row with its own stream of uniform numbers, whatever it will be batched with."""
        name = rollout_id(prompt.prompt_id, sample, self.generation)
        stream = np.random.default_rng(stream_seed(self.sampling, name, bits=128))
        return Row(name, prompt.token_ids, stream.random(self.sampling.max_new_tokens))
