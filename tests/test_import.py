"""The names of lopd bring numpy, torch, attrs and safetensors along, and nothing heavier; `import lopd` alone brings none of these."""

import json
import subprocess
import sys

import pytest
from test_public_api import MODULES

from lopd.errors import MissingDependencyError
from lopd.records.optional import need, needing

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
#: What cannot be imported without a package -> that package, and the extra that brings it.
LACKING = {
    "lopd.engines.hf": ("transformers", "hf"),
    "lopd.engines.identity": ("transformers", "hf"),
    "lopd.engines.on_ray": ("ray", "ray"),
    "lopd.engines.server": ("httpx2", "server"),
    "lopd.engines.vllm": ("transformers", "vllm"),
    "lopd.testing": ("hypothesis", "test"),
    "lopd.tools.console": ("rich", "hf"),
    "lopd.tools.phases": ("rich", "hf"),
    "lopd.tools.report": ("jinja2", "hf"),
    "lopd.tools.share": ("transformers", "hub"),
}


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


def test_what_cannot_be_imported_without_an_extra_says_what_to_install():
    script = f"""
import sys
from importlib import import_module
import torch
from lopd.errors import MissingDependencyError
for package in {[*FOREIGN, *(package for package, _ in LACKING.values())]}:
    sys.modules[package] = None
for module in {sorted({*MODULES, *LACKING})}:
    try:
        import_module(module)
    except MissingDependencyError as error:
        print(module, *str(error).split(": ")[1:])
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{module} {package} is not installed; pip install 'lopd[{extra}]'." for module, (package, extra) in LACKING.items()]


BROKEN = r"cannot be imported \({}\); mend that, or pip install 'lopd\[hub\]' in a new environment\.$"


def test_a_package_of_another_version_is_not_called_missing():
    with (
        pytest.raises(MissingDependencyError, match=r"^Cards: attrs " + BROKEN.format(r"cannot import name 'of_another_version'.*")),
        needing("x", "Cards", "hub"),
    ):
        from attrs import of_another_version  # noqa: F401


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libx.so.1: cannot open shared object file')", r"libx\.so\.1: cannot open shared object file"),
        ("import broken_package.no_such_module", r"No module named 'broken_package\.no_such_module'.*"),
        ("try:\n    {}['nms']\nexcept KeyError as error:\n    raise ModuleNotFoundError('Could not import X') from error", "'nms'"),
    ],
)
def test_a_package_whose_import_fails_is_not_called_missing(code, said, tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(MissingDependencyError, match=r"^Text: broken_package " + BROKEN.format(said)),
        needing("lopd", "Text", "hub"),  # as where a module of lopd needs the package
    ):
        need("broken_package", "lopd.module")
