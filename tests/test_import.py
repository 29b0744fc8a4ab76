"""The names of lopd bring numpy, torch, attrs and safetensors along, and nothing heavier; `import lopd` alone brings none of these."""

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
    # every public name, for each is imported when it is asked for
    loaded = imported_by("from lopd import *\nopd_steps")
    assert {"lopd", "torch"} <= loaded
    assert not loaded & set(FOREIGN)


def test_on_windows_the_import_is_refused_with_what_to_do():
    script = "import importlib.metadata, sys\nsys.platform = 'win32'\nimport lopd"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stderr.splitlines()[-1]
    assert said.startswith("lopd.errors.MissingDependencyError: lopd: the system is Windows, expected Linux or macOS; run it in WSL2")


def test_import_lopd_alone_waits_for_nothing_and_says_which_names_there_are():
    loaded = imported_by("import lopd\nassert {'batches', 'ZarrStore'} <= set(dir(lopd))\nassert not hasattr(lopd, 'batch')")
    assert not loaded & {"torch", "numpy"}
    imported_by("import lopd\nassert lopd.records.Prompt is lopd.Prompt")
