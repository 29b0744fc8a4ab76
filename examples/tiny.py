"""A tiny student and its teachers, made on the spot, so that every example runs in seconds and without a download."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lopd import Lineage

transformers.utils.logging.disable_progress_bar()

#: A handful of prompts, and some that nothing is trained on.
QUESTIONS = [f"what is {a} + {b}?" for a in range(2, 6) for b in range(1, 5)]
HELD_OUT = [f"what is {a} - {b}?" for a in range(6, 10) for b in range(1, 5)]

_TOKENS = ["<|eos|>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,?!+-*/="]


def model_folders(teachers: int = 1, root: Path = Path("runs/tiny")) -> list[Path]:
    """Save the student and so many teachers, each with a tokenizer, and return their folders; the same weights every time.

    The student is random, and a teacher is the student with noise on its weights: as near to it as to a student that was fine-tuned on its text.
    The student's folder records that these teachers wrote that text, as it does for a student that lopd fine-tuned; `batches` asks for it.
    """
    tokenizer = _tokenizer()
    student = _student(len(tokenizer))
    folders = [root / "student", *(root / f"teacher{'' if i == 0 else i + 1}" for i in range(teachers))]
    for seed, folder in enumerate(folders):
        _save(student, seed, folder)
        tokenizer.save_pretrained(folder)
    Lineage.of(*folders[1:]).write(folders[0])
    return folders


def _tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a character."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(_TOKENS)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([_TOKENS[0]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=_TOKENS[0], pad_token=_TOKENS[0])


def _student(vocab_size: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # large enough for next tokens that are far from equally likely
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _save(student: Any, seed: int, folder: Path) -> None:
    """Save the student itself for seed 0, a teacher for any other."""
    model = LlamaForCausalLM(student.config)
    model.load_state_dict(student.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.03 if seed else 0.0)
    model.save_pretrained(folder)


if __name__ == "__main__":
    print("student and teacher:", *model_folders())
