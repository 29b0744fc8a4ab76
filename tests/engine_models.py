"""Folders with tiny models that vLLM's kernels take (heads of 32), random but far from flat, and the tokenizer of conftest."""

from pathlib import Path

import torch
import transformers
from conftest import PAD_ROWS, build_tokenizer

VOCAB, LONGEST = 96, 128
#: name -> class prefix, rows of the head, tied
KINDS = {"llama_tied": ("Llama", VOCAB, True), "qwen3_padded": ("Qwen3", VOCAB + PAD_ROWS, False)}


def save_model(folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
    """The folder, with a model of this kind in it."""
    prefix, rows, tied = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
