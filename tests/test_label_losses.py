"""Labels in the loss: the gradient of the mixed objective, and losses that read no labels."""

from functools import partial

import numpy as np
import pytest
import torch
from attrs import evolve
from test_labels import PROMPTS, number, store  # noqa: F401

from lopd import (
    FusedLoss,
    FusedOPDLoss,
    FusedSFTLoss,
    ReferenceOPDLoss,
    WeightedLoss,
    batches,
    by_token,
    label_rollouts,
    opd_steps,
)
from lopd.errors import (
    InvalidRecordError,
    MissingScoresError,
    TrainingWarning,
)
from lopd.losses.beside import EntropyBonus
from lopd.losses.objective import OPDObjective
from lopd.losses.reference import SFTLoss
from lopd.losses.variants import add_labels, importance_ratio, position_weights, weigh_labels
from lopd.records import Batch, LMHead, StepMetrics
from lopd.testing import tiny_manifest


def logits_batch(labels=True):
    """Make a batch of one rollout of four counted tokens and a prompt, over five ids; hidden states are logits."""
    random = torch.Generator().manual_seed(5)
    targets = torch.tensor([1, 4, 0, 2, 3])
    values = {name: -3 * torch.rand(5, generator=random).double() for name in ("teacher_logprobs", "ref_logprobs")}
    said = {"label_values": torch.tensor([0, 1, 1, -2, 0.5]).double(), "label_means": torch.tensor([0, 0.25, 0.25, 0.5, 0.5]).double()}
    weight = torch.tensor([0, 1.0, 0.5, 2.0, 1.0]).double()
    batch = Batch(torch.zeros(5, dtype=torch.int64), targets, torch.arange(5), torch.zeros(5, dtype=torch.int64), weight, **values, **said)
    return torch.randn(5, 5, generator=random).double(), batch


@pytest.mark.parametrize("kind", [ReferenceOPDLoss, FusedOPDLoss])
@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("teacher", [True, False])
def test_the_mixed_objective_has_the_gradient_of_the_formula_on_full_logits(kind, ratio, teacher):
    logits, batch = logits_batch()
    transforms = (partial(add_labels, scale=0.7), partial(weigh_labels, by=lambda labels: labels > -1))
    loss = kind(clip=1.5, ratio_to_ref=ratio, transforms=transforms, advantage=None if teacher else 0.0)
    hidden = logits.clone().requires_grad_()
    loss(hidden, LMHead(torch.eye(5).double()), batch).loss_sum.backward()
    expected = torch.zeros(5, 5).double()
    for n in range(1, 5):
        p = logits[n].exp() / logits[n].exp().sum()
        target, y = int(batch.targets[n]), float(batch.label_values[n])
        mine = p[target].log()
        advantage = (batch.teacher_logprobs[n] - mine if teacher else 0.0) + 0.7 * (y - float(batch.label_means[n]))
        advantage = float(torch.as_tensor(advantage).clamp(-1.5, 1.5))
        r = float((mine - batch.ref_logprobs[n]).exp()) if ratio else 1.0
        gate = 1.0 if y > -1 else 0.0
        onehot = torch.eye(5).double()[target]
        expected[n] = -gate * float(batch.weight[n]) * advantage * r * (onehot - p)
    torch.testing.assert_close(hidden.grad, expected)
    assert not hidden.grad[3].any(), "the label shuts the gate"


def test_a_reward_that_has_lost_its_baseline_weighs_a_constant_advantage_as_it_is_added_to_none():
    logits, batch = logits_batch()
    less = evolve(batch, label_values=batch.label_values - batch.label_means, label_means=None)
    gradients = []
    for given, advantage, transform in ((batch, 0.0, add_labels), (less, 1.0, partial(weigh_labels, by=lambda label: label))):
        hidden = logits.clone().requires_grad_()
        loss = FusedOPDLoss(advantage=advantage, ratio_to_ref=True, transforms=(transform,))
        loss(hidden, LMHead(torch.eye(5).double()), given).loss_sum.backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)


