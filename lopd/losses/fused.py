r"""The losses of `reference` in the memory of one chunk: the same objectives, with gradients made in the forward pass.

Shape suffixes: N tokens of a batch, M of them that count, C of a chunk, K selected ids each, D hidden size, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lopd.errors import GradientError
from lopd.losses.beside import OfObjective, check_objective
from lopd.losses.chunked import ChunkedHead, logprobs_and_entropies, refuse_second_order
from lopd.losses.chunking import DEFAULT_CHUNKING, Chunking, sum_dtype
from lopd.losses.objective import Objective, OPDObjective, OPDSettings, TokenLosses
from lopd.losses.tokens import Tokens, counted_rows
from lopd.records.checks import check_number, own_numbers
from lopd.records.steps import Batch, LMHead, LossOutput


class _WithGradients(torch.autograd.Function):
    """A sum whose gradients by hidden states, weight and bias were made along with it."""

    @staticmethod
    def forward(ctx: Any, *of_and_made: Any) -> Tensor:
        loss_sum: Tensor
        *_, loss_sum, ctx.sums = of_and_made
        return loss_sum.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        if ctx.sums is None:
            raise GradientError("Loss: its backward pass is run a second time, expected once; compute the loss again.")
        sums, ctx.sums = ctx.sums, None
        # autograd rounds each once to the dtype of what it is the gradient of
        return (*(None if total is None else total.mul_(upstream) for total in sums), None, None)


def _ends_in(loss_C: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether the loss has gradients, and by none but these leaves: a parameter in an objective would not get its own."""
    if not loss_C.requires_grad:
        return False
    todo, seen = [get_gradient_edge(loss_C).node], {get_gradient_edge(leaf).node for leaf in leaves}
    while todo:
        if (node := todo.pop()) in seen:
            continue
        if not node.next_functions:
            return False
        seen.add(node)
        todo += [before for before, _ in node.next_functions if before is not None]
    return True


def _check_epsilon(owner: object, _: Any, epsilon: Any) -> None:
    own_numbers(owner, type(owner).__name__)
    check_number(type(owner).__name__, "epsilon", epsilon, 0 <= epsilon < math.inf, "finite and at least 0")


