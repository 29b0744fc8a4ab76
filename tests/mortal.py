"""Engines for processes of their own: small ones, and others that are killed in there, as by a system that is short of memory.

Each process imports this file, and so it imports neither transformers nor pytest.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any

from attrs import frozen

from lopd.errors import EngineError


@frozen
class Mortal:
    """Gives engines whose process is killed when they meet the fatal item, `lives` times in all; each death is a file in `deaths`."""

    make: Callable[[], Any]
    fatal: str
    lives: int
    deaths: Path
    #: Only the first engine can be made.
    once: bool = False

    def __call__(self):
        if self.once:
            try:
                (self.deaths / "first").touch(exist_ok=False)
            except FileExistsError:
                raise EngineError("Engine: it does not start; look after it.") from None
        return MortalEngine(self, self.make())


class MortalEngine:
    def __init__(self, plan, inner):
        self.plan, self.inner = plan, inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _meet(self, names):
        died = len(list(self.plan.deaths.glob("death*")))
        if self.plan.fatal in names and died < self.plan.lives:
            (self.plan.deaths / f"death{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def sample(self, prompts):
        self._meet([prompt.prompt_id for prompt in prompts])
        return self.inner.sample(prompts)

    def score(self, rollouts):
        self._meet([getattr(rollout, "rollout_id", rollout) for rollout in rollouts])
        return self.inner.score(rollouts)


class Id(str):
    """A rollout of which there is an id alone."""

    __slots__ = ()
    rollout_id = property(str)


def ids(*names):
    return [Id(name) for name in names]


class UnpicklableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Small:
    """An engine that needs no model, and says what it sees of its environment."""

    provenance = "small"

    def score(self, rollouts):
        if "raise" in rollouts:
            raise UnpicklableError("this", "that")
        if "raise and hold" in rollouts:
            error = UnpicklableError("this", "that")
            error.held = Lock()
            raise error
        if "meet" in rollouts:
            here = Path(os.environ["FAREWELL"]).with_suffix(".here")
            here.touch()
            while len(list(here.parent.glob("*.here"))) < 2:
                sleep(0.01)
        return [os.environ.get("CUDA_VISIBLE_DEVICES") for _ in rollouts]

    def close(self):
        Path(os.environ["FAREWELL"]).touch()


class Odd(Small):
    @property
    def provenance(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]


class Forking(Small):
    """Dies and leaves a process behind, which holds open what it inherited."""

    def score(self, rollouts):
        if os.fork() == 0:
            signal.pause()
        os._exit(3)


class Restarted(Small):
    def score(self, rollouts):
        return os._exit(3) if "die" in rollouts else list(rollouts)


def make_but_the_second(folder):
    starts = len(list(folder.glob("start*")))
    (folder / f"start{starts}").touch()
    return os._exit(4) if starts == 1 else Restarted()


def make_nothing():
    os._exit(3)


def make_slowly():
    signal.pause()
