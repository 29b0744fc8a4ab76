r"""What mkdocs does not do by itself: files from outside docs/, descriptions, equations without network and script, and lines that break well.

`\(...\)` becomes MathML when the site is built, which browsers draw themselves.
"""

import re
from html import unescape
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
_CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
#: Files outside docs/ that pages link to, and the page that holds each.
PAGES = {"benchmarks/RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md"}
#: How far ahead a page, or the pages of a folder, are in a search; those that explain come first.
BOOSTS = {"": 4.0, "howto": 4.0, "api": 1.0, "decisions": 0.5, "results.md": 1.0, "changelog.md": 0.25}
#: What the converter writes, and what is drawn well by fonts for mathematics and by others: a space after the name of a function, a prime that is
#: raised once, a tilde that is a relation.
_REPAIRS = (
    (re.compile(r"(<mi>(?:log|exp)</mi>)(?!<mo[^>]*>[(\[]|<mo[^>]*>&#x00028;)"), r'\1<mspace width="0.167em" />'),
    (re.compile(r"<msup>(<mi>\w</mi>)<mi>&#x02032;</mi></msup>"), r"<mrow>\1<mo>&#x02032;</mo></mrow>"),
    (re.compile(r"<msubsup>(<mi>\w</mi>)(<mi>\w</mi>)<mi>&#x02032;</mi></msubsup>"), r"<msub><mrow>\1<mo>&#x02032;</mo></mrow>\2</msub>"),
    (re.compile(r"<mi>&#x0007E;</mi>"), "<mo>&#x0223C;</mo>"),
)


def include_files(markdown: str) -> str:
    """Put each named file in the place of its comment; its links into docs/ are links between pages then."""

    def text(found: re.Match[str]) -> str:
        return (ROOT / found[1]).read_text().replace("](../docs/", "](").replace("](docs/", "](")

    return _INCLUDE.sub(text, markdown)


def link_pages(markdown: str, page: str) -> str:
    """Point links to files outside docs/ that are pages here at these pages."""
    folder = dirname(page)
    for path, target in PAGES.items():
        outside = relpath(path, f"docs/{folder}".rstrip("/"))
        markdown = markdown.replace(f"]({outside})", f"]({relpath(target, folder or '.')})")
    return markdown


def draw_equations(html: str) -> str:
    """Replace LaTeX by MathML.  Equations that are set side by side may stand below each other where there is no room."""

    def drawn(found: re.Match[str]) -> str:
        latex = unescape(found[2]).strip()
        if found[1] == "span":
            return draw(latex)
        parts = [draw(part.strip(), display="block") for part in latex.split("\\qquad")]
        return f'<div class="equations">{"".join(parts)}</div>'

    return _MATH.sub(drawn, html)


def draw(latex: str, display: str = "inline") -> str:
    """Return the MathML of one equation."""
    # the converter takes \lvert and \rvert for one and the same relation
    made = convert(latex.replace("\\lvert", "\\left|").replace("\\rvert", "\\right|"), display=display)
    if "\\" in made:  # a command that the converter does not know comes out as it is
        raise PluginError(f"Equation {latex!r}: a command in it is not known to latex2mathml; write it otherwise.")
    for pattern, repaired in _REPAIRS:
        made = pattern.sub(repaired, made)
    return made


def break_cells(html: str) -> str:
    """Keep a number and its interval on one line of a table's cell, and let long names break where people would break them."""

    def names(found: re.Match[str]) -> str:
        return re.sub(r"(?<=[/_.,(])(?=\w)|(?<=::)", "<wbr>", found[0])

    def cell(found: re.Match[str]) -> str:
        return _CODE.sub(names, found[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"))

    return _CELL.sub(cell, html)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Set the description and search boost of a page, and include files in its Markdown; mkdocs calls this."""
    path = page.file.src_uri
    page.meta |= {"description": config.extra["descriptions"][path], "search": {"boost": BOOSTS.get(path, BOOSTS[dirname(path)])}}
    return link_pages(include_files(markdown), path)


def on_page_content(html: str, **_: Any) -> str:
    """Draw the equations of a page; mkdocs calls this."""
    return draw_equations(html)


def on_post_page(output: str, **_: Any) -> str:
    """Keep cells of tables together; mkdocs calls this after the words of the page went into the index for searches."""
    return break_cells(output)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Write the search index as a script, because pages that are opened from a folder need it, and their other scripts stop without it.

    mkdocs calls this.
    """
    folder = Path(config.site_dir) / "search"
    (folder / "search_index.js").write_text(f"var __index = {(folder / 'search_index.json').read_text()}")
