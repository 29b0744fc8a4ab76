"""What a run does not train, or trains from far away, is said once, in the first step."""

import copy
import json
import warnings
from functools import partial

import numpy as np
import peft
import pytest
import torch
from attrs import evolve
from conftest import TOKENIZER_ID
from small_runs import scored, small, teacher_model  # noqa: F401
from transformers.optimization import Adafactor

from lopd import (
    CausalLMStudent,
    FusedLoss,
    FusedOPDLoss,
    MemoryStore,
    ReferenceOPDLoss,
    WeightedLoss,
    batches,
    by_rollout,
    by_token,
    label_rollouts,
    opd_steps,
    score_rollouts,
    watch_drift,
)
from lopd.engines.hf import HFScorer
from lopd.errors import AdvantageWarning, ArgumentError, DriftWarning, EndTokenWarning, InvalidRecordError, TrainingWarning
from lopd.guards.first_step import MAX_DISTANCE, MIN_ESS, judge_baseline, judge_policy
from lopd.losses.beside import EntropyBonus
from lopd.losses.objective import OPDObjective
from lopd.losses.reference import SFTLoss
from lopd.losses.variants import add_labels
from lopd.records import LossOutput
from lopd.records.drift import TokenLogprobs, measure_drift, measure_step


def sft(student, optimizer, store, steps=1):
    return list(opd_steps(student, batches(store, teacher=None, rollouts_per_step=7)[:steps], SFTLoss(), optimizer))


def student_in(llama, dtype=torch.float32):
    return CausalLMStudent(copy.deepcopy(llama).to(dtype), TOKENIZER_ID)


class Curved(torch.optim.SGD):
    def step(self, curvature, *more, scale=1.0, **others):
        """As one of the second order."""


@pytest.mark.parametrize(("kind", "needed"), [(torch.optim.LBFGS, "closure"), (Curved, "curvature")])
def test_an_optimizer_whose_step_needs_an_argument_is_refused_by_the_call(kind, needed, llama, scored):
    student = student_in(llama)
    optimizer = kind(student.parameters())
    for _ in range(2):
        with pytest.raises(ArgumentError, match=f"Optimizer {kind.__name__}: its step needs `{needed}`, and lopd passes nothing"):
            opd_steps(student, batches(scored, teacher=None), SFTLoss(), optimizer)
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # it wraps the step


class Unusual(torch.optim.SGD):
    """Has another name for itself in its step."""

    def step(this, closure=None):  # noqa: N805
        return super().step(closure)


def test_an_optimizer_whose_step_a_scheduler_wraps_needs_nothing(llama, scored):
    student = student_in(llama)
    optimizer = Unusual(student.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sft(student, optimizer, scored)


@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_whose_own_step_brings_the_closure_needs_nothing(scheduled, llama, scored):
    student, calls = student_in(llama), []
    optimizer = torch.optim.LBFGS(student.parameters(), lr=1e-3, max_iter=1)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step = partial(optimizer.step, lambda: calls.append(1) or torch.tensor(1.0))
    sft(student, optimizer, scored)
    assert calls
    optimizer.step = lambda closure: None
    with pytest.raises(ArgumentError, match="Optimizer LBFGS: its step needs `closure`"):
        sft(student, optimizer, scored)


class Offloading(torch.optim.AdamW):
    """Keeps its state on the host on purpose."""


def test_state_on_another_device_than_its_parameter_is_refused_where_nobody_meant_it(llama, scored):
    for kind in (torch.optim.AdamW, Offloading):
        student = student_in(llama)
        optimizer = kind(student.parameters(), lr=1e-3)
        sft(student, optimizer, scored)
        name, parameter = next(iter(student.named_parameters()))
        optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].to("meta")
        call = partial(opd_steps, student, batches(scored, teacher=None), SFTLoss(), optimizer)
        call()
        optimizer.state[parameter]["exp_avg"] = optimizer.state[parameter]["exp_avg"].to("meta")
        if kind is Offloading:
            call()
            continue
        said = rf"Optimizer AdamW: its state of '{name}' is on meta and the parameter on cpu; move the student back, or move it"
        with pytest.raises(ArgumentError, match=said):
            call()


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 1e-6), (torch.bfloat16, 1e-5), (torch.float32, 1e-12)])
def test_weights_that_cannot_move_at_this_rate_and_dtype_are_said_once(dtype, rate, llama, scored):
    student = student_in(llama, dtype)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    remedy = "keep the weights in float32" if dtype == torch.bfloat16 else "raise the learning rate"
    with pytest.warns(
        TrainingWarning, match=rf"of its weights with a gradient moved in a step at rate .* rounded away: {remedy}"
    ) as caught:
        sft(student, optimizer, scored, steps=3)
    sft(student, optimizer, scored)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_weights_that_move_are_not_spoken_of(dtype, rate, llama, scored):
    student = student_in(llama, dtype)
    sft(student, torch.optim.AdamW(student.parameters(), lr=rate), scored, steps=2)


