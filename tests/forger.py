"""Forges the JSON of a store, seals it as lopd would, and reports what each call of a store makes of it.

    python forger.py zarr|lance FOLDER COUNT

Prints a line of JSON for each forgery: which it is, and what went wrong that is not an error of lopd's.  A store may take ten seconds of the
processor; then the process is killed, and its last line names the forgery.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from attrs import evolve

from lopd import LanceStore, ZarrStore, open_store
from lopd.backends.sealing import checksum
from lopd.errors import LopdError
from lopd.protocols.reading import parts
from lopd.records import ModelId
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.tools import command
from lopd.tools.doctor import check_store

KINDS: dict[str, type[ZarrStore] | type[LanceStore]] = {"zarr": ZarrStore, "lance": LanceStore}
SECONDS, MEMORY = 10, 3 << 30
#: What takes the place of a value, whatever it was; the two last are text of JSON that no parser gives back.
NAN, DEEP = "@nan", "@deep"
ANYTHING: list[Any] = [
    None, True, [], {}, "", "../../x", "/etc/passwd", "zarr.json", "\x00", "\x1b[31m\u202e", "\ud800", "x" * 10**4, "12", "inf",
    0, 1, -1, 1.5, -0.0, 1e300, 2**31, 2**49, 2**62, 2**63, 10**30, -(10**30), [[]] * 3, [1, -1], [2**40, 2**40], {"a": 1}, NAN, DEEP,
    "O", "object", "V8", "float64", "int64", "uint8", "zstd", "raw", "gzip", "scores", "compaction", "float16", "residual",
]  # fmt: skip


def build(kind: str, folder: Path) -> None:
    """Build a store with all that a store may have, in several commits, some of them merged."""
    store = KINDS[kind].create(folder, tiny_manifest())
    store.begin_generation(1, ModelId("later", "rev", "float32"))
    reported = {"behavior_logprobs": [0, -1, -2], "sampler_logprobs": [0, -0.5, -1]}
    for i in range(4):
        first = tiny_rollout(f"m{i}", loss_mask=[True, False, True], generation=i % 2)
        store.append([first, tiny_rollout(f"b{i}", finish_reason="length", **reported)])
        store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(first), top_k=tiny_top_k(3))])
        if i == 2:
            store.compact()
    store.append_scores("other", tiny_provenance("other"), [tiny_scores(tiny_rollout(f"b{i}", **reported)) for i in (0, 3)])
    store.quarantine("other", tiny_provenance("other"), {"m1": "too long", "m2": "refused"})
    store.quarantine("judge", tiny_provenance("judge"), {"m1": "too long"})
    if kind == "zarr":
        store.sweep(older_than=-60)
        for number in range(2, 56):  # until there are checkpoints
            store.begin_generation(number, ModelId("later", "rev", "float32"))
        assert list(folder.glob("checkpoints/*"))


def copied(folder: Path, place: Path) -> Path:
    """Copy a store; Zarr stores never change a file, so links will do."""
    return shutil.copytree(folder, place, copy_function=os.link if (folder / "zarr.json").exists() else shutil.copy2)


def documents(folder: Path) -> dict[str, list[Path]]:
    """Return the JSON files of each kind.

    What LanceDB writes in its tables is its own.  The records of a log are of the kinds that they state.
    """
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.json")):
        if not any(part.endswith(".lance") for part in path.relative_to(folder).parts[:-1]):
            name = re.sub(r"[0-9a-f]{32}|\d{10}", "*", str(path.relative_to(folder)))
            name = re.sub(r"\w+/zarr.json", "array", name) if "*/" in name else name
            kinds.setdefault(f"{name} {json.loads(path.read_text()).get('kind', '')}", []).append(path)
    return kinds


def places(document: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value of a document, of lists only the first and the last."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        if isinstance(key, str) or key in (0, len(document) - 1):
            yield (*keys, key)
            yield from places(value, (*keys, key))


def forgeries(document: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names of forgeries, and functions that make them."""
    for keys in [(), *places(document)]:
        for label, change in _changes({"": document}, ("", *keys)):
            yield f"{'.'.join(map(str, keys)) or 'all'}: {label}", partial(_forged, document, keys, change)


