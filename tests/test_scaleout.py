"""A real Ray cluster on this machine, of two workers."""

import os
import subprocess
import sys
import threading
import time
import traceback
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from attrs import frozen
from conftest import CONTEXT, TOKENIZER_ID
from mortal import Mortal, Small, ids
from one_process import ENDLESS, KEPT, PROMPTS, SAMPLING, alone, assert_same, folders  # noqa: F401

from lopd import LanceStore, MemoryStore, SamplingParams, ZarrStore, collect_rollouts, label_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import EngineError, InvalidRecordError, RefusedPromptsWarning
from lopd.records.waiting import overlapped, own_call
from lopd.testing import ScorerConformance, tiny_manifest, tiny_rollout

# What calls Ray after its end starts another cluster, whose end ends this whole process a minute later, in the middle of other tests.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "3600")
ray = pytest.importorskip("ray", reason="Ray is not installed")

from ray.exceptions import ObjectStoreFullError  # noqa: E402

from lopd.engines.on_ray import RayScorer, RaySource  # noqa: E402
from lopd.engines.on_ray.nouns import _Actor  # noqa: E402

# Ray leaves pipes of its own to the end of the process
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # workers import what tests define
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here)
    yield
    ray.shutdown()


@pytest.fixture(scope="class")
def two_scorers(folders):
    """Return two workers for the whole class: to start them takes longer than all that they are asked."""
    with closing(RayScorer(lambda folder=folders["teacher"]: HFScorer.from_folder(folder, top_k=3, candidates=2, drawn=2))) as scorer:
        yield scorer


class TestRayScorer(ScorerConformance):
    """The contract, through two processes; `make` gives one and the same scorer.  `RaySource` would need new workers for each test."""

    @pytest.fixture(autouse=True)
    def _workers(self, two_scorers):
        self.two_scorers = two_scorers

    def make(self):
        return self.two_scorers

    def tokenizer(self):
        return TOKENIZER_ID

    def rollouts(self):
        random, size = np.random.default_rng(0), TOKENIZER_ID.vocab_size
        lengths = {"one": 1, "six": 6, "twelve": 12}
        return [tiny_rollout(name, random.integers(0, size, length), prompt_ids=[4, 7]) for name, length in lengths.items()]

    def too_long(self):
        return tiny_rollout("too long", [2] * CONTEXT)


@pytest.fixture
def deaths(tmp_path):
    (tmp_path / "deaths").mkdir()
    return tmp_path / "deaths"


def test_two_workers_that_are_killed_in_the_middle_fill_the_store_that_one_process_fills(folders, alone, deaths, tmp_path):
    kept = [kind.create(str(tmp_path / kind.__name__), alone.manifest) for kind in (ZarrStore, LanceStore)]
    stores = [*kept, MemoryStore(alone.manifest)]
    with closing(RaySource(Mortal(partial(HFSource.from_folder, folders["policy"], SAMPLING), "p6", 1, deaths))) as source:
        for store in stores:
            assert collect_rollouts(source, PROMPTS, store, prompts_per_batch=4, batches_at_once=2).rollouts == 22
    assert len(list(deaths.iterdir())) == 1
    with closing(RayScorer(Mortal(partial(HFScorer.from_folder, folders["teacher"], **KEPT), "p3/s1/g0", 2, deaths))) as scorer:
        for store in stores:
            assert score_rollouts(store, scorer, rollouts_per_batch=6, batches_at_once=2).rollouts == 22
    assert len(list(deaths.iterdir())) == 2
    for store in stores:
        assert_same(store, alone)


def test_what_an_engine_refuses_in_a_worker_is_left_out_as_in_one_process(folders, alone):
    store = MemoryStore(alone.manifest)
    with closing(RaySource(lambda folder=folders["policy"]: HFSource.from_folder(folder, SAMPLING), workers=1)) as source:
        with pytest.warns(RefusedPromptsWarning, match=r"1 prompts could not be sampled.*'endless'.*5000 tokens"):
            report = collect_rollouts(source, [*PROMPTS[:5], ENDLESS, *PROMPTS[5:]], store)
        assert list(report.refused) == ["endless"]
        assert source.sample([]) == []
        source.close()
        assert len(source.sample(PROMPTS[:1])) == 2, "a later call starts the workers again"
    score_rollouts(store, HFScorer.from_folder(folders["teacher"], **KEPT))
    assert_same(store, alone)


def test_items_that_kill_every_worker_end_the_call_and_what_was_committed_stays(folders, alone, deaths):
    store = MemoryStore(alone.manifest)
    with closing(RaySource(Mortal(partial(HFSource.from_folder, folders["policy"], SAMPLING), "p6", 99, deaths), attempts=1)) as source:
        with pytest.raises(EngineError, match=r"RaySource: 1 workers died over prompt 'p6'; see Ray's logs"):
            collect_rollouts(source, PROMPTS, store, prompts_per_batch=4)
        assert len(store) == 8
        assert len(source.sample(PROMPTS[:2])) == 4, "other workers have taken their places"


