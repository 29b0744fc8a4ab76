"""The token report: what it shows is what the store holds, whatever the tokens are, and a browser shows it."""

import json
import re

import numpy as np
import pytest
import transformers
from reports import HOSTILE, decode, filled, tokens_of

from lopd import MemoryStore, ZarrStore
from lopd.errors import InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.records import Scores
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.command import main
from lopd.tools.report.charts import curves, histogram
from lopd.tools.report.tokens import TokenReport, visible, write_token_report


@pytest.fixture
def store():
    return filled(MemoryStore(tiny_manifest()))


@pytest.fixture
def page(store, tmp_path):
    def write(rows=(0,), **options):
        write_token_report(tmp_path / "r.html", store, rows, decode=decode, **options)
        return (tmp_path / "r.html").read_text(encoding="utf-8")

    return write


def test_every_token_is_there_with_the_numbers_of_the_store(page, store):
    (record,) = store.read([2], columns=("teacher", "behavior"))
    tokens = tokens_of(page([2]))
    assert len(tokens) == record.rollout.response_ids.size
    for t, (classes, values, text) in enumerate(tokens):
        teacher, student = record.scores["teacher"][t], record.scores["behavior"][t]
        gap = float(teacher) - float(student)
        assert text == visible(decode(int(record.rollout.response_ids[t])))
        assert int(values["data-id"]) == record.rollout.response_ids[t]
        assert (float(values["data-teacher"]), float(values["data-student"])) == pytest.approx((teacher, student), abs=6e-5)
        assert float(values["data-advantage"]) == pytest.approx(gap, abs=6e-5)
        assert ("up" in classes) == (gap > 0)
        assert ("off" in classes) == (t == 3)
        strength = float(values["style"].removeprefix("--a:"))
        assert strength == pytest.approx(min(abs(gap) / 10, 1) ** 0.5 if t != 3 else 0, abs=6e-4)


def test_a_token_is_text_and_never_markup_and_what_is_invisible_is_shown(page):
    text = page([0])
    assert text.count("<script>") == 1, "the page's own"
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert [t for _, _, t in tokens_of(text)][:9] == [
        "<script>alert(1)</script>",
        "\"'><b>",
        "\\ud83d",
        "\\u202eabc",
        "·word",
        "↵",
        "&amp;",
        "שלום",
        "∅",
    ]


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page([0, 1])
    assert not re.search(r"https?:|src=|url\(|@import|<link", text)


def test_the_head_says_the_quantiles_and_shares_of_the_sample(page, store):
    records = store.read(range(12), columns=("teacher", "behavior"))
    gaps = np.concatenate([(r.scores["teacher"].astype(np.float64) - r.scores["behavior"])[r.rollout.loss_mask] for r in records])
    text = page([0])
    assert f"mean {gaps.mean():+.3f} nats; 1 %: {np.quantile(gaps, 0.01):+.2f}" in text
    assert f"{(gaps < 0).mean() * 100:.1f} % below 0, {(gaps < -5).mean() * 100:.2f} % below -5 nats" in text
    own = np.concatenate([(r.scores["teacher"].astype(np.float64) - r.scores["behavior"])[r.rollout.loss_mask] for r in records[:1]])
    assert f"mean {own.mean():+.3f} nats" in page([0], report=TokenReport(sample=0))
    assert "By round of sampling" in text
    assert "By round of sampling" not in page([0], report=TokenReport(sample=0))


def test_a_third_column_and_ids_instead_of_text(store, tmp_path):
    own = [Scores.of(r.rollout, r.scores["behavior"]) for r in store.read(range(12), columns=("behavior",))]
    store.append_scores("ref", tiny_provenance("R"), own)
    write_token_report(tmp_path / "r.html", store, [4], report=TokenReport(ref="ref"))
    tokens = tokens_of((tmp_path / "r.html").read_text())
    assert all(values["data-ref"] == values["data-student"] for _, values, _ in tokens)
    assert [text for _, _, text in tokens] == [str(token) for token in store.read([4])[0].rollout.response_ids]


@pytest.mark.parametrize(
    ("peak", "places"),
    [(50, [0, 1, 2, 49, 50, 51, 97, 98, 99]), (1, [0, 1, 2, 3, 4, 5, 97, 98, 99]), (98, [0, 1, 2, 94, 95, 96, 97, 98, 99])],
)
def test_a_long_rollout_is_shown_at_its_ends_and_where_the_advantage_is_largest(peak, places, tmp_path):
    store = MemoryStore(tiny_manifest())
    rollout = tiny_rollout("r", range(100), prompt_ids=range(100), behavior_logprobs=[-1.0] * 100, loss_mask=[t != 70 for t in range(100)])
    store.append([rollout])
    store.append_scores("teacher", tiny_provenance(), [Scores.of(rollout, [-9.0 if t in (peak, 70) else -2.0 for t in range(100)])])
    write_token_report(tmp_path / "r.html", store, [0], report=TokenReport(tokens=10))
    page = (tmp_path / "r.html").read_text()
    assert [int(values["data-position"]) for _, values, _ in tokens_of(page)] == places
    assert page.count("… 91 tokens left out …") == 1 + (peak != 50)
    assert page.count("… 46 tokens left out …") == page.count("… 45 tokens left out …") == (peak == 50)
    assert "100 response tokens" in page
    write_token_report(tmp_path / "r.html", store, [0])
    assert len(tokens_of(page := (tmp_path / "r.html").read_text())) == 100
    assert "left out" not in page
    with pytest.raises(InvalidRecordError, match="tokens is 2, expected at least 3"):
        TokenReport(tokens=2)


