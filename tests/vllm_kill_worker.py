"""Scores a store with vLLM in processes of its own, kills the engine with signal 9 between two batches and within one, and looks at what is left.

Arguments: the model's folder, and where to make the store.  Run by `test_vllm_engine.py`.
"""

import os
import signal
import sys
import threading

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"

import numpy as np
import pytest
import vllm_environment  # noqa: F401
from attrs import define

from lopd import score_rollouts
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.vllm import VLLMScorer, VLLMSettings
from lopd.errors import EngineError
from lopd.protocols import Counted
from lopd.records import SamplingParams
from lopd.testing import tiny_rollout


@define
class Killer:
    """Progress that kills the engine's process after the first batch: at once, or while the next batch waits for its answers."""

    scorer: VLLMScorer
    waiting: bool
    batches: int = 0

    def begin(self, what: str, total: int, done: int, tokens: int | None, counted: Counted, /) -> None:
        pass

    def advance(self, rollouts: int, tokens: int, refused: int, /) -> None:
        self.batches += 1
        if self.batches == 1:
            manager = self.scorer.engine._llm.llm_engine.engine_core.resources.engine_manager
            (process,) = manager.processes
            if self.waiting:
                os.kill(process.pid, signal.SIGSTOP)
                threading.Timer(3.0, os.kill, (process.pid, signal.SIGKILL)).start()
            else:
                os.kill(process.pid, signal.SIGKILL)
                process.join()

    def end(self) -> None:
        pass


def main() -> None:
    folder, path = sys.argv[1:]
    rng = np.random.default_rng(0)
    rollouts = [tiny_rollout(f"r{i}", rng.integers(4, 96, 8).tolist(), prompt_ids=[5, 6 + i]) for i in range(9)]
    store = ZarrStore.create(path, HFSource.from_folder(folder, SamplingParams()).manifest)
    store.append(rollouts)

    gives_up = VLLMScorer.from_folder(folder, VLLMSettings(enforce_eager=True, restarts=0))
    with pytest.raises(EngineError, match="it failed 1 times in one call, the last time by EngineDeadError"):
        score_rollouts(store, gives_up, rollouts_per_batch=3, progress=Killer(gives_up, waiting=False))
    assert ZarrStore.open(path).scored("teacher").sum() == 3

    goes_on = VLLMScorer.from_folder(folder, VLLMSettings(enforce_eager=True, restarts=1))
    score_rollouts(store, goes_on, rollouts_per_batch=3, progress=Killer(goes_on, waiting=True))
    assert goes_on.engine.starts == 2
    goes_on.close()
    records = ZarrStore.open(path).read(range(9), columns=["teacher"])
    for record, score in zip(records, HFScorer.from_folder(folder).score(rollouts), strict=True):
        np.testing.assert_allclose(record.scores["teacher"], score.logprobs, atol=1e-4)
    print("killed twice")


if __name__ == "__main__":
    main()
