"""The kinds of models, and what tests of `HFSource` and `HFScorer` share."""

import copy

import pytest
import torch

from lopd.engines.hf import HFSource
from lopd.records import ModelId, SamplingParams

KINDS = ("llama_tied", "qwen3_padded", "gemma2_softcap", "mistral_window", "gpt2", "phi_bias", "granite_scaled", "cohere_scaled")
VOCAB = 96
# At this temperature every token is equally likely, so responses wander over the whole vocabulary.
FLAT = 1e9
every_kind = pytest.mark.parametrize("kind", KINDS)


def source_of(model, tokenizer, **sampling):
    return HFSource(model, tokenizer, SamplingParams(**{"max_new_tokens": 10, **sampling}), identity=ModelId("tiny", "1", "float32"))


def spoiled(model):
    """Return the model with NaN as the embedding of token 50, which `check_scoring` does not look at."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    return model
