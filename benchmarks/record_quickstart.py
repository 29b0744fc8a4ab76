"""Keep a quickstart run as evidence: `benchmarks/results/quickstart.json`, the pictures, and the tables of docs/quickstart.md.

    make bench-quickstart

Nothing in these tables is typed by hand.  The picture of the run report is made only where there is a Chromium (`make test-browser`).
"""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from pictures import ONLINE, SFT, SUPPORT, panels, save
from record import ROOT, fill, result_file

from lopd.tools.phases import wall_time

RUN, DOCS, RESULTS = ROOT / "runs" / "quickstart", ROOT / "docs", ROOT / "benchmarks" / "results"
PAGE = DOCS / "quickstart.md"
#: Pages with its words and pictures, and how each names the folder of the latter.
PAGES = {ROOT / "README.md": "docs/", PAGE: ""}
#: Nats a token: so much more KL than online OPD's is as good, as in `evidence_summary`.  Set after the runs, which were judged by whether an interval
#: reached to 0 before: that is the easier, the wider it is.
MARGIN = 0.01
FALL, GAP = "after OPD, against after SFT", "after OPD, against after online OPD"
PICTURE = (
    "![KL of the student to its teacher against the seconds of the OPD stage: the stored run samples once, is scored once, and trains; "
    "online OPD does all three at each step](DOCS/quickstart.png)"
)
REPORT = (
    '[<img src="DOCS/report.png" width="560" alt="The first screen of the run report: who sampled, who scored, the guards, the training">]'
    "(DOCS/report.png)"
)
STORED = ("student rollouts", "teacher scores", "Lightning OPD")


def main() -> None:
    """Read the run, write the files."""
    report = json.loads((RUN / "metrics.json").read_text())
    result_file("quickstart", report, [*report["phases"], {"name": "change", **report["change"]}], goals(report))
    draw({phase["name"]: phase for phase in report["phases"]})
    if picture_of_report():
        for page, docs in PAGES.items():
            fill(page, "report picture", [REPORT.replace("DOCS/", docs)])
    publish()


def publish() -> None:
    """Write words and tables out of the result files."""
    report = recorded(json.loads((RESULTS / "quickstart.json").read_text())["rows"])
    for page, docs in PAGES.items():
        fill(page, "quickstart picture", [sentence(report), "", PICTURE.replace("DOCS/", docs)])
    fill(PAGE, "quickstart table", phase_table(report["phases"]))
    losses = RESULTS / "quickstart_losses.json"
    if losses.exists():
        fill(PAGE, "loss table", loss_table(json.loads(losses.read_text())["rows"]))


