"""Products of two numbers with their working: long responses, in which a small error spoils the result.

`347x285=` is worked out digit by digit: for each digit of b, from the right, a row, and in it for each digit of a, from the right, a step.
A step is a mark, the two digits, their product, the digit of the running sum so far that is added, that sum, and the sum with the carry, whose
tens are the next carry.  The mark tells the first step of a row from the others.  The verifier looks at the final number alone.
"""

import numpy as np
from attrs import frozen

from testbed.task import EOS, MARKS, Problem, Writer


@frozen
class Product(Problem):
    """a x b, both of so many digits, in the characters of the sums."""

    sign = "x"

    def answer(self) -> str:
        """The product, of twice as many digits."""
        return f"{self.a * self.b:0{2 * self.digits}}"

    def working(self, style: str, rng: np.random.Generator, writer: Writer) -> str:
        """A response; there is one style only."""
        if style != "A":
            raise ValueError(f"products are written in style A, not {style}")
        text, sums = "", [0] * (2 * self.digits)
        for row in range(self.digits):
            carry = 0
            for place in range(self.digits):
                a, b, before = self.a // 10**place % 10, self.b // 10**row % 10, sums[row + place]
                after = a * b + before + carry
                mark = MARKS[place > 0][rng.integers(writer.synonyms)]
                text += f"{mark}{a}{b}{a * b:02}{before}{a * b + before:02}{after:02}"
                carry, sums[row + place] = divmod(after, 10)
            sums[row + self.digits] = carry
        return writer.slip(f"{text}={self.answer()}{EOS}", rng)
