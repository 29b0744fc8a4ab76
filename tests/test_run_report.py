"""The run report: what it shows is what store and history hold, it states what is not known, and a browser shows it."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from attrs import asdict, evolve
from reports import decode, filled, tokens_of

from lopd import Lineage, MemoryStore, ZarrStore
from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.records import AdvantageSummary, Drift, ModelId, Scores, StepMetrics
from lopd.records.drift import LEVELS
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.command import main
from lopd.tools.report.charts import MOST_POINTS, Scale, over_steps
from lopd.tools.report.history import Phase, RunHistory
from lopd.tools.report.run import duration, step_charts, write_run_report
from lopd.tools.report.tokens import TokenReport

PHASES = [Phase("student <i>rollouts</i>", 30.0, 6000), Phase("teacher scores", 10.0, 6000), Phase("OPD", 60.0, 9000, "reverse KL 0.5")]


class Page(HTMLParser):
    """Tables by id or by the title of their chart, points of each curve, facts by name, and texts, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.curves, self.texts, self.tags = {}, {}, [], []
        self._title, self._rows, self._cell, self._open = "", None, None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag in {"table", "figcaption"}:
            self._title = values.get("id", self._title if tag == "table" else "")
            self._open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(self._title, [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"td", "th"}:
            self._cell = []
        elif tag == "polyline":
            self.curves.setdefault(self._title, []).append(values["points"].split())

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._rows[-1].append("".join(self._cell))
            self._cell = None
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, text):
        self.texts.append(text)
        if self._cell is not None:
            self._cell.append(text)
        if self._open[-1:] == ["figcaption"] and not self._title:
            self._title = text.strip()


def drift(step):
    rng = np.random.default_rng(step)
    summary = AdvantageSummary.of(rng.normal(size=50))
    return Drift(8, 400, 1 - 0.01 * step, 0.2, 0.9, 0.1, 0.002 * step, 0.3, summary, (0.05 * step, 0.0, 0.0, 0.0, 0.0))


def steps(count=12, with_drift=True):
    made = []
    for i in range(count):
        numbers = {"loss": 1 - 0.02 * i, "reverse_kl": 0.9 - 0.03 * i, "clip_fraction": 0.01, "grad_norm": 3.0 + i % 3}
        made.append(StepMetrics(step=i, **numbers, rollouts=8, read_tokens=900, seconds=2.5, drift=drift(i) if with_drift else None))
    return made


def gaps_of(store, row):
    (record,) = store.read([row], columns=("teacher", "behavior"))
    return (record.scores["teacher"].astype(np.float64) - record.scores["behavior"])[record.rollout.loss_mask]


@pytest.fixture
def store():
    return filled(MemoryStore(tiny_manifest()))


@pytest.fixture
def write(store, tmp_path):
    def run(history=(), *, of=store, **options):
        write_run_report(tmp_path / "run.html", of, history, **{"decode": decode, **options})
        return (tmp_path / "run.html").read_text(encoding="utf-8")

    return run


def facts_of(text):
    found = re.findall(r'<dt>([^<]*)</dt><dd class="value ([^"]*)">([^<]*)</dd><dd class="note">([^<]*)</dd>', text)
    return {html.unescape(name): (html.unescape(value), html.unescape(note), state) for name, state, value, note in found}


def test_the_summary_says_who_sampled_who_scored_and_how_training_went(write, store):
    facts = facts_of(write(steps()))
    responses = sum(r.rollout.response_ids.size for r in store.read(range(12)))
    assert facts["rollouts"] == ("12", f"{responses} response tokens, 36 prompt tokens", "")
    assert facts["sampled by"][0] == "policy@rev-p"
    assert "the first of 2 rounds" in facts["sampled by"][1]
    assert facts["scored by"][:2] == ("T@rev-T", "12 of 12 rollouts; by made-up 1.0")
    assert facts["teacher consistency"] == ("not known", "its SFT teacher is not recorded", "bad")
    assert facts["training"][:2] == ("12 steps", "96 rollouts, 10,800 read tokens, 30.0 s")
    assert facts["gap to the teacher, first and last step"][0] == "0.900 → 0.570"


