"""Sums of two numbers with their working, in two ways of writing it: `058+007=` -> `5x6o0o=0065`.

The working goes column by column from the right.  Style "A" writes a column's digit and then whether one is carried, style "B" writes all
carries first and then all digits.  The verifier looks at the final number alone.

A writer that never slips makes a teacher that is all but certain of every character: to it, a student's error is impossible.  One that slips makes a
teacher with doubts, to which it is merely unlikely, as it is between large models of one family.
"""

import string
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from attrs import frozen
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lopd.records import Prompt, Rollout

EOS = "$"
CHARACTERS = (EOS, *"0123456789+=", *"oxnyufvg")
#: Those of other tasks begin as the sums' do.
_EVERY = (*CHARACTERS, *string.ascii_uppercase)
#: Synonyms of "nothing is carried" and of "one is carried".
MARKS = ("onuf", "xyvg")


def make_tokenizer(characters: Sequence[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a character."""
    backend = Tokenizer(tokenizer_models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def encode(text: str) -> list[int]:
    """Return the ids of characters, of any task."""
    return [_EVERY.index(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    """Return the text of ids."""
    return "".join(_EVERY[i] for i in ids)


@frozen
class Writer:
    """How sure a teacher is of what it writes.

    Args:
        synonyms: number of marks in use for each, 1 to 4.
        slips: share of digits that are written at random.
    """

    synonyms: int = 1
    slips: float = 0.0

    def slip(self, text: str, rng: np.random.Generator) -> str:
        """Put slips into a text; what follows a slip is written as if the slip had not been made."""
        slips = rng.random(len(text)) < self.slips
        return "".join(str(rng.integers(10)) if slip and c.isdigit() else c for c, slip in zip(text, slips, strict=True))


@frozen
class Problem:
    """a + b, both of so many digits."""

    #: Of all its texts.
    characters: ClassVar[Sequence[str]] = CHARACTERS
    #: What models that solve it have beside their size.
    shape: ClassVar[dict[str, Any]] = {"max_position_embeddings": 64}
    a: int
    b: int
    digits: int

    @classmethod
    def lengths(cls, digits: int) -> tuple[int, int]:
        """Return the number of digits of a and of b."""
        return digits, digits

    def prompt(self) -> Prompt:
        """Return the prompt, with the result as the answer for the verifier."""
        text = self.text()
        return Prompt(text, encode(f"{text}="), answer=self.answer())

    def text(self) -> str:
        """Return what is asked."""
        return f"{self.a:0{self.digits}}+{self.b:0{self.digits}}"

    def answer(self) -> str:
        """Return the sum, with one digit more."""
        return f"{self.a + self.b:0{self.digits + 1}}"

    def working(self, style: str, rng: np.random.Generator, writer: Writer) -> str:
        """Write a response in this style."""
        digits, marks, carry = [], [], 0
        for place in range(self.digits):
            total = self.a // 10**place % 10 + self.b // 10**place % 10 + carry
            carry = total // 10
            digits.append(str(total % 10))
            marks.append(MARKS[carry][rng.integers(writer.synonyms)])
        columns = "".join(d + m for d, m in zip(digits, marks, strict=True)) if style == "A" else "".join([*marks, *digits])
        return writer.slip(f"{columns}={self.answer()}{EOS}", rng)


def make_problems(count: int, digits: int, seed: int, kind: type[Problem] = Problem) -> list[Problem]:
    """Make distinct problems of a kind."""
    rng, lengths = np.random.default_rng(seed), kind.lengths(digits)
    chosen = rng.choice(10 ** sum(lengths), count, replace=False)
    return [kind(int(n) // 10 ** lengths[1], int(n) % 10 ** lengths[1], digits) for n in chosen]


def verify(prompt: Prompt, rollout: Rollout) -> float:
    """Return 1 if the response ends with `=` and the right answer."""
    text = decode(rollout.response_ids.tolist())
    return float(text.endswith(f"={prompt.answer}{EOS}"))
