"""Folders with tiny models that vLLM's kernels take (heads of 32), random but far from flat, and the tokenizer of conftest."""

from pathlib import Path

import torch
import transformers
from conftest import PAD_ROWS, build_tokenizer

VOCAB, LONGEST = 96, 128
#: name -> class prefix, rows of the head, tied
KINDS = {"llama_tied": ("Llama", VOCAB, True), "qwen3_padded": ("Qwen3", VOCAB + PAD_ROWS, False)}


def save_model(folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
    """Save a model of this kind into the folder, and return it."""
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


def drawn_logprobs(model, rollout, temperature=1.0, top_p=1.0):
    """Return (T,) log-probs of a rollout in the distribution that a sampler with these settings draws from, token by token."""
    ids, start = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()], rollout.prompt_ids.size
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1, :VOCAB].double()
    found = []
    for logits_V, token in zip(logits_TV, ids[start:], strict=True):
        probs_V = torch.eye(VOCAB)[logits_V.argmax()] if temperature == 0 else (logits_V / temperature).softmax(-1)
        kept = [other for other in range(VOCAB) if temperature == 0 or float(probs_V[probs_V > probs_V[other]].sum()) < top_p]
        found.append(float((probs_V[token] / probs_V[kept].sum()).log()))
    return found
