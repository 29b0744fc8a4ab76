"""A run that is a row of phases, each done once: what a script needs to be killed and called again."""

import hashlib
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import fsspec
from attrs import frozen
from rich.console import Console

from lopd import StepMetrics
from lopd.protocols import LogprobReader
from lopd.tools.console import table

console = Console()
HIDDEN = ("name", "peak_rss_gib")


def counted(history: Sequence[StepMetrics]) -> dict[str, int]:
    """Tokens of a training."""
    return {"response_tokens": sum(m.response_tokens for m in history), "read_tokens": sum(m.read_tokens for m in history)}


def counted_in(store: LogprobReader) -> dict[str, int]:
    """Tokens of a store, which were sampled or scored."""
    lengths = store.lengths()
    return {"response_tokens": int(lengths[:, 1].sum()), "read_tokens": int(lengths.sum())}


@frozen
class Run:
    """A folder in which finished phases are kept."""

    folder: Path

    def phase(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, with its wall time and the number of attempts; computed once, and read back ever after.

        A phase that was killed and resumed has more than one attempt, and its wall time is that of the last.
        """
        path = self.folder / "phases" / f"{name.replace(' ', '-').lower()}.json"
        if path.exists():
            row = json.loads(path.read_text())
        else:
            console.rule(name, align="left")
            begun = path.with_suffix(".attempts")
            attempts = 1 + (json.loads(begun.read_text()) if begun.exists() else 0)
            write_json(begun, attempts)
            started = perf_counter()
            row = {
                "name": name,
                "response_tokens": 0,
                "read_tokens": 0,
                "held_out_reverse_kl": None,
                "ci95": None,
                "attempts": attempts,
                **work(),
            }
            row["wall_s"] = round(perf_counter() - started, 2)
            row["peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            write_json(path, row)
        shown = {k.replace("_", " "): v for k, v in row.items() if k not in HIDDEN and v is not None and not isinstance(v, list | dict)}
        console.print(table(name, list(shown), [list(shown.values())]))
        return row

    def claim(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Take the folder for these settings and these contents of the files it reads (see `digest`); one folder holds one run."""
        for file, ours in (("settings.json", settings), ("inputs.json", inputs)):
            path = self.folder / file
            theirs = json.loads(path.read_text()) if path.exists() else ours
            for name, value in ours.items():
                if value != theirs.get(name):
                    raise SystemExit(
                        f"Run {self.folder}: {name} is {theirs.get(name)!r} there, expected {value!r}; pass another --out, or remove it."
                    )
            write_json(path, ours)


def wall_time(row: Mapping[str, Any]) -> str:
    """Seconds; those of the last attempt are marked as what they are."""
    seconds = f"{row['wall_s']:,.0f}"
    return seconds if row["attempts"] == 1 else f"{seconds} (attempt {row['attempts']})"


def digest(path: str) -> str:
    """A hash of the content of a file or URL, or of all files in a folder and their names; a path keeps its name when its content changes."""
    folder = Path(path)
    if not folder.is_dir():
        return _digest_file(path)
    parts = [f"{file.relative_to(folder)} {_digest_file(str(file))}" for file in sorted(folder.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _digest_file(path: str) -> str:
    with fsspec.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_json(path: Path, data: Any) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.rename(path)