def _forged(document: Any, keys: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    whole = holder = {"": copy.deepcopy(document)}
    *way, last = ("", *keys)
    for key in way:
        holder = holder[key]
    change(holder, last)
    return whole.get("")


def _changes(document: Any, keys: tuple[Any, ...]) -> Iterator[tuple[str, Callable[[Any, Any], Any]]]:
    value = document
    for key in keys:
        value = value[key]
    others = [value + 1, value - 1, 2 * value, float(value), str(value)] if type(value) in (int, float) else []
    others += [value[:-1], value + value[-1:], value[::-1]] if isinstance(value, str | list) else []
    for other in [*ANYTHING, *others]:
        if type(other) is not type(value) or other != value:
            yield f"= {other!r:.20}", lambda holder, key, other=other: holder.__setitem__(key, other)
    yield "gone", lambda holder, key: holder.pop(key)
    if isinstance(keys[-1], str) and keys[-1]:
        for name in ("3", "40", str(2**49), "../../x", "zarr.json", "-1", "01", "9" * 30, "\x00", "new"):
            yield f"is called {name:.20}", lambda holder, key, name=name: holder.__setitem__(name, holder.pop(key))
            yield f"beside {name:.20}", lambda holder, key, name=name: holder.__setitem__(name, holder[key])


def sealed(document: Any, original: Any) -> bytes:
    """Seal the document as lopd would write it: with a checksum that is right, wherever the original has one."""
    body = document
    if isinstance(document, dict) and isinstance(original, dict):
        if "checksum" in original:
            body = {key: value for key, value in document.items() if key != "checksum"}
            body = {**body, "checksum": checksum(_dump(body))}
        elif isinstance(document.get("attributes"), dict) and "lopd_checksum" in original.get("attributes", {}):
            inner = {key: value for key, value in document["attributes"].items() if key != "lopd_checksum"}
            body = {**document, "attributes": {**inner, "lopd_checksum": checksum(_dump(inner))}}
    return _dump(body)


def _dump(document: Any) -> bytes:
    text = json.dumps(document, separators=(",", ":"), sort_keys=True)
    return text.replace(f'"{NAN}"', "NaN").replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).encode()


def examine(kind: str, folder: Path) -> list[str]:
    """Do everything that people do with a store; return the errors that are not lopd's."""
    found: list[str] = []

    def call(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except LopdError as error:
            if not str(error).isprintable():
                found.append(f"{name}: the message has controls: {error}")
        except SystemExit:
            pass
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{name}: {type(error).__name__}: {error!s:.200} in {Path(place.filename).name}:{place.lineno}")
        return None

    call("open_store", lambda: open_store(folder))
    store = call("open", lambda: KINDS[kind].open(folder))
    if store is None:
        return found
    call("facts", lambda: (str(store), dict(store.columns), dict(store.generations), store.lengths(), store.stored_bytes()))
    call("history", store.history)
    call("find", lambda: store.find(["m0", "b3", "nowhere"]))
    for column in (*(call("columns", lambda: list(store.columns)) or ()), "teacher", "behavior", "behavior/sampler"):
        call(f"scored {column}", lambda column=column: (store.scored(column), store.quarantined(column)))
        call(f"read {column}", lambda column=column: store.read(store.scored(column).nonzero()[0].tolist(), [column]))
        call(f"top {column}", lambda column=column: store.read([0], [column], [column]))
    call("read", lambda: [part.read(store) for part in parts(store)])
    call("verify", lambda: list(store.verify()))
    call("check", lambda: list(check_store(store)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        call("info", lambda: command.main(["info", str(folder)]))
    call("pickle", lambda: len(pickle.loads(pickle.dumps(store))))  # noqa: S301
    call("append", lambda: store.append([tiny_rollout("new")]))
    call(
        "score",
        lambda: store.append_scores("teacher", tiny_provenance(top_k=2), [evolve(tiny_scores(tiny_rollout("new")), top_k=tiny_top_k(3))]),
    )
    call("refuse", lambda: store.quarantine("judge", tiny_provenance("judge"), {"m3": "too long"}))
    call("compact", store.compact)
    if isinstance(store, ZarrStore):
        call("sweep", lambda: store.sweep(older_than=3600))
    call("again", lambda: len(KINDS[kind].open(folder)))
    return found


def cases(path: Path) -> list[tuple[Path, str, Callable[[], Any]]]:
    """Return all forgeries of a file."""
    return [(path, label, forge) for label, forge in forgeries(json.loads(path.read_text()))]


def main(kind: str, base: Path, count: int) -> None:
    """Try `count` forgeries, or all of them for 0."""
    os.fsync = lambda _: None  # nothing cuts the power here
    whole, work = base / "whole", base / "work"
    build(kind, whole)
    drawn = random.Random(7)
    kinds = [[case for path in drawn.sample(paths, min(3, len(paths))) for case in cases(path)] for paths in documents(whole).values()]
    for kind_cases in kinds:
        drawn.shuffle(kind_cases)
    in_turns = [case for several in zip_longest(*kinds) for case in several if case]
    assert examine(kind, copied(whole, work)) == [], "an honest store"
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + MEMORY,) * 2)
    warnings.simplefilter("ignore")
    for path, label, forge in in_turns[: count or None]:
        shutil.rmtree(work)
        copied(whole, work)
        original = path.read_text()
        (work / path.relative_to(whole)).unlink()
        (work / path.relative_to(whole)).write_bytes(sealed(forge(), json.loads(original)))
        name = f"{path.relative_to(whole)}: {label}"
        print(json.dumps({"begins": name}), flush=True)
        # a busy machine is slow: what counts is the time of the processor
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(20 * SECONDS)
        found = examine(kind, work)
        found += [f"made {other.name} beside the store" for other in base.iterdir() if other not in (whole, work)]
        print(json.dumps({"ended": name, "found": found}), flush=True)


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
