"""Pictures of the claims."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_summary import Row, Runs, accuracy, change, ratio_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from testbed.arms import ABLATIONS, MAIN, ONLINE, PLAIN, RATIO, TOP_K
from testbed.trl_peer import ARM as TRL

_COLORS = {PLAIN.name: "tab:red", RATIO.name: "tab:blue", ONLINE.name: "tab:green", TOP_K.name: "tab:purple", TRL: "tab:gray"}


def draw_claims(path: Path, rows: Sequence[Row], claim: str, _fall: str) -> None:
    """Accuracy over steps and over seconds, cost, teachers, ratio, SFT length."""
    runs = Runs.of(rows)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    steps, seconds, cost, teachers, ratio, length = figure.subplots(2, 3).flat
    for name, color in _COLORS.items():
        cell = list(runs.where(claim, name).values())
        curves = np.array([row["curve"] for row in cell])
        _band(steps, curves[:, :, 0].mean(0), curves[:, :, 1] - curves[:, :1, 1], color, name)
        seconds.plot(curves[:, :, 2].mean(0), curves[:, :, 1].mean(0), color=color, marker=".", markersize=4)
        paths = [ratio_path(row) for row in cell if "step_ratiomean_ratiostd_kl_gain_ess" in row]
        if paths:
            at = sorted(paths[0])
            _band(ratio, np.array(at) + 1, np.array([[p[step][0] for step in at] for p in paths]), color, name)
    bottom = np.zeros(len(_COLORS))
    for part, shade in (("sampling", "0.75"), ("scoring", "0.55"), ("training", "0.3")):
        height = [np.mean([row["cpu_s"][part] for row in runs.where(claim, name).values()]) for name in _COLORS]
        cost.bar([*_COLORS], height, bottom=bottom, color=shade, label=part)
        bottom += height
    pairs = [(sft, opd) for sft in "AB" for opd in "AB"]
    for place, arm in enumerate(MAIN):
        means = [runs.mean(cell, change) if (cell := runs.where(claim, arm.name, pair)) else None for pair in pairs]
        for at, mean in enumerate(means):
            if mean is not None:
                teachers.bar(at + 0.25 * place, mean.mean, 0.25, yerr=mean.half, color=_COLORS[arm.name])
    found = sorted({row["setting"] for row in runs.rows if row["setting"].startswith("doubt")}, key=lambda name: int(name.split()[-1]))
    at = [int(name.split()[-1]) for name in found]
    starts = np.array([[row["start"] for row in runs.where(name, PLAIN.name).values()] for name in found]).T
    _band(length, at, starts, "black", "SFT")
    for arm in MAIN:
        _band(
            length,
            at,
            np.array([[accuracy(r) for r in runs.where(name, arm.name).values()] for name in found]).T,
            _COLORS[arm.name],
            arm.name,
        )
    teachers.axhline(0, color="black", linewidth=0.5)
    teachers.set_xticks(np.arange(4) + 0.25, [f"{sft} → {opd}" for sft, opd in pairs])
    cost.set_xticks(range(len(_COLORS)), [*_COLORS], rotation=20, ha="right")
    cost.legend(frameon=False)
    length.legend(frameon=False)
    steps.legend(frameon=False)
    titles = {
        steps: ("gain over SFT", "optimizer step"),
        seconds: ("accuracy over CPU time", "CPU seconds of the OPD stage"),
        cost: ("CPU seconds of the OPD stage", ""),
        teachers: ("change of accuracy", "SFT teacher → OPD teacher"),
        ratio: ("mean ratio to the reference policy", "optimizer step"),
        length: ("accuracy by SFT length", "SFT steps"),
    }
    _finish(path, figure, titles)


def draw_failure(path: Path, rows: Sequence[Row], claim: str, fall: str) -> None:
    """Change of every run against the tail of its advantages; the gap beside its bound."""
    runs = Runs.of(rows)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    tail, gap, curve = figure.subplots(1, 3)
    settings = dict.fromkeys(row["setting"] for row in runs.rows)
    for arm in MAIN:
        points = [(runs.where(s, PLAIN.name)[seed]["tail"], change(row)) for s in settings for seed, row in runs.where(s, arm.name).items()]
        tail.plot(*zip(*points, strict=True), "o", color=_COLORS[arm.name], markersize=4, alpha=0.7, label=arm.name)
        cell = np.array([row["curve"] for row in runs.where(fall, arm.name).values()])
        _band(curve, cell[:, :, 0].mean(0), cell[:, :, 1] - cell[:, :1, 1], _COLORS[arm.name], arm.name)
    tail.axhline(0, color="black", linewidth=0.5)
    tail.set_xscale("symlog", linthresh=1e-3)
    tail.set_xlim(left=-1e-4)
    tail.legend(frameon=False)
    gaps = [row for row in rows if row["kind"] == "gap" and row["step"] > 0]
    for setting, arm in dict.fromkeys((row["setting"], row["arm"]) for row in gaps):
        cell = [row for row in gaps if (row["setting"], row["arm"]) == (setting, arm)]
        marker = {claim: "o", fall: "s"}[setting]
        gap.plot([r["bound"] for r in cell], [r["gap"] for r in cell], marker, color=_COLORS[arm], markersize=4, label=f"{arm}; {setting}")
    ends = [min(r["bound"] for r in gaps), max(r["bound"] for r in gaps)]
    gap.plot(ends, ends, "--", color="black", linewidth=0.8, label="the bound")
    gap.set_xscale("log")
    gap.set_yscale("symlog", linthresh=0.1)
    gap.set_ylim(bottom=-0.01)
    gap.legend(frameon=False, fontsize=7)
    titles = {
        tail: ("change of accuracy, every run", "share of advantages below -5 nats before training"),
        gap: ("measured gradient gap", "bound of theorem 3.5"),
        curve: (f"change of accuracy, {fall}", "optimizer step"),
    }
    _finish(path, figure, titles)


def draw_ablations(path: Path, rows: Sequence[Row], claim: str, fall: str) -> None:
    """Change of accuracy of every arm, with its interval."""
    runs = Runs.of(rows)
    names = [arm.name for arms in (MAIN, *ABLATIONS.values()) for arm in arms if runs.where(claim, arm.name)]
    figure = Figure(figsize=(13, 0.3 * len(names) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, setting in zip(panels, (claim, fall), strict=True):
        for place, name in enumerate(names):
            if cell := runs.where(setting, name):
                mean = runs.mean(cell, change)
                axes.errorbar([mean.mean], [-place], xerr=[mean.half], fmt="o", color=_COLORS.get(name, "black"))
        axes.axvline(0, color="black", linewidth=0.5)
    panels[0].set_yticks(-np.arange(len(names)), names)
    _finish(path, figure, {axes: (setting, "change of accuracy") for axes, setting in zip(panels, (claim, fall), strict=True)})


def _band(axes: Axes, at: Any, values: Any, color: str, label: str) -> None:
    """Mean over seeds, and the seeds from lowest to highest."""
    axes.plot(at, values.mean(0), color=color, label=label, marker=".", markersize=4)
    axes.fill_between(at, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _finish(path: Path, figure: Figure, titles: dict[Axes, tuple[str, str]]) -> None:
    for axes, (title, label) in titles.items():
        axes.set(title=title, xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
