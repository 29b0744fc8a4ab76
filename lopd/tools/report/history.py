"""What a training left behind, read from the JSON it was kept in: its steps, what its phases cost, and versions."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lopd.errors import InvalidRecordError, LopdError
from lopd.records.checks import check_at_least, check_number
from lopd.records.paths import local_path, read_regular
from lopd.records.steps import StepMetrics

#: What lopd 0.2 called its phases of training.
_TRAININGS = ("SFT", "OPD", "Lightning OPD", "online OPD")


@frozen
class Phase:
    """What one phase of a run cost.

    Args:
        name: the phase's name.
        seconds: wall time, of the last attempt; None if it was not measured.
        read_tokens: tokens that models read in it, prompts included; 0 if it has none, or they were not counted.
        result: what it measured, in words.
        response_tokens: tokens of responses in it; 0 if it has none, or they were not counted.
        attempts: how often it was begun; after several its tokens are of all of them, and its time of the last.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    name: str
    seconds: float | None
    read_tokens: int = 0
    result: str = ""
    response_tokens: int = 0
    attempts: int = 1

    def __attrs_post_init__(self) -> None:
        seconds = self.seconds or 0.0
        check_number(f"Phase {self.name!r}", "seconds", seconds, 0 <= seconds < math.inf, "finite and at least 0")
        for name in ("read_tokens", "response_tokens"):
            check_at_least(f"Phase {self.name!r}", name, getattr(self, name), 0)
        check_at_least(f"Phase {self.name!r}", "attempts", self.attempts, 1)


@frozen
class RunHistory:
    """What a training left behind.

    Args:
        steps: its metrics, by step.
        phases: what it cost.
        versions: library -> version.
    """

    steps: tuple[StepMetrics, ...] = ()
    phases: tuple[Phase, ...] = ()
    versions: Mapping[str, str] = field(factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "RunHistory":
        """Return what a JSON file holds: a list of steps, an object with such a list as `history`, or JSON lines with a step each.

        A step is `attrs.asdict` of its `StepMetrics`, or its number as `step` with its `numbers()`, as a logger writes it.
        The object may have `phases`, a list of objects with `name`, `wall_s` (or `seconds`),
        perhaps `read_tokens`, `response_tokens` and `attempts`, and what else the quickstart writes of one; and `versions`, an object of strings.

        Raises:
            InvalidRecordError: the file is absent, or holds something else.
        """
        owner = f"History {path}"
        try:
            data: Any = _read_json(read_regular(local_path(owner, path)).decode())
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, LopdError):
                raise
            raise InvalidRecordError(
                f"{owner}: it cannot be read ({error!r}), expected a JSON file, or JSON lines; pass that of the training."
            ) from error
        data = {"history": data} if isinstance(data, list) else data
        if not isinstance(data, dict) or not isinstance(data.get("history"), list):
            raise InvalidRecordError(
                f"{owner}: it has no steps, expected a list of them, or an object with such a list as `history`; keep `asdict` of every step."
            )
        try:
            phases = tuple(_phase(row) for row in data.get("phases", ()))
            versions = {str(name): str(version) for name, version in data.get("versions", {}).items()}
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, LopdError):
                raise
            raise InvalidRecordError(
                f"{owner}: its phases or versions cannot be read ({error!r}), expected name, wall_s and tokens of each; correct or remove them."
            ) from error
        return cls(read_steps(data["history"]), phases, versions)


def _read_json(text: str) -> Any:
    """Return one document, or a list of one for each line; raises ValueError."""
    try:
        data = json.loads(text)
    except ValueError:
        data = [_line(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not data:
            raise
    return [data] if isinstance(data, dict) and "step" in data else data


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def read_steps(history: Iterable[StepMetrics | Mapping[str, Any]]) -> tuple[StepMetrics, ...]:
    """Return metrics by step, of records or of what `attrs.asdict` made of them; of a step that was repeated after a resume, the last.

    Raises:
        InvalidRecordError: an entry is neither.
    """
    steps = []
    for i, entry in enumerate(history):
        try:
            steps.append(entry if isinstance(entry, StepMetrics) else StepMetrics.from_json(entry))
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise InvalidRecordError(
                f"History: entry {i} cannot be read ({error!r}), expected the metrics of a step; pass what `opd_steps` gives."
            ) from error
    return tuple(sorted({m.step: m for m in steps}.values(), key=lambda m: m.step))


def _phase(row: Mapping[str, Any]) -> Phase:
    # lopd 0.2 wrote one number: what a training read, and elsewhere the tokens of responses
    if "tokens" in row and not {"read_tokens", "response_tokens"} & set(row):
        row = {**row, "read_tokens" if "history" in row or row["name"] in _TRAININGS else "response_tokens": row["tokens"]}
    seconds = row["wall_s"] if "wall_s" in row else row["seconds"]
    kl, ci95, attempts = row.get("held_out_reverse_kl"), row.get("ci95"), row.get("attempts", 1)
    measured = "" if kl is None or ci95 is None else f"held-out reverse KL {kl:.3f} ± {ci95:.3f}"
    last = f"the last of {attempts} attempts" if attempts > 1 else ""
    result = "; ".join(said for said in (row.get("result", measured), last) if said)
    return Phase(str(row["name"]), seconds, row.get("read_tokens", 0), result, row.get("response_tokens", 0), attempts)
