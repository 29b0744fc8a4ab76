"""Templates of pages: every text that goes into one is escaped."""

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

ENVIRONMENT = Environment(loader=PackageLoader("lopd.tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
#: A line may break before a space, which is shown as a dot.
ENVIRONMENT.globals["breaks"] = lambda text: Markup("<wbr>") if text.startswith("·") else ""
