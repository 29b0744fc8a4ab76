"""Importing lopd brings numpy, torch, attrs and safetensors along, and nothing heavier."""

import json
import subprocess
import sys
from types import ModuleType

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


def test_the_public_names_of_the_package_are_these():
    import lopd

    # submodules become attributes as they are imported, by whomever
    names = {name for name, value in vars(lopd).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    verbs = {"collect_rollouts", "score_rollouts", "batches", "opd_steps", "evaluate", "evaluate_reverse_kl"}
    verbs |= {"save_checkpoint", "load_checkpoint", "collate", "by_rollout", "by_token", "floor_logprobs"}
    verbs |= {"watch_drift", "stored_advantages", "refresh_every", "refresh_when", "sample_round", "audit", "residualise"}
    things = {"MemoryStore", "ZarrStore", "LanceStore", "open_store", "CausalLMStudent", "ReferenceOPDLoss", "SFTLoss", "WeightedLoss"}
    things |= {"FusedLoss", "FusedOPDLoss", "FusedSFTLoss", "ReferenceLoss", "TopKObjective", "Chunking", "selected_logprobs"}
    records = {"Prompt", "Rollout", "Scores", "Manifest", "ModelId", "SamplingParams", "Lineage"}
    assert names == verbs | things | records | {"ConsistencyPolicy", "DriftLimits", "Residualiser", "LopdError", "Preflight"}