def test_a_warm_up_from_zero_is_judged_at_the_rate_that_it_reaches(llama, scored):
    student = student_in(llama, torch.bfloat16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
    steps = opd_steps(student, batches(scored, teacher=None, rollouts_per_step=7)[:3], SFTLoss(), optimizer)
    next(steps)  # at rate 0, where nothing is to move
    schedule.step()
    with pytest.warns(TrainingWarning, match="at rate 5e-07 in bfloat16"):
        next(steps)


def test_an_optimizer_over_a_part_of_the_trained_parameters_is_said(llama, scored):
    student = student_in(llama)
    optimizer = torch.optim.SGD(list(student.parameters())[:2], lr=1e-2)
    count = len(list(student.parameters()))
    with pytest.warns(TrainingWarning, match=rf"it has 2 of the student's {count} trained parameters.* and {count - 5} more") as caught:
        sft(student, optimizer, scored)
    assert [warning.filename for warning in caught] == [__file__]


def test_what_the_optimizer_lacks_has_no_share_in_the_norm(llama, scored):
    def norms(freeze):
        student = student_in(llama)
        chosen = list(student.parameters())[:2]
        for parameter in list(student.parameters())[2:]:
            parameter.requires_grad_(not freeze)
        steps = [evolve(batches(scored, teacher=None, rollouts_per_step=7).step(0), index=k) for k in range(3)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingWarning)
            return [m.grad_norm for m in opd_steps(student, steps, SFTLoss(), torch.optim.SGD(chosen, lr=0.0))]

    assert norms(freeze=False) == pytest.approx(norms(freeze=True), rel=1e-6)


def ended(step, token):
    """Return the step with the same last token in every response."""

    def changed(batch):
        targets = batch.targets.clone()
        targets[torch.tensor(batch.lengths).cumsum(0) - 1] = token
        return evolve(batch, targets=targets)

    return evolve(step, batches=tuple(map(changed, step.batches)))


def own_before_last(batch):
    """Return targets in which the student's own end is taught, and something follows, as a line break of a template does."""
    targets = batch.targets.clone()
    targets[torch.tensor(batch.lengths).cumsum(0) - 2] = TOKENIZER_ID.eos_id
    return targets


def test_a_text_that_ends_where_its_student_does_not_stop_is_said(llama, scored):
    student = student_in(llama)
    step = ended(batches(scored, teacher=None, rollouts_per_step=7).step(0), 9)
    train = lambda steps, **options: list(  # noqa: E731
        opd_steps(student, steps, SFTLoss(), torch.optim.SGD(student.parameters(), lr=1e-3), **options)
    )
    said = rf"7 of the 7 responses of the first step end with token 9, and its own end with \[{TOKENIZER_ID.eos_id}\]; .* call `student.stop_at\(9\)`"
    with pytest.warns(EndTokenWarning, match=said) as caught:
        train([step])
    assert [warning.filename for warning in caught] == [__file__]
    train([ended(step, TOKENIZER_ID.eos_id)])
    taught = evolve(step, batches=tuple(evolve(batch, targets=own_before_last(batch)) for batch in step.batches))
    train([taught])
    student.stop_at(np.int64(9))
    json.dumps(student.model.generation_config.eos_token_id)
    assert student.model.generation_config.eos_token_id == sorted({TOKENIZER_ID.eos_id, 9})
    train([step])


def test_trained_parameters_that_nothing_depends_on_are_named(llama, scored):
    student = student_in(llama)
    student.model.vision_tower = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    count = len(list(student.parameters()))
    named = (
        rf"2 of its {count} trained parameters got no gradient in a whole step.*'model\.vision_tower\.weight', 'model\.vision_tower\.bias'"
    )
    with pytest.warns(TrainingWarning, match=named):
        sft(student, optimizer, scored)


def test_an_optimizer_that_finds_its_rates_by_itself_trains(llama, scored):
    student = student_in(llama)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    sft(student, Adafactor(student.parameters()), scored)
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_adapters_whose_first_gradient_is_zero_are_not_spoken_of(llama, scored):
    model = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    student = CausalLMStudent(model, TOKENIZER_ID)
    sft(student, torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3), scored)


