"""What users import, with its signatures, as `public_api.txt` has it: nothing there changes unnoticed.

Only these paths are public: `lopd` and the packages below.  A module inside one of them may move without notice.

After a change that is meant: python tests/test_public_api.py, and a line in the changelog.
"""

import importlib
import inspect
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

PINNED = Path(__file__).with_name("public_api.txt")
MODULES = (
    "lopd",
    "lopd.engines.hf",
    "lopd.engines.local",
    "lopd.engines.on_ray",
    "lopd.engines.server",
    "lopd.engines.vllm",
    "lopd.errors",
    "lopd.guards",
    "lopd.losses.divergences",
    "lopd.losses.functional",
    "lopd.losses.variants",
    "lopd.protocols",
    "lopd.records",
    "lopd.testing",
    "lopd.tools.console",
    "lopd.tools.doctor",
    "lopd.tools.interop",
    "lopd.tools.phases",
    "lopd.tools.plan",
    "lopd.tools.report",
    "lopd.verbs",
)


def public(module: ModuleType) -> dict[str, Any]:
    """Return what a module defines, or hands on from lopd as `X as X`."""
    package = hasattr(module, "__path__")
    found = {}
    # `lopd` itself imports a name when it is asked for
    for name, thing in sorted((name, getattr(module, name)) for name in dir(module)):
        home = getattr(thing, "__module__", None)
        if name.startswith("_") or isinstance(thing, ModuleType) or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if home == module.__name__ or (package and str(home).startswith("lopd.")):
            found[name] = thing
    return found


def lines(module: ModuleType, name: str, thing: Any) -> list[str]:
    """Return the signature of a function; of a class also those of its public methods, and its properties."""
    found = [f"{module.__name__}.{name}{signature(thing)}"]
    members = (
        {name: value for kind in reversed(thing.__mro__) if kind.__module__.startswith("lopd") for name, value in vars(kind).items()}
        if inspect.isclass(thing)
        else {}
    )
    for member, value in sorted(members.items()):
        inside = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not member.startswith("_") and inspect.isfunction(inside):
            found.append(f"    {member}{signature(inside)}")
        elif not member.startswith("_") and isinstance(inside, property):
            found.append(f"    {member}")
    return found


def signature(thing: Any) -> str:
    """Return parameters and whether they have defaults; not the defaults, whose text depends on versions of other libraries."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return f" <- {', '.join(base.__name__ for base in thing.__bases__)}"
    if inspect.isclass(thing) and issubclass(thing, Enum):
        return f" = {', '.join(thing.__members__)}"
    if getattr(thing, "_is_protocol", False):
        return ""
    parameters = list(inspect.signature(thing).parameters.values())
    shown, keyword = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword:
            keyword = True
            shown.append("*")
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        keyword = keyword or p.kind is p.VAR_POSITIONAL
        shown.append(f"{star}{p.name}{'' if p.default is p.empty else '=...'}")
    return f"({', '.join(shown)})"


def described() -> str:
    """Return every line."""
    modules = [importlib.import_module(name) for name in MODULES]
    return "\n".join(line for module in modules for name, thing in public(module).items() for line in lines(module, name, thing)) + "\n"


def test_what_users_import_is_what_is_pinned():
    now, pinned = described().splitlines(), PINNED.read_text().splitlines()
    gone, new = [line for line in pinned if line not in now], [line for line in now if line not in pinned]
    assert (gone, new) == ([], []), f"run python {Path(__file__).name} if this is meant, and say it in the changelog"
    assert now == pinned


def test_everything_that_users_import_says_what_it_is():
    silent = [
        f"{name}.{thing}" for name in MODULES for thing, value in public(importlib.import_module(name)).items() if not inspect.getdoc(value)
    ]
    assert silent == []


if __name__ == "__main__":
    PINNED.write_text(described())
    sys.stdout.write(f"{PINNED}: {len(described().splitlines())} lines\n")
