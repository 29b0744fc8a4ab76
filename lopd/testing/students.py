"""The contract of a `Student`, one test a clause: whether it computes the log-probs of each rollout, and trains on the gradient of all."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.nn import Parameter

from lopd.losses.reference import SFTLoss
from lopd.protocols import Student, TeacherScorer
from lopd.records.collate import by_token, collate
from lopd.records.rollouts import Rollout, ScoredRollout
from lopd.records.steps import Batch, LMHead, LossOutput
from lopd.testing.records import tiny_rollout

_LOSS = SFTLoss()
_SIZES = ((2, 3), (1, 1), (3, 6), (4, 4))


class StudentConformance:
    """Every clause of the `Student` contract, as one test each.  Subclass it, and supply `make`.

    Attributes:
        tolerance: nats by which the log-probs of the same tokens may differ, and the share of its largest element by which a gradient may.
    """

    tolerance: float = 1e-4

    def make(self) -> Student:
        """Return a student without dropout."""
        raise NotImplementedError

    def rollouts(self) -> Sequence[Rollout]:
        """Return at least two, of unlike lengths, the longest with four tokens of response or more, not all of them the same."""
        random, size = np.random.default_rng(0), self.make().tokenizer.vocab_size
        return [tiny_rollout(f"r{t}", random.integers(0, size, t), prompt_ids=random.integers(0, size, p)) for p, t in _SIZES]

    def scorer(self) -> TeacherScorer | None:
        """Return a scorer with the student's weights, to compare its log-probs with; None leaves that out."""
        return None

    def _logprobs(self, student: Student, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Return the log-probs of each rollout's tokens that count, as one batch gives them."""
        batch = _batch(rollouts)
        with torch.no_grad():
            logprobs_M = student(batch, _LOSS).logprobs
        assert logprobs_M is not None, "it gave something else than the loss did"
        return list(logprobs_M.cpu().double().split(batch.counts))

    def _assert_near(self, got_T: Tensor, expected_T: Tensor, when: str) -> None:
        torch.testing.assert_close(got_T, expected_T, rtol=0, atol=self.tolerance, msg=lambda gap: f"log-probs differ {when}: {gap}")

    def test_a_rollout_has_the_same_log_probs_alone_and_behind_others(self) -> None:
        student, rollouts = self.make(), self.rollouts()
        for order in (rollouts, rollouts[::-1]):
            for rollout, packed_T in zip(order, self._logprobs(student, order), strict=True):
                self._assert_near(packed_T, self._logprobs(student, [rollout])[0], f"where {rollout.rollout_id!r} has others beside it")

    def test_log_probs_are_those_of_a_scorer_with_its_weights(self) -> None:
        scorer, rollouts = self.scorer(), self.rollouts()
        if scorer is None:
            pytest.skip("there is no scorer to compare them with")
        for rollout, own_T, scores in zip(rollouts, self._logprobs(self.make(), rollouts), scorer.score(rollouts), strict=True):
            scorers_T = torch.from_numpy(scores.logprobs[rollout.loss_mask]).double()
            self._assert_near(own_T, scorers_T, f"from the scorer's, of {rollout.rollout_id!r}")

    def test_a_later_token_changes_no_distribution_before_it(self) -> None:
        student, longest = self.make(), max(self.rollouts(), key=lambda rollout: rollout.response_ids.size)
        middle, (one, two) = longest.response_ids.size // 2, np.unique(longest.response_ids)[:2]
        later = np.where(longest.response_ids[middle:] == one, two, one)
        other = evolve(longest, response_ids=np.concatenate([longest.response_ids[:middle], later]))
        before = longest.prompt_ids.size + middle
        first_NV, second_NV = (_distributions(student, rollout)[:before] for rollout in (longest, other))
        self._assert_near(first_NV, second_NV, "where tokens behind it are others")

    def test_losses_and_gradients_of_the_parts_of_a_batch_add_up_to_those_of_the_whole(self) -> None:
        student, rollouts = self.make(), self.rollouts()
        whole, expected = _trained(student, [rollouts])
        split, gradients = _trained(student, [rollouts[:1], rollouts[1:]])
        assert split == pytest.approx(whole, rel=self.tolerance), "a loss is a sum over tokens, never a mean"
        assert gradients.keys() == expected.keys()
        sizes = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
        for name, gradient in expected.items():
            # some hold nothing besides rounding, such as that of the bias of keys
            size = max(sizes[name], 1e-3 * max(sizes.values()))
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=self.tolerance * size)

    def test_every_parameter_that_is_trained_is_named_once(self) -> None:
        student = self.make()
        named = [(name, id(parameter)) for name, parameter in student.named_parameters() if parameter.requires_grad]
        assert len(dict(named)) == len({place for _, place in named}) == len(named), "a parameter, or a name, is there twice"
        reached = _reached(student(_batch(self.rollouts()), _LOSS))
        assert reached, "nothing is trained"
        assert {id(parameter) for parameter in reached} <= {place for _, place in named}, "a parameter that has a gradient is not named"


def _batch(rollouts: Sequence[Rollout]) -> Batch:
    return collate([ScoredRollout(rollout, {}) for rollout in rollouts], by_token)


def _distributions(student: Student, rollout: Rollout) -> Tensor:
    """Return (N, V): the log-probs of all tokens at each place of a rollout, as a loss can compute them."""
    seen = list[Tensor]()

    def look(hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        seen.append(head.logits(hidden_ND).log_softmax(-1))
        return _LOSS(hidden_ND, head, batch)

    with torch.no_grad():
        student(_batch([rollout]), look)
    return seen[0].cpu().double()


def _trained(student: Student, parts: Sequence[Sequence[Rollout]]) -> tuple[float, dict[str, Tensor]]:
    """Return the sum of the losses of these batches, and the gradients that they leave in the student."""
    named, total = dict(student.named_parameters()), 0.0
    for parameter in named.values():
        parameter.grad = None
    for part in parts:
        loss = student(_batch(part), _LOSS).loss_sum
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def _reached(output: LossOutput) -> list[Parameter]:
    """Return the parameters that a backward of the loss gives a gradient."""
    waiting, seen = [output.loss_sum.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    variables = [getattr(node, "variable", None) for node in seen]
    return [variable for variable in variables if isinstance(variable, Parameter)]
