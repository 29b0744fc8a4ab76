"""Importing lopd brings numpy, torch, attrs and safetensors along, and nothing heavier."""

import json
import subprocess
import sys

FOREIGN = ("zarr", "lancedb", "transformers", "vllm", "ray", "rich", "hypothesis", "pyarrow", "peft", "fsspec", "matplotlib", "tokenizers")


def imported_by(statement: str) -> set[str]:
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_lopd_imports_no_engine_storage_library_or_console():
    loaded = imported_by("import lopd")
    assert "lopd" in loaded
    assert not loaded & set(FOREIGN)


def test_the_list_of_public_names_is_what_the_package_gives():
    import lopd

    names = [name for name in vars(lopd) if not name.startswith("_")]
    assert {"collect_rollouts", "score_rollouts", "batches", "opd_steps", "evaluate", "MemoryStore", "ZarrStore"} <= set(names)
