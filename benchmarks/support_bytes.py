"""Bytes a token of a score column that keeps a support, and what the store's type of log-probs rounds away.

python benchmarks/support_bytes.py     # `make bench-supports`; writes benchmarks/results/support_bytes.json; under a minute

The supports are made up: log-probs of normal logits, which reach to where a teacher finds a candidate of the policy next to impossible.  No store
compresses them, so a real column has the same size.  A store takes the ids in as many bytes as its vocabulary needs.
"""

import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve
from record import describe_machine, result_file

from lopd import LanceStore, Rollout, Scores, ZarrStore
from lopd.records import TopK
from lopd.testing import tiny_manifest, tiny_provenance

STORES = {"zarr": ZarrStore, "lance": LanceStore}
VOCABULARIES, WIDTHS, DTYPES = (49_152, 151_936), (16, 64), ("float32", "float16")
GOALS = {16: 100, 64: 390}
ROLLOUTS, TOKENS, SPREAD = 64, 512, 5.0


def rollouts(vocab_size: int) -> list[Rollout]:
    """Make responses of one length."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (ROLLOUTS, TOKENS + 1))
    return [Rollout(f"p{i}/s0/g0", line[:1], line[1:], np.ones(TOKENS, np.bool_), "length") for i, line in enumerate(ids)]


def scores(items: Sequence[Rollout], vocab_size: int, width: int) -> list[Scores]:
    """Make the scores of each response, with a support; the sampled token is as likely as the last of it."""
    random, made = np.random.default_rng(width), []
    for item in items:
        logits = random.normal(0, SPREAD, (TOKENS, width + 1))
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ids = (random.integers(vocab_size, size=(TOKENS, 1)) + np.arange(width) * 997) % vocab_size
        made.append(Scores.of(item, logprobs[:, width - 1], top_k=TopK(ids, logprobs[:, :width], np.exp(logprobs[:, width]))))
    return made


def measure(kind: str, folder: Path, vocab_size: int, width: int, dtype: str) -> dict[str, Any]:
    """Measure one row."""
    store = STORES[kind].create(str(folder), tiny_manifest(vocab_size), logprob_dtype=dtype)
    items = rollouts(vocab_size)
    store.append(items)
    made = scores(items, vocab_size, width)
    sizes = [store.stored_bytes()]
    store.append_scores("plain", tiny_provenance(), [evolve(score, top_k=None) for score in made])
    sizes.append(store.stored_bytes())
    store.append_scores("teacher", tiny_provenance(top_k=width), made)
    sizes.append(store.stored_bytes())
    plain, per_token = (np.diff(sizes) / (ROLLOUTS * TOKENS)).tolist()
    read = store.read(range(ROLLOUTS), ("teacher",), top_k=("teacher",)).top_k["teacher"].logprobs.astype(np.float64)
    truth = np.concatenate([score.top_k.logprobs for score in made if score.top_k is not None]).astype(np.float64)
    return {
        "store": kind,
        "vocabulary": vocab_size,
        "k": width,
        "logprobs": dtype,
        "bytes_per_token": per_token,
        "of_the_support": per_token - plain,
        "rounding_nats": store.history()[-1].rounding,
        "mean_error_nats": float(np.abs(read - truth).mean()),
        "least_logprob": float(truth.min()),
    }


def find_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge the bytes in float16."""
    found = []
    for row in (row for row in rows if row["logprobs"] == "float16"):
        name, most = f"bytes a token, K = {row['k']}, {row['vocabulary']:,} ids, float16 ({row['store']})", GOALS[row["k"]]
        found.append({"name": name, "goal": f"<= {most}", "measured": row["bytes_per_token"], "met": row["bytes_per_token"] <= most})
    return found


def main() -> None:
    """Measure all, and write the result file."""
    with tempfile.TemporaryDirectory() as folder:
        cases = enumerate(product(STORES, VOCABULARIES, WIDTHS, DTYPES))
        rows = [measure(kind, Path(folder) / str(i), *rest) for i, (kind, *rest) in cases]
    for row in rows:
        print(row)
    result_file("support_bytes", describe_machine(), rows, find_goals(rows))


if __name__ == "__main__":
    main()
