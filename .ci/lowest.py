"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `python .ci/lowest.py test`.

What follows from them (dependencies of dependencies) is left to pip.
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?(?:>=(?P<lowest>[\w.]+))?")


def lowest(project: Mapping[str, Any], extras: Iterable[str]) -> Iterator[str]:
    """Yield `name==version` for each `name>=version` of the package and of these extras, and of the extras that those name.

    Args:
        project: the table `project` of pyproject.toml.
        extras: names of optional dependencies.

    Raises:
        ValueError: a requirement is neither `name>=version` nor the package's own extras; the test needs to know what is lowest.
    """
    yield from _of(project, project["dependencies"])
    for extra in extras:
        yield from _of(project, project["optional-dependencies"][extra])


def _of(project: Mapping[str, Any], requirements: Sequence[str]) -> Iterator[str]:
    for requirement in requirements:
        found = _REQUIREMENT.fullmatch(requirement)
        if found and found["name"] == project["name"]:
            for extra in found["extras"].split(","):
                yield from _of(project, project["optional-dependencies"][extra])
        elif found and found["lowest"]:
            yield f"{found['name']}=={found['lowest']}"
        else:
            raise ValueError(f"Requirement {requirement!r}: it has no lower bound that this script reads; write it as name>=version.")


if __name__ == "__main__":
    print(*sorted(set(lowest(tomllib.loads(PROJECT.read_text())["project"], sys.argv[1:]))), sep="\n")