def test_a_gap_to_a_teacher_is_shown_as_what_it_is_and_only_where_one_was_seen(write):
    taught, alone = steps(), [evolve(m, reverse_kl=0.0) for m in steps()]
    name, title = "gap to the teacher, first and last step", "Gap to the teacher on the stored tokens"
    assert "each times its importance ratio" in facts_of(write(taught))[name][1]
    assert title in Page(write([*alone[:6], *taught[6:]])).tables, "SFT, and then a teacher"
    text = write(alone)
    assert name not in facts_of(text)
    assert title not in Page(text).tables
    assert "Gradient norm" in Page(text).tables


def test_the_sft_teacher_is_a_consistent_one(write):
    consistent = filled(MemoryStore(evolve(tiny_manifest(), sft_teacher=tiny_provenance("T").model)))
    assert facts_of(write(of=consistent))["teacher consistency"] == ("consistent", "it is the SFT teacher", "good")


def test_curves_have_a_point_for_every_step_and_the_numbers_of_the_history(write):
    page = Page(write([asdict(m) for m in steps()]))
    assert {len(points) for title in page.curves if "osition" not in title and "round" not in title for points in page.curves[title]} == {
        12
    }
    titles = ["Loss", "Gap to the teacher on the stored tokens", "Gradient norm", "Clipped advantages", "Effective rollouts (ESS)"]
    wanted = ["loss", "reverse_kl", "grad_norm", "clip_fraction"]
    for title, name in zip(titles, wanted, strict=False):
        assert [float(row[1]) for row in page.tables[title][1:]] == pytest.approx([getattr(m, name) for m in steps()], rel=1e-3)
    assert [float(row[1]) for row in page.tables["Ratio to the policy that sampled"][1:]] == pytest.approx(
        [1 - 0.01 * i for i in range(12)]
    )
    assert [list(map(float, row[1:])) for row in page.tables["Learned: nearer to the teacher"][1:]] == pytest.approx(
        np.array([[0.01 * i, 0.05 * i] for i in range(12)])
    )
    assert page.tables["Effective rollouts (ESS)"][0] == ["step", "Effective rollouts (ESS)"]
    without = Page(write(steps(with_drift=False)))
    assert "Loss" in without.tables
    assert "Effective rollouts (ESS)" not in without.tables


def test_a_step_without_drift_has_no_point_and_an_infinite_value_is_in_the_table_alone():
    history = steps(4)
    history[1] = evolve(history[1], drift=None)
    history[2] = evolve(history[2], drift=evolve(history[2].drift, ratio_mean=float("inf")))
    (ratio,) = [chart for chart in step_charts(history) if chart.title.startswith("Ratio")]
    assert len(ratio.lines[0].points.split()) == 2
    assert [row[1] for row in ratio.table[1:]] == ["1", "nan", "inf", "0.97"]


def test_a_long_run_is_drawn_as_means_and_says_so():
    values = np.arange(2.0 * MOST_POINTS)
    chart = over_steps("t", "u", range(len(values)), {"a": values})
    assert len(chart.lines[0].points.split()) == MOST_POINTS
    assert chart.x == "step, means of 2"
    assert [float(row[1]) for row in chart.table[1:4]] == [0.5, 2.5, 4.5]


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [3.0, 3.0], [-1e-9, 1e-9], [-4.0, -1.0], [0.97, 1.0], [1e12, 3e12]])
def test_every_curve_stays_within_its_chart_and_has_at_least_two_marks_that_differ(values):
    chart = over_steps("t", "u", range(len(values)), {"a": values})
    for x, y in (map(float, point.split(",")) for point in chart.lines[0].points.split()):
        assert -0.1 <= x <= chart.width + 0.1
        assert -0.1 <= y <= chart.height + 0.1
    for marks in (chart.x_marks, chart.y_marks):
        labels = [label for _, label in marks]
        assert len(set(labels)) == len(labels) >= 2


def test_marks_of_an_axis_are_round_and_where_their_values_are():
    assert [label for _, label in Scale(0.0, 1.0, 0, 10).marks()] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert Scale(0.0, 20.0, 0, 100).marks(least=1.0)[1] == (25.0, "5")


