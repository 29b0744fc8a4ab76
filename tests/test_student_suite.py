"""The suite of students against ours, and against students that are wrong on purpose."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve
from conftest import TOKENIZER_ID, build_model, build_tokenizer
from helpers import BigramLM, make_provenance, make_rollout
from suite_cases import broken_clauses, clauses
from torch import Tensor, nn

from lopd.engines.hf import HFScorer
from lopd.engines.student import CausalLMStudent
from lopd.protocols import OPDLoss, Student, TeacherScorer
from lopd.records import Batch, LMHead, LossOutput, Rollout, Scores
from lopd.testing import StudentConformance

VOCAB, DIM = 11, 4


class RecurrentLM(nn.Module):
    """A float64 student with a state, which is empty where a rollout begins."""

    tokenizer = evolve(TOKENIZER_ID, vocab_size=VOCAB)

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        shapes = ((VOCAB, DIM), (DIM, DIM))
        self.embedding_VD, self.state_DD = (nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64)) for shape in shapes)

    def states(self, inputs_N: Tensor, position_ids_N: Tensor) -> Tensor:
        state_D, states = self.embedding_VD.new_zeros(DIM), list[Tensor]()
        for token, position in zip(inputs_N.tolist(), position_ids_N.tolist(), strict=True):
            state_D = torch.tanh((position > 0) * state_D @ self.state_DD + self.embedding_VD[token])
            states.append(state_D)
        return torch.stack(states)

    def forward(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        return loss(self.states(batch.inputs, batch.position_ids), LMHead(self.embedding_VD), batch)


class RecurrentScorer:
    """The same model on one rollout after the other."""

    provenance = make_provenance()

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        return [Scores.of(rollout, self._logprobs(rollout)) for rollout in rollouts]

    @torch.no_grad()
    def _logprobs(self, rollout: Rollout) -> Any:
        model, ids_N = RecurrentLM(), torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
        logprobs_NV = (model.states(ids_N, torch.arange(len(ids_N))) @ model.embedding_VD.T).log_softmax(-1)
        return logprobs_NV[:-1].gather(1, ids_N[1:, None])[-rollout.response_ids.size :, 0].numpy()


class KeepsItsState(RecurrentLM):
    def states(self, inputs_N: Tensor, position_ids_N: Tensor) -> Tensor:
        return super().states(inputs_N, position_ids_N + 1)


class LooksAhead(RecurrentLM):
    def states(self, inputs_N: Tensor, position_ids_N: Tensor) -> Tensor:
        states_ND, goes_on_N = super().states(inputs_N, position_ids_N), position_ids_N.roll(-1) > 0
        return states_ND + goes_on_N[:, None] * states_ND.roll(-1, 0)


class IsTempered(RecurrentLM):
    def forward(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        return loss(self.states(batch.inputs, batch.position_ids), LMHead(self.embedding_VD, scale=0.5), batch)


class GivesMeans(RecurrentLM):
    def forward(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        output = super().forward(batch, loss)
        return evolve(output, loss_sum=output.loss_sum / len(batch.lengths))


class LearnsFromOneRollout(RecurrentLM):
    def forward(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        hidden_ND = self.states(batch.inputs, batch.position_ids)
        first_N1 = (batch.segment_ids == 0)[:, None]
        return loss(torch.where(first_N1, hidden_ND, hidden_ND.detach()), LMHead(self.embedding_VD), batch)


class NamesItsHeadToo(RecurrentLM):
    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(*args, **options)
        yield "head", self.embedding_VD


class NamesItsHeadAlone(RecurrentLM):
    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield "head", self.embedding_VD


SUMS, NAMES = (
    "test_losses_and_gradients_of_the_parts_of_a_batch_add_up_to_those_of_the_whole",
    "test_every_parameter_that_is_trained_is_named_once",
)
WRONG_STUDENTS: dict[type[RecurrentLM], str] = {
    KeepsItsState: "test_a_rollout_has_the_same_log_probs_alone_and_behind_others",
    IsTempered: "test_log_probs_are_those_of_a_scorer_with_its_weights",
    LooksAhead: "test_a_later_token_changes_no_distribution_before_it",
    GivesMeans: SUMS,
    LearnsFromOneRollout: SUMS,
    NamesItsHeadToo: NAMES,
    NamesItsHeadAlone: NAMES,
}


class TestRecurrentLM(StudentConformance):
    kind: type[RecurrentLM] = RecurrentLM

    def make(self) -> Student:
        return self.kind()

    def scorer(self) -> TeacherScorer | None:
        return RecurrentScorer()


class TestBigramLM(StudentConformance):
    def make(self) -> Student:
        return BigramLM(5, 3, seed=0)

    def rollouts(self) -> Sequence[Rollout]:
        return [make_rollout("long", [2], [0, 3, 1, 4, 2], [True, True, False, True, True]), make_rollout("short", [1, 0], [4, 4])]


class TestCausalLMStudent(StudentConformance):
    def make(self) -> Student:
        return CausalLMStudent(build_model("gpt2", seed=2), TOKENIZER_ID)

    def scorer(self) -> TeacherScorer | None:
        return HFScorer(build_model("gpt2", seed=2), build_tokenizer())


@pytest.mark.parametrize(("kind", "clause"), WRONG_STUDENTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_suite_rejects_a_student_that_is_wrong(kind: type[RecurrentLM], clause: str) -> None:
    class Suite(TestRecurrentLM):
        pass

    Suite.kind = kind
    assert clause in broken_clauses(Suite())


def test_every_clause_is_one_that_something_wrong_breaks() -> None:
    assert set(WRONG_STUDENTS.values()) == set(clauses(StudentConformance))
