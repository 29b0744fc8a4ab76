"""Processes that begin to work at once: forked from a server that has imported what they need, and that never did anything else."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKS: ForkServerContext = multiprocessing.get_context("forkserver")

# Not lancedb and pyarrow, which start threads when they are imported.  Most of the time that lancedb takes is lance_namespace's.
FORKS.set_forkserver_preload(
    [
        "lance_namespace",
        "lopd.backends.files.cloud",
        "lopd.backends.zarr.store",
        "lopd.engines.hf",
        "lopd.testing",
        "lopd.tools.command.whole_run",
        "matplotlib.pyplot",
        "obstore",
        "pytest",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
        "xxhash",
    ]
)


def start(work: Callable[..., object], log: Path, *args: Any) -> BaseProcess:
    """Begin `work(*args)`; what it and its libraries print goes to `log`, a file or a named pipe, line by line."""
    process = FORKS.Process(target=_logged, args=(log, work, args), daemon=True)
    process.start()
    return process


def _logged(log: Path, work: Callable[..., object], args: tuple[Any, ...]) -> None:
    with log.open("w", buffering=1) as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    work(*args)
