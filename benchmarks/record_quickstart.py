"""Keep a quickstart run as evidence: `benchmarks/results/quickstart.json`, `docs/quickstart.png`, and the tables in README.md.

    make bench-quickstart

Nothing in the README's tables is typed by hand.
"""

import json
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from phases import wall_time
from record import ROOT, fill, result_file

RUN = ROOT / "runs" / "quickstart"


def main() -> None:
    """Read the run, write the files."""
    report = json.loads((RUN / "metrics.json").read_text())
    result_file("quickstart", report, report["phases"], goals(report))
    draw(report["phases"])
    losses = json.loads((ROOT / "benchmarks" / "results" / "quickstart_losses.json").read_text())
    fill(ROOT / "README.md", "quickstart table", phase_table(report["phases"]))
    fill(ROOT / "README.md", "loss table", loss_table(losses["rows"]))


def draw(phases: list[dict[str, Any]]) -> None:
    """SFT loss, reverse KL on the stored rollouts while OPD runs, and the held-out reverse KL after each phase."""
    sft, opd = (json.loads((RUN / "phases" / f"{name}.json").read_text())["history"] for name in ("sft", "lightning-opd"))
    held_out = {p["name"].removeprefix("evaluate "): p for p in phases if p["held_out_reverse_kl"] is not None}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot([m["step"] for m in sft], [m["loss"] for m in sft], color="tab:gray")
    left.set(title="SFT on the teacher's text", xlabel="optimizer step", ylabel="loss (nats per token)")
    middle.plot([m["step"] for m in opd], [m["reverse_kl"] for m in opd], color="tab:blue")
    middle.set(title="OPD on frozen rollouts", xlabel="optimizer step", ylabel="student - teacher (nats per token)")
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    means, intervals = [[p[name] for p in held_out.values()] for name in ("held_out_reverse_kl", "ci95")]
    right.bar(range(len(means)), means, yerr=intervals, capsize=6, color="tab:green", width=0.6)
    right.set(title="held-out reverse KL, fresh rollouts", ylabel="nats per token (95 % interval)")
    right.set_xticks(range(len(means)), [label.replace(" online ", "\nonline ") for label in held_out])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "quickstart.png", dpi=130)


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the quickstart promises, met or not."""
    held_out = {p["name"]: p for p in report["phases"] if p["held_out_reverse_kl"] is not None}
    before, after = held_out["evaluate after SFT"], held_out["evaluate after OPD"]
    fall = before["held_out_reverse_kl"] - after["held_out_reverse_kl"]
    seconds, peak = sum(p["wall_s"] for p in report["phases"]), max(p["peak_rss_gib"] for p in report["phases"])
    unbroken = all(p["attempts"] == 1 for p in report["phases"])
    return [
        {
            "name": "held-out reverse KL falls in the OPD phase by more than its 95 % half-width (nats per token)",
            "goal": f"> {after['ci95']:.4f}",
            "measured": fall,
            "met": fall > after["ci95"],
        },
        {"name": "wall time after installation, on 2 cores (s)", "goal": "<= 600", "measured": seconds, "met": unbroken and seconds <= 600},
        {"name": "peak memory (GiB)", "goal": "< 8", "measured": peak, "met": peak < 8},
    ]


def phase_table(phases: list[dict[str, Any]]) -> list[str]:
    """The phases as a Markdown table."""
    lines = ["| phase | wall s | tokens | held-out reverse KL, nats per token (95 %) |", "|---|--:|--:|--:|"]
    for p in phases:
        value = "" if p["held_out_reverse_kl"] is None else f"{p['held_out_reverse_kl']:.3f} ± {p['ci95']:.3f}"
        lines.append(f"| {p['name']} | {wall_time(p)} | {p['tokens']:,} | {value} |")
    return lines


def loss_table(rows: list[dict[str, Any]]) -> list[str]:
    """The losses as a Markdown table."""
    lines = ["| loss | held-out reverse KL | change against SFT, same prompts | on the stored rollouts, last step |", "|---|--:|--:|--:|"]
    for row in rows:
        change = f"{row['change']:+.3f} ± {row['change_ci95']:.3f}" if row["variant"] != "after SFT" else ""
        stored = f"{row['stored_reverse_kl'][-1]:.2f}" if row["stored_reverse_kl"] else ""
        lines.append(f"| {row['variant']} | {row['held_out_reverse_kl']:.3f} ± {row['ci95']:.3f} | {change} | {stored} |")
    return lines


if __name__ == "__main__":
    main()
