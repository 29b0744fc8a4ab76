"""vLLM's second model runner on a CPU, slowly: its kernels are Triton's, and run in Triton's interpreter.

vLLM takes Triton on a CPU only where that has a backend named "cpu": here is one, which compiles nothing.  The interpreter of Triton 3.7 runs all
that scoring needs; a request with a top_p ends vLLM.
"""

import os
from pathlib import Path

_BACKEND = """
from triton.backends.{module} import {base}


class Nothing({base}):
    \"\"\"Is never asked for anything.\"\"\"


Nothing.__abstractmethods__ = frozenset()
"""


def second_runner(folder: Path) -> dict[str, str]:
    """Return what to add to the environment of a process that imports vLLM; `folder` gets the backend."""
    package, metadata = folder / "interpreted", folder / "interpreted-0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").touch()
    for module, base in (("compiler", "BaseBackend"), ("driver", "DriverBase")):
        (package / f"{module}.py").write_text(_BACKEND.format(module=module, base=base))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: interpreted\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[triton.backends]\ncpu = interpreted\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
