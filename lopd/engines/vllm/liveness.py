"""Whoever waits for a vLLM in a process of its own learns when that process dies; and what an error of vLLM means."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

import torch

_SECONDS = 0.2
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def told_of_death(core: Any) -> Iterator[None]:
    """End a call that waits for answers of `llm_engine.engine_core` with an error if the process that owes them is gone.

    vLLM notices the death of a process, marks the engine as dead and ends the thread that passes answers on, without an answer to the one
    who waits (0.32): a call during which the engine was killed, for example by the system when memory runs out, would wait for ever.
    """
    resources = getattr(core, "resources", None)
    if resources is None:  # it runs in this process
        yield
        return
    over = Event()
    watcher = Thread(target=_watch, args=(core, resources, over), name="lopd-vllm-liveness", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(core: Any, resources: Any, over: Event) -> None:
    while not over.wait(_SECONDS):
        if resources.engine_dead:
            died = RuntimeError("the process of the engine died")
            core.outputs_queue.put_nowait(died)
            for answer in list(core.utility_results.values()):
                # unless it was answered in the meantime
                with suppress(Exception):
                    answer.set_exception(died)
            return


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory was short, by this error or one that it comes from."""
    if error is None:
        return False
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or any(words in text for words in _OUT_OF_MEMORY)
        or ran_out_of_memory(error.__cause__ or error.__context__)
    )


def was_refused(error: BaseException) -> bool:
    """Return whether a vLLM that runs would refuse it again; its own class for that is looked up by name, since not every version has it."""
    return isinstance(error, ValueError | TypeError) or "VLLMClientError" in (kind.__name__ for kind in type(error).__mro__)


def words_of(error: BaseException) -> str:
    """Return its kind and the beginning of its words, for a message of ours: pydantic has the reason in the second line."""
    return f"{type(error).__name__} ({' '.join(str(error).split())[:300] or 'no message'})"
