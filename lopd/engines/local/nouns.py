"""Several engines on this machine: a RolloutSource and a TeacherScorer that have several processes, each with an engine of its own.

    gpus = [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(8)]
    with closing(LocalScorer(partial(VLLMScorer.from_folder, "teacher"), workers=8, environments=gpus)) as scorer:
        score_rollouts(store, scorer, rollouts_per_batch=4096, batches_at_once=2)

The verbs stay what they are, as with Ray.  A process is a Python of its own: it sees its environment from the beginning, runs nothing of the
program that started it, and has to import `make`, so that must be a function of a module or a `functools.partial` of one, not a lambda.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic
from traceback import format_exc
from typing import Any, final

from attrs import define, field

from lopd.engines.hosted import GOODBYE_S, DiedError, Engine, Host, Hosted, HostedScorer, HostedSource, LateError
from lopd.errors import ArgumentError, EngineError
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records.checks import a_kind, check_number

_POLL_S, _DEATH_S = 0.5, 5.0
_CHILD = "import sys; from lopd.engines.local.nouns import serve; serve(int(sys.argv[1]))"


@define(eq=False, slots=False)
class _Local(Hosted[Engine]):
    environments: Sequence[Mapping[str, str]] = field(default=(), repr=False)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_environments(self._name, self.environments)
        given, wanted = len(self.environments), self.workers
        check_number(self._name, "number of environments", given, given in (0, wanted), f"0 or {wanted}, one per worker")
        self._check_make(pickle.dumps, "pass a function of a module, or a functools.partial of one")

    def _process(self, place: int) -> "_Child":
        return _Child(self.make, self.environments[place] if self.environments else {})


def _check_environments(owner: str, given: object) -> None:
    """Refuse what no process can have as its environment, by place and variable: a value may be a key."""
    if not isinstance(given, Sequence):
        raise ArgumentError(f"{owner}: environments is {a_kind(given)}, expected a list; pass a dict for each worker.")
    for place, environment in enumerate(given):
        if not isinstance(environment, Mapping):
            raise ArgumentError(f"{owner}: environment {place} is {a_kind(environment)}, expected a dict; pass `{{name: text}}`.")
        for variable, value in environment.items():
            for part, never in ((variable, b"=\0"), (value, b"\0")):
                try:  # bytes and paths are as good for the system
                    fits = not {*os.fsencode(part)} & {*never}
                except TypeError as error:
                    raise ArgumentError(
                        f"{owner}: variable {variable!r:.80} of environment {place} is {a_kind(part)}, expected text; pass `str(i)`."
                    ) from error
                except UnicodeEncodeError:
                    fits = False
                if not fits:
                    raise ArgumentError(
                        f"{owner}: variable {str(variable).partition('=')[0]!r:.80} of environment {place} has '=' in its name, a zero byte or half "
                        "a character, which the system refuses; pass `{name: text}`."
                    )


@final
@define(eq=False, slots=False)
class LocalSource(HostedSource, _Local[RolloutSource]):
    """Samples with engines in several processes of this machine; `contextlib.closing` ends them.

    Args:
        make: gives the source of one worker, in the worker's process; it is pickled, and imported there.
        workers: how many; each has an engine.
        environments: variables of each worker's environment, for example its CUDA_VISIBLE_DEVICES; all else is as here.  Empty, or one per
            worker.
        attempts: how many workers may fail over the same prompts before the call does; those over which so many died are tried in halves first, so
            that the error names the one that kills.
        patience_s: how long a worker may take to start and load its engine.

    Raises:
        ArgumentError: `make` is not a function, or `environments` are not a list of dicts from text to text that the system takes.
        InvalidRecordError: a number makes no sense, there are fewer or more environments than workers, or `make` cannot be pickled.
    """


@final
@define(eq=False, slots=False)
class LocalScorer(HostedScorer, _Local[TeacherScorer]):
    """Reads rollouts with engines in several processes of this machine; `contextlib.closing` ends them.

    Args:
        make: gives the scorer of one worker, in the worker's process; it is pickled, and imported there.
        workers, environments, attempts, patience_s: as those of `LocalSource`.

    Raises:
        ArgumentError: `make` is not a function, or `environments` are not a list of dicts from text to text that the system takes.
        InvalidRecordError: a number makes no sense, there are fewer or more environments than workers, or `make` cannot be pickled.
    """


@final
class _Child:
    """A process of this machine.  It is a group of its own: Ctrl-C does not reach it, and it ends with all that it started."""

    log = "its output above"

    def __init__(self, make: Callable[[], Any], environment: Mapping[str, str]) -> None:
        self._make, self._environment = pickle.dumps(make), environment
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def start(self, identity: str, patience_s: float) -> Any:
        self.stop(idle=False)
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self._environment}
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", _CHILD, str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._child = process, Connection(ours.detach())
        self._child[1].send_bytes(self._make)
        return self._ask(patience_s, "start", identity)

    def work(self, method: str, items: Sequence[Any]) -> list[Any]:
        results: list[Any] = self._ask(float("inf"), "work", method, items)
        return results

    def stop(self, *, idle: bool) -> None:
        if idle:
            with suppress(Exception):  # it is killed all the same
                self._ask(GOODBYE_S, "stop")
        child, self._child = self._child, None
        if child is not None:
            with suppress(OSError):  # all are gone
                os.killpg(child[0].pid, signal.SIGKILL)
            child[0].wait()

    def _ask(self, patience_s: float, *call: Any) -> Any:
        if self._child is None:
            raise DiedError("it was stopped")
        process, connection = self._child
        late = monotonic() + patience_s
        try:
            connection.send(call)
            # what it has started may hold the connection open when it is gone
            while not connection.poll(_POLL_S) and process.poll() is None:
                if monotonic() > late:
                    raise LateError("ask for fewer workers")
            received: Any = connection.recv() if connection.poll(0) else None
        except (EOFError, ConnectionError) as error:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_DEATH_S)
            raise DiedError(f"exit code {process.returncode}") from error
        if received is None:
            raise DiedError(f"exit code {process.returncode}")
        fine, answer = received
        if not fine:
            raise answer
        return answer


def serve(descriptor: int) -> None:
    """Run the process: hold the engine that the first message makes, and answer calls of `Host` until the caller is gone.

    An answer is (True, what the method returned) or (False, the error that it raised).
    """
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):
        host = Host(partial(_made, connection.recv_bytes()))
        try:
            while True:
                name, *arguments = connection.recv()
                try:
                    answer = True, getattr(host, name)(*arguments)
                except Exception as error:
                    answer = False, _portable(error)
                connection.send(answer)
        finally:
            host.stop()


def _made(pickled: bytes) -> Any:
    try:
        make = pickle.loads(pickled)  # noqa: S301  # of the process that started this one
    except Exception as error:
        raise DiedError(f"{type(error).__name__}: {error}") from error
    return make()


def _portable(error: Exception) -> Exception:
    """Return the error with where it came from, or its message where it cannot be pickled."""
    error.add_note(format_exc())
    try:
        copy: Any = pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:
        copy = None
    return error if type(copy) is type(error) else EngineError(f"Engine: {type(error).__name__} ({error}); see the worker's output.")
