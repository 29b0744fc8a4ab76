"""Which causal LMs of transformers the planner of memory answers for, and whether it counts all of their weights.

    python benchmarks/plan_families.py            # writes benchmarks/results/plan_families.json; three minutes
    python benchmarks/plan_families.py gpt2 rwkv  # prints these, writes nothing

Every family is a tiny configuration (`tiny_models.py`), and nothing is computed.  A phase is `answered`, or refused by an error of lopd, whose text
is kept; an error of another library is `raw`.  Weights that are planned are compared with those of the whole model on torch's meta device.
"""

import argparse
import warnings
from typing import Any

import torch
import transformers
from record import describe_machine, result_file
from tiny_models import CLASSES, SPECIAL, families, tiny_config

from lopd.errors import LopdError
from lopd.tools.plan import Use, sampling, scoring, training
from lopd.tools.plan.following import empty

USE = Use(prompt_tokens=8, response_tokens=24, tokens_per_batch=128, rows=4)
PHASES = {"sampling": sampling, "scoring": scoring, "training": training}
ANSWERED = "answered"


def measure(family: str) -> dict[str, Any]:
    """Measure a row: what each phase ends in, and bytes of weights, counted and planned, where training is answered."""
    config = tiny_config(getattr(transformers, CLASSES[family]).config_class, **SPECIAL.get(family, {}))
    row: dict[str, Any] = {"family": family}
    parts: dict[str, float] = {}
    for phase, count in PHASES.items():
        try:
            parts = count(config, USE).gigabytes(1)
            row[phase] = ANSWERED
        except LopdError as error:
            row[phase] = f"refused: {error}"
        except Exception as error:
            row[phase] = f"raw: {type(error).__name__}"
    if row["training"] == ANSWERED:
        row |= {"weight_bytes": held_bytes(config), "planned_bytes": round(parts["weights"] * 1e9)}
    return row


def held_bytes(config: Any) -> int:
    """Return the bytes of all parameters and buffers in float32; one that is used twice counts once."""
    model = empty(config, torch.float32, 0, None)
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge what must hold for every family."""
    raw = sum(str(row[phase]).startswith("raw") for row in rows for phase in PHASES)
    counted = [row for row in rows if "planned_bytes" in row]
    other = sum(row["planned_bytes"] != row["weight_bytes"] for row in counted)
    answered = sum(all(row[phase] == ANSWERED for phase in PHASES) for row in rows)
    return [
        {"name": "phases of families that end in another library's error", "goal": "0", "measured": raw, "met": raw == 0},
        {"name": "families whose planned weights are not all of theirs", "goal": "0", "measured": other, "met": other == 0},
        {"name": "families whose three phases are all answered", "goal": ">= 150", "measured": answered, "met": answered >= 150},
    ]


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all of them where none is named")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for name in options.names or families():
        rows.append(measure(name))
        print(rows[-1], flush=True)
    if not options.names:
        result_file("plan_families", describe_machine(), rows, goals(rows))


if __name__ == "__main__":
    main()