def test_quantiles_shares_and_histogram_are_those_of_the_store(write, store):
    text = write()
    page = Page(text)
    gaps = np.concatenate([gaps_of(store, row) for row in range(12)])
    cells = page.tables["quantiles"][1]
    assert [float(cell) for cell in cells[:6]] == pytest.approx([gaps.mean(), *np.quantile(gaps, LEVELS)], abs=6e-4)
    assert cells[6:] == [f"{(gaps < 0).mean() * 100:.1f} %", f"{(gaps < -5).mean() * 100:.2f} %"]
    assert f"{gaps.size} tokens that count in 12 rollouts" in text
    counts = [int(row[1]) for row in page.tables["Advantages"][1:]]
    assert sum(counts) == gaps.size
    assert counts == [n for n in np.histogram(np.clip(gaps, -10, 10), 41, (-10, 10))[0] if n]
    assert facts_of(text)["advantages"][::2] == (f"{(gaps < -5).mean():.2%} below -5 nats", "bad")


def test_short_answers_have_the_positions_that_they_have(write):
    store = MemoryStore(tiny_manifest())
    rollouts = [tiny_rollout(f"p{i}/s0/g{i}", [5 + i] * (2 + i), generation=i, behavior_logprobs=[-1.0] * (2 + i)) for i in range(2)]
    store.begin_generation(1, store.manifest.policy)
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance("T"), [tiny_scores(rollout) for rollout in rollouts])
    text = write(of=store)
    assert "nan" not in re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    tables = Page(text).tables
    assert [row[0] for row in tables["By position in the response"][1:]] == ["15%", "25%", "50%", "75%", "80%"]
    assert [row[1:].count("") for row in tables["By round of sampling"][1:]] == [1] * 5


def test_a_few_rollouts_are_enough_for_the_advantages(write, store):
    gaps = np.concatenate([gaps_of(store, row) for row in (0, 11)])
    page = Page(write(report=TokenReport(sample=2)))
    assert sum(int(row[1]) for row in page.tables["Advantages"][1:]) == gaps.size


def test_the_least_the_median_and_the_most_divergent_rollout_are_shown(write, store):
    order = sorted(range(12), key=lambda row: np.abs(gaps_of(store, row)).mean())
    text = write()
    shown = re.findall(r"<h3>(\S+) <span[^>]*>(\w+)", text)
    names = [store.read([order[i]])[0].rollout.rollout_id for i in (0, 6, 11)]
    assert shown == list(zip(names, ["least", "median", "most"], strict=True))
    assert len(tokens_of(text)) == sum(store.read([order[i]])[0].rollout.response_ids.size for i in (0, 6, 11))
    for count in (1, 2):
        few = Page(write(report=TokenReport(sample=count)))
        assert len([tag for tag, _ in few.tags if tag == "h3"]) == count


def test_what_it_cost_by_phase(write, store):
    rows = Page(write(phases=PHASES)).tables["costs"]
    assert rows[1] == ["student <i>rollouts</i>", "30.0 s", "30.0 %", "", "6,000", "200", ""]
    assert rows[3] == ["OPD", "1 min 0 s", "60.0 %", "", "9,000", "150", "reverse KL 0.5"]
    responses = sum(r.rollout.response_ids.size for r in store.read(range(12)))
    assert Page(write(steps())).tables["costs"][1:] == [  # a program that wires its phases itself
        ["rollouts", "not measured", "", f"{responses}", f"{responses + 36}", ""],
        ["scores: teacher", "not measured", "", f"{responses}", f"{responses + 36}", ""],
        ["training", "30.0 s", "", "", "10,800", "360"],
    ]
    resumed = [Phase("rollouts", 1.0, 10**6, "the last of 2 attempts", attempts=2), PHASES[1]]
    assert Page(write(phases=resumed)).tables["costs"][1:] == [  # tokens of both attempts, and the time of the last
        ["rollouts", "1.0 s", "", "", "1,000,000", "", "the last of 2 attempts"],
        ["teacher scores", "10.0 s", "", "", "6,000", "600", ""],
    ]
    assert Page(write(phases=[Phase("p", 0.0)])).tables["costs"][1:] == [["p", "0.0 s", "0.0 %", "", "", ""]]
    assert (duration(59.99), duration(60), duration(3600)) == ("60.0 s", "1 min 0 s", "1 h 0 min")


