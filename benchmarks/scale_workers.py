"""Processes for `bench_scale` that get ready each in its own time, and then all begin at once."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Self

from attrs import define, field

Found = dict[str, Any]
#: Gets ready for a task; what it gives does it.
Work = Callable[..., Callable[[], Found]]

#: What every worker would import; only what is installed, since it does not look beside this file, and not what starts threads.
_LOADED = [
    "lance_namespace",
    "lopd.backends.zarr.store",
    "lopd.testing",
    "matplotlib.pyplot",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
]


@define
class Workers:
    """So many processes of one thread each, as a context.  They are forked from one that has imported what they need, and nothing else.

    Args:
        count: how many are started.
    """

    count: int
    _pipes: list[Connection] = field(factory=list, init=False)
    _running: list[Any] = field(factory=list, init=False)

    def __enter__(self) -> Self:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_LOADED)
        for _ in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._running.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._running, strict=True):
            pipe.close()
            process.join()

    def run(self, work: Work, tasks: Sequence[Mapping[str, Any]]) -> list[Found]:
        """Return the result of each process with its own arguments; none begins before all are ready."""
        used = self._pipes[: len(tasks)]
        for pipe, task in zip(used, tasks, strict=True):
            pipe.send((work, task))
        for pipe in used:
            pipe.recv()
        for pipe in used:
            pipe.send(None)
        return [pipe.recv() for pipe in used]


def _serve(pipe: Connection) -> NoReturn:
    """Work until the pipe is closed; an error ends the worker, and with it whoever waits for its answer."""
    warnings.simplefilter("ignore")
    while True:
        try:
            work, task = pipe.recv()
        except EOFError:
            os._exit(0)  # the interpreter's end is a race with gloo's threads
        begin = work(**task)
        pipe.send(None)
        pipe.recv()
        pipe.send(begin())
