"""Pictures of a run, drawn by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lopd.records.estimates import Estimate
from lopd.records.steps import StepMetrics


def draw_run(path: Path, held_out: Mapping[str, Estimate], sft: Sequence[StepMetrics], opd: Sequence[StepMetrics]) -> None:
    """Write a picture of one run: SFT loss, reverse KL on the stored rollouts while OPD runs, and the held-out reverse KL of each phase.

    Args:
        path: of the picture; its suffix says which kind.
        held_out: label -> held-out reverse KL, nats per token, in the order of the phases.
        sft: metrics of the SFT steps.
        opd: metrics of the OPD steps.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([m.step for m in sft], [m.loss for m in sft], color="tab:gray")
    left.set(title="SFT on the teacher's text", xlabel="optimizer step", ylabel="loss (nats per token)")
    middle.plot([m.step for m in opd], [m.reverse_kl for m in opd], color="tab:blue")
    middle.set(title="OPD on frozen rollouts", xlabel="optimizer step", ylabel="student - teacher (nats per token)")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    places = range(len(held_out))
    right.bar(
        places, [e.mean for e in held_out.values()], yerr=[e.ci95 for e in held_out.values()], capsize=6, color="tab:green", width=0.6
    )
    right.set(title="held-out reverse KL, fresh rollouts", ylabel="nats per token (95 % interval)")
    right.set_xticks(list(places), [label.replace(" online ", "\nonline ") for label in held_out])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
