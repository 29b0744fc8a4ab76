r"""What mkdocs does not do by itself: files from outside docs/, and equations that need no network and no script.

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
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
#: Files outside docs/ that pages link to, and the page that holds each.
PAGES = {"benchmarks/RESULTS.md": "results.md", "CHANGELOG.md": "changelog.md"}


def include_files(markdown: str) -> str:
    """Put each named file in the place of its comment; its links into docs/ are links between pages then."""

    def text(found: re.Match[str]) -> str:
        return (ROOT / found[1]).read_text().replace("](../docs/", "](").replace("](docs/", "](")

    return _INCLUDE.sub(text, markdown)


def link_pages(markdown: str, page: str) -> str:
    """Links to files outside docs/ that are pages here lead to these."""
    folder = dirname(page)
    for path, target in PAGES.items():
        outside = relpath(path, f"docs/{folder}".rstrip("/"))
        markdown = markdown.replace(f"]({outside})", f"]({relpath(target, folder or '.')})")
    return markdown


def draw_equations(html: str) -> str:
    """MathML in the place of LaTeX."""

    def drawn(found: re.Match[str]) -> str:
        latex = unescape(found[2]).strip()
        made = convert(latex, display="block" if found[1] == "div" else "inline")
        if "\\" in made:  # a command that the converter does not know comes out as it is
            raise PluginError(f"Equation {latex!r}: a command in it is not known, expected what latex2mathml draws; write it otherwise.")
        return made

    return _MATH.sub(drawn, html)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs."""
    return link_pages(include_files(markdown), page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs."""
    return draw_equations(html)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Called by mkdocs.  Pages that are opened from a folder look for the index as a script, and their other scripts stop if it is missing."""
    folder = Path(config.site_dir) / "search"
    (folder / "search_index.js").write_text(f"var __index = {(folder / 'search_index.json').read_text()}")
