"""The arms of `evidence.py`, and one run of each: trained from the same SFT student, measured on the way, its seconds counted by what they are for.

Everything that an arm may choose is in `Arm`; optimizer, constant rate, clipping of gradients, prompts, length and number of rollouts a step are
shared.  All stored arms of a student train on one store.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from attrs import evolve, field, frozen
from evidence_bed import Bed, Row, measure, optimizer_of, teacher
from numpy.typing import NDArray
from testbed.runs import Clock, Support, TimedScorer, TimedSource
from testbed.trl_peer import counted, make_trainer
from transformers import TrainerCallback

from lopd import (
    CausalLMStudent,
    EntropyBonus,
    FusedLoss,
    FusedOPDLoss,
    FusedSFTLoss,
    MemoryStore,
    ModelId,
    TopKObjective,
    ZarrStore,
    batches,
    by_rollout,
    by_token,
    opd_steps,
    refresh_every,
    sample_round,
)
from lopd.engines.hf import HFSource, load_model
from lopd.losses.divergences import reverse_kl
from lopd.losses.objective import OPDObjective
from lopd.protocols import LogprobReader, OPDLoss
from lopd.records import Lineage, StepMetrics, Weighting, policy_column
from lopd.verbs import StepStream

Way = Literal["stored", "live", "teacher's text", "TRL"]


@frozen
class Arm:
    """A way to run the stage after SFT.

    Args:
        name: in tables.
        loss: loss of every step.
        way: where rollouts come from: a store; the student as it is, at every step; the teacher; or TRL's trainer, which samples, too.
        column: column of the store with the teacher's scores.
        support: support of live rollouts.
        share: share of the store's rollouts; of the prompts, where there is no store.
        passes: passes over these rollouts.
        batch: rollouts a step, times that of the size.
        weighting: weights of tokens.  A token's weight must not depend on the draw where others than the sampled one are compared
            (`TopKObjective`), so by token; Lightning's is the paper's, LSPD's is that of Lightning, and SFT goes on as it began.
        rate_of: name of the arm whose rate it takes over; None tries all.
    """

    name: str
    loss: OPDLoss = field(factory=FusedOPDLoss)
    way: Way = "stored"
    column: str = "teacher"
    support: Support = field(factory=Support)
    share: float = 1.0
    passes: float = 1.0
    batch: float = 1.0
    weighting: Weighting = by_token
    rate_of: str | None = None

    @property
    def has_support(self) -> bool:
        """Whether more than the sampled token is compared."""
        return self.column != "teacher" or self.support.width > 0

    def rollouts(self, bed: Bed) -> int:
        """Return the number of stored rollouts."""
        return round(self.share * bed.size.opd_prompts)

    def per_step(self, bed: Bed) -> int:
        """Return the number of rollouts of a step."""
        return round(self.batch * bed.size.batch)

    def steps(self, bed: Bed) -> int:
        """Return the number of steps."""
        return round(self.passes * self.rollouts(bed) / self.per_step(bed))

    def looks(self, bed: Bed, points: Sequence[float]) -> list[int]:
        """Return the steps after which the student is measured, from shares of all steps."""
        return sorted({max(1, round(point * self.steps(bed))) for point in points})


_RATIO = FusedOPDLoss(ratio_to_ref=True)
_BUCKET, _RESIDUAL = (FusedLoss(TopKObjective(reverse_kl, residual=residual)) for residual in (False, True))
#: Candidates of a live student: nearly all of its mass, and the residual stands for the rest.
WIDE = 256

#: A quarter more steps pay for the teacher's scores, which this arm does without.
SFT = Arm("SFT continued", FusedSFTLoss(), "teacher's text", passes=1.25, weighting=by_rollout)
PLAIN = Arm("Lightning", weighting=by_rollout)
RATIO = Arm("ratio", _RATIO)
TOP_64 = Arm("teacher's top 64", _BUCKET, column="top64")
DRAWN = Arm("16 drawn", _RESIDUAL, column="drawn")
ONLINE = Arm("online OPD", _RATIO, "live")
SAME = Arm(f"online OPD, {TOP_64.name}", TOP_64.loss, "live", support=Support(top_k=64))
WHOLE = Arm(f"online OPD, {WIDE} candidates, residual", _RESIDUAL, "live", support=Support(candidates=WIDE))
#: Larger batches are what makes sampling cheap, and a live run can have them, too, if it takes fewer steps.
WIDER = evolve(ONLINE, name="online OPD, twice as many a step", batch=2.0, rate_of=ONLINE.name)
TRL = Arm("TRL DistillationTrainer", way="TRL")
STORED = (
    PLAIN,
    RATIO,
    Arm("teacher's top 16", _BUCKET, column="top16"),
    Arm("teacher's top 16, residual", _RESIDUAL, column="top16", rate_of="teacher's top 16"),
    TOP_64,
    Arm("teacher's top 64, residual", _RESIDUAL, column="top64", rate_of=TOP_64.name),
    Arm("16 candidates, residual", _RESIDUAL, column="candidates"),
    DRAWN,
    evolve(PLAIN, name="LSPD, clip 5, entropy bonus", loss=FusedLoss(EntropyBonus(OPDObjective(clip=5.0), 0.05)), rate_of=PLAIN.name),
)
LIVE = (ONLINE, SAME, WIDER, WHOLE, TRL)
ARMS = (SFT, *STORED, *LIVE)
#: On the student that is far from its teacher.
MAIN = (SFT, PLAIN, RATIO, TOP_64, ONLINE)


def variants(arm: Arm) -> tuple[Arm, ...]:
    """Return the arm with other numbers of passes and shares of the store."""
    return (
        evolve(arm, name=f"{arm.name} (two passes)", passes=2.0),
        evolve(arm, name=f"{arm.name} (half of the store)", share=0.5),
        evolve(arm, name=f"{arm.name} (a quarter of the store)", share=0.25),
        evolve(arm, name=f"{arm.name} (a quarter of the store, two passes)", share=0.25, passes=2.0),
        evolve(arm, name=f"{arm.name} (an eighth of the store, four passes)", share=0.125, passes=4.0),
    )


@frozen(eq=False)
class _Stage:
    """What a run is made of."""

    bed: Bed
    arm: Arm
    rate: float
    student: CausalLMStudent
    lineage: Lineage
    optimizer: torch.optim.Optimizer
    clock: Clock

    def stream(self, store: LogprobReader, rows: NDArray[np.int64], **columns: Any) -> StepStream:
        """Return the steps of this arm, without end."""
        return batches(
            store, rollouts_per_step=self.arm.per_step(self.bed), seed=self.bed.seed, rows=rows, weighting=self.arm.weighting, **columns
        )

    def train(self, stream: StepStream) -> Iterator[StepMetrics]:
        """Train on these steps."""
        return opd_steps(self.student, stream, self.arm.loss, self.optimizer)


def run_arm(bed: Bed, arm: Arm, rate: float, points: Sequence[float]) -> Row:
    """Train an arm, and return its row: what was measured after these shares of the steps, and what had been spent by then."""
    warnings.simplefilter("ignore", UserWarning)
    student, tokenizer, lineage = bed.student()
    # what these do once a process is not counted in any arm
    _ = bed.prompts(), bed.scorer, HFSource(student.model, tokenizer, bed.sampling(), lineage)
    stage = _Stage(bed, arm, rate, student, lineage, optimizer_of(student, rate), Clock())
    total, before, curve = arm.steps(bed), paid(bed, arm), []
    at = arm.looks(bed, points)

    def look(step: int) -> None:
        if step in at:
            seen = partial(measure, bed, student.model, end=step == total)
            spent = {name: seconds + before.get(name, 0.0) for name, seconds in stage.clock.split().items()}
            curve.append({"step": step, "cpu_s": spent, **stage.clock.run("evaluation", seen)})

    if arm.way == "TRL":
        _trl(stage, look)
    else:
        for metrics in {"stored": _stored, "live": _live, "teacher's text": _imitate}[arm.way](stage):
            look(metrics.step + 1)
    return {"kind": "run", "seed": bed.seed, "student": bed.kind.name, "arm": arm.name, "rate": rate, "steps": total, "curve": curve}


def paid(bed: Bed, arm: Arm) -> dict[str, float]:
    """Return the CPU seconds before the first step.

    They are those of a store of this share, or this share of those of the teacher's text, which was made at once.
    """
    seconds = {"sampling": 0.0, "scoring": 0.0}
    if arm.way == "stored":
        cost = json.loads((bed.of_student / "store.json").read_text())["cpu_s"]
        whole, part = cost["1"]["scoring"], cost[f"{arm.share:g}"]
        seconds = {"sampling": part["sampling"], "scoring": part["scoring"]["teacher"] * whole[arm.column] / whole["teacher"]}
    if arm.way == "teacher's text":
        written = json.loads((bed.home / "text.json").read_text())
        seconds["sampling"] = written["cpu_s"]["sampling"] * bed.size.opd_prompts / written["rollouts"]
    return {**seconds, "all": sum(seconds.values())}


def _stored(stage: _Stage) -> Iterator[StepMetrics]:
    bed, arm = stage.bed, stage.arm
    store, ref = ZarrStore.open(bed.of_student / "store.zarr"), policy_column(0) if arm.column == "drawn" else "behavior"
    stream = stage.stream(store, np.arange(arm.rollouts(bed)), teacher=arm.column, ref=ref, top_k=arm.has_support)
    return stage.train(stream[: arm.steps(bed)])


def _live(stage: _Stage) -> Iterator[StepMetrics]:
    """Train on fresh rollouts at every step; its prompts are sampled together, as the student of the next step does not exist yet."""
    bed, arm = stage.bed, stage.arm
    prompts, size, tokenizer = bed.prompts()[1], arm.per_step(bed), teacher(bed.folder / "teacher")[1]
    scorer = TimedScorer(evolve(bed.scorer, candidates=arm.support.candidates, top_k=arm.support.top_k), stage.clock)

    def make_round(generation: int, start: int) -> Iterator[StepMetrics]:
        identity = ModelId("online student", f"step-{start}", "as trained")
        source = HFSource(
            stage.student.model, tokenizer, bed.sampling(candidates=arm.support.candidates), stage.lineage, identity, generation
        )
        store = MemoryStore(source.manifest)
        chosen = [prompts[(start * size + i) % len(prompts)] for i in range(size)]
        rows = sample_round(TimedSource(source, stage.clock), scorer, chosen, store)
        return stage.train(stage.stream(store, rows, ref="behavior", top_k=arm.has_support)[start:])

    return refresh_every(1, make_round, stop=arm.steps(bed))


def _imitate(stage: _Stage) -> Iterator[StepMetrics]:
    """Train on the teacher's answers to the OPD prompts; some of them twice, if there are more steps than one pass has."""
    bed = stage.bed
    return stage.train(stage.stream(bed.text(), bed.rows_of_text(bed.prompts()[1]), teacher=None)[: stage.arm.steps(bed)])


def _trl(stage: _Stage, look: Callable[[int], None]) -> None:
    """Train in TRL with a teacher of its own: TRL changes it, and other runs of this process use theirs."""
    bed, arm, (model, tokenizer) = stage.bed, stage.arm, load_model(stage.bed.folder / "teacher", torch.float32)

    class Watch(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            look(state.global_step)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            (stage.student.model, model.requires_grad_(False)),
            tokenizer,
            [tokenizer.decode(prompt.token_ids) for prompt in bed.prompts()[1]],
            scratch,
            per_device_train_batch_size=arm.per_step(bed),
            max_steps=arm.steps(bed),
            learning_rate=stage.rate,
            weight_decay=0.0,
            max_completion_length=bed.size.new_tokens,
            seed=bed.seed,
        )
        trainer.add_callback(Watch())
        stage.clock.begun = time.process_time()
        with counted(trainer, stage.clock):
            trainer.train()
