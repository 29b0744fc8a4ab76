"""Products of two numbers with their working: long responses, in which a small error spoils the result.

Each number that is used again stands behind a letter of its own, as a variable does: `A7B4C3xD5E8=` is 347 x 85.  A step takes a digit of each, and
writes their product, in later rows the digit so far and the sum of both, then what was carried, and at last the new carry and the new digit, each
behind its letter.  The verifier looks at the final number alone, which is read letter by letter.

So all that is to be known is how to look up a letter, and small tables: models of 50,000 parameters learn it in seconds.
"""

import string
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from testbed.task import CHARACTERS, EOS, Problem, Writer

LETTERS = string.ascii_uppercase


@frozen
class Product(Problem):
    """a x b; b has one digit fewer than a, which has 2 or 3."""

    characters = (*CHARACTERS, *LETTERS)
    #: Positions that turn fast enough to tell neighbours apart in small heads.
    shape: ClassVar[dict[str, Any]] = {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}

    @classmethod
    def lengths(cls, digits: int) -> tuple[int, int]:
        """Return the number of digits of a and of b."""
        return digits, digits - 1

    def text(self) -> str:
        """Return both numbers, from the right, each digit behind its letter."""
        a, b = self.lengths(self.digits)
        return f"{_lettered(LETTERS[:a], self.a)}x{_lettered(LETTERS[a : a + b], self.b)}"

    def answer(self) -> str:
        """Return every digit of the product behind its letter, from the left."""
        return self._written()[1]

    def working(self, style: str, rng: np.random.Generator, writer: Writer) -> str:
        """Write a response; only one style exists."""
        if style != "A":
            raise ValueError(f"products are written in style A, not {style}")
        text, answer = self._written()
        return writer.slip(f"{text}={answer}{EOS}", rng)

    def _written(self) -> tuple[str, str]:
        """Return the steps, and the final number."""
        (columns, rows), text = self.lengths(self.digits), ""
        letters, digits = iter(LETTERS[columns + rows :]), {}
        for row in range(rows):
            carry, of_carry = 0, ""
            for place in range(columns):
                a, b = self.a // 10**place % 10, self.b // 10**row % 10
                text += f"{LETTERS[place]}{a}{LETTERS[columns + row]}{b}{a * b:02}"
                letter, before = digits.get(row + place, ("", 0))
                text += f"{letter}{before}{a * b + before:02}" if row else ""
                text += f"{of_carry}{carry}" if place else ""
                of_carry, letter = next(letters), next(letters)
                carry, digit = divmod(a * b + before + carry, 10)
                text += f"{of_carry}{carry}{letter}{digit}"
                digits[row + place] = letter, digit
            digits[row + columns] = of_carry, carry
        return text, "".join(f"{letter}{digit}" for _, (letter, digit) in sorted(digits.items(), reverse=True))


def _lettered(letters: Sequence[str], number: int) -> str:
    return "".join(f"{letter}{number // 10**place % 10}" for place, letter in enumerate(letters))