@frozen
class Moody:
    """Gives an engine to the first who asks, and something else to all others."""

    folder: Path
    asked: Path
    later: str

    def __call__(self):
        try:
            (self.asked / "first").mkdir()
            sampling = SAMPLING
        except FileExistsError:
            sampling = SamplingParams(max_new_tokens=9)
            if self.later == "fail":
                raise EngineError("Engine: it does not start; look after it.") from None
        return Mortal(partial(HFSource.from_folder, self.folder, sampling), "p6", 99, self.asked.parent / "gone")()


def test_workers_that_are_not_alike_are_refused_before_anything_is_sampled(folders, deaths):
    with (
        closing(RaySource(Moody(folders["policy"], deaths, "differ"))) as source,
        pytest.raises(EngineError, match=r"RaySource: a worker's engine is Manifest.*as another's is"),
    ):
        source.manifest  # noqa: B018


def test_a_worker_that_cannot_be_replaced_leaves_the_work_to_the_others_and_the_last_ends_the_call(folders, deaths):
    (deaths.parent / "gone").mkdir()
    with closing(RaySource(Moody(folders["policy"], deaths, "fail"), workers=1)) as source:
        assert len(source.sample(PROMPTS[:2])) == 4
        with pytest.raises(EngineError, match=r"all 1 workers failed, and none could be started again") as caught:
            source.sample(PROMPTS)
        assert "does not start" in str(caught.value.__cause__)


def test_a_cluster_that_has_not_what_is_asked_for_is_not_waited_for_forever(folders):
    make = Moody(folders["policy"], folders["policy"], "differ")
    with (
        closing(RayScorer(make, workers=3, options={"resources": {"telescope": 1}}, patience_s=1.0)) as scorer,
        pytest.raises(EngineError, match=r"RayScorer: a worker did not start within 1 s.*the cluster has .*CPU"),
    ):
        scorer.provenance  # noqa: B018


def test_what_may_be_a_secret_is_not_shown():
    make = partial(HFScorer.from_folder, "hidden")
    options = {"num_cpus": 1, "runtime_env": {"env_vars": {"KEY": ["hidden"]}}}
    scorer = RayScorer(make, workers=1, options=options)
    with pytest.raises(InvalidRecordError, match=r"Ray refuses options \['num_cpus', 'runtime_env'\] \(TypeError\); pass those") as caught:
        scorer.provenance  # noqa: B018
    assert "hidden" not in "".join([*traceback.format_exception(caught.value), repr(scorer), repr(RaySource(make, options=options))])
    assert "make=from_folder" in repr(scorer)
    with pytest.raises(InvalidRecordError, match=r"options \['num_gpu'\] \(ValueError: Invalid option keyword num_gpu for actors"):
        RayScorer(make, options={"num_gpu": "hidden"}).provenance  # noqa: B018


def test_what_workers_cannot_import_is_named(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mortal, "__module__", "not_here")
        patch.setitem(sys.modules, "not_here", sys.modules[__name__])
        with (
            closing(
                RaySource(Mortal(partial(HFSource.from_folder, folders["policy"], SAMPLING), "p6", 0, folders["policy"]), workers=1)
            ) as source,
            pytest.raises(
                EngineError, match=r"a worker died while it started \(.*No module named 'not_here'.*whether `make` can be imported there"
            ),
        ):
            source.manifest  # noqa: B018


def test_errors_that_cannot_be_pickled_and_those_of_ray_come_in_words():
    with closing(RayScorer(Small, workers=1, attempts=1)) as scorer:
        for name in ("raise", "raise and hold"):
            with pytest.raises(
                EngineError, match=r"^Engine: \w+ \(.*(UnpicklableError: this and that|to unpickle|RayTaskError ).*\); see Ray's logs"
            ):
                scorer.score(ids(name))

    def full(*_):
        raise ObjectStoreFullError("Failed to put an object.")

    actor = _Actor(Small, {})
    actor._actor = SimpleNamespace(work=SimpleNamespace(remote=full))
    with pytest.raises(EngineError, match=r"^Engine: ObjectStoreFullError \(The local object store is full .*\); see Ray's logs"):
        actor.work("score", [])


def test_no_cluster_is_started_in_place_of_one_that_was_shut_down(monkeypatch):
    actor = _Actor(Small, {})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(EngineError, match="Ray was shut down, expected the cluster"):
        actor.start("", 1.0)


