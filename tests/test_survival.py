"""Sampling and scoring killed with SIGKILL at random instants, and run again until done: the store of an unbroken run."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lopd import collect_rollouts, score_rollouts
from lopd.backends.lance.store import LanceStore
from lopd.backends.opening import open_store
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.records import Prompt, SamplingParams, Scores
from lopd.testing import assert_same_rollout

pytestmark = pytest.mark.slow

SAMPLING = SamplingParams(max_new_tokens=6, samples_per_prompt=2, stop_ids=(0, 5, 6, 7))
KILLS = int(os.environ.get("LOPD_KILLS", "24"))
STORES = [(ZarrStore, "fork", KILLS)]
if "LOPD_KILLS" in os.environ:
    # LanceDB does not survive a fork, and a child that is spawned first imports everything: `make test-kills`
    STORES.append((LanceStore, "spawn", max(KILLS // 24, 1)))


class Refusing:
    """A scorer that gives NaN for one rollout, so that a quarantine is among what is killed."""

    def __init__(self, inner: HFScorer, bad: str) -> None:
        self.inner, self.bad, self.provenance = inner, bad, inner.provenance

    def score(self, rollouts: Any) -> Any:
        scores = self.inner.score(rollouts)
        return [Scores.of(r, s.logprobs * (np.nan if r.rollout_id == self.bad else 1)) for r, s in zip(rollouts, scores, strict=True)]


def phases(path: Path, kind: Any, source: HFSource, scorer: Any, prompts: list[Prompt], begun: Any = None) -> None:
    """Run both phases, in small batches, so that there is much to be killed in."""
    if begun is not None:
        begun.set()
    store = kind.open_or_create(path, source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=2)
    score_rollouts(store, scorer, rollouts_per_batch=2)


@pytest.mark.filterwarnings("ignore:.*are without scores:lopd.errors.QuarantineWarning")
@pytest.mark.parametrize(("kind", "method", "most"), STORES)
def test_a_run_killed_at_any_instant_and_repeated_gives_the_store_of_an_unbroken_run(
    kind: Any, method: str, most: int, tmp_path: Path, llama: Any, make_model: Any, tokenizer: Any, prompts: list[Prompt]
) -> None:
    source = HFSource(llama, tokenizer, SAMPLING)
    scorer = Refusing(HFScorer(make_model("llama_tied", seed=77), tokenizer), "p3/s1/g0")
    scorer.provenance, source.manifest  # noqa: B018 (weights are hashed once, and not in each child)
    began = time.monotonic()
    phases(tmp_path / "whole", kind, source, scorer, prompts)
    seconds = time.monotonic() - began
    context, chance, kills, trials = multiprocessing.get_context(method), random.Random(0), 0, 0
    while kills < most:
        broken, trials = tmp_path / f"broken{trials}", trials + 1
        kills += killed_until_done(context, chance, seconds, (broken, kind, source, scorer, prompts))
        assert_equal_stores(tmp_path / "whole", broken)
        assert trials < 20 * most, "nearly nothing was killed"


def killed_until_done(context: Any, chance: random.Random, seconds: float, args: tuple[Any, ...]) -> int:
    """Run the phases in child after child, each killed after part of the time that they take; gives how many were killed."""
    kills = 0
    while True:
        begun = context.Event()
        child = context.Process(target=phases, args=(*args, begun))
        child.start()
        assert begun.wait(120)
        child.join(chance.random() * seconds)
        if not child.is_alive():
            assert child.exitcode == 0
            return kills
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1


def assert_equal_stores(whole: Path, broken: Path) -> None:
    left, right = open_store(whole), open_store(broken)
    assert len(left) == len(right) == 14
    assert dict(left.columns) == dict(right.columns)
    assert dict(left.quarantined("teacher")) == dict(right.quarantined("teacher"))
    rows = np.flatnonzero(left.scored("teacher")).tolist()
    assert len(rows) == 13
    np.testing.assert_array_equal(left.scored("teacher"), right.scored("teacher"))
    for mine, theirs in zip(left.read(range(14)), right.read(range(14)), strict=True):
        assert_same_rollout(mine.rollout, theirs.rollout)
    for mine, theirs in zip(left.read(rows, ("teacher",)), right.read(rows, ("teacher",)), strict=True):
        # killed between the scores of a batch and its quarantine, a run scores the next rollouts in other company, which rounds otherwise
        np.testing.assert_allclose(mine.scores["teacher"], theirs.scores["teacher"], atol=1e-5)
