"""How often `lopd.audit` is wrong about who wrote a text: known authors, known texts.

    python benchmarks/audit_errors.py        # writes benchmarks/results/audit_errors.json; some minutes

Candidates: teachers of one style that differ in nothing but the seed they were trained from, a teacher of another style, and a student.  Texts by
each teacher at temperature 1 and 0.7; many subsamples of 4, 16 and 64 rollouts.  Once with the author among the candidates, once without it.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from record import ROOT, describe_machine, result_file
from testbed.models import HEALTHY, prepare, source_of

from lopd import MemoryStore, audit, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer

SIZES, TEMPERATURES = (4, 16, 64), (1.0, 0.7)


def main() -> None:
    """Build the models, audit them, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "testbed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    beds = [prepare(HEALTHY, seed, options.folder, ("A",)) for seed in range(3)]
    models = {f"teacher {seed}": bed.teachers["A"] for seed, bed in enumerate(beds)}
    models["other style"] = prepare(HEALTHY, 0, options.folder, ("A", "B")).teachers["B"]
    models["student of teacher 0"] = beds[0].students["A"]
    rng, rows = np.random.default_rng(0), []
    for author, temperature in product([name for name in models if name.startswith("teacher")], TEMPERATURES):
        source = source_of(models[author], evolve(beds[0].sampling(), temperature=temperature))
        store = MemoryStore(source.manifest)
        collect_rollouts(source, beds[0].opd_prompts[:1000], store, prompts_per_batch=1000)
        for name, folder in models.items():
            score_rollouts(store, evolve(HFScorer.from_folder(folder), top_k=5), column=name.replace(" ", "-"))
        columns = [name.replace(" ", "-") for name in models]
        for size, present in product(SIZES, (True, False)):
            asked = [column for column in columns if present or column != author.replace(" ", "-")]
            verdicts = [audit(store, asked, rows=rng.choice(len(store), size, replace=False)).author for _ in range(options.draws)]
            named = sum(verdict is not None for verdict in verdicts)
            right = sum(verdict == author.replace(" ", "-") for verdict in verdicts)
            row: dict[str, Any] = {"author": author, "temperature": temperature, "rollouts": size, "author_among_candidates": present}
            rows.append({**row, "draws": options.draws, "right": right, "wrong": named - right, "not_told": options.draws - named})
            print(rows[-1], flush=True)
    result_file("audit_errors", describe_machine(), rows, goals(rows))


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a goal for each temperature, size and presence of the author: the share of draws in which another model is named."""
    found = []
    for temperature, size, present in product(TEMPERATURES, SIZES, (True, False)):
        chosen = [r for r in rows if (r["temperature"], r["rollouts"], r["author_among_candidates"]) == (temperature, size, present)]
        draws, wrong = (sum(r[name] for r in chosen) for name in ("draws", "wrong"))
        where = f"temperature {temperature:g}, {size} rollouts, author {'among the candidates' if present else 'absent'}"
        found.append(
            {
                "name": f"another model named as the author: {where}",
                "goal": "<= 0.01",
                "measured": wrong / draws,
                "met": wrong / draws <= 0.01,
            }
        )
        print("met   " if found[-1]["met"] else "MISSED", found[-1]["name"], f"{wrong / draws:.3f}")
    return found


if __name__ == "__main__":
    main()