def test_who_made_what(write, store):
    lineage = Lineage(ModelId("sft-teacher", "rev-1", "float32"), ModelId("opd-teacher", "rev-2", "bfloat16"))
    text = write(lineage=lineage, versions={"torch": "2.9"})
    for said in ("policy@rev-p, float32", "student@step-5, float32", "sft-teacher@rev-1, float32", "opd-teacher@rev-2, bfloat16", "2.9"):
        assert f"<dd>{said}</dd>" in text
    columns = {row[0]: row[1:] for row in Page(text).tables["columns"]}
    assert columns["column"] == ["teacher", "behavior"]
    assert columns["model"][0] == "T@rev-T, float32"
    assert columns["rollouts scored"] == ["12 of 12", "12 of 12"]
    assert columns["as teacher"][0] == "not known: its SFT teacher is not recorded"


def test_columns_of_the_policy_have_every_row(write):
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout("r", behavior_logprobs=[-1.0] * 3, sampler_logprobs=[-0.5] * 3)])
    table = Page(write(of=store)).tables["columns"]
    assert table[0] == ["column", "behavior", "behavior/sampler"]
    assert {len(row) for row in table} == {3}


def test_every_text_is_escaped(write, tmp_path):
    evil = "</script><script>alert(1)</script>"
    hostile = MemoryStore(evolve(tiny_manifest(), policy=ModelId(evil, "r", "float32")))
    rollout = tiny_rollout(f"{evil}/s0/g0", [0, 1, 5], behavior_logprobs=[-1.0] * 3)
    hostile.append([rollout])
    hostile.append_scores("teacher", tiny_provenance(evil), [tiny_scores(rollout, -3.0)])
    text = write(of=hostile, phases=[Phase(evil, 1.0)], title=evil, versions={evil: evil})
    assert text.count("<script>") == text.count("</script>") == 1, "the page's own"
    assert "<b>" not in text
    assert {"script", "b", "i"} & {tag for tag, _ in Page(text).tags} == {"script", "i"}
    assert text.count("alert(1)") > 6


def test_the_page_needs_nothing_from_elsewhere(write):
    text = write(steps(), phases=PHASES)
    assert not re.search(r"https?:|//[a-z]|src=|href=|url\(|@import|<link", text)


def test_ids_are_unique_charts_are_named_and_tables_have_headers(write):
    page = Page(write(steps(), phases=PHASES))
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    images = [values for tag, values in page.tags if tag == "svg"]
    assert len(images) == 11
    assert all(values["role"] == "img" and "table below" in values["aria-label"] for values in images)
    assert "Loss: loss from 1 to 0.78" in images[0]["aria-label"]
    assert [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)][:2] == ["h1", "h2"]
    assert all(rows[0] for rows in page.tables.values())
    assert ("html", {"lang": "en"}) in page.tags


def test_what_is_not_known_is_said_to_be_so(write, store):
    text = write()
    assert facts_of(text)["training"][:2] == ("no steps", "no history was given")
    assert "No steps: no history was given." in text
    text = write(of=MemoryStore(tiny_manifest()))
    assert "neither phases nor a history were given" in text
    assert "the store is empty" in text
    unscored = MemoryStore(tiny_manifest())
    unscored.append([tiny_rollout("p/s0/g0", behavior_logprobs=[-1.0] * 3)])
    text = write(steps(), of=unscored)
    assert facts_of(text)["scored by"][0] == "not scored yet"
    assert "no rollout has scores in the column teacher." in text
    assert len(Page(text).curves["Loss"][0]) == 12


def test_scores_in_columns_of_other_names_are_not_taken_for_missing(write):
    store, rollout = MemoryStore(tiny_manifest()), tiny_rollout("p/s0/g0", behavior_logprobs=[-1.0] * 3)
    store.append([rollout])
    own, label = evolve(tiny_provenance(), model=store.manifest.policy), evolve(tiny_provenance("V"), logprobs_mode="label")
    for name, made in (("own", own), ("label", label)):
        store.append_scores(name, made, [evolve(tiny_scores(rollout), signed=made.signed)])
    assert facts_of(write(of=store))["scored by"][:2] == ("not scored yet", "there is no column teacher")
    for name in ("math", "code"):
        store.append_scores(name, tiny_provenance(name), [tiny_scores(rollout)])
    text, where = write(of=store), "scores are in math, code; pass `--columns math behavior`"
    assert facts_of(text)["scored by"][:2] == ("not in the column teacher", where)
    assert f"no rollout has scores in the column teacher; {where}." in text


