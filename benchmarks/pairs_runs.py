"""One pair of teacher and student: what its store shows before the first step, and what each way to train makes of it.

Everything that a pair needs is in folders, so pairs of any kind go through the same lines.  All arms of a pair have the same start, prompts,
number of rollouts, steps, rate and optimizer.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, evolve, field, frozen
from testbed.runs import ALONE, Support

from lopd import (
    CausalLMStudent,
    ConsistencyPolicy,
    FusedLoss,
    FusedOPDLoss,
    FusedSFTLoss,
    Lineage,
    MemoryStore,
    ModelId,
    SamplingParams,
    TopKObjective,
    ZarrStore,
    batches,
    by_token,
    collect_rollouts,
    opd_steps,
    refresh_every,
    sample_round,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.guards import measure_start
from lopd.losses.divergences import reverse_kl
from lopd.protocols import LogprobStore, OPDLoss
from lopd.records import Prompt, Rollout, StepMetrics
from lopd.records.overlap import compare_supports

Row = dict[str, Any]

#: Beside those of `lopd.guards.measure_start`.
SMALL_OVERLAPS = (1, 4)
#: Of the held-out evaluation, beyond that of the run.
_EVALUATION_SEED = 1000
_PROMPTS_AT_ONCE = 2048


@frozen
class Arm:
    """A way to train the SFT student.

    Args:
        name: in tables.
        loss: loss of every step.
        support: what is kept beside each response token.
        rounds: how often the student samples and the teacher scores: 1 is offline, None is once a step (online), 0 trains on the teacher's own text.
    """

    name: str
    loss: OPDLoss
    support: Support = ALONE
    rounds: int | None = 1


_DRAWN = Support(drawn=16)
#: What lopd recommends (`docs/decisions/0008-recommended-loss.md`).
_RECOMMENDED = FusedLoss(TopKObjective(reverse_kl, residual=True))
TEXT = Arm("SFT continued", FusedSFTLoss(), rounds=0)
PLAIN = Arm("Lightning", FusedOPDLoss())
RATIO = Arm("ratio to ref", FusedOPDLoss(ratio_to_ref=True))
DRAWN = Arm("16 drawn", _RECOMMENDED, _DRAWN)
REFRESHED = evolve(DRAWN, name="16 drawn, 4 rounds", rounds=4)
ONLINE = evolve(RATIO, name="online OPD", rounds=None)
ONLINE_DRAWN = evolve(DRAWN, name="online OPD, 16 drawn", rounds=None)
ARMS = (TEXT, PLAIN, RATIO, DRAWN, REFRESHED, ONLINE, ONLINE_DRAWN)
#: Where decoding costs minutes, the arms that sample fresh rollouts are one.
FEW_ARMS = (TEXT, RATIO, DRAWN, ONLINE_DRAWN)


@frozen
class Pace:
    """Optimizer steps, rollouts in each, the highest rate, and the size of a micro-batch."""

    steps: int
    rollouts: int
    lr: float
    tokens_per_batch: int


@frozen(eq=False)
class Pair:
    """A teacher, a student that was fine-tuned on its text, and what they are trained and measured on.

    Args:
        name: name of the pair; its seeds share it.
        seed: seed of everything that is drawn.
        teacher, student: folders of models.
        opd, held_out: prompts, disjoint.
        sampling: how every response is drawn.
        samples: responses for each held-out prompt.
        pace: pace of every arm.
        width: tokens of the supports that are compared before the first step.
        verify: 1 if a response is right; None where nothing is right or wrong.
        layers: those that are trained; None for all.
        rows_per_batch: sampled together.
        dtype: in which models sample, score and are measured; weights that are trained stay float32.
    """

    name: str
    seed: int
    teacher: Path
    student: Path
    opd: Sequence[Prompt]
    held_out: Sequence[Prompt]
    sampling: SamplingParams
    samples: int
    pace: Pace
    width: int
    verify: Callable[[Prompt, Rollout], float] | None = None
    layers: Sequence[int] | None = None
    rows_per_batch: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def evaluation(self) -> SamplingParams:
        """How responses to held-out prompts are drawn."""
        return evolve(self.sampling, samples_per_prompt=self.samples, seed=self.seed + _EVALUATION_SEED)

    def source(self, model: Path, sampling: SamplingParams) -> HFSource:
        """Return a source of rollouts from the model in this folder."""
        return evolve(HFSource.from_folder(model, sampling, self.dtype), rows_per_batch=self.rows_per_batch)

    def scorer(self, support: Support = ALONE) -> HFScorer:
        """Return the teacher as a scorer."""
        return HFScorer.from_folder(self.teacher, self.dtype, top_k=support.top_k, drawn=support.drawn)


@frozen(eq=False)
class Learner:
    """A student on its way."""

    pair: Pair
    student: CausalLMStudent
    tokenizer: Any
    lineage: Lineage
    optimizer: torch.optim.Optimizer = field()

    @optimizer.default
    def _adamw(self) -> torch.optim.Optimizer:
        trained = [p for _, p in self.student.named_parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.pair.pace.lr, betas=(0.9, 0.98), weight_decay=0.0)

    @classmethod
    def of(cls, pair: Pair) -> "Learner":
        """Load the SFT student."""
        model, tokenizer = load_model(pair.student, torch.float32)
        if pair.layers is not None:
            model.requires_grad_(False)
            for layer in pair.layers:
                model.model.layers[layer].requires_grad_(True)
        student = CausalLMStudent(model, tokenizer, autocast=None if pair.dtype == torch.float32 else pair.dtype)
        return cls(pair, student, tokenizer, Lineage.read(pair.student))

    def source(self, sampling: SamplingParams, generation: int = 0) -> HFSource:
        """Return the student as it is; its name states its step, and a hash of all weights at each step would add nothing."""
        pair, model = self.pair, self.student.model
        model = model if model.dtype == pair.dtype else deepcopy(model).to(pair.dtype)
        identity = ModelId("student on its way", f"{pair.name} {pair.seed} {generation}", "as trained")
        known = {"generation": generation, "identity": identity, "rows_per_batch": pair.rows_per_batch}
        return HFSource(model, self.tokenizer, sampling, self.lineage, **known)

    def learn(self, steps: Iterator[StepMetrics]) -> None:
        """Take all steps; the rate rises over the first tenth and falls in a straight line."""
        pace = self.pair.pace
        for step in range(pace.steps):
            rate = pace.lr * min((step + 1) / (pace.steps / 10), 1.0) * (1 - step / pace.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            next(steps)


def stored(pair: Pair, folder: Path) -> ZarrStore:
    """Open the rollouts of the SFT student for all OPD prompts: what every offline arm trains on.

    Column `teacher` has the teacher's log-probs of the drawn tokens, `own` those of its own most likely ones.
    """
    sampling = evolve(pair.sampling, candidates=pair.width, drawn=_DRAWN.drawn)
    source = pair.source(pair.student, sampling)
    folder.mkdir(parents=True, exist_ok=True)
    store = ZarrStore.open_or_create(str(folder / "store.zarr"), source.manifest)
    collect_rollouts(source, pair.opd, store, prompts_per_batch=_PROMPTS_AT_ONCE)
    for column, support in (("teacher", _DRAWN), ("own", Support(top_k=pair.width))):
        score_rollouts(store, pair.scorer(support), column=column, rollouts_per_batch=_PROMPTS_AT_ONCE)
    return store


def run_start(pair: Pair, folder: Path) -> Row:
    """Measure what is known before the first step, and how good the SFT student is."""
    begun = time.process_time()
    store = stored(pair, folder)
    spent = time.process_time() - begun
    known = asdict(measure_start(store, teacher="own", count=len(store)))
    known["overlap"] = {str(k): share for k, share in known["overlap"].items()} | _small_overlaps(store)
    teachers = _right(pair, pair.source(pair.teacher, pair.evaluation).sample(pair.held_out)) if pair.verify else {}
    return {"arm": "SFT", "cpu_s": spent, "known": known, "teacher": teachers, **measure(pair, Learner.of(pair))}


def _small_overlaps(store: LogprobStore) -> Row:
    records = store.read(range(len(store)), columns=("own",), top_k=("own", "policy"))
    found = [compare_supports(record.top_k["own"], record.top_k["policy"], SMALL_OVERLAPS) for record in records]
    return {str(k): {"mean": float(np.concatenate([f[f"overlap{k}"] for f in found]).mean())} for k in SMALL_OVERLAPS}


def run_arm(pair: Pair, arm: Arm, folder: Path) -> Row:
    """Train the SFT student in this way, and measure it."""
    warnings.simplefilter("ignore", UserWarning)
    begun = time.process_time()
    learner = Learner.of(pair)
    if arm.rounds == 0:
        steps = _steps(learner, arm, _teachers_text(pair))
    elif arm.rounds == 1:
        steps = _steps(learner, arm, ZarrStore.open(str(folder / "store.zarr")))
    else:
        steps = _rounds(learner, arm)
    learner.learn(steps)
    return {"arm": arm.name, "cpu_s": time.process_time() - begun, **measure(pair, learner)}


def _teachers_text(pair: Pair) -> MemoryStore:
    """Sample what the teacher writes on the OPD prompts."""
    source = pair.source(pair.teacher, pair.sampling)
    store = MemoryStore(source.manifest)
    collect_rollouts(source, pair.opd, store, prompts_per_batch=_PROMPTS_AT_ONCE)
    return store


def _steps(
    learner: Learner, arm: Arm, store: LogprobStore, *, start: int = 0, generation: int = 0, **options: Any
) -> Iterator[StepMetrics]:
    pace = learner.pair.pace
    if arm.rounds != 0:
        options |= {"ref": arm.support.ref(generation), "top_k": arm.support.width > 0}
    stream = batches(
        store,
        rollouts_per_step=pace.rollouts,
        tokens_per_batch=pace.tokens_per_batch,
        seed=learner.pair.seed,
        teacher="teacher" if arm.rounds != 0 else None,
        weighting=by_token,
        consistency=ConsistencyPolicy.WARN,
        **options,
    )
    return opd_steps(learner.student, stream[start : pace.steps], arm.loss, learner.optimizer)


def _rounds(learner: Learner, arm: Arm) -> Iterator[StepMetrics]:
    """Train on every prompt once, as offline; each round samples the next prompts."""
    pair, pace = learner.pair, learner.pair.pace
    every = 1 if arm.rounds is None else pace.steps // arm.rounds
    count = every * pace.rollouts
    teacher = pair.scorer(arm.support)

    def make_round(generation: int, start: int) -> Iterator[StepMetrics]:
        source = learner.source(arm.support.sampling(pair.sampling), generation)
        store = MemoryStore(source.manifest)
        rows = sample_round(source, teacher, pair.opd[generation * count : (generation + 1) * count], store)
        return _steps(learner, arm, store, start=start, generation=generation, rows=rows)

    return refresh_every(every, make_round, stop=pace.steps)


def fine_tune(pair: Pair, folder: Path) -> None:
    """Fine-tune the student of a pair on what the teacher writes for its prompts, and export it to a folder."""
    learner, text = Learner.of(pair), _teachers_text(pair)
    learner.learn(_steps(learner, TEXT, text))
    learner.student.export(folder, learner.tokenizer, Lineage(sft_teacher=text.manifest.policy))


def measure(pair: Pair, learner: Learner) -> Row:
    """Measure reverse KL to the teacher over the whole vocabulary, and accuracy, on fresh responses to the held-out prompts.

    Each is one number a prompt.
    """
    source = learner.source(pair.evaluation)
    rollouts = source.sample(pair.held_out)
    sums = exact_reverse_kl(source, pair.scorer(), rollouts).pooled(pair.samples)
    return {"sums": sums.sums.tolist(), "counts": sums.counts.tolist(), **_right(pair, rollouts)}


def _right(pair: Pair, rollouts: Sequence[Rollout]) -> Row:
    if pair.verify is None:
        return {}
    asked = [prompt for prompt in pair.held_out for _ in range(pair.samples)]
    right = [pair.verify(prompt, rollout) for prompt, rollout in zip(asked, rollouts, strict=True)]
    return {"right": np.reshape(right, (-1, pair.samples)).mean(1).tolist()}
