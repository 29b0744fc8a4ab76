"""A store in a bucket between the processes of a cluster: written by several at once, compacted beside a reader, trained from by ranks."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import cluster_worker
import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from cluster_worker import FOUND, RANKS, WHOLE, WRITERS, deliveries, train
from crash_worker import Place
from fault_proxy import FaultProxy
from forked import start
from ranks_worker import Case, make_store, make_student
from test_ranks import assert_same

from lopd.backends.memory_store import MemoryStore
from lopd.protocols import LogprobReader
from lopd.records import Ranks, ScoredRollout, Scores
from lopd.testing import assert_same_rollout

pytestmark = [pytest.mark.s3, pytest.mark.slow]

COLUMNS = ("teacher", "behavior")
_PATIENCE = 240.0


@frozen
class Cluster:
    """Processes that share a store and a folder to meet in."""

    place: Place
    folder: Path

    def run(self, work: str, size: int, place: Place) -> None:
        """Run so many processes to their end; if one of them fails, the others are not waited for, and what they printed is shown."""
        logs = [self.folder / f"{work}{rank}.log" for rank in range(size)]
        running = [
            start(cluster_worker.main, log, _environment(place), work, place.backend, place.url, self.folder, Ranks(rank, size))
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + _PATIENCE
        while any(process.exitcode is None for process in running):
            if any(process.exitcode for process in running) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in running]
        for process in running:
            process.kill()
            process.join()
        said = "\n\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in logs)
        assert codes == [0] * size, f"exit codes {codes} (None was still at it)\n{said}"


def _environment(place: Place) -> dict[str, str]:
    return {f"AWS_{name.removeprefix('aws_').upper()}": value for name, value in place.storage_options.items()}


@pytest.fixture(scope="module")
def whole():
    """Fill a store in one process: rollouts of `make_store`, several times over, each time with other values."""
    few = make_store(per_step=6)
    made = MemoryStore(few.manifest)
    for copy in range(WRITERS):
        for record in few.read(range(len(few)), ("teacher",)):
            old, scale = record.rollout, 1 + copy / 8
            new = evolve(
                old,
                rollout_id=f"{copy}-{old.rollout_id}",
                prompt_ids=8 + (old.prompt_ids + copy) % 88,
                response_ids=8 + (old.response_ids + copy) % 88,
                behavior_logprobs=old.behavior_logprobs * scale,
            )
            made.append([new])
            made.append_scores("teacher", few.columns["teacher"], [Scores.of(new, record.scores["teacher"] * scale)])
    return made


@pytest.fixture(scope="module", params=["zarr", "lance"])
def cluster(request, s3, whole, tmp_path_factory):
    """Return a cluster whose store four processes have made, written and scored."""
    place = Place(request.param, s3.new_url(f".{request.param}"), s3.storage_options)
    made = Cluster(place, tmp_path_factory.mktemp(request.param))
    torch.save(whole, made.folder / WHOLE)
    # The server behind checks whether an object is there, and then makes it; S3 does both in one go, and so does the proxy.
    proxy = FaultProxy(s3)
    try:
        made.run("write", WRITERS, place.through(proxy.storage_options))
    finally:
        proxy.close()
    return made


def assert_same_records(found: Sequence[ScoredRollout], expected: Sequence[ScoredRollout]) -> None:
    """Check that rollouts and scores are the same to the last bit."""
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_rollout(ours.rollout, theirs.rollout)
        assert ours.scores.keys() == theirs.scores.keys()
        for column, logprobs in theirs.scores.items():
            assert ours.scores[column].dtype == logprobs.dtype
            np.testing.assert_array_equal(ours.scores[column], logprobs)


def read_all(store: LogprobReader) -> list[ScoredRollout]:
    return store.read(range(len(store)), COLUMNS)


def test_a_store_that_four_processes_write_and_score_at_once_holds_what_one_process_writes(cluster, whole):
    store = cluster.place.open()
    delivered = Counter(row for writer in range(WRITERS) for rows in deliveries(len(whole), writer) for row in rows)
    assert set(delivered) == set(range(len(whole)))
    assert set(delivered.values()) == {1, 2}
    expected = read_all(whole)
    rows = store.find([record.rollout.rollout_id for record in expected])
    assert sorted(rows.tolist()) == list(range(len(store))), "every rollout is in one row, and every row is a rollout"
    assert (store.manifest, dict(store.columns), dict(store.generations)) == (whole.manifest, dict(whole.columns), dict(whole.generations))
    assert store.scored("teacher").all()
    assert_same_records(store.read(rows.tolist(), COLUMNS), expected)
    committed = Counter[str]()
    for commit in store.history():
        committed[commit.kind] += commit.rows
    assert committed["rollouts"] == committed["scores"] == len(whole), "what came twice was committed once"
    assert list(store.verify()) == []


def test_a_reader_reads_the_same_records_while_the_store_is_compacted_and_afterwards(cluster):
    reader, late_reader, store = (cluster.place.open() for _ in range(3))
    expected = read_all(reader)
    with ThreadPoolExecutor(1) as pool:
        compaction = pool.submit(store.compact)
        for first in cycle(range(0, len(reader), 11)):
            rows = range(first, min(first + 11, len(reader)))
            assert_same_records(reader.read(rows, COLUMNS), expected[rows.start : rows.stop])
            if compaction.done():
                break
    compaction.result()
    columns = {commit.column for commit in store.history() if commit.kind == "compaction"}
    assert columns == {None, "teacher"}, "rollouts and scores were merged"
    # one had read everything before, one nothing, one compacted, and one came later
    for seen in (reader, late_reader, store, cluster.place.open()):
        assert_same_records(read_all(seen), expected)
    assert list(store.verify()) == []


@pytest.mark.filterwarnings(
    "ignore:Student:lopd.errors.AdvantageWarning", "ignore:Student:lopd.errors.DriftWarning"
)  # log-probs are random
def test_ranks_that_open_the_compacted_store_themselves_train_as_one_process_does(cluster):
    store = cluster.place.open()
    store.compact()
    cluster.run("train", RANKS, cluster.place)
    found = torch.load(cluster.folder / FOUND, weights_only=False)
    assert_same(found, train(store))
    start = make_student(Case(), Ranks()).state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in found["weights"].items()), "something was learnt"