def test_a_store_without_the_log_probs_of_the_policy_is_shown_without_advantages(write):
    silent = MemoryStore(tiny_manifest())
    rollout = tiny_rollout("p/s0/g0")
    silent.append([rollout])
    silent.append_scores("teacher", tiny_provenance("T"), [tiny_scores(rollout)])
    text = write(steps(), of=silent)
    assert "no rollout has scores in the column behavior, the log-probs that the policy reported while it sampled" in text
    assert facts_of(text)["scored by"][:2] == ("T@rev-T", "1 of 1 rollouts; by made-up 1.0")
    assert "advantages" not in facts_of(text)
    own = [Scores.of(rollout, [-2.0] * 3)]
    silent.append_scores("ref", tiny_provenance("policy"), own)
    page = Page(write(of=silent, report=TokenReport("teacher", "ref")))
    assert page.tables["quantiles"][1][0] == "+1.000"


def test_tokens_none_of_which_counts_and_rollouts_in_quarantine(write):
    store = MemoryStore(tiny_manifest())
    rollout = tiny_rollout("r", loss_mask=[False] * 3, behavior_logprobs=[-1.0] * 3)
    store.append([rollout, tiny_rollout("long")])
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout)])
    store.quarantine("teacher", tiny_provenance(), {"long": "too long"})
    text = write(of=store)
    assert "no token that counts has scores in every column" in text
    assert "1 of 2 rollouts, 1 in quarantine" in facts_of(text)["scored by"][1]


def test_what_makes_no_sense_is_refused(write, tmp_path):
    with pytest.raises(MissingScoresError, match="column 'nobody' is absent"):
        write(report=TokenReport("nobody"))
    with pytest.raises(InvalidRecordError, match="sample is 0"):
        write(report=TokenReport(sample=0))
    for wrong in ({"step": 1}, 7, {**asdict(steps(1)[0]), "other": 1}):
        with pytest.raises(InvalidRecordError, match="entry 1 cannot be read"):
            write([steps(1)[0], wrong])
    for wrong in ({"seconds": -1.0}, {"seconds": float("nan")}, {"seconds": 1.0, "read_tokens": -1}, {"seconds": 1.0, "attempts": 0}):
        with pytest.raises(InvalidRecordError, match="Phase 'p'"):
            Phase("p", **wrong)
    assert not (tmp_path / "run.html").exists()


def test_a_history_is_read_from_what_a_run_keeps(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [asdict(m) for m in steps(3)]
    path.write_text(json.dumps(rows[::-1]))
    assert RunHistory.read(path) == RunHistory(tuple(steps(3)))
    phases = [
        {"name": "OPD", "wall_s": 2.5, "read_tokens": 7, "held_out_reverse_kl": 0.5, "ci95": 0.1, "attempts": 1},
        {"name": "x", "seconds": 1, "attempts": 2},
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {**rows[1], "loss": 7.0}, {**rows[2], "loss": 8.0}]))
    assert [m.loss for m in RunHistory.read(path).steps] == [1.0, 7.0, 8.0], "a resumed run repeats steps: the last counts"
    path.write_text(json.dumps({"history": rows, "phases": phases, "versions": {"torch": "2.9"}, "settings": {}}))
    read = RunHistory.read(path)
    resumed = Phase("x", 1, 0, "the last of 2 attempts", attempts=2)
    assert read.phases == (Phase("OPD", 2.5, 7, "held-out reverse KL 0.500 ± 0.100"), resumed)
    assert read.versions == {"torch": "2.9"}


