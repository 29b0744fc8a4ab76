"""Importing lopd brings numpy, torch, attrs and safetensors along, and nothing heavier."""

import json
import subprocess
import sys

FOREIGN = (
    "zarr",
    "lancedb",
    "transformers",
    "vllm",
    "ray",
    "rich",
    "hypothesis",
    "pyarrow",
    "peft",
    "fsspec",
    "matplotlib",
    "tokenizers",
    "obstore",
    "datasets",
    "zstandard",
    "httpx2",
    "tenacity",
)


def imported_by(statement: str) -> set[str]:
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_lopd_imports_no_engine_storage_library_or_console():
    loaded = imported_by("import lopd")
    assert "lopd" in loaded
    assert not loaded & set(FOREIGN)