def test_a_student_far_from_its_teacher_is_said_with_a_ratio_too(small, scored):
    student, optimizer = small
    optimizer.param_groups[0]["lr"] = 1e-6
    steps, loss = batches(scored, rollouts_per_step=7, ref="behavior")[:2], FusedOPDLoss(ratio_to_ref=True)
    # step 1 is the first of a run that was resumed there; and drift is watched, as `train_phase` does
    with pytest.warns(AdvantageWarning, match=r"nats a token from its teacher in step 1, expected at most 2") as caught:
        metrics = list(watch_drift(opd_steps(student, steps[1:], loss, optimizer)))
    list(opd_steps(student, steps[:1], loss, optimizer))
    assert [warning.filename for warning in caught] == [__file__]
    assert metrics[0].reverse_kl > MAX_DISTANCE
    assert [warning.category for warning in caught] == [AdvantageWarning]


@pytest.mark.parametrize(("reported", "top_k", "loss"), [(False, 0, FusedOPDLoss()), (True, 3, FusedOPDLoss(kl_baseline=True))])
def test_a_student_far_from_its_teacher_is_said_where_no_guard_sees_it(reported, top_k, loss, small, scored, teacher_model, tokenizer):
    rollouts = [record.rollout for record in scored.read(range(len(scored)))]
    store = MemoryStore(scored.manifest)
    store.append(rollouts if reported else [evolve(rollout, behavior_logprobs=None) for rollout in rollouts])
    score_rollouts(store, HFScorer(teacher_model, tokenizer, top_k=top_k))
    student, optimizer = small
    steps = batches(store, rollouts_per_step=7, top_k=top_k > 0, weighting=by_token)[:2]
    with pytest.warns(AdvantageWarning, match=r"nats a token from its teacher in step 0, expected at most 2.* are below 0") as caught:
        list(opd_steps(student, steps, loss, optimizer))
    assert [warning.filename for warning in caught] == [__file__]


def test_a_student_that_finds_what_it_reads_far_less_likely_than_its_teacher_is_said_without_a_ratio(small, scored):
    student, optimizer = small
    step = batches(scored, rollouts_per_step=7, ref="behavior").step(0)
    above = [evolve(batch, teacher_logprobs=batch.ref_logprobs + 3 * (batch.weight > 0), ref_logprobs=None) for batch in step.batches]
    with pytest.warns(AdvantageWarning, match=r"3 nats a token from its teacher .* most of its advantages are above 0") as caught:
        list(opd_steps(student, [evolve(step, batches=tuple(above))], FusedOPDLoss(), optimizer))
    assert len(caught) == 1