def test_what_cannot_be_sent_to_a_worker_is_refused():
    lock = threading.Lock()
    with pytest.raises(
        InvalidRecordError, match=r"RayScorer: make cannot be sent to another process \(cannot pickle .*lock.*\); make within it"
    ):
        RayScorer(lambda: lock)


@pytest.mark.parametrize(("argument", "value"), [("workers", 0), ("attempts", 0), ("patience_s", 0.0)])
def test_numbers_that_make_no_sense_are_refused(argument, value):
    for kind in (RaySource, RayScorer):
        with pytest.raises(InvalidRecordError, match=f"{kind.__name__}: {argument} is {value}"):
            kind(lambda: None, **{argument: value})


def test_overlapped_calls_come_in_order_and_no_item_is_asked_for_before_there_is_room():
    asked, ended = [], []

    def items():
        for i in range(8):
            asked.append(i)
            yield i

    def call(i):
        time.sleep(0.02 * (i % 3 == 0))
        ended.append(i)
        return -i

    for i, (item, result) in enumerate(overlapped(call, items(), 3)):
        assert (item, result) == (i, -i)
        assert len(asked) <= i + 3
    assert sorted(ended) == list(range(8))


def test_the_first_error_of_overlapped_calls_ends_them_and_no_further_one_begins():
    begun, gate = [], threading.Event()

    def call(i):
        begun.append(i)
        if i == 1:
            raise KeyError(i)
        gate.wait(0.05)
        return i

    done = []
    with pytest.raises(KeyError, match="1"):
        done += [item for item, _ in overlapped(call, range(100), 2)]
    assert max(begun) <= 3


@pytest.mark.parametrize("leave", [False, True])
def test_a_loop_that_is_left_cancels_the_calls_under_way_and_may_wait_for_them(leave):
    gate, ended = threading.Event(), []

    def call(i):
        while i and not own_call().cancelled():
            time.sleep(0.01)
        if i and leave:
            gate.wait(30)
        ended.append(i)

    loop = overlapped(call, range(100), 2, leave=leave)
    next(loop)
    loop.close()
    assert ended == ([0] if leave else [0, 1])
    gate.set()
    assert not own_call().cancelled()


@pytest.mark.parametrize("where", ["verifier", "commit"])
def test_an_interrupt_waits_for_no_verifier_and_each_ends_with_its_rollout(monkeypatch, where):
    store, judged, begun, leave = MemoryStore(tiny_manifest()), [], threading.Event(), threading.Event()
    store.append([tiny_rollout(f"p/s{i}/g0", [5]) for i in range(4)])
    before = {*threading.enumerate()}

    def verifier(_, rollout):
        if rollout.rollout_id in ("p/s2/g0", "p/s3/g0"):
            judged.append(rollout.rollout_id)
            begun.set()
            leave.wait(5)
        elif begun.wait(30) and where == "verifier":
            raise KeyboardInterrupt
        return 1.0

    def commit(column, provenance, scores):
        if scores:
            raise KeyboardInterrupt

    if where == "commit":
        monkeypatch.setattr(store, "append_scores", commit)
    with pytest.raises(KeyboardInterrupt):
        label_rollouts(store, verifier, None, batches_at_once=2)
    left = {*threading.enumerate()} - before
    assert left
    leave.set()
    for thread in left:
        thread.join()
    assert judged == ["p/s2/g0"]


ENDED = """
import time
from threading import Event
from lopd import MemoryStore, label_rollouts
from lopd.testing import tiny_manifest, tiny_rollout

store, begun, interrupted = MemoryStore(tiny_manifest()), Event(), Event()
store.append([tiny_rollout(f"p/s{i}/g0") for i in range(2)])

def verifier(_, rollout):
    if rollout.rollout_id == "p/s0/g0":
        begun.wait()
        raise KeyboardInterrupt
    try:
        begun.set()
        interrupted.wait()
        time.sleep(0.5)  # for the program to come to its end
    finally:
        print("removed")

try:
    label_rollouts(store, verifier, None, batches_at_once=2)
except KeyboardInterrupt:
    print("interrupted")
    interrupted.set()
"""


def test_a_program_that_ends_after_an_interrupt_lets_a_verifier_remove_its_sandbox():
    done = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["interrupted", "removed"]


@pytest.mark.parametrize("verb", [collect_rollouts, score_rollouts])
def test_no_batch_at_a_time_is_refused(verb, folders, alone):
    engine = (
        HFSource.from_folder(folders["policy"], SAMPLING) if verb is collect_rollouts else HFScorer.from_folder(folders["teacher"], **KEPT)
    )
    arguments = (engine, PROMPTS, MemoryStore(alone.manifest)) if verb is collect_rollouts else (alone, engine)
    with pytest.raises(InvalidRecordError, match="batches_at_once is 0, expected at least 1"):
        verb(*arguments, batches_at_once=0)
