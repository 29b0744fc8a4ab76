"""A verifier for mathematical answers, by math-verify."""

from typing import Any

from attrs import frozen
from math_verify import parse, verify

from lopd.errors import PromptError
from lopd.records import Prompt, Rollout


@frozen
class MathGrader:
    r"""1 where the end of the response, after any thinking, equals the answer of the prompt (LaTeX or plain: `\frac12`, `0.5`), else 0.

    An answer with its working before it, as GSM8K has them, is what stands behind the last `####`.

    math-verify gives up on an expression after seconds, by a signal: call it from the main thread.

    Args:
        tokenizer: the policy's.
    """

    tokenizer: Any

    def __call__(self, prompt: Prompt, rollout: Rollout) -> float:
        """Grade a response."""
        if prompt.answer is None:
            raise PromptError(f"Prompt {prompt.prompt_id!r}: it has no answer to grade by; give its record the key 'answer'.")
        text = self.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True).rpartition("</think>")[2]
        answer = prompt.answer.rpartition("####")[2].strip()
        return float(verify(parse(f"${answer}$"), parse(text)))