def near(step, ref_shift):
    """Return the step with a near teacher, and with a reference policy that is this far from the student on each second rollout."""

    def changed(batch):
        shifted = batch.ref_logprobs - ref_shift * (batch.segment_ids % 2) * (batch.weight > 0)
        return evolve(batch, teacher_logprobs=batch.ref_logprobs, ref_logprobs=shifted)

    return evolve(step, batches=tuple(map(changed, step.batches)))


def test_few_effective_rollouts_in_the_first_step_are_said(small, scored):
    student, optimizer = small
    steps = [near(step, 0.0) for step in batches(scored, rollouts_per_step=14, ref="behavior")[:1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer))
    far = [near(step, 3.0) for step in batches(scored, rollouts_per_step=14, tokens_per_batch=400, ref="behavior")[:1]]
    resumed = [evolve(step, index=60) for step in far]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", AdvantageWarning)  # ratios of e^3 and more blow up the reported KL
        list(opd_steps(student, resumed, FusedOPDLoss(ratio_to_ref=True), optimizer))
    with pytest.warns(
        DriftWarning, match=r"% of the 14 rollouts are effective in the first step, expected at least 50%; it is not the policy"
    ):
        list(opd_steps(student, far, FusedOPDLoss(ratio_to_ref=True), optimizer))


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning")
@pytest.mark.parametrize("rollouts", [1, 2])
def test_another_policy_is_seen_in_a_first_step_of_few_rollouts(rollouts, scored, make_model):
    other = CausalLMStudent(make_model("llama_tied", seed=5), TOKENIZER_ID)
    steps = batches(scored, rollouts_per_step=rollouts, ref="behavior")[:1]
    with pytest.warns(DriftWarning, match=r"nats a token from the policy's log-probs, expected at most 0\.1 in the first step; it is not"):
        list(opd_steps(other, steps, FusedOPDLoss(ratio_to_ref=True), torch.optim.SGD(other.parameters(), lr=1e-3)))


def test_the_rounding_of_another_engine_is_not_another_policy(small, scored):
    step = batches(scored, rollouts_per_step=14, ref="behavior").step(0)
    rng, (rollouts, length) = np.random.default_rng(0), (64, 1000)
    ref = rng.normal(-1.0, 0.3, rollouts * length)

    def drift(noise):
        student = ref + rng.normal(0.0, noise, ref.size)
        return measure_drift(TokenLogprobs(student, ref, ref, np.ones(ref.size), np.repeat(np.arange(rollouts), length)))

    rounding, another = drift(0.05), drift(0.2)
    assert max(rounding.ess, another.ess) < MIN_ESS
    judge_policy(small[1], step, rounding)
    with pytest.warns(DriftWarning, match="it is not the policy that sampled"):
        judge_policy(small[1], step, another)


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.TrainingWarning")  # bfloat16 does not move
def test_a_student_that_is_not_the_policy_is_said_without_a_ref_column_too(llama, scored, make_model):
    def first(student, **options):
        steps = batches(scored, rollouts_per_step=14, tokens_per_batch=200, **options)[:2]
        given = list(steps)
        metrics = list(opd_steps(student, given, FusedOPDLoss(advantage=1.0), torch.optim.SGD(student.parameters(), lr=1e-3)))
        return given, metrics

    for dtype in (torch.float32, torch.bfloat16):
        given, metrics = first(student_in(llama, dtype))
        assert [[b.behavior_logprobs is None for b in step.batches] for step in given] == [[False] * 2, [True] * 2]
        assert all(b.ref_logprobs is None and b.sampler_logprobs is None for step in given for b in step.batches)
        assert [m.drift for m in metrics] == [None, None]
    other = CausalLMStudent(make_model("llama_tied", seed=5), TOKENIZER_ID)
    with pytest.warns(
        DriftWarning, match=r"nats a token from the policy's log-probs, expected at most 0\.1 in the first step; it is not"
    ) as caught:
        first(other)
    assert [warning.filename for warning in caught if warning.category is DriftWarning] == [__file__]
    first(other, teacher=None)  # SFT is on what another model wrote


