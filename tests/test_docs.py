"""The pages under docs/: every block of Python runs or states why not, and every function, test, public name and link is there."""

import ast
import builtins
import contextlib
import importlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import forked
import pytest
import test_readme
import torch
from attrs import evolve, field, frozen
from conftest import build_tokenizer

import lopd
from lopd import CausalLMStudent, SamplingParams, SFTLoss, ZarrStore, batches, collect_rollouts, opd_steps
from lopd.engines.finding import configured_eos
from lopd.engines.hf import HFSource, folder_model_id, load_model
from lopd.records import fingerprint_tokenizer, make_prompts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
API = {page.name: re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE) for page in (DOCS / "api").glob("*.md")}

#: What pages print, and what is run instead: the same with smaller numbers.
SMALLER = {"max_new_tokens=4096": "max_new_tokens=8", "rollouts_per_step=256": "rollouts_per_step=2", "[:150]": "[:2]"}

pytestmark = pytest.mark.docs


@frozen
class Block:
    """One block of Python.

    Args:
        page: where it is.
        line: its first line.
        code: what is in it.
        reason: why it is not run; None if it is.
    """

    page: Path
    line: int
    code: str = field(repr=False)
    reason: str | None

    def run(self, names: dict[str, Any]) -> None:
        code = self.code
        for printed, smaller in SMALLER.items():
            code = code.replace(printed, smaller)
        exec(compile("\n" * self.line + code, str(self.page), "exec"), names)  # noqa: S102


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks in their order.  A comment `<!-- not run: REASON -->` on the line before a block states why it is not run."""
    lines = page.read_text().splitlines()
    for i, line in enumerate(lines):
        fence = line.strip()
        if fence.startswith("```python"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
            before = re.fullmatch(r"<!-- not run: (.+) -->", lines[i - 1].strip()) if i else None
            yield Block(page, i + 1, "\n".join(lines[i + 1 : end]) + "\n", before[1] if before else None)


RUN = [page for page in PAGES if any(block.reason is None for block in blocks_of(page))]
#: Blocks of the README that `test_readme` runs, with models and stores of its own.
RUN_IN_TEST_README = {test_readme.PROGRAM}


@pytest.fixture(scope="module")
def made(tokenizer: Any, make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with `teacher`, `sft-student`, which was fine-tuned on its text, and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        for name, seed in (("teacher", 1), ("base", 2)):
            make_model("llama_tied", seed=seed).save_pretrained(name)
            tokenizer.save_pretrained(name)
        writer = HFSource.from_folder("teacher", SamplingParams(max_new_tokens=8))
        text = ZarrStore.create("sft.zarr", writer.manifest)
        collect_rollouts(writer, make_prompts(["a", "b", "c"], tokenizer), text)
        model, _ = load_model("base")
        student = CausalLMStudent(model, fingerprint_tokenizer(tokenizer))
        steps = batches(text, teacher=None, rollouts_per_step=3)[:1]
        list(opd_steps(student, steps, SFTLoss(), torch.optim.SGD(student.parameters(), lr=0.1)))
        student.export("sft-student", tokenizer, steps.lineage)
        Path("prompts.jsonl").write_text('{"prompt": "d"}\n{"prompt": "e"}\n')
    return folder


@pytest.fixture
def trained(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter a copy of that folder, made for one page."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")  # of random models
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_blocks_of_a_page_run(page: Path, trained: None) -> None:
    names: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    for block in blocks_of(page):
        if block.reason is None:
            block.run(names)


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")
def test_adapters_that_were_merged_as_the_page_does_are_the_same_model_and_end_where_the_student_was_told(trained: None) -> None:
    """Also with a tokenizer that has a token more than the head has rows."""
    larger = build_tokenizer()
    larger.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    for name in ("teacher", "sft-student"):
        larger.save_pretrained(name)
    names: dict[str, Any] = {}
    for block in blocks_of(DOCS / "howto" / "lora.md"):
        evolve(block, code=block.code.replace("\nstudent.export(", "\nstudent.stop_at(9)\nstudent.export(")).run(names)
    assert folder_model_id("merged").revision == folder_model_id("adapters").revision != folder_model_id("sft-student").revision
    assert 9 in configured_eos(Path("merged"))


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")
def test_the_best_student_stays_the_best_when_its_run_is_resumed(trained: None) -> None:
    """The first half evaluates better than the second: the loop of the page that is run again must know that."""
    first, best, *_ = blocks_of(DOCS / "howto" / "checkpoints.md")
    begun = evolve(first, code=first.code[: first.code.index("for metrics in")])
    exported = list[str]()
    for stop, distance in ((2, 1.0), (4, 2.0)):
        names: dict[str, Any] = {}
        begun.run(names)
        names["evaluate_reverse_kl"] = lambda *_, mean=distance: SimpleNamespace(mean=mean)
        evolve(best, code=best.code.replace("steps[start:]", f"steps[start:{stop}]")).run(names)
        assert names["metrics"].step + 1 == stop
        exported.append(folder_model_id("best").revision)
    assert names["start"] == 2
    assert exported[0] == exported[1] != folder_model_id("sft-student").revision


def _pytest(arguments: list[str]) -> None:
    os.chdir(Path(arguments[-1]).parent)
    sys.exit(pytest.main(arguments))


def test_the_suites_of_the_page_on_your_own_parts_pass(tmp_path: Path) -> None:
    code = "\n".join(block.code for block in blocks_of(DOCS / "extending.md"))
    test = tmp_path / "test_own_parts.py"
    test.write_text(code)
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test)]
    process = forked.start(_pytest, printed := tmp_path / "printed", arguments)
    process.join(280)
    assert process.exitcode == 0, printed.read_text()[-4000:]
    passed = int(re.findall(r"(\d+) passed", printed.read_text())[-1])
    assert passed > 70  # all suites were collected


def test_every_block_of_the_readme_is_run_or_says_why_not() -> None:
    blocks = list(blocks_of(ROOT / "README.md"))
    assert {block.code for block in blocks} >= RUN_IN_TEST_README
    for block in blocks:
        if block.reason is None and block.code not in RUN_IN_TEST_README:
            block.run({})


def test_a_reason_is_a_sentence_and_stands_before_a_block() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        reasons = [block.reason for block in blocks_of(page) if block.reason is not None]
        assert page.read_text().count("<!-- not run:") == len(reasons), page
        assert all(len(reason.split()) >= 3 for reason in reasons), page


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "examples.md"], ids=lambda page: str(page.relative_to(DOCS)))
def test_a_block_that_is_not_run_uses_no_name_that_its_page_did_not_make(page: Path) -> None:
    made = set(dir(builtins))
    for block in blocks_of(page):
        nodes = list(ast.walk(ast.parse(block.code)))
        named = [node for node in nodes if isinstance(node, ast.alias | ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)]
        made |= {str(getattr(node, "asname", None) or node.name).split(".")[0] for node in named}
        made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        made |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        assert sorted({name.id for name in names} - made) == [], f"{page}:{block.line}"


# the equations

EQUATIONS = re.findall(r"^Code: `(lopd/\S+\.py)`, `([\w.]+)`: `(.+)`$", (DOCS / "math.md").read_text(), re.MULTILINE)


@cache
def function_source(path: str, name: str) -> str:
    """Return the text of a function or method, found without importing anything."""
    text = (ROOT / path).read_text()
    found: Any = ast.parse(text)
    for part in name.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == part)
    return ast.get_source_segment(text, found) or ""


@pytest.mark.parametrize(("path", "name", "line"), EQUATIONS)
def test_an_equation_has_its_line_of_code(path: str, name: str, line: str) -> None:
    assert line in [part.strip() for part in function_source(path, name).splitlines()]


def test_no_equation_is_without_code() -> None:
    text = (DOCS / "math.md").read_text()
    assert text.count("\nCode: ") == len(EQUATIONS)
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)
    assert [section.splitlines()[0] for section in sections if "\\[" in section and "\nCode: " not in section] == []


# the promises


@cache
def functions_in(path: str) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    for path, name in re.findall(r"`((?:tests|lopd/testing)/\w+\.py)(?:::(test_\w+))?`", page.read_text()):
        assert (ROOT / path).exists(), path
        assert not name or name in functions_in(path), f"{path}::{name}"


def test_every_promise_has_a_test() -> None:
    promised = (DOCS / "reliability.md").read_text().split("## What is not promised")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) > 50
    assert [row for row in rows if "::test_" not in row] == []


def test_every_pain_has_a_sentence_and_its_tests() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", (DOCS / "pains.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    listed = {(int(number), name) for number, _, tests in rows for name in re.findall(r"`(test_\w+)`", tests)}
    written = {name for folder in ("tests", "lopd/testing") for path in (ROOT / folder).glob("*.py") for name in functions_in(str(path))}
    assert sorted(name for _, name in listed if name not in written) == []
    numbered = {(int(found[1]), name) for name in written if (found := re.match(r"test_pain_(\d+)_", name))}
    assert sorted(numbered - listed) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    for path in re.findall(r"`((?:benchmarks|examples|lopd|tests|docs)/[\w/.-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_error_and_warning_says_what_to_do() -> None:
    rows = re.findall(r"^\| `(\w+(?:Error|Warning))` \| (.+) \| (.*) \|$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    assert [name for name, _, todo in rows if not todo.strip()] == []


# the API

PUBLIC = {name: value for name in dir(lopd) if not name.startswith("_") and not isinstance(value := getattr(lopd, name), ModuleType)}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_has_a_docstring_and_a_place_in_the_api(name: str) -> None:
    module = PUBLIC[name].__module__
    assert inspect.getdoc(PUBLIC[name])
    assert sum(module in modules for modules in API.values()) == 1
    assert f"[`{name}`][{module}.{name}]" in (DOCS / "api" / "index.md").read_text()


def test_no_module_is_on_two_api_pages() -> None:
    shown = [module for found in API.values() for module in found]
    assert len(shown) == len(set(shown)) > 30


@pytest.mark.parametrize("module", sorted(module for found in API.values() for module in found))
def test_what_an_api_page_shows_has_docstrings(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


# tables and navigation


def test_the_tables_are_those_of_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("docs_tables")
    (tmp_path / "decisions").mkdir()
    for name in tables.TABLES:
        (tmp_path / name).write_text((DOCS / name).read_text())
    tables.main(tmp_path)
    for name in tables.TABLES:
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), f"{name}: run benchmarks/docs_tables.py"


def test_every_page_is_in_the_navigation_and_every_decision_in_its_index() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:\n", 1)[1]
    named = set(re.findall(r"[\w./-]+\.md", navigation))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}
    index = (DOCS / "decisions" / "index.md").read_text()
    decisions = [page for page in PAGES if page.parent.name == "decisions" and page.name != "index.md"]
    assert [page.name for page in decisions if f"]({page.name})" not in index] == []
    assert [page.name for page in decisions if not re.match(r"(In force since|Replaced by) ", page.read_text().splitlines()[2])] == []


def with_includes(page: Path) -> str:
    """Return the text of a page, code left out; of an included file the text is that of its own folder."""
    text = re.sub(r"^<!-- include: (\S+) -->$", lambda found: (ROOT / found[1]).read_text(), page.read_text(), flags=re.MULTILINE)
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", with_includes(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


WRITTEN = [*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks" / "RESULTS.md", ROOT / "examples" / "README.md"]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_links_out_of_the_pages_are_those_that_have_a_page_of_their_own() -> None:
    (found,) = re.findall(r"^PAGES = (\{.*\})$", (DOCS / "plugins" / "hooks.py").read_text(), re.MULTILINE)
    pages = {(ROOT / path).resolve() for path in ast.literal_eval(found)}
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            target = (page.parent / link).resolve()
            assert target.is_relative_to(DOCS) or target in pages, f"{page}: {link}"


def test_every_page_has_a_description_of_one_sentence() -> None:
    (found,) = re.findall(r"^  descriptions:.*\n((?:    .+\n)+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    described = dict(line.strip().split(": ", 1) for line in found.splitlines())
    assert described.keys() == {str(page.relative_to(DOCS)) for page in PAGES}
    assert [text for text in described.values() if not re.fullmatch(r"[A-Z][^.]{20,158}\.", text)] == []
    assert len(set(described.values())) == len(described)


def test_no_line_of_code_is_wider_than_the_column() -> None:
    for page in [page for page in PAGES if page.name != "examples.md"]:  # code of the examples as it is
        for block in re.findall(r"^```.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            assert [line for line in block.splitlines() if len(line) > 98] == [], page


def test_what_becomes_of_equations_and_cells_when_the_site_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("latex2mathml", "mkdocs"):
        pytest.importorskip(name, reason=f"{name} is not installed: run `make docs`")
    monkeypatch.syspath_prepend(DOCS / "plugins")
    hooks = importlib.import_module("hooks")
    two = hooks.draw_equations(r"""<div class="arithmatex">\[ \log p, \qquad \lvert f' \rvert \]</div>""")
    assert two.count("<math") == 2  # they may stand below each other
    assert '<mi>log</mi><mspace width="0.167em" /><mi>p</mi>' in two
    assert [form for form in ("prefix", "postfix") if f'form="{form}">&#x0007C;' not in two] == []
    assert "<mrow><mi>f</mi><mo>&#x02032;</mo></mrow>" in two  # raised once
    assert "<mi>log</mi><mo" in hooks.draw(r"\log(p)")
    cells = hooks.break_cells("<p>1 ± 2</p><td>1 ± 2 <code>a/b.py::test_c</code></td>")
    assert cells == "<p>1 ± 2</p><td>1\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}2 <code>a/<wbr>b.<wbr>py::<wbr>test_<wbr>c</code></td>"


def test_no_page_installs_from_an_index_what_is_in_a_checkout_alone() -> None:
    assert "not on PyPI yet" in (ROOT / "README.md").read_text()
    pages = [page for page in WRITTEN if page.name != "releasing.md"]  # which is about the day when it is there
    assert [page for page in pages if re.search(r"pip install '?lopd", page.read_text())] == []


def test_the_store_that_going_offline_plans_by_is_made_on_its_page() -> None:
    page = DOCS / "go-offline.md"
    (store,) = re.findall(r"`lopd plan --like (\S+)", page.read_text())
    assert any(f'ZarrStore.open_or_create("{store}", ' in block.code for block in blocks_of(page))


def test_pages_teach_the_recommended_support_with_what_it_needs() -> None:
    """Decision 8: reverse KL on the teacher's top-k, each token weighed alike; forward KL is not recommended."""
    for name in ("choose.md", "howto/command.md"):
        text = (DOCS / name).read_text()
        assert re.search(r"`loss: \{kind: reverse_kl, top_k: 64\}`,? (with|and) `weighting: token` under `opd`", text), name
    assert not [page for page in (DOCS / "howto").glob("*.md") if "forward_kl" in page.read_text()]


@pytest.mark.parametrize("words", ["tutorial", "wandb", "LoRA", "learning rate", "out of memory", "checkpoint", "S3", "warm-up"])
def test_what_newcomers_search_for_is_on_a_page_that_explains(words: str) -> None:
    assert [page for page in PAGES if page.parent in {DOCS, DOCS / "howto"} and words.lower() in page.read_text().lower()]


def test_nothing_is_fetched_from_elsewhere() -> None:
    for path in [ROOT / "mkdocs.yml", *DOCS.rglob("*.svg"), *DOCS.rglob("*.css")]:
        assert re.findall(r"""(?:src|href|url|extra_javascript|@import)\W{0,3}https?:""", path.read_text()) == [], path
    assert "\n  font: false" in (ROOT / "mkdocs.yml").read_text()
