"""What `evidence.py` runs: its plan, the trials on the seed of choice, what is chosen there, and how long it takes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from attrs import evolve, field, frozen
from evidence_arms import ARMS, MAIN, ONLINE, RATIO, SFT, TOP_64, TRL, Arm, run_arm, variants
from evidence_bed import FAR, NEAR, Bed, Kind, Row, Size, both_kl, once
from record import ROOT

#: Shares of the steps after which a run is measured; one that no frontier shows, at its end alone.
HALF, END = (0.5, 1.0), (1.0,)


@frozen
class Plan:
    """What is run.

    Args:
        folder: where units are kept.
        home: folder of the results.
        seeds: seeds of the report.
        choice: seed on which everything is chosen; None takes the first rate, the arm `TOP_64`, and the rival `ONLINE`.
        choice_held_out: questions there.  More of them cost less than another seed of choice, as nothing is built or trained for them.
        rates: that each arm chooses from.
        beyond: a rate that an arm is tried at, too, if the highest of them is its best.
        size: size of everything.
        arms: arms of each student.
    """

    folder: Path = ROOT / "runs" / "evidence"
    home: Path = ROOT / "benchmarks" / "results"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    choice: int | None = 100
    choice_held_out: int = 64
    rates: tuple[float, ...] = (1.5e-5, 5e-5, 1.5e-4)
    beyond: float = 5e-4
    size: Size = field(factory=Size)
    arms: tuple[tuple[Kind, tuple[Arm, ...]], ...] = ((NEAR, ARMS), (FAR, MAIN))

    def bed(self, seed: int, kind: Kind) -> Bed:
        """Return the bed of a seed and a student."""
        size = evolve(self.size, held_out=self.choice_held_out) if seed == self.choice else self.size
        return Bed(self.folder, size, seed, kind)

    def beds(self) -> list[Bed]:
        """Return all beds."""
        trial = [] if self.choice is None else [self.bed(self.choice, NEAR)]
        return [*trial, *(self.bed(seed, kind) for seed in self.seeds for kind, _ in self.arms)]


FULL = Plan()
QUICK = Plan(
    ROOT / "runs" / "evidence-quick",
    ROOT / "runs" / "evidence-quick",
    (0,),
    None,
    rates=(1e-4,),
    size=Size(sft_prompts=64, opd_prompts=32, held_out=16, new_tokens=32, sft_batch=8),
    arms=((NEAR, (SFT, RATIO, TOP_64, ONLINE, TRL)),),
)


def parts(plan: Plan, bed: Bed) -> tuple[list[str], list[float]]:
    """Return columns and shares of the store of a student.

    The best arm of the near student, whichever it is, also trains on shares of its store.
    """
    columns = dict.fromkeys(["teacher", "top64", *(arm.column for arm in dict(plan.arms)[bed.kind] if arm.way == "stored")])
    return list(columns), sorted({arm.share for arm in variants(TOP_64)} - {1.0}) if bed.kind == NEAR else []


@frozen
class Unit:
    """A run that is to be made: once."""

    bed: Bed
    arm: Arm
    rate: float
    points: tuple[float, ...] = END

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self.bed.run_file(self.arm.name, self.rate)

    @property
    def effort(self) -> tuple[str, int, int]:
        """What takes as long has the same."""
        return self.arm.name, len(self.points), self.bed.size.held_out

    def __call__(self) -> Row:
        """Make it, or find it made."""
        row = once(self.path, partial(run_arm, self.bed, self.arm, self.rate, self.points))
        found, expected = [point["step"] for point in row["curve"]], self.arm.looks(self.bed, self.points)
        if not {*expected} <= {*found}:
            raise SystemExit(f"Evidence {self.path}: it was measured after steps {found}, expected {expected}; move it away.")
        return row


def rate_trials(plan: Plan) -> list[Unit]:
    """Return arms of the near student at every rate, on the seed of choice; the far student takes over what is chosen there."""
    if plan.choice is None:
        return []
    bed, arms = plan.bed(plan.choice, NEAR), dict(plan.arms)[NEAR]
    return [Unit(bed, arm, rate) for arm in arms if arm.rate_of is None for rate in plan.rates]


def _best_rates(trials: Sequence[Unit]) -> dict[str, float]:
    """Return arm name -> the rate with the least KL at the end."""
    ends: dict[str, dict[float, float]] = {}
    for unit in trials:
        ends.setdefault(unit.arm.name, {})[unit.rate] = both_kl(unit())
    return {name: min(found, key=found.__getitem__) for name, found in ends.items()}


def edge_trials(plan: Plan) -> list[Unit]:
    """Return the arms that are best at the highest rate, at one beyond it; all trials of rates must be finished."""
    best = _best_rates(rate_trials(plan))
    return [Unit(unit.bed, unit.arm, plan.beyond) for unit in rate_trials(plan) if unit.rate == best[unit.arm.name] == max(plan.rates)]


def choose_rates(plan: Plan) -> dict[str, float]:
    """Return arm name -> its best rate, or that of the arm it takes it over from; all trials of rates must be finished."""
    arms = dict(plan.arms)[NEAR]
    if plan.choice is None:
        return {arm.name: plan.rates[0] for arm in arms}
    own = _best_rates([*rate_trials(plan), *edge_trials(plan)])
    return {arm.name: own[arm.rate_of or arm.name] for arm in arms}


def other_trials(plan: Plan, rates: dict[str, float]) -> list[Unit]:
    """Return the trials of arms that take over a rate."""
    if plan.choice is None:
        return []
    bed = plan.bed(plan.choice, NEAR)
    return [Unit(bed, arm, rates[arm.name]) for arm in dict(plan.arms)[NEAR] if arm.rate_of]


def made(units: Sequence[Unit]) -> bool:
    """Return whether all of them are finished."""
    return all(unit.path.exists() for unit in units)


@frozen
class Chosen:
    """What the seed of choice decides, by both KLs at the end.

    Args:
        rates: name of an arm -> its rate.
        best: the stored arm with the least.
        rival: the live arm of lopd with the least.
    """

    rates: dict[str, float]
    best: Arm
    rival: Arm

    @classmethod
    def of(cls, plan: Plan) -> "Chosen":
        """Read the trials of all arms, which are made by now."""
        rates = choose_rates(plan)
        if plan.choice is None:
            return cls(rates, TOP_64, ONLINE)
        trials = [*rate_trials(plan), *edge_trials(plan), *other_trials(plan, rates)]
        ends = {unit.arm: both_kl(unit()) for unit in trials if unit.rate == rates[unit.arm.name]}
        best, rival = (min((arm for arm in ends if arm.way == way), key=ends.__getitem__) for way in ("stored", "live"))
        return cls(rates, best, rival)

    def forms(self, bed: Bed) -> list[Unit]:
        """Return the best arm in other forms."""
        rate = self.rates[self.best.name]
        return [Unit(bed, arm, rate) for arm in variants(self.best)]

    def form_trials(self, plan: Plan) -> list[Unit]:
        """Return the trials of those forms on the seed of choice."""
        return [] if plan.choice is None else self.forms(plan.bed(plan.choice, NEAR))

    def runs(self, plan: Plan) -> list[Unit]:
        """Return all runs of the report, the longest of a seed first, so that two workers end a seed at about the same time."""
        units, curved = [], {RATIO, self.best, self.rival, ONLINE, TRL}
        for seed in plan.seeds:
            for kind, arms in plan.arms:
                bed = plan.bed(seed, kind)
                points = {arm: HALF if kind == NEAR and arm in curved else END for arm in arms}
                units += [Unit(bed, arm, self.rates[arm.name], points[arm]) for arm in reversed(arms)]
                units += self.forms(bed) if kind == NEAR else []
        return units


def plan_units(plan: Plan) -> list[Unit]:
    """Return all runs; where a rate or an arm is not chosen yet, a run that takes as long stands for it."""
    rates = dict.fromkeys((arm.name for arm in dict(plan.arms)[NEAR]), 0.0)
    chosen = Chosen(rates, TOP_64, ONLINE)
    trials = rate_trials(plan)
    if made(trials):
        trials += edge_trials(plan)
    if made(trials):
        rates = choose_rates(plan)
        chosen = evolve(chosen, rates=rates)
    trials += other_trials(plan, rates)
    if made(trials):
        chosen = Chosen.of(plan)
    return [*trials, *chosen.form_trials(plan), *chosen.runs(plan)]


#: CPU seconds of a rollout on an AMD EPYC, to plan with: in a run, by its way (those of live runs and of TRL are guesses, as they were not measured
#: before); where a student is measured, without and with forward KL; of the teacher's text; in SFT; in a store, with one column; in one more column.
OF_WAY = {"stored": 0.45, "live": 1.5, "teacher's text": 0.48, "TRL": 1.8}
OF_POINT, OF_END, OF_TEXT, OF_SFT, OF_STORE, OF_COLUMN = 0.95, 1.2, 0.52, 0.43, 0.75, 0.25


def expected_run_s(unit: Unit) -> float:
    """Return the expected seconds of one run."""
    bed, arm = unit.bed, unit.arm
    trained = arm.steps(bed) * arm.per_step(bed) * OF_WAY[arm.way]
    return trained + bed.size.held_out * (OF_END + OF_POINT * (len(unit.points) - 1))


def expected_build_s(plan: Plan, bed: Bed) -> float:
    """Return the expected seconds of the text of a seed, a student and its store, without finished parts.

    The text is counted with the near student.
    """
    columns, shares = parts(plan, bed)
    size = bed.size
    text, student = OF_TEXT * (size.sft_prompts + size.opd_prompts + size.held_out), OF_SFT * size.sft_prompts + OF_END * size.held_out
    store = size.opd_prompts * (OF_STORE * (1 + sum(shares)) + OF_COLUMN * (len(columns) - 1))
    pieces = (
        (bed.home / "text.json", text if bed.kind == NEAR else 0.0),
        (bed.of_student / "sft.json", student),
        (bed.of_student / "store.json", store),
    )
    return sum(seconds for path, seconds in pieces if not path.exists())
