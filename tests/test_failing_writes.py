"""A call that returned is on the disk, whatever `write()` of the system answered.  `LOPD_KILLS=300` tries every write of a small run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import fault_writes
import pytest

_ALL = "LOPD_KILLS" in os.environ
_NUMBERS = [*range(1, 61), *range(-20, 0)] if _ALL else [*range(1, 8), 20, 33, -1]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Return `tried(kind)`: what became of trials in which one write failed, or 2 % of all."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("it takes a C compiler on Linux")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(fault_writes.SHIM)
    library = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True)

    def work(kind: str) -> list[dict[str, Any]]:
        command = [sys.executable, fault_writes.__file__, library, kind, tmp_path_factory.mktemp("stores"), *map(str, _NUMBERS)]
        found = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library)}, stdout=subprocess.PIPE, check=True)
        return [json.loads(line) for line in found.stdout.splitlines()]

    return work


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["zarr", "lance"])
def test_a_write_that_fails_is_an_error_of_its_call_or_harms_nothing_that_was_acknowledged(
    kind: str, tried: Callable[[str], list[dict[str, Any]]]
) -> None:
    trials = tried(kind)
    assert [found for found in trials if found["lost"]] == []
    assert sum(found["hits"] for found in trials) >= len(_NUMBERS) // 2
    assert any(found["errors"] for found in trials)
    assert not [error for found in trials for error in found["errors"] if "could not be taken back" in error]
