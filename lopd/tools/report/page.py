"""Templates of pages: every text that goes into one is escaped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lopd.errors import StoreWriteError, printable
from lopd.records.paths import local_path


def _shown(value: Any) -> Any:
    """Return text without marks of direction, which would rearrange the page; a string that is markup already is ours."""
    return printable(value) if type(value) is str else value


ENVIRONMENT = Environment(loader=PackageLoader("lopd.tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
#: A line may break before a space, which is shown as a dot.
ENVIRONMENT.globals["breaks"] = lambda text: Markup("<wbr>") if text.startswith("·") else ""


def write_page(path: str | Path, template: str, parts: Mapping[str, Any]) -> None:
    """Fill a template with these parts, and write it.

    Raises:
        StoreWriteError: the operating system refuses.
    """
    page = ENVIRONMENT.get_template(template).render(parts)
    try:
        local_path("Report", path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreWriteError(
            f"Report {path}: it cannot be written ({error}); check the folder, its permissions and the free space."
        ) from error
