"""Result files: what was measured, where, with what, and which goals it met."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lopd

ROOT = Path(__file__).parents[1]
#: Processes that ran or waited, a mean over the minute before the script began: whatever else the machine did.
LOAD = os.getloadavg()[0]


def describe_machine() -> dict[str, Any]:
    """Return machine and versions, for reports that are not made by the quickstart."""
    names = ("torch", "numpy", "zarr", "lancedb", "pylance", "pyarrow", "datasets", "obstore", "xxhash", "transformers", "peft", "trl")
    versions = {name: version(name) for name in names if find_spec(name)}
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"machine": machine, "versions": {"lopd": lopd.__version__, **versions}}


def result_file(
    name: str,
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    goals: list[dict[str, Any]],
    folder: Path = ROOT / "benchmarks" / "results",
) -> Path:
    """Write `NAME.json` into the folder; machine and versions are those of the report, and the load is that before the script began.

    The load says nothing of which machine it is, so it does not stand in the report, by which machines are compared.
    """
    machine = {**report["machine"], "system": platform.system()}
    result = {"machine": machine, "versions": report["versions"], "load": LOAD, "commit": commit(), "rows": rows, "goals": goals}
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def judge_again(path: Path, rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    """Put rows and goals into a result file that is there; machine, versions and commit remain those of what was measured."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": rows, "goals": goals}, indent=1) + "\n")


def commit() -> str | None:
    """Return the commit of the history; None for a copy of the files that has no history."""
    if not (ROOT / ".git").exists():
        return None
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def fill(readme: Path, name: str, lines: list[str]) -> None:
    """Put lines between the markers `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, rest = readme.read_text().split(begin)
    readme.write_text(f"{head}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}")
