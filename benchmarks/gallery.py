"""What each numbered example prints: `benchmarks/results/gallery.json`, and docs/examples.md.

make gallery     # under two minutes
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from record import ROOT, describe_machine, result_file

#: What an example is started with; a bucket may be any place.
ARGUMENTS = {"05_s3": ["runs/05/run.zarr"]}


def main() -> None:
    """Run all, one after the other, in a folder that is thrown away."""
    pages = sorted((ROOT / "examples").glob("[0-9]*.py"))
    with TemporaryDirectory() as folder:
        rows = [{"name": page.stem, "arguments": ARGUMENTS.get(page.stem, []), "printed": printed(page, folder)} for page in pages]
    result_file("gallery", describe_machine(), rows, [])


def printed(page: Path, folder: str) -> str:
    """Return what the page prints, without progress and warnings."""
    command = [sys.executable, str(page), *ARGUMENTS.get(page.stem, [])]
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env={**os.environ, **settings}, timeout=300)
    return done.stdout.replace(folder, "...").strip()


if __name__ == "__main__":
    main()
