"""Plain words in docstrings, comments, messages and pages: what is counted here was what stopped readers."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lopd").rglob("*.py"))
SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "docs/plugins", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__)
)
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.[mp][dy]")])

#: Where a docstring of a function begins with one of these, it describes something, and not what the function does.
NOUNS = re.compile(
    "a|all|an|any|at|both|by|each|every|everything|for|half|how|in|is|it|its|likewise|most|new|no|none|not|nothing|of|on|one|several|so|some|"
    "that|the|their|these|they|this|those|three|two|until|what|where|which|while|who|whose|why|with|whether|without|yet",
    re.IGNORECASE,
)
#: What to write instead of each.
PHRASES = {
    r"\bnobody\b(?!')": "the passive, or who it is",
    r"\bbut for\b": "except, without, up to",
    r"\banew\b": "again",
    r"(?<!there )\b(?:is|are) (?-i:none)\b(?!\.\w)": "is not one",
    r"(?<!there )\b(?:is|are|was|were) no (?!longer\b|more\b|further\b|worse\b|[a-z]+er\b)": "is not an X",
    r"\bnext to no\b": "almost no",
    r", say[,;.)]": "for example",
}
#: Names in result files, which keep them until they are measured again, and names that no store has.
ALLOWED = ("online, sampled anew", "that nobody compacted", '"nobody"', "'nobody'", "import ", "says 'more SFT first'")
#: A clause that begins like this has no value that was expected.
EMPTY = r"\bexpected (?:it|one(?! of| or| log-prob)|those|some|them|to [a-z]|most to|sound|whole files|the storage|an answer(?! within))\b"


@cache
def docstrings() -> list[tuple[str, ast.AST, str]]:
    texts = []
    for path in MODULES + SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                texts.append((f"{path.relative_to(ROOT)}: {getattr(node, 'name', '')}", node, text))
    return texts


def found(pattern: str, paths: list[Path]) -> list[str]:
    """Return the lines with this in them, each with its place; code is not looked at, strings and comments are."""
    lines = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(pattern, line, re.IGNORECASE) and not any(name in line for name in ALLOWED):
                lines.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return lines


def test_a_documented_argument_does_not_begin_with_of() -> None:
    assert [f"{where}: {line}" for where, _, text in docstrings() for line in re.findall(r"^ +[\w, ]+: [Oo]f .*", text, re.MULTILINE)] == []


def test_a_function_begins_with_what_it_does() -> None:
    starts = {}
    for where, node, text in docstrings():
        a_test = getattr(node, "name", "").startswith("test_")  # its name states what holds
        if (
            isinstance(node, ast.FunctionDef)
            and not a_test
            and not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        ):
            word = re.split(r"[\s,:;.]", text, maxsplit=1)[0]
            if not word.replace("-", "").isalpha() or NOUNS.fullmatch(word):
                starts[where] = text.splitlines()[0]
    assert starts == {}


@pytest.mark.parametrize("phrase", PHRASES, ids=PHRASES.values())
def test_words_are_literal(phrase: str) -> None:
    assert found(phrase, MODULES + SCRIPTS + PAGES) == []


def test_things_do_not_speak() -> None:
    assert found(r"\bsays\b", MODULES + [page for page in PAGES if page.name != "CHANGELOG.md"]) == []


def test_what_was_expected_is_a_value() -> None:
    assert found(EMPTY, MODULES + SCRIPTS) == []
