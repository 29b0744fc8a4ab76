"""What several engines do when some of them fail, in places that are not processes."""

import threading
import time
from contextlib import closing
from functools import partial
from threading import Event

import pytest
from attrs import define
from mortal import ids

from lopd.engines import pool
from lopd.engines.hosted import DiedError, Host, HostedScorer
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError
from lopd.records.waiting import overlapped

NAMES = ids("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(pool, "backoff", lambda _: 0.01)


class Here:
    """A place in this process, whose engine is told its number."""

    log = "its output"

    def __init__(self, make):
        self.host = Host(make)
        self.work = self.host.work

    def start(self, identity, patience_s):
        return self.host.start(identity)

    def stop(self, *, idle):
        pass


@define(eq=False, slots=False)
class HereScorer(HostedScorer):
    def _process(self, place):
        return Here(partial(self.make, place))


class Engine:
    provenance = "small"

    def __init__(self, score):
        self.score = score


def test_a_worker_whose_engine_always_fails_leaves_its_part_to_another_though_it_is_free_sooner():
    sick, restarted = [], Event()

    def make(place):
        sick.extend([place] * (place == 0))
        if len(sick) > 1:
            restarted.set()
        return Engine(partial(score, place))

    def score(place, rollouts):
        if place == 0:
            raise EngineError("Engine: its card is held; look after it.")
        assert restarted.wait(20)
        time.sleep(0.2)  # for the first to fail again, if it is asked
        return list(rollouts)

    with closing(HereScorer(make, workers=2, attempts=2)) as scorer:
        assert scorer.score(NAMES) == NAMES


@pytest.mark.parametrize(
    ("error", "times"),
    [(EngineError("Engine: it fails."), 3), (ContextOverflowError("Rollout 'a': long."), 1), (InvalidRecordError("Rollout 'a': odd."), 1)],
)
def test_what_every_engine_raises_comes_as_it_is_and_what_is_wrong_with_the_request_comes_at_once(error, times):
    asked = []

    def score(rollouts):
        asked.append(len(rollouts))
        raise error from RuntimeError("the cause")

    with closing(HereScorer(lambda _: Engine(score), workers=1)) as scorer, pytest.raises(type(error)) as caught:
        scorer.score(NAMES)
    assert caught.value is error
    assert str(caught.value.__cause__) == "the cause"
    assert asked == [4] * times


def test_what_kills_every_worker_is_named_and_what_kills_by_its_number_is_made_in_halves(caplog):
    def score(rollouts):
        if "fatal" in rollouts or len(rollouts) > 1:
            raise DiedError("exit code -9")
        return list(rollouts)

    with closing(HereScorer(lambda _: Engine(score), attempts=2)) as scorer:
        assert scorer.score(NAMES) == NAMES
        assert "HereScorer: 2 workers died over the same 2 rollouts; see its output, and leave that out, or give each" in caplog.text
        with pytest.raises(EngineError, match=r"HereScorer: 2 workers died over rollout 'fatal'; see its output, and leave that out"):
            scorer.score(ids("a", "b", "c", "fatal", "d"))


def test_a_call_that_was_left_before_it_asks_asks_no_engine():
    asked, left = [], Event()

    def call(rollouts):
        if rollouts:
            assert left.wait(30)
            scorer.score(rollouts)

    with closing(HereScorer(lambda _: Engine(asked.extend), workers=1)) as scorer:
        loop = overlapped(call, ([], NAMES), 2, leave=True)
        next(loop)
        loop.close()
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "lopd-overlap")
        left.set()
        thread.join()
    assert asked == []