class Fixed(torch.nn.Module):
    """A student whose hidden states are its parameters."""

    tokenizer = tiny_manifest().tokenizer

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Parameter(torch.zeros(64, 4))

    def forward(self, batch, loss):
        return loss(self.hidden[: len(batch.inputs)], LMHead(torch.ones(300, 4)), batch)


def first_step(store, loss, **options):
    student = Fixed()
    steps = batches(store, ref="behavior", weighting=by_token, **options)[:1]
    (metrics,) = opd_steps(student, steps, loss, torch.optim.SGD(student.parameters(), lr=1e-3))
    return metrics


def as_it_is(signal):
    return signal


IGNORED = [
    FusedOPDLoss(ratio_to_ref=True),
    ReferenceOPDLoss(transforms=(importance_ratio, partial(position_weights, gamma=0.1))),
    FusedLoss(EntropyBonus(OPDObjective(ratio_to_ref=True))),
    WeightedLoss([(1.0, FusedSFTLoss()), (0.5, SFTLoss())]),
]
PERHAPS_READ = [
    FusedOPDLoss(transforms=(importance_ratio, partial(weigh_labels, by=torch.abs))),
    FusedOPDLoss(ratio_to_ref=True, transforms=(as_it_is,)),
    WeightedLoss([(1.0, FusedSFTLoss()), (1.0, FusedOPDLoss(advantage=0.0, ratio_to_ref=True, transforms=(add_labels,)))]),
    partial(FusedSFTLoss.__call__, FusedSFTLoss()),
]


@pytest.mark.filterwarnings("ignore:Student")  # it is not a model
@pytest.mark.parametrize("tokens_per_batch", [12, 4096])
def test_labels_that_no_transform_reads_are_said_and_metrics_tell_what_labels_say(store, tokens_per_batch):
    label_rollouts(store, lambda prompt, r: number(prompt, r) // 3, PROMPTS)  # 0 0 | 0 1 | 1 1 | 2 2
    for loss in IGNORED:
        with pytest.warns(TrainingWarning, match="it reads no labels, so it trains as without `batches") as caught:
            metrics = first_step(store, loss, label="label", tokens_per_batch=tokens_per_batch)
        assert [warning.filename for warning in caught if warning.category is TrainingWarning] == [__file__]
        assert (metrics.mean_label, metrics.unlike_group) == (7 / 8, 2 / 8)
    for loss in PERHAPS_READ:
        metrics = first_step(store, loss, label="label", rows=np.array([0, 2, 3, 6]))
        assert (metrics.mean_label, metrics.unlike_group) == (3 / 4, 2 / 4)
    assert StepMetrics.from_json({"step": 0, **metrics.numbers()}).unlike_group == 0.5
    without = first_step(store, IGNORED[0])
    assert (without.mean_label, without.unlike_group) == (None, None)
    assert "mean_label" not in without.numbers()


def test_labels_that_are_not_there_and_scales_that_make_no_sense_are_named():
    logits, batch = logits_batch()
    head = LMHead(torch.eye(5).double())
    for transform in (add_labels, partial(weigh_labels, by=lambda labels: labels)):
        with pytest.raises(MissingScoresError, match=r"label_values is None, expected a column of labels; name it in `batches\(label="):
            FusedOPDLoss(transforms=(transform,))(logits, head, evolve(batch, label_values=None))
    with pytest.raises(InvalidRecordError, match="Labels: scale is nan"):
        FusedOPDLoss(transforms=(partial(add_labels, scale=float("nan")),))(logits, head, batch)
    for advantage in (None, 0.0):
        assert FusedOPDLoss(advantage=advantage, transforms=(add_labels, partial(weigh_labels, by=torch.sign))).uncorrected
        assert not FusedOPDLoss(advantage=advantage, ratio_to_ref=True, transforms=(add_labels,)).uncorrected