def test_the_tokens_of_phases_that_lopd_0_2_wrote_are_those_that_it_counted(tmp_path):
    path = tmp_path / "metrics.json"
    names = ("student rollouts", "teacher scores", "Lightning OPD", "evaluate after OPD")
    rows = [{"name": name, "wall_s": 1.0, "tokens": 7} for name in names] + [{"name": "mine", "wall_s": 1.0, "tokens": 7, "history": []}]
    path.write_text(json.dumps({"history": [], "phases": [*rows, {"name": "now", "wall_s": 1.0, "tokens": 7, "response_tokens": 3}]}))
    found = [(phase.read_tokens, phase.response_tokens) for phase in RunHistory.read(path).phases]
    assert found == [(0, 7), (0, 7), (7, 0), (0, 7), (7, 0), (0, 3)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("3", "has no steps"),
        ('{"phases": []}', "has no steps"),
        ('{"history": [{}]}', "entry 0 cannot be read"),
        ('{"history": [{"step": 1e999}]}', "entry 0 cannot be read"),
        ('{"history": [], "phases": [{"tokens": 1}]}', "its phases or versions cannot be read"),
        ('{"history": [], "phases": [{"name": "p", "seconds": "1"}]}', "its phases or versions cannot be read"),
        (
            '{"history": [], "phases": [{"name": "p", "wall_s": 1, "held_out_reverse_kl": "0.1", "ci95": 0.2}]}',
            r"History .*metrics\.json: its phases or versions cannot be read",
        ),
        ('{"history": [], "versions": ["torch"]}', "its phases or versions cannot be read"),
    ],
)
def test_a_file_that_is_no_history_is_refused_in_one_sentence(content, said, tmp_path):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRecordError, match=said):
        RunHistory.read(path)


def test_the_doctor_writes_one(tmp_path, capsys):
    filled(ZarrStore.create(str(tmp_path / "s.zarr"), tiny_manifest()))
    (tmp_path / "metrics.json").write_text(json.dumps([asdict(m) for m in steps(3)]))
    out = tmp_path / "out.html"
    command = ["report", str(tmp_path / "s.zarr"), "--out", str(out)]
    assert main([*command, "--history", str(tmp_path / "metrics.json"), "--title", "Mine"]) == 0
    assert "3 steps" in capsys.readouterr().out
    assert "<h1>Mine</h1>" in out.read_text()
    assert main(command) == 0
    assert "no history was given" in out.read_text()
    Lineage(opd_teacher=tiny_provenance("T").model).write(tmp_path)
    assert main([*command, "--student", str(tmp_path)]) == 0
    assert "<dd>T@rev-T, float32</dd>" in out.read_text()
    assert main([*command, "--history", str(tmp_path / "absent.json")]) == 2
    assert main([*command, "--columns", "teacher"]) == 2


# --- in a browser ---------------------------------------------------------------------------------------------------------------------


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (paints) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const paint of paints) { canvas.fillStyle = paint; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (e) => (e ? [...paper(e.parentElement), getComputedStyle(e).backgroundColor] : ["#fff"]);
  const ratios = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (e.closest("script, title, [hidden], details:not([open]) .scroll")) continue;
    const style = getComputedStyle(e), below = paper(e);
    const [a, b] = [light(over([...below, e.closest("svg") ? style.fill : style.color])), light(over(below))].sort((p, q) => q - p);
    ratios.push([(a + 0.05) / (b + 0.05), e.tagName + "." + (e.getAttribute("class") ?? "") + " " + e.textContent.slice(0, 20)]);
  }
  return ratios.sort((p, q) => p[0] - q[0])[0];
}"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
def test_a_browser_shows_it_in_both_schemes_at_any_width(scheme, width, browser, store, tmp_path):
    path = tmp_path / "run.html"
    write_run_report(path, store, steps(), phases=PHASES, decode=decode)
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble, asked = [], []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(path.as_uri())
    paper = json.loads(view.evaluate("JSON.stringify(getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))"))
    assert (sum(paper) / 3 < 100) == (scheme == "dark")
    assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is wider than the window"
    assert view.locator("svg polyline.line").count() == 12
    assert view.locator(".meter").nth(2).bounding_box()["width"] > 1.9 * view.locator(".meter").nth(0).bounding_box()["width"]
    assert not view.locator("#panel").is_visible()
    view.locator(".response .t").nth(4).hover()
    assert "·word" in view.locator("#panel").inner_text()
    view.locator("summary").first.click()
    assert view.locator("figure table").first.is_visible()
    ratio, where = view.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    assert not trouble
    assert asked == [path.as_uri()]
