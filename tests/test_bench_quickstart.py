"""What is made of a quickstart run: its goals, its tables, its picture."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import evidence_summary
import quickstart_losses
import quickstart_seeds
import record_quickstart
from record import ROOT
from results_page import undecided

PAGES = ("quickstart.md", "decisions/0008-recommended-loss.md")


def phase(name: str, wall_s: float, kl: float | None = None) -> dict[str, Any]:
    ci95 = None if kl is None else 0.04
    return {
        "name": name,
        "wall_s": wall_s,
        "response_tokens": 1000,
        "attempts": 1,
        "peak_rss_gib": 3.0,
        "held_out_reverse_kl": kl,
        "ci95": ci95,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """Return the report of a run whose stored part took 100 s of sampling, scoring and training, and whose online part took 150 s."""
    phases = [
        phase("evaluate after SFT", 50.0, 0.8),
        phase("student rollouts", 40.0),
        phase("teacher scores", 20.0),
        phase("Lightning OPD", 40.0),
        phase("evaluate after OPD", 50.0, 0.6),
        phase("online OPD", 150.0),
        phase("evaluate after online OPD", 50.0, 0.61),
    ]
    fall = {"mean": -0.2, "ci95": 0.05, "low": -0.25, "high": -0.15}
    gap = {"mean": -0.04, "ci95": 0.04, "low": -0.08, "high": 0.0}
    return {"phases": phases, "change": {record_quickstart.FALL: fall, record_quickstart.GAP: gap}}


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def missed(report: dict[str, Any]) -> list[str]:
    return [goal["name"] for goal in record_quickstart.goals(report) if not goal["met"]]


def test_pages_say_which_rates_the_losses_of_the_quickstart_have() -> None:
    sampled, ratio, residual, draws = (variant.lr for variant in quickstart_losses.VARIANTS)
    assert (sampled, residual) == (ratio, draws)
    assert draws * 1.5 == pytest.approx(quickstart_losses.quickstart.Settings().opd_lr)
    for text in (quickstart_losses.__doc__ or "", *((ROOT / "docs" / page).read_text() for page in PAGES)):
        said = " ".join(text.split())
        assert ("the best of several" in said, "the better of two" in said) == (True, True)
        assert ("draws take the residual's" in said) or ("draws have that of the residual" in said)


def test_a_run_that_keeps_what_is_promised_misses_nothing(report: dict[str, Any]) -> None:
    assert missed(report) == []
    assert record_quickstart.goals(report)[0]["measured"] == pytest.approx(4.0)


def test_each_promise_is_missed_by_its_own_name(report: dict[str, Any]) -> None:
    report["change"][record_quickstart.FALL] |= {"mean": -0.1}
    report["change"][record_quickstart.GAP] |= {"mean": 0.02, "low": -0.02, "high": 0.06}
    report["phases"][0] |= {"wall_s": 500.0, "peak_rss_gib": 9.0}
    assert len(missed(report)) == 4


def test_that_the_stored_run_is_not_above_is_not_met_by_a_wide_interval(report: dict[str, Any]) -> None:
    report["change"][record_quickstart.GAP] |= {"mean": -0.01, "ci95": 0.04, "low": -0.05, "high": 0.03}
    (goal,) = (goal for goal in record_quickstart.goals(report) if not goal["met"])
    assert goal["name"].startswith("the stored run is not above online OPD")
    assert undecided({**goal, "seeds": 3})
    assert record_quickstart.MARGIN == evidence_summary.MARGIN


def test_a_run_that_was_killed_on_the_way_says_nothing_of_its_time(report: dict[str, Any]) -> None:
    report["phases"][1] |= {"attempts": 2}
    assert missed(report) == ["wall time after installation, on 2 cores (s)"]


def test_words_and_tables_hold_the_figures_of_the_run(report: dict[str, Any]) -> None:
    said = record_quickstart.sentence(report)
    assert all(figure in said for figure in ("0.800", "0.600", "0.200 ± 0.050", "100 s", "0.610", "150 s", "-0.040 ± 0.040"))
    assert record_quickstart.phase_table(report["phases"])[-1] == "| total | 400 | | | |"
    row = {"seed": 2, **record_quickstart.numbers(report)}
    assert quickstart_seeds.seed_table([row])[-1] == "| 2 | 0.800 | 0.600 | 0.610 | 0.200 ± 0.050 | -0.040 ± 0.040 | 100 | 150 |"


def test_the_figures_of_one_seed_stand_beside_those_of_others(report: dict[str, Any]) -> None:
    rows = read("quickstart_seeds")
    said = record_quickstart.sentence(record_quickstart.recorded(read("quickstart")))
    assert "one seed, and ± is over its questions; with seeds 2 and 3" in said
    assert all(f"{row['fall']:.3f}" in said and f"{row['gap']:+.3f}" in said for row in rows)
    assert all(said in page.read_text() for page in record_quickstart.PAGES), "run benchmarks/publish.py"
    assert "with seeds" not in record_quickstart.sentence(report), "seeds of another run"


def test_the_picture_is_whole(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_quickstart, "DOCS", tmp_path)
    record_quickstart.draw({p["name"]: p for p in report["phases"]})
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
