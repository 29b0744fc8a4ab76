"""A run that is a row of phases, each done once: what a script needs to be killed and called again."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from attrs import frozen
from rich.console import Console

from lopd.console import table

console = Console()
HIDDEN = ("name", "peak_rss_gib")


@frozen
class Run:
    """A folder in which finished phases are kept."""

    folder: Path

    def phase(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, with its wall time; computed once, and read back ever after."""
        path = self.folder / "phases" / f"{name.replace(' ', '-').lower()}.json"
        if path.exists():
            row = json.loads(path.read_text())
        else:
            console.rule(name, align="left")
            started = perf_counter()
            row = {"name": name, "tokens": 0, "held_out_reverse_kl": None, "ci95": None, **work()}
            row["wall_s"] = round(perf_counter() - started, 2)
            row["peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            write_json(path, row)
        shown = {k.replace("_", " "): v for k, v in row.items() if k not in HIDDEN and v is not None and not isinstance(v, list | dict)}
        console.print(table(name, list(shown), [list(shown.values())]))
        return row

    def claim(self, settings: dict[str, Any]) -> None:
        """Take the folder for these settings; one folder holds one run."""
        path = self.folder / "settings.json"
        theirs = json.loads(path.read_text()) if path.exists() else settings
        for name, value in settings.items():
            if value != theirs.get(name):
                raise SystemExit(
                    f"Run {self.folder}: {name} is {theirs.get(name)!r} there, expected {value!r}; pass another --out, or remove it."
                )
        write_json(path, settings)


def write_json(path: Path, data: Any) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.rename(path)
