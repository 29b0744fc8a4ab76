"""What runs before a commit is what `make check` runs, and `make test-lowest` takes the lower bounds of pyproject.toml."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWEST = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"]


def test_each_lower_bound_of_the_package_and_its_extras_is_a_constraint() -> None:
    every = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    bounds = {re.sub(r"\[.*\]", "", one).replace(">=", "==") for one in every if not one.startswith("lopd[")}
    assert set(LOWEST(PROJECT, PROJECT["optional-dependencies"])) == bounds


def test_an_extra_that_names_another_brings_its_bounds_along() -> None:
    project = {
        "name": "lopd",
        "dependencies": ["a>=1.2"],
        "optional-dependencies": {"x": ["b[fast]>=3"], "y": ["lopd[x,z]", "c>=4.0"], "z": ["d>=5"], "w": ["e>=6"]},
    }
    assert list(LOWEST(project, ["y"])) == ["a==1.2", "b==3", "d==5", "c==4.0"]


def test_one_name_has_one_lower_bound_in_all_extras() -> None:
    names = [bound.split("==")[0] for bound in set(LOWEST(PROJECT, PROJECT["optional-dependencies"]))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("requirement", ["a", "a<2", "a==1", "a>=1,<2"])
def test_a_requirement_without_a_plain_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match="write it as name>=version"):
        list(LOWEST({"name": "lopd", "dependencies": [requirement], "optional-dependencies": {}}, []))


def test_the_hooks_before_a_commit_are_the_commands_of_make_check() -> None:
    target = (ROOT / "Makefile").read_text().split("\ncheck:", 1)[1].split("\n\n", 1)[0]
    commands = [line.replace("$(BIN)", ".venv/bin").strip() for line in target.splitlines()[1:]]
    assert re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE) == commands