def test_a_rollout_of_which_nothing_counts_can_be_shown(tmp_path):
    store = MemoryStore(tiny_manifest())
    rollout = tiny_rollout("r", loss_mask=[False] * 3, behavior_logprobs=[-1.0] * 3)
    store.append([rollout])
    store.append_scores("teacher", tiny_provenance(), [Scores.of(rollout, [-2.0] * 3)])
    write_token_report(tmp_path / "r.html", store, [0])
    assert "mean advantage none counted" in (tmp_path / "r.html").read_text()


def test_what_cannot_be_shown_is_refused(store, tmp_path):
    path = tmp_path / "r.html"
    with pytest.raises(InvalidRecordError, match="0 rows"):
        write_token_report(path, store, [])
    with pytest.raises(MissingScoresError, match=r"column 'nobody' is absent, expected one of \['teacher', 'behavior'\]"):
        write_token_report(path, store, [0], report=TokenReport(ref="nobody"))
    with pytest.raises(NoSuchRowError):
        write_token_report(path, store, [99])
    for wrong in ({"clip": 0.0}, {"sample": -1}, {"bins": 0}):
        with pytest.raises(InvalidRecordError, match="Token report"):
            TokenReport(**wrong)
    assert not path.exists()


def test_charts_hold_the_numbers_of_numpy():
    rng = np.random.default_rng(0)
    place, values = rng.random(1000), rng.normal(size=1000)
    counts = np.histogram(values, bins=41, range=(-3, 3))[0]
    table = histogram("h", "x", values, 3.0).table
    assert [int(row[1]) for row in table[1:]] == [n for n in counts if n]
    drawn = curves("c", {"all": (place, values)}, 4, band=True)
    means = [values[(place >= i / 4) & (place < (i + 1) / 4)].mean() for i in range(4)]
    assert [float(row[1]) for row in drawn.table[1:]] == pytest.approx(means, abs=6e-4)
    assert len(drawn.lines[0].points.split()) == 4
    assert len(drawn.lines[0].band.split()) == 8
    gap = curves("c", {"all": (np.array([0.1, 0.9]), np.array([-1.0, -2.0]))}, 4, band=False)
    assert len(gap.lines[0].points.split()) == 2, "a bin without tokens has no point"


def test_the_doctor_writes_one(tmp_path, capsys):
    filled(ZarrStore.create(str(tmp_path / "s.zarr"), tiny_manifest()))
    out = tmp_path / "out.html"
    assert main(["report", str(tmp_path / "s.zarr"), "--rows", "0", "3", "--out", str(out)]) == 0
    assert "2 rollouts" in capsys.readouterr().out
    assert out.read_text().count("<section>") == 2
    assert main(["report", str(tmp_path / "s.zarr"), "--rows", "0", "--columns", "teacher"]) == 2
    assert main(["info", str(tmp_path / "s.zarr")]) == 0
    assert "not known: its SFT teacher is not recorded" in " ".join(capsys.readouterr().out.split())


def test_tokens_of_sentencepiece_keep_their_spaces_and_parts_of_a_character_are_shown(tmp_path):
    names = ["<unk>", "<s>", "</s>", "▁", "a", "▁the", "▁cat", "s", "<0x0A>", "<0xC3>", "▁."]
    tokenizer = transformers.LlamaTokenizer(vocab={name: i for i, name in enumerate(names)}, clean_up_tokenization_spaces=True)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    store, out = ZarrStore.create(str(tmp_path / "s.zarr"), tiny_manifest()), tmp_path / "out.html"
    rollout = tiny_rollout("p/s0/g0", [5, 6, 7, 9, 8, 5, 10, 2], behavior_logprobs=[-1.0] * 8)
    store.append([rollout])
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout)])
    assert main(["report", str(tmp_path / "s.zarr"), "--rows", "0", "--tokenizer", str(tmp_path / "model"), "--out", str(out)]) == 0
    assert [text for _, _, text in tokens_of(out.read_text())] == ["·the", "·cat", "s", "\ufffd", "↵", "·the", "·.", "</s>"]


# --- in a browser ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
def test_a_browser_shows_the_tokens_and_what_is_pointed_at(scheme, width, browser, store, tmp_path):
    write_token_report(tmp_path / "r.html", store, [0, 1], decode=decode)
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble, asked = [], []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto((tmp_path / "r.html").as_uri())
    tokens = view.locator(".response .t")
    (record,) = store.read([0], columns=("teacher", "behavior"))
    assert tokens.nth(0).inner_text() == HOSTILE[0]
    assert tokens.count() == sum(r.rollout.response_ids.size for r in store.read([0, 1]))
    tokens.nth(4).hover()
    said = view.locator("#panel").inner_text()
    assert "·word" in said
    assert f"teacher {record.scores['teacher'][4]:.4f}" in said
    view.keyboard.press("Tab")
    while view.evaluate("document.activeElement.dataset.position") != "0":
        view.keyboard.press("Tab")
    for key, position in (*(("ArrowRight", place) for place in range(1, 6)), ("ArrowLeft", 4), ("ArrowLeft", 3)):
        view.keyboard.press(key)
        assert f"position {position}" in view.locator("#panel").inner_text(), "also past the break before a token that begins with a space"
    paper = json.loads(view.evaluate("JSON.stringify(getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))"))
    assert (sum(paper) / 3 < 100) == (scheme == "dark")
    assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is wider than the window"
    assert view.locator("svg rect.bar").count() > 3
    assert not trouble
    assert asked == [(tmp_path / "r.html").as_uri()]