def recorded(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the phases and the change of the run of which the result file has these rows."""
    return {"phases": rows[:-1], "change": rows[-1]}


def other_seeds(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the numbers of other seeds; none where they were not run beside this run."""
    path = RESULTS / "quickstart_seeds.json"
    first, *others = json.loads(path.read_text())["rows"] if path.exists() else [{}]
    return others if numbers(report).items() <= first.items() else []


def draw(phases: dict[str, Any]) -> None:
    """Draw the held-out reverse KL against the seconds of the whole OPD stage; only the ends are measured."""
    start, stored, online = (phases[f"evaluate {name}"] for name in ("after SFT", "after OPD", "after online OPD"))
    ends = [sum(phases[name]["wall_s"] for name in STORED[: i + 1]) for i in range(3)]
    figure, (axes,) = panels(1, 1, 3.4)
    level, last = start["held_out_reverse_kl"], phases["online OPD"]["wall_s"]
    paths = (
        (SUPPORT, [0, ends[1], ends[2]], [level, level, stored["held_out_reverse_kl"]], stored, f"stored: {ends[2]:.0f} s"),
        (ONLINE, [0, last], [level, online["held_out_reverse_kl"]], online, f"online: {last:.0f} s"),
    )
    for color, at, kl, measured, name in paths:
        axes.plot(at, kl, color=color, linestyle="--", linewidth=1.2)
        axes.errorbar(at[-1], kl[-1], yerr=measured["ci95"], color=color, fmt="o", capsize=4)
        axes.annotate(name, (at[-1], kl[-1]), xytext=(8, 0), textcoords="offset points", va="center", color=color)
    axes.errorbar(0, level, yerr=start["ci95"], color=SFT, fmt="o", capsize=4)
    axes.annotate("after SFT", (0, level - start["ci95"]), xytext=(0, -4), textcoords="offset points", ha="center", va="top")
    for name, left, right in zip(("samples\nonce", "scored\nonce", "trains,\nno teacher"), [0, *ends], ends, strict=False):
        axes.annotate(name, ((left + right) / 2, level), xytext=(0, 5), textcoords="offset points", ha="center", color=SUPPORT, fontsize=8)
    axes.set_xlim(-0.06 * last, 1.2 * max(last, ends[2]))
    axes.set(xlabel="seconds of the whole OPD stage", ylabel="nats per token (95 % interval)")
    axes.set_title("KL(student, teacher) on fresh answers to held-out questions")
    save(figure, DOCS / "quickstart.png")


def picture_of_report() -> bool:
    """Keep the first screen of the run report, as a browser shows it; False where there is no browser."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        print("There is no Chromium, so docs/report.png stays as it is.")
        return False
    options = ("--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,760", "--virtual-time-budget=5000")
    command = [chromium, *options, f"--screenshot={DOCS / 'report.png'}", (RUN / "report.html").resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return True


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge what the quickstart promises."""
    seconds, peak = sum(p["wall_s"] for p in report["phases"]), max(p["peak_rss_gib"] for p in report["phases"])
    unbroken = all(p["attempts"] == 1 for p in report["phases"])
    return [
        *promises(numbers(report)),
        {"name": "wall time after installation, on 2 cores (s)", "goal": "<= 480", "measured": seconds, "met": unbroken and seconds <= 480},
        {"name": "peak memory (GiB)", "goal": "< 8", "measured": peak, "met": peak < 8},
    ]


def promises(found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Judge its promises about the student, out of its numbers: ± is the distance to the farther end of an interval."""
    times = found["fall"] / found["fall_ci95"]
    return [
        {
            "name": "fall of the held-out reverse KL in the OPD phase, over its 95 % half-width (same prompts)",
            "goal": ">= 3",
            "measured": times,
            "met": times >= 3,
        },
        {
            "name": "the stored run is not above online OPD: held-out reverse KL, minus online OPD's (nats per token, same prompts)",
            "goal": f"<= {MARGIN:g}",
            "measured": found["gap"],
            "ci95": found["gap_ci95"],
            "met": found["gap"] + found["gap_ci95"] <= MARGIN,
        },
    ]


def seconds_of(phases: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the wall time of the whole OPD stage: stored, with sampling and scoring, and online."""
    seconds = {p["name"]: p["wall_s"] for p in phases}
    return sum(seconds[name] for name in STORED), seconds["online OPD"]


def numbers(report: dict[str, Any]) -> dict[str, float]:
    """Return the KL after each phase, both differences, and the seconds of either OPD stage."""
    kl = {
        p["name"].removeprefix("evaluate after "): p["held_out_reverse_kl"]
        for p in report["phases"]
        if p["held_out_reverse_kl"] is not None
    }
    fall, gap = report["change"][FALL], report["change"][GAP]
    found = {"fall": -fall["mean"], "fall_ci95": fall["ci95"], "gap": gap["mean"], "gap_ci95": gap["ci95"]}
    stored, online = seconds_of(report["phases"])
    return {**kl, **found, "stored_s": stored, "online_s": online}


def sentence(report: dict[str, Any]) -> str:
    """Return what was measured, in words."""
    found = numbers(report)
    return (
        f"Training on the store took the student's KL to its teacher from {found['SFT']:.3f} to {found['OPD']:.3f} nats per token, a fall of "
        f"{found['fall']:.3f} ± {found['fall_ci95']:.3f}, in {found['stored_s']:.0f} s, sampling and scoring included.\n"
        f"Online OPD came to {found['online OPD']:.3f} in {found['online_s']:.0f} s; stored minus online is "
        f"{found['gap']:+.3f} ± {found['gap_ci95']:.3f}.\n"
        f"This is one seed, and ± is over its questions{beside_it(other_seeds(report))}.\nThe rate was chosen for the stored run, on another seed."
    )


def beside_it(others: Sequence[dict[str, Any]]) -> str:
    """Return what other seeds gave, in words; nothing where there are none."""
    if not others:
        return ""
    seeds, falls, gaps = (
        " and ".join(f"{row[name]:{form}}" for row in others) for name, form in (("seed", ""), ("fall", ".3f"), ("gap", "+.3f"))
    )
    return f"; with seeds {seeds} the fall is {falls}, and stored minus online {gaps}"


def phase_table(phases: list[dict[str, Any]]) -> list[str]:
    """Return the phases as a Markdown table."""
    lines = [
        "| phase | wall s | response tokens | read tokens | held-out reverse KL, nats per token (95 %) |",
        "|---|--:|--:|--:|--:|",
    ]
    for p in phases:
        value = "" if p["held_out_reverse_kl"] is None else f"{p['held_out_reverse_kl']:.3f} ± {p['ci95']:.3f}"
        lines.append(f"| {p['name']} | {wall_time(p)} | {' | '.join(_tokens(p))} | {value} |")
    total = sum(p["wall_s"] for p in phases)
    return [*lines, f"| total | {total:,.0f} | | | |"]


def _tokens(phase: Mapping[str, Any]) -> tuple[str, str]:
    """Return response and read tokens.

    Runs that were recorded before both were counted have one number; in an evaluation it counts responses.
    """
    if "tokens" in phase:
        phase = {"read_tokens" if phase["held_out_reverse_kl"] is None else "response_tokens": phase["tokens"]}
    response, read = (f"{count:,}" if (count := phase.get(name)) else "" for name in ("response_tokens", "read_tokens"))
    return response, read


def loss_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the losses as a Markdown table."""
    lines = [
        "| what trained | rate | held-out reverse KL | change in the OPD phase | minus the quickstart's stored run |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        pairs = [(row[name], row[f"{name}_ci95"]) for name in ("change", "against_stored")]
        change, against = ("" if mean is None else f"{mean:+.3f} ± {half:.3f}" for mean, half in pairs)
        rate = "" if row["lr"] is None else f"{row['lr']:g}"
        lines.append(f"| {row['variant']} | {rate} | {row['held_out_reverse_kl']:.3f} ± {row['ci95']:.3f} | {change} | {against} |")
    return lines


if __name__ == "__main__":
    main()
