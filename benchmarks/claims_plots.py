"""Pictures of the claims."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from claims_summary import Row, Runs, accuracy, change, ratio_path
from matplotlib.axes import Axes
from pictures import TEXT, band, color_of, intervals, label_ends, legend, panels, rule, save, wrap
from testbed.arms import ABLATIONS, MAIN, ONLINE, PLAIN, RATIO, TOP_K
from testbed.trl_peer import ARM as TRL

_ARMS = (PLAIN.name, RATIO.name, ONLINE.name, TOP_K.name, TRL)
#: Parts of a cost, and how much of its colour each has.
_PARTS = {"sampling": 0.4, "scoring": 0.65, "training": 1.0}


def draw_claims(path: Path, rows: Sequence[Row], claim: str, fall: str) -> None:
    """Draw gain over steps and over seconds, cost, teachers, ratio and SFT length, without the setting in which Lightning fails."""
    del fall
    runs = Runs.of(rows)
    figure, (steps, seconds, cost, teachers, ratio, length) = panels(3, 2, height=9.5)
    for name in _ARMS:
        curves = np.array([row["curve"] for row in runs.where(claim, name).values()])
        for axes, at in ((steps, 0), (seconds, 2)):
            band(axes, curves[:, :, at].mean(0), curves[:, :, 1] - curves[:, :1, 1], name)
    _draw_cost(cost, runs, claim)
    _draw_teachers(teachers, runs, claim)
    _draw_ratio(ratio, runs, claim)
    _draw_lengths(length, runs)
    steps.set(title="Gain in accuracy by steps", xlabel="optimizer step")
    seconds.set(title="Gain in accuracy by cost", xlabel="CPU seconds of the OPD stage")
    for axes in (steps, seconds, ratio, length):
        label_ends(axes)
    save(figure, path)


def _draw_cost(axes: Axes, runs: Runs, claim: str) -> None:
    """Draw the CPU seconds of every arm by what they were spent on."""
    axes.set(title="What the OPD stage costs", xlabel="CPU seconds")
    left = np.zeros(len(_ARMS))
    for part, strength in _PARTS.items():
        width = [np.mean([row["cpu_s"][part] for row in runs.where(claim, name).values()]) for name in _ARMS]
        axes.barh([wrap(name, 14) for name in _ARMS], width, left=left, color=TEXT, alpha=strength, label=part, height=0.7)
        left += width
    axes.invert_yaxis()
    legend(axes, 3)


def _draw_teachers(axes: Axes, runs: Runs, claim: str) -> None:
    """Draw the gains where teachers are the same, and where they are crossed."""
    axes.set(title="Gain in accuracy by teachers", xlabel="SFT teacher → OPD teacher")
    pairs = [(sft, opd) for sft in "AB" for opd in "AB"]
    for place, arm in enumerate(MAIN):
        cells = [(at, cell) for at, pair in enumerate(pairs) if (cell := runs.where(claim, arm.name, pair))]
        means = [runs.mean(cell, change) for _, cell in cells]
        at = [at + 0.27 * (place - 1) for at, _ in cells]
        error = {"yerr": [mean.half for mean in means], "error_kw": {"ecolor": TEXT}}
        axes.bar(at, [mean.mean for mean in means], 0.25, color=color_of(arm.name), label=arm.name, **error)
    rule(axes, y=0)
    axes.set_xticks(range(len(pairs)), [f"{sft} → {opd}" for sft, opd in pairs])
    legend(axes, 2)


def _draw_ratio(axes: Axes, runs: Runs, claim: str) -> None:
    """Draw the mean importance ratio along the runs."""
    axes.set(title="Mean ratio to the reference policy", xlabel="optimizer step")
    for arm in (PLAIN, RATIO):
        paths = [ratio_path(row) for row in runs.where(claim, arm.name).values()]
        at = sorted(paths[0])
        band(axes, np.array(at) + 1, [[path[step][0] for step in at] for path in paths], arm.name)
    rule(axes, y=1)


def _draw_lengths(axes: Axes, runs: Runs) -> None:
    """Draw the accuracy at the end, by the length of SFT."""
    axes.set(title="Accuracy by SFT length", xlabel="SFT steps")
    by_steps = {int(row["setting"].split()[-1]): row["setting"] for row in runs.rows if row["setting"].startswith("doubt")}
    steps = sorted(by_steps)
    cells = {arm.name: [runs.where(by_steps[at], arm.name) for at in steps] for arm in MAIN}
    band(axes, steps, np.array([[row["start"] for row in cell.values()] for cell in cells[PLAIN.name]]).T, "SFT", line="--")
    for name, found in cells.items():
        band(axes, steps, np.array([[accuracy(row) for row in cell.values()] for cell in found]).T, name)


def draw_failure(path: Path, rows: Sequence[Row], claim: str, fall: str) -> None:
    """Draw the change of every run against the tail of its advantages, and the gap beside its bound."""
    runs = Runs.of(rows)
    figure, (tail, curve, gap, key) = panels(2, 2, height=6.5)
    settings = dict.fromkeys(row["setting"] for row in runs.rows)
    for arm in MAIN:
        points = [(runs.where(s, PLAIN.name)[seed]["tail"], change(row)) for s in settings for seed, row in runs.where(s, arm.name).items()]
        tail.plot(*zip(*points, strict=True), "o", color=color_of(arm.name), alpha=0.7, label=arm.name)
        cell = np.array([row["curve"] for row in runs.where(fall, arm.name).values()])
        band(curve, cell[:, :, 0].mean(0), cell[:, :, 1] - cell[:, :1, 1], arm.name)
    rule(tail, y=0)
    tail.set_xscale("symlog", linthresh=1e-3)
    tail.set(title="Gain in accuracy, every run", xlabel="share of advantages below -5 nats at the start", xlim=(-1e-4, 0.5))
    curve.set(title=f"Gain in accuracy, {fall}", xlabel="optimizer step")
    gaps = [row for row in rows if row["kind"] == "gap" and row["step"] > 0]
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in gaps):
        cell = [row for row in gaps if (row["setting"], row["arm"]) == (setting, arm)]
        filled = {claim: color_of(arm), fall: "none"}[setting]
        points = ([row["bound"] for row in cell], [row["gap"] for row in cell])
        gap.plot(*points, "o", color=color_of(arm), markerfacecolor=filled, label=f"{arm}; {setting}")
    ends = [min(r["bound"] for r in gaps), max(r["bound"] for r in gaps)]
    gap.plot(ends, ends, "--", color=TEXT, linewidth=0.8, label="the bound")
    gap.set_xscale("log")
    gap.set_yscale("symlog", linthresh=0.1)
    gap.set(title="Gradient gap against its bound (theorem 3.5)", xlabel="bound", ylabel="measured gap", ylim=(-0.01, None))
    key.axis("off")
    key.legend(*gap.get_legend_handles_labels(), loc="center left", title="Of the gaps")
    label_ends(curve)
    legend(tail, 2)
    save(figure, path)


def draw_ablations(path: Path, rows: Sequence[Row], claim: str, fall: str) -> None:
    """Draw the change of accuracy of every arm, with its interval."""
    runs = Runs.of(rows)
    names = [arm.name for arms in (MAIN, *ABLATIONS.values()) for arm in arms if runs.where(claim, arm.name)]
    figure, axes = panels(1, 2, height=0.26 * len(names) + 1, sharey=True)
    for panel, setting in zip(axes, (claim, fall), strict=True):
        intervals(panel, names, {name: runs.mean(cell, change) for name in names if (cell := runs.where(setting, name))})
        rule(panel, x=0)
        panel.set(title=f"Gain in accuracy, {setting}")
    save(figure, path)
