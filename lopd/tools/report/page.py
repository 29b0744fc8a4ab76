"""Templates of pages: every text that goes into one is escaped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

ENVIRONMENT = Environment(loader=PackageLoader("lopd.tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
#: A line may break before a space, which is shown as a dot.
ENVIRONMENT.globals["breaks"] = lambda text: Markup("<wbr>") if text.startswith("·") else ""


def write_page(path: str | Path, template: str, parts: Mapping[str, Any]) -> None:
    """Fill a template with these parts, and write it."""
    Path(path).write_text(ENVIRONMENT.get_template(template).render(parts), encoding="utf-8")