def test_rewards_alone_are_compared_with_the_policy_in_the_first_step_only(llama, scored, monkeypatch):
    measured = []

    def measure(parts):
        measured.append(sum(len(part.student) for part in parts))
        return measure_step(parts)

    monkeypatch.setattr("lopd.verbs.train.measure_step", measure)
    store = MemoryStore(scored.manifest)
    store.append([record.rollout for record in scored.read(range(len(scored)))])
    label_rollouts(store, lambda _, rollout: float(rollout.response_ids[0] % 2), None)
    student = student_in(llama)
    steps = batches(store, teacher=None, label="label", ref="behavior", rollouts_per_step=4)[:3]
    loss = FusedOPDLoss(advantage=0.0, ratio_to_ref=True, transforms=(add_labels,))
    metrics = list(opd_steps(student, steps, loss, torch.optim.AdamW(student.parameters(), lr=1e-4)))
    assert measured == [metrics[0].response_tokens, 0, 0]
    assert [step.drift for step in metrics] == [None] * 3


def test_the_second_step_is_judged_by_the_policy_of_its_rollouts_too(llama, scored):
    with pytest.warns(AdvantageWarning, match="column 'teacher'"):
        student, first = student_in(llama), batches(scored, rollouts_per_step=4).step(0)
    assert first.batches[0].ref_logprobs is None
    with pytest.warns(AdvantageWarning, match="Loss FusedOPDLoss: .* of its advantages are below") as caught:
        list(opd_steps(student, [first] * 3, FusedOPDLoss(), torch.optim.AdamW(student.parameters(), lr=1e-4)))
    assert len([one for one in caught if "advantages" in str(one.message)]) == 1


def test_a_student_that_is_not_the_policy_is_said_where_rewards_alone_teach_it(llama, scored, make_model):
    store = MemoryStore(scored.manifest)
    store.append([record.rollout for record in scored.read(range(len(scored)))])
    label_rollouts(store, lambda _, rollout: float(rollout.response_ids[0] % 2), None)
    rewards = FusedOPDLoss(advantage=0.0, ratio_to_ref=True, transforms=(add_labels,))

    def train(student, loss=rewards, label="label"):
        steps = batches(store, rollouts_per_step=14, teacher=None, label=label, ref="behavior", weighting=by_token)[:2]
        metrics = opd_steps(student, steps, loss, torch.optim.AdamW(student.parameters(), lr=1e-3))
        assert [m.drift for m in metrics] == [None, None]

    train(student_in(llama))
    other = CausalLMStudent(make_model("llama_tied", seed=5), TOKENIZER_ID)
    with pytest.warns(DriftWarning, match="it is not the policy that sampled") as caught:
        train(other)
    assert [warning.filename for warning in caught] == [__file__]
    train(other, SFTLoss(), label=None)  # SFT is on what another model wrote


WRONG_OUTPUTS = {
    "a tensor": (lambda each, zero, m: zero, "it gave a Tensor, expected a LossOutput"),
    "no gradient": (lambda each, zero, m: LossOutput(zero, zero, zero), r"its loss_sum is a tensor of shape \(\) without a gradient"),
    "not summed": (
        lambda each, zero, m: LossOutput(each, zero, zero),
        r"its loss_sum is a tensor of shape \(\d+,\) with a gradient, expected a tensor of shape \(\) with",
    ),
    "a sum with its gradient": (
        lambda each, zero, m: LossOutput(each.sum(), each.sum(), zero),
        r"its reverse_kl_sum is .* \(\) with a gradient",
    ),
    "a number": (lambda each, zero, m: LossOutput(each.sum(), zero, 0.0), "its clipped_sum is a float, expected a tensor"),
    "nothing": (lambda each, zero, m: LossOutput(each.sum(), None, zero), "its reverse_kl_sum is None, expected a tensor"),
    "log-probs with their gradient": (
        lambda each, zero, m: LossOutput(each.sum(), zero, zero, logprobs=each[:m]),
        r"its logprobs is .* with a gradient, expected .* without a gradient; .* detach all but loss_sum",
    ),
    "log-probs of prompts too": (
        lambda each, zero, m: LossOutput(each.sum(), zero, zero, logprobs=each.detach()),
        r"its logprobs is a tensor of shape \(\d+,\) without .*; give sums, and log-probs of `batch.counted`",
    ),
}


