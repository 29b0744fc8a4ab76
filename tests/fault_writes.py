"""Writes of this process that fail: a shim in C, loaded before libc, gives EIO for the n-th `write()` to a file under a path.

    LD_PRELOAD=faulty.so python tests/fault_writes.py faulty.so lance DIRECTORY 1 2 3 -1

prints what became of each trial as a line of JSON; in those of a negative number, 2 % of all writes fail.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lopd.backends.lance import LanceStore
from lopd.backends.zarr import ZarrStore
from lopd.errors import LopdError, StoreWriteError
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[1024];
static atomic_int left, hits, per_mille;
static atomic_uint state;

/* The n-th write from now on fails (0: none does), or each with this chance in thousandths; gives how many failed since the last call. */
int arm(const char *path, int n, int chance, unsigned seed) {
    strncpy(under, path, sizeof under - 1);
    left = n; per_mille = chance; state = seed;
    return atomic_exchange(&hits, 0);
}

static int fails(int descriptor) {
    char link[64], name[1024];
    if (!left && !per_mille) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, name, sizeof name - 1);
    if (size < 0) return 0;
    name[size] = 0;
    if (!strstr(name, under)) return 0;
    state = state * 1664525u + 1013904223u;
    int hit = per_mille ? (int)(state >> 8) % 1000 < per_mille : left && atomic_fetch_sub(&left, 1) == 1;
    hits += hit;
    return hit;
}

#define SHIM(name, declared, passed)                                \
    ssize_t name declared {                                         \
        static ssize_t(*real) declared;                             \
        if (!real) real = dlsym(RTLD_NEXT, #name);                  \
        if (fails(descriptor)) { errno = EIO; return -1; }          \
        return real passed;                                         \
    }
SHIM(write, (int descriptor, const void *data, size_t size), (descriptor, data, size))
SHIM(pwrite64, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
SHIM(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
"""

_STORES: dict[str, Any] = {"lance": LanceStore, "zarr": ZarrStore}


def many(start: int, count: int) -> list[Any]:
    """Make rollouts of some kilobytes each."""
    return [tiny_rollout(f"r{i}", np.arange(1000) % 300) for i in range(start, start + count)]


def calls(store: Any) -> list[tuple[str, Callable[[], object], set[str]]]:
    """Return calls on a store, and which rows, or which of their scores, are there when each has returned."""
    found: list[tuple[str, Callable[[], object], set[str]]] = []
    for k in range(4):
        batch = many(10 * k, 3)
        names = {rollout.rollout_id for rollout in batch}
        found.append(("rollouts", lambda batch=batch: store.append(batch), names))  # type: ignore[misc]
        found.append(("ref", lambda batch=batch: store.append_scores("ref", tiny_provenance("ref"), map(tiny_scores, batch)), names))  # type: ignore[misc]
        if k % 2:
            keep = {"older_than": 0.0} if isinstance(store, LanceStore) else {}
            found.append(("compact", lambda keep=keep: store.compact(**keep), set()))  # type: ignore[misc]
    return found


def trial(kind: str, path: Path, arm: Callable[[int, int, int], int], nth: int) -> dict[str, Any]:
    """Write a store whose n-th write fails, or, for a negative number, each with 2 %.

    Return what was acknowledged and is lost, and the errors.
    """
    store, there, errors = _STORES[kind].create(path, tiny_manifest()), {"rollouts": set[str](), "ref": set[str]()}, []
    arm(max(nth, 0), 20 if nth < 0 else 0, -nth)
    for column, call, names in calls(store):
        try:
            call()
        except StoreWriteError as error:
            errors.append(str(error))
        except LopdError as error:
            # scores of rollouts that were not written
            if "append the rollout first" not in str(error):
                errors.append(f"{type(error).__name__}: {error}")
        else:
            there[column if column in there else "rollouts"] |= names
    hits = arm(0, 0, 0)
    lost: list[str] = []
    try:
        store = _STORES[kind].open(path)
        found = store.read(range(len(store)))
        scored = store.scored("ref")
        lost += sorted(there["rollouts"] - {row.rollout.rollout_id for row in found})
        lost += sorted(there["ref"] - {row.rollout.rollout_id for row, is_scored in zip(found, scored, strict=True) if is_scored})
        store.read(np.flatnonzero(scored).tolist(), ("ref",) if scored.any() else ())
        lost += list(store.verify())
        # All calls can be repeated.
        for _, call, _ in calls(store):
            call()
        lost += list(_STORES[kind].open(path).verify())
        assert len(store) == 12
    except LopdError as error:
        lost.append(f"{type(error).__name__}: {error}")
    return {"nth": nth, "hits": hits, "errors": errors, "lost": lost}


def main() -> None:
    """Run trials, one after the other."""
    library, kind, folder, *numbers = sys.argv[1:]
    arm = ctypes.CDLL(library).arm
    for nth in map(int, numbers):
        path = Path(folder) / f"faulty-{nth}"
        print(json.dumps(trial(kind, path, lambda n, chance, seed, path=path: arm(str(path).encode(), n, chance, seed), nth)), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    main()