@final
@frozen
class FusedLoss(OfObjective):
    r"""Any objective in the memory of one chunk of logits.

    Args:
        objective: which loss.  One whose tokens depend on each other costs a fourth matrix product.  So does one with parameters of its own that
            require a gradient, and what was computed until a chunk shows them.
        chunking: memory and precision.
        epsilon: tokens with \(\lvert f'\rvert(1 - p) \le \epsilon\), f' being the derivative of the unweighted loss by the log-prob and p the
            probability, skip two of the three products; with several stored ids their sum.  `LossOutput.neglected_sum` bounds what is left out.
            For objectives that cost a fourth product only tokens without any gradient skip two.  0 is exact, and no token skips anything:
            which ones do comes to the host, and a GPU would stand idle meanwhile, once a chunk.

    Raises:
        InvalidRecordError: epsilon is less than 0 or not finite.
        ArgumentError: the objective is something else, such as a loss.
    """

    objective: Objective = field(validator=check_objective)
    chunking: Chunking = DEFAULT_CHUNKING
    epsilon: float = field(default=0.0, validator=_check_epsilon)

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens.

        Raises:
            InvalidRecordError: hidden states of another size than the head's; or the objective, or a function in it, gives another shape than
                one value a token, or ids that are not a row for each or, on a CPU, without a row in the head; or it is marked `per_token`, and splits
                tokens into rollouts.
            ModelError: hidden states on a device without float64, such as an Apple GPU.
            GradientError: in a backward pass that is the second one, or has `create_graph`.
        """
        tokens, hidden_MD = Tokens.counted(batch), counted_rows(hidden_ND, batch)
        ids_MK = self.objective.ids(tokens)
        wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden_MD, head.weight, head.bias)]
        # without a token nothing shows whether the objective has parameters
        at_once = len(hidden_MD) > 0 and any(wanted) and self.objective.per_token
        made = self._in_one_pass(hidden_MD, head, tokens, ids_MK, wanted) if at_once else None
        if made is not None:
            return made
        logprobs_MK, entropies_M = logprobs_and_entropies(
            hidden_MD, head, ids_MK, self.chunking, entropy=self.objective.wants_entropy, skipping=self.epsilon > 0
        )
        losses = self._losses(logprobs_MK, evolve(tokens.to(logprobs_MK.dtype), student_entropies=entropies_M))
        return TokenLosses.joined([losses], hidden_MD.new_zeros(0, dtype=sum_dtype(hidden_MD, head.weight))).sums()

    def _in_one_pass(self, hidden_MD: Tensor, head: LMHead, tokens: Tokens, ids_MK: Tensor, wanted: Sequence[bool]) -> LossOutput | None:
        """Return the sums with their gradients already made; None where a loss has others than those by log-probs and entropies, or none."""
        chunked, said = ChunkedHead(hidden_MD, head, self.chunking, wanted), list[TokenLosses]()
        for rows, found in chunked.chunks(ids_MK, entropy=self.objective.wants_entropy):
            dtype = chunked.dtype_of(found)
            # autograd on (C, K) values, so that each equation is written once, in its objective
            leaves = [values.detach().to(dtype).requires_grad_() for values in (found.logprobs, found.entropies) if values is not None]
            entropies_C = leaves[1] if self.objective.wants_entropy else None
            known = evolve(tokens.where(rows).to(dtype), student_entropies=entropies_C, of_chunk=True)
            losses = self._losses(leaves[0], known)
            if not _ends_in(losses.loss, leaves):
                return None
            gradients = torch.autograd.grad(losses.loss.sum(), leaves, allow_unused=True, materialize_grads=True)
            said.append(evolve(losses, loss=losses.loss.detach()))
            chunked.add(*gradients, least_C=self.epsilon * tokens.weight[rows] if self.epsilon > 0 else None)
        sums = TokenLosses.joined(said, chunked.zeros(0)).sums()
        loss_sum: Tensor = _WithGradients.apply(hidden_MD, head.weight, head.bias, sums.loss_sum, chunked.sums)  # type: ignore[no-untyped-call]
        return evolve(sums, loss_sum=loss_sum, neglected_sum=chunked.neglected)


@final
@frozen
class FusedOPDLoss(OPDSettings):
    r"""`ReferenceOPDLoss` in the memory of one chunk of logits, at the price of three matrix products.

    It takes the arguments of `lopd.losses.objective.OPDSettings`, and two more.  A transform without the mark `per_token` needs whole
    rollouts, and costs a fourth product.

    Args:
        chunking: memory and precision.
        epsilon: tokens whose advantage times (1 - probability) is at most this skip two of the three products (see `FusedLoss`); 0 is exact.

    Raises:
        InvalidRecordError: epsilon is less than 0 or not finite, or a setting is refused by `OPDSettings`.
        ArgumentError: `transforms` are not several functions of a `Signal`.

    Memory: `chunking.chunk_bytes`, and float32 sums of the gradients; tokens that do not count take none.
    """

    chunking: Chunking = DEFAULT_CHUNKING
    epsilon: float = field(default=0.0, validator=_check_epsilon)

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens.

        Raises:
            MissingScoresError: the batch has no teacher column, or no ref column though the ratio is asked for.
            InvalidRecordError: hidden states of another size than the head's; or a transform gives another shape than one value a token.
            ModelError: hidden states on a device without float64, such as an Apple GPU.
            GradientError: in a backward pass that is the second one, or has `create_graph`.
        """
        return FusedLoss(self.objective(), self.chunking, self.epsilon)(hidden_ND, head, batch)


@final
@frozen
class FusedSFTLoss:
    r"""`SFTLoss` in the memory of one chunk of logits: \(\sum_t w_t\, (-\ell_\theta(a_t))\).

    Args:
        chunking: memory and precision.

    Source: Lightning OPD (arXiv 2604.13010v2), eq. 6.
    """

    chunking: Chunking = DEFAULT_CHUNKING

    ignores_labels = True

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the counted tokens; the reverse KL of a loss without a teacher is 0.

        Raises:
            InvalidRecordError, ModelError, GradientError: as `FusedOPDLoss`.
        """
        return FusedLoss(OPDObjective.sft(), self.chunking)(hidden_ND, head, batch)