@pytest.mark.parametrize(("give", "message"), WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS)
def test_a_loss_that_gives_something_else_is_refused(give, message, small, scored):
    def loss(hidden_ND, head, batch):
        return give(hidden_ND.sum(-1), hidden_ND.sum().detach(), len(batch.counted))

    student, optimizer = small
    before = [parameter.detach().clone() for parameter in student.parameters()]
    with pytest.raises(InvalidRecordError, match=f"Loss function: {message}"):
        list(opd_steps(student, batches(scored, ref="behavior")[:1], loss, optimizer))
    assert all(np.array_equal(a, b.detach()) for a, b in zip(before, student.parameters(), strict=True))


BASELINED = [
    FusedOPDLoss(kl_baseline=True),
    FusedLoss(EntropyBonus(OPDObjective(kl_baseline=True))),
    WeightedLoss([(1.0, FusedOPDLoss()), (1.0, ReferenceOPDLoss(kl_baseline=True))]),
    FusedOPDLoss(transforms=(partial(add_labels, scale=0.5),)),
]


def with_supports(steps, loss=BASELINED[0]):
    """Yield the steps, with a support of the token itself, to which the teacher gives a half, and with labels if the loss reads them."""
    for step in steps:
        halves = [torch.full((len(batch.inputs), 1), 0.5) for batch in step.batches]
        supports = [{"top_k_logprobs": half.log(), "top_k_tail": half[:, 0]} for half in halves]
        read = () if loss.ignores_labels else ("label_values", "label_means")
        labels = [dict.fromkeys(read, half[:, 0]) for half in halves]
        made = [evolve(b, top_k_ids=b.targets[:, None], **s, **y) for b, s, y in zip(step.batches, supports, labels, strict=True)]
        yield evolve(step, batches=tuple(made))


@pytest.mark.parametrize("loss", BASELINED)
@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")  # step 0 twice
def test_a_baseline_under_weights_by_rollout_is_said_once(loss, llama, scored):
    student = student_in(llama)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    said = r"it has a baseline, and the weight of a token depends on .*weighting=by_token"
    steps = [*with_supports(batches(scored, rollouts_per_step=14)[:2], loss)]
    with pytest.warns(TrainingWarning, match=said) as caught:
        list(opd_steps(student, steps, loss, optimizer))
    list(opd_steps(student, steps, loss, optimizer))
    assert [warning.filename for warning in caught if warning.category is TrainingWarning] == [__file__]


@pytest.mark.parametrize(("weighting", "loss"), [(by_token, BASELINED[0]), (by_rollout, FusedOPDLoss())])
@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning")
def test_a_baseline_by_token_and_a_loss_without_one_are_not_spoken_of(weighting, loss, llama, scored):
    student = student_in(llama)
    steps = with_supports(batches(scored, rollouts_per_step=14, weighting=weighting)[:2])
    list(opd_steps(student, steps, loss, torch.optim.AdamW(student.parameters(), lr=1e-3)))


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning")
def test_a_baseline_says_nothing_of_a_rank_that_only_keeps_step(llama, scored):
    (step,) = with_supports(batches(scored, rollouts_per_step=14)[:1])
    idle = tuple(evolve(batch, weight=torch.zeros_like(batch.weight)) for batch in step.batches)
    optimizer = torch.optim.AdamW(student_in(llama).parameters(), lr=1e-3)
    judge_baseline(optimizer, BASELINED[0], idle)
